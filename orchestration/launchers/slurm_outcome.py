"""What the end of a Slurm job means: the same as which end of the command, and why.

Belongs here: states of tasks, read together. Not here: asking for them (`slurm_jobs`), telling Dagster (`outcome`).
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from m2m.arguments import EXIT_CALL_AGAIN
from m2m.config import Resources
from m2m.stages import Stage
from orchestration.launchers import slurm_jobs
from orchestration.launchers.slurm_jobs import Task

_SIGTERM = -15
_NO_OUTPUT = -53  # no signal: so Slurm says that it could not open the files for what the job prints
_TOO_LARGE = re.compile(r"slurmstepd.*(exceeded .*memory|oom.?kill)", re.IGNORECASE)  # where it is no state of its own


def end_of(
    stage: Stage, asked: Resources, job: str, ends: Sequence[Task], last_lines: Sequence[Iterable[str]], folder: Path
) -> tuple[int, str | None, list[str]]:
    """The job's end as a command's: an exit code; why, where Slurm knows that better; that command's last lines.

    Args:
        ends: of all its tasks.
        last_lines: the end of each one's stderr.
        folder: where it was to be written.
    """
    own = [task for task in ends if not _goes_on(task) and task.state != "COMPLETED"]
    taken = [task for task in ends if _goes_on(task)]
    said = list(last_lines[(own or taken or ends)[0].number])
    code, why = _as_a_command(stage, asked, job, own, taken, said, folder)
    return code, why, said


def _as_a_command(
    stage: Stage, asked: Resources, job: str, own: Sequence[Task], taken: Sequence[Task], said: list[str], folder: Path
) -> tuple[int, str | None]:
    if own:
        end = own[0]
        kept = "what is whole is kept"
        too_large = end.exit_code == -9 and any(_TOO_LARGE.search(line) for line in said)
        match "OUT_OF_MEMORY" if too_large else end.state:
            case "OUT_OF_MEMORY":
                more = f"it asked for {asked.memory_gb:g} GB a node: raise {stage.command}.resources.memory_gb"
                return -9, f"{stage.key} ran out of memory (job {job}); {more}"
            case "CANCELLED":
                return 1, f"{stage.key}: job {job} was cancelled on the cluster; {kept}"
            case "FAILED" if end.exit_code == _NO_OUTPUT:
                silent = f"the node of job {job} can't write to {folder}"
                return 1, f"{stage.key}: {silent}: nodes must share this file system with Dagster; set M2M_OUTPUTS"
            case "FAILED":
                return end.exit_code or 1, None
        return end.exit_code or 1, f"{stage.key}: job {job} ended as {end.state} ({end.reason}); {kept}"
    if not taken:
        return 0, None
    ended = "was asked to end" if taken[0].state == "FAILED" else f"ended as {taken[0].state}"
    return EXIT_CALL_AGAIN, f"{stage.key}: job {job} {ended}; it goes on from what is whole"


def counted(tasks: Sequence[Task]) -> str:
    """The states of a job's tasks, for people."""
    if len(tasks) == 1:
        (task,) = tasks
        return f"{task.state} ({task.reason})" if task.reason not in ("", "None") else task.state
    states = sorted(task.state for task in tasks)
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _goes_on(task: Task) -> bool:
    """Whether the same command, called again, takes up the work: the cluster ended it, ahead of time or at it."""
    asked_to_end = task.state == "FAILED" and task.exit_code in (EXIT_CALL_AGAIN, _SIGTERM)
    return asked_to_end or task.state in slurm_jobs.TAKEN_AWAY
