"""What the five small trainings share: a bank of pictures drawn once, and a loop that checkpoints, resumes and logs.

Belongs here: nothing that knows one model from another. Not here: losses and architectures (a module for each model).
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from m2m.tiny.world import ATTRIBUTES, SIZE, Scene, draw, sample_scene

OUTPUTS = Path("outputs/tiny-models")
TRAINING_SEED, HELD_OUT_SEED = 1, 2


@dataclass(frozen=True)
class Bank:
    """Pictures (n, 64, 64, 3) uint8 and the index of each attribute's value (n, 5), in the order of `ATTRIBUTES`."""

    pictures: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, index: np.ndarray) -> Tensor:
        """Pictures as (B, 3, 64, 64) floats in [0, 1]."""
        return torch.from_numpy(self.pictures[index]).permute(0, 3, 1, 2).float().div_(255)

    def scene(self, index: int) -> Scene:
        pairs = zip(ATTRIBUTES.items(), self.labels[index])
        return Scene(**{name: values[label] for (name, values), label in pairs})


def bank(count: int = 40_000, seed: int = TRAINING_SEED) -> Bank:
    """`count` random pictures of the world, drawn on the first call and then read from `outputs/tiny-models/bank`."""
    pictures, labels = (OUTPUTS / "bank" / f"{kind}-{seed}-{count}.npy" for kind in ("pictures", "labels"))
    if not labels.exists():
        pictures.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        scenes, drawn = [], np.empty((count, SIZE, SIZE, 3), np.uint8)
        for place in range(count):
            scenes.append(sample_scene(rng))
            drawn[place] = draw(scenes[-1], rng)
        _save(pictures, drawn)
        _save(labels, np.array([scene.labels() for scene in scenes]))
    return Bank(np.load(pictures, mmap_mode="r"), np.load(labels))


def train(
    name: str,
    modules: Mapping[str, nn.Module],
    loss_of_step: Callable[[int, np.random.Generator, torch.Generator], dict[str, Tensor]],
    *,
    steps: int,
    rate: float,
    resume: bool = True,
    weight_decay: float = 0.01,
    warmup: int = 100,
    average: float = 0.0,
    seed: int = 0,
    checkpoint_seconds: float = 90.0,
) -> None:
    """Minimise `loss_of_step(...)["loss"]` with AdamW and a cosine schedule; the modules are left in their final state.

    Every step draws from generators keyed by (seed, step), so a resumed training sees what an unbroken one would.

    Args:
        modules: what is trained, by a name that its checkpoint keeps.
        average: decay of the exponential moving average of the weights; 0 for none. The modules end up with it.
    """
    folder = OUTPUTS / name
    folder.mkdir(parents=True, exist_ok=True)
    whole = nn.ModuleDict(dict(modules))
    weights = [weight for weight in whole.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=weight_decay, betas=(0.9, 0.99))
    averages = [weight.detach().clone() for weight in weights] if average else []
    start, before = 0, 0.0
    checkpoint = folder / "checkpoint.pt"
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        whole.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        averages = state["averages"]
        start, before = state["step"], state["seconds"]
        print(f"{name}: goes on from step {start}", flush=True)
    log = folder / "log.jsonl"
    kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= start] if log.exists() else []
    log.write_text("".join(line + "\n" for line in kept if start))

    began = saved = time.monotonic()
    sums: dict[str, float] = {}
    summed = 0
    whole.train()
    for step in range(start, steps):
        factor = min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        torch.manual_seed(seed * 1_000_003 + step)
        losses = loss_of_step(step, np.random.default_rng([seed, step]), torch.default_generator)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if averages:
            torch._foreach_lerp_(
                averages, [weight.detach() for weight in weights], 1 - min(average, (1 + step) / (10 + step))
            )
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + value.item()
        summed += 1
        done, seconds = step + 1, before + time.monotonic() - began
        if done % 50 == 0 or done == steps:
            shown = {key: round(value / summed, 5) for key, value in sums.items()}
            line = json.dumps({"step": done, **shown, "seconds": round(seconds, 1)})
            with log.open("a") as file:
                file.write(line + "\n")
            print(f"{name}: {line}", flush=True)
            sums, summed = {}, 0
        if time.monotonic() - saved > checkpoint_seconds or done == steps:
            state = {
                "modules": whole.state_dict(),
                "optimizer": optimizer.state_dict(),
                "averages": averages,
                "step": done,
                "seconds": seconds,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
            saved = time.monotonic()
    finish(whole, averages)


def load_checkpoint(name: str, modules: Mapping[str, nn.Module]) -> dict[str, float]:
    """Put the newest checkpoint's weights (the averages where there are any) into the modules; its step and seconds."""
    whole = nn.ModuleDict(dict(modules))
    state = torch.load(OUTPUTS / name / "checkpoint.pt", weights_only=True)
    whole.load_state_dict(state["modules"])
    finish(whole, state["averages"])
    return {"steps": state["step"], "seconds": round(state["seconds"], 1)}


def finish(whole: nn.Module, averages: list[Tensor]) -> None:
    """Leave the modules ready for use: averaged weights where there are any, evaluation mode."""
    if averages:
        with torch.no_grad():
            for weight, mean in zip((w for w in whole.parameters() if w.requires_grad), averages, strict=True):
                weight.copy_(mean)
    whole.eval()


def _save(path: Path, array: np.ndarray) -> None:
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, array)
    os.replace(part, path)
