"""Guidance against Eqs. 6 and 7 as the paper writes them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2m.models.context import Context
from m2m.pipelines.guidance import guided_predictions, weighted_sum

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
