"""What was to be reached on the drawn world, and what was: one row a claim, means and spread over seeds.

Belongs here: which number of which evaluation stands for a claim. Not here: measuring, the page (`m2m.tiny.results`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from m2m.artifacts import read_manifest
from m2m.evaluation.protocol import METRICS

Metrics = Mapping[str, Any]
_MODELS = ("M2M-Self", "M2M-DINO")
_KEPT = "kept where shared"


@dataclass(frozen=True)
class Claim:
    """A number to reach.

    Attributes:
        value: of a stage's metrics and a model's name; None where it was not measured.
        least: the number is to be so much at least; else `most`, at most.
    """

    what: str
    stage: str
    value: Callable[[Metrics, str], float | None]
    least: float | None = None
    most: float | None = None
    models: Sequence[str] = _MODELS

    def holds(self, value: float) -> bool:
        return value >= self.least if self.least is not None else value <= (self.most or 0.0)


def reached(outputs: Sequence[Path], weights: Path) -> list[dict[str, Any]]:
    """One row a claim and model: what was to be reached, what was over the seeds, whether it holds.

    Args:
        outputs: folders of one profile's outputs, one for each seed.
        weights: the folder with `measured.json` of the models that M2M starts from.
    """
    rows = _of_weights(weights)
    for claim in CLAIMS:
        found = [_metrics(folder, claim.stage) for folder in outputs]
        for model in claim.models:
            values = [claim.value(metrics, model) for metrics in found if metrics is not None]
            rows.append(_row(claim, model, [value for value in values if value is not None]))
    return rows


def best_guidance(metrics: Metrics, model: str) -> float | None:
    """The guidance scale at which most is kept after the most preceding images."""
    rows = _after_most(metrics, model)
    return max(rows, key=lambda row: row[_KEPT])["guidance"] if rows else None


def _row(claim: Claim, model: str, values: Sequence[float]) -> dict[str, Any]:
    bound = f"≥ {claim.least:g}" if claim.least is not None else f"≤ {claim.most:g}"
    row: dict[str, Any] = {"what": claim.what, "model": model, "reach": bound, "found": None, "seeds": len(values)}
    if values:
        row["found"] = f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
        row["holds"] = claim.holds(mean(values))
    return row | {"holds": row.get("holds")}


def _of_weights(weights: Path) -> list[dict[str, Any]]:
    measured = json.loads((weights / "measured.json").read_bytes())
    read, true = measured["reconstructions_read"], measured["originals_read"]
    worst = min(read[name] / true[name] for name in true)
    asked = measured["samples_read"]["mean"]
    return [
        {"what": what, "model": model, "reach": f"≥ {least:g}", "found": f"{value:.3f}", "seeds": 1}
        | {"holds": value >= least}
        for what, model, least, value in (
            ("every attribute read back from reconstructions, over its rate on originals", "autoencoder", 0.97, worst),
            ("reconstructions: mean PSNR, dB", "autoencoder", 28, measured["reconstructions_psnr"]),
            ("asked-for attributes read back, mean", "text-to-image", 0.9, asked),
        )
    ]


def _metrics(outputs: Path, stage: str) -> Metrics | None:
    folder = outputs / stage.replace("@", "/")
    return json.loads((folder / METRICS).read_bytes()) if read_manifest(folder) else None


def _rows(metrics: Metrics, model: str, **wanted: Any) -> list[Mapping[str, Any]]:
    found = [row for row in metrics["rows"] if row.get("model") == model]
    return [row for row in found if all(row[key] == value for key, value in wanted.items())]


def _after_most(metrics: Metrics, model: str) -> list[Mapping[str, Any]]:
    rows = _rows(metrics, model)
    most = max((row["preceding images"] for row in rows), default=0)
    return [row for row in rows if row["preceding images"] == most and row.get(_KEPT) is not None]


def _kept(metrics: Metrics, model: str) -> float | None:
    return max((row[_KEPT] for row in _after_most(metrics, model)), default=None)


def _without_context(metrics: Metrics, model: str) -> float | None:
    kept, alone = _kept(metrics, model), [row[_KEPT] for row in _rows(metrics, model) if not row["preceding images"]]
    return kept - max(alone) if kept is not None and alone else None


def _off_ideal(metrics: Metrics, model: str) -> float | None:
    rows = [row for row in _rows(metrics, model, guidance=1.0) if row["preceding images"] in (1, 2, 4)]
    return max((abs(row["agreement"] - row["ideal observer"]) for row in rows), default=None)


def _nearest(metrics: Metrics, model: str) -> float | None:
    best = best_guidance(metrics, model)
    rows = [row for row in metrics.get("nearest", ()) if row["model"] == model and row["guidance"] == best]
    last = max(rows, key=lambda row: row["preceding images"], default=None)
    return None if last is None else last["over the same in true sets"]


def _over_copying(metrics: Metrics, model: str) -> float | None:
    found = {row["views"]: row["PSNR, dB"] for row in metrics["rows"] if row["preceding views"] == 1}
    copied = found.get("the nearest preceding view, copied")
    return None if copied is None else found[model] - copied


def _pose_tells(metrics: Metrics, model: str) -> float | None:
    found = {row["views"]: row["PSNR, dB"] for row in metrics["rows"] if row["preceding views"] == 1}
    wrong = found.get("M2M-DINO, asked for another target's pose")
    return None if wrong is None else found[model] - wrong


def _lost(metrics: Metrics, model: str) -> float | None:
    """Likeness that the last quarter has lost against the first image, by the best of the remedies."""
    curves = [of["dino"] for name, of in metrics.items() if name == model or name.startswith(f"{model}, ")]
    return min((one[0] - sum(one[-len(one) // 4 :]) / len(one[-len(one) // 4 :]) for one in curves), default=None)


_FIG_6 = "evaluate@preceding_images"
CLAIMS = (
    Claim("kept after four preceding images where all share it, best guidance of the sweep", _FIG_6, _kept, least=0.85),
    Claim("that, less the same model without context", _FIG_6, _without_context, least=0.5),
    Claim("furthest from the ideal observer after 1, 2, 4 images, guidance 1", _FIG_6, _off_ideal, most=0.1),
    Claim("distance to the nearest preceding image, over the same in true sets", _FIG_6, _nearest, least=0.8),
    Claim(
        "new views: PSNR over the copied nearest view, one preceding, dB",
        "evaluate@novel_views",
        _over_copying,
        least=2.0,
        models=("M2M-DINO",),
    ),
    Claim(
        "new views: PSNR over the same with a wrong pose, one preceding, dB",
        "evaluate@novel_views",
        _pose_tells,
        least=0.0,
        models=("M2M-DINO",),
    ),
    Claim("long rollouts: DINO likeness lost at their end, best remedy", "evaluate@rollouts", _lost, most=0.05),
)
"""The numbers to reach; none is the paper's, whose data and models are others."""
