"""Stages on a real Slurm, and what its clusters do to them: each ends in the right state, and nothing twice."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
from slurm_ground import CONF, ROOT, jobs, needs_slurm, slurm
from toy_slurm_definitions import LAUNCHER, toy_launcher

from m2m.config import load_profile
from orchestration.definitions import build_defs
from orchestration.launchers import slurm as launching
from orchestration.launchers.slurm import JOB_TAG, SlurmLauncher
from orchestration.sensors import fail_lost_runs

pytestmark = needs_slurm
ASSET = "filtered_captions"


@pytest.fixture(autouse=True)
def _this_slurm(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("SLURM_CONF", str(CONF))
    yield
    subprocess.run(["scancel", "--me", "--signal=KILL", "--full"], check=False)
    wait_for(lambda: not jobs(), 30)


def wait_for(happens: Callable[[], object], seconds: float = 60) -> float:
    """How long it took."""
    started = time.monotonic()
    while not happens():
        assert time.monotonic() - started < seconds, "it did not happen"
        time.sleep(0.05)
    return time.monotonic() - started


@pytest.fixture
def asleep(ground) -> Callable[[], int]:
    """The pid of the stage that has gone to sleep; waits for it."""
    path: Path = ground.outputs / "asleep"

    def pid() -> int:
        wait_for(lambda: path.exists() and path.read_text())
        return int(path.read_text())

    return pid


@pytest.fixture
def materialize(ground, monkeypatch):
    """Materialize one asset on Slurm from this process; `meanwhile` runs beside it."""

    def run(
        asset: str = ASSET,
        act: str = "work",
        *,
        meanwhile: Callable[[], object] | None = None,
        launcher: SlurmLauncher = LAUNCHER,
        resources: str = "{}",
        shards: tuple[str, str] = ("00000", "00002"),
    ) -> dg.ExecuteInProcessResult:
        profile = ground.folder / "configs" / "toy.yaml"
        said = "filter-captions: {resources: %s}\ngenerate-sets: {shards: 3, resources: %s}\n"
        profile.write_text(said % (resources, resources))
        monkeypatch.setattr(launching, "PROFILE", load_profile(profile))
        beside = threading.Thread(target=meanwhile or (lambda: None))
        beside.start()
        defs = build_defs(resource_overrides={"launcher": launcher})
        result = defs.resolve_job_def("m2m_pipeline").execute_in_process(
            asset_selection=[dg.AssetKey(asset)],
            tags=dict(zip(("dagster/asset_partition_range_start", "dagster/asset_partition_range_end"), shards)),
            run_config={"ops": {asset: {"config": {"overrides": [f"act={act}"]}}}},
            raise_on_error=False,
        )
        beside.join()
        return result

    return run


def why(result: dg.ExecuteInProcessResult) -> str:
    (event,) = (event for event in result.all_events if event.is_step_failure)
    assert event.step_failure_data.error is not None
    return event.step_failure_data.error.message


def said(result: dg.ExecuteInProcessResult, asset: str = ASSET) -> dict[str, object]:
    made = result.asset_materializations_for_node(asset)[-1]
    return {name: value.value for name, value in made.metadata.items()}


def retries(result: dg.ExecuteInProcessResult) -> int:
    return [event.event_type_value for event in result.all_events].count("STEP_UP_FOR_RETRY")


def test_a_stage_is_a_job_with_what_it_asks_for(materialize, capfd):
    seen = []

    def look() -> None:
        wait_for(jobs)
        seen.append(slurm("scontrol", "-o", "show", "job", slurm("squeue", "-h", "--me", "-o", "%A")))

    result = materialize(
        act="nap", resources="{gpus: 1, gpu_type: a100, cpus: 3, memory_gb: 1.5, hours: 0.5}", meanwhile=look
    )
    assert result.success and said(result)["files"] == 1 and str(said(result)["slurm_job"]).isdigit()
    for asked in ("gres:gpu:a100:1", "CPUs/Task=3", "MinMemoryNode=1.50G", "TimeLimit=00:30:00", "NumNodes=1"):
        assert asked in seen[0]
    printed = capfd.readouterr()
    assert "filter-captions on stdout" in printed.out and "filter-captions on stderr" in printed.err


def test_the_launchers_own_time_is_short(materialize):
    """From sbatch to the result, less the stage's own seconds."""
    materialize()
    result = materialize()
    log = next(Path(str(said(result)["slurm_files"])).glob("*.messages"))
    own = log.stat().st_mtime - (log.parent / "job.sh").stat().st_mtime
    print(f"launch {said(result)['seconds']} s, of which sbatch to the stage's last word {own:.2f} s")
    assert float(str(said(result)["seconds"])) - own <= 2


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


def test_too_much_memory_is_told_as_that(materialize):
    result = materialize(act="hog", resources="{memory_gb: 0.3}")
    assert "ran out of memory" in why(result) and "filter-captions.resources.memory_gb" in why(result)


def test_killed_in_its_node_it_is_a_failure(materialize, asleep):
    result = materialize(act="sleep", meanwhile=lambda: os.kill(asleep(), signal.SIGKILL))
    assert "filter-captions was killed by signal 9" in why(result) and retries(result) == 0


def test_cancelled_on_the_cluster_it_is_a_failure(materialize, asleep):
    result = materialize(act="sleep", meanwhile=lambda: (asleep(), slurm("scancel", "--me")))
    assert "was cancelled on the cluster" in why(result) and retries(result) == 0


def take_away(how: str) -> None:
    """And let it start at once: Slurm leaves a job that it took back in the queue for two minutes."""
    job = slurm("squeue", "-h", "--me", "-o", "%A")
    node = slurm("squeue", "-h", "--me", "-o", "%N")
    match how:
        case "requeued":
            slurm("scontrol", "requeue", job)
        case "preempted":
            whole_node = ["--partition=urgent", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 1"]
            slurm("sbatch", "--gres=gpu:8", "--mem=100M", *whole_node)
        case "node lost":
            slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
            time.sleep(1)
            slurm("scontrol", "update", f"nodename={node}", "state=resume")
    wait_for(lambda: slurm("squeue", "-h", "-j", job, "-o", "%T") == "PENDING")
    slurm("scontrol", "update", f"jobid={job}", "starttime=now")


@pytest.mark.parametrize("how", ["requeued", "preempted", "node lost"])
def test_taken_away_it_goes_on(materialize, asleep, ground, how):
    result = materialize(act="sleep once", resources="{gpus: 1}", meanwhile=lambda: (asleep(), take_away(how)))
    assert result.success and len(result.asset_materializations_for_node(ASSET)) == 1
    assert retries(result) == 0  # Slurm itself has put it back into the queue


@pytest.mark.parametrize("act", ["sleep once", "sleep deaf once"])
def test_at_its_time_limit_it_goes_on_in_another_job(materialize, act):
    """Asked half a minute ahead (and Slurm counts in minutes), or ended where it does not listen."""
    result = materialize(act=act, resources="{hours: 0.016}")
    assert result.success and retries(result) == 1


def test_a_scheduler_that_dies_is_waited_for(materialize, asleep):
    def lose_it() -> None:
        asleep()
        os.kill(int((CONF.parent / "run" / "slurmctld.pid").read_text()), signal.SIGKILL)
        time.sleep(2)
        slurm("slurmctld")

    result = materialize(act="nap", meanwhile=lose_it)
    assert result.success and retries(result) == 0


@pytest.mark.parametrize(
    ("launcher", "resources", "reason"),
    [
        ({"partition": "nope"}, "{}", "invalid partition specified: nope"),
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


def test_without_slurm_the_launcher_says_so(materialize, monkeypatch):
    with monkeypatch.context() as without:
        without.setenv("PATH", "/nowhere")
        assert "this machine has no sbatch" in why(materialize())


@contextlib.contextmanager
def dagster(ground, act: str) -> Iterator[subprocess.Popen[bytes]]:
    """`dagster job execute`, its first stage doing `act`."""
    (ground.folder / "launch.json").write_text(json.dumps({"ops": {ASSET: {"config": {"overrides": [f"act={act}"]}}}}))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "dagster", "job", "execute", "-m", "toy_slurm_definitions", "-j", "data_job"),
            *("--config", str(ground.folder / "launch.json")),
        ],
        env=ground.environment | {"SLURM_CONF": str(CONF)},
        cwd=ground.folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def instance(ground) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(ground.folder / "dagster")) as found:
        yield found


@pytest.mark.parametrize(("act", "grace"), [("sleep", 0), ("sleep deaf", LAUNCHER.grace_seconds)])
def test_a_cancelled_run_takes_its_job_with_it(ground, asleep, act, grace):
    with dagster(ground, act) as run:
        asleep()
        run.send_signal(signal.SIGINT)
        seconds = wait_for(lambda: not jobs(), 20)
        print(f"{act}: cancel to job gone {seconds:.2f} s")
        assert seconds <= 5 + grace
        assert run.wait(30) != 0


def test_a_job_whose_run_was_killed_is_taken_up_and_not_launched_twice(ground, asleep):
    tag = f"{JOB_TAG}/{ASSET}"
    with dagster(ground, "wait") as run:
        asleep()
        run.kill()
        run.wait()
    assert jobs() == ["RUNNING"]
    with dagster(ground, "wait") as again, instance(ground) as found:
        wait_for(lambda: len(found.get_runs()) == 2 and tag in found.get_runs(limit=1)[0].tags)
        (ground.outputs / "wake").touch()
        assert again.wait(120) == 0
        newest, killed = found.get_runs()
        assert newest.status == dg.DagsterRunStatus.SUCCESS
        assert newest.tags[tag] == killed.tags[tag]
        assert LAUNCHER.end_orphans(found) == [] and fail_lost_runs(found) == [killed.run_id]


def test_a_job_that_nobody_takes_up_is_ended(ground, asleep):
    with dagster(ground, "sleep") as run:
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


def test_the_project_starts_and_ends_its_own_slurm():
    """What `up.sh` has started is the Slurm that these tests ran on, and it listens on loopback alone."""
    assert (ROOT / "services" / "slurm" / "down.sh").is_file()
    listening = subprocess.run(["ss", "-ltn"], capture_output=True, text=True, check=False).stdout
    mine = [line.split()[3] for line in listening.splitlines() if ":168" in line]
    assert all(address.startswith("127.0.0.1:") for address in mine)
