"""What all evaluations share: their settings, how work is kept and how it ends.

Belongs here: settings, batches that survive a crash, the closing check. Not here: what is measured, the models that are
asked (`m2m.evaluation.sampler`).
"""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from m2m import artifacts, processes
from m2m.config import Compute, Later, ModelSource, Settings, Source, StageConfig, is_hub_id, resolve, source_digest
from m2m.errors import ArtifactError, InputError
from m2m.evaluation.encoders import Clip, Dino, Reader
from m2m.evaluation.per_set import PerSet
from m2m.generation.noise import keyed_generator, namespaced
from m2m.models.text_to_image import model_folder
from m2m.pipelines.schedulers import SchedulerName
from m2m.stage_run import StageRun

METRICS = "metrics.json"
NOISES = ".noises"
"""Within an output in the making: the evaluations of further noises, and the sign that they are not all there yet."""
_PARTS = ".parts"
SEEN_TOGETHER = 128
"""Pictures that a model or a measure is given at a time."""


class Sampling(Settings):
    """How pictures are sampled: the paper's appendix A."""

    num_inference_steps: int = Field(50, ge=1, description="denoising steps of an image")
    scheduler: Annotated[SchedulerName, Later()] = Field(
        "ddim",
        description="DDIM as in the paper, or DPM-Solver++ for the stochastic equation, which mends errors on the way",
    )
    guidance_scale: float = Field(7.5, ge=1, description="s of Eq. 6, for the preceding images")
    context_window: int | None = Field(
        None, ge=1, description="W of section 6.1, which names no value; without one the trained pipeline's"
    )
    context_sink: int | None = Field(
        None, ge=0, description="how many of W are always the first images; without one the trained pipeline's"
    )


class EvaluationConfig(StageConfig):
    """The base of every evaluation's settings."""

    made_together: ClassVar[bool] = True
    has_noise: ClassVar[bool] = True
    """Whether other noise gives other values, which the regression gate has to know."""

    sampling: Sampling = Sampling.model_validate({})
    seed: int = Field(0, ge=0, description="namespace of the noise, keyed by (set, image), and of all choices")
    noise_seed: int = Field(0, ge=0, description="namespace of the noise alone: the same choices, sampled anew")
    noise_seeds: int = Field(
        1,
        ge=1,
        description="noises, from noise_seed on, over which values by set are averaged",
    )
    accepted: Annotated[Path | None, Source(), Later()] = Field(
        None,
        description="values by set of the accepted evaluation (`python -m m2m accept`): noises are added until each "
        "metric is known to be worse or not to be",
    )
    batch: int = Field(4, ge=1, description="sets sampled at a time")
    shown: int = Field(4, ge=1, description="sets in the picture grids")
    dino: ModelSource = Field(description="DINOv2, for similarities")
    dino_pooling: Literal["cls", "mean"] = Field(
        "cls", description="a picture's descriptor: the class token, or the mean of all tokens"
    )
    clip: ModelSource = Field(description="CLIP with its tokenizer, for CLIP scores; the paper does not name it")
    reader: Annotated[str | None, Source()] = Field(
        None, description="classifier that reads the tiny world's attributes off pictures; none outside that world"
    )
    pins: dict[str, str] = Field(
        {}, description="sha256 of models by their setting's name (clip, dino, ...); others are refused"
    )
    compute: Compute = Compute.model_validate({})

    def require_pinned(self, name: str, root: Path) -> None:
        """Refuse other weights than the ones that were pinned: scores by different backbones can't be compared.

        Raises:
            InputError: the model has another digest (of a folder: of its files' names, sizes and content).
        """
        source = getattr(self, name, None)
        if name not in self.pins or source is None:
            return
        path = resolve(source, root)
        found = source_digest(path if path.exists() else model_folder(source, root), root)
        if found != self.pins[name]:
            raise InputError(
                f"{name} {source}: not the pinned weights: sha256 {found}, pins.{name} is {self.pins[name]}. "
                "Put those back, or change the pin and evaluate everything that is to be compared anew"
            )

    @model_validator(mode="after")
    def _pins_are_of_sources(self) -> "EvaluationConfig":
        known = [
            name
            for name, info in type(self).model_fields.items()
            if name != "accepted" and any(isinstance(m, Source) for m in info.metadata)
        ]
        for name in self.pins:
            if name not in known:
                raise ValueError(f"pins.{name}: no such model. There are: {', '.join(known)}")
        return self

    def preview(self, root: Path, variant: str | None) -> list[str]:
        """Every source of the settings is there (hub ids stand for themselves)."""
        found = []
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if value is None or not any(isinstance(mark, Source) for mark in info.metadata):
                continue
            path = resolve(value, root)
            if not path.exists() and not (isinstance(value, str) and is_hub_id(value)):
                raise InputError(f"{name} {value}: no such file or folder (looked at {path})")
            if path.exists():
                self.require_pinned(name, root)
            found.append(f"{name}: {path if path.exists() else f'{value} (from the hub)'}")
        steps = f"{self.sampling.num_inference_steps} steps of {self.sampling.scheduler} an image"
        return [*found, f"{steps}, {self.batch} sets at a time"]

    def open_clip(self, run: StageRun) -> Clip:
        self.require_pinned("clip", run.profile.root)
        return Clip(self.clip, run.profile.root, self.compute)

    def open_dino(self, run: StageRun) -> Dino:
        self.require_pinned("dino", run.profile.root)
        return Dino(self.dino, run.profile.root, self.compute, self.dino_pooling)

    def open_reader(self, run: StageRun) -> Reader | None:
        self.require_pinned("reader", run.profile.root)
        return Reader(self.reader, run.profile.root, self.compute) if self.reader else None

    def choose(self, available: int, wanted: int, purpose: str) -> list[int]:
        """`wanted` of `available` items, or all where there are fewer: a random choice of the seed, in order."""
        order = keyed_generator(namespaced(self.seed, purpose)).permutation(available)
        return sorted(order[:wanted].tolist())


class BothModels(EvaluationConfig):
    """The base of the evaluations of M2M-Self and M2M-DINO, as they are before fine-tuning."""

    models: Annotated[list[Literal["self", "dino"]], Later()] = Field(
        ["self", "dino"], min_length=1, description="which of the two; one alone is half the work"
    )


def in_batches(
    run: StageRun, name: str, count: int, batch: int, measure: Callable[[range], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Measure items batch by batch; each batch's results are kept, so that a killed run goes on where it was.

    Processes that make the evaluation together (torchrun) take turns with the batches and leave what they find in the
    output's folder, where all read all of it: the same result for any number of them.

    Args:
        name: what is measured; also the place of the kept results.
        measure: given a range of item numbers, tensors by name; concatenated along their first axis in the end.

    Raises:
        ArtifactError: another process's results are not there: the processes do not share the folder.
    """
    folder = run.out / _PARTS / name
    folder.mkdir(parents=True, exist_ok=True)
    paths = {first: folder / f"{first:07d}.safetensors" for first in range(0, count, batch)}
    mine = list(paths)[processes.rank() :: processes.count()]
    parts: dict[int, dict[str, Tensor]] = {}
    for first in run.progress.each(mine, total=len(mine), unit="batch", label=name):
        part = _read_part(paths[first])
        if part is None:
            measured = measure(range(first, min(count, first + batch)))
            part = {key: value.contiguous() for key, value in measured.items()}
            artifacts.write_bytes(paths[first], save(part))
        parts[first] = part
    processes.wait_for_all()
    for first in paths.keys() - parts.keys():
        part = _read_part(paths[first])
        if part is None:
            raise ArtifactError(f"{paths[first]}: another process left nothing here. Do they share this folder?")
        parts[first] = part
    found = [parts[first] for first in paths]
    return {key: torch.cat([part[key] for part in found]) for key in (found[0] if found else ())}


def conclude(run: StageRun, metrics: Mapping[str, Any], per_set: PerSet | None = None) -> None:
    """Write `metrics.json`, check that every number in it, in tables and in curves is finite, and drop what was only
    kept for a restart.

    Args:
        per_set: the metrics' values by set, from which two evaluations can be compared (`per_set.parquet`).
    """
    shown = {kind: run.summary.get(kind, {}) for kind in ("figures", "tables", "curves")}
    wrong = _not_finite(metrics, "") + _not_finite(shown, "")
    run.check("metrics_finite", not wrong, f"not finite: {', '.join(wrong[:5])}")
    if processes.leads():
        artifacts.write_json(run.out / METRICS, dict(metrics))
        if per_set is not None:
            per_set.write(run.out)
    if not (run.out / NOISES).exists():
        drop_kept(run)
    processes.wait_for_all()  # until what all read is there


def drop_kept(run: StageRun) -> None:
    """Remove what was only kept for a restart."""
    processes.wait_for_all()  # before what the others read is gone
    if processes.leads():
        for name in (_PARTS, NOISES):
            shutil.rmtree(run.out / name, ignore_errors=True)


def at_size(pictures: Tensor, size: int) -> Tensor:
    """uint8 pictures (..., 3, H, W) brought to size x size; unchanged where they have it."""
    if pictures.shape[-2:] == (size, size):
        return pictures
    pixels = pictures.reshape(-1, *pictures.shape[-3:]).float()
    scaled = F.interpolate(pixels, (size, size), mode="bicubic", align_corners=False, antialias=True)
    return scaled.clamp(0, 255).round().to(torch.uint8).reshape(*pictures.shape[:-2], size, size)


def each_picture(look: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
    """Apply what takes (n, 3, H, W) to (B, n, 3, H, W); (B, n, ...). So many at a time that long rollouts fit, too."""
    seen = [look(part) for part in pictures.flatten(0, 1).split(SEEN_TOGETHER)]
    return torch.cat(seen).unflatten(0, pictures.shape[:2])


def _read_part(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def _not_finite(value: Any, where: str) -> list[str]:
    if isinstance(value, Mapping):
        return [name for key, inner in value.items() for name in _not_finite(inner, f"{where}.{key}".lstrip("."))]
    if isinstance(value, list | tuple):
        return [name for place, inner in enumerate(value) for name in _not_finite(inner, f"{where}[{place}]")]
    return [where] if isinstance(value, float) and not math.isfinite(value) else []
