"""The only entry point: what Dagster loads (`-m orchestration.definitions`).

Belongs here: putting assets, jobs, schedules, sensors and resources together. Not here: any of them.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from assets_defs import captions, evaluation, features, finetuning, image_sets, pretraining
from orchestration.code_references import with_code_references
from orchestration.jobs import JOBS
from orchestration.launchers.chosen import chosen_launcher
from orchestration.lineage.chosen import with_recorders
from orchestration.people import people_to_tell
from orchestration.schedules import SCHEDULES
from orchestration.sensors import SENSORS


def build_defs(*, resource_overrides: Mapping[str, Any] | None = None) -> dg.Definitions:
    """Dagster's definitions for the profile of `M2M_PROFILE` and the launcher of `M2M_LAUNCHER`.

    Args:
        resource_overrides: resources in place of the usual ones, for example another `launcher`.
    """
    resources = {"launcher": chosen_launcher(), "people": people_to_tell(), **(resource_overrides or {})}
    modules = [captions, image_sets, features, pretraining, finetuning, evaluation]
    return dg.Definitions(
        assets=with_code_references(dg.load_assets_from_modules(modules)),
        jobs=JOBS,
        schedules=SCHEDULES,
        sensors=SENSORS,
        resources={**resources, "launcher": with_recorders(resources["launcher"])},
        executor=dg.in_process_executor,  # a step only waits for the process that does its work
    )


defs = build_defs()
