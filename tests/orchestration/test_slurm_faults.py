"""What clusters and people do to a run while it generates and while it trains, on a real Slurm.

After each: the right end state; nothing that was whole is made again; no job or process is left, none was there twice;
and the output is the one of an undisturbed run.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import dagster as dg
import pytest
from served import toys
from slurm_ground import at_its_limit, jobs, kill_daemon, remembered, slurm, start_daemon, take_away
from slurm_runs import instance, job_of, materialize_on_slurm, retries, started, toy, why
from toy_ground import Ground
from toy_work import CHECKPOINT_EVERY, GATE, GATED_SHARD
from waiting import wait_for

from m2m.artifacts import write_bytes
from m2m.stages import STAGES, Stage
from orchestration.launchers.slurm_mark import JOB_TAG
from orchestration.sensors import fail_lost_runs

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("own_slurm")]


@dataclass(frozen=True)
class Step:
    """A line of the toy's notes."""

    what: str
    number: int
    pid: int
    job: str


@dataclass(frozen=True)
class Work:
    """A stage of a toy pipeline that is held up at its gate."""

    ground: Ground
    undisturbed: Path
    asset: str
    job: str

    @property
    def stage(self) -> Stage:
        return next(stage for stage in STAGES.values() if stage.asset == self.asset)

    @property
    def steps(self) -> list[Step]:
        path = self.ground.outputs / "steps"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [Step(what, int(number), int(pid), job) for what, number, pid, job in lines]

    @property
    def gated(self) -> list[Step]:
        return [step for step in self.steps if step.what in (f"shard-{GATED_SHARD}", "training")]

    def at_gate(self) -> Step:
        """The step that waits, once all that can be done without it is done."""
        other_shards = ("00000.txt", "00002.txt") if self.stage.partitioned else ()

        def waits() -> bool:
            whole = all(list(self.ground.outputs.glob(f"*/{name}")) for name in other_shards)
            return whole and any(step.number == GATE for step in self.gated) and jobs() == ["RUNNING"]

        wait_for(waits, 150)  # Dagster, its daemon and what it starts take their time to start on a busy machine
        return next(step for step in self.gated if step.number == GATE)

    def open_gate(self, how: str = "") -> None:
        write_bytes(self.ground.outputs / "gate", how.encode())

    def assert_unharmed(self, *, launches: int) -> None:
        """The output is an undisturbed run's; nothing that was kept was made twice, nothing by two at a time."""
        folder = Path(self.stage.command, self.stage.variant or "")
        assert _files(self.ground.outputs / folder) == _files(self.undisturbed / folder)
        assert len({step.job for step in self.gated}) == launches
        lives = [pid for pid, _ in groupby(self.gated, key=lambda step: step.pid)]
        assert len(lives) == len(set(lives)), "two worked at a time"
        kept = CHECKPOINT_EVERY if self.asset == "m2m_self" else 0
        once = [(step.what, step.number) for step in self.steps if step not in self.gated or step.number <= kept]
        assert len(once) == len(set(once)), "what was whole was made again"


KINDS = {
    "generation": ("mis_shards", "data_job", ("filter-captions",)),
    "training": ("m2m_self", "pretraining_job", ("filter-captions", "generate-sets", "cache-features")),
}


@pytest.fixture(scope="module", params=KINDS)
def undisturbed(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """Which kind of work, the outputs of an undisturbed run of it, and those that there were before it."""
    asset, _, before = KINDS[request.param]
    ground = toys(tmp_path_factory.mktemp("undisturbed"))
    for stage in before:
        toy(ground, stage)
    shutil.copytree(ground.outputs, ground.folder / "before")
    (ground.outputs / "gate").touch()
    (stage,) = (stage for stage in STAGES.values() if stage.asset == asset)
    toy(ground, *stage.argv, "act=steps")
    return request.param, ground.outputs, ground.folder / "before"


@pytest.fixture
def work(undisturbed, ground) -> Iterator[Work]:
    """What comes before the stage is there; after the test nothing is left that worked on it."""
    kind, outputs, before = undisturbed
    asset, job, _ = KINDS[kind]
    shutil.copytree(before, ground.outputs)
    work = Work(ground, outputs, asset, job)
    yield work
    wait_for(lambda: not jobs())
    assert not [step for step in work.steps if _alive(step.pid)]


@pytest.fixture
def run(work, monkeypatch) -> Callable[..., dg.ExecuteInProcessResult]:
    def run(meanwhile: Callable[[], object] = lambda: None, **more) -> dg.ExecuteInProcessResult:
        return materialize_on_slurm(work.ground, monkeypatch, work.asset, "steps", meanwhile=meanwhile, **more)

    return run


@pytest.mark.parametrize(
    ("how", "launches"), [("requeue", 1), ("preempt", 1), ("node down", 1), ("time limit", 2)], ids=lambda value: value
)
def test_taken_away_by_the_cluster_it_goes_on(work, run, how, launches):
    def strike() -> None:
        step = work.at_gate()
        if how == "time limit":
            at_its_limit(step.job)
            wait_for(lambda: not _alive(step.pid))
        else:
            take_away(how, step.job)
        work.open_gate()

    result = run(strike, resources="{gpus: 1, hours: 0.1}")
    assert result.success
    assert retries(result) == launches - 1  # Slurm itself puts a job back into its queue, but at its limit
    work.assert_unharmed(launches=launches)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("scancel", "was cancelled on the cluster"),
        ("exit 1", "ZeroDivisionError: a bug"),
        ("out of memory", "ran out of memory"),
        ("kill -9", "was killed by signal 9"),
    ],
)
def test_ended_for_a_reason_of_its_own_it_fails_and_the_next_run_goes_on(work, run, how, reason):
    def strike() -> None:
        step = work.at_gate()
        match how:
            case "scancel":
                slurm("scancel", "--me")
            case "kill -9":
                os.kill(step.pid, signal.SIGKILL)
            case _:
                work.open_gate(how)

    failed = run(strike, resources="{memory_gb: 0.3}")
    assert reason in why(failed) and retries(failed) == 0
    work.open_gate()
    assert run().success
    work.assert_unharmed(launches=2)


@pytest.mark.parametrize("daemon", ["slurmctld", "slurmd"])
def test_a_lost_daemon_of_slurm_is_waited_for(work, run, own_slurm, daemon):
    def strike() -> None:
        step = work.at_gate()
        name = daemon
        if daemon == "slurmd":
            name += "." + slurm("squeue", "-h", "-j", step.job, "-o", "%N")
        remembered(own_slurm, step.job)
        kill_daemon(own_slurm, name)
        work.open_gate()
        time.sleep(2)
        start_daemon(name)

    result = run(strike)
    assert result.success and retries(result) == 0
    work.assert_unharmed(launches=1)


def test_a_job_whose_run_was_killed_is_taken_up(work):
    execute = job_of(work.ground, "execute", work.job, work.asset, "steps")
    with started(work.ground, *execute) as killed:
        step = work.at_gate()
        killed.kill()
        killed.wait()
    assert jobs() == ["RUNNING"]
    with started(work.ground, *execute) as again, instance(work.ground) as found:
        tag = f"{JOB_TAG}/{work.asset}"
        wait_for(lambda: len(found.get_runs()) == 2 and tag in found.get_runs(limit=1)[0].tags)
        work.open_gate()
        assert again.wait(120) == 0
        newest, lost = found.get_runs()
        assert newest.status == dg.DagsterRunStatus.SUCCESS and newest.tags[tag] == lost.tags[tag]
        assert fail_lost_runs(found) == [lost.run_id]
    assert not _alive(step.pid)
    work.assert_unharmed(launches=1)


def test_a_run_outlives_dagsters_daemon(work):
    with instance(work.ground) as found:
        with started(work.ground, "dagster._daemon", "run") as daemon:
            with started(work.ground, *job_of(work.ground, "launch", work.job, work.asset, "steps")) as launch:
                assert launch.wait(60) == 0
            work.at_gate()
            daemon.kill()
            daemon.wait()
        work.open_gate()
        with started(work.ground, "dagster._daemon", "run"):
            wait_for(lambda: found.get_runs()[0].is_finished, 120)
        (run,) = found.get_runs()
        assert run.status == dg.DagsterRunStatus.SUCCESS
    work.assert_unharmed(launches=1)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
