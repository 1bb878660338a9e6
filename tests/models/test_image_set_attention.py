"""Image-Set Attention against the paper's Eq. 4, written out with a dense mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m2m.errors import InputError
from m2m.models.context import Context
from m2m.models.image_set_attention import (
    FromContexts,
    ImageSetAttention,
    WholeSets,
    as_reads,
    chosen_attention,
    prefix_attention,
    set_attention,
)


def dense(q: Tensor, k: Tensor, v: Tensor, reads: Tensor | None = None) -> Tensor:
    """Softmax(Q K^T / sqrt(d)) V over all tokens of a set, token of image i sees tokens of images < i (section 5.1).

    q (B, N, L, H, d); k, v (B, N, S, H, d); reads (B, N, N) says which of those. A row that sees nothing gives zero.
    """
    sets, images, tokens, heads, dim = q.shape
    own = torch.arange(images).repeat_interleave(tokens)[:, None]
    seen = torch.arange(k.shape[1]).repeat_interleave(k.shape[2])[None, :]
    scores = torch.einsum("bnlhd,bmshd->bhnlms", q, k).reshape(sets, heads, images * tokens, -1) / dim**0.5
    scores = scores.masked_fill(~(seen < own), float("-inf"))
    if reads is not None:
        chosen = reads.repeat_interleave(tokens, 1).repeat_interleave(k.shape[2], 2)[:, None]
        scores = scores.masked_fill(~chosen, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)  # softmax of a row of -inf is NaN
    read = torch.einsum("bhqk,bkhd->bqhd", weights, v.flatten(1, 2))
    return read.reshape(q.shape)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(
    sets=st.integers(1, 3),
    images=st.integers(1, 5),
    tokens=st.integers(1, 6),
    image_tokens=st.integers(1, 7),
    heads=st.integers(1, 3),
)
def test_prefixes_are_the_causal_mask(sets, images, tokens, image_tokens, heads):
    q = random(sets, images, tokens, heads, 4)
    k, v = (random(sets, images, image_tokens, heads, 4, seed=seed) for seed in (1, 2))
    torch.testing.assert_close(prefix_attention(q, k, v), dense(q, k, v), atol=1e-12, rtol=0)


def test_gradients_are_those_of_the_mask():
    found = []
    for attention in (prefix_attention, dense):
        tensors = [random(2, 4, 3, 2, 4, seed=seed).requires_grad_() for seed in range(3)]
        attention(*tensors).square().sum().backward()
        found.append([tensor.grad for tensor in tensors])
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=0)


def test_the_last_image_is_read_by_nobody():
    q, k, v = (random(2, 4, 3, 2, 4, seed=seed) for seed in range(3))
    assert torch.equal(prefix_attention(q, k, v), prefix_attention(q, k[:, :-1], v[:, :-1]))


def test_no_image_gives_exactly_zero():
    q = random(2, 3, 2, 4)
    nothing = random(2, 0, 5, 2, 4)
    assert torch.equal(set_attention(q, nothing, nothing), torch.zeros_like(q))


def test_a_dropped_context_gives_exactly_zero_and_leaves_the_others():
    q, k, v = (random(3, 4, 3, 2, 4, seed=seed) for seed in range(3))
    keep = torch.tensor([[True] * 4, [False] * 4, [True, True, False, True]])
    read = prefix_attention(q, k, v, keep)
    expected = dense(q, k, v)
    expected[1] = 0
    expected[2, 2] = 0
    torch.testing.assert_close(read, expected, atol=1e-12, rtol=0)


@settings(max_examples=20, deadline=None)
@given(images=st.integers(2, 5), image_tokens=st.integers(1, 4), seed=st.integers(0, 1000))
def test_chosen_images_are_the_mask_that_chooses_them(images, image_tokens, seed):
    q = random(3, images, 3, 2, 4).requires_grad_()
    k, v = (random(3, images, image_tokens, 2, 4, seed=seed).requires_grad_() for seed in (1, 2))
    reads = torch.rand(3, images, images, generator=torch.Generator().manual_seed(seed)) < 0.5
    found = chosen_attention(q, k, v, as_reads(reads[:, :, :-1]))
    expected = dense(q, k, v, reads)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    both = [torch.autograd.grad(one.square().sum(), (q, k, v)) for one in (found, expected)]
    torch.testing.assert_close(*both, atol=1e-11, rtol=0)


def test_of_images_beside_each_other_nothing_is_copied_and_of_none_nothing_read():
    nearest = torch.tensor([[[True, True, True], [True, True, True], [False, True, True], [False, True, True]]])
    assert as_reads(nearest) == [[slice(0, 0), slice(0, 1), slice(1, 2), slice(1, 3)]]
    assert as_reads(torch.tensor([[[False] * 2, [False] * 2, [True, False]]])) == [[slice(0, 0)] * 2 + [slice(0, 1)]]
    apart = torch.tensor([[[False] * 3] * 3 + [[True, False, True]]])
    assert as_reads(apart)[0][3] == [0, 2]


@pytest.fixture
def layer() -> ImageSetAttention:
    torch.manual_seed(0)
    return ImageSetAttention(0, query_dim=8, context_dim=8, heads=2, head_dim=4, dropout=0.0).double().eval()


def test_a_layer_is_the_equation_between_its_projections(layer):
    clean, noisy = random(2, 3, 5, 8), random(2, 3, 5, 8, seed=1)
    q, k, v = layer.to_q(noisy), layer.to_k(clean), layer.to_v(clean)
    read = dense(*(tensor.unflatten(-1, (2, 4)) for tensor in (q, k, v))).flatten(-2)
    expected = layer.to_out[0](read)
    rows = torch.cat([clean[:, :2].flatten(0, 1), noisy.flatten(0, 1)])
    found = layer(rows, WholeSets(2, 3))
    torch.testing.assert_close(found[4:], expected.flatten(0, 1), atol=1e-12, rtol=0)
    # the clean stream reads nothing: what is left is the bias of to_out, as for an image without preceding images
    torch.testing.assert_close(found[:4], layer.to_out[0].bias.expand_as(found[:4]), atol=0, rtol=0)


def test_zero_features_are_no_features(layer):
    noisy = random(4, 5, 8)
    layer.context_dim = 8
    k, v = layer.keys_and_values(torch.zeros(2, 3, 7, 8, dtype=torch.float64))
    of_zeros = layer(noisy, FromContexts([Context((k,), (v,)), None]))
    assert torch.equal(of_zeros[:2], layer.to_out[0].bias.expand(2, 5, 8))
    assert torch.equal(of_zeros[2:], layer.to_out[0].bias.expand(2, 5, 8))


def test_text_embeddings_are_refused(layer):
    with pytest.raises(InputError, match="not text embeddings"):
        layer(random(1, 5, 8), random(1, 7, 8))
