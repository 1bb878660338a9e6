"""The regression gate, on values by set whose truth is known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from m2m.errors import InputError
from m2m.evaluation.gate import HEADLINES, LOOKS, gate, noises_wanted, regressions, undecided
from m2m.evaluation.per_set import Better, Metric, averaged

HEADLINE = HEADLINES[0]
NAMES = [*HEADLINES, *(f"metric {i}" for i in range(28))]


def _metric(values, better: Better = "higher", units=None) -> Metric:
    values = np.asarray(values, float)
    return Metric(values, np.arange(len(values)) if units is None else units, better)


def _evaluation(seed: int, worse_by: float = 0.0, sets: int = 200, share: float = 1.0) -> dict[str, Metric]:
    """One noise: sets differ by the variance 1, noise adds `share`; all is worse by standard errors of one."""
    of_sets = np.random.default_rng(0).normal(50, 1, (30, sets))
    noise = np.random.default_rng([1, seed]).normal(0, share**0.5, (30, sets))
    error = np.sqrt((1 + share) / sets)
    return {name: _metric(row - worse_by * error) for name, row in zip(NAMES, of_sets + noise)}


def _noises(seed: int, count: int, worse_by: float = 0.0, share: float = 1.0) -> dict[str, Metric]:
    return averaged([_evaluation(1000 * seed + n, worse_by, share=share) for n in range(count)])


def _gated(seed: int, worse: dict[str, float], share: float = 1.0) -> tuple[bool, int]:
    """Whether the gate refuses, and after how many noises; its accepted side has as many as `accept` takes."""
    accepted, wanted = _noises(2 * seed, LOOKS[-1], share=share), 1
    while True:
        count, new = wanted, _noises(2 * seed + 1, wanted, share=share)
        down = {name: by * np.sqrt((1 + share) / 200) for name, by in worse.items()}
        new |= {name: replace(new[name], values=new[name].values - by) for name, by in down.items()}
        tested = gate(accepted, new)
        wanted = noises_wanted(tested, count)
        if wanted == count:
            return bool(regressions(tested)), count


def test_twenty_reevaluations_of_the_same_model_make_at_most_one_false_alarm():
    """Over the looks of each, too: as many noises as are asked for."""
    for twenty in range(3):
        ends = [_gated(100 * twenty + again, {}) for again in range(20)]
        assert sum(worse for worse, _ in ends) <= 1, ends
        assert np.mean([count for _, count in ends]) < 8  # most are known not to be worse long before the last look


@pytest.mark.parametrize("share", [0.16, 1.0, 1e6])  # of noise: little, as much as sets differ, nothing else
def test_a_true_worsening_of_two_standard_errors_is_caught_in_one_metric_alone(share):
    for metric in (HEADLINE, NAMES[-1]):
        caught = [_gated(seed, {metric: 2.0}, share)[0] for seed in range(40)]
        assert np.mean(caught) >= 0.9  # of 40, where 95 % are promised


def test_what_is_refuted_and_what_is_not():
    accepted = _noises(0, LOOKS[-1])
    same = {one.metric: one for one in gate(accepted, _noises(1, LOOKS[-1]))}
    assert not regressions(list(same.values())) and undecided(list(same.values())) == []
    # one noise on both sides tells neither, and what would is said
    early = gate(_noises(0, 1), _noises(1, 1))
    assert noises_wanted(early, 1) == LOOKS[1] and "m2m accept" in undecided(early)[0]
    early = gate(accepted, _noises(1, 1))
    assert any("name the accepted evaluation in evaluate's `accepted`" in why for why in undecided(early))
    # two standard errors, as the accepted evaluation prints them with one noise
    printed = np.mean([_evaluation(n)[HEADLINE].error or 0 for n in range(8)])
    assert same[HEADLINE].unit == pytest.approx(printed, rel=0.02)
    assert same[HEADLINE].error == pytest.approx(np.sqrt(1 / 200 * 2 / LOOKS[-1]), rel=0.05)


def test_of_other_sets_no_noise_helps_and_that_is_said():
    other = {HEADLINE: _metric(_evaluation(1)[HEADLINE].values, units=np.arange(200, 400))}
    tested = gate({HEADLINE: _noises(0, LOOKS[-1])[HEADLINE]}, other)
    assert noises_wanted(tested, 1) == 1
    assert "of other sets" in undecided(tested)[0]


def test_an_answer_that_was_always_yes_may_be_no_once():
    """Sixteen noises on which nothing varies do not say that nothing ever does."""
    yes = averaged([{"m": _metric(np.ones(8))}] * LOOKS[-1])
    for place in range(8):
        once = {"m": _metric(np.arange(8) != place)}
        assert regressions(gate(yes, once)) == []
    never = {"m": _metric(np.zeros(8))}
    assert regressions(gate(yes, never))


def test_a_score_of_all_sets_at_once_is_known_by_its_noises():
    def scores(seed: int, mean: float) -> list[dict[str, Metric]]:
        drawn = np.random.default_rng(seed).normal(mean, 1, LOOKS[-1])
        return [{"fid": _metric([value], "lower")} for value in drawn]

    accepted = averaged(scores(0, 10))
    assert regressions(gate(accepted, averaged(scores(1, 10)))) == []
    assert regressions(gate(accepted, averaged(scores(2, 13))))
    (one,) = gate(accepted, averaged(scores(1, 10)))
    assert one.unit == pytest.approx(1, rel=0.4)


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


def test_p_values_over_noises_are_students_where_all_sets_vary_alike():
    """An independent reference: one set alone is two samples of noises, pooled."""
    drawn = np.random.default_rng(0)
    one, two = drawn.normal(0, 1, 16), drawn.normal(-0.3, 1, 8)
    sides = [averaged([{"m": _metric([v, v], units=np.array([1, 2]))} for v in side]) for side in (one, two)]
    single = [averaged([{"m": _metric([v])} for v in side]) for side in (one, two)]
    pooled: Any = stats.ttest_ind(two, one, alternative="less")
    for accepted, new in (sides, single):
        (found,) = gate({"m": accepted["m"]}, {"m": new["m"]})
        # what lies between the sides counts as noise as well: the error is larger, by what is known
        t = (two.mean() - one.mean()) / found.error * (1 if accepted is single[0] else 0.5**0.5)
        between = 16 * 8 / 24 * (two.mean() - one.mean()) ** 2
        within = ((one - one.mean()) ** 2).sum() + ((two - two.mean()) ** 2).sum()
        assert t == pytest.approx(pooled.statistic * np.sqrt(within / 22 / ((within + between) / 23)), rel=1e-9)


def test_of_a_few_sets_nothing_is_known_for_sure():
    for values in ([3.0, 4.0], [3.0, 3.0]):
        (found,) = gate({"m": _metric(values)}, {"m": _metric(np.array(values) - 1)})
        assert found.p >= 0.25 and not found.worse and found.undecided


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
