"""A context in bytes: keys and values of preceding images at half the memory of half precision.

Belongs here: rounding to int8 and back. Not here: what a context is for (`m2m.models.context`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from m2m.models.context import Context

_LEVELS = 127


@dataclass(frozen=True)
class Int8Context:
    """A `Context` whose vectors are int8, each with a scale of its own; used in the place of one.

    A vector is one token's key or value in one head, so that no large token or head coarsens the others. A layer's
    keys and values are brought back when the layer reads them, and only then. With heads of 64 numbers, as in Stable
    Diffusion, it holds 0.52 of the memory of float16 and bfloat16, scales included.

    Attributes:
        codes: int8 in [-127, 127].
        scales: float16, one number for each vector.
        dtype: of the keys and values that layers read.
    """

    codes: Context
    scales: Context
    dtype: torch.dtype

    @classmethod
    def of(cls, context: Context) -> "Int8Context":
        """The context rounded to the nearest of 255 levels between plus and minus each vector's largest number."""
        keys = [_rounded(key) for key in context.keys]
        values = [_rounded(value) for value in context.values]
        return cls(
            codes=Context(tuple(codes for codes, _ in keys), tuple(codes for codes, _ in values)),
            scales=Context(tuple(scales for _, scales in keys), tuple(scales for _, scales in values)),
            dtype=context.keys[0].dtype,
        )

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def sets(self) -> int:
        return self.codes.sets

    @property
    def bytes(self) -> int:
        """Memory that codes and scales hold."""
        return self.codes.bytes + self.scales.bytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer as `dtype`, (sets, images, tokens, heads, dim)."""
        pairs = zip(self.codes.layer(index), self.scales.layer(index))
        keys, values = (codes.to(self.dtype) * scales.to(self.dtype) for codes, scales in pairs)
        return keys, values

    def append(self, newer: "Int8Context") -> "Int8Context":
        """These images, then `newer`'s; what was rounded once is not rounded again."""
        return Int8Context(self.codes.append(newer.codes), self.scales.append(newer.scales), self.dtype)

    def window(self, recent: int, sink: int = 0) -> "Int8Context | None":
        """As `Context.window`."""
        codes, scales = self.codes.window(recent, sink), self.scales.window(recent, sink)
        return None if codes is None or scales is None else Int8Context(codes, scales, self.dtype)


KeptContext = Context | Int8Context
"""What a U-Net can read of preceding images."""


def _rounded(vectors: Tensor) -> tuple[Tensor, Tensor]:
    exact = vectors.float()
    # codes are of the scale as it is kept, so that the scale's own rounding is no error
    scales = (exact.abs().amax(-1, keepdim=True) / _LEVELS).to(torch.float16)
    scales_kept = scales.float()
    codes = torch.where(scales_kept > 0, exact / scales_kept, torch.zeros_like(exact))
    return codes.round().clamp(-_LEVELS, _LEVELS).to(torch.int8), scales
