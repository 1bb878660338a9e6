"""Which process carries a run, so that a run whose process is gone can be told from one that works on.

Belongs here: marking and looking, on one machine. Not here: what is done about a lost run (`orchestration.sensors`).
"""

import os
import socket
from pathlib import Path

RUN_TAG = "m2m/process"


def this_process() -> str:
    """`host/pid/start`: a pid alone is used again."""
    return f"{socket.gethostname()}/{os.getpid()}/{_started(os.getpid())}"


def is_lost(mark: str) -> bool:
    """Whether the marked process is known to be gone; of another machine's, nothing is known."""
    if mark.count("/") < 2:  # a run that has not got so far yet
        return False
    host, pid, started = mark.rsplit("/", 2)
    if host != socket.gethostname() or started == "None":
        return False
    return str(_started(int(pid))) != started


def _started(pid: int) -> int | None:
    """Clock ticks from boot to the process's start; None where it is gone or there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
