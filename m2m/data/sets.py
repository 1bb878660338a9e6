"""Image sets as training and evaluation read them: which sets, in which order, which N images of each.

Belongs here: orders, choices, reading sets back. Not here: the bytes of a shard (`m2m.data.shards`), making sets.
"""

import numpy as np

from m2m.generation.noise import keyed_generator, namespaced


def epoch_order(n: int, per_shard: int, seed: int, epoch: int, window: int = 16) -> np.ndarray:
    """The order in which an epoch reads `n` sets: shards shuffled, then sets shuffled inside a window of shards.

    A pure function, so that (seed, epoch, step) is all there is to resume, on any number of ranks and workers.

    Args:
        per_shard: neighbouring sets that lie in one file.
        window: shards whose sets are mixed; bounds the files that are read at a time.

    Returns:
        int64 permutation of range(n).
    """
    drawn = keyed_generator(namespaced(seed, "epoch order"), epoch)
    shards = drawn.permutation(-(-n // per_shard))
    parts = []
    for first in range(0, len(shards), window):
        ids = [
            np.arange(shard * per_shard, min(n, (shard + 1) * per_shard), dtype=np.int64)
            for shard in shards[first : first + window]
        ]
        parts.append(drawn.permutation(np.concatenate(ids)))
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def chosen_images(caption_id: int, seed: int, per_set: int = 25, n: int = 5) -> list[int]:
    """Which `n` of a set's images training reads, in order: frozen per set, so that features can be cached for them.

    A smaller `n` is a prefix of a larger one. The cache holds the first n - 1 (the last image is no context).

    Raises:
        ValueError: the set has fewer than `n` images.
    """
    if n > per_set:
        raise ValueError(f"{n} images of a set of {per_set} were asked for")
    return keyed_generator(namespaced(seed, "chosen images"), caption_id).permutation(per_set)[:n].tolist()
