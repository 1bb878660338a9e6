"""FlexAttention's block mask against the loop over prefixes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from m2m.errors import ConfigError
from m2m.models.flex_attention import block_mask, flex_prefix_attention
from m2m.models.image_set_attention import prefix_attention

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def random_set(sets: int, images: int, tokens: int, image_tokens: int, heads: int, dim: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(sets, images, count, heads, dim) for count in (tokens, image_tokens, image_tokens)]
    return [torch.randn(shape, generator=g) for shape in shapes]


@settings(max_examples=8, deadline=None)
@given(
    sets=st.integers(1, 2),
    images=st.integers(1, 4),
    tokens=st.integers(1, 70),
    image_tokens=st.integers(1, 70),
    heads=st.integers(1, 2),
)
@torch.no_grad()
def test_the_block_mask_is_the_loop(sets, images, tokens, image_tokens, heads):
    q, k, v = random_set(sets, images, tokens, image_tokens, heads, 16)
    keep = torch.rand(sets, images, generator=torch.Generator().manual_seed(1)) < 0.7
    for kept in (None, keep):
        found = flex_prefix_attention(q, k, v, kept)
        torch.testing.assert_close(found, prefix_attention(q, k, v, kept), atol=2e-6, rtol=1e-5)
    assert torch.equal(found[:, 0], torch.zeros_like(found[:, 0]))
    assert torch.equal(flex_prefix_attention(q, k[:, :-1], v[:, :-1], keep), found)  # the last is read by nobody


@settings(max_examples=25, deadline=None)
@given(images=st.integers(1, 4), tokens=st.integers(1, 300), image_tokens=st.integers(1, 300))
def test_blocks_are_those_that_flex_attention_finds_by_asking_about_every_token(images, tokens, image_tokens):
    found = block_mask(images, tokens, image_tokens, torch.device("cpu"))
    expected = create_block_mask(found.mask_mod, None, None, images * tokens, images * image_tokens, "cpu")
    assert found.seq_lengths == expected.seq_lengths and found.BLOCK_SIZE == expected.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = [getattr(mask, f"{kind}_num_blocks") for mask in (found, expected)]
        places = [getattr(mask, f"{kind}_indices") for mask in (found, expected)]
        assert torch.equal(*counts), kind
        for row, count in enumerate(counts[0].flatten().tolist()):
            assert torch.equal(*(place.flatten(0, -2)[row, :count] for place in places)), kind


@pytest.mark.parametrize("variant", ["self", "dino"])
@torch.no_grad()
def test_a_training_pass_is_the_same_either_way(make_unet, make_sets, variant):
    unet, of_sets = make_unet(variant), make_sets(variant)
    keep = torch.tensor([True, False])
    expected = unet(**of_sets, keep_context=keep)
    unet.set_training_attention("flex")
    torch.testing.assert_close(unet(**of_sets, keep_context=keep), expected, atol=2e-5, rtol=0)
    with pytest.raises(ConfigError, match="prefix, flex"):
        unet.set_training_attention("dense")


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "image_tokens"), [(256, 256), (64, 257), (16, 16), (100, 30)])
def test_on_a_gpu_gradients_are_the_loop_s_too(tokens, image_tokens):
    given_set = [tensor.cuda() for tensor in random_set(2, 4, tokens, image_tokens, 2, 64)]
    found = []
    for attention in (prefix_attention, flex_prefix_attention):
        tensors = [tensor.clone().requires_grad_() for tensor in given_set]
        read = attention(*tensors)
        read.square().sum().backward()
        found.append([read, *(tensor.grad for tensor in tensors)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=5e-3, rtol=5e-3)  # the fused kernel may multiply in TF32
