"""Contexts in bytes: half the memory, a small and bounded error, and otherwise as contexts are."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from m2m.models.context import Context
from m2m.models.int8_context import Int8Context
from m2m.models.unet import ManyToManyUNet
from tests.models.conftest import SMALL

# as many numbers a head as in Stable Diffusion: the share of the scales depends on it
WIDE: dict[str, Any] = SMALL | {"block_out_channels": (64, 128), "attention_head_dim": (1, 2)}


def random_context(images: int = 3, dim: int = 64, scale: float = 1.0) -> Context:
    g = torch.Generator().manual_seed(0)
    keys, values = ((scale * torch.randn(2, images, 5, 2, dim, generator=g),) * 2 for _ in range(2))
    return Context(keys, values)


def images_of(context: Context, part: slice) -> Context:
    return Context(tuple(k[:, part] for k in context.keys), tuple(v[:, part] for v in context.values))


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-3, 1e3), dim=st.sampled_from([1, 8, 64]))
def test_a_number_is_off_by_half_a_level_at_most(scale, dim):
    exact = random_context(dim=dim, scale=scale)
    rounded = Int8Context.of(exact)
    for vectors, back in zip(exact.layer(1), rounded.layer(1)):
        largest = vectors.abs().amax(-1, keepdim=True)
        # a scale is of half precision: a vector's largest number may lie a little above the last level
        assert ((back - vectors).abs() <= largest * (0.5 / 127 + 2**-11) + 127 * 2**-25).all()


def test_zeros_stay_zeros_and_large_numbers_finite():
    k = torch.zeros(1, 1, 2, 1, 4)
    k[0, 0, 1] = 60_000
    keys, _ = Int8Context.of(Context((k,), (k,))).layer(0)
    assert torch.equal(keys[0, 0, 0], k[0, 0, 0])
    torch.testing.assert_close(keys, k, rtol=5e-3, atol=0)


def test_it_grows_and_forgets_without_rounding_again():
    exact = random_context(images=4)
    whole, first, others = (Int8Context.of(images_of(exact, part)) for part in (slice(4), slice(1), slice(1, 4)))
    both = first.append(others)
    assert len(both) == 4 and both.sets == 2
    assert all(torch.equal(one, other) for one, other in zip(both.layer(0), whole.layer(0)))
    kept = both.window(recent=1, sink=1)
    assert kept is not None
    assert torch.equal(kept.layer(1)[0], whole.layer(1)[0][:, [0, 3]])
    assert both.window(0) is None


@pytest.mark.parametrize("variant", ["self", "dino"])
@torch.no_grad()
def test_half_the_memory_changes_a_prediction_by_less_than_a_hundredth(variant):
    torch.manual_seed(0)
    unet = ManyToManyUNet.from_text_to_image(UNet2DConditionModel(**WIDE), variant, 96).eval()
    shape = (4, 8, 8) if variant == "self" else (5, 96)
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor(500)
    context = unet.encode_context(torch.randn(2, 4, *shape))
    rounded = Int8Context.of(context)
    of_half_precision = context.bytes / 2
    assert rounded.bytes <= 0.55 * of_half_precision
    exact, nothing = unet.denoise(noisy, t, context), unet.denoise(noisy, t)
    change = (unet.denoise(noisy, t, rounded) - exact).norm()
    assert 0 < change <= 1e-2 * exact.norm()
    assert change <= 2e-2 * (exact - nothing).norm()  # nor is what the images say lost


@torch.no_grad()
def test_layers_read_the_type_of_the_model(make_unet):
    unet = make_unet("dino").to(torch.bfloat16)
    context = Int8Context.of(unet.encode_context(torch.randn(1, 2, 5, 20, dtype=torch.bfloat16)))
    assert unet.denoise(torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16), 3, context).dtype == torch.bfloat16
