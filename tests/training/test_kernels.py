"""Kernels: the same training by other means, a resume that fits them, and nothing of it unless it is asked for."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from m2m.config import identity
from m2m.training.kernels import Kernels
from m2m.training.objective import Objective, SetLoss
from tests.training.toy import FEATURES, ToySets, toy_settings, toy_training, toy_unet


def test_what_is_left_as_it_was_is_no_part_of_a_training_s_identity(tmp_path):
    assert "kernels" not in identity(toy_settings(), tmp_path)
    assert identity(toy_settings(kernels={"channels_last": True}), tmp_path)["kernels"]["channels_last"] is True


@pytest.mark.parametrize(("variant", "checkpointed"), [("self", False), ("dino", True)])
def test_compiled_parts_and_another_layout_give_the_same_gradients(variant, checkpointed):
    latents = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {"features": torch.randn(2, 2, 5, FEATURES)} if variant == "dino" else {}
    draws, found = Objective(seed=0, random_context=True).draw([0, 1], 0, latents.shape[1:]), []
    for chosen in ({}, {"compile": True, "channels_last": True}):
        unet = toy_unet(variant).train()
        Kernels.model_validate(chosen).apply(unet, backend="eager")
        if checkpointed:
            unet.enable_gradient_checkpointing()
        SetLoss(unet, DDPMScheduler())(latents, draws, **given).mean().backward()
        found.append({name: weight.grad for name, weight in unet.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_another_layout_is_gone_on_with_exactly(tmp_path):
    changes: dict[str, Any] = {"kernels": {"channels_last": True}, "steps": 5}
    whole, _ = toy_training(tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        toy_training(tmp_path / "killed", ToySets(fatal_reads=17), **changes)
    again, _ = toy_training(tmp_path / "killed", **changes)
    for (name, weight), other in zip(again.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name
    assert again.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_kernels_of_a_gpu_are_put_back_afterwards():
    for deterministic in (True, False):
        with Kernels.model_validate({"deterministic": deterministic}).chosen(torch.device("cuda")):
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            assert torch.backends.cudnn.benchmark != deterministic
        assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark


def test_flex_attention_is_refused_where_it_has_no_gradients():
    with pytest.raises(ValueError, match="leave it at prefix on the CPU"):
        toy_settings(kernels={"attention": "flex"})


def test_what_decides_which_images_are_read_stays_with_the_program():
    """A GPU would have to be waited for at every layer's loop."""
    shape = (3, 4, 8, 8)
    moved = Objective(seed=0, random_context=True).draw([0, 1], 0, shape).to(torch.device("meta"))
    assert moved.noise.is_meta and moved.timesteps.is_meta and moved.keep_condition.is_meta
    assert moved.reads is not None and not moved.reads.is_meta and not moved.keep_context.is_meta
    assert Objective(seed=0).draw([0, 1], 0, shape).to(torch.device("meta")).keep_context.is_meta


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", [{}, {"channels_last": True}, {"attention": "flex"}, {"compile": True}])
def test_on_a_gpu_a_training_is_the_cpu_s_and_goes_on_exactly(tmp_path, kernels):
    compute = {"device": "cuda", "dtype": "float32", "threads": 1}
    changes: dict[str, Any] = {"kernels": kernels, "steps": 5, "compute": compute}
    _, expected = toy_training(tmp_path / "cpu", steps=5)
    whole, log = toy_training(tmp_path / "whole", **changes)
    assert [line.loss for line in log] == pytest.approx([line.loss for line in expected], rel=1e-2)
    with pytest.raises(KeyboardInterrupt):
        toy_training(tmp_path / "killed", ToySets(fatal_reads=17), **changes)
    again, _ = toy_training(tmp_path / "killed", **changes)
    for (name, weight), other in zip(again.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


@pytest.mark.gpu
def test_on_a_gpu_bfloat16_and_the_fastest_kernels_train(tmp_path):
    kernels = {"attention": "flex", "compile": True, "channels_last": True, "deterministic": False}
    compute = {"device": "cuda", "dtype": "bfloat16", "threads": 1}
    _, log = toy_training(tmp_path, kernels=kernels, compute=compute, workers=1, gradient_checkpointing=True)
    assert log[-1].smoothed < log[0].loss
