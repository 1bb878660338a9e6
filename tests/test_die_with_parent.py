"""A command ends when it is asked to, whatever its starter ignores."""

import signal
import subprocess
import sys
import time

from m2m.die_with_parent import tied


def test_a_starter_that_ignores_sigterm_does_not_hand_that_down():
    code = "import signal, time; print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True); time.sleep(60)"
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", ignoring, *tied([sys.executable, "-c", code])[1:]], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "True\n"
    started = time.monotonic()
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM and time.monotonic() - started < 5
