"""What is looked after while Dagster's daemon runs.

Belongs here: sensors. Not here: jobs, schedules.
"""

import dagster as dg

from assets_defs.launching import Launcher
from orchestration.launchers.process_mark import RUN_TAG, is_lost


def fail_lost_runs(instance: dg.DagsterInstance) -> list[str]:
    """Mark runs as failed whose process is gone (a `kill -9`, a power cut): they would hold up the queue for ever."""
    going = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING])
    lost = [run for run in instance.get_runs(going) if RUN_TAG in run.tags and is_lost(run.tags[RUN_TAG])]
    for run in lost:
        instance.report_run_failed(run, "The process of this run is gone. What is whole is kept: launch it again.")
    return [run.run_id for run in lost]


@dg.sensor(
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Marks runs as failed whose process is gone, so that those that wait for them can start, and ends "
    "cluster jobs that no run follows any more.",
)
def lost_runs(context: dg.SensorEvaluationContext, launcher: dg.ResourceParam[Launcher]) -> dg.SkipReason:
    """Starts nothing itself."""
    lost = fail_lost_runs(context.instance)
    orphans = launcher.end_orphans(context.instance)
    done = [
        *([f"marked as failed: {', '.join(lost)}"] if lost else []),
        *([f"ended jobs of runs that are over: {', '.join(orphans)}"] if orphans else []),
    ]
    return dg.SkipReason("; ".join(done) or "no run has lost its process")


SENSORS = [lost_runs]
