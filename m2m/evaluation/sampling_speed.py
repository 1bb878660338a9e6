"""Seconds an image by number of preceding images (paper, section 8.6 and Fig. 9).

Belongs here: timing. Not here: arithmetic counted instead of measured (the plan). Times vary: this stage's output is
declared non-deterministic.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from m2m.config import ModelSource
from m2m.evaluation.protocol import BothModels, conclude
from m2m.evaluation.sampler import Sampler, samplers
from m2m.models.text_to_image import as_ddim, load_text_to_image
from m2m.stage_run import StageRun

_TEXT_TO_IMAGE = "text-to-image model"
_PROMPT = "three red stars on a white background"


class SamplingSpeed(BothModels):
    """Settings of the timing."""

    made_together: ClassVar[bool] = False  # processes side by side would time each other
    has_noise: ClassVar[bool] = False

    text_to_image: ModelSource = Field(description="what the models are timed against (Fig. 9: SD-2.1-base)")
    preceding: list[int] = Field([1, 2, 4], min_length=1, description="numbers of preceding images (Fig. 9)")
    num_images: list[int] = Field([1, 4], min_length=1, description="numbers of generated images")
    joint: list[int] = Field(
        [4], description="numbers of preceding images for which both are timed without their cache, too"
    )
    repeats: int = Field(3, ge=1, description="timed calls after an untimed one; their median counts")

    @field_validator("noise_seeds")
    @classmethod
    def _noise_takes_no_time(cls, noise_seeds: int) -> int:
        if noise_seeds > 1:
            raise ValueError("the time of an image does not depend on its noise: raise repeats instead")
        return noise_seeds


def evaluate_sampling_speed(config: SamplingSpeed, run: StageRun) -> None:
    """Time single sets through both models, and single images through the text-to-image model, with equally many steps.

    The preceding images are encoded within the timed call.
    """
    rows: list[dict[str, Any]] = []
    plain = _time_text_to_image(config, run)
    rows.append({"model": _TEXT_TO_IMAGE, "preceding images": 0, "generated images": 1, "seconds an image": plain})
    for name, sampler in samplers(config, run):
        pictures = _noise_pictures(max(config.preceding), sampler.size)
        sampler.continue_sets(pictures, [0], 1)  # allocates, loads libraries, starts threads
        for count in config.preceding:
            for made in config.num_images:
                seconds = _median_seconds(config, partial(sampler.continue_sets, pictures[:, :count], [0], made))
                row = {"model": name, "preceding images": count, "generated images": made}
                rows.append(row | {"seconds an image": seconds / made})
                run.progress.log(f"{name}: {count} preceding, {made} generated: {seconds / made:.3f} s an image")
        rows += _time_joint(config, run, name, sampler)
    for row in rows:
        row["times the text-to-image model"] = row["seconds an image"] / plain
    run.table("Seconds an image", rows)
    for made in config.num_images:
        columns: dict[str, list[float]] = {"preceding images": [float(count) for count in config.preceding]}
        for row in rows[1:]:
            if row["generated images"] == made and not row["model"].endswith(", joint"):
                columns.setdefault(row["model"], []).append(row["seconds an image"])
        columns[_TEXT_TO_IMAGE] = [plain] * len(config.preceding)
        run.curve(f"Seconds an image, {made} generated", columns)
    most = max(config.preceding)
    for row in rows[1:]:
        if row["preceding images"] == most and row["generated images"] == config.num_images[0]:
            run.figure(**{f"{row['model']}: seconds an image after {most}": round(row["seconds an image"], 4)})
    run.figure(device=_device(config), steps=config.sampling.num_inference_steps)
    timed = 1 + len(config.models) * (len(config.preceding) * len(config.num_images) + len(config.joint))
    run.count(timed_calls=config.repeats * timed)
    conclude(run, {"rows": rows, "device": _device(config)})


def _time_joint(config: SamplingSpeed, run: StageRun, name: str, sampler: Sampler) -> list[dict[str, Any]]:
    """Without the cache: every step computes anew what is read of the preceding images."""
    rows = []
    for count in config.joint:
        pictures = _noise_pictures(count, sampler.size)
        seconds = _median_seconds(config, partial(sampler.continue_sets, pictures, [0], 1, cache_context=False))
        row = {"model": f"{name}, joint", "preceding images": count, "generated images": 1}
        rows.append(row | {"seconds an image": seconds})
        run.progress.log(f"{name}, joint: {count} preceding, 1 generated: {seconds:.3f} s an image")
    return rows


def _noise_pictures(count: int, size: int) -> Tensor:
    """One set; what the pictures show does not matter for the time."""
    return torch.randint(0, 256, (1, count, 3, size, size), dtype=torch.uint8)


def _time_text_to_image(config: SamplingSpeed, run: StageRun) -> float:
    config.require_pinned("text_to_image", run.profile.root)
    pipeline: Any = load_text_to_image(config.text_to_image, run.profile.root, config.compute)
    pipeline.scheduler = as_ddim(pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    sampling = config.sampling

    def draw(steps: int) -> Any:
        return pipeline(_PROMPT, num_inference_steps=steps, guidance_scale=sampling.guidance_scale)

    draw(2)
    return _median_seconds(config, partial(draw, sampling.num_inference_steps))


def _median_seconds(config: SamplingSpeed, call: Callable[[], Any]) -> float:
    if config.compute.device == "cuda":
        call()  # kernels are chosen by shape; a CPU was warm after the model's first call
    taken: list[float] = []
    for _ in range(config.repeats):
        started = _now(config)
        call()
        taken.append(_now(config) - started)
    return statistics.median(taken)


def _now(config: SamplingSpeed) -> float:
    if config.compute.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _device(config: SamplingSpeed) -> str:
    return torch.cuda.get_device_name() if config.compute.device == "cuda" else f"CPU, {config.compute.threads} threads"
