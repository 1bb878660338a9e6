"""The loop: exact resume under faults, sums over micro-batches, averaged weights, stops that say why."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from m2m.errors import CheckFailed, ConfigError, InputError
from m2m.training import checkpoints
from m2m.training import log as log_module
from m2m.training.checkpoints import Checkpoint
from m2m.training.log import LOG, LogLine, is_spike, skipped_in_a_row
from m2m.training.objective import Objective, SetLoss
from m2m.training.stopping import STOPPED
from tests.training.toy import FEATURES, ToySets, toy_settings, toy_training, toy_unet

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    unet, _ = toy_training(out)
    return unet.state_dict(), (out / LOG).read_text()


def assert_equal_weights(found, expected) -> None:
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def assert_equal_training(out: Path, unet, uninterrupted) -> None:
    weights, log = uninterrupted
    assert (out / LOG).read_text() == log
    assert_equal_weights(unet.state_dict(), weights)


@pytest.mark.parametrize("reads", [1, 13, 14, 46])
def test_an_interrupted_and_resumed_training_is_the_uninterrupted_one(tmp_path, reads, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        toy_training(tmp_path, ToySets(fatal_reads=reads))
    unet, _ = toy_training(tmp_path)
    assert_equal_training(tmp_path, unet, uninterrupted)


# imports and five trainings in processes of their own: a busy machine takes minutes
slow_machine = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """A folder: one killed and twice asked to stop, one by two processes, one by one; and how they ended."""
    folder = tmp_path_factory.mktemp("processes")
    argv = [sys.executable, "-m", "tests.training.toy", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=environment, timeout=540, stdout=subprocess.PIPE, text=True, check=True)
    return folder, [int(code) for code in done.stdout.split()[-6:]]


@slow_machine
def test_a_killed_training_and_one_asked_to_stop_go_on_exactly(processes, uninterrupted):
    folder, codes = processes
    assert codes[:3] == [-signal.SIGKILL, STOPPED, STOPPED]
    newest = checkpoints.load_newest(folder / "faults" / "checkpoints", "toy", print)
    # killed at step 6 after the checkpoint of step 3; then step 4 was the one in progress, then step 5
    assert newest is not None and newest.step == 5
    unet, _ = toy_training(folder / "faults")
    assert_equal_training(folder / "faults", unet, uninterrupted)


@slow_machine
def test_two_processes_train_as_one(processes):
    folder, codes = processes
    assert codes[3:] == [0, 0, 0]
    two, one = (
        [json.loads(line) for line in (folder / name / LOG).read_text().splitlines()] for name in ("two", "one")
    )
    assert [line["step"] for line in two] == list(range(1, 21))
    for line, other in zip(two, one, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(tmp_path, uninterrupted, capsys):
    with pytest.raises(KeyboardInterrupt):
        toy_training(tmp_path, ToySets(fatal_reads=33))
    newest = tmp_path / "checkpoints" / "step-000006"
    content = (newest / "unet.safetensors").read_bytes()
    (newest / "unet.safetensors").write_bytes(content[:-5] + b"12345")
    said = []
    found = checkpoints.load_newest(tmp_path / "checkpoints", "toy", said.append)
    assert found is not None and found.step == 3
    assert "unet.safetensors is damaged" in said[0]
    unet, _ = toy_training(tmp_path)
    assert_equal_training(tmp_path, unet, uninterrupted)


def test_half_written_and_foreign_checkpoints_are_not_used(tmp_path):
    toy_training(tmp_path, steps=6)
    folder = tmp_path / "checkpoints"
    (folder / "step-000006" / "state.json").unlink()
    said = []
    assert checkpoints.load_newest(folder, "other settings", said.append) is None
    assert len(said) == 2 and "made with other settings" in said[1]


def test_a_checkpoint_stays_beside_a_damaged_one_of_a_later_step(tmp_path):
    for step in (6, 3):
        checkpoints.save(tmp_path, Checkpoint(step, {"average": {"weight": torch.ones(1)}}), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_only_the_last_checkpoints_are_kept(tmp_path):
    toy_training(tmp_path, checkpoint_every=1, keep_checkpoints=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000011", "step-000012"]


def test_the_log_has_every_step_once_and_no_times(uninterrupted):
    lines = [json.loads(line) for line in uninterrupted[1].splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert set(lines[0]) == {"step", "epoch", "loss", "smoothed", "lr", "grad_norm"}
    assert all(line["lr"] == 1e-3 for line in lines)


@pytest.mark.parametrize("micro", [1, 3])
def test_the_result_does_not_depend_on_the_micro_batch(tmp_path, micro, uninterrupted):
    _, log = toy_training(tmp_path, micro_batch=micro, steps=3)
    reference = [json.loads(line) for line in uninterrupted[1].splitlines()]
    for line, other in zip(log, reference[:3], strict=True):
        assert line.loss == pytest.approx(other["loss"], rel=1e-4)
        assert line.grad_norm == pytest.approx(other["grad_norm"], rel=1e-3)


def test_data_workers_change_nothing(tmp_path, uninterrupted):
    unet, _ = toy_training(tmp_path, workers=2)
    assert_equal_training(tmp_path, unet, uninterrupted)


@pytest.mark.parametrize("variant", ["self", "dino"])
def test_gradient_checkpointing_changes_no_gradient(variant):
    latents, gradients = torch.randn(2, 3, 4, 8, 8), []
    features = torch.randn(2, 2, 5, FEATURES) if variant == "dino" else None
    for checkpointed in (False, True):
        unet = toy_unet(variant).train()
        if checkpointed:
            unet.enable_gradient_checkpointing()
        draws = Objective(seed=0).draw([0, 1], 0, latents.shape[1:])
        SetLoss(unet, DDPMScheduler())(latents, draws, features=features).mean().backward()
        gradients.append({name: weight.grad for name, weight in unet.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=0, atol=1e-6 * float(gradient.abs().max())), name


def test_the_exported_weights_are_the_average(tmp_path):
    raw = []
    for steps in (1, 2, 3):
        toy_training(tmp_path / str(steps), steps=steps, ema_decay=0.5)
        found = checkpoints.load_newest(tmp_path / str(steps) / "checkpoints", "toy", print)
        assert found is not None
        raw.append(found.tensors["unet"])
    unet, _ = toy_training(tmp_path / "3", steps=3, ema_decay=0.5)
    # decays grow as (1 + n) / (10 + n): 0 for the first step, then 2/11, 3/12
    for name, tensor in unet.state_dict().items():
        expected = raw[0][name]
        for decay, later in zip((2 / 11, 3 / 12), raw[1:]):
            expected = decay * expected + (1 - decay) * later[name]
        assert torch.allclose(tensor, expected, atol=1e-6), name


def test_the_loss_falls(tmp_path):
    _, log = toy_training(tmp_path, ToySets(features=True), epochs=25, learning_rate=3e-3, batch=12, micro_batch=12)
    assert log[-1].smoothed < 0.7 * log[0].loss


def test_warm_up_grows_to_the_learning_rate(tmp_path):
    _, log = toy_training(tmp_path, warmup_steps=4, steps=6)
    assert [line.lr for line in log] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_bfloat16_keeps_weights_in_float32(tmp_path):
    unet, log = toy_training(tmp_path, steps=2, compute={"dtype": "bfloat16", "threads": 1})
    assert {tensor.dtype for tensor in unet.state_dict().values()} == {torch.float32}
    assert all(0 < line.loss < 10 for line in log)


def test_a_loss_that_is_not_a_number_stops_and_names_the_samples(tmp_path):
    class Broken(ToySets):
        def __getitem__(self, key):
            item = super().__getitem__(key)
            return item | {"latents": item["latents"] / (item["sample"] != 7)}

    with pytest.raises(CheckFailed, match=r"loss of step \d is (nan|inf).*samples: .*\b7\b") as error:
        toy_training(tmp_path, Broken(count=8), epochs=1)
    assert "lower learning_rate" in str(error.value)


class Leaping(ToySets):
    """One set weighs as much as thirty."""

    def __getitem__(self, key):
        return super().__getitem__(key) | {"counts": torch.tensor(0.1 if key == (2, 7) else 3.0)}


@pytest.fixture
def little_smoothing(monkeypatch):
    monkeypatch.setattr(log_module, "SMOOTHING_STEPS", 4)


def test_a_spike_stops_and_names_the_samples(tmp_path, little_smoothing):
    with pytest.raises(CheckFailed, match=r"loss of step [789] is .* after a smoothed .*samples: .*\b7\b"):
        toy_training(tmp_path, Leaping(), spike_factor=2)


def test_a_skipped_spike_changes_no_weight_and_training_goes_on_exactly(tmp_path, little_smoothing):
    unet, log = toy_training(tmp_path / "whole", Leaping(), spike_factor=2, on_spike="skip")
    (spike,) = [line for line in log if line.skipped]
    assert spike.loss > 2 * spike.smoothed and spike.smoothed == log[spike.step - 2].smoothed
    states = []
    for steps in (spike.step - 1, spike.step):
        before, _ = toy_training(tmp_path / str(steps), Leaping(), spike_factor=2, on_spike="skip", steps=steps)
        states.append(before.state_dict())
    assert_equal_weights(*states)
    with pytest.raises(KeyboardInterrupt):
        toy_training(tmp_path / "again", Leaping(fatal_reads=4 * spike.step + 6), spike_factor=2, on_spike="skip")
    again, same = toy_training(tmp_path / "again", Leaping(), spike_factor=2, on_spike="skip")
    assert same == log
    assert_equal_weights(again.state_dict(), unet.state_dict())


def test_only_a_loss_far_over_the_smoothed_one_is_a_spike_and_never_an_early_one():
    log = [LogLine(step, 0, 1.0, 1.0, 0.1, 1.0) for step in range(1, 51)]
    assert not is_spike(log, 2.9, 3.0) and is_spike(log, 3.1, 3.0)
    assert not is_spike(log, 3.1, None) and not is_spike(log[1:], 3.1, 3.0)
    assert skipped_in_a_row(log) == 0
    assert skipped_in_a_row([*log, *[replace(log[0], skipped=True)] * 3]) == 3


def test_the_best_weights_are_kept_beside_the_last_ones_and_can_be_exported(tmp_path):
    asked: dict[str, Any] = {"checkpoint_every": 1, "keep_checkpoints": 1, "validate_every": 2, "steps": 6}
    losses = iter([3.0, 1.0, 2.0])
    unet, log = toy_training(tmp_path, validate=lambda: next(losses), export="best", **asked)
    assert [(line.step, line.validation_loss) for line in log[1::2]] == [(2, 3.0), (4, 1.0), (6, 2.0)]
    assert all(line.validation_loss is None for line in log[::2])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best-000004", "step-000006"]
    after_four, _ = toy_training(tmp_path / "four", steps=4)
    assert_equal_weights(unet.state_dict(), after_four.state_dict())


def test_validating_sees_the_average_and_changes_nothing(tmp_path, uninterrupted):
    unet, seen = toy_unet(), []

    def validate() -> float:
        seen.append({name: tensor.clone() for name, tensor in unet.state_dict().items()})
        return 1.0

    toy_training(tmp_path, validate=validate, validate_every=12, unet=unet)
    assert_equal_weights(seen[0], uninterrupted[0])
    assert_equal_weights(unet.state_dict(), uninterrupted[0])


def test_the_best_weights_need_something_to_choose_by(tmp_path):
    with pytest.raises(ValueError, match="export=best needs validate_every"):
        toy_training(tmp_path, export="best")
    with pytest.raises(ConfigError, match="there are no validation sets"):
        toy_training(tmp_path, export="best", validate_every=2)


def test_what_can_not_be_trained_is_said(tmp_path):
    with pytest.raises(InputError, match="no sets to train on"):
        toy_training(tmp_path, ToySets(count=0))
    with pytest.raises(ValueError, match="loss scaling"):
        toy_training(tmp_path, compute={"dtype": "float16"})
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"compute\.device=cpu"):
            toy_training(tmp_path, compute={"device": "cuda"})


def test_fewer_sets_than_a_batch_are_one_step_an_epoch(tmp_path):
    _, log = toy_training(tmp_path, ToySets(count=3), batch=256, epochs=2)
    assert [line.epoch for line in log] == [0, 1]


def test_a_batch_of_images_is_as_many_whole_sets(tmp_path, uninterrupted):
    assert toy_settings(batch=2, batch_counts="images").sets_per_step == 1
    unet, _ = toy_training(tmp_path, batch=14, batch_counts="images")  # of 3 images a set
    assert_equal_training(tmp_path, unet, uninterrupted)


def test_the_untrained_toy_is_always_the_same():
    first, second = toy_unet(), toy_unet()
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_steps_decide_instead_of_epochs(tmp_path):
    _, log = toy_training(tmp_path, epochs=1, steps=5)
    assert [line.epoch for line in log] == [0, 0, 0, 1, 1]
