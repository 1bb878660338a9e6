"""What clusters do to stages on a real Ray: each ends in the right state, nothing is lost, left over or done twice."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

import json
import os
import signal

import pytest
from ray_ground import (
    RayPlace,
    before_its_nodes_are_up,
    is_gone,
    kill,
    needs_ray,
    node_of,
    one_more_node,
    parent,
    ray_place,
)
from test_jobs_end_to_end import wait_for
from test_outcome import failure
from toy_ray_definitions import toy_launcher

from orchestration.launchers import ray as launching
from orchestration.sensors import fail_lost_runs

pytestmark = [*needs_ray, pytest.mark.timeout(900)]


@pytest.fixture
def place(ground, monkeypatch):
    with ray_place(ground, monkeypatch) as place:
        yield place


def retries(result) -> int:
    return len([event for event in result.all_events if event.is_step_up_for_retry])


def materialize(act: str) -> list[str]:
    """Arguments of `dagster`, as a user gives them."""
    config = {"ops": {"filtered_captions": {"config": {"overrides": [f"act={act}"]}}}}
    return ["asset", "materialize", "--select", "filtered_captions", "--config-json", json.dumps(config)]


def steps_done_twice(place: RayPlace, what: str) -> set[int]:
    steps = [int(step.split()[1]) for step in place.steps() if step.startswith(f"{what} ")]
    assert set(steps) == set(range(1, 13))
    return {step for step in steps if steps.count(step) > 1}


def test_a_cluster_whose_nodes_are_still_starting_is_waited_for(place: RayPlace):
    with before_its_nodes_are_up(times=2) as address:
        assert place.run(address=address).success
    assert len(place.jobs()) == 1


def test_a_cluster_whose_nodes_never_come_says_so(place: RayPlace, monkeypatch):
    monkeypatch.setattr(launching, "_NODES_START", 1)
    with before_its_nodes_are_up(times=1000) as address:
        result = place.run(address=address)
    assert f"no node of the Ray cluster at {address} takes jobs" in failure(result).error.message
    assert not place.jobs()


def test_a_signal_to_the_stage_is_its_checkpoint_and_another_job_goes_on_from_there(place: RayPlace):
    def ask_to_end():
        os.kill(place.at_the_gate(), signal.SIGTERM)
        wait_for(lambda: len(place.jobs()) == 2)
        place.open_the_gate()

    result = place.run(act="steps", meanwhile=ask_to_end)
    assert result.success and retries(result) == 1 and len(place.jobs()) == 2
    assert not steps_done_twice(place, "training")


def strike_worker(stage: int) -> None:
    kill(parent(stage))


def strike_supervisor(place: RayPlace) -> None:
    """Ray's own process that started the job and looks after it."""
    folder = place.jobs()[-1].metadata["m2m_folder"]
    driver = next(pid for pid, line in processes() if "ray_driver" in line and folder in line and "/bin/sh" not in line)
    kill(parent(driver))


def processes() -> list[tuple[int, str]]:
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"{entry.path}/cmdline", "rb") as file:
                    found.append((int(entry.name), file.read().replace(b"\0", b" ").decode(errors="replace")))
            except OSError:
                continue
    return found


@pytest.mark.parametrize(("what", "jobs"), [("worker", 1), ("supervisor", 2)])
def test_a_killed_process_of_rays_is_made_up_for(place: RayPlace, what, jobs):
    def strike():
        stage = place.at_the_gate()
        strike_worker(stage) if what == "worker" else strike_supervisor(place)
        wait_for(lambda: is_gone(stage))  # not two at one output
        place.open_the_gate()

    assert place.run(act="steps", meanwhile=strike).success
    assert len(place.jobs()) == jobs
    assert steps_done_twice(place, "training") == {6, 7, 8}  # since the checkpoint at 5


def test_a_lost_node_is_made_up_for_by_another(place: RayPlace):
    place.ask_for(gpu_type="spot", memory_gb=1)
    place.make_here("filter-captions")

    def lose():
        stage = place.at_the_gate("shard-1")
        kill(node_of(stage))
        wait_for(lambda: is_gone(stage))
        place.open_the_gate()

    with one_more_node(spot=1), one_more_node(spot=1):
        result = place.run("mis_shards", act="steps", meanwhile=lose, gpu_types={"spot": {"spot": 1}})
    assert result.success and retries(result) == 0 and len(place.jobs()) == 1
    assert steps_done_twice(place, "shard-1") == set(range(1, 9))


def test_a_job_that_is_stopped_by_hand_is_not_tried_again(place: RayPlace):
    result = place.run(act="sleep", meanwhile=lambda: place.asleep() and place.stop_jobs())
    assert "was stopped on the cluster; what is whole is kept" in failure(result).error.message
    assert len(place.jobs()) == 1


def test_a_cancelled_run_leaves_no_process_and_loses_no_step(place: RayPlace):
    with place.started(*materialize("steps")) as process:
        stage = place.at_the_gate()
        process.send_signal(signal.SIGINT)
        wait_for(lambda: is_gone(stage))
        process.wait(120)
    (job,) = place.jobs()
    assert job.status.value == "STOPPED"
    place.open_the_gate()
    assert place.run(act="steps").success
    assert not steps_done_twice(place, "training")  # the stage was asked, and saved the step that it was at


def test_after_kill_9_of_dagster_the_job_is_taken_up_and_not_launched_twice(place: RayPlace):
    with place.started(*materialize("steps")) as process:
        stage = place.at_the_gate()
        process.kill()
    assert fail_lost_runs(place.instance) and toy_launcher().end_orphans(place.instance) == []  # not at once

    def wake_when_followed():
        def followed():
            going = [run for run in place.instance.get_runs() if not run.is_finished]
            return any(tag.startswith(launching.JOB_TAG) for run in going for tag in run.tags)

        wait_for(followed)
        place.open_the_gate()

    result = place.run(act="steps", meanwhile=wake_when_followed)
    assert result.success and len(place.jobs()) == 1
    assert not steps_done_twice(place, "training")
    assert {int(step.split()[2]) for step in place.steps()} == {stage}
    (made,) = result.asset_materializations_for_node("filtered_captions")
    assert made.metadata["white"].value.startswith("![white](data:image/png;base64,")


def test_what_nobody_takes_up_is_ended(place: RayPlace):
    with place.started(*materialize("sleep")) as process:
        stage = place.asleep()
        process.kill()
    assert toy_launcher(orphan_seconds=-1).end_orphans(place.instance) == []  # its run is not marked as over yet
    (lost,) = fail_lost_runs(place.instance)
    (ended,) = toy_launcher(orphan_seconds=-1).end_orphans(place.instance)
    assert lost[:8] in ended
    wait_for(lambda: is_gone(stage))
