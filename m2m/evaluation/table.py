"""Table 1: FID, Inception Score and CLIP scores by n-th generated image (paper, sections 7.2 and 8.4).

Belongs here: that protocol, and the paper's own figures to set beside ours. Not here: the metrics' arithmetic.
"""

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from m2m.config import Source
from m2m.errors import ConfigError, InputError
from m2m.evaluation.encoders import ClassifierBackbone, Clip, InceptionBackbone
from m2m.evaluation.grids import write_grid
from m2m.evaluation.measures import clip_scores, frechet_distance, inception_score, mean_and_deviation
from m2m.evaluation.noises import over_noises
from m2m.evaluation.per_set import Better, Metric, PerSet, jackknife
from m2m.evaluation.protocol import BothModels, conclude, each_picture, in_batches
from m2m.evaluation.sampler import Sampler, samplers
from m2m.evaluation.set_pictures import SetPictures
from m2m.stage_run import StageRun

PAPER = {
    "M2M-Self (9M)": {"fid": (9.56, 1.21), "is": (26.19, 0.67), "text": (22.71, 0.52), "image": (76.29, 0.02)},
    "M2M-DINO (6M)": {"fid": (8.88, 0.87), "is": (28.07, 0.58), "text": (23.05, 0.49), "image": (77.41, 0.03)},
}
"""Table 1 of the paper: mean and standard deviation over the 10 generated images, on 10,000 test sets."""
PAPER_SETS = 10_000
SCORES = {"fid": "FID ↓", "is": "IS ↑", "text": "Text-Image CLIP ↑", "image": "Image-Image CLIP ↑"}
_BETTER: dict[str, Better] = {"fid": "lower", "is": "higher", "text": "higher", "image": "higher"}
OWN_IMAGES = "the sets' own images"

Backbone = ClassifierBackbone | InceptionBackbone


class Table1(BothModels):
    """Settings of Table 1."""

    sets: int = Field(10_000, ge=2, description="random test sets; all where there are fewer (paper, section 7.2)")
    preceding: int = Field(4, ge=1, description="images that each set begins with (section 8.4)")
    num_images: int = Field(10, ge=1, description="images generated after them, one after the other (section 8.4)")
    backbone: Literal["inception-v3", "classifier"] = Field(
        "inception-v3", description="what FID and IS see with; classifier: the tiny world's, 32 features"
    )
    inception: Annotated[str | None, Source()] = Field(
        None, description="the backbone's weights: the classifier's folder, or torch-fidelity's file"
    )
    inception_features: Literal[64, 192, 768, 2048] = Field(
        2048, description="layer of inception-v3; FID needs more sets than features. Another than 2048 is another FID"
    )
    is_splits: int = Field(1, ge=1, description="parts over which IS is averaged; the paper does not say (often 10)")

    error_blocks: int = Field(
        12,
        ge=0,
        description="groups of sets left out in turn for the errors of FID and IS, each at a score's cost; 0: none",
    )

    def preview(self, root: Path, variant: str | None) -> list[str]:
        self.require_enough_sets()
        missing = self.backbone == "inception-v3" and importlib.util.find_spec("torch_fidelity") is None
        return [
            *super().preview(root, variant),
            f"backbone: {self.backbone}" + (" (not installed here: pip install torch-fidelity)" if missing else ""),
            f"{self.sets:,} sets, {self.num_images} images after {self.preceding}, two models: "
            f"{self.sets * self.num_images * 2:,} images",
        ]

    def require_enough_sets(self) -> None:
        """FID of few samples says more about their number than about the pictures.

        Raises:
            ConfigError: not more sets than Inception's layer has features.
        """
        if self.backbone == "inception-v3" and self.sets <= self.inception_features:
            raise ConfigError(
                f"evaluate.sets is {self.sets}, but FID of inception-v3's {self.inception_features} features needs "
                f"{self.inception_features + 1} or more: raise sets, or take a layer with fewer (inception_features)"
            )


@over_noises
def evaluate_table_1(config: Table1, run: StageRun) -> None:
    """Continue test sets with both models and score every n-th image; the sets' own images are scored alongside.

    Raises:
        InputError: not more sets than the backbone has features.
        ConfigError: the backbone is not installed.
    """
    backbone, clip = _open_backbone(config, run), config.open_clip(run)
    found: dict[str, dict[str, list[Metric]]] = {}
    truth: dict[str, Tensor] = {}
    chosen: list[int] = []
    keys: list[int] = []
    for name, sampler in samplers(config, run):
        sets = SetPictures(run, sampler)
        if not truth:
            chosen = config.choose(len(sets), config.sets, "table 1")
            truth = _look_at_sets(config, run, sets, chosen, backbone, clip)
            keys = [sets.key(i) for i in chosen]
            samples, dimension = truth["first"].shape
            if samples <= dimension:
                raise InputError(
                    f"{run.inputs['sets']} has {len(sets)} test sets and table_1 takes {samples}; FID of {dimension} "
                    f"features needs {dimension + 1} or more: raise evaluate's sets or the share of the test split"
                )
            run.progress.log(f"FID: {samples:,} samples of {dimension} features")
        generated = _continue_sets(config, run, name, sampler, sets, chosen, backbone, clip)
        found[name] = _scores(config, truth, generated, keys)
        shown = generated["pictures"][: config.shown]
        preceding = sets.stack(chosen[: len(shown)], range(config.preceding))
        path = write_grid(run.out / name, [[a, b] for a, b in zip(preceding, shown)])
        run.picture(f"{name}: {config.preceding} preceding images, then {config.num_images} generated ones", path)
    own = {key.removeprefix("own_"): value for key, value in truth.items() if key.startswith("own_")}
    if own["features"].shape[1]:
        found[OWN_IMAGES] = _scores(config, truth, own, keys)
    _tell(config, run, found, truth)


def _open_backbone(config: Table1, run: StageRun) -> Backbone:
    config.require_pinned("inception", run.profile.root)
    if config.backbone == "classifier":
        if not config.inception:
            raise ConfigError("evaluate.inception is missing: backbone classifier needs the classifier's folder")
        return ClassifierBackbone(config.inception, run.profile.root, config.compute)
    config.require_enough_sets()
    weights = run.source(config.inception) if config.inception else None
    return InceptionBackbone(weights, config.inception_features, config.compute)


def _look_at_sets(
    config: Table1, run: StageRun, sets: SetPictures, chosen: Sequence[int], backbone: Backbone, clip: Clip
) -> dict[str, Tensor]:
    """What is compared with: each set's first image, its caption, its preceding images, and the images after those."""
    if sets.images_per_set < config.preceding:
        raise InputError(f"{run.inputs['sets']}: sets of {sets.images_per_set} images; {config.preceding} must precede")
    following = range(config.preceding, min(config.preceding + config.num_images, sets.images_per_set))

    def look(batch: range) -> dict[str, Tensor]:
        indices = [chosen[place] for place in batch]
        preceding = sets.stack(indices, range(config.preceding))
        told = {
            "first": backbone(preceding[:, 0])[0],
            "caption": clip.texts([sets.caption(i) for i in indices]),
            "preceding": each_picture(clip.pictures, preceding),
        }
        own = {"features": [], "logits": [], "clip": []}
        for n in following:
            pictures = sets.stack(indices, [n])[:, 0]
            features, logits = backbone(pictures)
            for key, value in zip(own, (features, logits, clip.pictures(pictures))):
                own[key].append(value)
        for key, values in own.items():
            told[f"own_{key}"] = torch.stack(values, 1) if values else torch.zeros(len(indices), 0, 1)
        return told

    return in_batches(run, "sets", len(chosen), config.batch, look)


def _continue_sets(
    config: Table1,
    run: StageRun,
    name: str,
    sampler: Sampler,
    sets: SetPictures,
    chosen: Sequence[int],
    backbone: Backbone,
    clip: Clip,
) -> dict[str, Tensor]:
    def measure(batch: range) -> dict[str, Tensor]:
        indices = [chosen[place] for place in batch]
        preceding = sets.stack(indices, range(config.preceding))
        made = sampler.continue_sets(preceding, [sets.key(i) for i in indices], config.num_images)
        features, logits = backbone(made.flatten(0, 1))
        return {
            "features": features.unflatten(0, made.shape[:2]),
            "logits": logits.unflatten(0, made.shape[:2]),
            "clip": each_picture(clip.pictures, made),
            "pictures": made[[place for place, item in enumerate(batch) if item < config.shown]],
        }

    return in_batches(run, name, len(chosen), config.batch, measure)


def _scores(
    config: Table1, truth: dict[str, Tensor], images: dict[str, Tensor], keys: Sequence[int]
) -> dict[str, list[Metric]]:
    """Each score of each n-th image over all sets, with the values by set (of FID and IS: by block of sets)."""
    scores: dict[str, list[Metric]] = {key: [] for key in SCORES}
    told = PerSet()

    def keep(key: str, values: np.ndarray | Tensor, units: Sequence[int] | None = None) -> None:
        scores[key].append(told.add(f"{key} {len(scores[key]) + 1}", values, _BETTER[key], units))

    for n in range(images["features"].shape[1]):
        embedding, features, logits = (images[key][:, n] for key in ("clip", "features", "logits"))
        for key, score in {
            "fid": partial(_fid, truth["first"], features),
            "is": partial(_inception_score, config, logits),
        }.items():
            whole, values = jackknife(score, len(features), config.error_blocks)
            keep(key, np.array([whole]) if values is None else values)
        keep("text", clip_scores(embedding, truth["caption"]), keys)
        keep("image", clip_scores(embedding[:, None], truth["preceding"]), keys)
    return scores


def _fid(real: Tensor, generated: Tensor, rows: NDArray[np.int64]) -> float:
    return frechet_distance(real[rows], generated[rows])


def _inception_score(config: Table1, logits: Tensor, rows: NDArray[np.int64]) -> float:
    return inception_score(logits[rows], config.is_splits, config.seed)


def _tell(config: Table1, run: StageRun, found: dict[str, dict[str, list[Metric]]], truth: dict[str, Tensor]) -> None:
    samples, dimension = truth["first"].shape
    tiny = config.backbone == "classifier"
    rows: list[dict[str, Any]] = []
    errors: list[dict[str, Any]] = []
    per_set = PerSet()
    metrics: dict[str, Any] = {"sets": samples, "features": dimension, "backbone": config.backbone, "scores": {}}
    for name, scores in found.items():
        means = {key: [metric.mean for metric in scores[key]] for key in SCORES}
        told = {key: mean_and_deviation(values) for key, values in means.items()}
        rows.append({"method": name} | {SCORES[key]: _plus_minus(*told[key]) for key in SCORES} | {"sets": samples})
        over_sets = {
            key: per_set.add(
                f"{name}: {SCORES[key]}",
                np.mean([metric.values for metric in scores[key]], 0),
                _BETTER[key] if name != OWN_IMAGES else "neither",
                scores[key][0].units.tolist(),
            )
            for key in SCORES
        }
        errors.append({"method": name} | {SCORES[key]: over_sets[key].error for key in SCORES})
        metrics["scores"][name] = {
            key: {"mean": told[key][0], "std": told[key][1], "error": over_sets[key].error, "by_image": means[key]}
            for key in SCORES
        }
        if name != OWN_IMAGES:
            short = name.removeprefix("M2M-").lower()
            run.figure(**{f"{key}_{short}": round(told[key][0], 4) for key in SCORES})
    for name, paper in PAPER.items():
        said = {label: _plus_minus(*paper[key]) for key, label in SCORES.items()}
        rows.append({"method": f"paper: {name}"} | said | {"sets": PAPER_SETS})
    run.table("Table 1", rows)
    run.table("Standard errors of these means, over sets", errors)
    for key, label in SCORES.items():
        longest = max(len(scores[key]) for scores in found.values())
        columns: dict[str, list[float]] = {"n-th image": [float(n + 1) for n in range(longest)]}
        for name, scores in found.items():
            if len(scores[key]) == longest:
                columns[name] = [metric.mean for metric in scores[key]]
                if all(metric.error is not None for metric in scores[key]):
                    columns[f"{name} ±"] = [float(metric.error or 0) for metric in scores[key]]
        run.curve(f"{label} by n-th image", columns)
    run.figure(
        fid_samples=samples,
        fid_features=dimension,
        note="tiny models and a tiny world: not comparable with the paper's figures" if tiny else None,
    )
    run.count(sets=samples, generated_images=samples * config.num_images * len(config.models))
    conclude(run, metrics, per_set)


def _plus_minus(mean: float, deviation: float) -> str:
    return f"{mean:.2f} ± {deviation:.2f}"
