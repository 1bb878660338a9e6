"""TensorBoard, W&B: what they really write, where their packages are installed (W&B's is not among ours)."""

import struct

import pytest

from m2m.training.acceleration import open_accelerator
from m2m.training.log import LogLine
from m2m.training.run_log import RunLog
from tests.training.toy import COMPUTE, toy_settings


def log_two_steps(folder, tracker: str) -> None:
    settings = toy_settings(log_every=1, trackers=[tracker])
    with RunLog(settings, open_accelerator(COMPUTE, [tracker], folder), None, lambda: 1, "a-run") as log:
        for step in (1, 2):
            log.add(LogLine(step, 0, 1.0 / step, 1.0, 1e-3, 2.0), sets=4, seconds=2.0, last=step == 2)


def test_tensorboard_gets_losses_and_speed(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    log_two_steps(tmp_path, "tensorboard")
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[import-not-found]

    found = {}
    for path in tmp_path.rglob("events.out.tfevents.*"):  # of the settings, of the losses
        content = path.read_bytes()
        while content:  # a record: its length, 4 bytes of a checksum, its bytes, 4 of another checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            content = content[16 + length :]
    assert found["loss", 1] == 1.0 and found["loss", 2] == 0.5
    assert found["sets_per_second", 2] == 2.0


def test_wandb_gets_losses_and_speed_in_a_run_that_can_be_gone_on_with(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_two_steps(tmp_path, "wandb")
    (written,) = tmp_path.rglob("*.wandb")
    assert written.name == "run-a-run.wandb" and b"sets_per_second" in written.read_bytes()
