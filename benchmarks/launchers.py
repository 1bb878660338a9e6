"""What a launcher adds to the time of a stage, and how soon a cancelled run's stage is gone: local, Slurm and Ray.

Overhead: the real `filter-captions` on a few captions; its command is timed where it runs, the launch around it.
Cancel: as the UI does it, over GraphQL of a web server on loopback, until the process or job is gone. Slurm and Ray are
measured where they answer: `services/slurm/up.sh`, then SLURM_CONF as it says; `services/ray/up.sh`, then RAY_ADDRESS.
Of Ray only the cancel.
"""

import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measuring import Machine, Report
from m2m.config import project_root

# the command's first and last moments, into a file
_CLOCK = 'echo $EPOCHREALTIME >> "$0"; "$@"; code=$?; echo $EPOCHREALTIME >> "$0"; exit $code'
_SLEEP = 'echo $$ > "$0"; exec sleep 300'
_DEAF = 'trap "" TERM; echo $$ > "$0"; sleep 300'
_GRACE = 2.0
_LAUNCH = """mutation($given: ExecutionParams!) { launchRun(executionParams: $given) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
_TERMINATE = "mutation($run: String!) { terminateRun(runId: $run) { __typename } }"


def main() -> int:
    machine = Machine.asked_for(__doc__, repeats=5)
    report = Report("launchers", machine)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder)
        kinds = ["local", *(["slurm"] if _slurm_answers() else [])]
        for kind in kinds:
            report.at_most(f"{kind}: overhead of a launch, s", _overhead(folder, kind, machine.repeats), _LIMITS[kind])
        for kind in [*kinds, *(["ray"] if _ray_answers() else [])]:
            seconds = [_cancelled(folder, kind, _SLEEP) for _ in range(3)]
            report.at_most(f"{kind}: cancelled over GraphQL to gone, s", max(seconds), 5)
            report.figure(f"{kind}: the same, SIGTERM ignored, {_GRACE:g} s of grace", _cancelled(folder, kind, _DEAF))
    if not _ray_answers():
        print("  Ray: not measured, none answers: services/ray/up.sh starts one")
    if "slurm" not in kinds:
        print("  Slurm: not measured, none answers: services/slurm/up.sh starts one")
    return report.close()


_LIMITS = {"local": 0.5, "slurm": 2.0}


def _prepare(folder: Path) -> None:
    """A profile of few captions, and a Dagster that launches what it is asked to at once."""
    captions = str(project_root() / "m2m" / "tiny" / "data" / "captions.tsv")
    (folder / "few.yaml").write_text(yaml.safe_dump({"filter-captions": {"source": captions, "limit": 12}}))
    coordinator = {"module": "dagster._core.run_coordinator", "class": "DefaultRunCoordinator"}
    settings = {"telemetry": {"enabled": False}, "run_coordinator": coordinator}
    (folder / "dagster.yaml").write_text(yaml.safe_dump(settings))
    os.environ |= {
        "M2M_PROFILE": str(folder / "few.yaml"),
        "M2M_OUTPUTS": str(folder / "outputs"),
        "DAGSTER_HOME": str(folder),
    }


def _overhead(folder: Path, kind: str, repeats: int) -> float:
    """Median seconds of a launch, less those of its command."""
    import dagster as dg

    from assets_defs.launching import Launcher
    from orchestration.definitions import build_defs
    from orchestration.launchers.chosen import LAUNCHERS

    notes = folder / f"{kind}.times"
    launcher_class: Any = LAUNCHERS[kind]
    launcher = launcher_class(command=["/bin/bash", "-c", _CLOCK, str(notes), sys.executable, "-m", "m2m"])
    spent: list[float] = []

    class Timed:
        def materialize(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
            started = time.monotonic()
            yield from launcher.materialize(*args, **kwargs)
            spent.append(time.monotonic() - started)

        def end_orphans(self, instance: dg.DagsterInstance) -> list[str]:
            return []

    timed: Launcher = Timed()
    job = build_defs(resource_overrides={"launcher": timed}).resolve_job_def("m2m_pipeline")
    for _ in range(repeats + 1):  # the first one reads the packages from disk
        done = job.execute_in_process(
            asset_selection=[dg.AssetKey("filtered_captions")],
            run_config={"ops": {"filtered_captions": {"config": {"force": True}}}},
        )
        assert done.success
    times = [float(line) for line in notes.read_text().split()]
    own = [end - begin for begin, end in zip(times[::2], times[1::2])]
    return statistics.median(total - command for total, command in zip(spent[1:], own[1:]))


def _cancelled(folder: Path, kind: str, command: str) -> float:
    """Seconds from asking Dagster to terminate a run until what it launched is gone."""
    begun = folder / "begun"
    begun.unlink(missing_ok=True)
    settings = {"launcher": kind, "command": ["/bin/bash", "-c", command, str(begun)], "grace_seconds": _GRACE}
    (folder / "launcher.yaml").write_text(yaml.safe_dump(settings))
    with _web_server(folder / "launcher.yaml") as ask:
        selector = {
            "repositoryName": "__repository__",
            "repositoryLocationName": "orchestration.definitions",
            "jobName": "data_job",
        }
        told = ask(_LAUNCH, given={"selector": selector, "mode": "default", "runConfigData": {}})["launchRun"]
        assert "run" in told, told
        _wait(lambda: begun.exists() and begun.read_text().strip())
        pid = begun.read_text().strip()
        asked = time.monotonic()
        ask(_TERMINATE, run=told["run"]["runId"])
        _wait(lambda: not Path("/proc", pid).exists() and (kind != "slurm" or not _squeue()))
        return time.monotonic() - asked


@contextlib.contextmanager
def _web_server(launcher: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Dagster's web server over the real definitions; yields what asks it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dagster_webserver", "-m", "orchestration.definitions", "-h", "127.0.0.1"]
    env = os.environ | {"M2M_LAUNCHER": str(launcher)}
    server = subprocess.Popen(
        [*command, "-p", str(port)], env=env, cwd=project_root(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def ask(query: str, **variables: Any) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["data"]

    def is_up() -> bool:
        with contextlib.suppress(OSError):
            return bool(ask("{ version }"))
        return False

    try:
        _wait(is_up)
        yield ask
    finally:
        server.terminate()
        server.wait(30)


def _wait(happens: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def _slurm_answers() -> bool:
    return bool(shutil.which("scontrol")) and subprocess.run(["scontrol", "ping"], capture_output=True).returncode == 0


def _ray_answers() -> bool:
    with contextlib.suppress(OSError, KeyError):
        urllib.request.urlopen(f"{os.environ['RAY_ADDRESS']}/api/jobs/", timeout=10).close()
        return True
    return False


def _squeue() -> Sequence[str]:
    return subprocess.run(["squeue", "-h", "--me"], capture_output=True, text=True, check=True).stdout.split()


if __name__ == "__main__":
    sys.exit(main())
