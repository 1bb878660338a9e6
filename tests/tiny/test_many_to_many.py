"""M2M's tiny starting weights: the sets they learn from, and that the shipped ones are what a stage can start from."""

import json

import numpy as np
import pytest
import torch

from m2m.tiny import WEIGHTS
from m2m.tiny.many_to_many import IMAGES_PER_SET, draw_set
from m2m.training.starting import continued_unet


def test_a_set_is_drawn_from_its_generator_alone():
    first, again, other = (draw_set(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (IMAGES_PER_SET, 64, 64, 3) and first.dtype == np.uint8
    assert (first == again).all() and not (first == other).all()


@pytest.mark.parametrize("variant, width", [("self", None), ("dino", 96)])
def test_the_shipped_weights_are_a_start_for_pretraining(variant, width):
    folder = WEIGHTS / f"m2m-{variant}"
    unet = continued_unet(folder, variant, width, {})
    assert all(torch.isfinite(weight).all() and weight.dtype == torch.float32 for weight in unet.state_dict().values())
    assert json.loads((folder / "made_by.json").read_text())["command"].startswith(f"python -m m2m.tiny m2m {variant}")
