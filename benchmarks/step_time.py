"""A denoising step of M2M at SD-2.1-base's size (64x64 latents, guidance on) against plain SD, cached against joint.

Belongs here: time of steps. Not here: exactness of the cache (`cached_context`); encoders: an image is encoded once in
its life.

What is compared is timed in turn, so that what else the machine does, and how warm it is, weighs on all alike.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import Machine, Report
from benchmarks.models import joint_denoise, paper_unet, text_to_image_unet
from m2m.models.sd21 import DINOV2_GIANT_WIDTH, dinov2_tokens

_SIDE = 64  # latents
_TEXT_TOKENS, _TEXT_WIDTH = 77, 1024
_SELF_IMAGES, _SELF_INTERVAL = 4, 0.4
_DINO_IMAGES, _DINO_INTERVAL = (1, 4, 8), 2 / 3

Call = Callable[[], Any]


@torch.no_grad()
def main() -> int:
    machine = Machine.asked_for(__doc__, repeats=0)
    report = Report("step_time", machine)
    m2m_self(machine, report, plain_step(machine))
    m2m_dino(machine, report, plain_step(machine))
    return report.close()


def plain_step(machine: Machine) -> Call:
    """A guided step of Stable Diffusion: two branches in one pass."""
    noisy, text = machine.random(2, 4, _SIDE, _SIDE), machine.random(2, _TEXT_TOKENS, _TEXT_WIDTH)
    return partial(text_to_image_unet(machine), noisy, 500, text)


def m2m_self(machine: Machine, report: Report, plain: Call) -> None:
    unet, noisy = paper_unet("self", machine), machine.random(1, 4, _SIDE, _SIDE)
    clean = machine.random(1, _SELF_IMAGES, 4, _SIDE, _SIDE)
    one = unet.encode_context(clean[:, :1])
    report.figure("M2M-Self, MB of one image's context", one.bytes / 2**20)
    context = one
    for _ in range(_SELF_IMAGES - 1):  # what is in it does not matter for the time
        context = context.append(one)
    found = machine.seconds_in_turn(
        {
            "plain SD, guided, seconds a step": plain,
            f"M2M-Self, {_SELF_IMAGES} preceding, cached, guided": _guided(unet, noisy, context),
            f"M2M-Self, {_SELF_IMAGES} preceding, cached, one branch": partial(unet.denoise, noisy, 500, context),
        }
    )
    _state(report, found)
    plain_seconds, guided, single = found.values()
    joint = _joint_seconds(machine, unet, noisy, clean)
    report.figure(f"M2M-Self, {_SELF_IMAGES} preceding, joint, guided", joint)
    report.at_least("M2M-Self, joint over cached", joint / guided, 3.8)
    report.at_most("M2M-Self, cached over plain SD", guided / plain_seconds, 1.4)
    averaged = _SELF_INTERVAL * guided + (1 - _SELF_INTERVAL) * single
    report.at_most(f"M2M-Self, {_SELF_INTERVAL:.0%} of the steps guided, over plain SD", averaged / plain_seconds, 1.0)


def m2m_dino(machine: Machine, report: Report, plain: Call) -> None:
    unet, noisy = paper_unet("dino", machine), machine.random(1, 4, _SIDE, _SIDE)
    calls: dict[str, Call] = {"plain SD, guided, seconds a step, again": plain}
    for count in _DINO_IMAGES:
        context = unet.encode_context(machine.random(1, count, dinov2_tokens(224), DINOV2_GIANT_WIDTH))
        calls[f"M2M-DINO, {count} preceding, cached, guided"] = _guided(unet, noisy, context)
        calls[f"M2M-DINO, {count} preceding, cached, one branch"] = partial(unet.denoise, noisy, 500, context)
    found = machine.seconds_in_turn(calls)
    _state(report, found)
    plain_seconds, *steps = found.values()
    guided, single = steps[::2], steps[1::2]
    report.at_most("M2M-DINO, the slowest, over plain SD", max(guided) / plain_seconds, 1.10)
    averaged = [_DINO_INTERVAL * both + (1 - _DINO_INTERVAL) * one for both, one in zip(guided, single)]
    for count, seconds in zip(_DINO_IMAGES, averaged):
        name = f"M2M-DINO, {count} preceding, {_DINO_INTERVAL:.0%} of the steps guided, over plain SD"
        report.at_most(name, seconds / plain_seconds, 0.85)


def _guided(unet: Any, noisy: Tensor, context: Any) -> Call:
    """Both branches in one pass, as the pipeline makes them."""
    return partial(unet.denoise_branches, noisy, 500, [(None, None), (context, None)])


def _joint_seconds(machine: Machine, unet: Any, noisy: Tensor, clean: Tensor) -> float:
    """A guided step with nothing cached, as the paper's design has it: the null branch reads zeroed latents.

    On a CPU, where both branches take twice as long as one, one is timed and counts twice.
    """
    rows = 2 if machine.device.type == "cuda" else 1
    both = torch.cat([clean, torch.zeros_like(clean)])[:rows]
    return machine.seconds(joint_denoise, unet, noisy.repeat(rows, 1, 1, 1), 500, both) * 2 / rows


def _state(report: Report, seconds: dict[str, float]) -> None:
    for name, value in seconds.items():
        report.figure(name, value)


if __name__ == "__main__":
    sys.exit(main())
