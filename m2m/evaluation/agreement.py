"""Trials of what preceding images have in common, and how often the next image agrees with them.

Belongs here: drawing trials, the ideal observer, the reader's errors. Not here: what a model makes of trials
(`m2m.evaluation.preceding_images`), drawing pictures (`m2m.tiny.world`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from m2m.evaluation.encoders import Reader
from m2m.evaluation.per_set import ratio_values
from m2m.evaluation.planted import WorldSets
from m2m.evaluation.protocol import at_size
from m2m.generation.noise import keyed_generator, namespaced
from m2m.tiny.sketch import RENDERERS, Renderer
from m2m.tiny.world import ATTRIBUTES, sample_scene

SHARED_RATE = 0.5  # of a trial's attributes; both kinds of trials then are equally many, whatever the captions do
Rates = TypeVar("Rates", float, np.ndarray)


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
    by_attribute: Mapping[str, float]

    @property
    def off(self) -> float:
        """How far from the best rate, in standard errors."""
        own = float(self.values.std(ddof=1)) / len(self.values) ** 0.5 if len(self.values) > 1 else 0.0
        error = max(own, self.noise)
        return (float(self.values.mean()) - self.reach) / error if error else 0.0


def draw_trials(count: int, length: int, seed: int, size: int, renderer: Renderer = "world") -> Trials:
    """Trials of the drawn world that share each attribute at `SHARED_RATE`.

    Args:
        length: preceding images W of each.
        size: side of the pictures in pixels.
        renderer: who draws them.
    """
    namespace, render = namespaced(seed, "preceding images"), RENDERERS[renderer]
    pictures, labels, shared, named = [], [], [], []
    for trial in range(count):
        drawn = keyed_generator(namespace, trial)
        pattern = sample_scene(drawn)
        keeps = drawn.random(len(ATTRIBUTES)) < SHARED_RATE
        fixed = {name: getattr(pattern, name) for name, kept in zip(ATTRIBUTES, keeps) if kept}
        scenes = [sample_scene(drawn, fixed) for _ in range(length)]
        images = torch.stack([torch.from_numpy(render(scene, drawn)).permute(2, 0, 1) for scene in scenes])
        pictures.append(at_size(images, size))
        labels.append(torch.tensor([scene.labels() for scene in scenes]))
        shared.append(torch.from_numpy(keeps))
        named.append(fixed)
    keys, sets = list(range(count)), WorldSets(named, seed, renderer)
    return Trials(torch.stack(pictures), keys, torch.stack(labels), torch.stack(shared), sets)


def ideal_agreement(prior: float, values: int, preceding: int) -> float:
    """How often the next image agrees with preceding ones that all agree, were the conclusion drawn perfectly.

    Args:
        prior: how often a set shares the attribute, before anything is seen.
        values: number of values V, equally frequent.
        preceding: number k of images that agree; chance alone does that with V^(1 - k).

    Returns:
        q + (1 - q) / V with the posterior q = prior / (prior + (1 - prior) V^(1 - k)); 1 / V where none precede.
    """
    if preceding == 0:
        return 1 / values
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


def reading_accuracy(reconstruct: Callable[[Tensor], Tensor], trials: Trials, reader: Reader) -> dict[str, float]:
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

    Trials share each attribute at `SHARED_RATE`, so that both kinds are equally many; weights bring that to the
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
    found: dict[str, dict[str, tuple[np.ndarray, float, float, float]]] = {"agreement": {}, "kept": {}, "varying": {}}
    for place, (name, values) in enumerate(ATTRIBUTES.items()):
        shared = trials.shared[:, place].double()
        equal = (trials.labels[:, :count, place] == trials.labels[:, :1, place]).all(1).double()
        weight = shared * priors[name] / SHARED_RATE + (1 - shared) * (1 - priors[name]) / (1 - SHARED_RATE)
        ideal = ideal_agreement(priors[name], len(values), count)
        # one image is no evidence that anything varies: "varying" starts with two
        cases = {"agreement": (weight * equal, ideal), "kept": (shared, 1.0), "varying": (1 - equal, 1 / len(values))}
        for kind, (case, reach) in cases.items():
            if case.sum() > 0:
                as_read = ratio_values(agrees[:, place] * case, case)
                rate = corrected(as_read, accuracy[name], len(values))
                # of weighted yes-or-no answers (Kish's effective number of cases)
                variance = reach * (1 - reach) * float(case.square().sum() / case.sum().square())
                found[kind][name] = rate, float(as_read.mean()), reach, variance
    return {
        kind: Agreement(
            np.mean([rate for rate, *_ in of.values()], 0),
            _mean([as_read for _, as_read, *_ in of.values()]),
            _mean([reach for *_, reach, _ in of.values()]),
            sum(variance for *_, variance in of.values()) ** 0.5 / len(of),
            {name: float(rate.mean()) for name, (rate, *_) in of.items()},
        )
        for kind, of in found.items()
        if of
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
