"""The regression gate, on values by set whose truth is known."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from m2m.errors import InputError
from m2m.evaluation.gate import HEADLINES, blind_to, gate, regressions
from m2m.evaluation.noises import averaged
from m2m.evaluation.per_set import Better, Metric

HEADLINE = HEADLINES[0]
NAMES = [*HEADLINES, *(f"metric {i}" for i in range(28))]


def _metric(values, better: Better = "higher", units=None) -> Metric:
    values = np.asarray(values, float)
    return Metric(values, np.arange(len(values)) if units is None else units, better)


def _evaluation(seed: int, worse_by: float = 0.0, sets: int = 200, noises: int = 1) -> dict[str, Metric]:
    """The same model on the same sets: sets differ (sd 1), each noise adds as much; worse by standard errors."""
    of_sets = np.random.default_rng(0).normal(50, 1, (30, sets))
    noise = np.random.default_rng([1, seed]).normal(0, 1, (noises, 30, sets)).mean(0)
    error = np.sqrt(2 / sets)  # of the mean of one evaluation with one noise
    return {name: _metric(row - worse_by * error) for name, row in zip(NAMES, of_sets + noise)}


def test_twenty_reevaluations_of_the_same_model_make_at_most_one_false_alarm():
    for twenty in range(5):
        seeds = range(100 * twenty, 100 * twenty + 20)
        alarms = [regressions(gate(_evaluation(s), _evaluation(s + 50))) for s in seeds]
        assert sum(bool(alarm) for alarm in alarms) <= 1, alarms


def test_a_true_worsening_of_two_standard_errors_is_caught_where_noise_was_averaged():
    one = {HEADLINE: 2.0}
    caught = []
    for seed in range(100):
        accepted, new = (_evaluation(s, noises=6) for s in (seed, seed + 500))
        error = np.sqrt(2 / 200)
        worse = new | {HEADLINE: _metric(new[HEADLINE].values - one[HEADLINE] * error)}
        caught.append(bool(regressions(gate(accepted, worse))))
    assert np.mean(caught) >= 0.95


def test_what_the_gate_could_not_see_is_told_and_is_true():
    tested = {one.metric: one for one in gate(_evaluation(0), _evaluation(1))}
    assert 2 < tested[HEADLINE].smallest < 7
    assert any(HEADLINE in why for why in blind_to(list(tested.values())))
    quiet = {one.metric: one for one in gate(_evaluation(0, noises=8), _evaluation(1, noises=8))}
    assert quiet[HEADLINE].smallest < tested[HEADLINE].smallest / 1.7
    # a worsening as large as the one named is seen about as often as is said
    by = tested[HEADLINE].smallest
    caught = [
        next(one.worse for one in gate(_evaluation(s), _evaluation(s + 500, by)) if one.metric == HEADLINE)
        for s in range(100)
    ]
    assert 0.85 <= np.mean(caught) <= 1.0


def test_as_many_noises_as_it_asks_for_show_a_worsening_of_two_errors_and_fewer_do_not():
    def seen(noises: int) -> float:
        tested = [
            next(one for one in gate(_evaluation(s, noises=noises), _evaluation(s + 50, noises=noises)))
            for s in range(20)
        ]
        return float(np.median([one.smallest for one in tested]))

    asked = [
        next(one.more_noises for one in gate(_evaluation(s), _evaluation(s + 50)) if one.metric == HEADLINE)
        for s in range(20)
    ]
    noises = int(np.median(asked))
    assert seen(noises + 2) < 2 < seen(noises - 3)
    other = {HEADLINE: _metric(_evaluation(1)[HEADLINE].values, units=np.arange(200, 400))}
    (unpaired,) = gate({HEADLINE: _evaluation(0)[HEADLINE]}, other)
    assert unpaired.more_noises == np.inf and "only more sets" in blind_to([unpaired])[0]


@pytest.mark.parametrize("pairing", ["the same sets", "the same in another order", "other sets"])
def test_p_values_are_scipys(pairing):
    drawn = np.random.default_rng(0)
    one, two = drawn.normal(0, 1, 30), drawn.normal(-0.5, 2, 30)
    order = drawn.permutation(30) if pairing == "the same in another order" else np.arange(30)
    units = order + 100 * (pairing == "other sets")
    (found,) = gate({"m": _metric(one)}, {"m": _metric(two[order], units=units)})
    tested: Any
    if pairing == "other sets":
        tested = stats.ttest_ind(two, one, equal_var=False, alternative="less")
    else:
        tested = stats.ttest_rel(two, one, alternative="less")
    assert found.p == pytest.approx(tested.pvalue, rel=1e-9)


def test_of_a_few_sets_nothing_is_known_for_sure():
    for values in ([3.0, 4.0], [3.0, 3.0]):
        (found,) = gate({"m": _metric(values)}, {"m": _metric(np.array(values) - 1)})
        assert found.p >= 0.25 and not found.worse and found.smallest == np.inf


def test_better_is_no_regression_and_lower_may_be_better():
    low, high = _metric(np.zeros(50) + np.arange(50) % 2), _metric(np.ones(50) * 3 + np.arange(50) % 3)
    assert regressions(gate({HEADLINE: low}, {HEADLINE: high})) == []
    assert "worse by" in regressions(gate({HEADLINE: high}, {HEADLINE: low}))[0]
    fid = {"fid": _metric(low.values, "lower")}, {"fid": _metric(high.values, "lower")}
    assert regressions(gate(*fid)) and regressions(gate(*reversed(fid))) == []
    assert regressions(gate({"m": low}, {"m": low})) == []


def test_what_can_not_be_compared_is_refused():
    values = _metric(np.arange(9.0))
    with pytest.raises(InputError, match="has table_1: M2M-Self"):
        gate({HEADLINE: values, "m": values}, {"m": values})
    with pytest.raises(InputError, match="no metric with values of two sets or more"):
        gate({"m": values}, {"n": values})
    with pytest.raises(InputError, match="no metric"):
        gate({"m": _metric([1.0])}, {"m": _metric([1.0])})
    with pytest.raises(InputError, match="m: evaluations of other sets"):
        averaged([{"m": values}, {"m": _metric(np.arange(9.0), units=np.arange(1, 10))}])
