"""What the daemon looks after: captions that change, models that are new, runs and checks that fail."""
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportArgumentType=false

import time
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest
from local_servers import webhook

from assets_defs import captions
from m2m.config import Profile
from m2m.stages import STAGES
from orchestration import sensors
from orchestration.definitions import build_defs, defs
from orchestration.people import NotTold, People


class KeepingLauncher:
    """Makes every asset, with its checks, without running anything."""

    def materialize(self, context, stage, launch, *, shards=None):
        version = dg.DataVersion(f"{stage.key} of {captions.caption_file_version().value}")
        yield dg.MaterializeResult(asset_key=context.asset_key, data_version=version)
        for check in stage.checks:
            yield dg.AssetCheckResult(passed=True, check_name=check, asset_key=context.asset_key)

    def end_orphans(self, instance):
        return []


@pytest.fixture
def instance():
    with dg.instance_for_test() as instance:
        yield instance


@pytest.fixture
def caption_source(tmp_path, monkeypatch):
    source = tmp_path / "captions.tsv"
    source.write_text("u\ta cat\n")
    profile = Profile(tmp_path / "p.yaml", {"filter-captions": {"source": str(source)}}, tmp_path / "out")
    monkeypatch.setattr(captions, "PROFILE", profile)
    return source


def look(instance, cursor=None) -> Any:
    context = dg.build_sensor_context(instance, cursor=cursor)
    return sensors.new_captions(context)


def stale(instance, graph, asset: str, partition: str | None = None) -> StaleStatus:
    resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    return resolver.get_status(dg.AssetKey(asset), partition)


def test_new_captions_make_stale_what_was_made_from_them_and_start_nothing(instance, caption_source):
    made = build_defs(resource_overrides={"launcher": KeepingLauncher()})
    graph = made.resolve_asset_graph()
    assert made.resolve_job_def("data_job").execute_in_process(instance=instance).success
    first = look(instance)
    for event in first.asset_events:
        instance.report_runless_asset_event(event)
    assert stale(instance, graph, "filtered_captions") == StaleStatus.FRESH
    assert isinstance(look(instance, first.cursor), dg.SkipReason)

    caption_source.write_text("u\ta dog\n")
    second = look(instance, first.cursor)
    assert not second.run_requests
    for event in second.asset_events:
        instance.report_runless_asset_event(event)
    assert stale(instance, graph, "filtered_captions") == StaleStatus.STALE
    assert stale(instance, graph, "mis_shards", "00000") == StaleStatus.FRESH
    job = made.resolve_job_def("data_job")
    assert job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey("filtered_captions")]).success
    assert stale(instance, graph, "filtered_captions") == StaleStatus.FRESH
    assert stale(instance, graph, "mis_shards", "00000") == StaleStatus.STALE


def test_a_caption_file_that_is_not_there_is_said(instance, caption_source):
    caption_source.unlink()
    assert "no such file" in look(instance).skip_message


def make(instance, asset: str, *, holds: bool = True) -> None:
    key = dg.AssetKey(asset)
    instance.report_runless_asset_event(dg.AssetMaterialization(key))
    for check in next(stage for stage in STAGES.values() if stage.asset == asset).checks:
        instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(asset_key=key, check_name=check, passed=holds, metadata={}, blocking=True)
        )


def test_a_new_model_is_evaluated_once_its_checks_hold(instance):
    for stage in STAGES.values():
        if stage.group != "data":
            make(instance, stage.asset)

    def due(cursor=None):
        result = dg.evaluate_automation_conditions(defs=defs, instance=instance, cursor=cursor)
        requested = {r.key.to_user_string() for r in result.results if not r.true_subset.is_empty}
        return result.cursor, requested

    cursor, requested = due()
    assert not requested, "what was there when it was switched on is not evaluated"
    cursor, requested = due(cursor)
    assert not requested
    make(instance, "m2m_nvs", holds=False)
    cursor, requested = due(cursor)
    assert not requested, "its checks do not hold"
    make(instance, "m2m_nvs")
    cursor, requested = due(cursor)
    assert requested == {"novel_views", "evaluation_report"}
    make(instance, "novel_views")
    make(instance, "evaluation_report")
    cursor, requested = due(cursor)
    assert not requested
    make(instance, "m2m_self")
    cursor, requested = due(cursor)
    assert requested == {s.asset for s in STAGES.values() if "pretrain@self" in s.inputs.values()}


def test_it_is_off_until_it_is_switched_on():
    sensor = next(s for s in sensors.SENSORS if s.name == "evaluate_what_is_new")
    assert sensor.default_status == dg.DefaultSensorStatus.STOPPED


def failing_run(instance, message: str = "bad input") -> dg.DagsterRun:
    class Failing(KeepingLauncher):
        def materialize(self, context, stage, launch, *, shards=None):
            yield dg.AssetCheckResult(
                passed=False, check_name="counts_add_up", asset_key=context.asset_key, metadata={"why": "3 are missing"}
            )
            raise dg.Failure(message, allow_retries=False)

    job = build_defs(resource_overrides={"launcher": Failing()}).resolve_job_def("data_job")
    result = job.execute_in_process(
        instance=instance, asset_selection=[dg.AssetKey("filtered_captions")], raise_on_error=False
    )
    assert not result.success
    return result.dagster_run


def test_people_hear_of_a_failed_run(instance, monkeypatch):
    monkeypatch.setenv("M2M_DAGSTER_URL", "https://dagster.example.org/")
    run = failing_run(instance)
    (failed,) = [e for e in instance.all_logs(run.run_id) if e.dagster_event and e.dagster_event.is_run_failure]
    with webhook() as hook:
        context = dg.build_run_status_sensor_context(
            sensor_name="failed_runs",
            dagster_instance=instance,
            dagster_run=run,
            dagster_event=failed.dagster_event,
        ).for_run_failure()
        sensors.failed_runs(context, people=People(webhook=hook.url))
    (said,) = (heard["text"] for heard in hook.heard)
    assert f"run {run.run_id[:8]} of data_job failed" in said and "bad input" in said
    assert said.endswith(f"https://dagster.example.org/runs/{run.run_id}")


def test_people_hear_of_a_check_that_does_not_hold_once(instance):
    def tick(cursor, people) -> Any:
        context = dg.build_sensor_context(instance, cursor=cursor)
        result: Any = sensors.failed_checks(context, people=people)
        return result.cursor

    failing_run(instance)
    with webhook() as hook:
        people = People(webhook=hook.url)
        cursor = tick(None, people)
        assert not hook.heard, "what was there before it was switched on is no news"
        failing_run(instance)
        with pytest.raises(NotTold):
            tick(cursor, People(webhook="http://127.0.0.1:9/"))
        cursor = tick(cursor, people)
        said = "m2m: 1 check does not hold\ncounts_add_up of filtered_captions does not hold: 3 are missing"
        assert [heard["text"] for heard in hook.heard] == [said]
        tick(cursor, people)
        assert len(hook.heard) == 1


def test_a_run_that_lost_its_process_is_launched_again_and_a_failed_stage_is_not(ground):
    with dg.DagsterInstance.from_config(str(ground.folder / "dagster")) as instance:
        failed = failing_run(instance)
        lost = instance.create_run_for_job(defs.resolve_job_def("data_job"), status=dg.DagsterRunStatus.STARTED)
        instance.report_run_failed(lost)
        deadline = time.monotonic() + 5
        while "dagster/will_retry" not in instance.get_run_by_id(lost.run_id).tags and time.monotonic() < deadline:
            time.sleep(0.05)
        assert instance.get_run_by_id(lost.run_id).tags["dagster/will_retry"] == "true"
        assert instance.get_run_by_id(failed.run_id).tags["dagster/will_retry"] == "false"
        assert instance.run_monitoring_max_resume_run_attempts == 0
        assert instance.get_concurrency_config().pool_config.default_pool_limit == 1
