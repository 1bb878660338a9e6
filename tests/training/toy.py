"""A training that takes a second: sets whose images share one value, and a U-Net just large enough to notice.

Run as a module it trains in processes that are really killed.
"""

import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from m2m.config import Compute
from m2m.generation.noise import keyed_generator, keyed_normal
from m2m.models.unet import ManyToManyUNet
from m2m.progress import Progress
from m2m.training.acceleration import open_accelerator
from m2m.training.log import LogLine
from m2m.training.loop import Validate, train
from m2m.training.objective import Objective, SetLoss
from m2m.training.settings import TrainingSettings

FEATURES = 12
UNET_CONFIG = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": (1, 2),
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}
COMPUTE = Compute(device="cpu", dtype="float32", threads=1)


class ToySets:
    """Sets of N 4x8x8 latents near one value of the set; DINO-like features hold that value."""

    def __init__(self, count: int = 12, images: int = 3, features: bool = False, fatal_reads: int = -1) -> None:
        self.count, self.images, self.features = count, images, features
        self.reads, self.fatal_reads = 0, fatal_reads

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        _, sample = key
        self.reads += 1
        if self.reads == self.fatal_reads:
            self.fail(sample)
        value = float(keyed_generator(5, sample).standard_normal())
        item = {
            "sample": torch.tensor(sample),
            "latents": value + 0.1 * keyed_normal(6, sample, shape=(self.images, 4, 8, 8)),
        }
        if self.features:
            item["features"] = torch.full((self.images - 1, 2, FEATURES), value)
        return item

    def fail(self, sample: int) -> None:
        raise KeyboardInterrupt


def toy_unet(variant: str = "self", **own: Any) -> ManyToManyUNet:
    return ManyToManyUNet.from_text_to_image(UNET_CONFIG, variant, FEATURES, seed=3, **own)  # type: ignore[arg-type]


def toy_settings(**changes: Any) -> TrainingSettings:
    return TrainingSettings.model_validate(
        {
            "images_per_set": 3,
            "batch": 4,
            "micro_batch": 2,
            "epochs": 4,
            "learning_rate": 1e-3,
            "ema_decay": 0.9,
            "checkpoint_every": 3,
            "compute": COMPUTE,
            **changes,
        }
    )


def toy_training(
    out: Path,
    data: ToySets | None = None,
    validate: Validate | None = None,
    unet: ManyToManyUNet | None = None,
    **changes: Any,
) -> tuple[ManyToManyUNet, list[LogLine]]:
    """Train in `out`; returns the trained U-Net and the log."""
    settings = toy_settings(**changes)
    data = ToySets() if data is None else data
    unet = toy_unet("dino" if data.features else "self") if unet is None else unet
    out.mkdir(parents=True, exist_ok=True)
    log = train(
        settings,
        SetLoss(unet, DDPMScheduler()),
        Objective(settings.seed, settings.timesteps, settings.context_dropout),
        data,
        out,
        Progress(quiet=True),
        open_accelerator(settings.compute),
        belongs_to="toy",
        validate=validate,
    )
    return unet, log


class Signalled(ToySets):
    """Sends this process a signal while it trains."""

    def __init__(self, reads: int, number: signal.Signals) -> None:
        super().__init__(fatal_reads=reads)
        self.number = number

    def fail(self, sample: int) -> None:
        os.kill(os.getpid(), self.number)


def ended(out: Path, data: ToySets, **changes: Any) -> int:
    """Train in a process of its own, and wait: how it ended (negative: by that signal)."""
    return waited(started(out, data, {}, **changes))


def started(out: Path, data: ToySets, environment: dict[str, str], **changes: Any) -> int:
    """Train in a process of its own; its id."""
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        try:
            toy_training(out, data, **changes)
        except SystemExit as stop:
            os._exit(int(str(stop.code)))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def waited(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


if __name__ == "__main__":
    # imports take seconds and forks none: all of it in one program, before torch has threads that a fork would lose
    folder = Path(sys.argv[1])
    faults = [(22, signal.SIGKILL), (3, signal.SIGTERM), (3, signal.SIGUSR1)]
    codes = [ended(folder / "faults", Signalled(*fault)) for fault in faults]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    pair = [
        started(folder / "two", ToySets(), {**group, "RANK": rank, "LOCAL_RANK": rank}, steps=20) for rank in ("0", "1")
    ]
    print(*codes, *map(waited, pair), ended(folder / "one", ToySets(), steps=20))
