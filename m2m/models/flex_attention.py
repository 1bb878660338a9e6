"""Image-Set Attention over a whole set by FlexAttention's block mask: the other way to do `prefix_attention`.

Belongs here: the block mask and its kernel. Not here: the reference (`m2m.models.image_set_attention`).

On a GPU one fused kernel takes the place of a loop over images; blocks that no image may read are skipped, so that it
does half the arithmetic of a dense mask too. On the CPU it is plain tensor arithmetic, forward only: for tests.
"""

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

_BLOCK = 128  # tokens; FlexAttention's own default


def flex_prefix_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """Image i attends to the tokens of images before it, never to its own (paper, section 5.1, Eq. 4).

    Args, result: as `m2m.models.image_set_attention.prefix_attention`.
    """
    sets, images, tokens = q.shape[:3]
    # the first image reads nothing, the last is read by nobody: without both, no row is masked as a whole
    read = [q.new_zeros(sets, 1, *q.shape[2:])]
    if images > 1:
        flat = [tensor.flatten(1, 2).transpose(1, 2) for tensor in (q[:, 1:], k[:, : images - 1], v[:, : images - 1])]
        mask = block_mask(images - 1, tokens, k.shape[2], q.device)
        kernel = _compiled() if q.is_cuda else flex_attention  # not compiled: plain arithmetic
        found: Any = kernel(flat[0], flat[1], flat[2], block_mask=mask)
        read.append(found.transpose(1, 2).unflatten(1, (images - 1, tokens)))
    together = torch.cat(read, dim=1)
    if keep is None:
        return together
    return torch.where(keep[:, :, None, None, None], together, torch.zeros_like(together))


@lru_cache(maxsize=64)
def block_mask(images: int, tokens: int, image_tokens: int, device: torch.device) -> BlockMask:
    """Which blocks of keys the blocks of queries read, in whole or in part, written down block by block.

    FlexAttention's own way to it asks about every query and key: memory quadratic in the number of images.
    """

    def before(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # both count from the images that are left: the first target is the set's second image
        return key // image_tokens <= query // tokens

    queries, keys = images * tokens, images * image_tokens
    begins = torch.arange(0, queries, _BLOCK)
    ends = (begins + _BLOCK).clamp(max=queries)
    # a query of image i (from 0) reads the first (i + 1) * image_tokens keys
    all_read, any_read = ((edge // tokens + 1) * image_tokens for edge in (begins, ends - 1))
    # a block that reaches beyond the last query or key is in no row or column a whole one
    whole = torch.where(ends - begins == _BLOCK, all_read // _BLOCK, 0)
    touched = (any_read + _BLOCK - 1) // _BLOCK
    place = torch.arange(-(-keys // _BLOCK))
    # whole ones are counted from 0 on, those in part from behind them
    lists = place.expand(len(begins), -1), (place + whole[:, None]) % len(place)
    whole_lists, part_lists = (one.to(torch.int32)[None, None].contiguous().to(device) for one in lists)
    whole_counts, part_counts = (one.to(torch.int32)[None, None].to(device) for one in (whole, touched - whole))
    return BlockMask.from_kv_blocks(
        part_counts, part_lists, whole_counts, whole_lists, _BLOCK, before, seq_lengths=(queries, keys)
    )


def allow_many_shapes() -> None:
    """Have torch compile more kernels of one function than the 8 at which it gives up.

    A U-Net needs one for each of its levels and widths, with gradients and without.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


@cache
def _compiled() -> Any:
    allow_many_shapes()
    return torch.compile(flex_attention, dynamic=False)
