"""Training at the paper's size (N=5, 64x64 latents, random weights) by the real loop: sets a second, MFU, memory.

Belongs here: each choice of kernels, with and without gradient checkpointing, and the micro-batches that fit. Not here:
reading data, encoders; on a CPU a small U-Net stands in, to see that it runs.
"""

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from benchmarks.measuring import Machine, Report
from benchmarks.models import SMALL_FEATURES, paper_unet, small_unet
from m2m.config import Compute
from m2m.models.sd21 import DINOV2_GIANT_WIDTH, dinov2_tokens
from m2m.models.unet import VARIANTS, ManyToManyUNet, Variant
from m2m.progress import Progress
from m2m.training.acceleration import open_accelerator
from m2m.training.loop import train
from m2m.training.objective import Objective, SetLoss
from m2m.training.settings import TrainingSettings

_IMAGES, _SIDE, _STEPS = 5, 64, 6  # images of a set, latents along each side, steps of a trial
_BOTH: tuple[Variant, ...] = ("self", "dino")
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
_TFLOPS = {"A100": 312, "H100": 989, "H200": 989}  # NVIDIA's data sheets: bfloat16, dense
_KERNELS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "not deterministic": {"deterministic": False},
    "and channels last": {"deterministic": False, "channels_last": True},
    "and FlexAttention": {"deterministic": False, "channels_last": True, "attention": "flex"},
    "and torch.compile": {"deterministic": False, "channels_last": True, "attention": "flex", "compile": True},
}


class EnoughError(Exception):
    """All that is measured has been read: what would follow is a checkpoint of many GB."""


class RandomSets:
    """Sets in memory; reading ends before the last step."""

    def __init__(self, variant: Variant, machine: Machine, batch: int) -> None:
        on_gpu = machine.device.type == "cuda"
        tokens, width = (dinov2_tokens(224), DINOV2_GIANT_WIDTH) if on_gpu else (65, SMALL_FEATURES)
        side = _SIDE if on_gpu else 16
        self._item = {"latents": torch.randn(_IMAGES, 4, side, side)}
        if variant == "dino":
            self._item["features"] = torch.randn(_IMAGES - 1, tokens, width)
        self._left = batch * (_STEPS - 1)

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        self._left -= 1
        if self._left < 0:
            raise EnoughError
        return self._item | {"sample": torch.tensor(key[1])}


def trial(variant: Variant, machine: Machine, kernels: dict[str, Any], **changes: Any) -> dict[str, float] | None:
    """Sets a second, MFU and peak memory of the fastest step; None where memory does not hold it."""
    on_gpu = machine.device.type == "cuda"
    dtype = str(machine.dtype).removeprefix("torch.")
    compute = Compute(device=machine.device.type, dtype=dtype, threads=machine.threads)  # type: ignore[arg-type]
    peak = next((peak for name, peak in _TFLOPS.items() if on_gpu and name in torch.cuda.get_device_name()), None)
    settings = TrainingSettings.model_validate(
        {
            "images_per_set": _IMAGES,
            "steps": _STEPS,
            "log_every": 1,
            "peak_tflops": peak,
            "kernels": kernels,
            "compute": compute,
            **changes,
        }
    )
    full = Machine(machine.device, torch.float32, machine.threads, 0)  # weights are kept in full, whatever computes
    unet: ManyToManyUNet = paper_unet(variant, full) if on_gpu else small_unet(variant, full)
    unet.requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "speed.jsonl")
        try:
            train(
                settings,
                SetLoss(unet, DDPMScheduler()),
                Objective(seed=0),
                RandomSets(variant, machine, settings.sets_per_step),
                Path(folder),
                Progress(quiet=True),
                open_accelerator(compute),
                belongs_to="a trial",
                run_log=log,
            )
        except EnoughError:
            pass
        except torch.cuda.OutOfMemoryError:
            return None
        finally:
            del unet
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        steps = [json.loads(line) for line in log.read_text().splitlines()]
    return max(steps, key=lambda step: step["sets_per_second"])


def main() -> int:
    machine = Machine.asked_for(__doc__, dtype="bfloat16")
    report, best = Report("training_speed", machine), 0.0
    on_gpu = machine.device.type == "cuda"
    kernels = _KERNELS if on_gpu else dict(itertools.islice(_KERNELS.items(), 3))
    for variant, checkpointed in itertools.product(_BOTH, (True, False)):
        of = f"{VARIANTS[variant]}, {'checkpointed' if checkpointed else 'not checkpointed'}"
        for name, chosen in kernels.items():
            found = trial(variant, machine, chosen, batch=8, micro_batch=4, gradient_checkpointing=checkpointed)
            best = max(best, _said(report, f"{of}, 4 sets, {name}", found))
        for micro in _MICRO_BATCHES if on_gpu else ():
            fastest = list(kernels.values())[-1]
            found = trial(
                variant, machine, fastest, batch=2 * micro, micro_batch=micro, gradient_checkpointing=checkpointed
            )
            best = max(best, _said(report, f"{of}, {micro} sets", found))
            if found is None:
                break
    if on_gpu:
        report.at_least("the highest MFU", best, 0.5)
    return report.close()


def _said(report: Report, name: str, found: dict[str, float] | None) -> float:
    """State the figures of a trial; returns its MFU, 0 where it is not known."""
    found = found or {"sets_per_second": 0.0}
    for figure, value in found.items():
        if figure in ("sets_per_second", "mfu", "peak_memory_gb"):
            report.figure(f"{name}: {figure.replace('_', ' ')}", value)
    return found.get("mfu", 0.0)


if __name__ == "__main__":
    sys.exit(main())
