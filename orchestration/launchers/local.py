"""Stages as processes of this machine.

Belongs here: starting one, hearing it, stopping it. Not here: what its results mean to Dagster (`outcome`).
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import dagster as dg
from dagster import PipesTempFileContextInjector, open_pipes_session
from pydantic import Field

from assets_defs.launching import Launch, Results
from assets_defs.profile import PROFILE
from m2m.config import project_root
from m2m.die_with_parent import tied
from m2m.stages import Stage
from orchestration.launchers.messages import MessageFiles
from orchestration.launchers.outcome import LINES_KEPT, results, stage_arguments
from orchestration.launchers.process_mark import RUN_TAG, this_process


class LocalLauncher(dg.ConfigurableResource):
    """Runs `python -m m2m STAGE ...` beside Dagster, one process a launch, with Pipes over temporary files.

    The process dies with Dagster's, however that ends; what it made until then is taken up by the next launch.
    """

    command: list[str] = Field(default=[sys.executable, "-m", "m2m"], description="what a stage's arguments follow")
    grace_seconds: float = Field(default=20, description="between asking a cancelled stage to end and killing it")

    def materialize(
        self, context: dg.AssetExecutionContext, stage: Stage, launch: Launch, *, shards: Sequence[str] | None = None
    ) -> Results:
        """Run the stage here; see `assets_defs.launching.Launcher`."""
        command = [*self.command, *stage_arguments(stage, PROFILE, launch, shards)]
        said = " ".join(["python", *command[1:]])
        context.log.info(f"{stage.key}: {said}")
        context.instance.add_run_tags(context.run.run_id, {RUN_TAG: this_process()})
        started = time.monotonic()
        with (
            tempfile.TemporaryDirectory() as folder,
            open_pipes_session(
                context=context,
                context_injector=PipesTempFileContextInjector(),
                message_reader=MessageFiles([Path(folder) / "messages"]),
            ) as session,
        ):
            env = {**os.environ, **session.get_bootstrap_env_vars(), "PYTHONUNBUFFERED": "1"}
            with self._running(command, env) as (process, last_lines):
                exit_code = process.wait()
        told = {
            "command": dg.MetadataValue.text(said),
            "seconds": dg.MetadataValue.float(round(time.monotonic() - started, 1)),
        }
        yield from results(context, stage, session.get_reported_results(), exit_code, list(last_lines), told)

    def end_orphans(self, instance: dg.DagsterInstance) -> list[str]:
        """None: a process here dies with the one that started it."""
        return []

    @contextlib.contextmanager
    def _running(self, command: list[str], env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], deque[str]]]:
        """A process that is gone when the block is left; with it the end of its stderr."""
        last_lines: deque[str] = deque(maxlen=LINES_KEPT)
        process = subprocess.Popen(
            tied(command),
            cwd=project_root(),
            env=env,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C is for Dagster, which then asks the whole group to end
        )
        copying = threading.Thread(target=_copy, args=(process, last_lines), daemon=True)
        copying.start()
        try:
            yield process, last_lines
        finally:
            self._end(process)
            copying.join(timeout=5)  # a grandchild may hold the pipe open

    def _end(self, process: subprocess.Popen[str]) -> None:
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(self.grace_seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _copy(process: subprocess.Popen[str], last_lines: deque[str]) -> None:
    """Pass stderr on to where Dagster collects it, and keep its end."""
    assert process.stderr is not None
    for line in process.stderr:
        sys.stderr.write(line)
        sys.stderr.flush()
        last_lines.append(line.rstrip("\n"))
