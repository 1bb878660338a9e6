"""What a Slurm job runs, and what is asked for it.

Belongs here: the batch script, sbatch's arguments. Not here: calling sbatch (`slurm_jobs`).
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from dagster_pipes import DAGSTER_PIPES_MESSAGES_ENV_VAR, encode_param

from m2m.config import Resources
from orchestration.launchers.messages import message_parameters

_LEFT_TO_END = 0.5  # of the time limit: a short job is not asked to end as soon as it has begun

# cpus: srun of Slurm 22.05 and newer does not ask for them by itself, and would bind each process to one core.
# wait: processes that are asked to end leave together, each with its exit code; of one that died the others may wait
# for ever.
_SRUN = '--cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=60'
_MISSING = "it needs the environment that Dagster runs in at the same path, or set the launcher's command or setup"
_ONE_OF_MANY = """
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
[ "$RANK" = 0 ] || unset DAGSTER_PIPES_CONTEXT DAGSTER_PIPES_MESSAGES
exec "$@"
"""


class JobFolder:
    """Where a launch's files lie, on the file system that the nodes share with Dagster."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def script(self) -> Path:
        return self.path / "job.sh"

    @property
    def context(self) -> Path:
        return self.path / "context.json"

    def messages(self, task: int) -> Path:
        return self.path / f"{task}.messages"

    def out(self, task: int | str) -> Path:
        return self.path / f"{task}.out"

    def err(self, task: int | str) -> Path:
        return self.path / f"{task}.err"


def script(
    folder: JobFolder,
    commands: Sequence[Sequence[str]],
    environment: Mapping[str, str],
    setup: Sequence[str],
    processes: int,
) -> str:
    """A batch script that becomes its task's command, so that the command itself gets Slurm's signals.

    Args:
        commands: one a task of the array; a single one makes no array.
        setup: shell lines before it.
        processes: how many make the output together, over all nodes; started by srun where there are several.
    """
    lines = ["#!/bin/bash", *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()), *setup]
    lines.append("case ${SLURM_ARRAY_TASK_ID:-0} in")
    for task, command in enumerate(commands):
        messages = encode_param(message_parameters(folder.messages(task)))
        lines.append(f"{task}) export {DAGSTER_PIPES_MESSAGES_ENV_VAR}={messages}; set -- {shlex.join(command)} ;;")
    lines += [
        "esac",
        f'command -v "$1" >/dev/null || {{ echo "error: node $(hostname) has no $1: {_MISSING}" >&2; exit 127; }}',
    ]
    if processes > 1:
        lines += [
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            # where Slurm itself reaches the node, which need not be its name
            "MASTER_ADDR=$(scontrol -o show node \"$first\" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')",
            "export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
            f'exec srun {_SRUN} bash -c {shlex.quote(_ONE_OF_MANY.strip())} m2m "$@"',
        ]
    else:
        lines.append('exec "$@"')
    return "\n".join(lines) + "\n"


def processes_a_node(asked: Resources, *, partitioned: bool) -> int:
    """One a GPU where a training is shared; a partitioned stage is shared by shards instead."""
    return 1 if partitioned else max(asked.gpus, 1)


def arguments(
    folder: JobFolder, asked: Resources, *, tasks: int, at_once: int, processes: int, warn_seconds: int, root: Path
) -> list[str]:
    """What a stage's request is to sbatch.

    Args:
        at_once: tasks of an array that may run together; 0 for all.
        processes: a node.
        warn_seconds: between SIGTERM and the time limit.
    """
    minutes = math.ceil(asked.hours * 60)
    log = "%a" if tasks > 1 else "0"
    limit = f"%{at_once}" if at_once else ""
    gpu = f"gpu:{asked.gpu_type}" if asked.gpu_type else "gpu"
    single = asked.nodes * processes == 1
    warn = min(warn_seconds, int(minutes * 60 * _LEFT_TO_END))
    return [
        f"--output={folder.out(log)}",
        f"--error={folder.err(log)}",
        "--open-mode=append",  # a job that is started again tells on
        f"--chdir={root}",
        f"--time={minutes}",
        f"--signal={'B:' if single else ''}TERM@{warn}",  # without B it goes to srun's processes and not to the script
        "--requeue",
        f"--nodes={asked.nodes}",
        f"--ntasks-per-node={processes}",
        f"--cpus-per-task={max(asked.cpus // processes, 1)}",
        f"--mem={math.ceil(asked.memory_gb * 1024)}M",
        *([f"--gres={gpu}:{asked.gpus}"] if asked.gpus else []),
        *([f"--array=0-{tasks - 1}{limit}"] if tasks > 1 else []),
    ]
