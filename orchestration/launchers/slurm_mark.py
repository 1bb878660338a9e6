"""How a job of this project is told from others, by what Slurm itself keeps of it.

Belongs here: what a job's comment says, whether a run still follows the job. Not here: Slurm's commands (`slurm_jobs`),
what is done about a job (`slurm`).
"""

import time
from dataclasses import dataclass

import dagster as dg

from orchestration.launchers.process_mark import RUN_TAG, is_lost

JOB_TAG = "m2m/slurm_job"
"""Of a run; `JOB_TAG/STEP` holds the job's id."""
_GOING = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.CANCELING]


@dataclass(frozen=True)
class Mark:
    """What a job's comment says: who launched it, what it does, where its files lie."""

    run: str
    commands: str
    folder: str

    def written(self) -> str:
        return f"m2m:{self.run}:{self.commands}:{self.folder}"

    @classmethod
    def read(cls, comment: str) -> "Mark | None":
        first, *rest = comment.split(":")
        return cls(*rest) if first == "m2m" and len(rest) == 3 else None


def followed(instance: dg.DagsterInstance, except_run: str | None = None) -> set[str]:
    """Jobs that a run with a living process follows."""
    runs = instance.get_runs(dg.RunsFilter(statuses=_GOING))
    alive = [run for run in runs if run.run_id != except_run and not is_lost(run.tags.get(RUN_TAG, ""))]
    return {job for run in alive for tag, job in run.tags.items() if tag.startswith(JOB_TAG)}


def over(instance: dg.DagsterInstance, run_id: str, seconds: float) -> bool:
    """Whether a run has been over for so long; of a run that the instance does not know, nothing is known."""
    record = instance.get_run_record_by_id(run_id)
    if record is None or not record.dagster_run.is_finished:
        return False
    return time.time() - (record.end_time or record.update_timestamp.timestamp()) > seconds
