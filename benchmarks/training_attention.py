"""Image-Set Attention of a training pass (N=5, 64x64 level of SD-2.1-base) against a dense mask, with gradients.

Belongs here: time and memory of the attention alone. Not here: whole training steps.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import Machine, Report, relative
from m2m.models.flex_attention import flex_prefix_attention
from m2m.models.image_set_attention import prefix_attention

_IMAGES, _TOKENS, _HEADS, _DIM = 5, 64 * 64, 5, 64


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All tokens of a set under one mask (Eq. 4); without the first image, whose rows a mask would leave undefined."""
    number = torch.arange(_IMAGES, device=q.device).repeat_interleave(_TOKENS)
    seen = (number[:, None] > number[None, :])[_TOKENS:]
    q_, k_, v_ = (tensor.flatten(1, 2).transpose(1, 2) for tensor in (q[:, 1:], k, v))
    read = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=seen)
    return torch.cat([torch.zeros_like(q[:, :1]), read.transpose(1, 2).unflatten(1, (_IMAGES - 1, _TOKENS))], dim=1)


def forward_and_backward(
    attention: Callable[..., Tensor], given: list[Tensor], weight: Tensor, found: list[Tensor]
) -> None:
    """Leaves in `found` the result and the gradients of q, k and v."""
    tensors = [tensor.requires_grad_() for tensor in given]
    read = attention(*tensors)
    found[:] = [read.detach(), *torch.autograd.grad(read, tensors, weight)]


def main() -> int:
    machine = Machine.asked_for(__doc__, repeats=0)
    report = Report("training_attention", machine)
    given = [machine.random(1, _IMAGES, _TOKENS, _HEADS, _DIM, seed=seed) for seed in range(3)]
    weight = machine.random(1, _IMAGES, _TOKENS, _HEADS, _DIM, seed=3)
    ways = {"a dense mask": dense, "prefixes": prefix_attention}
    if machine.device.type == "cuda":  # FlexAttention has no gradients on the CPU
        ways["FlexAttention"] = flex_prefix_attention
    found: dict[str, list[Tensor]] = {}
    seconds: dict[str, float] = {}
    extra: dict[str, float] = {}
    for name, attention in ways.items():
        found[name], taken = [], []
        call = partial(forward_and_backward, attention, given, weight, found[name])
        extra[name] = machine.extra_bytes(lambda call=call, taken=taken: taken.append(machine.seconds(call)))
        seconds[name] = taken[0]
        found[name] = [tensor.cpu() for tensor in found[name]]
        report.figure(f"{name}: seconds, forward and backward", seconds[name])
        report.figure(f"{name}: extra MB", extra[name] / 2**20)
    for name in list(ways)[1:]:
        report.at_most(f"{name}: time over a dense mask's", seconds[name] / seconds["a dense mask"], 0.5)
        report.at_most(f"{name}: extra memory over a dense mask's", extra[name] / extra["a dense mask"], 0.2)
        worst = max(relative(one, other) for one, other in zip(found[name], found["a dense mask"]))
        report.figure(f"{name}: result and gradients, relative difference", worst)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
