"""`dagster job execute`, as a user runs it: one run over all shards, killed, cancelled, started again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from toy_ground import Ground
from waiting import wait_for

from m2m.stages import STAGES
from orchestration.definitions import defs
from orchestration.sensors import fail_lost_runs


def execute(ground, job: str, **config) -> subprocess.Popen[bytes]:
    given = []
    if config:
        (ground.folder / "launch.json").write_text(json.dumps({"ops": config}))
        given = ["--config", str(ground.folder / "launch.json")]
    return subprocess.Popen(
        [sys.executable, "-m", "dagster", "job", "execute", "-m", "toy_definitions", "-j", job, *given],
        env=ground.environment,
        cwd=ground.folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def manifests(ground) -> dict[str, bytes]:
    return {str(p.relative_to(ground.outputs)): p.read_bytes() for p in ground.outputs.rglob("manifest.json")}


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Ground:
    """Where the whole pipeline has run once."""
    ground = Ground.laid(tmp_path_factory.mktemp("finished"))
    assert execute(ground, "m2m_pipeline").wait() == 0
    return ground


def test_the_whole_pipeline_is_one_run_with_an_event_a_shard(finished):
    ground = finished
    assert len(manifests(ground)) == len(STAGES)
    with dg.DagsterInstance.from_config(str(ground.folder / "dagster")) as instance:
        (run,) = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.SUCCESS
        for stage in STAGES.values():
            found = instance.fetch_materializations(dg.AssetKey(stage.asset), limit=10).records
            keys = {record.partition_key for record in found}
            assert len(found) == len(keys)
            assert keys == ({"00000", "00001", "00002"} if stage.partitioned else {None})
            with_picture = [r for r in found if r.asset_materialization and "white" in r.asset_materialization.metadata]
            assert len(with_picture) == 1
        logs = list((ground.folder / "dagster" / "storage" / run.run_id / "compute_logs").iterdir())
        assert any("report on stdout" in log.read_text() for log in logs if log.suffix == ".out")
        assert any("report on stderr" in log.read_text() for log in logs if log.suffix == ".err")


def stale(ground) -> set[str]:
    argv = [sys.executable, str(Path(__file__).with_name("stale_assets.py"))]
    return set(subprocess.run(argv, env=ground.environment, capture_output=True, text=True, check=True).stdout.split())


def test_a_changed_setting_is_seen_before_anything_is_run(finished):
    """The same as DVC would run then: `test_repro_after_recording_runs_only_what_a_changed_param_reaches`."""
    assert stale(finished) == set()
    profile = finished.folder / "configs" / "toy.yaml"
    same = profile.read_text().replace("{shards: 3}", "{shards: 3, resources: {cpus: 2}}")
    profile.write_text(f"{same}finetune: {{value: 66}}\n")
    found = stale(finished)
    assert found == {"m2m_nvs", "m2m_vgsi"}  # as `dvc status` says: where the change is, not what comes after
    reached = dg.AssetSelection.assets(*found).downstream().resolve(defs.resolve_asset_graph())
    after = {"novel_views", "procedures", "evaluation_report"}
    assert {key.to_user_string() for key in reached} == {"m2m_nvs", "m2m_vgsi", *after}


def start_and_strike(ground, how: signal.Signals) -> int:
    """Start the data job, strike Dagster while image sets are being made; returns the pid of the stage's process."""
    dagster = execute(ground, "data_job", mis_shards={"config": {"overrides": ["act=sleep"]}})
    stage = int(wait_for(lambda: (ground.outputs / "asleep").exists() and (ground.outputs / "asleep").read_text()))
    assert is_running(stage)
    os.kill(dagster.pid, how)
    assert dagster.wait(60) != 0
    return stage


@pytest.mark.skipif(sys.platform != "linux", reason="a process is tied to its parent on Linux")
def test_a_stage_dies_with_dagster_and_the_next_run_goes_on(ground):
    stage = start_and_strike(ground, signal.SIGKILL)
    wait_for(lambda: not is_running(stage), 10)
    with dg.DagsterInstance.from_config(str(ground.folder / "dagster")) as instance:
        (run,) = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.STARTED
        assert fail_lost_runs(instance) == [run.run_id] and fail_lost_runs(instance) == []
    before = manifests(ground)
    assert set(before) == {"filter-captions/manifest.json"}
    assert execute(ground, "data_job").wait() == 0
    assert len(manifests(ground)) == 3 and manifests(ground).items() >= before.items()


def test_an_interrupted_run_ends_its_stage_first(ground):
    assert not is_running(start_and_strike(ground, signal.SIGINT))
    with dg.DagsterInstance.from_config(str(ground.folder / "dagster")) as instance:
        (run,) = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.FAILURE  # cancelled only where somebody asked Dagster for it
