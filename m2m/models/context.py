"""What preceding images leave behind for the images after them: keys and values of every Image-Set Attention layer.

Belongs here: keeping, appending and forgetting images. Not here: computing keys and values (`m2m.models.unet`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m2m.errors import InputError


@dataclass(frozen=True)
class Context:
    """Keys and values of preceding images, one pair a layer; an image's are computed once in its life.

    Immutable: `append` and `window` give new contexts, so that two rollouts may start from one.

    Attributes:
        keys, values: for every layer (sets, images, tokens, heads, dim). The number of tokens may differ by layer.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def __len__(self) -> int:
        """How many images are kept (of every set)."""
        return self.keys[0].shape[1]

    @property
    def sets(self) -> int:
        return self.keys[0].shape[0]

    @property
    def bytes(self) -> int:
        """Memory that the keys and values hold."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.keys + self.values)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, (sets, images, tokens, heads, dim)."""
        return self.keys[index], self.values[index]

    def append(self, newer: "Context") -> "Context":
        """These images, then `newer`'s.

        Raises:
            InputError: the contexts are of other sets or of another model.
        """
        if len(self.keys) != len(newer.keys) or self.sets != newer.sets:
            raise InputError(
                f"a context of {self.sets} sets and {len(self.keys)} layers can't take images "
                f"of {newer.sets} sets and {len(newer.keys)} layers: encode them with the same model and batch"
            )
        pairs = zip(self._tensors(), newer._tensors())
        return self._from_tensors([torch.cat(pair, dim=1) for pair in pairs])

    def window(self, recent: int, sink: int = 0) -> "Context | None":
        """The `recent` newest images (the paper's context window W) and, before them, the `sink` oldest.

        A sink keeps the given, real images while generated ones come and go. None when nothing is left.
        """
        if recent < 0 or sink < 0:
            raise InputError(
                f"a context window of {recent} recent images and a sink of {sink}: neither can be negative"
            )
        if recent + sink >= len(self):
            return self
        if recent + sink == 0:
            return None
        kept = [*range(sink), *range(len(self) - recent, len(self))]
        return self._from_tensors([tensor[:, kept] for tensor in self._tensors()])

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.keys
        yield from self.values

    def _from_tensors(self, tensors: Sequence[Tensor]) -> "Context":
        layers = len(self.keys)
        return Context(keys=tuple(tensors[:layers]), values=tuple(tensors[layers:]))
