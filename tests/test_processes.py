"""Processes that were started together: one leads, all hear what came of it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m2m import processes

ROOT = Path(__file__).resolve().parents[1]


def together(tmp_path: Path, *argv: str) -> list[subprocess.CompletedProcess]:
    """`python ...` in two processes, as a launcher starts them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "M2M_OUTPUTS": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, *argv],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": rank, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=280)[1] for process in started]
    return [subprocess.CompletedProcess(argv, one.returncode, stderr=text) for one, text in zip(started, said)]


def test_what_is_current_is_left_alone_by_all_and_errors_reach_all(tmp_path):
    argv = ("-m", "m2m", "filter-captions", "--config", "tiny")
    environment = os.environ | {"M2M_OUTPUTS": str(tmp_path)}
    subprocess.run([sys.executable, *argv], cwd=ROOT, env=environment, check=True, capture_output=True)
    first, second = together(tmp_path, *argv)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "nothing to do" in first.stderr and "nothing to do" not in second.stderr
    first, second = together(tmp_path, *argv, "max_tokens=70")
    assert (first.returncode, second.returncode) == (2, 2)
    assert "error: filter-captions is made by one process; 2 were started together" in first.stderr
    assert "error: the leading process has stopped: filter-captions is made by one process" in second.stderr


_FAILS_IN_A_TEAM = """
import sys, torch
from m2m import processes
try:
    with processes.team():
        raise KeyError
except KeyError:
    sys.exit(f"connected: {torch.distributed.is_initialized()}")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="NCCL is not asked to part after an error")
def test_an_error_disconnects(tmp_path):
    for process in together(tmp_path, "-c", _FAILS_IN_A_TEAM):
        assert process.returncode == 1 and process.stderr.endswith("connected: False\n")


def test_one_process_is_no_team(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert processes.count() == 1 and processes.leads()
    with processes.team() as team, pytest.raises(KeyError), team.leading():
        team.tell("nobody listens")
        raise KeyError
