"""The project's own Ray (`services/ray/up.sh`), runs on it, and what happens to clusters.

Belongs here: starting a run, looking at jobs, striking processes and nodes. Not here: what must come of that (the
tests).
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import contextlib
import dataclasses
import http.server
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from beside import beside
from own_services import where
from test_jobs_end_to_end import wait_for
from toy_ground import Ground
from toy_ray_definitions import ADDRESS, TOY, toy_launcher

from m2m.config import load_profile
from orchestration.definitions import build_defs
from orchestration.launchers import ray as launching

_GCS = where("ray", "gcs")
_PATIENCE = 240  # seconds: a node, a job and a task start several Pythons each, on a machine that may be busy


def _missing() -> str:
    if not all(importlib.util.find_spec(name) for name in ("ray", "dagster_ray")):
        return "ray is not installed: pip install 'm2m[ray]' (make test-services does it)"
    try:
        urllib.request.urlopen(f"{ADDRESS}/api/jobs/", timeout=10).close()
    except OSError:
        return "no Ray answers here: services/ray/up.sh starts one (make test-services does it all)"
    return ""


needs_ray = [pytest.mark.services, pytest.mark.skipif(bool(why := _missing()), reason=why)]


@dataclasses.dataclass
class RayPlace:
    """Where toy stages run on Ray: outputs of their own, a Dagster instance of their own."""

    ground: Ground
    monkeypatch: pytest.MonkeyPatch
    instance: dg.DagsterInstance

    @property
    def outputs(self) -> Path:
        return self.ground.outputs.resolve()

    def ask_for(self, **resources: Any) -> None:
        """What stages ask the cluster for from now on."""
        asked = "".join(
            f"{command}: {{{shards} resources: {json.dumps(resources)}}}\n"
            for command, shards in {"filter-captions": "", "generate-sets": "shards: 3,", "pretrain": ""}.items()
        )
        profile = self.ground.folder / "configs" / "toy.yaml"
        profile.write_text(asked)
        self.monkeypatch.setattr(launching, "PROFILE", load_profile(profile))

    def run(
        self,
        asset: str = "filtered_captions",
        act: str = "work",
        meanwhile: Callable[[], object] = lambda: None,
        **settings: Any,
    ) -> dg.ExecuteInProcessResult:
        """Materialize one asset from this process, three shards of it where it has shards; `meanwhile` runs beside."""
        defs = build_defs(resource_overrides={"launcher": toy_launcher(**settings)})
        keys = {f"dagster/asset_partition_range_{end}": key for end, key in (("start", "00000"), ("end", "00002"))}
        with beside(meanwhile, self.stop_jobs):
            return defs.resolve_job_def("m2m_pipeline").execute_in_process(
                asset_selection=[dg.AssetKey(asset)],
                run_config={"ops": {asset: {"config": {"overrides": [f"act={act}"]}}}},
                tags=keys,
                raise_on_error=False,
                instance=self.instance,
            )

    def make_here(self, command: str) -> None:
        """Run a toy stage without Dagster or Ray: what another reads."""
        argv = [*TOY, command, "--config", self.ground.environment["M2M_PROFILE"]]
        subprocess.run(argv, env=self.ground.environment, check=True, capture_output=True)

    def jobs(self) -> list[Any]:
        """Of this test, the first one first."""
        listed = toy_launcher()._connected().list_jobs()
        mine = [job for job in listed if (job.metadata or {}).get("m2m_folder", "").startswith(str(self.outputs))]
        return sorted(mine, key=lambda job: job.start_time)

    def stop_jobs(self) -> None:
        for job in self.jobs():
            with contextlib.suppress(RuntimeError):
                toy_launcher()._connected().stop_job(job.submission_id)

    def asleep(self) -> int:
        """The pid of the stage that has begun to wait."""
        file = self.outputs / "asleep"
        return int(wait_for(lambda: file.exists() and file.read_text(), _PATIENCE))

    def at_the_gate(self, what: str = "training") -> int:
        """The pid of the stage that has come so far."""
        return int(wait_for(lambda: self._pids_at_the_gate(what), _PATIENCE)[0])

    def _pids_at_the_gate(self, what: str) -> list[str]:
        return [step.split()[2] for step in self.steps() if step.startswith(f"{what} 8 ")]

    def open_the_gate(self) -> None:
        (self.outputs / "gate").touch()

    def steps(self) -> list[str]:
        """What toys have noted of their steps."""
        file = self.outputs / "steps"
        return file.read_text().splitlines() if file.exists() else []

    @contextlib.contextmanager
    def started(self, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command of Dagster's on the toy definitions, as a user gives it; ended at the end."""
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster", *argv, "-m", "toy_ray_definitions"],
            env=self.ground.environment,
            cwd=self.ground.folder,
            stdout=subprocess.DEVNULL,
            stderr=(self.ground.folder / "dagster.log").open("ab"),
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def ray_place(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayPlace]:
    """Toys on the cluster; none of their jobs is left."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)  # they would come before ours
    with dg.DagsterInstance.from_config(str(ground.folder / "dagster")) as instance:
        place = RayPlace(ground, monkeypatch, instance)
        place.ask_for()
        yield place
        place.stop_jobs()


@contextlib.contextmanager
def one_more_node(**resources: float) -> Iterator[None]:
    """A node of the cluster on this machine, until the block is left; or until it is lost."""
    (name,), before = resources, _amount(*resources)
    ray = [sys.executable, "-c", "import sys; from ray.scripts.scripts import main; sys.exit(main())"]
    where = [f"--address={_GCS}", "--node-ip-address=127.0.0.1", f"--resources={json.dumps(resources)}", "--block"]
    size = ["--num-cpus=2", "--memory=2000000000", "--object-store-memory=80000000", "--disable-usage-stats"]
    node = subprocess.Popen(
        [*ray, "start", *where, *size],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: _amount(name) >= before + resources[name], _PATIENCE)
        yield
    finally:
        node.terminate()
        node.wait(30)


def _amount(name: str) -> float:
    """What the living nodes have of a resource together."""
    with urllib.request.urlopen(f"{ADDRESS}/api/v0/nodes?limit=100&detail=1", timeout=10) as answer:
        nodes = json.load(answer)["data"]["result"]["result"]
    return sum(node["resources_total"].get(name, 0) for node in nodes if node["state"] == "ALIVE")


@contextlib.contextmanager
def before_its_nodes_are_up(times: int) -> Iterator[str]:
    """An address of the same cluster, which has no node to take a job the first so many times that it is given one."""

    class Handler(http.server.BaseHTTPRequestHandler):
        left = times

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
            asked = urllib.request.Request(ADDRESS + self.path, body, dict(self.headers), method=self.command)
            try:
                with urllib.request.urlopen(asked, timeout=60) as answer:
                    self.answer(answer.status, answer.read())
            except urllib.error.HTTPError as error:
                self.answer(error.code, error.read())

        def do_POST(self) -> None:
            if self.path == "/api/jobs/" and Handler.left:
                Handler.left -= 1
                self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(500, b"No available agent to submit job, please try again later.")
            else:
                self.do_GET()

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def node_of(pid: int) -> int:
    """The raylet among the ancestors of a process."""
    while "raylet" not in Path(f"/proc/{pid}/comm").read_text():
        pid = parent(pid)
    return pid


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()
