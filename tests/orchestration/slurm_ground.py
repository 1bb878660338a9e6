"""The project's own Slurm (`services/slurm/up.sh`, found by the fixture `own_slurm`), looked at and struck.

Belongs here: asking it, what clusters do to a job. Not here: what must come of that (the tests).
"""

import os
import signal
import subprocess
import time
from pathlib import Path

from waiting import wait_for


def slurm(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


def jobs() -> list[str]:
    """States of the jobs that have not ended."""
    return slurm("squeue", "-h", "--me", "-o", "%T").split()


def running() -> list[str]:
    """Ids of the tasks that run."""
    return slurm("squeue", "-h", "--me", "-t", "RUNNING", "-o", "%A").split()


def take_away(how: str, job: str) -> None:
    """Have the cluster take a running job's node, and let it start again soon.

    Slurm itself leaves a job that it took back in the queue for two minutes; in the second in which it was ended, its
    node would refuse it.
    """
    node, again = slurm("squeue", "-h", "-j", job, "-o", "%N"), ["starttime=now+2"]
    match how:
        case "requeue":
            slurm("scontrol", "requeue", job)
        case "preempt":
            whole_node = ["--partition=urgent", f"--nodelist={node}", "--exclusive", "--time=1", "--output=/dev/null"]
            slurm("sbatch", "--gres=gpu:8", "--mem=100M", "--job-name=urgent", *whole_node, "--wrap=sleep 1")
        case "node down":
            slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
            again.append(f"excnodelist={node}")  # here it is back at once, before it has ended what it ran
    wait_for(lambda: slurm("squeue", "-h", "-j", job, "-o", "%T") == "PENDING")
    slurm("scontrol", "update", f"jobid={job}", *again)
    if how == "node down":
        # it may have come back by itself
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False, capture_output=True)
        wait_for(lambda: slurm("sinfo", "-h", "-p", "gpu", "-n", node, "-o", "%T") in ("idle", "mixed"))


def at_its_limit(job: str, seconds: int = 90) -> None:
    """Leave a job so much time: less than its warning, so that it is asked to end when Slurm next looks (30 s)."""
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))
    slurm("scontrol", "update", f"jobid={job}", f"endtime={end}")


def remembered(conf: Path, job: str) -> None:
    """Wait until slurmctld has written down that a job runs, as it does some seconds after a change."""
    state = conf.parent / "state" / "job_state"
    changed = time.time()
    slurm("scontrol", "update", f"jobid={job}", "mailuser=nobody")
    wait_for(lambda: state.exists() and state.stat().st_mtime > changed)


def kill_daemon(conf: Path, name: str) -> None:
    """SIGKILL to `slurmctld`, or to `slurmd.n1`."""
    os.kill(int((conf.parent / "run" / f"{name}.pid").read_text()), signal.SIGKILL)


def start_daemon(name: str) -> None:
    daemon, _, node = name.partition(".")
    # as up.sh starts them: interrupts reach their jobs
    slurm("env", "--default-signal=INT,QUIT", daemon, *(["-N", node] if node else []))
