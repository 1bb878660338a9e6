"""Contexts grow, forget and are never changed in place."""

import pytest
import torch

from m2m.errors import InputError
from m2m.models.context import Context


def context(*images: int, sets: int = 2, layers: int = 2) -> Context:
    """Every number in it is the number of its image."""
    numbers = torch.tensor(images, dtype=torch.float32).view(1, -1, 1, 1, 1)
    tensors = tuple(numbers.expand(sets, -1, 3 + layer, 2, 4).clone() for layer in range(layers))
    return Context(tensors, tuple(-tensor for tensor in tensors))


def numbers(of: Context | None) -> list[int]:
    assert of is not None
    return [int(n) for n in of.keys[0][0, :, 0, 0, 0]]


def test_images_are_appended_in_order():
    first = context(1, 2)
    both = first.append(context(3))
    assert numbers(both) == [1, 2, 3]
    assert len(both) == 3
    assert numbers(first) == [1, 2]
    assert torch.equal(both.values[1], -both.keys[1])


@pytest.mark.parametrize(
    ("recent", "sink", "kept"),
    [(2, 0, [4, 5]), (2, 1, [1, 4, 5]), (0, 2, [1, 2]), (5, 0, [1, 2, 3, 4, 5]), (9, 9, [1, 2, 3, 4, 5])],
)
def test_a_window_keeps_the_newest_and_the_sink(recent, sink, kept):
    assert numbers(context(1, 2, 3, 4, 5).window(recent, sink)) == kept


def test_an_empty_window_is_no_context():
    assert context(1, 2).window(0) is None


def test_a_negative_window_is_refused():
    with pytest.raises(InputError, match="negative"):
        context(1).window(-1)


def test_contexts_of_other_sets_or_models_are_refused():
    with pytest.raises(InputError, match="3 sets"):
        context(1).append(context(2, sets=3))
    with pytest.raises(InputError, match="3 layers"):
        context(1).append(context(2, layers=3))


def test_bytes_counts_keys_and_values():
    assert context(1, sets=1, layers=1).bytes == 2 * 3 * 2 * 4 * 4
