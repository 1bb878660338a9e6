"""Evaluations side by side: differences with confidence intervals.

Belongs here: `python -m m2m compare`, the bootstrap over sets. Not here: values by set and their file
(`m2m.evaluation.per_set`), whether one is worse than an accepted one (`m2m.evaluation.gate`).
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m2m import artifacts
from m2m.errors import InputError
from m2m.evaluation.gate import HEADLINES, WORSENING, Tested, gate, regressions, undecided
from m2m.evaluation.per_set import Metric, open_per_set

_AT_A_TIME = 1 << 22  # resampled values in memory


@dataclass(frozen=True)
class Difference:
    """How a metric differs between two evaluations."""

    metric: str
    first: Metric
    second: Metric
    paired: bool  # the same sets in both: their differences are resampled, what sets have in common cancels
    low: float  # of the interval around second - first
    high: float

    @property
    def difference(self) -> float:
        return self.second.mean - self.first.mean

    @property
    def verdict(self) -> str:
        if self.second.better == "neither" or self.low <= 0 <= self.high:
            return ""
        return "better" if (self.difference > 0) == (self.second.better == "higher") else "worse"


def differ(
    name: str, first: Metric, second: Metric, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """Bootstrap over sets of the difference of two means.

    Args:
        resamples: drawings of as many sets with replacement (percentile intervals; Efron, 1979).

    Raises:
        InputError: fewer than two sets in one of them.
    """
    if min(len(first.values), len(second.values)) < 2:
        raise InputError(f"{name}: an interval needs two sets or more in each evaluation")
    one, two = (metric.values[np.argsort(metric.units, kind="stable")] for metric in (first, second))
    paired = np.array_equal(np.sort(first.units), np.sort(second.units))
    drawn = np.random.default_rng([seed, len(one), len(two)])
    if paired:
        means = _resampled(two - one, resamples, drawn)
    else:
        means = _resampled(two, resamples, drawn) - _resampled(one, resamples, drawn)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(name, first, second, paired, float(low), float(high))


def compare(first: Mapping[str, Metric], second: Mapping[str, Metric], resamples: int = 2000) -> list[Difference]:
    """The metrics that both have and that an interval can be told of.

    Raises:
        InputError: they have none in common.
    """
    found = [
        differ(name, first[name], metric, resamples=resamples)
        for name, metric in second.items()
        if name in first and min(len(first[name].values), len(metric.values)) > 1
    ]
    if not found:
        raise InputError("the two evaluations have no metric with values of two sets or more in common")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reports", nargs="+", type=Path, metavar="FOLDER", help="two or more reports or evaluations")
    parser.add_argument("--only", default="", help="metrics whose names contain this")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap over sets")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison to this file as well")
    parser.add_argument("--gate", action="store_true", help="fail where another is worse by more than its noise")


def main(args: argparse.Namespace) -> int:
    """Print each further report's differences from the first; exit code 1 where the gate does not hold."""
    if len(args.reports) < 2:
        raise InputError("compare needs two reports or more")
    first, *others = [
        {name: metric for name, metric in open_per_set(path).items() if args.only in name} for path in args.reports
    ]
    failed, told = False, []
    for path, other in zip(args.reports[1:], others):
        found = compare(first, other, args.resamples)
        print(f"{path}, compared with {args.reports[0]}: means ± standard errors, difference with its 95 % interval")
        print("\n".join(_lines(found)))
        told.append({"folder": str(path), "metrics": [_as_json(one) for one in found]})
        if args.gate:
            tested = gate(first, other)
            worse = regressions(tested)
            failed |= bool(worse)
            print("\n".join([f"REGRESSION {why}" for why in worse]) or "no regression")
            print("\n".join(_not_known(tested)))
    if args.json:
        artifacts.write_json(args.json, {"first": str(args.reports[0]), "others": told}, sort_keys=False)
    return 1 if failed else 0


def _resampled(values: NDArray[np.float64], resamples: int, drawn: np.random.Generator) -> NDArray[np.float64]:
    count = len(values)
    step = max(1, _AT_A_TIME // count)
    parts = [
        values[drawn.integers(0, count, (min(step, resamples - start), count))].mean(1)
        for start in range(0, resamples, step)
    ]
    return np.concatenate(parts)


def _lines(found: Sequence[Difference]) -> Iterator[str]:
    width = max(len(one.metric) for one in found)
    for one in found:
        means = f"{_told(one.first):>18}  {_told(one.second):>18}"
        interval = f"{one.difference:+10.4g} [{one.low:+.4g}, {one.high:+.4g}]"
        yield f"{one.metric:<{width}}  {means}  {interval:<34} {'paired ' if one.paired else ''}{one.verdict}".rstrip()


def _not_known(tested: Sequence[Tested]) -> Iterator[str]:
    """What "no regression" does not say: the headlines that are undecided by name, the others by number."""
    open_ = undecided(tested)
    for why in open_:
        if why.startswith(HEADLINES):
            yield f"not known: {why}"
    if open_:
        yield (
            f"{len(tested)} metrics tested; {len(open_)} of them may be worse by {WORSENING:g} standard errors: they "
            "need more noises (docs/evaluation.md)"
        )


def _told(metric: Metric) -> str:
    return f"{metric.mean:.4g} ± {metric.error or 0:.2g}"


def _as_json(one: Difference) -> dict[str, object]:
    return {
        "metric": one.metric,
        "first": one.first.mean,
        "second": one.second.mean,
        "difference": one.difference,
        "interval": [one.low, one.high],
        "paired": one.paired,
        "verdict": one.verdict or "no difference told",
    }
