"""Embedders of camera poses and positions."""

import pytest
import torch

from m2m.errors import ConfigError, InputError
from m2m.models.conditions import CONDITIONS, ConditionEmbedder


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_fresh_embedder_adds_nothing_but_can_learn(condition):
    embed = ConditionEmbedder(condition, 16, [4, 8])
    vectors = embed(torch.rand(3, CONDITIONS[condition]))
    assert [tuple(vector.shape) for vector in vectors] == [(3, 4), (3, 8)]
    assert all(torch.count_nonzero(vector) == 0 for vector in vectors)
    vectors[0].sum().backward()
    gradients = [parameter.grad for parameter in embed.heads[0].parameters()]
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_dropping_comes_after_the_embedding():
    torch.manual_seed(0)
    embed = ConditionEmbedder("camera", 16, [4])
    for parameter in embed.heads.parameters():
        torch.nn.init.normal_(parameter)
    (of_zeros,) = embed(torch.zeros(2, 12))
    (dropped,) = embed(torch.zeros(2, 12), keep=torch.tensor([True, False]))
    assert torch.count_nonzero(of_zeros)  # an MLP of zeros is not zero ...
    assert torch.equal(dropped[0], of_zeros[0])
    assert torch.count_nonzero(dropped[1]) == 0  # ... a dropped condition is


def test_positions_are_told_apart():
    torch.manual_seed(0)
    embed = ConditionEmbedder("position", 16, [4])
    for parameter in embed.heads.parameters():
        torch.nn.init.normal_(parameter)
    (vectors,) = embed(torch.arange(6.0)[:, None])
    assert torch.pdist(vectors).min() > 1e-3


def test_another_number_of_numbers_is_refused():
    with pytest.raises(InputError, match="camera condition has 12 numbers"):
        ConditionEmbedder("camera", 16, [4])(torch.zeros(2, 16))


def test_an_unknown_condition_is_refused():
    with pytest.raises(ConfigError, match="camera, position"):
        ConditionEmbedder("weather", 16, [4])
