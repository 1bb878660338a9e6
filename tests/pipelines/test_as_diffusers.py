"""What users of diffusers do with any of its pipelines: swap parts, share them, trade memory for time."""

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import EulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from m2m.pipelines.many_to_many import ManyToManyPipeline

VARIANTS = ("self", "dino")


def sample(pipeline, pictures, **given) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(pictures, 2, num_inference_steps=2, generator=generator, output_type="pt", **given).images


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_pipeline_may_share_the_parts(make_pipeline, pictures, variant):
    pipeline = make_pipeline(variant)
    assert set(pipeline.components) == {"vae", "unet", "scheduler", "image_encoder"}
    shared = ManyToManyPipeline(**pipeline.components)
    shared.set_progress_bar_config(disable=True)
    assert torch.equal(sample(shared, pictures()), sample(pipeline, pictures()))
    assert shared.unet is pipeline.unet


@pytest.mark.parametrize("variant", VARIANTS)
def test_slicing_trades_time_for_memory_and_changes_nothing(make_pipeline, pictures, variant):
    pipeline = make_pipeline(variant)
    expected = sample(pipeline, pictures(2))
    pipeline.enable_attention_slicing(1)
    pipeline.vae.enable_slicing()
    torch.testing.assert_close(sample(pipeline, pictures(2)), expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_given_on_loading_take_the_place_of_the_saved_ones(make_pipeline, pictures, tmp_path, variant):
    pipeline = make_pipeline(variant)
    pipeline.save_pretrained(tmp_path)
    given = {"unet": pipeline.unet, "scheduler": EulerDiscreteScheduler.from_config(pipeline.scheduler.config)}
    loaded = ManyToManyPipeline.from_pretrained(tmp_path, **given)
    assert loaded.unet is pipeline.unet and loaded.scheduler is given["scheduler"]
    assert sample(loaded, pictures()).isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_call_leaves_the_pipeline_as_it_was(make_pipeline, pictures, variant):
    pipeline = make_pipeline(variant)
    first = sample(pipeline, pictures())
    sample(pipeline, pictures(1, 2), guidance_scale=2.0)
    assert torch.equal(sample(pipeline, pictures()), first)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_in_tiles_is_about_the_image(make_pipeline, pictures, variant):
    pipeline = make_pipeline(variant)
    whole = sample(pipeline, pictures())
    pipeline.vae.enable_tiling()
    assert torch.equal(sample(pipeline, pictures()), whole), "tiles are larger than these pictures"
    pipeline.vae.tile_sample_min_size, pipeline.vae.tile_latent_min_size = 8, 4
    in_tiles = sample(pipeline, pictures())
    assert in_tiles.shape == whole.shape and in_tiles.isfinite().all()


def test_a_pipeline_can_be_made_from_another(make_pipeline, pictures):
    pipeline = make_pipeline("dino")
    pipeline.register_to_config(context_window=3)
    again = ManyToManyPipeline.from_pipe(pipeline)
    again.set_progress_bar_config(disable=True)
    assert again.unet is pipeline.unet and again.config["context_window"] == 3
    assert torch.equal(sample(again, pictures(1, 2)), sample(pipeline, pictures(1, 2)))


def test_parts_lie_elsewhere_until_a_layer_needs_them(make_pipeline, pictures):
    """As `enable_sequential_cpu_offload` has it, here with the CPU as the device that computes."""
    pipeline = make_pipeline("dino", "camera")
    given = {"condition": torch.rand(1, 4, 12), "target_condition": torch.rand(1, 2, 12)}
    expected = sample(pipeline, pictures(), **given)
    for part in (pipeline.vae, pipeline.unet, pipeline.image_encoder):
        cpu_offload(part, torch.device("cpu"), offload_buffers=True)
    torch.testing.assert_close(sample(pipeline, pictures(), **given), expected, atol=1e-6, rtol=0)


def test_groups_of_layers_lie_elsewhere_until_they_are_needed(make_pipeline, pictures):
    pipeline, here = make_pipeline("self"), torch.device("cpu")
    expected = sample(pipeline, pictures())
    pipeline.enable_group_offload(here, here, offload_type="leaf_level")
    torch.testing.assert_close(sample(pipeline, pictures()), expected, atol=1e-6, rtol=0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("ask", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_without_an_accelerator_is_refused_and_leaves_the_pipeline_whole(make_pipeline, pictures, ask):
    pipeline = make_pipeline("self")
    with pytest.raises(RuntimeError, match="accelerator"):
        getattr(pipeline, ask)()
    assert sample(pipeline, pictures()).isfinite().all()


class Halved(PipelineCallback):
    """After a share of the steps, each step leaves half of the latents."""

    tensor_inputs: Any = ["latents"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        config: Any = self.config
        after = config.cutoff_step_ratio * pipeline.num_timesteps
        scale = 0.5 if step_index % pipeline.num_timesteps >= after else 1.0
        return {"latents": callback_kwargs["latents"] * scale}


def test_callbacks_may_be_diffusers_own_kind(make_pipeline, pictures):
    pipeline = make_pipeline("self")
    settings: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    plain = pipeline(pictures(), generator=torch.Generator().manual_seed(0), **settings)
    for callback, scale in ((Halved(0.5), 0.5), (MultiPipelineCallbacks([Halved(0.5), Halved(0.5)]), 0.25)):
        found = pipeline(
            pictures(),
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=("anything",),  # the callback knows better
            **settings,
        )
        torch.testing.assert_close(found.images, scale * plain.images)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tuple_holds_what_the_output_does(make_pipeline, pictures, variant):
    pipeline = make_pipeline(variant)
    for kind in ("np", "pt", "latent"):
        found = [
            pipeline(
                pictures(1, 1),
                num_inference_steps=1,
                generator=torch.Generator().manual_seed(0),
                output_type=kind,
                return_dict=as_output,
            )
            for as_output in (True, False)
        ]
        assert len(found[1]) == 1
        torch.testing.assert_close(torch.as_tensor(found[0].images), torch.as_tensor(found[1][0]), atol=0, rtol=0)


def test_a_u_net_compiled_from_outside_is_said_to_be_as_slow_as_before(make_pipeline, pictures):
    pipeline = make_pipeline("self")
    expected = sample(pipeline, pictures())
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    with pytest.warns(UserWarning, match=r"call unet\.compile"):
        assert torch.equal(sample(pipeline, pictures()), expected)
