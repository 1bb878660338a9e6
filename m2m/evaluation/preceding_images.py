"""What one to four preceding images tell (paper, section 8.2 and Fig. 6).

One preceding image can't say what of it is the pattern: its single apple may be chance. The more images agree in an
attribute, the likelier it is shared by the set. An ideal observer who knows how often sets share the attribute draws
exactly that conclusion; how near the model comes is what this measures where the tiny world's pictures can be read.

Belongs here: trials, the ideal observer, the reader's errors. Not here: drawing pictures (`m2m.tiny.world`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from m2m.data.sets import ImageSets
from m2m.evaluation.encoders import ClassifierBackbone, Clip, Reader
from m2m.evaluation.grids import write_grid
from m2m.evaluation.instruments import Tools, prove
from m2m.evaluation.measures import cosine
from m2m.evaluation.noises import over_noises
from m2m.evaluation.per_set import PerSet, ratio_values
from m2m.evaluation.planted import PLANTED, PlantedSampler, WorldSets
from m2m.evaluation.protocol import (
    Continues,
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
_KINDS = {"agreement": "agreement", "kept": "kept where shared", "varying": "agreement where they vary"}
_ORACLE = "planted: oracle"
_REACH = {"agreement": "ideal observer", "kept": "all", "varying": "chance"}
Rates = TypeVar("Rates", float, np.ndarray)


class PrecedingImages(EvaluationConfig):
    """Settings of the evaluation by number of preceding images."""

    trials: int = Field(200, ge=1, description="sets of preceding images: drawn by the world with a reader, else tests")
    preceding: list[int] = Field([1, 2, 3, 4], min_length=1, description="numbers of preceding images (Fig. 6: 1 to 4)")
    planted_sets: int = Field(
        24, ge=0, description="sets that planted models continue to prove the measures; needs a reader, 0 leaves it out"
    )


@dataclass(frozen=True)
class Trials:
    """Preceding images and what they have in common."""

    pictures: Tensor  # uint8 (trials, W, 3, H, W)
    keys: list[int]
    labels: Tensor | None = None  # int64 (trials, W, attributes), where the world drew the pictures
    shared: Tensor | None = None  # bool (trials, attributes)
    sets: WorldSets | None = None


@dataclass(frozen=True)
class Agreement:
    """How often images agree with preceding ones."""

    values: np.ndarray  # float64 (trials,), their mean is the rate corrected for the reader's errors
    as_read: float
    reach: float  # the best rate there is
    noise: float  # standard error of the rate of a model that reaches it: not 0 where all pictures happen to agree

    @property
    def off(self) -> float:
        """How far from the best rate, in standard errors."""
        own = float(self.values.std(ddof=1)) / len(self.values) ** 0.5 if len(self.values) > 1 else 0.0
        error = max(own, self.noise)
        return (float(self.values.mean()) - self.reach) / error if error else 0.0


@over_noises
def evaluate_preceding_images(config: PrecedingImages, run: StageRun) -> None:
    """Generate one image after 1, 2, ... preceding ones, with the same noise, without and with guidance.

    Tells the likeness (CLIP) to all of a set's preceding images, shown or not, and with a reader how often the image
    agrees in the attributes in which they do, and in the ones in which they differ (there, with the first image).
    Planted models go through the same arithmetic: the oracle has to meet the ideal observer's curve.
    """
    clip, reader = config.open_clip(run), config.open_reader(run)
    guidances = sorted({1.0, config.sampling.guidance_scale})
    told = _Told(config, run, _shared_rates(run) if reader else {})
    for name, sampler in samplers(config, run):
        trials = _draw_trials(config, sampler.size) if reader else _test_sets(config, run, sampler)
        if reader and trials.sets and not told.rows:
            # planted models have no guidance, and their pictures did not go through the autoencoder
            accuracy = _reading_accuracy(lambda pictures: pictures, trials, reader)
            for kind in PLANTED:
                planted = PlantedSampler(kind, trials.sets, sampler.size, first=max(config.preceding))
                found = _generate(config, run, kind, planted, trials, [1.0], clip, reader)
                told.add(f"planted: {kind}", trials, found, [None], accuracy)
        accuracy = _reading_accuracy(sampler.reconstruct, trials, reader) if reader else {}
        found = _generate(config, run, name, sampler, trials, guidances, clip, reader)
        told.add(name, trials, found, guidances, accuracy)
        _show(config, run, name, trials, found["pictures"])
    if reader and config.reader and config.planted_sets:
        backbone = ClassifierBackbone(config.reader, run.profile.root, config.compute)
        tools = Tools(clip, config.open_dino(run), reader, backbone)
        drawn = WorldSets.drawn(config.planted_sets, namespaced(config.seed, "planted"), _SHARED_RATE)
        shown = prove(drawn, tools, size=trials.pictures.shape[-1], preceding=4, num_images=6, seed=config.seed)
        told.metrics["planted"] = shown.tell(run)
    told.conclude(guidances, accuracy)


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


def corrected(observed: Rates, accuracy: float, values: int) -> Rates:
    """The true rate behind one that a reader with errors has observed.

    A reader who is right at a rate r and errs evenly among the other V - 1 values observes
    o = a r + (1 - a) (1 - r) / (V - 1) where the true rate is a; this solves for a. The estimate is unbiased, so noise
    may bring it a little below 0 or above 1.
    """
    by_error = (1 - accuracy) / (values - 1)
    if accuracy <= by_error:  # reads no better than chance: nothing can be corrected
        return observed
    return (observed - by_error) / (accuracy - by_error)


def _shared_rates(run: StageRun) -> dict[str, float]:
    """How often a caption of the training sets names each attribute: the ideal observer's prior."""
    sets = ImageSets(run.inputs["sets"], "train")
    named = [read_caption(sets.caption(i)) for i in range(len(sets))]
    return {name: sum(name in told for told in named) / len(named) for name in ATTRIBUTES}


def _draw_trials(config: PrecedingImages, size: int) -> Trials:
    namespace = namespaced(config.seed, "preceding images")
    pictures, labels, shared, named = [], [], [], []
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
        named.append(fixed)
    keys, sets = list(range(config.trials)), WorldSets(named, config.seed)
    return Trials(torch.stack(pictures), keys, torch.stack(labels), torch.stack(shared), sets)


def _test_sets(config: PrecedingImages, run: StageRun, sampler: Sampler) -> Trials:
    sets = SetPictures(run, sampler)
    chosen = config.choose(len(sets), config.trials, "preceding images")
    pictures = sets.stack(chosen, range(max(config.preceding)))
    return Trials(pictures, [sets.key(i) for i in chosen])


def _generate(
    config: PrecedingImages,
    run: StageRun,
    name: str,
    sampler: Continues,
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


def _reading_accuracy(reconstruct: Callable[[Tensor], Tensor], trials: Trials, reader: Reader) -> dict[str, float]:
    """How often the reader is right about pictures whose attributes are known.

    Args:
        reconstruct: makes the pictures like generated ones: those came out of the autoencoder.
    """
    assert trials.labels is not None
    pictures, labels = trials.pictures.flatten(0, 1), trials.labels.flatten(0, 1)
    read = torch.cat([reader.read(reconstruct(part)) for part in pictures.split(64)])
    rates = (read == labels).double().mean(0)
    return dict(zip(ATTRIBUTES, rates.tolist()))


def agreement(
    trials: Trials, read: Tensor, count: int, priors: Mapping[str, float], accuracy: Mapping[str, float]
) -> dict[str, Agreement]:
    """How images agree with the first preceding one, where `count` preceding images can and can't tell.

    Trials share each attribute at `_SHARED_RATE`, so that both kinds are equally many; weights bring that to the
    prior of the training sets, which is what the model and the ideal observer know.

    Args:
        read: int64 (trials, attributes): what the reader sees in the image after the first `count`.

    Returns:
        `agreement`: after images that all agree in an attribute, shared or by chance, beside the ideal observer's;
        `kept`: the same where the attribute is shared; `varying`: where the images were seen to differ, beside chance.
        A kind without any case is left out. All are means over attributes, corrected for the reader's errors.
    """
    assert trials.labels is not None and trials.shared is not None
    agrees = (read == trials.labels[:, 0]).double()
    found: dict[str, list[tuple[np.ndarray, float, float, float]]] = {"agreement": [], "kept": [], "varying": []}
    for place, (name, values) in enumerate(ATTRIBUTES.items()):
        shared = trials.shared[:, place].double()
        equal = (trials.labels[:, :count, place] == trials.labels[:, :1, place]).all(1).double()
        weight = shared * priors[name] / _SHARED_RATE + (1 - shared) * (1 - priors[name]) / (1 - _SHARED_RATE)
        ideal = ideal_agreement(priors[name], len(values), count)
        # one image is no evidence that anything varies: "varying" starts with two
        cases = {"agreement": (weight * equal, ideal), "kept": (shared, 1.0), "varying": (1 - equal, 1 / len(values))}
        for kind, (case, reach) in cases.items():
            if case.sum() > 0:
                as_read = ratio_values(agrees[:, place] * case, case)
                rate = corrected(as_read, accuracy[name], len(values))
                # of weighted yes-or-no answers (Kish's effective number of cases)
                variance = reach * (1 - reach) * float(case.square().sum() / case.sum().square())
                found[kind].append((rate, float(as_read.mean()), reach, variance))
    return {
        kind: Agreement(
            np.mean([one[0] for one in of], 0),
            _mean([one[1] for one in of]),
            _mean([one[2] for one in of]),
            sum(one[3] for one in of) ** 0.5 / len(of),
        )
        for kind, of in found.items()
        if of
    }


def _show(config: PrecedingImages, run: StageRun, name: str, trials: Trials, pictures: Tensor) -> None:
    # the last guidance is the one of the settings
    rows = [[before, made[-1]] for before, made in zip(trials.pictures, pictures)]
    told = ", ".join(map(str, config.preceding))
    run.picture(
        f"{name}: preceding images, then one image generated after the first {told} of them",
        write_grid(run.out / name, rows),
    )


class _Told:
    """Rows, curves and values by trial of one evaluation as they come."""

    def __init__(self, config: PrecedingImages, run: StageRun, priors: Mapping[str, float]) -> None:
        self._config, self._run, self._priors = config, run, priors
        self.rows: list[dict[str, Any]] = []
        self.per_set = PerSet()
        self.metrics: dict[str, Any] = {}
        self._off: list[float] = []  # of the oracle from the ideal observer's curve

    def add(
        self,
        name: str,
        trials: Trials,
        found: Mapping[str, Tensor],
        guidances: Sequence[float | None],
        accuracy: Mapping[str, float],
    ) -> None:
        """One model's rows: for every guidance (None where there is no such thing) and number of preceding images."""
        for g, guidance in enumerate(guidances):
            for k, count in enumerate(self._config.preceding):
                row: dict[str, Any] = {"model": name, "guidance": guidance, "preceding images": count}
                place = (
                    f"{name}, {'no guidance scale' if guidance is None else f'guidance {guidance:g}'}, {count} before"
                )
                better = "neither" if guidance is None else "higher"
                like = self.per_set.add(f"{place}: CLIP to all preceding", found["clip"][:, g, k] * 100, better)
                row["CLIP to all preceding"] = like.mean
                if trials.labels is not None:
                    kinds = agreement(trials, found["read"][:, g, k], count, self._priors, accuracy)
                    for kind, title in _KINDS.items():
                        here = kinds.get(kind)
                        metric = None if here is None else self.per_set.add(f"{place}: {title}", here.values)
                        row[title] = metric and metric.mean
                        row[f"{title} ±"] = metric and metric.error
                        row[_REACH[kind]] = here and here.reach
                    row["agreement as read"] = kinds["agreement"].as_read
                    if name == _ORACLE:
                        self._off.append(kinds["agreement"].off)
                self.rows.append({key: value for key, value in row.items() if key != _REACH["kept"]})

    def conclude(self, guidances: Sequence[float], accuracy: Mapping[str, float]) -> None:
        self._run.table("By number of preceding images", self.rows)
        for key, title in {"agreement": "Agreement", "CLIP to all preceding": "CLIP likeness"}.items():
            if key in self.rows[0]:
                for guidance in guidances:
                    self._run.curve(f"{title}, guidance {guidance:g}", self._columns(key, guidance))
        if accuracy:
            self._run.table(
                "The attributes",
                [
                    {
                        "attribute": name,
                        "values": len(values),
                        "training captions that name it": self._priors[name],
                        "read rightly off autoencoder's pictures": accuracy[name],
                    }
                    for name, values in ATTRIBUTES.items()
                ],
            )
        if self._off:
            furthest = max(self._off, key=abs)
            self._run.figure(**{"the oracle's furthest from the ideal observer, in standard errors": furthest})
            self.metrics["oracle_off_the_ideal_observer"] = self._off
        config, most = self._config, max(self._config.preceding)
        for row in self.rows:
            if row["preceding images"] == most and row["guidance"] == config.sampling.guidance_scale:
                key = "agreement" if "agreement" in row else "CLIP to all preceding"
                self._run.figure(**{f"{row['model']}: {key} after {most}": row[key]})
        self._run.count(
            trials=config.trials, generated_images=config.trials * len(guidances) * len(config.preceding) * 2
        )
        self.metrics |= {"rows": self.rows, "priors": dict(self._priors), "reading_accuracy": dict(accuracy)}
        conclude(self._run, self.metrics, self.per_set)

    def _columns(self, key: str, guidance: float) -> dict[str, list[float]]:
        """Models at this guidance and the oracle, each with its errors; for agreement the ideal observer, too."""
        columns: dict[str, list[float]] = {"preceding images": [float(count) for count in self._config.preceding]}
        here = [row for row in self.rows if row["guidance"] == guidance or row["model"] == _ORACLE]
        for row in here:
            columns.setdefault(str(row["model"]), []).append(float(row[key]))
            if row.get(f"{key} ±") is not None:
                columns.setdefault(f"{row['model']} ±", []).append(float(row[f"{key} ±"]))
        if key == "agreement":
            columns["ideal observer"] = [float(row["ideal observer"]) for row in here[: len(self._config.preceding)]]
        return columns


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
