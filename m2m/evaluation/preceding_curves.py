"""Curves of Fig. 6 that the report makes of an evaluation's table and values by set.

What sets share is kept, and what differs in them goes on varying: a model that copies keeps everything, one that
guesses varies everything, and only both lines together tell.

Belongs here: these curves. Not here: the table (`m2m.evaluation.preceding_images`), drawing (`m2m.evaluation.charts`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from m2m.evaluation.charts import ERROR
from m2m.evaluation.per_set import Metric

TABLE = "By number of preceding images"
KEPT, VARYING = "kept where shared", "agreement where they vary"
LIKENESS, LIKENESS_BY_SET = "CLIP likeness", "CLIP to all preceding"
_X, _IDEAL, _CHANCE = "preceding images", "ideal observer", "chance"


def kept_and_varying(
    rows: Sequence[Mapping[str, Any]], guidances: Sequence[float]
) -> dict[str, dict[str, list[float]]]:
    """Curves by name, one a guidance scale: of each model two lines with their errors, beside the ideal observer's.

    The ideal observer keeps what is shared as often as it concludes that it is; where the images were seen to differ,
    it agrees by chance. No number stands where no case can be: one image is no evidence that anything varies.

    Args:
        rows: of `TABLE`; without a reader they have no such columns, and there is no curve.
    """
    found = {}
    for guidance in guidances:
        here = [row for row in rows if row.get("guidance") == guidance and KEPT in row]
        models = dict.fromkeys(str(row["model"]) for row in here)
        columns: dict[str, list[float]] = {}
        for model in models:
            own = [row for row in here if row["model"] == model]
            columns.setdefault(_X, [float(row[_X]) for row in own])
            for kind in (KEPT, VARYING):
                columns[f"{model}: {kind}"] = [_number(row.get(kind)) for row in own]
                columns[f"{model}: {kind}{ERROR}"] = [_number(row.get(f"{kind}{ERROR}")) for row in own]
        if here:
            reach = [row for row in here if row["model"] == here[0]["model"]]
            columns[f"{_IDEAL}: {KEPT}"] = [_number(row.get(_IDEAL)) for row in reach]
            columns[f"{_IDEAL}: {VARYING}"] = [_number(row.get(_CHANCE)) for row in reach]
            found[f"Kept and varying, guidance {guidance:g}"] = columns
    return found


def with_errors(
    curves: Mapping[str, Mapping[str, list[float]]], per_set: Mapping[str, Metric]
) -> dict[str, dict[str, list[float]]]:
    """Curves of likeness with the standard errors over trials of each of their points; others as they are."""
    found = {name: dict(columns) for name, columns in curves.items()}
    for name, columns in found.items():
        title, _, guidance = name.partition(", ")
        if title != LIKENESS:
            continue
        for model in [key for key in columns if key != _X and not key.endswith(ERROR)]:
            points = [
                per_set.get(f"{model}, {scale}, {count:g} before: {LIKENESS_BY_SET}")
                for scale in (guidance, "no guidance scale")
                for count in columns[_X]
            ]
            errors = [float(one.error) for one in points if one is not None and one.error is not None]
            if len(errors) == len(columns[_X]):
                columns[f"{model}{ERROR}"] = errors
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
