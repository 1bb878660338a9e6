"""How quality holds over long sequences: the paper's stated limit (section 9).

Belongs here: one long sequence a set, measured image by image, also with remedies of sampling. Not here: remedies of
training (`rollout_share`, `random_context`, `context_noise` of `pretrain`): other models, evaluated alike.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from m2m.config import Later, Settings
from m2m.evaluation.encoders import Clip, Dino, Reader
from m2m.evaluation.grids import write_grid
from m2m.evaluation.measures import appearance, cosine
from m2m.evaluation.noises import over_noises
from m2m.evaluation.per_set import PerSet
from m2m.evaluation.protocol import BothModels, conclude, each_picture, in_batches
from m2m.evaluation.sampler import Sampler, samplers
from m2m.evaluation.set_pictures import SetPictures
from m2m.stage_run import StageRun
from m2m.tiny.world import ATTRIBUTES, read_caption

_TITLES = {
    "dino": "DINO likeness to the preceding images",
    "clip": "CLIP likeness to the preceding images",
    "named": "Named attributes read",
    "sharpness": "Sharpness, relative to the preceding images",
    "contrast": "Contrast, relative to the preceding images",
    "saturation": "Saturation, relative to the preceding images",
}
_RELATIVE = ("sharpness", "contrast", "saturation")


class Remedy(Settings):
    """What is read of preceding images in a long sequence, instead of what `sampling` says."""

    context_window: int | None = Field(None, ge=1, description="W: how many preceding images are read")
    context_sink: int = Field(0, ge=0, description="how many of W are always the first images")
    context_noise: int = Field(
        0, ge=0, description="timestep of noise on what is read: M2M-Self alone, trained with pretrain.context_noise"
    )


class Rollouts(BothModels):
    """Settings of the long sequences."""

    sets: int = Field(64, ge=1, description="random test sets; all where there are fewer")
    preceding: int = Field(4, ge=1, description="images that each set begins with")
    num_images: int = Field(16, ge=2, description="images generated after them, one after the other")
    remedies: Annotated[dict[str, Remedy], Later()] = Field(
        {}, description="by name: further rollouts of the same sets, from the same noise, to compare"
    )


@over_noises
def evaluate_rollouts(config: Rollouts, run: StageRun) -> None:
    """Generate long sequences and tell, for every n-th image, how like the beginning it still is and how it looks."""
    dino, clip, reader = config.open_dino(run), config.open_clip(run), config.open_reader(run)
    curves: dict[str, dict[str, list[float]]] = {}
    per_set = PerSet()
    errors: dict[str, dict[str, list[float]]] = {}
    count = 0
    for name, sampler, remedy in _each_way(config, run):
        sets = SetPictures(run, sampler)
        chosen = config.choose(len(sets), config.sets, "rollouts")
        count = len(chosen)
        found = _roll(config, run, name, sampler, remedy, sets, chosen, dino, clip, reader)
        curves[name] = _by_image(found, [sets.caption(i) for i in chosen])
        part = max(1, config.num_images // 4)
        for key in ("dino", "clip"):
            values, keys = found[key].double(), [sets.key(i) for i in chosen]
            per_set.add(f"{name}: {_TITLES[key]}", values, "higher", keys)
            change = values[:, -part:].mean(1) - values[:, :part].mean(1)
            per_set.add(f"{name}: {_TITLES[key]}, change", change, "higher", keys)
            if len(values) > 1:
                errors.setdefault(key, {})[f"{name} ±"] = (values.std(0) / len(values) ** 0.5).tolist()
        shown = found["pictures"]
        before = sets.stack(chosen[: len(shown)], range(config.preceding))
        run.picture(
            f"{name}: {config.preceding} preceding images, then a sequence of {config.num_images}",
            write_grid(run.out / name, [[a, b] for a, b in zip(before, shown)]),
        )
    _tell(config, run, curves, errors, count, per_set)


def _each_way(config: Rollouts, run: StageRun) -> Iterator[tuple[str, Sampler, Mapping[str, Any]]]:
    """Both models as the settings have them, and with each remedy that they know."""
    for name, sampler in samplers(config, run):
        yield name, sampler, {}
        for title, remedy in config.remedies.items():
            if not remedy.context_noise or sampler.pipeline.unet.variant == "self":
                yield f"{name}, {title}", sampler, remedy.model_dump()


def _roll(
    config: Rollouts,
    run: StageRun,
    name: str,
    sampler: Sampler,
    remedy: Mapping[str, Any],
    sets: SetPictures,
    chosen: Sequence[int],
    dino: Dino,
    clip: Clip,
    reader: Reader | None,
) -> dict[str, Tensor]:
    def measure(batch: range) -> dict[str, Tensor]:
        indices = [chosen[place] for place in batch]
        preceding = sets.stack(indices, range(config.preceding))
        made = sampler.continue_sets(preceding, [sets.key(i) for i in indices], config.num_images, **remedy)
        told: dict[str, Tensor] = {"pictures": made[: max(0, config.shown - batch.start)]}
        for key, look in {"dino": dino.pictures, "clip": clip.pictures}.items():
            now, before = each_picture(look, made), each_picture(look, preceding)
            told[key] = cosine(now[:, :, None], before[:, None]).mean(2)
        for key in _RELATIVE:
            told[key] = each_picture(lambda part, key=key: appearance(part)[key], made)
            told[f"{key}_at_first"] = appearance(preceding)[key].mean(1)
        if reader:
            told["read"] = each_picture(reader.read, made)
        return told

    return in_batches(run, name, len(chosen), config.batch, measure)


def _by_image(found: Mapping[str, Tensor], captions: Sequence[str]) -> dict[str, list[float]]:
    """Each measure's mean over sets, by n-th image."""
    curves = {key: found[key].double().mean(0).tolist() for key in ("dino", "clip")}
    for key in _RELATIVE:
        # the ratio of means: a black picture's own ratio would be one over nothing
        curves[key] = (found[key].double().mean(0) / found[f"{key}_at_first"].double().mean().clamp(min=1e-6)).tolist()
    if "read" in found:
        hits = []
        for values, caption in zip(found["read"], captions):
            named = read_caption(caption)
            hits += [
                (values[:, place] == known.index(named[name])).double()
                for place, (name, known) in enumerate(ATTRIBUTES.items())
                if name in named
            ]
        if hits:
            curves["named"] = torch.stack(hits).mean(0).tolist()
    return curves


def _tell(
    config: Rollouts,
    run: StageRun,
    curves: Mapping[str, Mapping[str, list[float]]],
    errors: Mapping[str, Mapping[str, list[float]]],
    sets: int,
    per_set: PerSet,
) -> None:
    x = [float(n + 1) for n in range(config.num_images)]
    for key, title in _TITLES.items():
        columns = {name: list(found[key]) for name, found in curves.items() if key in found}
        if columns:
            run.curve(title, {"n-th image": x, **columns, **errors.get(key, {})})
    part = max(1, config.num_images // 4)
    rows = []
    for name, found in curves.items():
        for key, values in found.items():
            first, last = sum(values[:part]) / part, sum(values[-part:]) / part
            rows.append(
                {"model": name, "measure": _TITLES[key], f"first {part}": first, f"last {part}": last}
                | {"change": last - first}
            )
            if key == "dino":
                run.figure(**{f"dino_likeness_change_{name.removeprefix('M2M-').lower()}": round(last - first, 4)})
    run.table("From the first images to the last", rows)
    run.count(sets=sets, generated_images=sets * config.num_images * len(curves))
    conclude(run, {name: dict(found) for name, found in curves.items()}, per_set)
