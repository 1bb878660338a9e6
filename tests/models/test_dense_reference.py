"""The whole U-Net against the paper's equations, written out on an unmodified U-Net of diffusers.

The reference takes no shortcut: every clean image is there, the last one too; keys and values of a set stand side by
side under a dense mask; nothing is cached. It shares no code with `m2m.models`, only the names of the weights.
"""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models.conftest import FEATURES, SMALL


class DenseMask:
    """Eq. 4 in the place of diffusers' cross-attention: Softmax(Q K^T / sqrt(d) + M) V."""

    def __init__(self, images: int, features: Tensor | None) -> None:
        self.images, self.features = images, features

    def __call__(self, attention: Any, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        rows, tokens, _width = hidden.shape
        kinds = 1 if self.features is not None else 2  # z' = [z_c; z_n']: clean, then noisy images of every set
        by_set = hidden.view(kinds, -1, self.images, tokens, hidden.shape[-1])
        read = by_set[0] if self.features is None else self.features
        sets, heads = by_set.shape[1], attention.heads
        q = attention.to_q(by_set).transpose(0, 1).reshape(sets, kinds * self.images * tokens, heads, -1)
        k, v = (project(read).flatten(1, 2).unflatten(-1, (heads, -1)) for project in (attention.to_k, attention.to_v))
        number = torch.arange(self.images)
        of_query = torch.cat([torch.zeros(self.images), number]) if kinds == 2 else number
        seen = number.repeat_interleave(read.shape[2])[None] < of_query.repeat_interleave(tokens)[:, None]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)  # a row of -inf sees nothing
        found = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        found = found.view(sets, kinds, self.images, tokens, -1).transpose(0, 1).reshape(rows, tokens, -1)
        return attention.to_out[0](found)


def by_the_equations(unet: Any, noisy: Tensor, timesteps: Tensor, read: Tensor) -> Tensor:
    """Noise of every image; `read`: latents (sets, N, C, h, w) or features (sets, N, tokens, width) of all images."""
    own = unet.variant == "self"
    config: dict[str, Any] = SMALL | {"cross_attention_dim": SMALL["block_out_channels"] if own else FEATURES}
    plain = UNet2DConditionModel(**config).eval()
    plain.load_state_dict(unet.state_dict())
    mask = DenseMask(noisy.shape[1], None if own else read)
    processors: dict[str, Any] = dict(plain.attn_processors)
    processors |= {name: mask for name in processors if ".attn2." in name}
    plain.set_attn_processor(processors)
    rows, times = noisy.flatten(0, 1), timesteps.flatten()
    if own:
        rows, times = torch.cat([read.flatten(0, 1), rows]), torch.cat([torch.zeros_like(times), times])
    predicted = plain(rows, times, encoder_hidden_states=torch.zeros(len(rows), 1, 1)).sample
    return predicted[-noisy[:, :, 0, 0, 0].numel() :].unflatten(0, noisy.shape[:2])


@pytest.mark.parametrize("variant", ["self", "dino"])
@settings(max_examples=6, deadline=None)
@given(
    sets=st.integers(1, 2),
    images=st.integers(1, 4),
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    tokens=st.integers(1, 6),
)
@torch.no_grad()
def test_a_training_pass_and_cached_predictions_are_the_equations(
    make_unet, variant, sets, images, height, width, tokens
):
    """For any number of sets and images, of any size; and a set of a batch is that set alone."""
    unet, g = make_unet(variant), torch.Generator().manual_seed(0)
    noisy = torch.randn(sets, images, 4, height, width, generator=g)
    timesteps = torch.randint(0, 1000, (sets, images), generator=g)
    shape = (4, height, width) if variant == "self" else (tokens, FEATURES)
    read = torch.randn(sets, images, *shape, generator=g)
    expected = by_the_equations(unet, noisy, timesteps, read)
    key = "clean" if variant == "self" else "features"
    torch.testing.assert_close(unet(noisy, timesteps, **{key: read}), expected, atol=2e-5, rtol=1e-5)
    alone = unet(noisy[-1:], timesteps[-1:], **{key: read[-1:]})
    torch.testing.assert_close(alone, expected[-1:], atol=2e-5, rtol=1e-5)
    context = unet.encode_context(read[:, : images - 1]) if images > 1 else None
    cached = unet.denoise(noisy[:, -1], timesteps[:, -1], context)
    torch.testing.assert_close(cached, expected[:, -1], atol=2e-5, rtol=1e-5)
