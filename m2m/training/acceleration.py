"""The device, precision and processes of a training, by Accelerate.

Belongs here: opening Accelerate, what all processes must agree on. Not here: the loop, its kernels (`kernels`).
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from m2m.config import Compute
from m2m.models.text_to_image import start_compute
from m2m.training.run_log import tracking


def open_accelerator(compute: Compute, trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """Accelerate for the device and precision of the settings, whatever this process trained before.

    Args:
        trackers: by Accelerate's names; they log into `folder`.

    Raises:
        InputError: cuda was asked for and there is none.
        ConfigError: a tracker's package is not installed.
    """
    asked = tracking(trackers, folder)
    # read when cuBLAS starts: without it its results may differ from run to run
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    start_compute(compute)
    if PartialState._shared_state and not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)
    precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[compute.dtype]
    return Accelerator(cpu=compute.device == "cpu", mixed_precision=precision, **asked)


def anywhere(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is up in any process: all must stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum"))
