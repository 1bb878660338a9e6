"""What one to four preceding images tell (paper, section 8.2 and Fig. 6).

One preceding image can't say what of it is the pattern: its single apple may be chance. The more images agree in an
attribute, the likelier it is shared by the set. An ideal observer who knows how often sets share the attribute draws
exactly that conclusion; how near the model comes is what this measures where the tiny world's pictures can be read.

Belongs here: trials, the ideal observer, the reader's errors. Not here: drawing pictures (`m2m.tiny.world`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from m2m.data.sets import ImageSets
from m2m.evaluation.encoders import Clip, Reader
from m2m.evaluation.grids import write_grid
from m2m.evaluation.measures import cosine
from m2m.evaluation.protocol import (
    EvaluationConfig,
    Sampler,
    SetPictures,
    at_size,
    conclude,
    each_picture,
    in_batches,
    samplers,
)
from m2m.generation.noise import keyed_generator, namespaced
from m2m.stage_run import StageRun
from m2m.tiny.world import ATTRIBUTES, draw, read_caption, sample_scene

_SHARED_RATE = 0.5  # of a trial's attributes; both kinds of trials then are equally many, whatever the captions do


class PrecedingImages(EvaluationConfig):
    """Settings of the evaluation by number of preceding images."""

    trials: int = Field(200, ge=1, description="sets of preceding images: drawn by the world with a reader, else tests")
    preceding: list[int] = Field([1, 2, 3, 4], min_length=1, description="numbers of preceding images (Fig. 6: 1 to 4)")


@dataclass(frozen=True)
class Trials:
    """Preceding images and what they have in common."""

    pictures: Tensor  # uint8 (trials, W, 3, H, W)
    keys: list[int]
    labels: Tensor | None  # int64 (trials, W, attributes), where the world drew the pictures
    shared: Tensor | None  # bool (trials, attributes)


def evaluate_preceding_images(config: PrecedingImages, run: StageRun) -> None:
    """Generate one image after 1, 2, ... preceding ones, with the same noise, without and with guidance.

    Tells the likeness (CLIP) to all of a set's preceding images, shown or not, and with a reader how often the image
    agrees in the attributes that they share, and in the ones that vary among them (there, with the first image).
    """
    clip, reader = config.open_clip(run), config.open_reader(run)
    guidances = sorted({1.0, config.sampling.guidance_scale})
    priors = _shared_rates(run) if reader else {}
    rows: list[dict[str, float | str | None]] = []
    accuracy: dict[str, float] = {}
    for name, sampler in samplers(config, run):
        trials = _draw_trials(config, sampler.size) if reader else _test_sets(config, run, sampler)
        found = _generate(config, run, name, sampler, trials, guidances, clip, reader)
        if reader and trials.labels is not None:
            accuracy = accuracy or _reading_accuracy(sampler, trials, reader)
        for g, guidance in enumerate(guidances):
            for k, count in enumerate(config.preceding):
                row = {"model": name, "guidance": guidance, "preceding images": count}
                row["CLIP to all preceding"] = found["clip"][:, g, k].mean().item() * 100
                if reader:
                    row |= _agreement(trials, found["read"][:, g, k], count, priors, accuracy)
                rows.append(row)
        _show(config, run, name, trials, found["pictures"])
    _tell(config, run, rows, guidances, priors, accuracy)


def ideal_agreement(prior: float, values: int, preceding: int) -> float:
    """How often the next image agrees with preceding ones that all agree, were the conclusion drawn perfectly.

    Args:
        prior: how often a set shares the attribute, before anything is seen.
        values: number of values V, equally frequent.
        preceding: number k of images that agree; chance alone does that with V^(1 - k).

    Returns:
        q + (1 - q) / V with the posterior q = prior / (prior + (1 - prior) V^(1 - k)).
    """
    shared = prior / (prior + (1 - prior) * values ** (1 - preceding))
    return shared + (1 - shared) / values


def corrected(observed: float, accuracy: float, values: int) -> float:
    """The true rate behind one that a reader with errors has observed, between 0 and 1.

    A reader who is right at a rate r and errs evenly among the other V - 1 values observes
    o = a r + (1 - a) (1 - r) / (V - 1) where the true rate is a; this solves for a.
    """
    by_error = (1 - accuracy) / (values - 1)
    if accuracy <= by_error:  # reads no better than chance: nothing can be corrected
        return observed
    return min(1.0, max(0.0, (observed - by_error) / (accuracy - by_error)))


def _shared_rates(run: StageRun) -> dict[str, float]:
    """How often a caption of the training sets names each attribute: the ideal observer's prior."""
    sets = ImageSets(run.inputs["sets"], "train")
    named = [read_caption(sets.caption(i)) for i in range(len(sets))]
    return {name: sum(name in told for told in named) / len(named) for name in ATTRIBUTES}


def _draw_trials(config: PrecedingImages, size: int) -> Trials:
    namespace = namespaced(config.seed, "preceding images")
    pictures, labels, shared = [], [], []
    for trial in range(config.trials):
        drawn = keyed_generator(namespace, trial)
        pattern = sample_scene(drawn)
        keeps = drawn.random(len(ATTRIBUTES)) < _SHARED_RATE
        fixed = {name: getattr(pattern, name) for name, kept in zip(ATTRIBUTES, keeps) if kept}
        scenes = [sample_scene(drawn, fixed) for _ in range(max(config.preceding))]
        images = torch.stack([torch.from_numpy(draw(scene, drawn)).permute(2, 0, 1) for scene in scenes])
        pictures.append(at_size(images, size))
        labels.append(torch.tensor([scene.labels() for scene in scenes]))
        shared.append(torch.from_numpy(keeps))
    return Trials(torch.stack(pictures), list(range(config.trials)), torch.stack(labels), torch.stack(shared))


def _test_sets(config: PrecedingImages, run: StageRun, sampler: Sampler) -> Trials:
    sets = SetPictures(run, sampler)
    chosen = config.choose(len(sets), config.trials, "preceding images")
    pictures = sets.stack(chosen, range(max(config.preceding)))
    return Trials(pictures, [sets.key(i) for i in chosen], None, None)


def _generate(
    config: PrecedingImages,
    run: StageRun,
    name: str,
    sampler: Sampler,
    trials: Trials,
    guidances: Sequence[float],
    clip: Clip,
    reader: Reader | None,
) -> dict[str, Tensor]:
    """Tensors (trials, guidances, numbers of preceding images, ...)."""

    def measure(batch: range) -> dict[str, Tensor]:
        preceding = trials.pictures[batch.start : batch.stop]
        keys = trials.keys[batch.start : batch.stop]
        made = torch.stack(
            [
                torch.stack(
                    [
                        sampler.continue_sets(preceding[:, :count], keys, guidance_scale=guidance)[:, 0]
                        for count in config.preceding
                    ],
                    1,
                )
                for guidance in guidances
            ],
            1,
        )
        single = made.flatten(0, 2)
        embedded = clip.pictures(single).unflatten(0, made.shape[:3])
        like = cosine(embedded[:, :, :, None], each_picture(clip.pictures, preceding)[:, None, None]).mean(-1)
        told = {"clip": like, "pictures": made[: max(0, config.shown - batch.start)]}
        if reader:
            told["read"] = reader.read(single).unflatten(0, made.shape[:3])
        return told

    return in_batches(run, name, len(trials.keys), config.batch, measure)


def _reading_accuracy(sampler: Sampler, trials: Trials, reader: Reader) -> dict[str, float]:
    """How often the reader is right about pictures whose attributes are known and that, like generated ones, came out
    of the autoencoder."""
    assert trials.labels is not None
    pictures, labels = trials.pictures.flatten(0, 1), trials.labels.flatten(0, 1)
    read = torch.cat([reader.read(sampler.reconstruct(part)) for part in pictures.split(64)])
    rates = (read == labels).double().mean(0)
    return dict(zip(ATTRIBUTES, rates.tolist()))


def _agreement(
    trials: Trials, read: Tensor, count: int, priors: Mapping[str, float], accuracy: Mapping[str, float]
) -> dict[str, float | None]:
    """Rates over trials, averaged over attributes: shared ones (as read, corrected, ideal) and varying ones."""
    assert trials.labels is not None and trials.shared is not None
    agrees = read == trials.labels[:, 0]
    raw, mended, ideal, varying = [], [], [], []
    for place, (name, values) in enumerate(ATTRIBUTES.items()):
        shared = trials.shared[:, place]
        # attributes that happened to agree although they were free to vary are no evidence of anything
        agree_by_chance = (trials.labels[:, :count, place] == trials.labels[:, :1, place]).all(1)
        varies = ~shared & (~agree_by_chance if count > 1 else True)
        if shared.any():
            rate = agrees[shared, place].double().mean().item()
            raw.append(rate)
            mended.append(corrected(rate, accuracy[name], len(values)))
            ideal.append(ideal_agreement(priors[name], len(values), count))
        if varies.any():
            varying.append(agrees[varies, place].double().mean().item())
    return {
        "agreement as read": _mean(raw),
        "agreement": _mean(mended),
        "ideal observer": _mean(ideal),
        "agreement where it varies": _mean(varying),
    }


def _show(config: PrecedingImages, run: StageRun, name: str, trials: Trials, pictures: Tensor) -> None:
    # the last guidance is the one of the settings
    rows = [[before, made[-1]] for before, made in zip(trials.pictures, pictures)]
    told = ", ".join(map(str, config.preceding))
    run.picture(
        f"{name}: preceding images, then one image generated after the first {told} of them",
        write_grid(run.out / name, rows),
    )


def _tell(
    config: PrecedingImages,
    run: StageRun,
    rows: list[dict[str, float | str | None]],
    guidances: Sequence[float],
    priors: Mapping[str, float],
    accuracy: Mapping[str, float],
) -> None:
    run.table("By number of preceding images", rows)
    x = [float(count) for count in config.preceding]
    measures = {"agreement": "Agreement in shared attributes", "CLIP to all preceding": "CLIP likeness"}
    for key, title in measures.items():
        if key not in rows[0]:
            continue
        for guidance in guidances:
            here = [row for row in rows if row["guidance"] == guidance]
            columns: dict[str, list[float]] = {"preceding images": x}
            for row in here:
                columns.setdefault(str(row["model"]), []).append(float(row[key] or 0.0))
            if key == "agreement":
                first = here[: len(x)]
                columns["ideal observer"] = [float(row["ideal observer"] or 0.0) for row in first]
            run.curve(f"{title}, guidance {guidance:g}", columns)
    if accuracy:
        run.table(
            "The attributes",
            [
                {
                    "attribute": name,
                    "values": len(values),
                    "training captions that name it": priors[name],
                    "read rightly off autoencoder's pictures": accuracy[name],
                }
                for name, values in ATTRIBUTES.items()
            ],
        )
    for row in rows:
        if row["preceding images"] == max(config.preceding) and row["guidance"] == config.sampling.guidance_scale:
            key = "agreement" if "agreement" in row else "CLIP to all preceding"
            run.figure(**{f"{row['model']}: {key} after {max(config.preceding)}": row[key]})
    run.count(trials=config.trials, generated_images=config.trials * len(guidances) * len(config.preceding) * 2)
    conclude(run, {"rows": rows, "priors": dict(priors), "reading_accuracy": dict(accuracy)})


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
