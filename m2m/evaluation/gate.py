"""Whether an evaluation is worse than an accepted one by more than its noise: the regression gate.

Every metric with a better side is tested once, all of them together at one rate of false alarms. What the gate could
not have seen is told, too: a gate that passes everything because its noise is large would promise nothing.

Belongs here: the test, its levels, its power. Not here: intervals for people (`m2m.evaluation.compare`), less noise
(`m2m.evaluation.noises`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from m2m.errors import InputError
from m2m.evaluation.per_set import Metric

HEADLINES = ("table_1: M2M-Self: Image-Image CLIP ↑", "table_1: M2M-DINO: Image-Image CLIP ↑")
FALSE_ALARMS = 0.01
"""How often an unchanged model, evaluated again with other seeds, is refused: twenty times, and in 98 % of cases at
most one false alarm."""
WORSENING, POWER = 2.0, 0.95
"""A true worsening by so many standard errors of the accepted evaluation is to be seen with this probability."""


@dataclass(frozen=True)
class Tested:
    """One metric's test.

    Attributes:
        error: standard error of the difference; of equal sets what they have in common cancels.
        p: how likely a difference this bad is where nothing is worse (one-sided).
        level: below it the metric counts as worse.
        smallest: the true worsening that is seen with probability `POWER`, in standard errors of the accepted
            evaluation; infinite where no worsening could be.
        more_noises: how many times as many `noise_seeds` on both sides show a true worsening by `WORSENING` errors;
            infinite where no number would.
    """

    metric: str
    first: Metric
    second: Metric
    error: float
    p: float
    level: float
    smallest: float
    more_noises: float

    @property
    def worse(self) -> bool:
        return self.p < self.level

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
) -> list[Tested]:
    """Test every metric that both have and that has a better side.

    Args:
        headlines: these share one half of `false_alarms`, all others the other half (Bonferroni): what matters most is
            not drowned by how much is measured.
        false_alarms: how often an unchanged model is refused.

    Raises:
        InputError: the two have no metric in common that could be worse, or a headline of the accepted one is missing
            from the new one.
    """
    if lost := [name for name in headlines if name in accepted and name not in new]:
        raise InputError(f"the accepted evaluation has {lost[0]}, the new one does not")
    names = [
        name
        for name, metric in new.items()
        if name in accepted and metric.better != "neither" and min(len(accepted[name].values), len(metric.values)) > 1
    ]
    if not names:
        raise InputError("the two evaluations have no metric with values of two sets or more in common to be judged by")
    groups = [[name for name in names if (name in headlines) == first] for first in (True, False)]
    share = false_alarms / sum(map(bool, groups))
    levels = {name: share / len(group) for group in groups for name in group}
    return [_test(name, accepted[name], new[name], levels[name]) for name in names]


def regressions(tested: Sequence[Tested]) -> list[str]:
    """What is worse, in words; nothing if the gate holds."""
    return [str(one) for one in tested if one.worse]


def blind_to(tested: Sequence[Tested], worsening: float = WORSENING) -> list[str]:
    """Metrics of which a true worsening of this many standard errors might pass, and what would be seen, in words."""
    return [
        f"{one.metric}: only a worsening of {one.smallest:.1f} standard errors would be seen in {POWER:.0%} of cases; "
        + (
            f"{one.more_noises:.3g} times the noise_seeds show"
            if math.isfinite(one.more_noises)
            else "only more sets, the same on both sides, may show"
        )
        + f" one of {WORSENING:g}"
        for one in tested
        if one.smallest > worsening
    ]


def _test(name: str, first: Metric, second: Metric, level: float) -> Tested:
    """Student's t of paired differences by set, or Welch's where the sets are not the same.

    No p-value lies below what shuffling signs (or sets) could give: of two sets nothing is known for sure, be they as
    alike as they may.
    """
    sign = -1.0 if second.better == "higher" else 1.0
    one, two = (metric.values[np.argsort(metric.units, kind="stable")] for metric in (first, second))
    paired = np.array_equal(np.sort(first.units), np.sort(second.units))
    if paired:
        apart = two - one
        count, variance = len(apart), float(apart.var(ddof=1))
        error, freedom, least = math.sqrt(variance / count), float(count - 1), 0.5**count
    else:
        parts = [float(values.var(ddof=1)) / len(values) for values in (one, two)]
        error = math.sqrt(sum(parts))
        spread = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (one, two)))
        freedom = sum(parts) ** 2 / spread if spread else float(len(one) + len(two) - 2)
        least = 1 / math.comb(len(one) + len(two), len(one))
    worsening = sign * (second.mean - first.mean)
    if error:
        found = float(stdtr(freedom, -worsening / error))
    else:
        found = 0.0 if worsening > 0 else 1.0
    smallest = more = math.inf
    if least < level and first.error:
        errors = -float(stdtrit(freedom, level) + stdtrit(freedom, 1 - POWER))
        smallest = errors * error / first.error
        if paired:
            more = _more_noises(errors, error**2, first.error**2)
    return Tested(name, first, second, error, max(found, least), level, smallest, more)


def _more_noises(errors: float, difference: float, accepted: float) -> float:
    """How many times as many noises bring `WORSENING` errors of an evaluation to so many errors of the difference.

    Of the variance of one evaluation's mean, half of the difference's is the sampler's noise, which falls with the
    number of noises; the rest is how much the sets differ, and stays.

    Args:
        errors: of the difference, by which a worsening has to show.
        difference, accepted: squared errors of the difference and of the accepted evaluation.
    """
    of_sets = accepted - difference / 2
    if of_sets <= 0:
        return math.inf
    return max(1.0, math.ceil(difference * (errors**2 - WORSENING**2 / 2) / (WORSENING**2 * of_sets)))
