"""Planted models among sets of the tiny world: every kind of measure has to rank them as it should.

Belongs here: measuring them, and which should win by which measure. Not here: the planted models
(`m2m.evaluation.planted`), the ideal observer's curve (`m2m.evaluation.preceding_images`), views and procedures
(`planted_views`, `planted_steps`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from m2m.evaluation.consistency import asked_and_free, compare
from m2m.evaluation.encoders import ClassifierBackbone, Clip, Dino, Reader
from m2m.evaluation.measures import appearance, clip_scores, cosine, frechet_distance, inception_score, psnr, ssim
from m2m.evaluation.per_set import PerSet, jackknife
from m2m.evaluation.planted import PLANTED, PlantedSampler, WorldSets
from m2m.evaluation.proofs import Proof, Rank
from m2m.evaluation.protocol import at_size, each_picture

_BLOCKS = 12


@dataclass(frozen=True)
class Tools:
    """The models that look at pictures."""

    clip: Clip
    dino: Dino
    reader: Reader
    backbone: ClassifierBackbone


_CONTEXT = (("oracle", "guesser"), ("copier", "guesser"), ("oracle", "drifter"))
RANKS: dict[str, Rank] = {
    "FID": Rank("lower", (("oracle", "drifter"),)),
    "IS": Rank("higher", (("oracle", "drifter"),)),
    "Text-Image CLIP": Rank("higher", _CONTEXT),
    "Image-Image CLIP": Rank("higher", _CONTEXT),
    "DINO likeness": Rank("higher", _CONTEXT),
    "style distance": Rank("lower", _CONTEXT),
    "named attributes read": Rank("higher", _CONTEXT),
    "pairs that differ in unnamed ones": Rank("higher", (("oracle", "copier"), ("guesser", "copier"))),
    "nearest: RMSE": Rank("higher", (("oracle", "copier"), ("guesser", "copier"), ("drifter", "copier"))),
    "nearest: 1 - DINO": Rank("higher", (("oracle", "copier"), ("guesser", "copier"), ("drifter", "copier"))),
    "PSNR to the true picture, dB": Rank(
        "higher", (("oracle", "drifter"), ("oracle", "copier"), ("oracle", "guesser"))
    ),
    "SSIM to the true picture": Rank("higher", (("oracle", "drifter"), ("oracle", "copier"), ("oracle", "guesser"))),
    "true picture found among others'": Rank("higher", (("oracle", "guesser"), ("copier", "guesser"))),
    "change of DINO likeness with n": Rank("higher", (("oracle", "drifter"),)),
    "change of contrast with n": Rank("higher", (("oracle", "drifter"),)),
}
"""Every kind of measure of the evaluations; what is alike by one (an oracle and a guesser by FID) is not ranked."""


def prove(sets: WorldSets, tools: Tools, *, size: int, preceding: int, num_images: int, seed: int) -> Proof:
    """Let each planted model continue the sets, and measure what it made by everything that the evaluations measure.

    Args:
        size: side of the pictures in pixels.
        preceding, num_images: images that each set begins with, and that come after them.
    """
    keys, captions = list(range(len(sets))), sets.captions()
    before = at_size(torch.stack([sets.pictures(key, range(preceding)) for key in keys]), size)
    known = {
        "features": tools.backbone(before.flatten(0, 1))[0],
        "captions": tools.clip.texts(captions),
        "clip": each_picture(tools.clip.pictures, before),
    }
    truth = PlantedSampler("oracle", sets, size, preceding).continue_sets(before, keys, num_images)
    found = {}
    for kind in PLANTED:
        made = PlantedSampler(kind, sets, size, preceding).continue_sets(before, keys, num_images)
        found[kind] = _measure(before, made, truth, captions, known, tools, seed).metrics
    return Proof(found, RANKS, f"{len(sets)} sets, {num_images} images each")


def _measure(
    before: Tensor,
    made: Tensor,
    truth: Tensor,
    captions: list[str],
    known: Mapping[str, Tensor],
    tools: Tools,
    seed: int,
) -> PerSet:
    told = PerSet()
    count, num_images = made.shape[:2]
    features, logits = (part.unflatten(0, made.shape[:2]) for part in tools.backbone(made.flatten(0, 1)))
    real = known["features"].unflatten(0, before.shape[:2])
    for name, score in {
        "FID": lambda rows: frechet_distance(real[rows].flatten(0, 1), features[rows].flatten(0, 1)),
        "IS": lambda rows: inception_score(logits[rows].flatten(0, 1), seed=seed),
    }.items():
        whole, values = jackknife(score, count, _BLOCKS)
        told.add(name, np.array([whole]) if values is None else values)
    embedded = each_picture(tools.clip.pictures, made)
    told.add("Text-Image CLIP", clip_scores(embedded, known["captions"][:, None]))
    told.add("Image-Image CLIP", clip_scores(embedded[:, :, None], known["clip"][:, None]))
    likeness = compare(before, made, tools.dino, tools.reader)
    told.add("DINO likeness", likeness["dino"])
    told.add("style distance", likeness["style"])
    told.add("nearest: RMSE", likeness["nearest_rmse"])
    told.add("nearest: 1 - DINO", 1 - likeness["nearest_dino"])
    rates = [asked_and_free(read[None], [caption]) for read, caption in zip(likeness["read"], captions)]
    for place, name in enumerate(("named attributes read", "pairs that differ in unnamed ones")):
        there = [i for i, rate in enumerate(rates) if rate[place] is not None]
        told.add(name, np.array([rates[i][place] for i in there], np.float64), units=there)
    for name, measure in {"PSNR to the true picture, dB": psnr, "SSIM to the true picture": ssim}.items():
        told.add(name, measure(made.flatten(0, 1), truth.flatten(0, 1)).unflatten(0, made.shape[:2]))
    # each set's next picture among all sets' true ones
    seen, sought = tools.dino.pictures(made[:, 0]), tools.dino.pictures(truth[:, 0])
    told.add("true picture found among others'", _rank_of_own(cosine(seen[:, None], sought[None])))
    by_image = likeness["dino_by_image"]
    half = max(1, num_images // 2)
    told.add("change of DINO likeness with n", by_image[:, -half:].mean(1) - by_image[:, :half].mean(1))
    contrast = appearance(made)["contrast"].double()
    told.add("change of contrast with n", contrast[:, -half:].mean(1) - contrast[:, :half].mean(1))
    return told


def _rank_of_own(likeness: Tensor) -> Tensor:
    """The share of others' pictures that are less like than one's own; (sets, sets) -> (sets,)."""
    own = likeness.diagonal()[:, None]
    below = (likeness < own).double().sum(1) + ((likeness == own).double().sum(1) - 1) / 2
    return below / max(1, likeness.shape[1] - 1)
