"""What keeps outputs up to date: when an asset is due by itself, and how old it may grow.

Belongs here: automation conditions, freshness policies. Not here: the sensor that acts on them and the schedule
(`orchestration`), what is current (a stage's fingerprint).
"""

import os
from datetime import timedelta
from typing import Any

import dagster as dg

from m2m.errors import ConfigError

_MODELS = dg.AssetSelection.groups("models")
_EVALUATIONS = dg.AssetSelection.groups("evaluation")


def _renewed(inputs: dg.AssetSelection, label: str) -> dg.AutomationCondition:
    """Of the asset's inputs only these count: one was made anew by another run, and all are there with their checks."""
    condition = dg.AutomationCondition
    renewed: Any = (
        condition.any_deps_updated().allow(inputs).since_last_handled()
        & condition.all_deps_blocking_checks_passed().allow(inputs)
        & ~condition.any_deps_missing().allow(inputs)
        & ~condition.any_deps_in_progress().allow(inputs)
        & ~condition.in_progress()
    )
    return renewed.with_label(label)


WHEN_TRAINED = _renewed(_MODELS, "a model it evaluates is new, and the checks of all of them hold")
WHEN_EVALUATED = _renewed(_EVALUATIONS, "an evaluation is new, and the checks of all of them hold")


def report_freshness() -> dg.FreshnessPolicy:
    """The report is late after `M2M_REPORT_DAYS` (14), and said to be due after half of that.

    Raises:
        ConfigError: not a number of days.
    """
    given = os.environ.get("M2M_REPORT_DAYS", "14")
    try:
        days = float(given)
    except ValueError:
        days = 0.0
    if not 0.01 <= days <= 10_000:
        raise ConfigError(f"M2M_REPORT_DAYS is {given!r}; it must be a number of days, for example 14")
    return dg.FreshnessPolicy.time_window(fail_window=timedelta(days=days), warn_window=timedelta(days=days / 2))
