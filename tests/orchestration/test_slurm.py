"""Stages on a real Slurm, and what its clusters do to them: each ends in the right state, and nothing twice."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
from slurm_ground import jobs, kill_daemon, slurm, start_daemon
from slurm_runs import instance, job_of, materialize_on_slurm, retries, said, started, toy, why
from toy_slurm_definitions import LAUNCHER, toy_launcher
from waiting import wait_for

from orchestration.launchers.slurm_mark import JOB_TAG
from orchestration.sensors import fail_lost_runs

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("own_slurm")]
ASSET = "filtered_captions"
PATIENT = toy_launcher(patience_seconds=90)


@pytest.fixture
def asleep(ground) -> Callable[[], int]:
    """The pid of the stage that has gone to sleep; waits for it."""
    path: Path = ground.outputs / "asleep"

    def pid() -> int:
        wait_for(lambda: path.exists() and path.read_text())
        return int(path.read_text())

    return pid


@pytest.fixture
def materialize(ground, monkeypatch) -> Callable[..., dg.ExecuteInProcessResult]:
    def run(asset: str = ASSET, act: str = "work", **more) -> dg.ExecuteInProcessResult:
        return materialize_on_slurm(ground, monkeypatch, asset, act, **more)

    return run


def test_a_stage_is_a_job_with_what_it_asks_for(materialize, capfd):
    seen = []

    def look() -> None:
        wait_for(jobs)
        seen.append(slurm("scontrol", "-o", "show", "job", slurm("squeue", "-h", "--me", "-o", "%A")))

    result = materialize(
        act="nap", resources="{gpus: 1, gpu_type: a100, cpus: 3, memory_gb: 1.5, hours: 0.5}", meanwhile=look
    )
    assert result.success and said(result, ASSET)["files"] == 1 and str(said(result, ASSET)["slurm_job"]).isdigit()
    for asked in ("gres:gpu:a100:1", "CPUs/Task=3", "MinMemoryNode=1.50G", "TimeLimit=00:30:00", "NumNodes=1"):
        assert asked in seen[0]
    printed = capfd.readouterr()
    assert "filter-captions on stdout" in printed.out and "filter-captions on stderr" in printed.err


def test_the_launchers_own_time_is_short(materialize):
    """From sbatch to the result, less the stage's own seconds."""
    materialize()
    result = materialize()
    log = next(Path(str(said(result, ASSET)["slurm_files"])).glob("*.messages"))
    own = log.stat().st_mtime - (log.parent / "job.sh").stat().st_mtime
    print(f"launch {said(result, ASSET)['seconds']} s, of which sbatch to the stage's last word {own:.2f} s")
    assert float(str(said(result, ASSET)["seconds"])) - own <= 2


def test_shards_are_the_tasks_of_one_array(materialize, ground):
    assert materialize().success
    result = materialize("mis_shards")
    made = result.asset_materializations_for_node("mis_shards")
    assert {event.partition for event in made} == {"00000", "00001", "00002"} and len(made) == 3
    assert said(result, "mis_shards")["files"] == 3  # one of the tasks found the output whole
    assert all(check.passed for check in result.get_asset_check_evaluations())
    folder = Path(str(said(result, "mis_shards")["slurm_files"]))
    assert sorted(path.name for path in folder.glob("*.messages")) == ["0.messages", "1.messages", "2.messages"]


def test_fewer_tasks_than_shards_share_them(materialize):
    assert materialize().success
    result = materialize("mis_shards", launcher=toy_launcher(shards_per_task=2))
    assert result.success and said(result, "mis_shards")["files"] == 3


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("fail", "filter-captions failed: in.tsv:3: no tab between URL and caption"),
        ("crash", "filter-captions failed: ZeroDivisionError: a bug"),
        ("be killed", "filter-captions was killed by signal 9"),
        ("break promise", "counts_add_up does not hold: found the opposite"),
    ],
)
def test_its_own_failure_is_shown_and_not_tried_again(materialize, act, reason):
    result = materialize(act=act)
    assert reason in why(result) and retries(result) == 0
    (event,) = (event for event in result.all_events if event.is_step_failure)
    assert "filter-captions on stderr" in event.step_failure_data.user_failure_data.metadata["last_lines"].value


def test_stopped_after_a_checkpoint_it_is_submitted_again(materialize):
    result = materialize(act="stop once")
    assert result.success and retries(result) == 1


def test_at_its_time_limit_it_goes_on_in_another_job(materialize):
    """Slurm counts in minutes, looks every half, and ends what does not listen."""
    result = materialize(act="sleep deaf once", resources="{hours: 0.016}")
    assert result.success and 1 <= retries(result) <= 2  # asked to end before it could turn deaf


@pytest.mark.parametrize(
    ("launcher", "resources", "reason"),
    [
        ({"partition": "nope"}, "{}", "invalid partition specified: nope"),
        ({"account": "nope"}, "{}", "Invalid account or account/partition combination specified"),
        ({}, "{gpus: 9}", "Requested node configuration is not available"),
        ({}, "{gpus: 1, gpu_type: h100}", "Requested node configuration is not available"),
        ({}, "{memory_gb: 4000}", "Memory specification can not be satisfied"),
        ({}, "{hours: 2000}", "would wait for ever"),
    ],
)
def test_what_the_cluster_can_not_give_is_told_at_launch(materialize, launcher, resources, reason):
    result = materialize(launcher=toy_launcher(**launcher), resources=resources)
    assert reason in why(result) and "gpu:a100:8" in why(result)  # and what there is
    wait_for(lambda: not jobs(), 10)


def test_a_missing_environment_is_named(materialize):
    result = materialize(launcher=toy_launcher(command=["/no/such/python", "-m", "m2m"]))
    assert "has no /no/such/python" in why(result) and "the launcher's command or setup" in why(result)


def test_a_python_without_the_project_is_named(materialize, tmp_path):
    bare = tmp_path / "bare" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    result = materialize(launcher=toy_launcher(command=[str(bare), "-m", "yaml"]))
    assert "No module named yaml" in why(result)


def test_a_setup_that_fails_is_told(materialize):
    result = materialize(launcher=toy_launcher(setup=["module load no-such-module || exit 1"]))
    assert "module: command not found" in why(result)


def test_a_node_that_does_not_share_the_file_system_is_told(materialize):
    """It can't write what the job prints to where Dagster reads it."""
    result = materialize(launcher=toy_launcher(sbatch=["--output=/proc/not/shared", "--error=/proc/not/shared"]))
    assert "can't write to" in why(result) and "must share this file system" in why(result)


def test_without_its_configuration_the_launcher_says_so(materialize, monkeypatch):
    with monkeypatch.context() as without:
        without.delenv("SLURM_CONF")
        assert "set SLURM_CONF" in why(materialize())


def test_a_scheduler_that_is_away_is_asked_again(materialize, own_slurm):
    kill_daemon(own_slurm, "slurmctld")
    result = materialize(meanwhile=lambda: (time.sleep(5), start_daemon("slurmctld")), launcher=PATIENT)
    assert result.success and retries(result) == 0


def test_a_scheduler_that_stays_away_ends_the_step(materialize, own_slurm):
    kill_daemon(own_slurm, "slurmctld")
    try:
        result = materialize(launcher=toy_launcher(patience_seconds=1))
    finally:
        start_daemon("slurmctld")
    assert "Slurm takes no job" in why(result) and "Unable to contact slurm controller" in why(result)


def test_a_full_queue_is_waited_for(materialize, own_slurm, capfd):
    full = own_slurm.with_name("full")
    full.touch()
    result = materialize(meanwhile=lambda: (time.sleep(8), full.unlink()), launcher=PATIENT)
    assert result.success and retries(result) == 0
    assert "job submit limit" in capfd.readouterr().err  # the log of the run


def executed(ground, act: str):
    """`dagster job execute`, its first stage doing `act`."""
    return started(ground, *job_of(ground, "execute", "data_job", ASSET, act))


@pytest.mark.parametrize(("act", "grace"), [("sleep", 0), ("sleep deaf", LAUNCHER.grace_seconds)])
def test_a_cancelled_run_takes_its_job_with_it(ground, asleep, act, grace):
    with executed(ground, act) as run:
        asleep()
        run.send_signal(signal.SIGINT)
        cancelled = time.monotonic()
        wait_for(lambda: not jobs(), 20)
        seconds = time.monotonic() - cancelled
        print(f"{act}: cancel to job gone {seconds:.2f} s")
        assert seconds <= 5 + grace
        assert run.wait(30) != 0


def test_a_job_whose_run_was_killed_is_taken_up_and_not_launched_twice(ground, asleep):
    tag = f"{JOB_TAG}/{ASSET}"
    with executed(ground, "wait") as run:
        asleep()
        run.kill()
        run.wait()
    assert jobs() == ["RUNNING"]
    with executed(ground, "wait") as again, instance(ground) as found:
        wait_for(lambda: len(found.get_runs()) == 2 and tag in found.get_runs(limit=1)[0].tags)
        (ground.outputs / "wake").touch()
        assert again.wait(120) == 0
        newest, killed = found.get_runs()
        assert newest.status == dg.DagsterRunStatus.SUCCESS
        assert newest.tags[tag] == killed.tags[tag]
        assert LAUNCHER.end_orphans(found) == [] and fail_lost_runs(found) == [killed.run_id]


def test_a_job_that_nobody_takes_up_is_ended(ground, asleep):
    with executed(ground, "sleep") as run:
        asleep()
        with instance(ground) as found:
            assert LAUNCHER.end_orphans(found) == []  # its run goes on
        run.kill()
        run.wait()
    with instance(ground) as found:
        assert LAUNCHER.end_orphans(found) == []  # not known as lost yet
        (lost,) = fail_lost_runs(found)
        run_found = found.get_run_by_id(lost)
        assert run_found is not None
        time.sleep(0.1)
        assert LAUNCHER.end_orphans(found) == [run_found.tags[f"{JOB_TAG}/{ASSET}"]]
    wait_for(lambda: not jobs(), 10)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_range_of_300_shards_is_one_array(ground):
    (ground.folder / "configs" / "toy.yaml").write_text("generate-sets: {shards: 300}\n")
    toy(ground, "filter-captions")
    select = ("asset", "materialize", "--select", "mis_shards", "--partition-range", "00000...00299")
    with started(ground, "dagster", *select) as run:
        wait_for(jobs)
        array = {name.split("_")[0] for name in slurm("squeue", "-h", "--me", "-o", "%i").split()}
        assert run.wait() == 0
    assert len(array) == 1 and len(list((ground.outputs / "generate-sets").glob("*.txt"))) == 300
    with instance(ground) as found:
        made = found.fetch_materializations(dg.AssetKey("mis_shards"), limit=1000).records
        assert len({record.partition_key for record in made}) == len(made) == 300


@pytest.mark.skipif(not shutil.which("ss"), reason="ss (iproute2) tells who listens")
def test_the_projects_slurm_listens_on_loopback_alone(own_slurm):
    ports = re.findall(r"Port=(\d+)", own_slurm.read_text())
    listening = [line.split()[3] for line in slurm("ss", "-ltn").splitlines()]
    mine = [address for address in listening if address.rpartition(":")[2] in ports]
    assert len(mine) >= len(ports) and all(address.startswith("127.0.0.1:") for address in mine)
