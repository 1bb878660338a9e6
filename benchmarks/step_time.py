"""A denoising step of M2M at SD-2.1-base's size (64x64 latents, guidance on) against plain SD, cached against joint.

Belongs here: time of steps. Not here: exactness of the cache (`cached_context`); encoders: an image is encoded once in
its life.

What is compared is timed in turn, five times, so that what else the machine does, and how warm it is, weighs on all
alike; the least counts.
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
_DINO_IMAGES, _DINO_INTERVAL = (1, 8), 2 / 3

Call = Callable[[], Any]


@torch.no_grad()
def main() -> int:
    machine = Machine.asked_for(__doc__, repeats=4)
    report = Report("step_time", machine)
    m2m_self(machine, report)
    m2m_dino(machine, report)
    return report.close()


def plain_step(machine: Machine) -> Call:
    """A guided step of Stable Diffusion: both branches in one pass."""
    unet = text_to_image_unet(machine)
    return partial(unet, machine.random(2, 4, _SIDE, _SIDE), 500, machine.random(2, _TEXT_TOKENS, _TEXT_WIDTH))


def m2m_self(machine: Machine, report: Report) -> None:
    plain, unet = plain_step(machine), paper_unet("self", machine)
    name = f"M2M-Self, {_SELF_IMAGES} preceding"
    noisy = machine.random(1, 4, _SIDE, _SIDE)
    one = unet.encode_context(machine.random(1, 1, 4, _SIDE, _SIDE))
    context = one
    for _ in range(_SELF_IMAGES - 1):  # what is in it does not matter for the time
        context = context.append(one)
    found = machine.seconds_in_turn(
        {
            "plain SD, guided": plain,
            f"{name}, cached, guided": _guided(unet, noisy, context),
            f"{name}, cached, one branch": partial(unet.denoise, noisy, 500, context),
        }
    )
    _state(report, found)
    plain_seconds, guided, single = found.values()
    report.figure("M2M-Self, MB of one image's context", one.bytes / 2**20)
    joint = _joint_seconds(machine, unet, noisy, machine.random(1, _SELF_IMAGES, 4, _SIDE, _SIDE))
    report.figure(f"{name}, joint, guided", joint)
    report.at_least("M2M-Self, joint over cached", joint / guided, 3.8)
    report.at_most("M2M-Self, cached over plain SD", guided / plain_seconds, 1.4)
    _judge_interval(report, "M2M-Self", _SELF_INTERVAL, (guided, single, plain_seconds), 1.0)


def m2m_dino(machine: Machine, report: Report) -> None:
    plain, unet = plain_step(machine), paper_unet("dino", machine)
    noisy = machine.random(1, 4, _SIDE, _SIDE)
    calls: dict[str, Call] = {"plain SD, guided, again": plain}
    for count in _DINO_IMAGES:
        context = unet.encode_context(machine.random(1, count, dinov2_tokens(224), DINOV2_GIANT_WIDTH))
        calls[f"M2M-DINO, {count} preceding, cached, guided"] = _guided(unet, noisy, context)
        calls[f"M2M-DINO, {count} preceding, cached, one branch"] = partial(unet.denoise, noisy, 500, context)
    found = machine.seconds_in_turn(calls)
    _state(report, found)
    plain_seconds, *steps = found.values()
    report.at_most("M2M-DINO, the slowest, over plain SD", max(steps[::2]) / plain_seconds, 1.10)
    for count, guided, single in zip(_DINO_IMAGES, steps[::2], steps[1::2]):
        name = f"M2M-DINO, {count} preceding"
        _judge_interval(report, name, _DINO_INTERVAL, (guided, single, plain_seconds), 0.85)


def _judge_interval(report: Report, name: str, share: float, seconds: tuple[float, float, float], most: float) -> None:
    """An average step of sampling in which `share` of the steps are guided; seconds: guided, one branch, plain SD."""
    guided, single, plain = seconds
    ratio = (share * guided + (1 - share) * single) / plain
    report.at_most(f"{name}, {share:.0%} of the steps guided, over plain SD", ratio, most)


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
        report.figure(f"{name}, seconds a step", value)


if __name__ == "__main__":
    sys.exit(main())
