"""Promises of the pipeline: exact autoregression, every image encoded once, any number of preceding images."""

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook
from PIL import Image

from m2m.errors import InputError
from m2m.models.context import Context
from m2m.pipelines.preceding import PrecedingImages

pytestmark = pytest.mark.filterwarnings("ignore:.* preceding images are given")
STEPS: dict[str, Any] = {"num_inference_steps": 3}
EXACT: dict[str, Any] = {"atol": 5e-5, "rtol": 1e-4}


def latents(pipeline, *args, **kwargs) -> torch.Tensor:
    return pipeline(*args, **STEPS, output_type="latent", **kwargs).images


def noise(sets: int = 1, images: int = 3) -> torch.Tensor:
    return torch.randn(sets, images, 4, 8, 8, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("variant", ["self", "dino"])
def test_a_context_image_is_encoded_once(make_pipeline, pictures, encoder_calls, variant):
    make_pipeline(variant)(pictures(), num_images=3, **STEPS)
    assert sum(encoder_calls) == 4 + 2  # the four given, then two of the three made (the last is read by nobody)


@pytest.mark.parametrize("variant", ["self", "dino"])
@torch.no_grad()
def test_it_is_equation_6_image_after_image(make_pipeline, pictures, variant):
    """By hand: training passes over growing sets, nothing cached, the target as the last image of its set."""
    pipeline = make_pipeline(variant)
    unet, scheduler, start = pipeline.unet, pipeline.scheduler, noise(2, 3)
    read = pipeline.encode(pictures(2).flatten(0, 1)).unflatten(0, (2, 4))
    key = "clean" if variant == "self" else "features"
    expected = []
    for number in range(3):
        scheduler.set_timesteps(3)
        z = start[:, number]
        for t in scheduler.timesteps:
            own = z[:, None].expand(-1, read.shape[1] + 1, -1, -1, -1)
            times = torch.full(own.shape[:2], int(t))
            keeps = (torch.tensor([keep] * 2) for keep in (True, False))
            given, null = (unet(own, times, **{key: read}, keep_context=keep)[:, -1] for keep in keeps)
            z = scheduler.step(null + 7.5 * (given - null), t, z).prev_sample
        expected.append(z)
        picture = (pipeline.vae.decode(z / 0.18215).sample / 2 + 0.5).clamp(0, 1)
        newer = z if variant == "self" else pipeline.encode(picture)
        read = torch.cat([read, newer[:, None]], dim=1)
    found = latents(pipeline, pictures(2), num_images=3, latents=start)
    torch.testing.assert_close(found, torch.stack(expected, 1), **EXACT)


@torch.no_grad()
def test_two_scales_are_equation_7(make_pipeline, pictures):
    pipeline, start = make_pipeline("dino", "camera"), noise(1, 1)
    poses, target = torch.rand(1, 4, 12), torch.rand(1, 1, 12)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    read = pipeline.encode(pictures()[0])[None]
    images, both = unet.encode_context(read), unet.encode_context(read, poses)
    scheduler.set_timesteps(3)
    z = start[:, 0]
    for t in scheduler.timesteps:
        e0, e1, e2 = unet.denoise(z, t), unet.denoise(z, t, images), unet.denoise(z, t, both, target[:, 0])
        z = scheduler.step(e0 + 5.0 * (e1 - e0) + 2.0 * (e2 - e1), t, z).prev_sample
    scales = {"guidance_scale": 5.0, "condition_guidance_scale": 2.0}
    given = {"condition": poses, "target_condition": target}
    found = latents(pipeline, pictures(), latents=start, **scales, **given)
    torch.testing.assert_close(found[:, 0], z, **EXACT)


@pytest.mark.parametrize("variant", ["self", "dino"])
def test_a_batch_is_its_sets_one_by_one(make_pipeline, pictures, variant):
    pipeline = make_pipeline(variant)
    generators = [torch.Generator().manual_seed(seed) for seed in (8, 9)]
    together = latents(pipeline, pictures(2), num_images=2, generator=generators)
    for number, seed in enumerate((8, 9)):
        own = [torch.Generator().manual_seed(seed)]
        alone = latents(pipeline, pictures(2)[number : number + 1], num_images=2, generator=own)
        torch.testing.assert_close(together[number : number + 1], alone, **EXACT)


def test_sets_may_be_of_any_lengths(make_pipeline, pictures, to_pil):
    pipeline, start = make_pipeline(), noise(3, 2)
    sets = [to_pil(pictures()[0])[:count] for count in (2, 0, 3)]
    together = latents(pipeline, sets, num_images=2, latents=start)
    for number, images in enumerate(sets):
        alone = latents(pipeline, [images], num_images=2, latents=start[number : number + 1])
        torch.testing.assert_close(together[number : number + 1], alone, **EXACT)


@pytest.mark.parametrize("variant", ["self", "dino"])
def test_no_preceding_image_is_fine(make_pipeline, variant):
    pipeline = make_pipeline(variant)
    first = latents(pipeline, num_images=2, latents=noise(1, 2))
    assert torch.equal(first, latents(pipeline, [], num_images=2, latents=noise(1, 2)))
    assert first.isfinite().all()


@pytest.mark.parametrize("variant", ["self", "dino"])
def test_the_window_forgets_the_oldest(make_pipeline, pictures, variant, encoder_calls):
    pipeline, images = make_pipeline(variant), pictures()
    windowed = latents(pipeline, images, latents=noise(1, 1), context_window=2)
    assert sum(encoder_calls) == 2
    torch.testing.assert_close(windowed, latents(pipeline, images[:, 2:], latents=noise(1, 1)), **EXACT)
    with_sink = latents(pipeline, images, latents=noise(1, 1), context_window=2, context_sink=1)
    torch.testing.assert_close(with_sink, latents(pipeline, images[:, [0, 3]], latents=noise(1, 1)), **EXACT)


@pytest.mark.parametrize("variant", ["self", "dino"])
@torch.no_grad()
def test_a_rollout_keeps_its_window_alone_and_without_one_as_much_for_every_image(make_pipeline, pictures, variant):
    pipeline = make_pipeline(variant)
    read = pipeline.encode(pictures()[0])[None]

    def kept(window: int | None, sink: int = 0) -> list[int]:
        memory, found = PrecedingImages(pipeline.unet, window, sink), []
        for number in range(20):
            memory.add(read[:, [number % 4]])
            _, context = memory.contexts(torch.tensor(0))
            assert isinstance(context, Context)
            # of all that is held, not only of what is read
            found.append(sum(tensor.untyped_storage().nbytes() for tensor in context.keys + context.values))
        return found

    whole = kept(None)
    assert whole == [whole[0] * (number + 1) for number in range(20)]
    assert kept(4, 1) == kept(4) == [whole[0] * min(4, number + 1) for number in range(20)]


def test_made_images_push_the_given_ones_out(make_pipeline, pictures):
    pipeline, start = make_pipeline("self"), noise(1, 3)
    rollout = latents(pipeline, pictures(), num_images=3, latents=start, context_window=2)
    last = latents(pipeline, preceding=rollout[:, :2], latents=start[:, 2:], context_window=2)
    torch.testing.assert_close(rollout[:, 2:], last, **EXACT)
    alone = latents(pipeline, latents=start[:, :1])
    torch.testing.assert_close(latents(pipeline, pictures(), latents=start[:, :1], context_window=0), alone, **EXACT)


def test_a_shared_timestep_and_zeroed_latents_are_options(make_pipeline, pictures, encoder_calls):
    shared = make_pipeline("self", clean_timestep=None)
    assert latents(shared, pictures(), num_images=2, context_window=2).isfinite().all()
    assert encoder_calls == [2] * 6  # nothing lasts longer than a step
    zeroed = make_pipeline("self", dropped_context="zeroed")
    empty = make_pipeline("self")
    found = [latents(pipeline, pictures(), latents=noise(1, 1)) for pipeline in (zeroed, empty)]
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["self", "dino"])
def test_a_context_in_bytes_changes_little_and_is_kept_as_any(make_pipeline, pictures, variant, encoder_calls):
    pipeline, start = make_pipeline(variant), noise(1, 3)
    exact = latents(pipeline, pictures(), num_images=3, latents=start, guidance_scale=2.0)
    encoder_calls.clear()
    given = {"latents": start, "guidance_scale": 2.0, "int8_context": True}
    found = latents(pipeline, pictures(), num_images=3, **given)
    assert sum(encoder_calls) == 4 + 2
    assert 0 < (found - exact).norm() < 2e-2 * exact.norm()
    windowed = latents(pipeline, pictures(), context_window=2, num_images=3, **given)
    torch.testing.assert_close(
        windowed[:, :1], latents(pipeline, pictures()[:, 2:], **{**given, "latents": start[:, :1]}), **EXACT
    )
    if variant == "self":
        with pytest.raises(InputError, match="no context to keep"):
            latents(make_pipeline("self", clean_timestep=None), pictures(), int8_context=True)


@pytest.mark.parametrize("variant", ["self", "dino"])
def test_without_its_cache_a_context_is_computed_at_every_step_and_is_the_same(
    make_pipeline, pictures, variant, encoder_calls
):
    pipeline, start = make_pipeline(variant), noise(1, 3)
    given = {"latents": start, "num_images": 3, "guidance_scale": 2.0, "context_window": 3}
    kept = latents(pipeline, pictures(), **given)
    encoder_calls.clear()
    anew = latents(pipeline, pictures(), **given, cache_context=False)
    assert encoder_calls == [3] * len(encoder_calls) and len(encoder_calls) % 3 == 0 and len(encoder_calls) > 3
    torch.testing.assert_close(anew, kept, **EXACT)
    with pytest.raises(InputError, match="cache_context is off"):
        latents(pipeline, pictures(), int8_context=True, cache_context=False)


def test_kinds_of_output(make_pipeline, pictures, to_pil):
    pipeline, start = make_pipeline(), noise(2, 2)
    tensor = pipeline(pictures(2), num_images=2, latents=start, output_type="pt", **STEPS).images
    assert tensor.shape == (2, 2, 3, 16, 16)
    assert tensor.min() >= 0 and tensor.max() <= 1
    (arrays,) = pipeline(pictures(2), num_images=2, latents=start, output_type="np", return_dict=False, **STEPS)
    assert torch.equal(torch.from_numpy(arrays), tensor.movedim(2, -1))
    pil = pipeline([to_pil(one) for one in pictures(2)], num_images=2, latents=start, **STEPS).images
    assert [len(one) for one in pil] == [2, 2]
    assert pil[1][1].size == (16, 16)
    again = torch.tensor([list(pil[1][1].convert("RGB").tobytes())]).view(16, 16, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(again, tensor[1, 1], atol=1 / 255, rtol=0)


def test_one_list_of_images_is_one_set_and_other_sizes_are_fitted(make_pipeline):
    made = make_pipeline()([Image.new("L", (40, 20)), Image.new("RGBA", (16, 16))], **STEPS).images
    assert [len(one) for one in made] == [1]


def test_the_callback_sees_every_step_and_may_change_it(make_pipeline, pictures):
    seen = []

    def callback(pipeline, step, timestep, given):
        seen.append(step)
        return {"latents": given["latents"] * 0}

    made = latents(make_pipeline(), pictures(), num_images=2, callback_on_step_end=callback)
    assert seen == list(range(6))
    assert made.count_nonzero() == 0


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"num_images": 0}, "at least 1"),
        ({"images": torch.zeros(0, 2, 3, 16, 16)}, "no set to carry on"),
        ({"output_type": "gif"}, "pil, np, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "'noise' is not known"),
        ({"images": [["a"]]}, r"images\[0\]\[0\] is a str"),
        ({"images": torch.full((1, 2, 3, 16, 16), 2.0)}, r"floats in \[0, 1\]"),
        ({"images": torch.full((1, 2, 3, 16, 16), torch.nan)}, "NaN"),
        ({"images": torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8)}, "torch.uint8: expected floats"),
        ({"images": torch.zeros(2, 3, 16, 16)}, r"expected \(sets, images"),
        ({"images": [torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 8, 16)]}, r"\(8, 16\) pixels; \(16, 16\) are asked"),
        ({"images": torch.zeros(1, 2, 3, 16, 16), "height": 18}, r"\(16, 16\) pixels; \(18, 16\) are asked"),
        ({"height": 17}, "multiples of 2"),
        ({"latents": torch.full((1, 1, 4, 8, 8), torch.inf)}, "latents holds NaN or infinite"),
        ({"preceding": torch.full((1, 2, 4, 8, 8), torch.nan)}, r"preceding\[0\] holds NaN"),
        ({"preceding": torch.zeros(1, 2, 5, 20)}, "M2M-Self reads scaled latents"),
        ({"preceding": torch.zeros(1, 2, 3, 8, 8)}, "with 4 on axis 1"),
        ({"preceding": [torch.zeros(1, 4, 8, 8), torch.zeros(2, 4, 4, 8)]}, "in the number of images only"),
        ({"latents": torch.zeros(1, 2, 4, 8, 8)}, r"expected \(1, 1, 4, 8, 8\)"),
        ({"images": torch.rand(2, 2, 3, 16, 16), "generator": [torch.Generator()]}, "1 generators for 2 sets"),
        ({"target_condition": torch.zeros(1, 1, 12)}, "takes no condition"),
        ({"context_window": 1, "context_sink": 2}, "can't hold"),
    ],
)
def test_what_does_not_fit_is_refused(make_pipeline, given, match):
    with pytest.raises(InputError, match=match):
        make_pipeline()(**STEPS, **given)


def test_conditions_that_do_not_fit_are_refused(make_pipeline, pictures):
    pipeline = make_pipeline("self", "position")
    steps = torch.arange(4.0).view(1, 4, 1)
    with pytest.raises(InputError, match="target_condition"):
        pipeline(pictures(), condition=steps, **STEPS)
    with pytest.raises(InputError, match=r"expected \(4, 1\)"):
        pipeline(pictures(), condition=steps[:, :3], target_condition=torch.full((1, 1, 1), 4.0), **STEPS)
    with pytest.raises(InputError, match=r"position.* holds NaN"):
        pipeline(pictures(), condition=steps / 0, target_condition=torch.full((1, 1, 1), 4.0), **STEPS)
    made = pipeline(pictures(), 2, condition=steps, target_condition=torch.tensor([[[4.0], [5.0]]]), **STEPS)
    assert len(made.images[0]) == 2


def test_a_fine_tuned_model_wants_its_condition_or_is_told_to_leave_it_out(make_pipeline, pictures):
    pipeline, start = make_pipeline("self", "position"), noise(1, 1)
    with pytest.raises(InputError, match="fine-tuned for a position condition: give target_condition"):
        pipeline(pictures(), latents=start, **STEPS)
    steps, target = torch.arange(4.0).view(1, 4, 1), torch.full((1, 1, 1), 4.0)
    without = latents(pipeline, pictures(), latents=start, condition_guidance_scale=0)
    given = {"condition": steps, "target_condition": target, "condition_guidance_scale": 0}
    torch.testing.assert_close(without, latents(pipeline, pictures(), latents=start, **given), **EXACT)


def test_more_images_than_the_window_are_said_to_be_unread(make_pipeline, pictures):
    with pytest.warns(UserWarning, match="4 preceding images are given, context_window=2"):
        latents(make_pipeline(), pictures(), context_window=2)


@pytest.mark.parametrize("variant", ["self", "dino"])
@pytest.mark.parametrize(("height", "width"), [(24, 32), (18, 10)])
def test_sizes_need_not_be_those_of_training(make_pipeline, pictures, variant, height, width):
    """Not even ones that the U-Net can halve."""
    pipeline = make_pipeline(variant)
    fitted = torch.rand(1, 2, 3, height, width, generator=torch.Generator().manual_seed(0))
    start = torch.randn(1, 2, 4, height // 2, width // 2, generator=torch.Generator().manual_seed(1))
    made = pipeline(fitted, 2, latents=start, output_type="pt", **STEPS).images
    assert made.shape == (1, 2, 3, height, width)
    asked = {"height": height, "width": width, "generator": torch.Generator().manual_seed(2)}
    again = pipeline([Image.new("RGB", (16, 16))], output_type="pt", **asked, **STEPS).images
    assert again.shape == (1, 1, 3, height, width)


@pytest.mark.parametrize("variant", ["self", "dino"])
def test_half_precision_is_close_and_comes_back(make_pipeline, pictures, variant):
    pipeline, start = make_pipeline(variant), noise(1, 2)
    exact = pipeline(pictures(), 2, latents=start, output_type="pt", **STEPS).images
    half = pipeline.to(torch.bfloat16)(pictures(), 2, latents=start, output_type="pt", **STEPS).images
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().mean() < 0.05
    arrays = pipeline(pictures(), 2, latents=start, output_type="np", **STEPS).images
    torch.testing.assert_close(torch.from_numpy(arrays), half.float().movedim(2, -1))


def test_a_parts_offloading_hook_is_asked_before_every_use(make_pipeline, pictures):
    """`enable_model_cpu_offload` moves a part when it is called; this U-Net is called by other names than forward."""
    pipeline, asked = make_pipeline("self"), []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            asked.append(1)
            return args, kwargs

    pipeline.unet._hf_hook = Hook()
    latents(pipeline, pictures(), num_images=2)
    assert len(asked) == 2 * 3 + 2  # every step, and the contexts of the given images and of the first made one


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["self", "dino"])
def test_a_gpu_and_offloading_make_the_same_pictures(make_pipeline, pictures, variant, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # with it the third decimal is another
    pipeline, start = make_pipeline(variant), noise(1, 2)
    exact = latents(pipeline, pictures(), num_images=2, latents=start)
    moved = latents(pipeline.to("cuda"), pictures(), num_images=2, latents=start)
    torch.testing.assert_close(moved.cpu(), exact, atol=1e-3, rtol=1e-3)
    pipeline.to("cpu").enable_model_cpu_offload()
    offloaded = pipeline(pictures(), num_images=2, latents=start, output_type="pt", **STEPS).images
    assert offloaded.isfinite().all()


@pytest.mark.parametrize("variant", ["self", "dino"])
def test_tensors_of_unequal_lengths_are_lists(make_pipeline, pictures, variant):
    pipeline, start = make_pipeline(variant), noise(3, 1)
    sets = [pictures()[0, :count] for count in (2, 0, 3)]
    found = latents(pipeline, sets, latents=start)
    read = [pipeline.encode(one) if len(one) else pipeline.encode(pictures()[0])[:0] for one in sets]
    torch.testing.assert_close(latents(pipeline, preceding=read, latents=start), found, **EXACT)
    for number, images in enumerate(sets):
        alone = latents(pipeline, images[None], latents=start[number : number + 1])
        torch.testing.assert_close(found[number : number + 1], alone, **EXACT)
