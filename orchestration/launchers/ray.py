"""Stages as jobs of a Ray cluster that shares a file system with Dagster.

Belongs here: submitting a launch and following it, taking up one that an earlier run left, ending what nobody follows.
Not here: what the job does on the cluster (`ray_driver`), what an end means to Dagster (`outcome`).

Over dagster-ray's `PipesRayJobClient`. Messages go by files and not through the job's log: Ray cuts a log into pieces
of 20,000 characters, and a message that holds a picture is longer.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import contextlib
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from dagster import PipesFileContextInjector, open_pipes_session
from dagster._core.pipes.client import PipesClientCompletedInvocation
from pydantic import Field

from assets_defs.launching import Launch, Results
from assets_defs.profile import PROFILE
from m2m.arguments import EXIT_CALL_AGAIN
from m2m.config import Resources, project_root
from m2m.stages import Stage, resources
from orchestration.launchers.following import digest, is_orphan, may_take_up
from orchestration.launchers.messages import MessageFiles
from orchestration.launchers.outcome import last_of_each, results, stage_arguments
from orchestration.launchers.process_mark import RUN_TAG, this_process
from orchestration.launchers.surroundings import passed_on
from orchestration.launchers.tail import Tail

JOB_TAG = "m2m/ray_job"
_FIRST_POLL = 0.2  # seconds; grows to `poll_seconds`
_LINES_KEPT = 40
_MOST_PARTS = 1000
_SIGNALLED = (-15, 143)


class RayLauncher(dg.ConfigurableResource):
    """Runs `python -m m2m STAGE ...` as a Ray job: a range of shards as tasks, a training on several nodes by a
    placement group. The nodes have the checkout, its environment (with ray) and the outputs at Dagster's own paths."""

    address: str | None = Field(default=None, description="of the dashboard, http://HOST:8265; else RAY_ADDRESS")
    headers: dict[str, str] = Field(default={}, description="of each request, for example Authorization")
    command: list[str] = Field(default=[sys.executable, "-m", "m2m"], description="what a stage's arguments follow")
    python: str = Field(default=sys.executable, description="of the nodes, for what starts the command there")
    runtime_env: dict[str, Any] = Field(default={}, description="more of Ray's runtime environment")
    gpu_types: dict[str, dict[str, float]] = Field(
        default={}, description="Ray resources by the profile's gpu_type, for example {'accelerator_type:A100': 0.001}"
    )
    autoscaling: bool = Field(default=False, description="wait for nodes that the cluster does not have yet")
    shards_per_task: int = Field(default=1, ge=1, description="of a range; more where there would be over 1,000 tasks")
    grace_seconds: float = Field(default=20, description="that a cancelled job is waited for")
    poll_seconds: float = Field(default=5, gt=0, description="between looks at a job that has been running for long")
    orphan_seconds: float = Field(default=120, description="that a job outlives its run, for a new one to take it up")

    def materialize(
        self, context: dg.AssetExecutionContext, stage: Stage, launch: Launch, *, shards: Sequence[str] | None = None
    ) -> Results:
        """Run the stage on the cluster; see `assets_defs.launching.Launcher`."""
        asked = resources(stage, PROFILE)
        commands = [[*self.command, *stage_arguments(stage, PROFILE, launch, part)] for part in self._parts(shards)]
        context.instance.add_run_tags(context.run.run_id, {RUN_TAG: this_process()})
        started = time.monotonic()
        ray = self._connected()
        found = _left_by_an_earlier_run(ray, context, digest(commands))
        retry = context.op_execution_context.retry_number
        name = f"{time.strftime('%Y%m%dT%H%M%S')}-{context.run.run_id[:8]}-{context.asset_key.to_user_string()}-{retry}"
        folder = Path(found.metadata["m2m_folder"]) if found else PROFILE.outputs.resolve() / "jobs" / name
        folder.mkdir(parents=True, exist_ok=True)
        client = _client(
            self,
            ray,
            MessageFiles([folder / f"{index}.messages" for index in range(len(commands))]),
            PipesFileContextInjector(str(folder / "context.json")),
            folder,
            found.submission_id if found else None,
        )
        (folder / "launch.json").write_text(json.dumps(self._launch(stage, asked, commands, folder)))
        entry = f"cd {project_root()} && exec {self.python} -m orchestration.launchers.ray_driver {folder}/launch.json"
        variables = {**passed_on(), **self.runtime_env.get("env_vars", {})}
        client.run(
            context=context,
            submit_job_params={
                "entrypoint": entry,
                "submission_id": f"m2m-{name}",
                "runtime_env": {**self.runtime_env, "env_vars": variables},
                "metadata": {
                    "m2m_run": context.run.run_id,
                    "m2m_launch": digest(commands),
                    "m2m_folder": str(folder),
                },
                "entrypoint_num_cpus": 0,
            },
        )
        code, why = _outcome(stage, client.ended)
        told = {
            "ray_job": dg.MetadataValue.text(client.ended.submission_id),
            "ray_files": dg.MetadataValue.path(str(folder)),
            "seconds": dg.MetadataValue.float(round(time.monotonic() - started, 1)),
        }
        yield from results(context, stage, last_of_each(client.reported), code, client.last_lines(), told, why=why)

    def end_orphans(self, instance: dg.DagsterInstance) -> list[str]:
        """Stop jobs whose run has been over for a while; returns their ids. Another Dagster's are left alone."""
        with contextlib.suppress(dg.Failure):  # no cluster answers: the next tick asks again
            ray = self._connected()
            orphans = [
                job.submission_id
                for job in ray.list_jobs()
                if "m2m_run" in (job.metadata or {})
                and not job.status.is_terminal()
                and is_orphan(instance, JOB_TAG, job.submission_id, job.metadata["m2m_run"], self.orphan_seconds)
            ]
            for orphan in orphans:
                ray.stop_job(orphan)
            return orphans
        return []

    def _parts(self, shards: Sequence[str] | None) -> list[Sequence[str] | None]:
        if shards is None:
            return [None]
        each = max(self.shards_per_task, math.ceil(len(shards) / _MOST_PARTS))
        keys = sorted(shards)
        return [keys[start : start + each] for start in range(0, len(keys), each)]

    def _launch(self, stage: Stage, asked: Resources, commands: list[list[str]], folder: Path) -> dict[str, Any]:
        """What the job is told (`ray_driver`)."""
        processes = max(asked.gpus, 1)
        shared = not stage.partitioned and asked.nodes * processes > 1
        return {
            "commands": commands,
            "folder": str(folder),
            "shared": shared,
            "nodes": asked.nodes if shared else 1,
            "processes": processes,
            "autoscaling": self.autoscaling,
            "needs": {
                "num_cpus": asked.cpus,
                "num_gpus": asked.gpus,
                "memory": int(asked.memory_gb * 2**30),
                "resources": dict(self.gpu_types.get(asked.gpu_type or "", {})),
            },
        }

    def _connected(self) -> Any:
        try:
            from dagster_ray import PipesRayJobClient  # noqa: F401
            from ray.job_submission import JobSubmissionClient
        except ImportError:
            raise _failure("the launcher is ray, which needs `pip install 'm2m[ray]'`") from None
        try:
            return JobSubmissionClient(self.address, headers=self.headers or None)
        except Exception as error:  # Ray's are of many kinds: ConnectionError, RuntimeError, its own
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            where = self.address or "the cluster of RAY_ADDRESS"
            raise _failure(
                f"Ray does not answer at {where}: {said}. Set the launcher's address (M2M_LAUNCHER)"
            ) from None


def _left_by_an_earlier_run(ray: Any, context: dg.AssetExecutionContext, commands: str) -> Any:
    """A job that does what is wanted and that nobody follows any more."""
    for job in ray.list_jobs():
        said = job.metadata or {}
        same = said.get("m2m_launch") == commands and not job.status.is_terminal()
        if same and may_take_up(context.instance, context.run.run_id, JOB_TAG, job.submission_id, said["m2m_run"]):
            return job
    return None


def _client(
    launcher: RayLauncher, ray: Any, messages: MessageFiles, context_file: Any, folder: Path, taken_up: str | None
) -> Any:
    """dagster-ray's client, which also takes a job up, waits for a cancelled one, and leaves judging its end to us."""
    from dagster_ray import PipesRayJobClient

    class Client(PipesRayJobClient):
        ended: Any = None
        reported: Sequence[Any] = ()

        def _start(self, context: Any, session: Any, submit_job_params: Any) -> str:
            if taken_up:
                context.log.info(f"job {taken_up} is still there: followed, not launched again")
                job = taken_up
            else:
                job = super()._start(context, session, submit_job_params)
            step = context.op_execution_context.get_step_execution_context().step.key
            context.instance.add_run_tags(context.run.run_id, {f"{JOB_TAG}/{step}": job})
            return job

        def run(self, *, context: Any, submit_job_params: Any, extras: Any = None) -> PipesClientCompletedInvocation:
            with open_pipes_session(
                context=context, message_reader=messages, context_injector=context_file, extras=extras
            ) as session:
                told = session.get_bootstrap_env_vars()
                submit_job_params["runtime_env"]["env_vars"] |= told
                job = self._start(context, session, submit_job_params)
                try:
                    self.ended = self._end_of(context, job)
                except BaseException:
                    self._terminate(context, job)
                    raise
            self.reported = session.get_reported_results()
            return PipesClientCompletedInvocation(session)

        def _end_of(self, context: Any, job_id: str) -> Any:
            wait, seen = _FIRST_POLL, ""
            tails = [(Tail(folder / f"{n}.out"), sys.stdout) for n in range(_MOST_PARTS)]
            tails = [pair for pair in tails if int(pair[0].path.stem) < _speakers(folder)]
            tails += [(Tail(tail.path.with_suffix(".err")), sys.stderr) for tail, _ in tails]
            while True:
                try:
                    now = ray.get_job_info(job_id)
                except Exception as error:  # the cluster's head is away; the job itself goes on, or is found lost
                    now, said = None, f"Ray does not answer ({str(error).splitlines()[0][:200]})"
                else:
                    said = now.status.value
                if said != seen:
                    context.log.info(f"job {job_id}: {said}")
                    seen, wait = said, _FIRST_POLL
                for tail, to in tails:
                    to.writelines(f"{line}\n" for line in tail.lines())
                    to.flush()
                if now is not None and now.status.is_terminal():
                    return now
                time.sleep(_FIRST_POLL if messages.all_closed else wait)
                wait = min(wait * 1.3, launcher.poll_seconds)

        def _terminate(self, context: Any, job_id: str) -> None:
            deadline = time.monotonic() + launcher.grace_seconds
            ray.stop_job(job_id)
            while time.monotonic() < deadline:
                if ray.get_job_status(job_id).is_terminal():
                    context.log.info(f"job {job_id} has ended")
                    return
                time.sleep(_FIRST_POLL)
            context.log.error(f"job {job_id} has not ended; the sensor lost_runs looks again")

        def last_lines(self) -> list[str]:
            files = [path for n in range(_speakers(folder)) if (path := folder / f"{n}.err").exists()]
            lines = [line for path in files for line in path.read_text(errors="replace").splitlines()[-_LINES_KEPT:]]
            with contextlib.suppress(Exception):
                said = ray.get_job_logs(self.ended.submission_id).splitlines()
                lines += [line for line in said if line.startswith("error: ")]
            return lines[-_LINES_KEPT:]

    return Client(address=launcher.address, headers=launcher.headers or None)


def _speakers(folder: Path) -> int:
    """How many tasks write a log of their own."""
    told = json.loads((folder / "launch.json").read_text())
    return max(len(told["commands"]), told["nodes"])


def _outcome(stage: Stage, ended: Any) -> tuple[int, str | None]:
    code = ended.driver_exit_code
    goes_on = f"{stage.key}: job {ended.submission_id} was stopped; it goes on from what is whole"
    match ended.status.value:
        case "SUCCEEDED":
            return 0, None
        case "STOPPED":
            return 1, f"{stage.key}: job {ended.submission_id} was stopped on the cluster; what is whole is kept"
    if code in (EXIT_CALL_AGAIN, *_SIGNALLED):
        return EXIT_CALL_AGAIN, goes_on
    if code is None:  # not the command but Ray ended: a lost head node, a driver that could not be started
        return EXIT_CALL_AGAIN, f"{goes_on}. {ended.message or ''}".strip()
    return code, None


def _failure(why: str) -> dg.Failure:
    return dg.Failure(why, allow_retries=False)
