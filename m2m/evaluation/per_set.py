"""Values by set whose mean is a metric: what error bars, comparisons and the regression gate are made of.

Belongs here: collecting them, their file, errors of means, ratios and jackknifed scores. Not here: comparing two
evaluations (`m2m.evaluation.compare`).
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from m2m import artifacts
from m2m.errors import ArtifactError, InputError

PER_SET = "per_set.parquet"
Better = Literal["higher", "lower", "neither"]
_COLUMNS = ("metric", "unit", "value", "better")
_OF_NOISES = ("noises", "spread")  # columns of means over several noises alone


@dataclass(frozen=True)
class Metric:
    """One metric as the mean of equally weighted values, one a set (or object, procedure, block of sets)."""

    values: NDArray[np.float64]  # (units,)
    units: NDArray[np.int64]  # (units,): which set; equal units of two evaluations are compared with each other
    better: Better = "neither"
    noises: int = 1  # over which each value is a mean
    spread: NDArray[np.float64] | None = None  # (units,): variance of one noise's value, where there are several

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for a single value."""
        return float(self.values.std(ddof=1) / np.sqrt(len(self.values))) if len(self.values) > 1 else None


class PerSet:
    """The metrics of one evaluation, by name."""

    def __init__(self) -> None:
        self.metrics: dict[str, Metric] = {}

    def add(
        self, name: str, values: Tensor | NDArray, better: Better = "neither", units: Sequence[int] | None = None
    ) -> Metric:
        """Keep a metric's values.

        Args:
            values: (units,) or (units, ...), of which the mean is taken.
            units: numbers of the sets; their places by default.

        Raises:
            InputError: no values, values that are not finite, or not one for each unit.
        """
        array = np.asarray(values, np.float64)
        array = array.reshape(len(array), -1).mean(1) if array.size else array.reshape(-1)
        numbers = np.arange(len(array)) if units is None else np.asarray(units, np.int64)
        if not len(array) or len(numbers) != len(array):
            raise InputError(f"{name}: {len(array)} values for {len(numbers)} sets")
        if not np.isfinite(array).all():
            raise InputError(f"{name}: {(~np.isfinite(array)).sum()} of {len(array)} values are not finite")
        self.metrics[name] = Metric(array, numbers.astype(np.int64), better)
        return self.metrics[name]

    def write(self, folder: Path) -> None:
        write_per_set(folder / PER_SET, self.metrics)


def write_per_set(path: Path, metrics: dict[str, Metric]) -> None:
    """One row a metric and set: `metric`, `unit`, `value`, `better`; of means over noises also `noises`, `spread`."""
    counts = [len(metric.values) for metric in metrics.values()]
    columns = [
        pa.array(np.repeat(np.array(list(metrics), object), counts), pa.string()).dictionary_encode(),
        pa.array(np.concatenate([m.units for m in metrics.values()] or [np.empty(0, np.int64)]), pa.int64()),
        pa.array(np.concatenate([m.values for m in metrics.values()] or [np.empty(0)]), pa.float64()),
        pa.array(
            np.repeat(np.array([m.better for m in metrics.values()], object), counts), pa.string()
        ).dictionary_encode(),
    ]
    names: list[str] = list(_COLUMNS)
    if any(metric.noises > 1 for metric in metrics.values()):
        names += _OF_NOISES
        spreads = [np.zeros(len(m.values)) if m.spread is None else m.spread for m in metrics.values()]
        columns.append(pa.array(np.repeat([m.noises for m in metrics.values()], counts), pa.int64()))
        columns.append(pa.array(np.concatenate(spreads), pa.float64()))
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, names=names), buffer, compression="zstd")
    artifacts.write_bytes(path, buffer.getvalue())


def read_per_set(path: Path) -> dict[str, Metric]:
    """Metrics by name, in the order in which they were written.

    Raises:
        ArtifactError: missing, or not such a file.
    """
    try:
        table = pq.read_table(path)
        names, units, values, better = (table[column].to_numpy(zero_copy_only=False) for column in _COLUMNS)
        noises, spreads = np.ones(len(names), np.int64), np.zeros(len(names))
        if _OF_NOISES[0] in table.column_names:
            noises, spreads = (table[column].to_numpy(zero_copy_only=False) for column in _OF_NOISES)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ArtifactError(f"{path}: no values by set can be read here: {str(error).splitlines()[0]}") from None
    found: dict[str, Metric] = {}
    for name in dict.fromkeys(names):
        rows = names == name
        count = int(noises[rows][0])
        spread = spreads[rows].astype(np.float64) if count > 1 else None
        found[str(name)] = Metric(
            values[rows].astype(np.float64), units[rows].astype(np.int64), better[rows][0], count, spread
        )
    return found


def averaged(evaluations: Sequence[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Each metric's mean over evaluations, set by set, and how much these vary.

    Raises:
        InputError: they are not of the same sets.
    """
    first, *others = evaluations
    if not others:
        return dict(first)
    found = {}
    for name, metric in first.items():
        values = [metric.values]
        for other in others:
            if name not in other or not np.array_equal(other[name].units, metric.units):
                raise InputError(f"{name}: evaluations of other sets can't be averaged by set")
            values.append(other[name].values)
        found[name] = replace(metric, values=np.mean(values, 0), noises=len(values), spread=np.var(values, 0, ddof=1))
    return found


def open_per_set(path: Path) -> dict[str, Metric]:
    """Values by set of a report, of one evaluation, or of a profile's outputs folder.

    Raises:
        ArtifactError: none of them there, or they can't be read.
    """
    places = [path, path / PER_SET, path / "report" / PER_SET]
    return read_per_set(next((place for place in places if place.is_file()), path / PER_SET))


def ratio_values(numerator: Tensor, denominator: Tensor) -> NDArray[np.float64]:
    """Values by set whose mean is sum(numerator) / sum(denominator), and whose spread gives that ratio's error.

    The ratio's linearisation (Taylor's method for survey ratios): r + (numerator - r denominator) / mean denominator.

    Args:
        numerator, denominator: (sets,); a set with a denominator of 0 says nothing.

    Raises:
        InputError: all denominators are 0.
    """
    top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    if not bottom.sum():
        raise InputError("a rate over no case at all")
    ratio = top.sum() / bottom.sum()
    return ratio + (top - ratio * bottom) / bottom.mean()


def jackknife(
    score: Callable[[NDArray[np.int64]], float], count: int, blocks: int
) -> tuple[float, NDArray[np.float64] | None]:
    """A score of all samples, and values whose mean is the score and whose spread gives its error.

    For scores that are no mean over sets, such as FID: each block of sets is left out once (delete-a-group jackknife;
    Kott, 2001), and the pseudo-values are centred on the score of all.

    Args:
        score: of the samples with these numbers.
        blocks: groups of neighbouring samples, each left out once; at most `count`.

    Returns:
        The score, and (blocks,) values; None of fewer than two blocks, and where leaving a block out leaves too few
        samples (`score` refuses them).
    """
    everything = np.arange(count)
    whole = score(everything)
    if min(blocks, count) < 2:
        return whole, None
    parts = np.array_split(everything, min(blocks, count))
    try:
        without = np.array([score(np.setdiff1d(everything, part)) for part in parts])
    except InputError:
        return whole, None
    return whole, whole + (len(parts) - 1) * (without.mean() - without)
