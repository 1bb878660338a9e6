"""Processes that are started together: they find each other, signals reach all, one exit code tells how they ended."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from m2m.ranks import run_together
from m2m.training.stopping import SIGNALS, STOPPED, Stop, ending_when_asked

ASKED = """
import os, signal, sys, time
from pathlib import Path
from m2m.training.stopping import ending_when_asked
with ending_when_asked():
    Path(sys.argv[1], os.environ["RANK"]).touch()
    time.sleep(60)
"""


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_they_are_told_who_they_are(tmp_path):
    tell = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1] + '/' + os.environ['RANK'], 'w'))"
    assert run_together(python(tell, tmp_path), 3) == 0
    told = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [one["LOCAL_RANK"] for one in told] == ["0", "1", "2"]
    for name, value in (("WORLD_SIZE", "3"), ("LOCAL_WORLD_SIZE", "3"), ("MASTER_ADDR", "127.0.0.1")):
        assert {one[name] for one in told} == {value}
    assert len({one["MASTER_PORT"] for one in told}) == 1


def test_on_several_machines_ranks_go_on_and_all_look_for_the_first():
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    tell = f"import os; os.write(1, (' '.join(os.environ[n] for n in {names}) + '\\n').encode())"
    start, second = [sys.executable, "-m", "m2m.ranks"], ["--nodes", "2", "--node", "1", "--processes", "2"]
    found = [*start, *second, "--leader", "train-0:29500", "--", *python(tell)]
    done = subprocess.run(found, capture_output=True, text=True)
    assert sorted(done.stdout.splitlines()) == ["2 0 4 2 train-0 29500", "3 1 4 2 train-0 29500"]
    assert subprocess.run([*start, "--processes", "1", "--", *python("raise SystemExit(75)")]).returncode == 75
    lost = subprocess.run([*start, *second, "--", "true"], capture_output=True, text=True)
    assert lost.returncode == 2 and "--leader HOST:PORT" in lost.stderr


def test_ranks_die_with_what_started_them(tmp_path):
    sleeps = (
        "import os, sys, time; from pathlib import Path; Path(sys.argv[1], str(os.getpid())).touch(); time.sleep(60)"
    )
    start = [sys.executable, "-m", "m2m.ranks", "--processes", "2", "--"]
    starter = subprocess.Popen([*start, sys.executable, "-c", sleeps, str(tmp_path)])
    while len(pids := [int(path.name) for path in tmp_path.iterdir()]) < 2:
        assert starter.poll() is None
        time.sleep(0.05)
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(75 if rank else 0)", 75),
        ("sys.exit(2 if rank else 0)", 2),
        ("os.kill(os.getpid(), 9) if rank else None", 137),
        ("sys.exit(3) if rank else time.sleep(60)", 3),  # which the other waits for in vain
    ],
)
def test_the_first_failure_is_the_exit_code(ends, code):
    began = time.monotonic()
    script = f"import os, sys, time; rank = int(os.environ['RANK']); {ends}"
    assert run_together(python(script), 2, grace=0.3) == code
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_reaches_all_and_asks_to_be_called_again(tmp_path, number):
    def send():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    sending = threading.Thread(target=send)
    before = signal.getsignal(number)
    sending.start()
    assert run_together(python(ASKED, tmp_path), 2) == STOPPED
    sending.join()
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_before_and_after_a_training_a_signal_ends_with_75_and_while_it_runs_it_is_remembered(number, capsys):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, ending_when_asked():
        with Stop() as stop:
            assert not stop.asked
            os.kill(os.getpid(), number)
            assert stop.asked
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert ended.value.code == STOPPED
    assert "goes on from what is whole" in capsys.readouterr().err
    assert signal.getsignal(number) == before
