"""Whether somebody follows a cluster job: what a run may take up, and what is an orphan.

Belongs here: asking Dagster about the run that launched it. Not here: clusters.
"""

import hashlib
import json
import time
from collections.abc import Sequence

import dagster as dg

from orchestration.launchers.process_mark import RUN_TAG, is_lost


def nobody_follows(instance: dg.DagsterInstance, run_id: str) -> bool:
    """The run that launched it is over or has lost its process. Of another Dagster's runs nothing is known."""
    run = instance.get_run_by_id(run_id)
    return run is not None and (run.is_finished or (RUN_TAG in run.tags and is_lost(run.tags[RUN_TAG])))


def is_over(instance: dg.DagsterInstance, run_id: str, seconds: float) -> bool:
    """The run has ended, and so long ago that no other has taken its job up."""
    record = instance.get_run_record_by_id(run_id)
    if record is None or not record.dagster_run.is_finished:
        return False
    return time.time() - (record.end_time or record.update_timestamp.timestamp()) > seconds


def digest(commands: Sequence[Sequence[str]]) -> str:
    """By which a later run knows a job that does just what it wants done."""
    return hashlib.sha256(json.dumps([list(command) for command in commands]).encode()).hexdigest()[:12]
