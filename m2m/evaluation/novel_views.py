"""New views of held-out objects (paper, section 8.5.1 and Fig. 7), measured against the true views.

Belongs here: which views precede, which are asked for, what the result is compared with. Not here: reading renders, the
measures (`m2m.evaluation.views`).
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from m2m import artifacts
from m2m.config import Later, Source, SourcePath
from m2m.data.objaverse import ObjaverseViews, PosedViews, relative_poses
from m2m.errors import ConfigError, InputError
from m2m.evaluation import lpips
from m2m.evaluation.grids import write_grid
from m2m.evaluation.noises import over_noises
from m2m.evaluation.per_set import PerSet
from m2m.evaluation.planted_views import prove_views
from m2m.evaluation.protocol import EvaluationConfig, conclude, in_batches
from m2m.evaluation.sampler import Sampler
from m2m.evaluation.views import AMONG, TITLES, ViewMeasures, better, view_angles
from m2m.stage_run import StageRun

_ANGLES = (0, 15, 30, 60, 90, 181)  # degrees
_NEAREST, _CEILING = "the nearest preceding view, copied", "the true view through the autoencoder"
_WRONG = "M2M-DINO, asked for another target's pose"


class NovelViews(EvaluationConfig):
    """Settings of the evaluation of novel views."""

    objaverse: SourcePath = Field(description="renders in zero123's layout; their validation split is evaluated")
    min_validation: int = Field(
        1, ge=1, description="at least so many objects are held out (else 1 % of them): the same as for finetune"
    )
    objects: int = Field(100, ge=1, description="random held-out objects; all where there are fewer")
    preceding: list[int] = Field([1, 2, 4, 8], min_length=1, description="numbers of preceding views")
    targets: int = Field(4, ge=1, description="views asked for: each object's last ones, for every number the same")
    lpips: Annotated[Path | None, Source()] = Field(
        None, description=f"torchvision's {lpips.WEIGHTS}, for LPIPS; without it that measure is left out"
    )
    planted_objects: int = Field(
        24,
        ge=0,
        description="objects, held out or not, that planted models show to prove the measures; 0: none",
    )
    condition_guidance_scale: float | None = Field(
        None, description="s_C of Eq. 7, for the camera; without one the pipeline's default"
    )
    wrong_pose: Annotated[bool, Later()] = Field(
        False, description="also ask for each target with the next target's pose: what is lost is what the pose tells"
    )

    @model_validator(mode="after")
    def _there_is_another_pose(self) -> "NovelViews":
        if self.wrong_pose and self.targets < 2:
            raise ValueError("wrong_pose asks for another target's pose: set targets to 2 or more")
        return self


@over_noises
def evaluate_novel_views(config: NovelViews, run: StageRun) -> None:
    """Generate the last views of held-out objects from the first 1, 2, ... ones, each directly from true views.

    Compared with the true views by PSNR, SSIM and DINOv2 cosine, beside copying the preceding view whose camera is
    nearest, and beside the autoencoder's own loss. How alike the views of one object are among each other (consistency)
    is beside that of the true ones, as the autoencoder leaves them. The grids show sequences generated one after the
    other, as Fig. 7.

    Raises:
        InputError: no held-out objects with enough views.
    """
    measures = _measures(config, run)
    sampler = Sampler(run.inputs["m2m_nvs"], "dino", config)
    objects = _held_out(config, run, sampler.size)
    most = max(config.preceding)

    def measure(batch: range) -> dict[str, Tensor]:
        views = [objects[i] for i in batch]
        images = torch.stack([view.images for view in views])
        poses = torch.stack([_poses(view) for view in views])
        truth = images[:, -config.targets :]
        told: dict[str, Tensor] = {}

        def score(name: str, made: Tensor) -> None:
            told.update({f"{name}.{key}": value for key, value in measures.compare(made, truth).items()})

        for count in config.preceding:
            made = _each_target(config, sampler, list(batch), images[:, :count], poses, count)
            score(f"m2m.{count}", made)
            if config.wrong_pose:
                score(f"wrong.{count}", _each_target(config, sampler, list(batch), images[:, :count], poses, count, 1))
            angles = torch.stack([view_angles(view.poses)[-config.targets :, :count] for view in views])
            told[f"angle.{count}"], nearest = angles.rad2deg().min(2)
            score(f"nearest.{count}", torch.stack([row[place] for row, place in zip(images, nearest)]))
        score("ceiling", sampler.reconstruct(truth))
        told["sequence"] = _sequence(config, sampler, list(batch), images, poses)
        score("sequence", told["sequence"])
        shown = max(0, config.shown - batch.start)
        return told | {"sequence": told["sequence"][:shown], "first": images[:shown, :1], "truth": truth[:shown]}

    found = in_batches(run, "objects", len(objects), config.batch, measure)
    rows = [[a, b, c] for a, b, c in zip(found["first"], found["sequence"], found["truth"])]
    run.picture(
        f"One preceding view, {config.targets} generated one after the other, and the true ones",
        write_grid(run.out / "views", rows),
    )
    proof = _prove(config, run, measures, sampler.size)
    _tell(config, run, found, len(objects), most, measures.titles, proof)


def _measures(config: NovelViews, run: StageRun) -> ViewMeasures:
    config.require_pinned("lpips", run.profile.root)
    weights = config.lpips and lpips.Lpips.open(run.source(config.lpips), config.compute)
    return ViewMeasures(config.open_dino(run), weights or None)


def _prove(config: NovelViews, run: StageRun, measures: ViewMeasures, size: int) -> dict[str, Any] | None:
    """Planted models on objects of any split: nobody was trained on them."""
    if not config.planted_objects:
        return None
    views = ObjaverseViews(run.source(config.objaverse), size=size)
    needed = max(config.preceding) + config.targets
    found = (views[i] for i in config.choose(len(views), config.planted_objects, "planted objects"))
    objects = [one for one in found if len(one.images) >= needed]
    if len(objects) < 2:
        run.progress.log(f"the measures are not proven: {len(objects)} objects have {needed} views")
        return None
    cut = [PosedViews(one.uid, one.images[:needed], one.poses[:needed]) for one in objects]
    return prove_views(cut, measures, config.targets).tell(run)


def _held_out(config: NovelViews, run: StageRun, size: int) -> list[PosedViews]:
    _require_same_split(config, run)
    views = ObjaverseViews(run.source(config.objaverse), "validation", config.min_validation, size)
    needed = max(config.preceding) + config.targets
    kept: list[PosedViews] = []
    asked = config.choose(len(views), config.objects, "objects")
    for i in asked:
        try:
            found = views[i]
        except InputError as error:
            run.progress.log(f"left out: {error}")
            continue
        if len(found.images) >= needed:
            # a view that was set aside leaves fewer: all objects are shown by as many, from their ends
            places = [*range(max(config.preceding)), *range(-config.targets, 0)]
            kept.append(PosedViews(found.uid, found.images[places], found.poses[places]))
    if not kept:
        raise InputError(
            f"{config.objaverse}: none of {len(asked)} held-out objects has the {needed} views that preceding "
            f"(up to {max(config.preceding)}) and targets ({config.targets}) need"
        )
    run.count(objects_left_out=len(asked) - len(kept))
    return kept


def _require_same_split(config: NovelViews, run: StageRun) -> None:
    """Objects that the model was trained on must not be evaluated: both stages hold out the same share."""
    trained = artifacts.read_manifest(run.inputs["m2m_nvs"])
    held_out = trained.config.get("min_validation") if trained else None
    if held_out not in (None, config.min_validation):
        raise ConfigError(
            f"evaluate.min_validation is {config.min_validation}, but finetune held out {held_out} objects at least: "
            "give both the same, or the model is evaluated on objects that it was trained on"
        )


def _poses(view: PosedViews) -> Tensor:
    return relative_poses(view.poses, reference=0).float()


def _conditions(config: NovelViews) -> dict[str, Any]:
    scale = config.condition_guidance_scale
    return {} if scale is None else {"condition_guidance_scale": scale}


def _each_target(
    config: NovelViews,
    sampler: Sampler,
    keys: Sequence[int],
    preceding: Tensor,
    poses: Tensor,
    count: int,
    wrong: int = 0,
) -> Tensor:
    """Every target from the preceding true views alone; uint8 (B, targets, 3, H, W).

    Args:
        wrong: by how many targets the poses asked for are moved on: none of them is then a target's own.
    """
    asked = poses[:, -config.targets :].roll(-wrong, 1)
    made = [
        sampler.continue_sets(
            preceding,
            keys,
            first_image=n,
            condition=poses[:, :count],
            target_condition=asked[:, n, None],
            **_conditions(config),
        )
        for n in range(config.targets)
    ]
    return torch.cat(made, 1)


def _sequence(config: NovelViews, sampler: Sampler, keys: Sequence[int], images: Tensor, poses: Tensor) -> Tensor:
    """The targets one after the other from one view, each seeing the ones generated before it."""
    return sampler.continue_sets(
        images[:, :1],
        keys,
        config.targets,
        condition=poses[:, :1],
        target_condition=poses[:, -config.targets :],
        **_conditions(config),
    )


def _errors(per_set: PerSet, title: str, counts: Sequence[int]) -> dict[str, list[float]]:
    """Columns of errors over objects; none for a single object."""
    found = {
        name: [per_set.metrics[f"{name}, {n} before: {title}"].error for n in counts] for name in ("M2M-DINO", _NEAREST)
    }
    return {f"{name} ±": [e for e in of if e is not None] for name, of in found.items() if None not in of}


def by_angle(
    config: NovelViews, found: Mapping[str, Tensor], titles: Mapping[str, str] = TITLES
) -> list[dict[str, Any]]:
    """Rows by the angle between a target and the nearest preceding view, over all numbers of preceding views.

    The further the camera has to go, the less copying helps.
    """
    angles = torch.cat([found[f"angle.{count}"].flatten() for count in config.preceding])
    rows = []
    for low, high in itertools.pairwise(_ANGLES):
        inside = (angles >= low) & (angles < high)
        if not inside.any():
            continue
        row: dict[str, Any] = {"angle to the nearest view": f"{low} to {high} degrees", "views": int(inside.sum())}
        for key, name in {"m2m": "M2M-DINO", "nearest": "copied"}.items():
            for measure, title in titles.items():
                values = torch.cat([found[f"{key}.{count}.{measure}"].flatten() for count in config.preceding])
                row[f"{title}, {name}"] = values[inside].double().mean().item()
        rows.append(row)
    return rows


def _tell(
    config: NovelViews,
    run: StageRun,
    found: Mapping[str, Tensor],
    objects: int,
    most: int,
    titles: Mapping[str, str],
    proof: dict[str, Any] | None,
) -> None:
    per_set = PerSet()
    ours = ["sequence", *(f"m2m.{count}" for count in config.preceding)]

    def row(name: str, key: str, count: int | None) -> dict[str, Any]:
        place = name if count is None else f"{name}, {count} before"
        told = {
            title: per_set.add(
                f"{place}: {title}", found[f"{key}.{measure}"], better(measure) if key in ours else "neither"
            )
            for measure, title in titles.items()
        }
        means = {title: metric.mean for title, metric in told.items()}
        means[AMONG] = found[f"{key}.among"].mean().item()
        return {"views": name, "preceding views": count, **means}

    rows = [row("M2M-DINO", f"m2m.{count}", count) for count in config.preceding]
    rows.append(row("M2M-DINO, one after the other", "sequence", 1))
    if config.wrong_pose:
        rows += [row(_WRONG, f"wrong.{count}", count) for count in config.preceding]
    rows += [row(_NEAREST, f"nearest.{count}", count) for count in config.preceding]
    rows.append(row(_CEILING, "ceiling", None))
    run.table("New views against the true ones", rows)
    angles = by_angle(config, found, titles)
    run.table("By angle to the nearest preceding view", angles)
    x = [float(count) for count in config.preceding]
    for title in titles.values():
        run.curve(
            f"{title} by number of preceding views",
            {
                "preceding views": x,
                "M2M-DINO": [r[title] for r in rows if r["views"] == "M2M-DINO"],
                **({_WRONG: [r[title] for r in rows if r["views"] == _WRONG]} if config.wrong_pose else {}),
                _NEAREST: [r[title] for r in rows if r["views"] == _NEAREST],
                _CEILING: [rows[-1][title]] * len(x),
                **_errors(per_set, title, config.preceding),
            },
        )
    best = rows[len(config.preceding) - 1]
    run.figure(
        **{f"{title} from {most} views": round(best[title], 4) for title in titles.values()},
        lpips=None if config.lpips else "left out: its weights are not configured",
    )
    generated = objects * config.targets * (len(config.preceding) * (2 if config.wrong_pose else 1) + 1)
    run.count(objects=objects, generated_images=generated)
    metrics = {"rows": rows, "by_angle": angles} | ({"planted": proof} if proof else {})
    conclude(run, metrics, per_set)
