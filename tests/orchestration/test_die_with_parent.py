"""A command ends when it is asked to, whatever its starter ignores."""

import os
import signal
import subprocess
import sys
import time

from orchestration.launchers import die_with_parent


def test_a_starter_that_ignores_sigterm_does_not_hand_that_down():
    code = "import signal, time; print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True); time.sleep(60)"
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    tied = [die_with_parent.__file__, str(os.getpid()), sys.executable, "-c", code]
    process = subprocess.Popen([sys.executable, "-c", ignoring, *tied], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "True\n"
    started = time.monotonic()
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM and time.monotonic() - started < 5
