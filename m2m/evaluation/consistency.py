"""Content and style kept, and nothing copied (paper, section 8.1 and Fig. 4).

What the paper shows by example is measured here against two references: the sets' own further images (as alike as
images of one caption are) and images of other sets (as alike as any two images are).

Belongs here: those comparisons. Not here: Table 1 (`m2m.evaluation.table`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from m2m.errors import InputError
from m2m.evaluation.encoders import Dino, Reader
from m2m.evaluation.grids import write_grid
from m2m.evaluation.measures import cosine, gram, rmse, style_distance
from m2m.evaluation.noises import over_noises
from m2m.evaluation.per_set import PerSet
from m2m.evaluation.protocol import BothModels, conclude, each_picture, in_batches
from m2m.evaluation.sampler import Sampler, samplers
from m2m.evaluation.set_pictures import SetPictures
from m2m.stage_run import StageRun
from m2m.tiny.world import ATTRIBUTES, read_caption

OWN, OTHERS = "the set's own images", "another set's images"


class Consistency(BothModels):
    """Settings of the consistency evaluation."""

    sets: int = Field(200, ge=2, description="random test sets; all where there are fewer")
    preceding: int = Field(4, ge=1, description="images that each set begins with (Fig. 4)")
    num_images: int = Field(4, ge=2, description="images generated after them (Fig. 4)")


@dataclass(frozen=True)
class _Tools:
    dino: Dino
    reader: Reader | None


@over_noises
def evaluate_consistency(config: Consistency, run: StageRun) -> None:
    """Compare generated images with the preceding ones, beside the set's own further images and another set's.

    - content: cosine of DINOv2 descriptors, mean over all pairs; with a reader also the rate at which attributes that
      the caption names are read, and how often two images differ in one that it does not name;
    - style: distance of Gram matrices of DINOv2's patch tokens (Gatys et al., 2016, on other features);
    - copying: distance to the nearest preceding image, in pixels (RMSE) and as DINOv2 cosine.
    """
    tools = _Tools(config.open_dino(run), config.open_reader(run))
    rows: list[dict[str, float | str | None]] = []
    per_set = PerSet()
    captions: list[str] = []
    keys: list[int] = []
    for name, sampler in samplers(config, run):
        sets = SetPictures(run, sampler)
        needed = config.preceding + config.num_images
        if len(sets) < 2 or sets.images_per_set < needed:
            raise InputError(
                f"{run.inputs['sets']}: consistency compares {needed} images of at least 2 test sets; there are "
                f"{len(sets)} sets of {sets.images_per_set}"
            )
        chosen = config.choose(len(sets), config.sets, "consistency")
        if not rows:
            own, others = _look_at_sets(config, run, sets, chosen, tools)
            keys = [sets.key(i) for i in chosen]
            captions = [sets.caption(i) for i in chosen]
            rows = [_row(OWN, own, captions), _row(OTHERS, others, captions)]
            _keep(per_set, OWN, own, captions, keys)
        found = _continue_sets(config, run, name, sampler, sets, chosen, tools)
        rows.append(_row(name, found, captions))
        _keep(per_set, name, found, captions, keys)
        shown = found["pictures"]
        before = sets.stack(chosen[: len(shown)], range(config.preceding))
        run.picture(
            f"{name}: {config.preceding} preceding images, then {config.num_images} generated ones",
            write_grid(run.out / name, [[a, b] for a, b in zip(before, shown)]),
        )
    _tell(config, run, rows, len(chosen), per_set)


def compare(preceding: Tensor, images: Tensor, dino: Dino, reader: Reader | None) -> dict[str, Tensor]:
    """Likeness of each set's images to its preceding ones.

    Args:
        preceding: uint8 (B, W, 3, H, W).
        images: uint8 (B, n, 3, H, W).

    Returns:
        (B,) means over pairs (`dino`, `style`) and over images (`nearest_rmse`, `nearest_dino`); `dino_by_image`
        (B, n); `read` (B, n, attributes) with a reader.
    """
    before, tokens = each_picture(dino.tokens, preceding), each_picture(dino.tokens, images)
    likeness = cosine(dino.pool(tokens)[:, :, None], dino.pool(before)[:, None])
    # the class token is no place in the picture: style is made of patches alone
    style = style_distance(gram(tokens[:, :, None, 1:]), gram(before[:, None, :, 1:]))
    told = {
        "dino": likeness.mean((1, 2)),
        "dino_by_image": likeness.mean(2),
        "style": style.double().mean((1, 2)),
        "nearest_rmse": rmse(images[:, :, None], preceding[:, None]).double().amin(2).mean(1),
        "nearest_dino": likeness.amax(2).mean(1),
    }
    if reader:
        told["read"] = each_picture(reader.read, images)
    return told


def asked_and_free(read: Tensor, captions: Sequence[str]) -> tuple[float | None, float | None]:
    """How far images show what their caption names, and vary in what it leaves open.

    Args:
        read: int64 (sets, n, attributes), indices into `ATTRIBUTES`' values.

    Returns:
        The rate at which named attributes are read, and the rate at which two images of a set differ in an attribute
        that is not named; None where there is no such attribute.
    """
    asked: list[float] = []
    differ: list[float] = []
    pairs = torch.triu_indices(read.shape[1], read.shape[1], 1)
    for values, caption in zip(read, captions):
        named = read_caption(caption)
        for place, (name, known) in enumerate(ATTRIBUTES.items()):
            here = values[:, place]
            if name in named:
                asked.append((here == known.index(named[name])).double().mean().item())
            elif pairs.shape[1]:
                differ.append((here[pairs[0]] != here[pairs[1]]).double().mean().item())
    return (sum(asked) / len(asked) if asked else None), (sum(differ) / len(differ) if differ else None)


def _look_at_sets(
    config: Consistency, run: StageRun, sets: SetPictures, chosen: Sequence[int], tools: _Tools
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The references: each set's own further images, and those of the next chosen set."""
    further = range(config.preceding, config.preceding + config.num_images)

    def measure(batch: range) -> dict[str, Tensor]:
        preceding = sets.stack([chosen[place] for place in batch], range(config.preceding))
        own = sets.stack([chosen[place] for place in batch], further)
        others = sets.stack([chosen[(place + 1) % len(chosen)] for place in batch], further)
        compared = {
            "own": compare(preceding, own, tools.dino, tools.reader),
            "others": compare(preceding, others, tools.dino, tools.reader),
        }
        return {f"{kind}_{key}": value for kind, told in compared.items() for key, value in told.items()}

    found = in_batches(run, "sets", len(chosen), config.batch, measure)
    own, others = ({k.removeprefix(p): v for k, v in found.items() if k.startswith(p)} for p in ("own_", "others_"))
    return own, others


def _continue_sets(
    config: Consistency,
    run: StageRun,
    name: str,
    sampler: Sampler,
    sets: SetPictures,
    chosen: Sequence[int],
    tools: _Tools,
) -> dict[str, Tensor]:
    def measure(batch: range) -> dict[str, Tensor]:
        indices = [chosen[place] for place in batch]
        preceding = sets.stack(indices, range(config.preceding))
        made = sampler.continue_sets(preceding, [sets.key(i) for i in indices], config.num_images)
        return compare(preceding, made, tools.dino, tools.reader) | {
            "pictures": made[: max(0, config.shown - batch.start)]
        }

    return in_batches(run, name, len(chosen), config.batch, measure)


def _row(name: str, found: Mapping[str, Tensor], captions: Sequence[str]) -> dict[str, float | str | None]:
    row: dict[str, float | str | None] = {
        "images": name,
        "DINO likeness": found["dino"].mean().item(),
        "style distance": found["style"].mean().item(),
        "nearest: RMSE": found["nearest_rmse"].mean().item(),
        "nearest: DINO": found["nearest_dino"].mean().item(),
    }
    if "read" in found:
        row["named attributes read"], row["pairs that differ in unnamed ones"] = asked_and_free(found["read"], captions)
    return row


def _keep(
    per_set: PerSet, name: str, found: Mapping[str, Tensor], captions: Sequence[str], keys: Sequence[int]
) -> None:
    """The same by set. Nearness to the preceding images is neither good nor bad: the sets' own is the measure of it."""
    own = name == OWN
    per_set.add(f"{name}: DINO likeness", found["dino"], "neither" if own else "higher", keys)
    per_set.add(f"{name}: style distance", found["style"], "neither" if own else "lower", keys)
    per_set.add(f"{name}: nearest, RMSE", found["nearest_rmse"], "neither", keys)
    per_set.add(f"{name}: nearest, DINO", found["nearest_dino"], "neither", keys)
    if "read" in found:
        rates = [asked_and_free(read[None], [caption]) for read, caption in zip(found["read"], captions)]
        for place, title in enumerate(("named attributes read", "pairs that differ in unnamed ones")):
            told = [(rate[place], key) for rate, key in zip(rates, keys) if rate[place] is not None]
            if told:
                values = np.array([value for value, _ in told], np.float64)
                per_set.add(f"{name}: {title}", values, "neither" if own else "higher", [key for _, key in told])


def _tell(
    config: Consistency, run: StageRun, rows: list[dict[str, float | str | None]], sets: int, per_set: PerSet
) -> None:
    # style distances have no scale of their own: between the set's own images 0, another set's 1
    low, high = (float(row["style distance"] or 0.0) for row in rows[:2])
    for row in rows:
        distance = float(row["style distance"] or 0.0)
        row["style, own 0 to other 1"] = (distance - low) / (high - low) if high != low else None
    run.table("Likeness to the preceding images", rows)
    for row in rows[2:]:
        short = str(row["images"]).removeprefix("M2M-").lower()
        run.figure(
            **{
                f"dino_likeness_{short}": row["DINO likeness"],
                f"nearest_rmse_{short}": row["nearest: RMSE"],
                f"named_attributes_read_{short}": row.get("named attributes read"),
            }
        )
    run.count(sets=sets, generated_images=sets * config.num_images * len(config.models))
    conclude(run, {"rows": rows}, per_set)
