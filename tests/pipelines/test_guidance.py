"""Guidance against Eqs. 6 and 7 as the paper writes them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2m.errors import InputError
from m2m.models.context import Context
from m2m.models.unet import ManyToManyUNet
from m2m.pipelines.guidance import guided_predictions, guided_steps, weighted_sum

IMAGES, BOTH = (Context((torch.full((1, 1, 1, 1, 1), n),), (torch.zeros(1, 1, 1, 1, 1),)) for n in (1.0, 2.0))
POSE = torch.ones(1, 12)
# what the three predictions of the equations would be
NOTHING, OF_IMAGES, OF_BOTH = 3.0, -2.0, 11.0


def predicted(context, condition) -> torch.Tensor:
    known = {(None, None): NOTHING, (1.0, None): OF_IMAGES, (2.0, 1.0): OF_BOTH}
    of_context = None if context is None else context.keys[0].item()
    return torch.tensor([known[of_context, None if condition is None else condition[0, 0].item()]])


def guided(predictions) -> float:
    return weighted_sum(
        [p.weight for p in predictions], [predicted(p.context, p.condition) for p in predictions]
    ).item()


@given(scale=st.floats(0, 20))
def test_one_scale_is_equation_6(scale):
    found = guided_predictions(null=None, images=IMAGES, both=None, condition=None, guidance_scale=scale)
    assert guided(found) == pytest.approx(NOTHING + scale * (OF_IMAGES - NOTHING), rel=1e-4, abs=1e-4)


@given(of_images=st.floats(0, 20), of_condition=st.floats(0, 20))
def test_two_scales_are_equation_7(of_images, of_condition):
    found = guided_predictions(
        null=None,
        images=IMAGES,
        both=BOTH,
        condition=POSE,
        guidance_scale=of_images,
        condition_guidance_scale=of_condition,
    )
    expected = NOTHING + of_images * (OF_IMAGES - NOTHING) + of_condition * (OF_BOTH - OF_IMAGES)
    assert guided(found) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("scales", "count"), [((7.5, 3.0), 3), ((7.5, None), 2), ((7.5, 7.5), 2), ((1.0, 1.0), 1), ((1.0, 3.0), 2)]
)
def test_no_prediction_is_made_in_vain(scales, count):
    found = guided_predictions(
        null=None,
        images=IMAGES,
        both=BOTH,
        condition=POSE,
        guidance_scale=scales[0],
        condition_guidance_scale=scales[1],
    )
    assert len(found) == count
    assert sum(prediction.weight for prediction in found) == pytest.approx(1)


def test_without_preceding_images_there_is_nothing_to_guide():
    assert len(guided_predictions(null=None, images=None, both=None, condition=None, guidance_scale=7.5)) == 1
    found = guided_predictions(
        null=None, images=None, both=None, condition=POSE, guidance_scale=7.5, condition_guidance_scale=3.0
    )
    assert [prediction.weight for prediction in found] == [-2.0, 3.0]


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        (None, range(10)),
        ((0.0, 1.0), range(10)),
        ((0.0, 0.4), range(4)),
        ((0.29, 0.71), range(3, 7)),
        ((1.0, 1.0), range(0)),
    ],
)
def test_an_interval_is_a_share_of_the_steps(interval, guided):
    assert list(guided_steps(10, interval)) == list(guided)


@pytest.mark.parametrize("interval", [(-0.1, 0.5), (0.5, 0.4), (0.0, 1.1), (float("nan"), 1.0)])
def test_an_interval_that_is_none_is_refused(interval):
    with pytest.raises(InputError, match="0 <= start <= stop <= 1"):
        guided_steps(10, interval)


@pytest.fixture
def branches(monkeypatch) -> list[int]:
    """How many predictions each call of the U-Net makes."""
    counts: list[int] = []
    denoise = ManyToManyUNet.denoise_branches

    def counting(self, noisy, timestep, given):
        counts.append(len(given))
        return denoise(self, noisy, timestep, given)

    monkeypatch.setattr(ManyToManyUNet, "denoise_branches", counting)
    return counts


def sample(pipeline, pictures, **given) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(pictures, num_inference_steps=5, generator=generator, output_type="latent", **given).images


@pytest.mark.parametrize("variant", ["self", "dino"])
def test_the_whole_interval_is_guidance_as_ever_and_outside_there_is_one_branch(
    make_pipeline, pictures, branches, variant
):
    pipeline = make_pipeline(variant)
    ever = sample(pipeline, pictures())
    assert torch.equal(sample(pipeline, pictures(), guidance_interval=(0.0, 1.0)), ever)
    assert branches == [2] * 10
    branches.clear()
    middle = sample(pipeline, pictures(), guidance_interval=(0.2, 0.6))
    assert branches == [1, 2, 2, 1, 1]
    assert (middle - ever).abs().max() > 1e-3
    never = sample(pipeline, pictures(), guidance_interval=(0.0, 0.0))
    assert torch.equal(never, sample(pipeline, pictures(), guidance_scale=1.0))


def test_both_scales_hold_inside_the_interval_alone(make_pipeline, pictures, branches):
    pipeline = make_pipeline("dino", "camera")
    given = {"condition": torch.rand(1, 4, 12), "target_condition": torch.rand(1, 1, 12)}
    scales = {"guidance_scale": 5.0, "condition_guidance_scale": 2.0}
    ever = sample(pipeline, pictures(), **given, **scales)
    assert torch.equal(sample(pipeline, pictures(), guidance_interval=(0.0, 1.0), **given, **scales), ever)
    branches.clear()
    sample(pipeline, pictures(), guidance_interval=(0.0, 0.4), **given, **scales)
    assert branches == [3, 3, 1, 1, 1]
    unguided = sample(pipeline, pictures(), guidance_scale=1.0, condition_guidance_scale=1.0, **given)
    assert torch.equal(sample(pipeline, pictures(), guidance_interval=(0.0, 0.0), **given, **scales), unguided)
    left_out = {"guidance_scale": 5.0, "condition_guidance_scale": 0.0}
    unguided = sample(pipeline, pictures(), guidance_scale=1.0, condition_guidance_scale=0.0, **given)
    assert torch.equal(sample(pipeline, pictures(), guidance_interval=(0.0, 0.0), **given, **left_out), unguided)
