"""How a set is computed on the device: memory formats, compiled networks; the pictures stay what they are."""

import numpy as np
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from m2m.errors import ConfigError
from m2m.generation.image_sets import SetMaker
from tests.generation.conftest import config_of


def test_channels_last_makes_the_same_pictures_to_the_last_bits(make_profile, tmp_path):
    plain, last = (
        SetMaker(config_of(make_profile(), *given), tmp_path).latents(0, "a red square")
        for given in ([], ["channels_last=true"])
    )
    assert np.allclose(plain, last, atol=2e-2)


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_a_compiled_unet_makes_the_same_pictures_to_the_last_bits(make_profile, tmp_path, monkeypatch, backend):
    """Traced and run as traced; compiled to C++ too where there are minutes for it."""
    compiling, asked = torch.nn.Module.compile, []

    def compiled_by(module, **kwargs):
        asked.append(type(module).__name__)
        compiling(module, backend=backend, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", compiled_by)
    plain, compiled = (
        SetMaker(config_of(make_profile(), *given), tmp_path).latents(0, "a red square")
        for given in ([], ["compile=true"])
    )
    assert asked == ["UNet2DConditionModel"] and np.allclose(plain, compiled, atol=2e-2)


def test_a_unet_that_cannot_be_compiled_ends_the_run(make_profile, tmp_path, monkeypatch):
    def broken(*_):
        raise BackendCompilerFailed(broken, RuntimeError("no C++ compiler"), None)

    monkeypatch.setattr(SetMaker, "latents", broken)
    with pytest.raises(ConfigError, match=r"generate-sets\.compile: torch can't compile.*no C\+\+ compiler"):
        SetMaker(config_of(make_profile(), "compile=true"), tmp_path).sampled(
            {"id": 0, "caption": "a", "split": "train"}
        )
