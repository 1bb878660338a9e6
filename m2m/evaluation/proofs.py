"""Proof of measures: what each has to find out about planted models, and whether it does, by more than its noise.

Belongs here: ranks, the table that tells them. Not here: the planted models (`m2m.evaluation.planted`), measuring them
(`instruments`, `planted_views`, `planted_steps`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2m.evaluation.per_set import Better, Metric
from m2m.stage_run import StageRun

_NOISE = 2.0  # standard errors


@dataclass(frozen=True)
class Rank:
    """What a measure has to find out."""

    better: Better
    pairs: tuple[tuple[str, str], ...]  # planted models, the first of each is better


@dataclass(frozen=True)
class Proof:
    """Planted models measured.

    Attributes:
        found: by planted model, then by measure: values of the same sets for all of them.
        ranks: what each measure has to find out.
        about: how much was measured, in words.
    """

    found: Mapping[str, Mapping[str, Metric]]
    ranks: Mapping[str, Rank]
    about: str

    def failures(self, name: str) -> list[str]:
        """Pairs that a measure does not tell apart, or tells the wrong way round."""
        rank = self.ranks[name]
        sign = 1.0 if rank.better == "higher" else -1.0
        wrong = []
        for first, second in rank.pairs:
            difference = sign * (self.found[first][name].values - self.found[second][name].values)
            error = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else np.inf
            if not difference.mean() > _NOISE * error:
                wrong.append(f"{first} and {second}: {difference.mean():.3g} ± {error:.2g}")
        return wrong

    def tell(self, run: StageRun) -> dict[str, Any]:
        """Put the table into a stage's summary.

        Returns:
            The same for `metrics.json`.
        """
        rows = []
        for name, rank in self.ranks.items():
            row: dict[str, Any] = {"measure": f"{name} {'↑' if rank.better == 'higher' else '↓'}"}
            for kind, metrics in self.found.items():
                row[kind] = f"{metrics[name].mean:.3g} ± {metrics[name].error or 0:.2g}"
            row["should be"] = ", ".join(f"{first} > {second}" for first, second in rank.pairs)
            row["holds"] = "; ".join(self.failures(name)) or "yes"
            rows.append(row)
        held = sum(row["holds"] == "yes" for row in rows)
        run.table(f"Do the measures tell planted models apart ({self.about})", rows)
        run.figure(**{"measures that rank planted models as they should": f"{held} of {len(rows)}"})
        return {
            name: {kind: metrics[name].mean for kind, metrics in self.found.items()} | {"wrong": self.failures(name)}
            for name in self.ranks
        }
