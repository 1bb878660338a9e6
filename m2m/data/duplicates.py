"""Which texts were met before, among millions, in little memory.

Belongs here: the set of digests. Not here: what is done with a text that came before (`m2m.data.captions`).
"""

import hashlib
from collections.abc import Sequence

import numpy as np


class SeenTexts:
    """Tells new texts from those met before, by 64 bits of their hash: 8 bytes a text, twice that while runs merge.

    Two of 12 million different texts are taken for one with a probability of 4 in a million.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []  # each sorted, each longer than the next

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def new(self, texts: Sequence[str]) -> list[bool]:
        """Of each text whether it comes for the first time, here and in all calls before; from now on it is known."""
        digests = np.array([_digest(text) for text in texts], np.uint64)
        own, first = np.unique(digests, return_index=True)
        known = np.zeros(len(own), bool)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, own), len(run) - 1)
            known |= run[place] == own
        fresh = np.zeros(len(texts), bool)
        fresh[first[~known]] = True
        self._add(own[~known])
        return fresh.tolist()

    def _add(self, run: np.ndarray) -> None:
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort()
        if len(run):
            self._runs.append(run)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
