"""Image-Set Attention over a whole set by FlexAttention's block mask: the other way to do `prefix_attention`.

Belongs here: the block mask and its kernel. Not here: the reference (`m2m.models.image_set_attention`).

On a GPU one fused kernel takes the place of a loop over images; blocks that no image may read are skipped, so that it
does half the arithmetic of a dense mask too. On the CPU it is plain tensor arithmetic, forward only: for tests.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

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
        mask = _block_mask(images - 1, tokens, k.shape[2], q.device)
        kernel = _compiled() if q.is_cuda else flex_attention
        found: Any = kernel(flat[0], flat[1], flat[2], block_mask=mask)
        read.append(found.transpose(1, 2).unflatten(1, (images - 1, tokens)))
    together = torch.cat(read, dim=1)
    if keep is None:
        return together
    return torch.where(keep[:, :, None, None, None], together, torch.zeros_like(together))


@cache
def _block_mask(images: int, tokens: int, image_tokens: int, device: torch.device) -> BlockMask:
    def before(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # both count from the images that are left: the first target is the set's second image
        return key // image_tokens <= query // tokens

    return create_block_mask(before, None, None, images * tokens, images * image_tokens, device, _BLOCK)


@cache
def _compiled() -> Any:
    # the levels of a U-Net differ in tokens and heads: a kernel for each
    return torch.compile(flex_attention, dynamic=False)
