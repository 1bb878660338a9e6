"""Whether somebody follows a cluster job: what a run may take up, and what is an orphan.

Belongs here: asking Dagster about the runs that launched it or took it up, how a launch is known again. Not here:
clusters. A run that follows a job holds its id in the tag `TAG/STEP`, TAG being the launcher's own.
"""

import hashlib
import json
import time

import dagster as dg

from orchestration.launchers.process_mark import RUN_TAG, is_lost

_GOING = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.CANCELING]


def may_take_up(instance: dg.DagsterInstance, run_id: str, tag: str, job: str, launched_by: str) -> bool:
    """Whether a run may follow a job: its own of an earlier try, or one that nobody follows any more.

    Of another Dagster's jobs nothing is known, and nothing is taken.
    """
    if _is_followed(instance, tag, job, except_run=run_id):
        return False
    run = instance.get_run_by_id(launched_by)
    return run is not None and (launched_by == run_id or run.is_finished or is_lost(run.tags.get(RUN_TAG, "")))


def is_orphan(instance: dg.DagsterInstance, tag: str, job: str, launched_by: str, seconds: float) -> bool:
    """The run that launched it has been over for so long, and no other has taken it up."""
    record = instance.get_run_record_by_id(launched_by)
    if record is None or not record.dagster_run.is_finished:
        return False
    over = time.time() - (record.end_time or record.update_timestamp.timestamp())
    return over > seconds and not _is_followed(instance, tag, job)


def digest(said: object) -> str:
    """By which a later run knows what does just what it wants done: the same for what is the same in JSON."""
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]


def _is_followed(instance: dg.DagsterInstance, tag: str, job: str, except_run: str | None = None) -> bool:
    """A run with a living process has the job."""
    runs = instance.get_runs(dg.RunsFilter(statuses=_GOING))
    alive = (run for run in runs if run.run_id != except_run and not is_lost(run.tags.get(RUN_TAG, "")))
    return any(name.startswith(f"{tag}/") and held == job for run in alive for name, held in run.tags.items())
