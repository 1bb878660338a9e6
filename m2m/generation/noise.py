"""Randomness by name: the same key gives the same numbers in every process, batch and order.

Belongs here: the one counter-based stream that generation and training draw from. Not here: who draws what.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence

_WORD = 1 << 64


def namespaced(seed: int, purpose: str) -> int:
    """A namespace seed for one purpose, so that equal keys of two purposes ("noise", "timestep") stay independent."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{purpose}".encode()).digest()[:8], "big")


def keyed_generator(namespace_seed: int, *key: int) -> np.random.Generator:
    """The generator of one key: Philox with the namespace as its key and `key` in the upper words of its counter.

    The lowest counter word advances as numbers are drawn, so streams of different keys never overlap (2**64 blocks).

    Args:
        namespace_seed: 0 <= seed < 2**64; all of its bits count (torch's CPU generator keeps 32).
        key: up to three words, 0 <= word < 2**64, for example (caption id, image). Keys of other lengths differ.

    Raises:
        ValueError: more than three words, or one out of range.
    """
    if len(key) > 3:
        raise ValueError(f"a key has at most three words, got {len(key)}: {key}")
    for word in (namespace_seed, *key):
        if not 0 <= int(word) < _WORD:
            raise ValueError(f"{word} does not fit a word of 64 bits without sign")
    counter = [0, *(int(word) for word in reversed(key)), *[0] * (3 - len(key))]
    philox = np.random.Philox(_NO_SEED)  # type: ignore[arg-type] (NumPy's stubs know of one kind of seeds)
    philox.state = {
        "bit_generator": "Philox",
        "state": {
            "key": np.array([int(namespace_seed), len(key)], np.uint64),
            "counter": np.array(counter, np.uint64),
        },
        "buffer": _NOTHING[:4],
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    return np.random.Generator(philox)


class _NoSeed(ISeedSequence):
    """In place of the entropy that NumPy asks the system for, also where a key says all: half of the time it takes."""

    def generate_state(self, n_words, dtype=np.uint32):
        return _NOTHING[:n_words].astype(dtype)


_NOTHING = np.zeros(8, np.uint64)
_NO_SEED = _NoSeed()


def keyed_normal(namespace_seed: int, *key: int, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise of one key, for example of one image by (caption id, image).

    Returns:
        float32 tensor of `shape` on the CPU; the same for any batch, worker or device that it is then moved to.
    """
    drawn = keyed_generator(namespace_seed, *key).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(np.asarray(drawn, dtype=np.float32))


def torch_generator(namespace_seed: int, *key: int) -> torch.Generator:
    """For what draws by torch's own generators (diffusers' schedulers): one of the CPU, seeded by the key."""
    return torch.Generator().manual_seed(int(keyed_generator(namespace_seed, *key).integers(_WORD >> 32)))
