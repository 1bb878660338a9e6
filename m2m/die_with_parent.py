"""Start a command that ends when its starter does: `python die_with_parent.py PARENT_PID COMMAND...`.

Belongs here: that, on Linux (elsewhere the command just runs), and that it ends when it is asked to. Not here: imports
beyond the standard library, for this runs before every launch. A `kill -9` of Dagster, or of what started the ranks of
a training, would otherwise leave them working on, and who starts again would wait for them at the lock of the output.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def tied(command: Sequence[str]) -> list[str]:
    """The command, so that it ends with this process (with the thread that starts it)."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    # a shell's background jobs ignore SIGINT, Dagster in them SIGTERM too, and what is ignored would be inherited
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):  # no prctl: not Linux
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # survives exec
    if os.getppid() != parent:  # it died before it could be asked
        sys.exit("the process that started this command is gone")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"error: {os.uname().nodename} can't start {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
