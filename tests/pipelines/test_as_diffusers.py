"""What users of diffusers do with any of its pipelines: swap parts, share them, trade memory for time."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler

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
