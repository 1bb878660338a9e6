"""A run is lost when its process is gone, and only then."""

import subprocess
import sys

from orchestration.launchers.process_mark import is_lost, this_process

ASK = """
import time
from orchestration.launchers.process_mark import this_process
print(this_process(), flush=True)
time.sleep(60)
"""


def test_a_process_is_lost_once_it_is_gone():
    assert not is_lost(this_process())
    with subprocess.Popen([sys.executable, "-c", ASK], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        mark = process.stdout.readline().strip()
        assert not is_lost(mark)
        process.kill()
        process.wait()
        assert is_lost(mark)


def test_another_process_with_its_pid_is_not_it():
    host, pid, started = this_process().rsplit("/", 2)
    assert is_lost(f"{host}/{pid}/{int(started) - 1}")


def test_of_another_machine_nothing_is_known():
    assert not is_lost(f"elsewhere/{this_process().partition('/')[2]}")
