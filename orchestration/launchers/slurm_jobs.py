"""Slurm's commands, and what they answer.

Belongs here: submitting, looking, cancelling. Not here: stages, Dagster, what is done about an answer (`slurm`).
"""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

UNKNOWN = "UNKNOWN"
ACTIVE = frozenset(
    {
        *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"),
        *("STAGE_OUT", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
    }
)
"""The job is still the scheduler's."""
TAKEN_AWAY = frozenset({"PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REVOKED", "TIMEOUT", UNKNOWN})
"""The cluster ended it, or nobody remembers how it ended: the same command goes on, or finds that all is done."""
NEVER_STARTS = frozenset(
    {
        *("PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit", "BadConstraints", "DependencyNeverSatisfied"),
        *("InvalidAccount", "InvalidQOS", "AccountNotAllowed", "QOSNotAllowed"),
        *(
            f"{who}Max{what}"
            for who in ("Assoc", "QOS")
            for what in ("CpuPerJobLimit", "GRESPerJob", "MemPerJob", "NodePerJobLimit", "WallDurationPerJobLimit")
        ),
        "QOSMaxMemoryPerJob",
    }
)
"""Why a job waits that would wait for ever."""
HELD_BACK = frozenset({"launch_failed_requeued_held", "JobHoldMaxRequeue"})
"""Why a job waits that its cluster could not start, until an administrator releases it; another one may start."""
_MAY_PASS = ("unable to contact", "timed out", "temporarily", "job submit limit", "submission limit", "connect failure")
_SECONDS = 60  # for one command; Slurm's own time-out is 10 s a try


class NoAnswer(Exception):
    """The scheduler can't be reached, or can't take more now; it may later."""


class Refused(Exception):
    """The scheduler does not do this; holds what it said."""


@dataclass(frozen=True)
class Task:
    """One job, or one task of an array."""

    state: str
    reason: str = ""
    exit_code: int = 0  # negative: the signal that ended it
    number: int = 0  # in its array

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


@dataclass(frozen=True)
class Listed:
    """A job that has not ended."""

    id: str
    comment: str


def submit(script: str, arguments: Sequence[str]) -> str:
    """Hand a batch script in; returns the job's id.

    Raises:
        Refused: for good.
        NoAnswer: no scheduler or a full queue. The job may have been taken all the same: look before asking again.
    """
    return _call("sbatch", "--parsable", *arguments, script).split(";")[0]


def tasks(job: str, comment: str) -> list[Task]:
    """What became of a job, by task.

    Args:
        comment: the job's; another job of that id is not meant (a scheduler that lost its state counts anew).

    Raises:
        NoAnswer: the scheduler can't be reached.
    """
    try:
        return list(_shown(_call("scontrol", "-o", "show", "job", job), comment)) or [Task(UNKNOWN)]
    except Refused:  # forgotten some minutes after its end
        return list(_accounted(job)) or [Task(UNKNOWN)]


def active(name: str | None = None) -> list[Listed]:
    """The user's jobs that have not ended, arrays as one.

    Raises:
        NoAnswer: the scheduler can't be reached.
    """
    by_name = [f"--name={name}"] if name else []
    rows = [line.split(" ", 1) for line in _call("squeue", "-h", "--me", *by_name, "-o", "%F %k").splitlines()]
    return [Listed(job, comment) for job, comment in dict(rows).items()]


def cancel(jobs: Sequence[str], *, kill: bool = False) -> None:
    """Ask jobs to end (SIGTERM), or kill them.

    Raises:
        NoAnswer: the scheduler can't be reached.
    """
    _call("scancel", *(["--signal=KILL", "--full"] if kill else []), *jobs, refusal_is_an_answer=False)


def largest_array() -> int:
    """How many tasks an array may have here."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", _call("scontrol", "show", "config"))
    return int(found[1]) if found else 1000


def what_there_is() -> str:
    """Partitions with their limits and nodes, for people."""
    try:
        lines = _call("sinfo", "-h", "-o", "%R: %D nodes of %c CPUs, %m MB, %G; up to %l").splitlines()
    except (NoAnswer, Refused):
        return ""
    return "\n".join(line.replace("(null)", "no GPUs") for line in lines)


def _shown(text: str, comment: str) -> Iterator[Task]:
    for line in text.splitlines():
        said = dict(re.findall(r"\b(JobState|ExitCode|Reason|Comment|ArrayTaskId)=(\S+)", line))
        if "JobState" in said and said.get("Comment") == comment:
            code, number = _exit_code(said.get("ExitCode", "0:0")), said.get("ArrayTaskId", "")
            yield Task(said["JobState"], said.get("Reason", ""), code, _number(number))


def _accounted(job: str) -> Iterator[Task]:
    try:
        text = _call("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,ExitCode,JobID,Reason")
    except Refused:  # a cluster without accounting
        return
    for line in text.splitlines():
        state, code, one, reason = line.split("|", 3)
        yield Task(state.split()[0], reason, _exit_code(code), _number(one.partition("_")[2]))  # "CANCELLED by 1000"


def _number(said: str) -> int:
    """In the array; of those that have not begun, a range is told."""
    return int(said) if said.isdigit() else 0


def _exit_code(said: str) -> int:
    code, _, signal = said.partition(":")
    if signal and int(signal):
        return -int(signal)
    return 128 - int(code) if int(code) > 128 else int(code)  # a shell's way to tell of a signal


def _call(*argv: str, refusal_is_an_answer: bool = True) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SBATCH_", "SQUEUE_"))}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_SECONDS, check=False, env=env)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{argv[0]} has not answered within {_SECONDS} s") from None
    if done.returncode == 0:
        return done.stdout.strip()
    said = done.stderr.strip() or f"{shlex.join(argv)}: exit code {done.returncode}"
    if any(text in said.lower() for text in _MAY_PASS):
        raise NoAnswer(said)
    if refusal_is_an_answer:
        raise Refused(said)
    return ""
