"""Stages as jobs of a Slurm cluster that shares a file system with Dagster.

Belongs here: following a launch from sbatch to its end, taking up one that an earlier run left, ending what nobody
follows. Not here: Slurm's commands (`slurm_jobs`), the batch script (`slurm_script`), how a job is known
(`slurm_mark`), what its end means (`slurm_outcome`).

A job is known by what Slurm itself keeps of it: its name is the output that it makes, its comment the run that launched
it and a digest of its commands. So nothing that Dagster's process forgets by dying can start a job twice.
"""

import contextlib
import math
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import dagster as dg
from dagster import PipesFileContextInjector, open_pipes_session
from dagster_pipes import DAGSTER_PIPES_MESSAGES_ENV_VAR
from pydantic import Field

from assets_defs.launching import Launch, Results
from assets_defs.profile import PROFILE
from m2m.config import Resources, project_root
from m2m.stages import Stage, resources
from orchestration.launchers import slurm_jobs
from orchestration.launchers.following import digest, is_orphan, may_take_up
from orchestration.launchers.job_logs import passed_on
from orchestration.launchers.messages import MessageFiles
from orchestration.launchers.outcome import MAX_RETRIES, last_of_each, results, stage_arguments
from orchestration.launchers.process_mark import RUN_TAG, this_process
from orchestration.launchers.slurm_jobs import NoAnswer, Refused, Task
from orchestration.launchers.slurm_mark import JOB_TAG, Mark
from orchestration.launchers.slurm_outcome import counted, end_of
from orchestration.launchers.slurm_script import JobFolder, arguments, processes_a_node, script

_FIRST_POLL = 0.2  # seconds; grows to `poll_seconds`


class SlurmLauncher(dg.ConfigurableResource):
    """Runs `python -m m2m STAGE ...` as a job, a range of shards as an array, a training on several GPUs by srun."""

    partition: str | None = Field(default=None, description="the cluster's default where none is given")
    account: str | None = None
    qos: str | None = None
    sbatch: list[str] = Field(default=[], description="more arguments of sbatch, for example --constraint=80gb")
    setup: list[str] = Field(default=[], description="shell lines of the job before its command: module load ...")
    command: list[str] = Field(default=[sys.executable, "-m", "m2m"], description="what a stage's arguments follow")
    shards_per_task: int = Field(default=1, ge=1, description="of an array; more where it would grow too large")
    tasks_at_once: int = Field(default=0, ge=0, description="of an array; 0: as many as the cluster lets run")
    warn_seconds: int = Field(default=120, ge=1, description="from SIGTERM to the time limit, to save a checkpoint in")
    grace_seconds: float = Field(default=20, description="between asking a cancelled job to end and killing it")
    poll_seconds: float = Field(default=5, gt=0, description="between looks at a job that has been running for long")
    patience_seconds: float = Field(default=600, description="for a scheduler that takes no job, before the step fails")
    orphan_seconds: float = Field(default=120, description="that a job outlives its run, for a new one to take it up")

    def materialize(
        self, context: dg.AssetExecutionContext, stage: Stage, launch: Launch, *, shards: Sequence[str] | None = None
    ) -> Results:
        """Run the stage on the cluster; see `assets_defs.launching.Launcher`."""
        if not shutil.which("sbatch"):
            raise _failure(
                "the launcher is slurm, but this machine has no sbatch. Run Dagster where jobs are submitted from, or "
                "set M2M_LAUNCHER=local"
            )
        asked = resources(stage, PROFILE)
        wanted = self._launch(context, stage, launch, shards)
        context.instance.add_run_tags(context.run.run_id, {RUN_TAG: this_process()})
        found = self._left_by_an_earlier_run(context, wanted)
        mark = found.mark if found else wanted.mark
        folder = JobFolder(PROFILE.outputs.resolve() / "jobs" / mark.folder)
        folder.path.mkdir(parents=True, exist_ok=True)
        numbers = range(len(wanted.commands))
        messages = MessageFiles([folder.messages(task) for task in numbers])
        started = time.monotonic()
        with (
            open_pipes_session(
                context=context,
                context_injector=PipesFileContextInjector(str(folder.context)),
                message_reader=messages,
            ) as session,
            passed_on([(folder.out(task), folder.err(task)) for task in numbers]) as last_lines,
        ):
            try:
                if found is None:
                    environment = {**session.get_bootstrap_env_vars(), "PYTHONUNBUFFERED": "1"}
                    environment.pop(DAGSTER_PIPES_MESSAGES_ENV_VAR)  # a task's own
                    job = self._submit(context, wanted, folder, asked, environment)
                else:
                    job = found.job
                    context.log.info(f"job {job} of run {mark.run} is still there: followed, not launched again")
                context.instance.add_run_tags(context.run.run_id, {f"{JOB_TAG}/{_step(context)}": job})
                ends = self._follow(context, job, mark, messages)
            except BaseException:
                self._end(context, wanted.name, mark)
                raise
        code, why, said = end_of(stage, asked, job, ends, last_lines, folder.path)
        told = {
            "slurm_job": dg.MetadataValue.text(job),
            "slurm_files": dg.MetadataValue.path(str(folder.path)),
            "seconds": dg.MetadataValue.float(round(time.monotonic() - started, 1)),
        }
        yield from results(context, stage, last_of_each(session.get_reported_results()), code, said, told, why=why)

    def end_orphans(self, instance: dg.DagsterInstance) -> list[str]:
        """Cancel jobs whose run has been over for a while and that no run has taken up; returns their ids.

        Jobs of runs that the instance does not know are another Dagster's, and left alone.
        """
        if not shutil.which("squeue"):
            return []
        try:
            jobs = [(job.id, mark) for job in slurm_jobs.active() if (mark := Mark.read(job.comment))]
            orphans = [job for job, mark in jobs if is_orphan(instance, JOB_TAG, job, mark.run, self.orphan_seconds)]
            if orphans:
                slurm_jobs.cancel(orphans)
        except NoAnswer:
            return []  # the next tick asks again
        return orphans

    def _launch(
        self, context: dg.AssetExecutionContext, stage: Stage, launch: Launch, shards: Sequence[str] | None
    ) -> "_Wanted":
        parts: list[Sequence[str] | None] = [None]
        if shards is not None:
            each = self.shards_per_task
            if len(shards) > each:
                each = max(each, math.ceil(len(shards) / self._patiently(context, slurm_jobs.largest_array)))
            keys = sorted(shards)
            parts = [keys[start : start + each] for start in range(0, len(keys), each)]
        commands = [[*self.command, *stage_arguments(stage, PROFILE, launch, part)] for part in parts]
        output = stage.folder(PROFILE).resolve()
        name = f"m2m-{PROFILE.name}-{stage.key}-{digest(str(output))}"
        mark = Mark(context.run.run_id, digest(commands), _new_folder_name(context))
        return _Wanted(name, commands, mark, stage.partitioned)

    def _left_by_an_earlier_run(self, context: dg.AssetExecutionContext, wanted: "_Wanted") -> "_Found | None":
        """A job that does what is wanted and that nobody follows any more."""
        jobs = self._patiently(context, lambda: slurm_jobs.active(wanted.name))
        for job in jobs:
            mark = Mark.read(job.comment)
            if mark is None or mark.commands != wanted.mark.commands:
                continue
            if may_take_up(context.instance, context.run.run_id, JOB_TAG, job.id, mark.run):
                return _Found(job.id, mark)
        return None

    def _submit(
        self,
        context: dg.AssetExecutionContext,
        wanted: "_Wanted",
        folder: JobFolder,
        asked: Resources,
        environment: dict[str, str],
    ) -> str:
        processes = processes_a_node(asked, partitioned=wanted.partitioned)
        text = script(folder, wanted.commands, environment, self.setup, processes * asked.nodes)
        folder.script.write_text(text)
        folder.script.chmod(0o700)
        mark = wanted.mark.written()
        given = [
            f"--job-name={wanted.name}",
            f"--comment={mark}",
            # two runs of one output: the second waits in the queue, not on a GPU at the output's lock
            *([] if wanted.partitioned else ["--dependency=singleton"]),
            *arguments(
                folder,
                asked,
                tasks=len(wanted.commands),
                at_once=self.tasks_at_once,
                processes=processes,
                warn_seconds=self.warn_seconds,
                root=project_root(),
            ),
            *(f"--{name}={value}" for name in ("partition", "account", "qos") if (value := getattr(self, name))),
            *self.sbatch,
        ]

        def try_once() -> str:
            # a try that got no answer may have been heard
            heard = [job.id for job in slurm_jobs.active(wanted.name) if job.comment == mark]
            return heard[0] if heard else slurm_jobs.submit(str(folder.script), given)

        job = self._patiently(context, try_once)
        context.log.info(f"job {job} submitted: {len(wanted.commands)} task(s); logs and script in {folder.path}")
        return job

    def _patiently(self, context: dg.AssetExecutionContext, ask):
        """What `ask` returns, asked again while the scheduler does not answer.

        Raises:
            dg.Failure: it does not answer in time, or refuses.
        """
        deadline, wait = time.monotonic() + self.patience_seconds, 1.0
        while True:
            try:
                return ask()
            except Refused as error:
                raise _failure(_refused(error)) from None
            except NoAnswer as error:
                if time.monotonic() > deadline:
                    raise _failure(f"Slurm takes no job: {error}. Waited for {self.patience_seconds:.0f} s") from None
                context.log.warning(f"Slurm takes no job now: {error}. Asking again")
                time.sleep(wait)
                wait = min(wait * 2, 30)

    def _follow(self, context: dg.AssetExecutionContext, job: str, mark: Mark, messages: MessageFiles) -> list[Task]:
        """Wait for the job's end, however long the scheduler itself is gone.

        Raises:
            dg.Failure: it waits for something that will not come.
            dg.RetryRequested: its nodes could not start it.
        """
        wait, seen, hopeless = _FIRST_POLL, "", 0
        while True:
            try:
                now = slurm_jobs.tasks(job, mark.written())
            except NoAnswer as error:
                now, said = None, f"job {job}: {error}; the job itself goes on"
            else:
                said = f"job {job}: {counted(now)}"
            if said != seen:
                context.log.info(said)
                seen, wait = said, _FIRST_POLL
            if now is not None:
                if not any(task.active for task in now):
                    return now
                waits_for = {task.reason for task in now if task.state == "PENDING"}
                if held := waits_for & slurm_jobs.HELD_BACK:
                    why = _failure(f"job {job} could not be started ({', '.join(held)}); another one is submitted")
                    raise dg.RetryRequested(max_retries=MAX_RETRIES, seconds_to_wait=30) from why
                never = waits_for & slurm_jobs.NEVER_STARTS
                hopeless = hopeless + 1 if never else 0
                if hopeless > 2:  # a reason may be a passing one while the job is being looked at
                    raise _failure(_will_not_start(f"job {job} would wait for ever ({', '.join(never)})"))
            time.sleep(_FIRST_POLL if messages.all_closed else wait)
            wait = min(wait * 1.3, self.poll_seconds)

    def _end(self, context: dg.AssetExecutionContext, name: str, mark: Mark) -> None:
        """Cancel the launch and wait until it is gone; also where its id was not heard any more."""
        deadline = time.monotonic() + self.grace_seconds
        asked_at, killed = 0.0, False
        while True:
            with contextlib.suppress(NoAnswer, Refused):
                jobs = [job.id for job in slurm_jobs.active(name) if job.comment == mark.written()]
                if not jobs:
                    return
                late = time.monotonic() > deadline
                if not asked_at or late:
                    slurm_jobs.cancel(jobs, kill=late and bool(asked_at))
                    killed, asked_at = late, asked_at or time.monotonic()
                    context.log.info(f"job {', '.join(jobs)} {'killed' if killed else 'asked to end'}")
            if time.monotonic() > deadline + self.grace_seconds:
                context.log.error("the job could not be cancelled; the sensor lost_runs tries again")
                return
            time.sleep(_FIRST_POLL)


@dataclass(frozen=True)
class _Wanted:
    name: str
    commands: list[list[str]]
    mark: Mark
    partitioned: bool


@dataclass(frozen=True)
class _Found:
    job: str
    mark: Mark


def _refused(error: Refused) -> str:
    said = re.sub(r"^\w+: (error|fatal): ", "", str(error), flags=re.MULTILINE).replace("\n", "; ")
    if "configuration source" in said:
        return f"no slurm.conf is found here: set SLURM_CONF, or run Dagster where jobs are submitted from ({said})"
    return _will_not_start(f"Slurm refuses the job: {said}")


def _will_not_start(why: str) -> str:
    return (
        f"{why}. Set the launcher's partition, account or qos (M2M_LAUNCHER), or the stage's resources in the profile. "
        f"There is:\n{slurm_jobs.what_there_is()}"
    )


def _failure(why: str) -> dg.Failure:
    return dg.Failure(why, allow_retries=False)


def _new_folder_name(context: dg.AssetExecutionContext) -> str:
    step = context.op_execution_context
    return f"{time.strftime('%Y%m%dT%H%M%S')}-{context.run.run_id[:8]}-{_step(context)}-{step.retry_number}"


def _step(context: dg.AssetExecutionContext) -> str:
    return context.op_execution_context.get_step_execution_context().step.key
