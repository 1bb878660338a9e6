"""Dagster's instance in a real Postgres (`services/postgres/up.sh`), set up as deploy/dagster.yaml says."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import dagster as dg
import pytest
import yaml
from own_services import where
from served import dagster
from toy_ground import ROOT
from waiting import wait_for

URL = where("postgres")


def _missing() -> str:
    if not importlib.util.find_spec("dagster_postgres"):
        return "dagster-postgres is not installed: pip install 'm2m[postgres]' (make test-services does it)"
    where = urlsplit(URL)
    try:
        socket.create_connection((where.hostname or "", where.port or 5432), 2).close()
    except OSError:
        return "no Postgres answers here: services/postgres/up.sh starts one (make test-services does it all)"
    return ""


needs_postgres = pytest.mark.skipif(bool(why := _missing()), reason=why)


@pytest.fixture
def team(ground, monkeypatch):
    """The surroundings of a team's Dagster; as deploy/ has them but for the number of runs at once."""
    (ground.folder / "dagster" / "dagster.yaml").write_text((ROOT / "deploy" / "dagster.yaml").read_text())
    monkeypatch.setenv("M2M_PG_URL", URL)
    found_on = [ground.environment["PYTHONPATH"], *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**ground.environment, "M2M_PG_URL": URL, "PYTHONPATH": os.pathsep.join(found_on)}


@pytest.mark.services
@needs_postgres
def test_a_run_and_its_events_are_in_postgres(ground, team):
    command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "toy_definitions", "-j", "data_job"]
    assert subprocess.run(command, env=team, cwd=ground.folder, capture_output=True, check=False).returncode == 0
    with dg.DagsterInstance.from_config(str(ground.folder / "dagster")) as instance:
        assert "Postgres" in type(instance.event_log_storage).__name__
        run = instance.get_runs(limit=1)[0]
        assert run.status == dg.DagsterRunStatus.SUCCESS
        found = instance.fetch_materializations(dg.AssetKey("mis_shards"), limit=3).records
        assert {record.partition_key for record in found} == {"00000", "00001", "00002"}
        assert instance.get_concurrency_config().pool_config.default_pool_limit == 8
    assert not list((ground.folder / "dagster").rglob("*.db")), "nothing of it in SQLite"


@pytest.mark.services
@needs_postgres
def test_the_web_server_and_the_daemon_share_it(ground, team):
    """A run that is launched over GraphQL is queued, taken by the daemon and ends well."""
    with dagster(ground.folder, team) as served:
        launch = """mutation($p: ExecutionParams!) {launchPipelineExecution(executionParams: $p) {
            __typename ... on LaunchRunSuccess {run {runId}} ... on PythonError {message}}}"""
        selector = {
            "repositoryLocationName": "toy_definitions",
            "repositoryName": "__repository__",
            "pipelineName": "data_job",
            "assetSelection": [{"path": ["filtered_captions"]}],
        }
        run = served.ask(launch, p={"selector": selector, "mode": "default"})["launchPipelineExecution"]["run"]["runId"]

        def ended() -> str | None:
            status = next(found["status"] for found in served.runs() if found["runId"] == run)
            return status if status in ("SUCCESS", "FAILURE", "CANCELED") else None

        assert wait_for(ended, 120) == "SUCCESS"


@pytest.mark.services
@pytest.mark.skipif(not importlib.util.find_spec("dagster_postgres"), reason="dagster-postgres is not installed")
def test_a_postgres_that_does_not_answer_is_said(ground, team):
    away = {**team, "M2M_PG_URL": "postgresql+psycopg2://m2m:m2m@127.0.0.1:9/m2m"}
    command = [sys.executable, "-m", "dagster", "job", "execute", "-m", "toy_definitions", "-j", "data_job"]
    done = subprocess.run(command, env=away, cwd=ground.folder, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "127.0.0.1" in done.stderr and "onnection refused" in done.stderr


@pytest.mark.parametrize("name", ["dagster.yaml", "compose.yaml", "helm/values.yaml"])
def test_what_is_deployed_can_be_read(name):
    assert yaml.safe_load((ROOT / "deploy" / name).read_text())


def test_the_teams_dagster_differs_only_in_what_a_team_needs():
    ours, teams = (
        yaml.safe_load((ROOT / path).read_text()) for path in ("orchestration/dagster.yaml", "deploy/dagster.yaml")
    )
    same = ("telemetry", "nux", "run_monitoring", "run_retries", "freshness")
    assert json.dumps([ours[key] for key in same]) == json.dumps([teams[key] for key in same])
