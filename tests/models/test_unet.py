"""The U-Net's promises: one training pass is N inferences, contexts are cached exactly, dropped is empty."""

import itertools
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from m2m.errors import ConfigError, InputError
from m2m.models.sd21 import DINOV2_GIANT_WIDTH, SD21_BASE_UNET, dinov2_tokens
from m2m.models.unet import ManyToManyUNet

VARIANTS = ("self", "dino")
CONDITIONS = (None, "camera", "position")
EXACT: dict[str, Any] = {"atol": 2e-5, "rtol": 0}


def read_of(given: dict) -> torch.Tensor:
    """What is read of all images but the last."""
    return given["clean"][:, :-1] if "clean" in given else given["features"]


@torch.no_grad()
@pytest.mark.parametrize(("variant", "condition"), list(itertools.product(VARIANTS, CONDITIONS)))
def test_a_training_pass_is_n_inferences(make_unet, make_sets, variant, condition):
    unet, given = make_unet(variant, condition), make_sets(variant, condition)
    trained = unet.training_forward(**given)
    context = None
    for i in range(4):
        of_target = given["condition"][:, i] if condition else None
        alone = unet.denoise(given["noisy"][:, i], given["timesteps"][:, i], context, of_target)
        torch.testing.assert_close(trained[:, i], alone, **EXACT)
        if i < 3:
            of_image = given["condition"][:, i : i + 1] if condition else None
            newer = unet.encode_context(read_of(given)[:, i : i + 1], of_image)
            context = newer if context is None else context.append(newer)
    assert trained.abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_target_depends_on_itself_and_the_images_before_it_alone(make_unet, make_sets, variant):
    unet, given = make_unet(variant), make_sets(variant)
    before = unet(**given)
    key = "clean" if variant == "self" else "features"
    for changed in range(3):
        for name in ("noisy", key):
            other = {**given, name: given[name].clone()}
            other[name][:, changed] += 1
            moved = (unet(**other) - before).abs().amax((0, 2, 3, 4)) > 1e-5
            expected = [i == changed if name == "noisy" else i > changed for i in range(4)]
            assert moved.tolist() == expected, (name, changed)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_clean_image_is_left_out(make_unet, make_sets, variant):
    unet, given = make_unet(variant), make_sets(variant)
    key = "clean" if variant == "self" else "features"
    all_images = torch.cat([read_of(given), torch.full_like(read_of(given)[:, :1], torch.nan)], dim=1)
    assert torch.equal(unet(**{**given, key: all_images}), unet(**{**given, key: read_of(given)}))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cached_context_is_the_joint_pass_over_ten_steps(make_unet, make_sets, variant):
    unet, given = make_unet(variant), make_sets(variant, images=3)
    key = "clean" if variant == "self" else "features"
    read = read_of(given)
    context = unet.encode_context(read)
    ends = []
    for cached in (True, False):
        scheduler: Any = DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(10)
        latents = given["noisy"][:, 0]
        for t in scheduler.timesteps:
            if cached:
                noise = unet.denoise(latents, t, context)
            else:  # all three images in one pass, of which the last is the target
                sets = latents[:, None].expand(-1, 3, -1, -1, -1)
                noise = unet(sets, torch.full((2, 3), int(t)), **{key: read})[:, -1]
            latents = scheduler.step(noise, t, latents).prev_sample
        ends.append(latents)
    torch.testing.assert_close(ends[0], ends[1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(3)))
@torch.no_grad()
def test_preceding_images_have_no_order(make_unet, variant, order):
    unet = make_unet(variant)
    g = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, 8, 8, generator=g)
    images = torch.randn(1, 3, *((4, 8, 8) if variant == "self" else (5, 20)), generator=g)
    first, second = (unet.denoise(noisy, 400, unet.encode_context(read)) for read in (images, images[:, list(order)]))
    torch.testing.assert_close(first, second, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_three_times_is_that_image_once(make_unet, variant):
    """Softmax is a mean: how many images agree is seen by what else differs in them alone (docs/results, section 2)."""
    unet = make_unet(variant)
    g = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, 8, 8, generator=g)
    image, other = torch.randn(2, 1, 1, *((4, 8, 8) if variant == "self" else (5, 20)), generator=g).unbind()
    contexts = (image, image.expand(-1, 3, *image.shape[2:]), torch.cat([image, other], 1))
    once, thrice, with_another = (unet.denoise(noisy, 400, unet.encode_context(read)) for read in contexts)
    torch.testing.assert_close(once, thrice, **EXACT)
    assert (once - with_another).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_dropped_is_empty(make_unet, make_sets, variant):
    unet, given = make_unet(variant), make_sets(variant)
    keep = torch.tensor([True, False])
    found = unet(**given, keep_context=keep)
    torch.testing.assert_close(found[0], unet(**given)[0], **EXACT)
    for i in range(4):
        torch.testing.assert_close(
            found[:, i][1:], unet.denoise(given["noisy"][1:, i], given["timesteps"][1:, i]), **EXACT
        )
    by_image = torch.tensor([[True, True, False, True]] * 2)
    found = unet(**given, keep_context=by_image)
    torch.testing.assert_close(found[:, 3], unet(**given)[:, 3], **EXACT)
    torch.testing.assert_close(found[:, 2], unet.denoise(given["noisy"][:, 2], given["timesteps"][:, 2]), **EXACT)


@torch.no_grad()
def test_zeroed_features_are_a_dropped_context(make_unet, make_sets):
    unet, given = make_unet("dino"), make_sets("dino")
    zeroed = unet(**{**given, "features": torch.zeros_like(given["features"])})
    dropped = unet(**given, keep_context=torch.tensor([False, False]))
    torch.testing.assert_close(zeroed, dropped, **EXACT)


@torch.no_grad()
def test_zeroed_latents_are_the_option_of_the_paper_s_letter(make_unet, make_sets):
    unet, given = make_unet("self", dropped_context="zeroed"), make_sets("self")
    found = unet(**given, keep_context=torch.tensor([True, False]))
    zeroed = unet(**{**given, "clean": torch.zeros_like(given["clean"])})
    torch.testing.assert_close(found[1], zeroed[1], **EXACT)
    noisy, t = given["noisy"][:, 3], given["timesteps"][:, 3]
    null = unet.null_context(noisy)
    torch.testing.assert_close(unet.denoise(noisy, t, null)[1], found[1, 3], **EXACT)  # three zeros read as one
    assert (unet.denoise(noisy, t, null) - unet.denoise(noisy, t)).abs().max() > 1e-3


@pytest.mark.parametrize(("variant", "condition"), [("self", None), ("self", "camera"), ("dino", "position")])
def test_gradient_checkpointing_changes_nothing(make_unet, make_sets, variant, condition):
    unet, given = make_unet(variant, condition).train(), make_sets(variant, condition, images=3)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        unet(**given, keep_context=torch.tensor([True, False])).square().mean().backward()
        found.append({name: parameter.grad.clone() for name, parameter in unet.named_parameters()})
    assert all(gradient.isfinite().all() for gradient in found[0].values())
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], atol=1e-6, rtol=1e-4, msg=name)
    unused = [name for name, gradient in found[0].items() if gradient.count_nonzero() == 0]
    assert not unused


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_target_s_pose_reaches_the_model(make_unet, make_sets, variant):
    unet, given = make_unet(variant, "camera"), make_sets(variant, "camera")
    context = unet.encode_context(read_of(given), given["condition"][:, :-1])
    for reads in (context, None):  # even the first image, which reads nothing
        here, there = (unet.denoise(given["noisy"][:, 3], 500, reads, given["condition"][:, i]) for i in (2, 3))
        assert (here - there).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_dropped_condition_is_none(make_unet, make_sets, variant):
    unet, given = make_unet(variant, "camera"), make_sets(variant, "camera")
    found = unet(**given, keep_condition=torch.tensor([True, False]))
    torch.testing.assert_close(found[0], unet(**given)[0], **EXACT)
    without = {key: value for key, value in given.items() if key != "condition"}
    torch.testing.assert_close(found[1], unet(**without)[1], **EXACT)
    assert (found[0] - unet(**without)[0]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("variant", "condition"), list(itertools.product(VARIANTS, CONDITIONS[1:])))
def test_a_fresh_condition_leaves_the_predictions_as_they_were(make_unet, make_sets, variant, condition):
    unet, given = make_unet(variant), make_sets(variant, condition)
    conditioned = unet.add_condition(condition)
    without = {key: value for key, value in given.items() if key != "condition"}
    assert torch.equal(conditioned(**given), unet(**without))
    assert conditioned.config["condition"] == condition
    assert set(conditioned.origin.copied) == set(unet.state_dict())
    assert all("condition_embedder" in name for name in conditioned.origin.new)


@torch.no_grad()
def test_several_branches_are_several_predictions(make_unet, make_sets):
    unet, given = make_unet("dino", "camera"), make_sets("dino", "camera")
    noisy, pose = given["noisy"][:, 3], given["condition"][:, 3]
    context = unet.encode_context(given["features"], given["condition"][:, :-1])
    branches = [(None, None), (context, None), (context, pose)]
    for (reads, of_target), found in zip(branches, unet.denoise_branches(noisy, 300, branches)):
        torch.testing.assert_close(found, unet.denoise(noisy, 300, reads, of_target), **EXACT)


@torch.no_grad()
def test_a_shared_timestep_is_an_option(make_unet, make_sets):
    unet, given = make_unet("self", clean_timestep=None), make_sets("self")
    given["timesteps"] = torch.tensor([[700] * 4, [30] * 4])
    found = unet(**given)[:, 3]
    for row, t in ((0, 700), (1, 30)):
        context = unet.encode_context(given["clean"][row : row + 1, :3], timestep=t)
        alone = unet.denoise(given["noisy"][row : row + 1, 3], t, context)
        torch.testing.assert_close(found[row : row + 1], alone, **EXACT)
    with pytest.raises(InputError, match="timestep"):
        unet.encode_context(given["clean"])


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_image_needs_no_preceding_ones(make_unet, make_sets, variant):
    unet, given = make_unet(variant), make_sets(variant, images=1)
    torch.testing.assert_close(
        unet(**given)[:, 0], unet.denoise(given["noisy"][:, 0], given["timesteps"][:, 0]), **EXACT
    )


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_and_autocast_run(make_unet, make_sets, variant):
    unet, given = make_unet(variant), make_sets(variant)
    exact = unet(**given)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = unet(**given)
    assert (mixed.float() - exact).abs().max() < 0.2
    half = unet.add_condition("camera").to(torch.bfloat16)
    cast = {key: value.bfloat16() if value.is_floating_point() else value for key, value in given.items()}
    assert (half(**cast).float() - exact).abs().max() < 0.2
    context = half.encode_context(read_of(cast))
    assert half.denoise(cast["noisy"][:, 0], 10, context, torch.zeros(2, 12)).dtype == torch.bfloat16


def test_it_learns(make_unet, make_sets):
    unet, given = make_unet("self").train(), make_sets("self", images=3)
    target = torch.randn(given["noisy"].shape, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = (unet(**given) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tiny_text_to_image_model_can_be_the_start(variant):
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 16,
        "out_channels": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (64, 128),
        "layers_per_block": 1,
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
    }
    tiny = UNet2DConditionModel(**config)
    unet = ManyToManyUNet.from_text_to_image(tiny, variant, feature_dim=96)
    read = torch.randn(1, 2, *((16, 8, 8) if variant == "self" else (65, 96)))
    key = "clean" if variant == "self" else "features"
    assert unet(torch.randn(1, 3, 16, 8, 8), torch.tensor([[1, 2, 3]]), **{key: read}).shape == (1, 3, 16, 8, 8)


def test_sizes_of_the_paper_s_models():
    """Self: 0.8 M less than SD-2.1-base's 865.9 M, as keys and values come from 320 to 1280 channels and not 1024."""
    with torch.device("meta"):
        plain = UNet2DConditionModel(**SD21_BASE_UNET)
        expected = UNet2DConditionModel(**{**SD21_BASE_UNET, "cross_attention_dim": (320, 640, 1280, 1280)})
        own = ManyToManyUNet.from_text_to_image(SD21_BASE_UNET, "self")
        dino = ManyToManyUNet.from_text_to_image(SD21_BASE_UNET, "dino", DINOV2_GIANT_WIDTH)
    count = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (plain, expected, own, dino)]
    assert count == pytest.approx([865.91, 865.13, 865.13, 878.69], abs=0.005)
    assert all(parameter.is_meta for parameter in own.parameters())
    assert own.state_dict().keys() == expected.state_dict().keys()
    assert (dinov2_tokens(224), dinov2_tokens(518)) == (257, 1370)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"features": torch.zeros(2, 3, 5, 20)}, "M2M-Self reads latents"),
        ({"clean": None}, "M2M-Self reads latents"),
        ({"clean": torch.zeros(2, 1, 4, 8, 8)}, "3 or 4 images"),
        ({"condition": torch.zeros(2, 4, 12)}, "no condition embedder"),
    ],
)
def test_what_does_not_fit_is_refused(make_unet, make_sets, change, match):
    with pytest.raises(InputError, match=match):
        make_unet("self")(**{**make_sets("self"), **change})


def test_features_of_another_width_are_refused(make_unet, make_sets):
    with pytest.raises(InputError, match="width 7"):
        make_unet("dino")(**{**make_sets("dino"), "features": torch.zeros(2, 3, 5, 7)})
    with pytest.raises(InputError, match="2 noisy images but a context of 1 sets"):
        unet = make_unet("dino")
        unet.denoise(torch.zeros(2, 4, 8, 8), 1, unet.encode_context(torch.zeros(1, 1, 5, 20)))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"variant": "clip"}, "self, dino"),
        ({"condition": "weather"}, "camera, position"),
        ({"format_version": 99}, "format_version 99"),
        ({"dropped_context": "noise"}, "empty, zeroed"),
        ({"only_cross_attention": True}, "only_cross_attention=True"),
    ],
)
def test_unknown_settings_are_refused(text_to_image, settings, match):
    config = {key: value for key, value in text_to_image.config.items() if not key.startswith("_")}
    with pytest.raises(ConfigError, match=match), torch.device("meta"):
        ManyToManyUNet(**{**config, **settings})
