"""Stages as jobs of a Ray cluster that shares a file system with Dagster.

Belongs here: submitting a launch and following it, taking up one that an earlier run left, ending what nobody follows.
Not here: what the job does on the cluster (`ray_driver`), what its end means (`ray_outcome`).

Over dagster-ray's `PipesRayJobClient`. Messages go by files and not through the job's log: Ray cuts a log into pieces
of 20,000 characters, and a message that holds a picture is longer.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from dagster import PipesFileContextInjector, open_pipes_session
from dagster._core.pipes.client import PipesClientCompletedInvocation
from dagster_pipes import DAGSTER_PIPES_MESSAGES_ENV_VAR, encode_param
from pydantic import Field

from assets_defs.launching import Launch, Results
from assets_defs.profile import PROFILE
from m2m.config import Resources, project_root
from m2m.stages import Stage, resources
from orchestration.launchers import job_logs
from orchestration.launchers.following import digest, is_orphan, may_take_up
from orchestration.launchers.messages import MessageFiles, message_parameters
from orchestration.launchers.outcome import LINES_KEPT, last_of_each, results, stage_arguments
from orchestration.launchers.process_mark import RUN_TAG, this_process
from orchestration.launchers.ray_outcome import end_of, log_of, said_by
from orchestration.launchers.surroundings import passed_on

JOB_TAG = "m2m/ray_job"
_FIRST_POLL = 0.2  # seconds; grows to `poll_seconds`
_MOST_PARTS = 1000
_NO_NODE = "No available agent"  # what Ray says, after ten seconds, while its nodes are starting
_NODES_START = 60  # seconds
_LAUNCH = "launch.json"


class RayLauncher(dg.ConfigurableResource):
    """Runs `python -m m2m STAGE ...` as a Ray job: a range of shards as tasks, a training on several nodes by a
    placement group. The nodes have the checkout, its environment (with ray) and the outputs at Dagster's own paths."""

    address: str | None = Field(
        default=None, description="of the dashboard, http://HOST:8265; RAY_ADDRESS comes before it, as Ray has it"
    )
    headers: dict[str, str] = Field(default={}, description="of each request, for example Authorization")
    command: list[str] = Field(default=[sys.executable, "-m", "m2m"], description="what a stage's arguments follow")
    python: str = Field(default=sys.executable, description="of the nodes, for what starts the command there")
    runtime_env: dict[str, Any] = Field(default={}, description="more of Ray's runtime environment")
    gpu_types: dict[str, dict[str, float]] = Field(
        default={}, description="Ray resources by the profile's gpu_type, for example {'accelerator_type:A100': 0.001}"
    )
    autoscaling: bool = Field(default=False, description="wait for nodes that the cluster does not have yet")
    shards_per_task: int = Field(default=1, ge=1, description="of a range; more where there would be over 1,000 tasks")
    grace_seconds: int = Field(default=20, ge=1, description="from SIGTERM to SIGKILL, to save a checkpoint in")
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
        if found is None:
            folder.mkdir(parents=True)
            (folder / _LAUNCH).write_text(json.dumps(self._launch(stage, asked, commands, folder)))
        client = _client(
            self,
            ray,
            MessageFiles([_messages(folder, index) for index in range(len(commands))]),
            PipesFileContextInjector(str(folder / "context.json")),
            found.submission_id if found else None,
        )
        with job_logs.passed_on(_printed(folder)) as ends:
            client.run(
                context=context,
                submit_job_params={
                    "entrypoint": entrypoint(project_root(), self.python, folder / _LAUNCH),
                    "submission_id": f"m2m-{name}",
                    "runtime_env": {**self.runtime_env, "env_vars": self._variables()},
                    "metadata": {
                        "m2m_run": context.run.run_id,
                        "m2m_launch": digest(commands),
                        "m2m_folder": str(folder),
                    },
                    "entrypoint_num_cpus": 0,
                },
            )
        code, why, said = end_of(stage, client.job, client.ended, log_of(ray, client.job))
        said = said or [line for end in ends for line in end][-LINES_KEPT:]
        told = {
            "ray_job": dg.MetadataValue.text(client.job),
            "ray_files": dg.MetadataValue.path(str(folder)),
            "seconds": dg.MetadataValue.float(round(time.monotonic() - started, 1)),
        }
        yield from results(context, stage, last_of_each(client.reported), code, said, told, why=why)

    def end_orphans(self, instance: dg.DagsterInstance) -> list[str]:
        """Stop jobs whose run has been over for a while; returns their ids. Another Dagster's are left alone."""
        with contextlib.suppress(dg.Failure):  # no cluster answers: the next tick asks again
            ray = self._connected()
            orphans = [
                job.submission_id
                for job in _jobs(ray)
                if "m2m_run" in (job.metadata or {})
                and not job.status.is_terminal()
                and is_orphan(instance, JOB_TAG, job.submission_id, job.metadata["m2m_run"], self.orphan_seconds)
            ]
            for orphan in orphans:
                with contextlib.suppress(RuntimeError):  # it has just ended
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
        if self.gpu_types and asked.gpu_type and asked.gpu_type not in self.gpu_types:
            there = ", ".join(self.gpu_types)
            raise _failure(f"{stage.key} asks for gpu_type {asked.gpu_type}; the launcher's gpu_types have {there}")
        processes = max(asked.gpus, 1)
        shared = not stage.partitioned and asked.nodes * processes > 1
        heard = [encode_param(message_parameters(_messages(folder, index))) for index in range(len(commands))]
        return {
            "stage": stage.command,
            "commands": commands,
            "heard": [{DAGSTER_PIPES_MESSAGES_ENV_VAR: parameters} for parameters in heard],
            "folder": str(folder),
            "grace_seconds": self.grace_seconds,
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

    def _variables(self) -> dict[str, str]:
        """Of the job's processes, Ray's own among them."""
        of_ray = {
            "RAY_JOB_STOP_WAIT_TIME_S": str(self.grace_seconds),
            "RAY_task_oom_retries": "0",  # without end by default, and nothing else about the task would change
        }
        return {**of_ray, **passed_on(), **self.runtime_env.get("env_vars", {})}

    def _connected(self) -> Any:
        try:
            from dagster_ray import PipesRayJobClient  # noqa: F401
            from ray.job_submission import JobSubmissionClient
        except ImportError:
            raise _failure("the launcher is ray, which needs `pip install 'm2m[ray]'`") from None
        try:
            return JobSubmissionClient(self.address, headers=self.headers or None)
        except Exception as error:  # Ray's are of many kinds: ConnectionError, RuntimeError, its own
            raise _no_answer(error, self.address) from None


def entrypoint(checkout: Path, python: str, launch: Path) -> str:
    """The shell's line that Ray starts a job by."""
    words = [python, "-m", "orchestration.launchers.ray_driver", str(launch)]
    return f"cd {shlex.quote(str(checkout))} && exec {shlex.join(words)}"


def _left_by_an_earlier_run(ray: Any, context: dg.AssetExecutionContext, commands: str) -> Any:
    """A job that does what is wanted and that nobody follows any more."""
    for job in _jobs(ray):
        said = job.metadata or {}
        same = said.get("m2m_launch") == commands and not job.status.is_terminal()
        if same and may_take_up(context.instance, context.run.run_id, JOB_TAG, job.submission_id, said["m2m_run"]):
            return job
    return None


def _jobs(ray: Any) -> list[Any]:
    try:
        return ray.list_jobs()
    except Exception as error:
        raise _no_answer(error, ray.get_address()) from None


def _client(launcher: RayLauncher, ray: Any, messages: MessageFiles, context_file: Any, taken_up: str | None) -> Any:
    """dagster-ray's client, which also takes a job up, waits for a cancelled one, and leaves judging its end to us."""
    from dagster_ray import PipesRayJobClient

    class Client(PipesRayJobClient):
        client = ray
        job = ""
        ended: Any = None
        reported: Sequence[Any] = ()

        def _start(self, context: Any, session: Any, submit_job_params: Any) -> str:
            if taken_up:
                context.log.info(f"job {taken_up} is still there: followed, not launched again")
            else:
                self._submit(context, session, submit_job_params)
            step = context.op_execution_context.get_step_execution_context().step.key
            context.instance.add_run_tags(context.run.run_id, {f"{JOB_TAG}/{step}": self.job})
            return self.job

        def _submit(self, context: Any, session: Any, submit_job_params: Any) -> None:
            deadline = time.monotonic() + _NODES_START
            while True:
                try:
                    super()._start(context, session, submit_job_params)
                    return
                except Exception as error:
                    if _NO_NODE not in str(error):
                        raise _failure(
                            f"Ray refuses the job: {said_by(error)}. Set the launcher's runtime_env (M2M_LAUNCHER)"
                        ) from None
                    if time.monotonic() > deadline:
                        raise _failure(
                            f"no node of the Ray cluster at {ray.get_address()} takes jobs: look at `ray status` "
                            "there, and launch again once its nodes are up"
                        ) from None
                context.log.info("Ray's nodes are not up yet; asked again")
                time.sleep(_FIRST_POLL)

        def run(self, *, context: Any, submit_job_params: Any, extras: Any = None) -> PipesClientCompletedInvocation:
            self.job = taken_up or submit_job_params["submission_id"]
            with open_pipes_session(
                context=context, message_reader=messages, context_injector=context_file, extras=extras
            ) as session:
                submit_job_params["runtime_env"]["env_vars"] |= session.get_bootstrap_env_vars()
                try:
                    self._start(context, session, submit_job_params)
                    self.ended = self._end_of(context)
                except BaseException:
                    self._terminate(context, self.job)
                    raise
            self.reported = session.get_reported_results()
            return PipesClientCompletedInvocation(session)

        def _end_of(self, context: Any) -> Any:
            """What Ray has of the job that has ended; None where it has nothing more of it."""
            wait, seen = _FIRST_POLL, ""
            while True:
                now = None
                try:
                    now = ray.get_job_info(self.job)
                    said = now.status.value
                except Exception as error:  # the cluster's head is away; the job itself goes on, or is found lost
                    if f"{self.job} does not exist" in str(error):
                        return None
                    said = f"Ray does not answer ({said_by(error)}); the job itself goes on"
                if said != seen:
                    context.log.info(f"job {self.job}: {said}")
                    seen, wait = said, _FIRST_POLL
                if now is not None and now.status.is_terminal():
                    return now
                time.sleep(_FIRST_POLL if messages.all_closed else wait)
                wait = min(wait * 1.3, launcher.poll_seconds)

        def _terminate(self, context: Any, job_id: str) -> None:
            deadline = time.monotonic() + launcher.grace_seconds + 10
            asked, said = False, ""
            while time.monotonic() < deadline:
                try:
                    asked = asked or ray.stop_job(job_id) is not None
                    if ray.get_job_status(job_id).is_terminal():
                        context.log.info(f"job {job_id} has ended")
                        return
                except Exception as error:
                    said = said_by(error)
                    if "does not exist" in said:
                        return
                time.sleep(_FIRST_POLL)
            context.log.error(f"job {job_id} may not have ended; the sensor lost_runs looks again. {said}")

    return Client(address=launcher.address, headers=launcher.headers or None)


def _messages(folder: Path, index: int) -> Path:
    return folder / f"{index}.messages"


def _printed(folder: Path) -> list[tuple[Path, Path]]:
    """The files that a launch's tasks print into."""
    told = json.loads((folder / _LAUNCH).read_text())
    return [(folder / f"{n}.out", folder / f"{n}.err") for n in range(max(len(told["commands"]), told["nodes"]))]


def _no_answer(error: Exception, address: str | None) -> dg.Failure:
    where = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or address
    return _failure(
        f"Ray does not answer at {where or 'http://localhost:8265'}: {said_by(error)}. Set the launcher's address or "
        "headers (M2M_LAUNCHER), or RAY_ADDRESS, which comes before them"
    )


def _failure(why: str) -> dg.Failure:
    return dg.Failure(why, allow_retries=False)
