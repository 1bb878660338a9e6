"""Asset checks: what a stage promises of its output.

Belongs here: declaring them. Not here: checking. The stage checks before its output is put in place, so that a broken
promise stops what comes after it on every way of running, Dagster or not.
"""

import dagster as dg

from m2m.stages import Stage


def check_specs(stage: Stage) -> list[dg.AssetCheckSpec]:
    """The stage's checks; each blocks what is downstream."""
    return [
        dg.AssetCheckSpec(
            name, asset=stage.asset, blocking=True, description=f"{name.replace('_', ' ').capitalize()} ({stage.key})."
        )
        for name in stage.checks
    ]
