"""Means and spreads over trainings with different seeds, of tables and of curves.

Belongs here: what several seeds' outputs of one evaluation become. Not here: errors within a seed (the evaluations').
"""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from m2m.errors import InputError

Row = Mapping[str, Any]


def rows_over_seeds(tables: Sequence[Sequence[Row]]) -> list[Row]:
    """One seed's table as it is; of several: where numbers differ, their mean and, as "x ±", their deviation.

    Args:
        tables: of each seed, equal rows in equal order; errors within a seed ("x ±") go.

    Raises:
        InputError: the tables are of different rows.
    """
    if len(tables) == 1:
        return list(tables[0])
    if len({len(table) for table in tables}) > 1:
        raise InputError(
            f"seeds' tables have {', '.join(str(len(table)) for table in tables)} rows: evaluate all alike"
        )
    return [_row(rows) for rows in zip(*tables, strict=True)]


def _row(rows: Sequence[Row]) -> Row:
    result: dict[str, Any] = {}
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        if name.endswith(" ±"):
            continue
        if all(value == values[0] for value in values):
            result[name] = values[0]
            continue
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        if len(numbers) < len(values):
            raise InputError(f"seeds' tables differ in {name!r}: {', '.join(map(str, values))}; evaluate all alike")
        result[name], result[f"{name} ±"] = mean(numbers), stdev(numbers)
    return result


def curves_over_seeds(curves: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """The mean of each line at each point, errors ("x ±") become the deviation; the first line is where the points are.

    Raises:
        InputError: the curves have other lines or points.
    """
    if len(curves) == 1:
        return {line: list(values) for line, values in curves[0].items()}
    lines = list(curves[0])
    if any(list(curve) != lines or curve[lines[0]] != curves[0][lines[0]] for curve in curves):
        raise InputError(f"seeds' curves are not all of {', '.join(lines)} at the same points: evaluate all alike")

    def over_seeds(line: str) -> list[float]:
        of, value = (line.removesuffix(" ±"), stdev) if line.endswith(" ±") else (line, mean)
        return [value(values) for values in zip(*(curve[of] for curve in curves), strict=True)]

    return {line: over_seeds(line) for line in lines}
