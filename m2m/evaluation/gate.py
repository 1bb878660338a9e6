"""Whether an evaluation is worse than an accepted one by more than its noise: the regression gate.

Every metric with a better side is tested, all of them together at one rate of false alarms, against two claims: that
nothing is worse, and that the metric is worse by two of the standard errors that a report prints. What refutes neither
needs more noises (`m2m.evaluation.noises` samples them); after `LOOKS[-1]` of them on both sides one of the two falls.

Belongs here: the test, its levels, its looks. Not here: intervals for people (`m2m.evaluation.compare`), sampling more.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaln, stdtr

from m2m.errors import InputError
from m2m.evaluation.per_set import Metric

HEADLINES = ("table_1: M2M-Self: Image-Image CLIP ↑", "table_1: M2M-DINO: Image-Image CLIP ↑")
FALSE_ALARMS = 0.015
"""How often at most an unchanged model, evaluated again with other seeds, is refused: twenty times, and in 96 % of
cases there is no more than one false alarm."""
WORSENING, MISSED = 2.0, 0.05
"""A true worsening by so many standard errors of one evaluation with one noise passes at most this often."""
LOOKS = (1, 4, 8, 16)
"""Noises of the new evaluation after which it is tested. The accepted one has the last number from the start."""
_EARLY_ALARMS, _EARLY_MISSES = 0.2, 0.4
"""Shares of the two rates that the looks before the last one spend, in equal parts (Bonferroni)."""


@dataclass(frozen=True)
class Tested:
    """One metric's test.

    Attributes:
        error: standard error of the difference. Of the same sets only the sampler's noise is in it.
        unit: standard error of the accepted evaluation with one noise, over sets: what a report prints. Of a single
            value: its deviation from noise to noise.
        p: how likely a difference this bad is where nothing is worse (one-sided).
        p_worse: how likely one this good is where the metric is worse by `WORSENING` units.
        level, level_worse: below them the one and the other is refuted.
        same_sets: further noises make `error` smaller.
        last: no further noises would be sampled.
    """

    metric: str
    first: Metric
    second: Metric
    error: float
    unit: float
    p: float
    p_worse: float
    level: float
    level_worse: float
    same_sets: bool
    last: bool

    @property
    def worse(self) -> bool:
        return self.p < self.level

    @property
    def undecided(self) -> bool:
        """Neither worse nor known not to be worse by `WORSENING` units."""
        return not self.worse and self.p_worse >= self.level_worse

    def __str__(self) -> str:
        apart = abs(self.second.mean - self.first.mean)
        errors = f"{apart / self.error:.1f} standard errors" if self.error else "the same in every set"
        return f"{self.metric}: {self.second.mean:.4g}, accepted {self.first.mean:.4g}, worse by {errors}"


def gate(
    accepted: Mapping[str, Metric],
    new: Mapping[str, Metric],
    *,
    headlines: Sequence[str] = HEADLINES,
    false_alarms: float = FALSE_ALARMS,
    part: bool = False,
) -> list[Tested]:
    """Test every metric that both have and that has a better side.

    Args:
        headlines: these share one half of `false_alarms`, all others of the accepted evaluation the other half
            (Bonferroni): what matters most is not drowned by how much is measured.
        false_alarms: how often an unchanged model is refused.
        part: the new one is a part of what was accepted; the rest is tested elsewhere.

    Raises:
        InputError: the two have no metric in common that could be worse, or a headline of the accepted one is missing
            from the new one.
    """
    if lost := [name for name in headlines if name in accepted and name not in new and not part]:
        raise InputError(f"the accepted evaluation has {lost[0]}, the new one does not")
    # what has one value alone, such as FID of few sets, is known by what noise makes of it
    gated = [name for name, one in accepted.items() if one.better != "neither" and one.noises * len(one.values) > 1]
    names = [name for name in gated if name in new and len(new[name].values) > (accepted[name].noises == 1)]
    if not names and not part:
        raise InputError("the two evaluations have no metric with values of two sets or more in common to be judged by")
    groups = [[name for name in gated if (name in headlines) == first] for first in (True, False)]
    share = false_alarms / max(1, sum(map(bool, groups)))
    levels = {name: share / len(group) for group in groups for name in group}
    return [_test(name, accepted[name], new[name], levels[name]) for name in names]


def regressions(tested: Sequence[Tested]) -> list[str]:
    """What is worse, in words; nothing if the gate holds."""
    return [str(one) for one in tested if one.worse]


def undecided(tested: Sequence[Tested]) -> list[str]:
    """Metrics of which a true worsening of `WORSENING` standard errors might have passed, and what to do, in words."""
    return [f"{one.metric}: {_way_out(one)}" for one in tested if one.undecided]


def noises_wanted(tested: Sequence[Tested], noises: int) -> int:
    """How many noises the new evaluation should have where it has so many.

    No more where something is worse, where nothing is undecided, or where more would not help.
    """
    open_ = any(one.undecided and one.same_sets for one in tested)
    if not open_ or any(one.worse for one in tested):
        return noises
    return next((look for look in LOOKS if look > noises), noises)


def _way_out(one: Tested) -> str:
    if not one.same_sets:
        return "of other sets; the same `seed` and number of sets are needed on both sides"
    if one.first.noises < LOOKS[-1]:
        return f"accept an evaluation with {LOOKS[-1]} noises (`python -m m2m accept`): this one has {one.first.noises}"
    if not one.last:
        return "name the accepted evaluation in evaluate's `accepted`, too: it then samples until this is known"
    return "only more sets may tell"


def _test(name: str, first: Metric, second: Metric, level: float) -> Tested:
    """Student's t of the difference: of the same sets by what noise makes of each, or Welch's of other sets.

    No p-value lies below what exchanging noises (or signs, or sets) could give: of two sets with one noise nothing is
    known for sure, be they as alike as they may.
    """
    sign = -1.0 if second.better == "higher" else 1.0
    one, two = (_in_order(metric) for metric in (first, second))
    same_sets = np.array_equal(one.units, two.units)
    if not same_sets:
        error, freedom, least = _of_other_sets(one.values, two.values)
    elif one.noises == two.noises == 1:
        count = len(one.values)
        error = float((two.values - one.values).std(ddof=1)) / math.sqrt(count)
        freedom, least = count - 1.0, 0.5**count
    else:
        error, freedom, least = _of_noises(one, two)
    worsening, unit = sign * (second.mean - first.mean), _unit(one)
    if error:
        p = float(stdtr(freedom, -worsening / error))
        p_worse = float(stdtr(freedom, (worsening - WORSENING * unit) / error))
    else:
        p = 0.0 if worsening > 0 else 1.0
        p_worse = 0.0 if worsening <= 0 or worsening < WORSENING * unit else 1.0
    last = second.noises >= LOOKS[-1]
    early = len(LOOKS) - 1
    return Tested(
        name,
        first,
        second,
        error,
        unit,
        max(p, least),
        max(p_worse, least),
        level * (1 - _EARLY_ALARMS if last else _EARLY_ALARMS / early),
        MISSED * (1 - _EARLY_MISSES if last else _EARLY_MISSES / early),
        same_sets,
        last,
    )


def _in_order(metric: Metric) -> Metric:
    order = np.argsort(metric.units, kind="stable")
    spread = None if metric.spread is None else metric.spread[order]
    return Metric(metric.values[order], metric.units[order], metric.better, metric.noises, spread)


def _unit(metric: Metric) -> float:
    """Standard error over sets of an evaluation with one noise, of which this is a mean over some."""
    variance, single = 0.0, len(metric.values) == 1
    if not single:
        variance += float(metric.values.var(ddof=1))
    if metric.spread is not None:
        variance += float(metric.spread.mean()) * (1 if single else 1 - 1 / metric.noises)
    return math.sqrt(variance / len(metric.values))


def _of_noises(one: Metric, two: Metric) -> tuple[float, float, float]:
    """Error of the difference of the same sets' means, its degrees of freedom, the least p-value.

    What the noises of both sides make of a set are pooled as if nothing had changed: a yes-or-no answer that was yes
    sixteen times is known to vary as soon as it is no once. Sets differ in how they vary (Satterthwaite, 1946); those
    that do not vary are no evidence.
    """
    count, freedom = len(one.values), one.noises + two.noises - 1
    between = one.noises * two.noises / (one.noises + two.noises) * (two.values - one.values) ** 2
    variance = (_scatter(one) + _scatter(two) + between) / freedom  # of one noise's value, by set
    error = math.sqrt(variance.sum() * (1 / one.noises + 1 / two.noises)) / count
    if not error:
        return 0.0, 1.0, 0.0
    vary = float(variance.sum() ** 2 / (variance**2).sum())  # how many sets do, as it were
    # the squares of estimated variances are too large by (freedom + 2) / freedom
    whole = min(vary * (freedom + 2), float(count * freedom))
    exchanges = -betaln(one.noises + 1, two.noises + 1) - math.log(one.noises + two.noises + 1)
    return error, whole, math.exp(-vary * float(exchanges))


def _scatter(metric: Metric) -> NDArray[np.float64] | float:
    return 0.0 if metric.spread is None else metric.spread * (metric.noises - 1)


def _of_other_sets(one: NDArray[np.float64], two: NDArray[np.float64]) -> tuple[float, float, float]:
    """The same by Welch (1947), of sets that differ."""
    parts = [float(values.var(ddof=1)) / len(values) for values in (one, two)]
    spread = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (one, two)))
    freedom = sum(parts) ** 2 / spread if spread else float(len(one) + len(two) - 2)
    return math.sqrt(sum(parts)), freedom, 1 / math.comb(len(one) + len(two), len(one))
