"""Tables and curves over seeds."""

import pytest

from m2m.errors import InputError
from m2m.tiny.seeds import curves_over_seeds, rows_over_seeds

ROW = {"model": "M2M-Self", "guidance": 7.5, "kept": 0.8, "kept ±": 0.01, "chance": None}


def test_of_one_seed_a_table_and_a_curve_stay_as_they_are():
    curve = {"x": [1.0], "y": [0.5], "y ±": [0.1]}
    assert rows_over_seeds([[ROW]]) == [ROW] and curves_over_seeds([curve]) == curve


def test_over_seeds_what_differs_is_a_mean_with_its_deviation_and_the_rest_stays():
    (row,) = rows_over_seeds([[ROW], [{**ROW, "kept": 0.9, "kept ±": 0.02}], [{**ROW, "kept": 1.0}]])
    assert row == {**ROW, "kept": pytest.approx(0.9), "kept ±": pytest.approx(0.1)}


def test_over_seeds_a_curve_is_the_mean_with_the_deviation_for_its_error():
    found = curves_over_seeds(
        [{"x": [1.0, 2.0], "y": [0.5, 0.6], "y ±": [0.3, 0.3]}, {"x": [1.0, 2.0], "y": [0.7, 0.6], "y ±": [0.3, 0.3]}]
    )
    assert found["x"] == [1.0, 2.0] and found["y"] == pytest.approx([0.6, 0.6])
    assert found["y ±"] == pytest.approx([0.02**0.5, 0.0])


@pytest.mark.parametrize("other", [[], [{**ROW, "model": "M2M-DINO"}], [{**ROW, "kept": None}]])
def test_tables_of_other_rows_are_refused(other):
    with pytest.raises(InputError, match="evaluate all alike"):
        rows_over_seeds([[ROW], other])


@pytest.mark.parametrize("other", [{"x": [2.0], "y": [0.5]}, {"x": [1.0], "z": [0.5]}])
def test_curves_of_other_lines_or_points_are_refused(other):
    with pytest.raises(InputError, match="evaluate all alike"):
        curves_over_seeds([{"x": [1.0], "y": [0.5]}, other])
