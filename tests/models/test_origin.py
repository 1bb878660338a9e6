"""Every tensor of a new U-Net is copied or initialised; nothing is left to chance."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from m2m.errors import ConfigError, InputError
from m2m.models.unet import ManyToManyUNet


@pytest.mark.parametrize(("variant", "condition"), [("self", None), ("self", "camera"), ("dino", "position")])
def test_every_tensor_is_copied_or_new(text_to_image, variant, condition):
    made = ManyToManyUNet.from_text_to_image(text_to_image, variant, 20, condition)
    state, source = made.state_dict(), text_to_image.state_dict()
    assert made.origin is not None
    assert set(made.origin.copied) | set(made.origin.new) == set(state)
    assert not set(made.origin.copied) & set(made.origin.new)
    assert all(torch.equal(state[name], source[name]) for name in made.origin.copied)
    assert all(".attn2." in name or "condition_embedder." in name for name in made.origin.new)
    assert set(source) == set(made.origin.copied) | set(made.origin.left_out)
    attention = [name for name in made.origin.new if ".attn2." in name]
    assert len(attention) == 7 * 5  # seven transformer blocks; q, k, v, weight and bias of the output
    for name in attention:  # torch's initialisation of a linear layer: uniform in +-1/sqrt(inputs)
        owner = made.get_submodule(name.rpartition(".")[0])
        assert isinstance(owner, torch.nn.Linear)
        bound = owner.in_features**-0.5
        assert state[name].abs().max() <= bound
        if state[name].ndim == 2:
            assert state[name].std() == pytest.approx(bound / 3**0.5, rel=0.25)


def test_the_source_is_not_shared(text_to_image):
    made = ManyToManyUNet.from_text_to_image(text_to_image, "self")
    before = text_to_image.conv_in.weight.clone()
    with torch.no_grad():
        made.conv_in.weight.zero_()
    assert torch.equal(text_to_image.conv_in.weight, before)


def test_the_seed_decides_and_leaves_torch_s_stream_alone(text_to_image):
    torch.manual_seed(0)
    first = ManyToManyUNet.from_text_to_image(text_to_image, "self", seed=1).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)
    again = ManyToManyUNet.from_text_to_image(text_to_image, "self", seed=1).state_dict()
    other = ManyToManyUNet.from_text_to_image(text_to_image, "self", seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == (".attn2." not in name) for name in first)


def test_a_config_alone_makes_a_new_model(text_to_image):
    made = ManyToManyUNet.from_text_to_image(text_to_image.config, "self", seed=3)
    assert made.origin is not None and set(made.origin.new) == set(made.state_dict())
    assert all(tensor.isfinite().all() for tensor in made.state_dict().values())


def test_a_missing_tensor_is_named(text_to_image, monkeypatch):
    state = {name: tensor for name, tensor in text_to_image.state_dict().items() if name != "conv_in.bias"}
    monkeypatch.setattr(text_to_image, "state_dict", lambda: state)
    with pytest.raises(InputError, match=r"conv_in\.bias is missing"):
        ManyToManyUNet.from_text_to_image(text_to_image, "self")


def test_an_extra_and_a_mismatched_tensor_are_named(text_to_image, monkeypatch):
    state = {**text_to_image.state_dict(), "conv_between.bias": torch.zeros(1)}
    monkeypatch.setattr(text_to_image, "state_dict", lambda: state)
    with pytest.raises(InputError, match=r"conv_between\.bias of the source has no place"):
        ManyToManyUNet.from_text_to_image(text_to_image, "self")
    del state["conv_between.bias"]
    state["conv_in.bias"] = torch.zeros(3)
    with pytest.raises(InputError, match=r"conv_in.bias: the source's shape is \(3,\), M2M's \(16,\)"):
        ManyToManyUNet.from_text_to_image(text_to_image, "self")


def test_wrong_starts_are_refused(text_to_image, make_unet):
    with pytest.raises(ConfigError, match="needs feature_dim"):
        ManyToManyUNet.from_text_to_image(text_to_image, "dino")
    with pytest.raises(ConfigError, match="width_of_text is not a setting"):
        ManyToManyUNet.from_text_to_image({**text_to_image.config, "width_of_text": 3}, "self")
    with pytest.raises(ConfigError, match="camera condition already"):
        make_unet("self", "camera").add_condition("position")
    assert isinstance(text_to_image, UNet2DConditionModel)
