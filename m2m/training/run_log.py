"""How fast a training runs and what it holds in memory: a log beside the records of runs, and the trackers.

Belongs here: what differs between equal trainings (times, sets a second, MFU, memory). It lies in
`outputs/<profile>/runs/<stage>/`, where the record of the run lies, and never in the output, whose bytes are equal
for equal trainings. Not here: the losses' own log (`log`), which is part of the output.
"""

import importlib.util
import json
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from m2m.errors import ConfigError
from m2m.training.log import LogLine
from m2m.training.settings import TrainingSettings

_PACKAGES = {"tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb",)}
_PROJECT = "m2m"


class RunLog:
    """Lines of speed and memory, every `log_every` steps and after the last; the same to the trackers with the loss.

    Args:
        path: JSON lines are appended here; None: only the trackers are told.
        flops: operations of one set, forward and backward; asked for once, where a peak is given.
        run_id: names the run to W&B, so that a resumed training goes on in it.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        accelerator: Accelerator,
        path: Path | None,
        flops: Callable[[], int],
        run_id: str,
    ) -> None:
        self._settings, self._accelerator, self._flops = settings, accelerator, flops
        self._per_set: int | None = None
        self._sets = self._all_sets = 0
        self._seconds = self._all_seconds = self._waited = self._all_waited = 0.0
        self._path = path if accelerator.is_main_process else None
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        if accelerator.log_with:
            if accelerator.is_main_process and accelerator.project_dir is not None:
                Path(accelerator.project_dir).mkdir(parents=True, exist_ok=True)
            plain = {name: value for name, value in settings if isinstance(value, int | float | str)}
            wandb = {"id": run_id, "resume": "allow", "dir": str(accelerator.project_dir)}
            asked = {"wandb": wandb} if "wandb" in settings.trackers else {}
            accelerator.init_trackers(_PROJECT, config=plain, init_kwargs=asked)

    def add(self, line: LogLine, sets: int, seconds: float, last: bool, waited: float = 0.0) -> None:
        """One step of so many sets over all processes took so long: reading, encoding, computing, not checkpoints.

        Args:
            waited: seconds of them in which this process waited for data.
        """
        if not self._accelerator.is_main_process:
            return
        self._sets, self._seconds = self._sets + sets, self._seconds + seconds
        self._all_sets, self._all_seconds = self._all_sets + sets, self._all_seconds + seconds
        self._waited, self._all_waited = self._waited + waited, self._all_waited + waited
        if line.step % self._settings.log_every and not last:
            return
        found = self._figures(self._sets, self._seconds, self._waited)
        self._sets, self._seconds, self._waited = 0, 0.0, 0.0
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": line.step, **found}) + "\n")
        losses = {name: value for name, value in vars(line).items() if name != "step" and value is not None}
        self._accelerator.log({**losses, **found}, step=line.step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exc: object) -> None:
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def said(self) -> str:
        """What to say of the whole run; empty where no step was taken."""
        if not self._all_sets:
            return ""
        found = self._figures(self._all_sets, self._all_seconds, self._all_waited)
        mfu = f", MFU {found['mfu']:.1%}" if "mfu" in found else ""
        waited = f", {found['waiting_share']:.1%} of it waiting for data"
        return (
            f"{found['sets_per_second']:.3g} sets a second{mfu}{waited}, peak memory {found['peak_memory_gb']:.2f} GB"
        )

    def _figures(self, sets: int, seconds: float, waited: float) -> dict[str, float]:
        seconds = max(seconds, 1e-9)
        speed = sets / seconds
        found = {
            "sets_per_second": speed,
            "waiting_share": waited / seconds,
            "peak_memory_gb": peak_memory(self._accelerator.device) / 1e9,
        }
        if self._settings.peak_tflops is not None:
            if self._per_set is None:
                self._per_set = self._flops()
            peak = self._settings.peak_tflops * 1e12 * self._accelerator.num_processes
            found["mfu"] = self._per_set * speed / peak
        return found


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: of the GPU's memory on one, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def tracking(names: Sequence[str], folder: Path | None) -> Mapping[str, Any]:
    """What Accelerate takes for trackers that log into `folder`.

    Raises:
        ConfigError: a tracker's package is not installed.
    """
    for name in names:
        if not any(importlib.util.find_spec(package) for package in _PACKAGES[name]):
            raise ConfigError(
                f"trackers: {name} is asked for, and its package is not installed: "
                f"`pip install {_PACKAGES[name][0]}`, or leave it out"
            )
    return {"log_with": list(names), "project_dir": folder} if names else {}
