"""Gradients of a training pass with and without gradient checkpointing, and the memory that each takes.

Belongs here: both sides of checkpointing. Not here: training.
"""

import sys
from functools import partial

import torch
from torch import Tensor

from benchmarks.measuring import Machine, Report, relative
from benchmarks.models import small_images, small_unet
from m2m.models.unet import VARIANTS, ManyToManyUNet

_SETS, _IMAGES = 2, 5


def step(unet: ManyToManyUNet, noisy: Tensor, timesteps: Tensor, read: dict[str, Tensor]) -> None:
    unet.zero_grad(set_to_none=False)
    unet(noisy, timesteps, **read).float().square().mean().backward()


def main() -> int:
    machine = Machine.asked_for(__doc__)
    report = Report("gradient_checkpointing", machine)
    noisy = machine.random(_SETS, _IMAGES, 4, 16, 16)
    timesteps = torch.arange(_SETS * _IMAGES, device=machine.device).view(_SETS, _IMAGES) * 90
    for variant in ("self", "dino"):
        unet = small_unet(variant, machine).train()
        read = {"clean" if variant == "self" else "features": small_images(variant, machine, _SETS, _IMAGES - 1)}
        gradients, extra = [], []
        for checkpointed in (False, True):
            if checkpointed:
                unet.enable_gradient_checkpointing()
            call = partial(step, unet, noisy, timesteps, read)
            call()  # gradients are allocated
            extra.append(machine.extra_bytes(call))
            gradients.append(torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None]))
        name = VARIANTS[variant]
        report.at_most(f"{name}: gradients, relative difference", relative(*gradients), 1e-6, judged=machine.exact)
        report.figure(f"{name}: extra MB of a step, plain", extra[0] / 2**20)
        report.figure(f"{name}: extra MB of a step, checkpointed", extra[1] / 2**20)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
