"""The real web server and daemon over the toy pipeline, and a headless Chromium, for the tests marked `services`."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_ground import ROOT, Ground
from waiting import wait_for

CHROMIUM = os.environ.get("M2M_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


def _missing() -> str:
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed: pip install playwright (make test-services does it)"
    return "" if CHROMIUM else "no Chromium here: install Debian's chromium, or set M2M_CHROMIUM"


needs_browser = pytest.mark.skipif(bool(_missing()), reason=_missing())


def toys(folder: Path, shards: int = 3) -> Ground:
    """Dagster as `make` sets it up, over toy stages."""
    (folder / "configs").mkdir()
    (folder / "dagster").mkdir()
    (folder / "dagster" / "dagster.yaml").write_text((ROOT / "orchestration" / "dagster.yaml").read_text())
    ground = Ground(folder)
    write_profile(ground, shards=shards)
    return ground


def write_profile(ground: Ground, more: str = "", shards: int = 3) -> None:
    """What stages are told from now on; `more` is YAML."""
    text = f"generate-sets: {{shards: {shards}}}\ncache-features: {{shards: {shards}}}\n{more}\n"
    (ground.folder / "configs" / "toy.yaml").write_text(text)


class Dagster:
    """A web server that answers, and a daemon beside it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, query: str, **variables: Any) -> Any:
        """The data that GraphQL answers with."""
        said = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", said, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]

    def runs(self) -> list[dict[str, str]]:
        """Newest first."""
        query = "{runsOrError{... on Runs{results{runId status jobName tags{key value}}}}}"
        return self.ask(query)["runsOrError"]["results"]


@contextlib.contextmanager
def dagster(folder: Path, environment: dict[str, str], module: str = "toy_definitions") -> Iterator[Dagster]:
    """`make ui`, on a free port; both processes and all that they started are gone when the block is left."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    commands = {
        "web": ["dagster_webserver", "-m", module, "-h", "127.0.0.1", "-p", str(port)],
        "daemon": ["dagster._daemon", "run", "-m", module],
    }
    with contextlib.ExitStack() as ending:
        for name, command in commands.items():
            log = ending.enter_context((folder / f"{name}.log").open("wb"))
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            ending.callback(_end, process)
        served = Dagster(f"http://127.0.0.1:{port}")

        def answers() -> bool:
            with contextlib.suppress(OSError, KeyError):
                return bool(served.ask("{workspaceOrError{... on Workspace{locationEntries{id}}}}"))
            return False

        wait_for(answers, 120)
        yield served


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def browser_page() -> Iterator[Any]:
    """A page of a browser that talks to loopback only."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1800, "height": 1100})
        page.set_default_timeout(30_000)
        yield page
        browser.close()
