"""Stages as jobs of a real Ray cluster on loopback (`services/ray/up.sh`)."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

import dataclasses
import importlib.util
import os
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from test_jobs_end_to_end import wait_for
from test_outcome import checks, failure

from m2m.config import load_profile
from orchestration.definitions import build_defs
from orchestration.launchers import ray as launching
from orchestration.launchers.ray import RayLauncher

ADDRESS = os.environ.get("M2M_RAY") or "http://127.0.0.1:8266"  # of the project's own, never RAY_ADDRESS: a user's
TOY = [sys.executable, str(Path(__file__).with_name("toy_stages.py"))]


def _missing() -> str:
    if not all(importlib.util.find_spec(name) for name in ("ray", "dagster_ray")):
        return "ray is not installed: pip install 'm2m[ray]' (make test-services does it)"
    try:
        urllib.request.urlopen(f"{ADDRESS}/api/jobs/", timeout=10).close()
    except OSError:
        return "no Ray answers here: services/ray/up.sh starts one (make test-services does it all)"
    return ""


pytestmark = [pytest.mark.services, pytest.mark.skipif(bool(why := _missing()), reason=why)]


@dataclasses.dataclass
class Place:
    settings: dict[str, Any]
    instance: dg.DagsterInstance
    outputs: Path

    def launcher(self, **more) -> RayLauncher:
        return RayLauncher(**{**self.settings, **more})

    def run(self, asset: str, act: str = "work", tags: dict[str, str] | None = None, **more):
        return (
            build_defs(resource_overrides={"launcher": self.launcher(**more)})
            .resolve_job_def("m2m_pipeline")
            .execute_in_process(
                asset_selection=[dg.AssetKey(asset)],
                run_config={"ops": {asset: {"config": {"overrides": [f"act={act}"]}}}},
                tags=tags,
                raise_on_error=False,
                instance=self.instance,
            )
        )

    def jobs(self) -> list[Any]:
        """Of this test."""
        listed = self.launcher()._connected().list_jobs()
        return [job for job in listed if (job.metadata or {}).get("m2m_folder", "").startswith(str(self.outputs))]


@pytest.fixture
def place(ground, monkeypatch):
    monkeypatch.setattr(launching, "PROFILE", load_profile(ground.environment["M2M_PROFILE"]))
    with dg.instance_for_test() as instance:
        settings = {"address": ADDRESS, "command": TOY, "poll_seconds": 0.5, "runtime_env": {"env_vars": {}}}
        place = Place(settings, instance, ground.outputs.resolve())
        yield place
        for job in place.jobs():
            place.launcher()._connected().stop_job(job.submission_id)


def with_resources(ground, monkeypatch, **asked) -> None:
    text = f"generate-sets: {{shards: 3}}\ncache-features: {{shards: 3}}\nfilter-captions: {{resources: {asked}}}\n"
    (ground.folder / "configs" / "toy.yaml").write_text(text)
    monkeypatch.setattr(launching, "PROFILE", load_profile(ground.environment["M2M_PROFILE"]))


def test_a_stage_is_a_job_and_what_it_says_is_heard(place):
    result = place.run("filtered_captions")
    assert result.success and checks(result) == {"counts_add_up": True, "captions_kept": True}
    (made,) = result.asset_materializations_for_node("filtered_captions")
    assert made.metadata["white"].value.startswith("![white](data:image/png;base64,")
    assert "filter-captions on stderr" in (Path(made.metadata["ray_files"].value) / "0.err").read_text()


def test_a_range_of_shards_is_one_job_of_a_task_each(place):
    assert place.run("filtered_captions").success
    keys = {"dagster/asset_partition_range_start": "00000", "dagster/asset_partition_range_end": "00002"}
    result = place.run("mis_shards", tags=keys)
    assert result.success and len(result.asset_materializations_for_node("mis_shards")) == 3
    assert (place.outputs / "generate-sets" / "manifest.json").exists()
    assert len(place.jobs()) == 2


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("fail", "filter-captions failed: in.tsv:3: no tab between URL and caption"),
        ("be killed", "filter-captions was killed by signal 9"),
    ],
)
def test_a_failed_stage_says_why_and_is_not_tried_again(place, act, said):
    assert said in failure(place.run("filtered_captions", act)).error.message
    assert len(place.jobs()) == 1


def test_a_stage_that_was_stopped_after_a_checkpoint_goes_on(place):
    assert place.run("filtered_captions", "stop once").success
    assert len(place.jobs()) == 2


def test_a_cancelled_run_leaves_no_process(place, monkeypatch):
    asleep, sleep = place.outputs / "asleep", time.sleep

    def interrupted(seconds):
        if threading.current_thread() is threading.main_thread() and asleep.exists() and not interrupted.done:
            interrupted.done = True
            raise dg.DagsterExecutionInterruptedError()
        sleep(seconds)

    interrupted.done = False
    monkeypatch.setattr(launching.time, "sleep", interrupted)
    assert not place.run("filtered_captions", "sleep").success and interrupted.done
    pid = int(asleep.read_text())
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), 5)
    assert all(job.status.is_terminal() for job in place.jobs())


def leave_behind(place, monkeypatch, act: str) -> None:
    """A run whose process goes, and can do nothing more about its job."""
    from dagster_ray import PipesRayJobClient

    start = PipesRayJobClient._start

    def die(self, *given):
        start(self, *given)
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:  # before the client looks after the job
        dying.setattr(PipesRayJobClient, "_start", die)
        place.run("filtered_captions", act)
    wait_for(lambda: (place.outputs / "asleep").exists())


def test_a_job_that_a_lost_run_left_is_taken_up_and_not_launched_twice(place, monkeypatch):
    leave_behind(place, monkeypatch, "wait")

    def wake_when_followed():
        def followed():
            going = [run for run in place.instance.get_runs() if not run.is_finished]
            return any(tag.startswith(launching.JOB_TAG) for run in going for tag in run.tags)

        wait_for(followed)
        (place.outputs / "wake").touch()

    waking = threading.Thread(target=wake_when_followed)
    waking.start()
    assert place.run("filtered_captions", "wait").success
    waking.join()
    assert len(place.jobs()) == 1


def test_an_orphan_is_ended(place, monkeypatch):
    leave_behind(place, monkeypatch, "sleep")
    assert len(place.launcher(orphan_seconds=-1.0).end_orphans(place.instance)) == 1
    pid = int((place.outputs / "asleep").read_text())
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), 10)


def test_a_training_of_several_processes_is_one_job(place, ground, monkeypatch):
    """The toy does not train together: what is seen is that each process is told its place."""
    with_resources(ground, monkeypatch, gpus=2, cpus=2, memory_gb=1)
    show = "import os, sys; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], file=sys.stderr)"
    place.run("filtered_captions", command=[sys.executable, "-c", show])
    (job,) = place.jobs()
    said = (Path(job.metadata["m2m_folder"]) / "0.err").read_text()
    assert sorted(said.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]


def test_more_gpus_than_there_are_is_said_at_launch(place, ground, monkeypatch):
    with_resources(ground, monkeypatch, gpus=64, memory_gb=1)
    message = failure(place.run("filtered_captions")).error.message
    assert "asks for 1 node(s) of 1 CPUs, 64 GPUs" in message and "Set the stage's resources" in message


def test_a_cluster_that_does_not_answer_is_said(place):
    message = failure(place.run("filtered_captions", address="http://127.0.0.1:9")).error.message
    assert "Ray does not answer at http://127.0.0.1:9" in message and "Set the launcher's address" in message
