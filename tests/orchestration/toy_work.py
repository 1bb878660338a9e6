"""A toy stage's work in steps, each noted; what is done is kept as the real stages keep it.

Belongs here: steps, shards, checkpoints, the gate. Not here: the toy stage (`toy_stages`), what is done to it (tests).

Generation makes shard after shard, training has checkpoints and ends with one when it is asked to. Step `GATE` of the
training and of shard 1 waits until the file `gate` in the outputs says how it goes on.
"""

import os
import sys
import time
from pathlib import Path

from m2m import artifacts
from m2m.stage_run import StageRun
from m2m.training.stopping import STOPPED, Stop

STEPS, GATE, CHECKPOINT_EVERY = 12, 8, 5
GATED_SHARD = 1


def generate(run: StageRun, shard: int) -> None:
    """One shard, unless it is whole."""
    with run.lock(f"shard-{shard}"):
        whole = run.out / f"{shard:05d}.txt"
        placed = run.stage.folder(run.profile) / whole.name  # another task may have put all in place meanwhile
        if whole.exists():  # not written again: another task may be putting it in its place
            return
        if placed.exists():
            artifacts.write_bytes(whole, str(shard).encode())
            return
        for step in range(1, STEPS + 1):
            _note(run, f"shard-{shard}", step)
            if step == GATE and shard == GATED_SHARD:
                _wait_at_gate(run, None)
        artifacts.write_bytes(whole, str(shard).encode())


def train(run: StageRun) -> None:
    """Steps from the last checkpoint on."""
    checkpoint = run.out / "checkpoint"
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    with Stop() as stop:
        for step in range(done + 1, STEPS + 1):
            _note(run, "training", step)
            if step == GATE:
                _wait_at_gate(run, stop)
            if stop.asked or step % CHECKPOINT_EVERY == 0:
                artifacts.write_bytes(checkpoint, str(step).encode())
            if stop.asked:
                sys.exit(STOPPED)
    artifacts.write_bytes(run.out / "00000.txt", str(STEPS).encode())
    checkpoint.unlink()


def _note(run: StageRun, what: str, step: int) -> None:
    job = os.environ.get("SLURM_JOB_ID", "none")
    handle = os.open(run.profile.outputs / "steps", os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.write(handle, f"{what} {step} {os.getpid()} {job}\n".encode())
    os.close(handle)


def _wait_at_gate(run: StageRun, stop: Stop | None) -> None:
    gate: Path = run.profile.outputs / "gate"
    while not gate.exists():
        if stop and stop.asked:
            return
        time.sleep(0.05)
    match gate.read_text():
        case "exit 1":
            raise ZeroDivisionError("a bug")
        case "out of memory":
            held = bytearray(os.urandom(1 << 20) * 800)
            time.sleep(60 + len(held) * 0)
