"""A cluster job is followed by one run at a time, and is an orphan when none follows it: the same for every engine."""

import time
from collections.abc import Callable, Iterator

import dagster as dg
import pytest

from orchestration.launchers.following import digest, is_orphan, may_take_up
from orchestration.launchers.process_mark import RUN_TAG, this_process

TAG = "m2m/some_job"
GONE = f"{this_process().rpartition('/')[0]}/0"  # this pid, of a process that was started when the machine was


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def started(instance) -> Callable[..., str]:
    """A run that has started; `follows` a job."""

    def start(follows: str | None = None, process: str | None = None) -> str:
        tags = {RUN_TAG: process or this_process(), **({f"{TAG}/a_step": follows} if follows else {})}
        run = dg.DagsterRun("a_job", tags=tags, status=dg.DagsterRunStatus.STARTED)
        return instance.add_run(run).run_id

    return start


def ended(instance: dg.DagsterInstance, run_id: str) -> None:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    instance.report_run_failed(run)
    time.sleep(0.01)


def test_a_job_of_a_living_run_is_left_to_it(instance, started):
    owner, other = started("7"), started()
    assert not may_take_up(instance, other, TAG, "7", owner)
    assert may_take_up(instance, owner, TAG, "7", owner)  # tried again
    assert not is_orphan(instance, TAG, "7", owner, 0)


def test_a_job_whose_run_has_lost_its_process_is_taken_up_and_ended_only_once_that_is_known(instance, started):
    owner, other = started("7", GONE), started()
    assert may_take_up(instance, other, TAG, "7", owner) and not is_orphan(instance, TAG, "7", owner, 0)
    ended(instance, owner)
    assert may_take_up(instance, other, TAG, "7", owner) and is_orphan(instance, TAG, "7", owner, 0)
    assert not is_orphan(instance, TAG, "7", owner, 60)


def test_a_job_that_was_taken_up_is_its_new_runs_alone(instance, started):
    """Also when the run that launched it has been over for long."""
    owner, new, third = started("7"), started("7"), started("8")
    ended(instance, owner)
    assert not is_orphan(instance, TAG, "7", owner, 0)
    assert not may_take_up(instance, third, TAG, "7", owner)
    ended(instance, new)
    assert may_take_up(instance, third, TAG, "7", owner) and is_orphan(instance, TAG, "7", owner, 0)


def test_another_dagsters_jobs_are_left_alone(instance, started):
    assert not may_take_up(instance, started(), TAG, "7", "unknown") and not is_orphan(instance, TAG, "7", "unknown", 0)


def test_a_launch_is_known_by_its_words():
    assert digest([["a", "b"]]) == digest((("a", "b"),)) != digest([["a b"]])
