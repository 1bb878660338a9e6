"""What is looked after while Dagster's daemon runs.

Belongs here: sensors. Not here: jobs, schedules, how people are reached (`people`).
"""

import json
import os

import dagster as dg

from assets_defs.captions import caption_file, caption_file_version
from assets_defs.launching import Launcher
from m2m.errors import M2MError
from m2m.stages import STAGES
from orchestration.launchers.process_mark import RUN_TAG, is_lost
from orchestration.people import People, people_to_tell

_CHECKS = [dg.AssetCheckKey(dg.AssetKey(stage.asset), name) for stage in STAGES.values() for name in stage.checks]
_TOLD_IF_SET = dg.DefaultSensorStatus.RUNNING if people_to_tell().ways else dg.DefaultSensorStatus.STOPPED


def fail_lost_runs(instance: dg.DagsterInstance) -> list[str]:
    """Mark runs as failed whose process is gone (a `kill -9`, a power cut): they would hold up the queue for ever."""
    going = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING])
    lost = [run for run in instance.get_runs(going) if RUN_TAG in run.tags and is_lost(run.tags[RUN_TAG])]
    for run in lost:
        instance.report_run_failed(
            run, "The process of this run is gone. What is whole is kept, and the next run goes on from it."
        )
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


@dg.sensor(
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Notices another content of the profile's caption file: filtered_captions is then shown as stale, and "
    "what comes after it once that is made again.",
)
def new_captions(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    """Starts nothing: making image sets again is for a person to decide."""
    try:
        version = caption_file_version().value
    except M2MError as error:
        return dg.SkipReason(str(error))
    if version == context.cursor:
        return dg.SkipReason("the caption file is as it was")
    seen = dg.AssetObservation(caption_file.key, tags={"dagster/data_version": version})
    return dg.SensorResult(asset_events=[seen], cursor=version)


evaluate_what_is_new = dg.AutomationConditionSensorDefinition(
    "evaluate_what_is_new",
    target=dg.AssetSelection.groups("evaluation"),
    minimum_interval_seconds=30,
    run_tags={"dagster/priority": "-1"},  # what people launch goes first
    description="Evaluates a model that was trained anew once its checks hold, and writes the report from that. Off "
    "until it is switched on: an evaluation on the paper's scale takes GPU-days.",
)


@dg.run_failure_sensor(
    minimum_interval_seconds=15,
    default_status=_TOLD_IF_SET,
    description="Tells people (M2M_WEBHOOK, M2M_EMAIL) of a run that failed, and whether it is launched again.",
)
def failed_runs(context: dg.RunFailureSensorContext, people: People) -> None:
    """A run that was cancelled is nobody's news."""
    run = context.dagster_run
    failures = {event.step_key: event.step_failure_data.error for event in context.get_step_failure_events()}
    errors = [f"{step}: {_last_line(error.message)}" for step, error in failures.items() if error]
    again = ["It is launched again by itself."] if run.tags.get("dagster/will_retry") == "true" else []
    told = [*(errors or [context.failure_event.message or ""]), *again, *_page(run.run_id)]
    people.tell(f"m2m: run {run.run_id[:8]} of {run.job_name} failed", "\n".join(told))


@dg.sensor(
    minimum_interval_seconds=15,
    default_status=_TOLD_IF_SET,
    description="Tells people (M2M_WEBHOOK, M2M_EMAIL) of an asset check that does not hold, a regression of the "
    "report among them.",
)
def failed_checks(context: dg.SensorEvaluationContext, people: People) -> dg.SensorResult:
    """Each result once, beginning with those after it was switched on; what could not be told is tried again."""
    latest = context.instance.event_log_storage.get_latest_asset_check_execution_by_key(_CHECKS)
    results = {key: (record, check) for key, record in latest.items() if (check := _result(record.event))}
    seen = json.loads(context.cursor) if context.cursor else None
    told = []
    for key, (record, check) in results.items():
        new = seen is not None and seen.get(key.to_user_string()) != record.id
        if new and not check.passed and check.severity == dg.AssetCheckSeverity.ERROR:
            why = check.metadata["why"].value if "why" in check.metadata else check.description or ""
            name = f"{key.name} of {key.asset_key.to_user_string()}"
            told.append("\n".join([f"{name} does not hold: {why}", *_page(record.run_id)]))
    if told:
        people.tell(f"m2m: {len(told)} check{'s do' if len(told) > 1 else ' does'} not hold", "\n".join(told))
    cursor = {key.to_user_string(): record.id for key, (record, _) in results.items()}
    return dg.SensorResult(cursor=json.dumps(cursor), skip_reason=f"{len(told)} new results do not hold")


def _result(event: dg.EventLogEntry | None) -> dg.AssetCheckEvaluation | None:
    """None of a check that is planned only."""
    said = event.dagster_event.event_specific_data if event and event.dagster_event else None
    return said if isinstance(said, dg.AssetCheckEvaluation) else None


def _page(run_id: str) -> list[str]:
    url = os.environ.get("M2M_DAGSTER_URL")
    return [f"{url.rstrip('/')}/runs/{run_id}"] if url else []


def _last_line(message: str) -> str:
    return message.strip().rpartition("\n")[2]


SENSORS = [lost_runs, new_captions, evaluate_what_is_new, failed_runs, failed_checks]
