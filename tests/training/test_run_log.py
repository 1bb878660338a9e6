"""Speed, memory and trackers: figures by hand, operations by formula, missing packages by name."""

import json

import pytest
import torch
from accelerate import Accelerator

from m2m.errors import ConfigError
from m2m.models.unet import ManyToManyUNet
from m2m.training.acceleration import open_accelerator
from m2m.training.flops import training_flops
from m2m.training.log import LogLine
from m2m.training.run_log import RunLog, peak_memory, tracking
from tests.training.toy import COMPUTE, FEATURES, toy_settings, toy_unet


def line(step: int) -> LogLine:
    return LogLine(step, 0, 1.0, 1.0, 1e-3, 2.0)


def test_speed_and_mfu_are_those_of_the_steps_since_the_last_line(tmp_path):
    path = tmp_path / "runs" / "training.jsonl"
    settings = toy_settings(log_every=2, peak_tflops=2.0)
    with RunLog(settings, open_accelerator(COMPUTE), path, lambda: int(1e12), "a run") as log:
        for step, seconds in enumerate((1.0, 3.0, 8.0), 1):
            log.add(line(step), sets=4, seconds=seconds, last=step == 3, waited=seconds / step)
    found = [json.loads(text) for text in path.read_text().splitlines()]
    assert [(one["step"], one["sets_per_second"], one["mfu"]) for one in found] == [(2, 2.0, 1.0), (3, 0.5, 0.25)]
    assert [one["waiting_share"] for one in found] == pytest.approx([2.5 / 4, 1 / 3])
    assert log.said().startswith("1 sets a second, MFU 50.0%, 43.1% of it waiting for data, peak memory ")


def test_peak_memory_is_what_the_process_has_held():
    before = peak_memory(torch.device("cpu"))
    much = torch.ones(before // 4 + 50_000_000)  # float32: more than ever before, and 200 MB
    assert peak_memory(torch.device("cpu")) >= before + 200_000_000 - 50_000_000
    del much


@pytest.mark.parametrize("variant", ["self", "dino"])
def test_operations_of_a_set_are_those_of_its_layers(variant):
    """By hand: a forward pass once, a backward pass twice (once for inputs, once for weights), an MAC being two."""
    unet = toy_unet(variant)
    shapes = {"latents": (3, 4, 8, 8)} | ({"features": (2, 5, FEATURES)} if variant == "dino" else {})
    counted = _by_hooks(unet, variant)
    assert training_flops(unet, shapes) == pytest.approx(counted, rel=0.02)
    unet.enable_gradient_checkpointing()
    assert training_flops(unet, shapes) == pytest.approx(counted, rel=0.02)
    unet.requires_grad_(False)
    # without the gradients of weights, a third; attention has none
    assert 0.66 * counted < training_flops(unet, shapes) < 0.75 * counted


def _by_hooks(unet: ManyToManyUNet, variant: str) -> float:
    """3 x 2 x the multiplications of every linear and convolutional layer and of every attention, from real shapes."""
    macs = 0.0

    def linear(module, inputs, output):
        nonlocal macs
        macs += output.numel() * module.in_features

    def convolution(module, inputs, output):
        nonlocal macs
        macs += output.numel() * module.weight[0].numel()

    for module in unet.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(linear)
        elif isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(convolution)
    plain = torch.nn.functional.scaled_dot_product_attention

    def attention(q, k, v, **more):
        nonlocal macs
        macs += q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return plain(q, k, v, **more)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        noisy = torch.randn(1, 3, 4, 8, 8)
        given = {"features": torch.randn(1, 2, 5, FEATURES)} if variant == "dino" else {"clean": noisy}
        unet.training_forward(noisy, torch.zeros(1, 3, dtype=torch.long), **given)
    for module in unet.modules():
        module._forward_hooks.clear()
    return 6 * macs


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_tracker_is_named_with_its_package(name, package, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"trackers: {name} is asked for.*pip install {package}"):
        tracking([name], tmp_path)
    assert tracking([], tmp_path) == {}


def test_trackers_hear_losses_and_speed(tmp_path):
    """Through Accelerate's own interface for trackers, so that TensorBoard's and W&B's packages need not be here."""
    from accelerate.tracking import GeneralTracker

    heard, ended = [], []

    class Heard(GeneralTracker):
        name = "heard"
        requires_logging_directory = False
        main_process_only = True
        tracker = None

        def store_init_configuration(self, values):
            heard.append(values)

        def log(self, values, step, **_):
            heard.append({"step": step, **values})

        def finish(self):
            ended.append(True)

    open_accelerator(COMPUTE)
    accelerator = Accelerator(cpu=True, log_with=[Heard()])
    with RunLog(toy_settings(log_every=1), accelerator, None, lambda: 1, "a run") as log:
        log.add(line(1), sets=4, seconds=2.0, last=False)
    assert heard[0]["learning_rate"] == 1e-3
    assert heard[1]["step"] == 1 and heard[1]["loss"] == 1.0 and heard[1]["sets_per_second"] == 2.0
    assert "validation_loss" not in heard[1] and "mfu" not in heard[1]
    assert ended == [True]
