"""Noise by key: repeatable, independent of batch and order, distinct in every bit of the key."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2m.generation.noise import keyed_generator, keyed_normal, namespaced

WORDS = st.integers(0, 2**64 - 1)
KEYS = st.lists(WORDS, min_size=0, max_size=3).map(tuple)


@settings(max_examples=50, deadline=None)
@given(seed=WORDS, keys=st.lists(KEYS, min_size=2, max_size=2, unique=True))
def test_different_keys_give_different_noise(seed, keys):
    first, second = (keyed_normal(seed, *key, shape=(8,)) for key in keys)
    assert not torch.equal(first, second)
    assert torch.equal(first, keyed_normal(seed, *keys[0], shape=(8,)))


def test_all_64_bits_of_the_seed_count():
    assert not torch.equal(keyed_normal(1, 2, shape=(4,)), keyed_normal(1 + 2**32, 2, shape=(4,)))


def test_noise_of_an_image_does_not_depend_on_what_else_is_drawn():
    together = torch.stack(
        [keyed_normal(7, caption, image, shape=(4, 8, 8)) for caption in (3, 9) for image in range(5)]
    )
    alone = torch.stack([keyed_normal(7, caption, image, shape=(4, 8, 8)) for image in range(5) for caption in (9, 3)])
    assert torch.equal(together[5:], alone[::2])
    assert torch.equal(together[:5], alone[1::2])


def test_noise_is_standard_normal():
    drawn = keyed_normal(0, 1, shape=(200_000,)).double()
    assert abs(drawn.mean().item()) < 0.01
    assert abs(drawn.std().item() - 1) < 0.01
    neighbours = torch.stack([keyed_normal(0, 1, image, shape=(4096,)) for image in range(25)]).numpy()
    correlations = np.corrcoef(neighbours) - np.eye(25)
    assert abs(correlations).max() < 0.08


def test_the_stream_stays_the_one_that_shards_were_made_with():
    # a change of NumPy's streams would silently make other data than the shards on disk
    expected = [0.11069978773593903, -2.144888401031494, -1.0187267065048218]
    assert keyed_normal(2024, 5, 3, shape=(3,)).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("key", [(1, 2, 3, 4), (-1,), (2**64,)])
def test_keys_that_do_not_fit_are_refused(key):
    with pytest.raises(ValueError):
        keyed_generator(0, *key)


def test_purposes_are_independent():
    assert namespaced(0, "noise") != namespaced(0, "timestep") != namespaced(1, "timestep")


@given(seed=st.integers(0, 2**64 - 1), key=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
def test_it_is_numpys_philox_with_this_key_and_counter(seed, key):
    counter = np.array([0, *reversed(key), *[0] * (3 - len(key))], np.uint64)
    expected = np.random.Generator(np.random.Philox(key=np.array([seed, len(key)], np.uint64), counter=counter))
    drawn = keyed_generator(seed, *key)
    assert drawn.integers(2**32) == expected.integers(2**32)
    assert np.array_equal(drawn.standard_normal(9), expected.standard_normal(9))
