"""Sets of real photographs continued by models that saw only synthetic ones (paper, section 8.3 and Fig. 5).

Belongs here: sets that share a category, likeness within and across categories. Not here: reading the photographs
(`m2m.data.photo_sets`, `m2m.data.coco`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from m2m.config import Source
from m2m.data.coco import CocoSets
from m2m.data.photo_sets import PhotoSets, load_image
from m2m.errors import ConfigError, InputError
from m2m.evaluation.grids import write_grid
from m2m.evaluation.measures import cosine
from m2m.evaluation.noises import over_noises
from m2m.evaluation.per_set import Better, PerSet
from m2m.evaluation.protocol import BothModels, conclude, each_picture, in_batches
from m2m.evaluation.sampler import Sampler, samplers
from m2m.generation.noise import keyed_generator, namespaced
from m2m.stage_run import StageRun

_BETTER: dict[str, Better] = {"own category": "higher", "own category is nearest": "higher"}


class RealImages(BothModels):
    """Settings of the evaluation on photographs."""

    photo_sets: Annotated[Path | None, Source()] = Field(
        None, description="folder of category/subject/NN.jpg; or else MSCOCO's two"
    )
    coco_instances: Annotated[Path | None, Source()] = Field(None, description="instances_val2017.json")
    coco_images: Annotated[Path | None, Source()] = Field(None, description="the folder val2017")
    categories: int = Field(80, ge=2, description="random categories; all where there are fewer")
    sets_per_category: int = Field(4, ge=1, description="sets of preceding photographs drawn from each category")
    photos_per_category: int = Field(32, ge=2, description="photographs of a category that likeness is measured to")
    preceding: int = Field(4, ge=1, description="photographs that each set begins with (Fig. 5)")
    num_images: int = Field(4, ge=1, description="images generated after them (Fig. 5)")


@over_noises
def evaluate_real_images(config: RealImages, run: StageRun) -> None:
    """Continue sets of photographs of one category; compare what comes with that category's and the others' photos.

    Raises:
        ConfigError: no photographs are configured.
        InputError: fewer than two categories with enough photographs.
    """
    photos = _photos(config, run)
    names = list(photos)
    looks = {"DINO": config.open_dino(run), "CLIP": config.open_clip(run)}
    drawn = _draw_sets(config, photos)
    rows: list[dict[str, Any]] = []
    per_set = PerSet()
    known: dict[str, list[Tensor]] = {}
    for name, sampler in samplers(config, run):
        pictures = {category: _load(paths, sampler.size) for category, paths in photos.items()}
        if not known:
            known = {key: [look.pictures(pictures[c]) for c in names] for key, look in looks.items()}
            rows.append(_photographs_row(known))
        preceding = torch.stack([pictures[names[category]][picks] for category, picks in drawn])
        found = _continue_sets(config, run, name, sampler, preceding, looks)
        values = _values(found, drawn, known)
        rows.append({"images": name} | {title: _mean(of) for title, of in values.items()})
        for title, of in values.items():
            per_set.add(f"{name}: {title}", np.array(of), _BETTER.get(title.partition(": ")[2], "neither"))
        # the first set of each category, not all sets of the first category
        wanted = range(0, len(drawn), config.sets_per_category)[: config.shown]
        run.picture(
            f"{name}: {config.preceding} photographs, then {config.num_images} generated images",
            write_grid(run.out / name, [[preceding[i], found["pictures"][i]] for i in wanted]),
        )
    for key in looks:
        prefix = f"{key}: "
        columns = [column for column in rows[0] if column.startswith(prefix)]
        told = [{"images": row["images"]} | {c.removeprefix(prefix): row[c] for c in columns} for row in rows]
        run.table(f"Likeness to photographs by {key}", told)
    for row in rows[1:]:
        short = str(row["images"]).removeprefix("M2M-").lower()
        run.figure(
            **{f"dino_within_{short}": row["DINO: own category"], f"dino_across_{short}": row["DINO: other categories"]}
        )
    made = len(drawn) * config.num_images * len(config.models)
    run.count(categories=len(names), sets=len(drawn), generated_images=made)
    conclude(run, {"rows": rows, "categories": names}, per_set)


def _photos(config: RealImages, run: StageRun) -> dict[str, list[Path]]:
    """Chosen photographs by category."""
    if config.photo_sets:
        root = config.photo_sets
        found = PhotoSets(run.source(config.photo_sets))
    elif config.coco_instances and config.coco_images:
        root = config.coco_instances
        found = CocoSets(run.source(config.coco_instances), run.source(config.coco_images))
    else:
        raise ConfigError("evaluate real_images needs photo_sets, or coco_instances and coco_images")
    by_category: dict[str, list[Path]] = {}
    for i in range(len(found)):
        by_category.setdefault(found[i].category, []).extend(found[i].paths)
    enough = sorted(name for name, paths in by_category.items() if len(paths) >= config.preceding)
    if len(enough) < 2:
        raise InputError(
            f"{root}: {len(enough)} categories have the {config.preceding} photographs that a set begins with; "
            "at least 2 are compared"
        )
    chosen = [enough[i] for i in config.choose(len(enough), config.categories, "categories")]
    namespace = namespaced(config.seed, "photographs")
    most = max(config.photos_per_category, config.preceding)
    photos = {}
    for place, name in enumerate(chosen):
        paths = sorted(by_category[name])
        picks = keyed_generator(namespace, place).permutation(len(paths))[:most]
        photos[name] = [paths[i] for i in sorted(picks.tolist())]
    return photos


def _draw_sets(config: RealImages, photos: Mapping[str, Sequence[Path]]) -> list[tuple[int, list[int]]]:
    """(category, which of its photographs precede) for every set."""
    namespace = namespaced(config.seed, "sets of photographs")
    return [
        (place, keyed_generator(namespace, place, n).permutation(len(paths))[: config.preceding].tolist())
        for place, paths in enumerate(photos.values())
        for n in range(config.sets_per_category)
    ]


def _load(paths: Sequence[Path], size: int) -> Tensor:
    return torch.stack([load_image(path, size) for path in paths])


def _continue_sets(
    config: RealImages, run: StageRun, name: str, sampler: Sampler, preceding: Tensor, looks: Mapping[str, Any]
) -> dict[str, Tensor]:
    def measure(batch: range) -> dict[str, Tensor]:
        made = sampler.continue_sets(preceding[batch.start : batch.stop], list(batch), config.num_images)
        return {key: each_picture(look.pictures, made) for key, look in looks.items()} | {"pictures": made}

    return in_batches(run, name, len(preceding), config.batch, measure)


def _values(
    found: Mapping[str, Tensor], drawn: Sequence[tuple[int, list[int]]], known: Mapping[str, Sequence[Tensor]]
) -> dict[str, list[float]]:
    """Each likeness by set."""
    values: dict[str, list[float]] = {}
    for key, photos in known.items():
        shown, own, other, right = [], [], [], []
        for made, (category, picks) in zip(found[key], drawn):
            likeness = [cosine(made[:, None], there[None]) for there in photos]
            unseen = [i for i in range(len(photos[category])) if i not in picks]
            shown.append(likeness[category][:, picks].mean().item())
            own.append(likeness[category][:, unseen].mean().item() if unseen else shown[-1])
            other.append(torch.cat([x for i, x in enumerate(likeness) if i != category], 1).mean().item())
            nearest = torch.stack([x.mean(1) for x in likeness]).argmax(0)
            right.append((nearest == category).double().mean().item())
        values |= {
            f"{key}: preceding photographs": shown,
            f"{key}: own category": own,
            f"{key}: other categories": other,
            f"{key}: own category is nearest": right,
        }
    return values


def _photographs_row(known: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
    """The photographs among themselves, each compared with all others."""
    row: dict[str, Any] = {"images": "the photographs themselves"}
    for key, photos in known.items():
        own, other, right = [], [], []
        for category, mine in enumerate(photos):
            for place in range(len(mine)):
                rest = torch.cat([mine[:place], mine[place + 1 :]])
                likeness = [cosine(mine[place], rest if i == category else there) for i, there in enumerate(photos)]
                own.append(likeness[category].mean().item())
                other.append(torch.cat([x for i, x in enumerate(likeness) if i != category]).mean().item())
                nearest = max(range(len(photos)), key=lambda i: likeness[i].mean().item())
                right.append(float(nearest == category))
        row |= {
            f"{key}: preceding photographs": None,
            f"{key}: own category": _mean(own),
            f"{key}: other categories": _mean(other),
            f"{key}: own category is nearest": _mean(right),
        }
    return row


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
