"""A training stage from its first weights to its saved pipeline, whatever it trains on.

Belongs here: the order of things, what a finished training leaves. Not here: starting weights, data.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from m2m.artifacts import write_json
from m2m.pipelines.many_to_many import ManyToManyPipeline
from m2m.stage_run import StageRun
from m2m.training.acceleration import open_accelerator
from m2m.training.encoding import pictures_of
from m2m.training.held_out import continued, stacked, validation_loss, write_grid
from m2m.training.log import LogLine, best
from m2m.training.loop import CHECKPOINTS, Prepare, SetData, train
from m2m.training.lora import has_lora, merge_lora, save_lora
from m2m.training.objective import Objective, SetLoss
from m2m.training.rollouts import OwnRollouts
from m2m.training.settings import TrainingSettings
from m2m.training.starting import parameter_count
from m2m.training.timesteps import TimestepSampling

SAMPLE = "sample.png"
_CURVE_POINTS = 400


@dataclass(frozen=True)
class Sets:
    """What is trained on, and what is held out."""

    training: SetData
    held_out: SetData | None
    prepare: Prepare
    per_shard: int | None = None


@dataclass(frozen=True)
class SamplePicture:
    """How many images of a held-out set are given, and how many are generated after them."""

    given: int
    generated: int


def start_accelerator(settings: TrainingSettings, run: StageRun) -> Accelerator:
    """Accelerate as the settings ask for it; trackers log beside the records of runs."""
    return open_accelerator(settings.compute, settings.trackers, run.records / "trackers" / run.fingerprint[:12])


def objective_of(settings: TrainingSettings, pipeline: ManyToManyPipeline, **own: Any) -> Objective:
    """The objective that the settings ask for; `own` are those of one stage alone."""
    return Objective(
        settings.seed,
        settings.timesteps,
        settings.context_dropout,
        num_train_timesteps=pipeline.scheduler.config["num_train_timesteps"],
        sampling=TimestepSampling(
            settings.timestep_sampling, settings.timestep_shift, settings.timestep_mean, settings.timestep_std
        ),
        dropping=settings.dropping,
        random_context=settings.random_context,
        weighting=settings.loss_weighting,
        **own,
    )


def take(
    settings: TrainingSettings,
    pipeline: ManyToManyPipeline,
    sets: Sets,
    objective: Objective,
    picture: SamplePicture,
    started_from: str,
    accelerator: Accelerator,
    run: StageRun,
) -> None:
    """Train the pipeline's U-Net; leave the pipeline, the log, a sample picture and figures in `run.out`.

    What a killed run left is gone on with: everything after the last checkpoint is made again. Of several processes
    only the main one writes.
    """
    main = accelerator.is_main_process
    loss = SetLoss(pipeline.unet, pipeline.scheduler)

    def validate() -> float | None:
        if sets.held_out is None:
            return None
        return validation_loss(
            loss,
            objective,
            sets.held_out,
            sets.prepare,
            accelerator,
            sets=settings.validation_sets,
            micro_batch=settings.micro_batch,
        )

    rollouts = OwnRollouts(
        pipeline,
        accelerator,
        settings.seed,
        settings.rollout_share,
        settings.rollout_steps,
        settings.rollout_guidance,
    )
    before = validate()
    log = train(
        settings,
        loss,
        objective,
        sets.training,
        run.out,
        run.progress,
        accelerator,
        belongs_to=run.fingerprint,
        prepare=sets.prepare,
        validate=None if sets.held_out is None or not settings.validation_sets else validate,
        rollouts=rollouts if settings.rollout_share else None,
        per_shard=sets.per_shard,
        run_log=run.records / f"training-{run.fingerprint[:12]}.jsonl",
        label=run.stage.key,
    )
    after = validate()
    if has_lora(pipeline.unet):
        run.figure(trained_parameters=sum(one.numel() for one in pipeline.unet.parameters() if one.requires_grad))
        if main:
            save_lora(pipeline.unet, run.out)
        merge_lora(pipeline.unet)
    if main:
        save_pipeline(pipeline, run.out)
        _draw_sample(settings, pipeline, sets, picture, accelerator, run)
    run.count(sets=len(sets.training), steps=len(log))
    run.figure(started_from=started_from, parameters=parameter_count(pipeline.unet))
    _say(log, before, after, run)
    bad = [name for name, weight in pipeline.unet.state_dict().items() if not torch.isfinite(weight).all()]
    run.check("weights_finite", not bad, f"not finite: {', '.join(bad[:3])}")
    accelerator.wait_for_everyone()  # nobody reads a checkpoint any more
    if main:
        shutil.rmtree(run.out / CHECKPOINTS, ignore_errors=True)


def save_pipeline(pipeline: ManyToManyPipeline, folder: Path) -> None:
    """Save the pipeline without the paths that it was loaded from, which differ from machine to machine."""
    pipeline.save_pretrained(folder)
    for path in [folder / "model_index.json", *folder.glob("*/*config.json")]:
        content = json.loads(path.read_text("utf-8"))
        content.pop("_name_or_path", None)
        write_json(path, content)


def _draw_sample(
    settings: TrainingSettings,
    pipeline: ManyToManyPipeline,
    sets: Sets,
    picture: SamplePicture,
    accelerator: Accelerator,
    run: StageRun,
) -> None:
    if sets.held_out is None or not settings.sample_sets:
        return
    wanted = picture.given + (picture.generated if pipeline.unet.config.condition else 0)
    items = ((sample, sets.held_out[0, sample]) for sample in range(len(sets.held_out)))
    whole = [sample for sample, item in items if int(item.get("counts", wanted)) >= wanted][: settings.sample_sets]
    if not whole:
        run.progress.log(f"no held-out set has {wanted} images: no sample picture")
        return
    batch = stacked(sets.held_out, whole, accelerator.device)
    pictures = pictures_of(batch, pipeline)[:, : picture.given]
    pipeline.set_progress_bar_config(disable=True)
    drawn = continued(
        pipeline,
        pictures,
        picture.generated,
        seed=settings.seed,
        condition=batch.get("condition"),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    )
    write_grid(run.out / SAMPLE, drawn, picture.given)
    run.picture("given images, then generated ones", run.out / SAMPLE)


def _say(log: Sequence[LogLine], before: float | None, after: float | None, run: StageRun) -> None:
    few = max(1, min(50, len(log) // 10))
    run.figure(
        loss_first=_mean(log[:few]),
        loss_last=_mean(log[-few:]),
        validation_loss_before=before,
        validation_loss_after=after,
    )
    validated = [line for line in log if line.validation_loss is not None]
    if (least := best(log)) is not None:
        run.figure(validation_loss_best=least.validation_loss, validation_loss_best_step=least.step)
        run.curve(
            "validation loss",
            {
                "step": [line.step for line in validated],
                "validation loss": [line.validation_loss or 0.0 for line in validated],
            },
        )
    every = max(1, len(log) // _CURVE_POINTS)
    shown = log[every - 1 :: every]
    run.curve(
        "training loss",
        {
            "step": [line.step for line in shown],
            "loss": [line.loss for line in shown],
            "smoothed": [line.smoothed for line in shown],
        },
    )
    losses = [line.loss for line in log] + [value for value in (before, after) if value is not None]
    run.check("loss_finite", all(map(math.isfinite, losses)), "a loss is not finite: see training_log.jsonl")


def _mean(lines: Sequence[LogLine]) -> float | None:
    return sum(line.loss for line in lines) / len(lines) if lines else None  # with steps=0 there are none
