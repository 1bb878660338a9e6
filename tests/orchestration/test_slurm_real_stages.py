"""The real stages with the tiny models on a real Slurm: struck in the midst of their work, and spread over two nodes.

What clusters can do is all in `test_slurm_faults`, with toys that keep their work as these stages do. Here it is shown
on the stages themselves; most of it is marked slow.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
import torch
import yaml
from safetensors.torch import load_file
from slurm_ground import at_its_limit, jobs, kill_daemon, remembered, running, slurm, start_daemon, take_away, wait_for
from slurm_runs import execute_on_slurm, retries, why
from small_stages import Small, read_log, with_sets

from m2m.stages import STAGES, Stage
from m2m.training.loop import CHECKPOINTS
from orchestration.launchers.slurm import SlurmLauncher

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("own_slurm"), pytest.mark.timeout(600)]


@pytest.fixture
def small(unbroken, tmp_path, monkeypatch) -> Iterator[Small]:
    """The same profile elsewhere, with the captions."""
    found = Small(tmp_path / "small.yaml", tmp_path / "outputs")
    shutil.copy(unbroken.path, found.path)
    monkeypatch.setenv("M2M_OUTPUTS", str(found.outputs))
    shutil.copytree(unbroken.folder(STAGES["filter-captions"]), found.folder(STAGES["filter-captions"]))
    yield found
    wait_for(lambda: not jobs())


@pytest.fixture
def run(small, monkeypatch) -> Callable[..., dg.ExecuteInProcessResult]:
    def run(stage: Stage, meanwhile: Callable[[], object] = lambda: None, **resources) -> dg.ExecuteInProcessResult:
        settings = yaml.safe_load(small.path.read_text())
        settings[stage.command]["resources"].update(resources)
        small.path.write_text(yaml.safe_dump(settings))
        # a shard at a time, so that some are whole when others are being made
        launcher = SlurmLauncher(poll_seconds=1, tasks_at_once=1)
        return execute_on_slurm(monkeypatch, small.profile, stage.asset, launcher, meanwhile)

    return run


def in_the_midst(small: Small, stage: Stage) -> tuple[str, int]:
    """The job and the pid of a stage that has made a part of its work and is at the rest."""
    part = "shards/00000.json" if stage.partitioned else f"{CHECKPOINTS}/step-000002"
    folder = small.folder(stage)
    wait_for(lambda: list(folder.parent.glob(f"{folder.name}.partial-*/{part}")), 300)
    made = b"0" if stage.partitioned else None  # its process may still be there, with nothing left to do
    wait_for(lambda: jobs().count("RUNNING") == 1 and running() and pids(but_shard=made), 60)
    return running()[0], pids(but_shard=made)[0]


def pids(*, but_shard: bytes | None = None) -> list[int]:
    """Processes of stages that run as jobs of this Slurm; there may be another one on the machine."""
    found, ours = [], f"SLURM_CONF={os.environ['SLURM_CONF']}\0".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            environment = path.with_name("environ").read_bytes()
            mine = words[1:3] == [b"-m", b"m2m"] and b"SLURM_JOB_ID=" in environment and ours in environment
            if mine and (but_shard is None or words[words.index(b"--shards") + 1] != but_shard):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return sorted(found)


def strike(how: str, job: str, pid: int, conf: Path) -> None:
    match how:
        case "scancel":
            slurm("scancel", "--me")
        case "interrupt":  # it ends by itself, with an exit code of its own
            os.kill(pid, signal.SIGINT)
        case "kill -9":
            os.kill(pid, signal.SIGKILL)
        case "time limit":
            at_its_limit(job)
        case "slurmctld":
            remembered(conf, job)
            kill_daemon(conf, "slurmctld")
            time.sleep(2)
            start_daemon("slurmctld")
        case _:
            take_away(how, job)


SLOW = pytest.mark.slow
GOES_ON, FAILS = ("requeue", "preempt", "node down", "time limit", "slurmctld"), ("scancel", "interrupt", "kill -9")
QUICK = [("generate-sets", "preempt"), ("pretrain@self", "time limit")]


@pytest.mark.parametrize(
    ("key", "how"),
    [
        pytest.param(key, how, marks=() if (key, how) in QUICK else SLOW)
        for key in ("generate-sets", "pretrain@self")
        for how in GOES_ON + FAILS
    ],
)
def test_struck_in_the_midst_its_output_is_an_undisturbed_runs(small, unbroken, run, own_slurm, key, how):
    stage = STAGES[key]
    if key == "pretrain@self":
        with_sets(small, unbroken)
    first = run(stage, lambda: strike(how, *in_the_midst(small, stage), own_slurm))
    assert first.success == (how in GOES_ON)
    if how in FAILS:
        assert retries(first) == 0
        assert run(stage).success
    assert small.manifest(stage) == unbroken.manifest(stage)


def test_two_nodes_train_what_one_process_trains(small, unbroken, run):
    """Gloo on CPUs; sums over processes are taken in another order, hence a tolerance."""
    stage = with_sets(small, unbroken)
    seen: list[str] = []
    result = run(stage, lambda: seen.append(spread(small, stage)), nodes=2, cpus=1)
    assert result.success and retries(result) == 0
    assert "NumNodes=2" in seen[0] and "NumTasks=2" in seen[0] and "NodeList=n[1-2]" in seen[0]
    logs = [read_log(where.folder(stage)) for where in (small, unbroken)]
    for line, other in zip(*logs, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    together, alone = (load_file(next(w.folder(stage).glob("unet/*.safetensors"))) for w in (small, unbroken))
    assert together.keys() == alone.keys()
    for name, weight in alone.items():
        assert torch.allclose(weight, together[name], atol=1e-4), name


@SLOW
@pytest.mark.parametrize("how", ["time limit", "kill -9"])
def test_struck_on_one_of_two_nodes_both_end_and_go_on(small, unbroken, run, own_slurm, how):
    stage = with_sets(small, unbroken)

    def meanwhile() -> None:
        job, _ = in_the_midst(small, stage)
        wait_for(lambda: len(pids()) == 2)
        strike(how, job, pids()[-1], own_slurm)

    first = run(stage, meanwhile, nodes=2, cpus=1)
    if how == "time limit":
        assert first.success and retries(first) == 1
    else:
        assert "was killed by signal 9" in why(first)
        assert not pids()
        assert run(stage).success
    assert len(read_log(small.folder(stage))) == len(read_log(unbroken.folder(stage)))


def spread(small: Small, stage: Stage) -> str:
    in_the_midst(small, stage)
    return slurm("scontrol", "-o", "show", "job", running()[0])
