"""Several processes of one training: each knows its rank, the first failure ends all, and its exit code is told."""

import os
import signal
import subprocess
import sys
import time

import pytest

SAY = "import os; print(*(os.environ.get(n) for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'DAGSTER_PIPES_CONTEXT')))"


def ranks(code: str, *more: str, processes: int = 2) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "orchestration.launchers.ranks", "--processes", str(processes), *more, "--"]
    environment = os.environ | {"DAGSTER_PIPES_CONTEXT": "here"}
    return subprocess.Popen([*command, sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def test_each_process_knows_its_place_and_the_first_alone_speaks():
    said, _ = ranks(SAY, "--nodes", "2", "--node", "1", "--leader", "train-0:29500").communicate(timeout=60)
    assert sorted(said.splitlines()) == ["2 0 4 None", "3 1 4 None"]
    said, _ = ranks(SAY).communicate(timeout=60)
    assert sorted(said.splitlines()) == ["0 0 2 here", "1 1 2 None"]


@pytest.mark.parametrize(("ends", "code"), [("sys.exit(75)", 75), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_the_first_that_fails_takes_the_others_with_it(ends, code):
    started = time.monotonic()
    process = ranks(f"import os, sys, time\nif os.environ['RANK'] == '1': {ends}\ntime.sleep(100)")
    assert process.wait(60) == code and time.monotonic() - started < 30


def test_a_signal_reaches_each_of_them():
    code = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        "os.write(1, b'here\\n'); time.sleep(100)"
    )
    process = ranks(code)
    assert process.stdout and [process.stdout.readline(), process.stdout.readline()] == ["here\n", "here\n"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
