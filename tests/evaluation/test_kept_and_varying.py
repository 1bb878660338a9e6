"""The curve of Fig. 6: what is shared is kept, and what is not goes on varying."""

import math

from m2m.evaluation.charts import chart
from m2m.evaluation.kept_and_varying import KEPT, VARYING, kept_and_varying


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
