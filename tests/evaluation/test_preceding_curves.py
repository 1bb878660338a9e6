"""Curves of Fig. 6: what is shared is kept, and what is not goes on varying."""

import math

import numpy as np

from m2m.evaluation.charts import chart
from m2m.evaluation.per_set import PerSet
from m2m.evaluation.preceding_curves import KEPT, VARYING, kept_and_varying, with_errors


def _row(model: str, guidance: float | None, count: int, kept: float, varying: float | None) -> dict:
    return {
        "model": model,
        "guidance": guidance,
        "preceding images": count,
        "ideal observer": 0.9,
        KEPT: kept,
        f"{KEPT} ±": 0.05,
        VARYING: varying,
        f"{VARYING} ±": None if varying is None else 0.06,
        "chance": None if varying is None else 0.22,
    }


ROWS = [
    _row("planted: oracle", None, 1, 1.0, None),
    *(_row(model, guidance, 1, 0.6, None) for model in ("M2M-Self", "M2M-DINO") for guidance in (1.0, 4.0, 7.5)),
    *(_row(model, guidance, 4, 0.8, 0.3) for model in ("M2M-Self", "M2M-DINO") for guidance in (1.0, 4.0, 7.5)),
]


def test_both_lines_of_each_model_stand_with_errors_beside_the_ideal_observers():
    found = kept_and_varying(ROWS, [1.0, 7.5])
    assert list(found) == ["Kept and varying, guidance 1", "Kept and varying, guidance 7.5"]
    columns = found["Kept and varying, guidance 7.5"]
    assert columns["preceding images"] == [1, 4]
    assert columns[f"M2M-Self: {KEPT}"] == [0.6, 0.8] and columns[f"M2M-Self: {KEPT} ±"] == [0.05, 0.05]
    assert math.isnan(columns[f"M2M-DINO: {VARYING}"][0]) and columns[f"M2M-DINO: {VARYING}"][1] == 0.3
    assert columns[f"ideal observer: {KEPT}"] == [0.9, 0.9] and columns[f"ideal observer: {VARYING}"][1] == 0.22
    assert kept_and_varying([{"model": "M2M-Self", "guidance": 1.0, "preceding images": 1}], [1.0]) == {}


def test_a_models_two_lines_have_one_colour_and_what_is_no_case_is_no_point():
    drawn = chart("a curve", kept_and_varying(ROWS, [1.0])["Kept and varying, guidance 1"])
    assert drawn.count('class="line"') == 6 and "nan" not in drawn
    assert drawn.count("<circle") == 3 * 2 + 3 * 1 and drawn.count('class="error"') == 2 * 2 + 2 * 1
    assert drawn.count("background:var(--self)") == drawn.count("background:var(--dino)") == 2
    assert drawn.count('class="hollow"') == 3 and drawn.count('stroke-dasharray="6 5"') == 2


def test_likeness_has_the_errors_of_its_values_by_set():
    told = PerSet()
    for count in (1, 4):
        told.add(f"M2M-Self, guidance 7.5, {count} before: CLIP to all preceding", np.array([1.0, 3.0]) * count)
        told.add(f"planted: oracle, no guidance scale, {count} before: CLIP to all preceding", np.array([5.0, 5.0]))
    curve = {"preceding images": [1.0, 4.0], "M2M-Self": [2.0, 8.0], "planted: oracle": [5.0, 5.0], "other": [1.0, 1.0]}
    found = with_errors({"CLIP likeness, guidance 7.5": curve, "Agreement": curve}, told.metrics)
    assert found["CLIP likeness, guidance 7.5"] == {**curve, "M2M-Self ±": [1.0, 4.0], "planted: oracle ±": [0.0, 0.0]}
    assert found["Agreement"] == curve
