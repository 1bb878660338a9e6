"""How benchmarks measure and report: the machine asked for, seconds, memory, figures against what they are to reach.

Belongs here: what all benchmarks share. Not here: models (`benchmarks.models`).
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor


@dataclass(frozen=True)
class Machine:
    """What a benchmark runs on."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    repeats: int

    @classmethod
    def asked_for(cls, description: str | None, *, dtype: str = "float32", repeats: int = 1) -> "Machine":
        """The machine of the command line. `repeats`: by default so many timed calls, of which the median counts."""
        parser = argparse.ArgumentParser(description=(description or "M2M").splitlines()[0])
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=dtype)
        parser.add_argument("--threads", type=int, default=1, help="CPU threads")
        parser.add_argument("--repeats", type=int, default=repeats, help="timed calls after one untimed; 0 times it")
        given = parser.parse_args()
        logging.set_verbosity_error()
        torch.set_num_threads(given.threads)
        torch.backends.cudnn.allow_tf32 = False  # what is asked for in float32 is meant
        return cls(torch.device(given.device), getattr(torch, given.dtype), given.threads, given.repeats)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name()}, {kind}, torch {torch.__version__}"
        return f"{_processor()}, {self.threads} thread(s), {kind}, torch {torch.__version__}"

    @property
    def exact(self) -> bool:
        """Whether differences of last bits are what is measured."""
        return self.dtype == torch.float32

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        """Normal numbers, the same on every device."""
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return numbers.to(self.device, self.dtype)

    def seconds(self, call: Callable[..., Any], *args: Any) -> float:
        """Median seconds of a call with these arguments.

        On one CPU thread they are the process's own time, which other work on the machine does not lengthen.
        """
        return self.seconds_in_turn({"": lambda: call(*args)})[""]

    def seconds_in_turn(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of calls that are compared: all of them once, then all of them again."""
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.repeats + 1):  # the first ones allocate, pick kernels and compile
            for name, call in calls.items():
                started = self._now()
                call()
                taken[name].append(self._now() - started)
        return {name: statistics.median(seconds[1:] or seconds) for name, seconds in taken.items()}

    def extra_bytes(self, call: Callable[[], Any]) -> int:
        """Most memory that a call holds beyond what was held before it (on a CPU: resident memory; Linux)."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        return _resident_growth(call)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time() if self.threads == 1 else time.perf_counter()


@dataclass
class Report:
    """Figures of one benchmark, printed as they come; the last line is all of them as JSON."""

    name: str
    machine: Machine
    figures: dict[str, float] = field(default_factory=dict)
    reach: dict[str, str] = field(default_factory=dict)
    ok: bool = True

    def __post_init__(self) -> None:
        print(f"{self.name} ({self.machine})", flush=True)

    def figure(self, name: str, value: float) -> None:
        self._add(name, value, "")

    def at_most(self, name: str, value: float, limit: float, *, judged: bool = True) -> None:
        """A figure that may not be larger than `limit`; only stated where it is not `judged`."""
        self._judge(name, value, f"<= {limit:g}", value <= limit, judged)

    def at_least(self, name: str, value: float, limit: float, *, judged: bool = True) -> None:
        self._judge(name, value, f">= {limit:g}", value >= limit, judged)

    def close(self) -> int:
        """Print the JSON line; 0 where all is reached, for `sys.exit`."""
        print(json.dumps({"name": self.name, "figures": self.figures, "reach": self.reach, "ok": self.ok}))
        return 0 if self.ok else 1

    def _judge(self, name: str, value: float, limit: str, reached: bool, judged: bool) -> None:
        if judged:
            self.reach[name] = limit
            self.ok = self.ok and reached
            limit += ": reached" if reached else ": NOT REACHED"
        self._add(name, value, limit if judged else "")

    def _add(self, name: str, value: float, remark: str) -> None:
        self.figures[name] = float(f"{value:.4g}")
        print(f"  {name:58} {value:<12.4g} {remark}", flush=True)


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def _resident_growth(call: Callable[[], Any]) -> int:
    gc.collect()
    # what was freed before must be gone: a call that takes it up again would seem to need nothing
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's record of the peak starts anew
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
