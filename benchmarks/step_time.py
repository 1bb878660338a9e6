"""A denoising step of M2M at SD-2.1-base's size (64x64 latents, guidance on) against plain SD, cached against joint.

Belongs here: time of steps. Not here: exactness of the cache (`cached_context`); encoders: an image is encoded once in
its life.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.measuring import Machine, Report
from benchmarks.models import joint_denoise, paper_unet, text_to_image_unet
from m2m.models.context import Context
from m2m.models.sd21 import DINOV2_GIANT_WIDTH, dinov2_tokens
from m2m.models.unet import ManyToManyUNet

_SIDE = 64  # latents
_TEXT_TOKENS, _TEXT_WIDTH = 77, 1024
_SELF_IMAGES, _SELF_INTERVAL = 4, 0.4
_DINO_IMAGES, _DINO_INTERVAL = (1, 8), 2 / 3


@torch.no_grad()
def main() -> int:
    machine = Machine.asked_for(__doc__, repeats=0)
    report = Report("step_time", machine)
    plain = plain_seconds(machine)
    report.figure("plain SD, guided, seconds a step", plain)
    m2m_self(machine, report, plain)
    m2m_dino(machine, report, plain)
    return report.close()


def plain_seconds(machine: Machine) -> float:
    """A guided step of Stable Diffusion: two branches."""
    unet, rows = text_to_image_unet(machine), _rows(machine)
    noisy, text = machine.random(rows, 4, _SIDE, _SIDE), machine.random(rows, _TEXT_TOKENS, _TEXT_WIDTH)
    return machine.seconds(unet, noisy, 500, text) * 2 / rows


def m2m_self(machine: Machine, report: Report, plain: float) -> None:
    unet, noisy = paper_unet("self", machine), machine.random(1, 4, _SIDE, _SIDE)
    clean = machine.random(1, _SELF_IMAGES, 4, _SIDE, _SIDE)
    one = unet.encode_context(clean[:, :1])
    report.figure("M2M-Self, MB of one image's context", one.bytes / 2**20)
    context = one
    for _ in range(_SELF_IMAGES - 1):  # what is in it does not matter for the time
        context = context.append(one)
    single, guided = _step_seconds(machine, unet, noisy, context)
    report.figure(f"M2M-Self, {_SELF_IMAGES} preceding, cached, guided", guided)
    report.figure(f"M2M-Self, {_SELF_IMAGES} preceding, cached, one branch", single)
    joint = _joint_seconds(machine, unet, noisy, clean)
    report.figure(f"M2M-Self, {_SELF_IMAGES} preceding, joint, guided", joint)
    report.at_least("M2M-Self, joint over cached", joint / guided, 3.8)
    report.at_most("M2M-Self, cached over plain SD", guided / plain, 1.4)
    averaged = _SELF_INTERVAL * guided + (1 - _SELF_INTERVAL) * single
    report.at_most(f"M2M-Self, {_SELF_INTERVAL:.0%} of the steps guided, over plain SD", averaged / plain, 1.0)


def m2m_dino(machine: Machine, report: Report, plain: float) -> None:
    unet, noisy = paper_unet("dino", machine), machine.random(1, 4, _SIDE, _SIDE)
    slowest = averaged = 0.0
    for count in _DINO_IMAGES:
        context = unet.encode_context(machine.random(1, count, dinov2_tokens(224), DINOV2_GIANT_WIDTH))
        single, guided = _step_seconds(machine, unet, noisy, context)
        report.figure(f"M2M-DINO, {count} preceding, cached, guided", guided)
        report.figure(f"M2M-DINO, {count} preceding, cached, one branch", single)
        slowest = max(slowest, guided)
        averaged = max(averaged, _DINO_INTERVAL * guided + (1 - _DINO_INTERVAL) * single)
    report.at_most("M2M-DINO, the slowest, over plain SD", slowest / plain, 1.10)
    report.at_most(f"M2M-DINO, {_DINO_INTERVAL:.0%} of the steps guided, over plain SD", averaged / plain, 0.85)


def _rows(machine: Machine) -> int:
    """Branches of guidance in one pass: both on a GPU; on a CPU, where two take twice as long, one counts twice."""
    return 2 if machine.device.type == "cuda" else 1


def _step_seconds(machine: Machine, unet: ManyToManyUNet, noisy: Tensor, context: Context) -> tuple[float, float]:
    """A step's conditional branch alone, and a guided step."""
    single = machine.seconds(unet.denoise, noisy, 500, context)
    branches: Sequence = [(None, None), (context, None)]
    if _rows(machine) == 2:
        return single, machine.seconds(unet.denoise_branches, noisy, 500, branches)
    return single, single + machine.seconds(unet.denoise, noisy, 500)


def _joint_seconds(machine: Machine, unet: ManyToManyUNet, noisy: Tensor, clean: Tensor) -> float:
    """A guided step with nothing cached, as the paper's design has it: the null branch reads zeroed latents."""
    rows = _rows(machine)
    both = torch.cat([clean, torch.zeros_like(clean)])[:rows]
    return machine.seconds(joint_denoise, unet, noisy.repeat(rows, 1, 1, 1), 500, both) * 2 / rows


if __name__ == "__main__":
    sys.exit(main())
