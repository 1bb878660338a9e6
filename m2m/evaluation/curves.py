"""The report's curves as rows, a file a curve, for tools that draw their own: DVC's plots, notebooks.

Belongs here: what a file holds, what it is called. Not here: which curves there are (each evaluation's summary), the
page's own charts (`m2m.evaluation.charts`).
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from m2m import artifacts
from m2m.evaluation.charts import ERROR

CURVES = "curves"
"""Folder beside the page."""


def write_curves(folder: Path, of: str, title: str, curves: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Write each curve as rows of `curve`, `of` (which line), `x`, `value` and, where it is known, `error`.

    Args:
        of: whose curves, for files' names, for example evaluate-novel_views.
        title: the same for people, for example Novel views.
        curves: columns by the curve's name; the first column is x.
    """
    folder.mkdir(exist_ok=True)
    for name, columns in curves.items():
        x_name, *lines = [column for column in columns if not column.endswith(ERROR)]
        shown = f"{title}: {name}" if x_name in name else f"{title}: {name}, by {x_name}"
        rows = []
        for line in lines:
            errors = columns.get(f"{line}{ERROR}")
            for place, (x, value) in enumerate(zip(columns[x_name], columns[line], strict=True)):
                if not math.isfinite(value):  # no case, no point: JSON knows no such number
                    continue
                row = {"curve": shown, "of": line, "x": x, "value": value}
                rows.append(row if errors is None else {**row, "error": errors[place]})
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        artifacts.write_json(folder / f"{of}-{slug}.json", rows)
