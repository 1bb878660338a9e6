"""Comparisons, on values by set whose truth is known."""

import argparse

import numpy as np
import pytest
import torch

from m2m.errors import ArtifactError, InputError
from m2m.evaluation import compare
from m2m.evaluation.gate import HEADLINES
from m2m.evaluation.per_set import PER_SET, Better, Metric, PerSet, jackknife, ratio_values, read_per_set


def _metric(values, better: Better = "higher", units=None) -> Metric:
    values = np.asarray(values, float)
    return Metric(values, np.arange(len(values)) if units is None else units, better)


def _evaluation(seed: int, worse_by: float = 0.0, sets: int = 200) -> dict[str, Metric]:
    """One evaluation of the same model on the same sets: sets differ (sd 1), the sampler's seed adds noise (sd 1)."""
    of_sets = np.random.default_rng(0).normal(50, 1, (30, sets))
    noise = np.random.default_rng([1, seed]).normal(0, 1, (30, sets))
    # standard error of one evaluation's mean
    error = np.sqrt(2 / sets)
    names = [*HEADLINES, *(f"metric {i}" for i in range(28))]
    return {name: _metric(row - worse_by * error) for name, row in zip(names, of_sets + noise)}


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = 0
    for seed in range(100):
        drawn = np.random.default_rng(seed)
        one, two = drawn.normal(0, 1, 60), drawn.normal(0.3, 2, 80)
        found = compare.differ("m", _metric(one), _metric(two), resamples=400, seed=seed)
        held += found.low <= 0.3 <= found.high
        assert not found.paired
    assert 88 <= held <= 100


def test_what_sets_have_in_common_cancels_where_the_sets_are_the_same():
    drawn = np.random.default_rng(0)
    of_sets = drawn.normal(0, 10, 100)
    one, two = of_sets + drawn.normal(0, 0.1, 100), of_sets + drawn.normal(0.1, 0.1, 100)
    paired = compare.differ("m", _metric(one), _metric(two))
    order = drawn.permutation(100)
    mixed = compare.differ("m", _metric(one), _metric(two[order], units=order))
    other = compare.differ("m", _metric(one), _metric(two, units=np.arange(100) + 1))
    assert paired.paired and mixed.paired and not other.paired
    assert paired.verdict == mixed.verdict == "better" and other.verdict == ""
    assert mixed.low == paired.low and other.high - other.low > 20 * (paired.high - paired.low)


def test_values_by_set_come_back_as_they_were_written(tmp_path):
    told = PerSet()
    told.add("b", np.array([[1.0, 3.0], [5.0, 7.0]]), "lower", [9, 4])
    told.add("a", np.array([0.1]))
    told.write(tmp_path)
    found = read_per_set(tmp_path / PER_SET)
    assert list(found) == ["b", "a"] and found["b"].better == "lower" and found["a"].error is None
    assert found["b"].values.tolist() == [2, 6] and found["b"].units.tolist() == [9, 4]
    before = (tmp_path / PER_SET).read_bytes()
    told.write(tmp_path)
    assert (tmp_path / PER_SET).read_bytes() == before


def test_values_that_are_missing_or_not_finite_are_refused(tmp_path):
    with pytest.raises(InputError, match="1 of 2 values are not finite"):
        PerSet().add("x", np.array([1.0, np.nan]))
    with pytest.raises(InputError, match="2 values for 1 sets"):
        PerSet().add("x", np.array([1.0, 2.0]), units=[1])
    with pytest.raises(ArtifactError, match="no values by set"):
        compare.open_per_set(tmp_path)
    (tmp_path / PER_SET).write_bytes(b"x")
    with pytest.raises(ArtifactError, match="no values by set"):
        compare.open_per_set(tmp_path)


def test_the_command_prints_every_metric_and_gates(tmp_path, capsys):
    for name, metrics in {"a": _evaluation(0), "b": _evaluation(1), "c": _evaluation(2, 8.0)}.items():
        told = PerSet()
        told.metrics = metrics
        (tmp_path / name / "report").mkdir(parents=True)
        told.write(tmp_path / name / "report")
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    folders = [str(tmp_path / name) for name in "abc"]
    assert compare.main(parser.parse_args([*folders, "--only", "table_1", "--json", str(tmp_path / "out.json")])) == 0
    said = capsys.readouterr().out
    assert said.count(HEADLINES[0]) == 2 and "paired worse" in said
    assert '"interval"' in (tmp_path / "out.json").read_text()
    assert compare.main(parser.parse_args([folders[0], folders[2], "--gate"])) == 1
    assert "REGRESSION" in capsys.readouterr().out
    assert compare.main(parser.parse_args([*folders[:2], "--gate"])) == 0
    said = capsys.readouterr().out
    assert "no regression" in said and "30 metrics tested; 20 of them may be worse by 2 standard errors" in said
    with pytest.raises(InputError, match="two reports or more"):
        compare.main(parser.parse_args(folders[:1]))


def test_a_ratios_values_have_its_mean_and_its_error():
    drawn = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(400):
        cases = drawn.integers(0, 4, 100).astype(float)
        hits = drawn.binomial(cases.astype(int), 0.7).astype(float)
        values = ratio_values(torch.from_numpy(hits), torch.from_numpy(cases))
        assert values.mean() == pytest.approx(hits.sum() / cases.sum())
        ratios.append(values.mean())
        errors.append(values.std(ddof=1) / 10)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.15)


def test_the_jackknife_has_the_scores_value_and_the_means_error():
    values = np.random.default_rng(0).normal(size=120)
    whole, blocks = jackknife(lambda rows: values[rows].mean(), 120, 120)
    assert blocks is not None and [whole, blocks.mean()] == pytest.approx([values.mean()] * 2)
    assert blocks.std(ddof=1) == pytest.approx(values.std(ddof=1))

    def needs_all(rows):
        if len(rows) < 120:
            raise InputError("too few")
        return 1.0

    assert jackknife(needs_all, 120, 10) == (1.0, None)
    assert jackknife(needs_all, 120, 0) == jackknife(needs_all, 120, 1) == (1.0, None)
