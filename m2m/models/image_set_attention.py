"""Image-Set Attention: tokens of a noisy image read the tokens of clean images before it (paper, section 5, Eq. 4).

Belongs here: the attention, the layer that stands where Stable Diffusion has cross-attention to text (`attn2`), and
what such a layer reads in a pass. Not here: the rest of the U-Net.

A pass hands every layer the same *reading*: an object that says which rows of the batch are clean, what is remembered
of them and what is dropped. It travels as the U-Net's `encoder_hidden_states` and no layer keeps anything between
passes, so that gradient checkpointing may run a layer twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.models.attention import Attention
from torch import Tensor, nn

from m2m.errors import InputError
from m2m.models.context import Context
from m2m.models.flex_attention import flex_prefix_attention
from m2m.models.int8_context import KeptContext

Reads = Sequence[Sequence[slice | list[int]]]
"""For every set and every image of it, the places of the images before it that it reads."""


def set_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token of one image attends to all tokens of some images (Eq. 4, no mask).

    Args:
        q: (sets, tokens, heads, dim).
        k, v: (sets, images, image tokens, heads, dim); any number of images, zero included.

    Returns:
        Same shape as `q`; exactly zero where there is no image, as if nothing had been read.
    """
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    # SDPA wants (sets, heads, tokens, dim); these are views, so a cached context is never copied
    k, v = (tensor.flatten(1, 2).transpose(1, 2) for tensor in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """Image i attends to the tokens of images before it, never to its own (paper, section 5.1, Eq. 4).

    A loop over images with prefixes of keys and values: exact, half the arithmetic of a dense mask, and no mask.

    Args:
        q: noisy tokens, (sets, images, tokens, heads, dim).
        k, v: clean tokens, (sets, images or images - 1, image tokens, heads, dim); the last image's are never read.
        keep: (sets, images) bool; False drops an image's whole context.

    Returns:
        Same shape as `q`; zero for the first image, which has nothing before it, and where the context is dropped.
    """
    read = torch.stack([set_attention(q[:, i], k[:, :i], v[:, :i]) for i in range(q.shape[1])], dim=1)
    if keep is None:
        return read
    return torch.where(keep[:, :, None, None, None], read, torch.zeros_like(read))


def chosen_attention(q: Tensor, k: Tensor, v: Tensor, reads: Reads) -> Tensor:
    """`prefix_attention` where each image reads only some of the images before it.

    A loop over sets and images: no mask, and no arithmetic for what is not read.

    Returns:
        Same shape as `q`; zero where nothing is read.
    """
    if all(chosen == slice(0, 0) for of_images in reads for chosen in of_images):
        # zeros of which gradients can be asked: processes that train together wait for each other's
        return prefix_attention(q, k, v, torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device))
    found = [
        torch.cat([set_attention(q[one, i], k[one, chosen], v[one, chosen]) for i, chosen in enumerate(of_images)])
        for one, of_images in ((slice(place, place + 1), reads[place]) for place in range(len(reads)))
    ]
    return torch.stack(found)


def as_reads(keep: Tensor) -> Reads:
    """Which images are read, of (sets, images, images - 1) bool; whatever it says of an image's own and later ones."""
    return [[_as_slice([j for j in range(i) if row[j]]) for i, row in enumerate(rows)] for rows in keep.tolist()]


def _as_slice(places: list[int]) -> slice | list[int]:
    """Places that lie beside each other as a slice, whose keys and values are not copied."""
    first = places[0] if places else 0
    return slice(first, first + len(places)) if places == list(range(first, first + len(places))) else places


TRAINING_ATTENTIONS: dict[str, Callable[..., Tensor]] = {"prefix": prefix_attention, "flex": flex_prefix_attention}
"""Ways to compute the same in a training pass: the loop over prefixes is the reference."""


@dataclass(frozen=True)
class Nothing:
    """What so many rows read that have no image to read: zeros, which need not be computed with."""

    rows: int


class Reading(Protocol):
    """What Image-Set Attention layers read in one pass of the U-Net."""

    def shift(self, layer: int) -> Tensor | None:
        """E(c) for every row of the batch, (rows, width), or None where there is no condition."""
        ...

    def attend(self, attention: "ImageSetAttention", hidden: Tensor) -> Sequence[Tensor | Nothing]:
        """The result before `to_out`: (rows, tokens, width) -> parts of it, (some rows, tokens, inner width)."""
        ...

    @property
    def copies(self) -> int:
        """How many equal parts the batch has before the first attention."""
        ...

    def going_on(self, hidden: Tensor) -> Tensor:
        """The rows, the last ones, that something is read of after the last attention: (rows, ...) -> (fewer, ...)."""
        ...


class ImageSetAttention(nn.Module):
    """The layer: same tensors as the cross-attention that it replaces (no bias on q, k, v; one on the output)."""

    def __init__(self, layer: int, query_dim: int, context_dim: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.layer = layer
        self.heads = heads
        self.query_dim = query_dim
        self.context_dim = context_dim
        inner = heads * head_dim
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, query_dim), nn.Dropout(dropout)])

    @classmethod
    def in_place_of(cls, cross_attention: Attention, layer: int, dropout: float = 0.0) -> "ImageSetAttention":
        """A layer of the same shapes as `cross_attention`, with weights of its own."""
        heads = cross_attention.heads
        return cls(
            layer,
            query_dim=cross_attention.query_dim,
            context_dim=cross_attention.cross_attention_dim,
            heads=heads,
            head_dim=cross_attention.inner_dim // heads,
            dropout=dropout,
        )

    def queries(self, hidden: Tensor) -> Tensor:
        """(..., tokens, width) -> (..., tokens, heads, dim)."""
        return self._split(self.to_q(hidden))

    def keys_and_values(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """(..., tokens, context width) -> two of (..., tokens, heads, dim)."""
        return self._split(self.to_k(clean)), self._split(self.to_v(clean))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        """What the layer adds to its block's hidden states.

        E(c) is added to the hidden states before the attention (section 6.2). They live on in the residual stream,
        so E(c) is part of what is returned as well: a target's pose reaches the model even with nothing to read.

        Args:
            hidden_states: (rows, tokens, width), normalised.
            encoder_hidden_states: the pass's `Reading`.
        """
        if encoder_hidden_states is None or not hasattr(encoder_hidden_states, "attend"):
            raise InputError(
                "Image-Set Attention reads preceding images, not text embeddings: "
                "call training_forward, encode_context or denoise of ManyToManyUNet"
            )
        reading: Reading = encoder_hidden_states
        shift = reading.shift(self.layer)
        if shift is not None:
            shift = shift[:, None].to(hidden_states)
            hidden_states = hidden_states + shift
        out = torch.cat([self._out(part, hidden_states) for part in reading.attend(self, hidden_states)])
        out = self.to_out[1](out)
        return out if shift is None else out + shift

    def _out(self, read: "Tensor | Nothing", hidden: Tensor) -> Tensor:
        if isinstance(read, Tensor):
            return self.to_out[0](read)
        # the layer's bias: what it makes of a zero is the same for all tokens
        of_zero = self.to_out[0](hidden.new_zeros(1, 1, self.to_q.out_features))
        return of_zero.expand(read.rows, hidden.shape[1], -1)

    def _split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.heads, -1))


@dataclass(frozen=True)
class _Conditioned:
    shifts: Sequence[Tensor] | None = field(default=None, kw_only=True)

    @property
    def copies(self) -> int:
        return 1

    def shift(self, layer: int) -> Tensor | None:
        return None if self.shifts is None else self.shifts[layer]


@dataclass(frozen=True)
class WholeSets(_Conditioned):
    """A training pass: each noisy image reads the clean images before it in its set.

    Rows of the batch are first the clean images of all sets but the last of each (M2M-Self; none for M2M-DINO), then
    the noisy images of all sets.

    The clean stream reads nothing, as an image with no preceding images does: its attention is zero before `to_out`,
    so what the clean stream computes for an image is what `encode_context` computes for that image alone.
    """

    sets: int
    images: int
    features: Tensor | None = None  # M2M-DINO: (sets, images - 1, tokens, feature width), E_c(c) already added
    keep: Tensor | None = None  # (sets, images)
    reads: Reads | None = None  # in the place of `keep` and all images before
    attention: str = "prefix"  # of TRAINING_ATTENTIONS

    def attend(self, attention: ImageSetAttention, hidden: Tensor) -> Sequence[Tensor | Nothing]:
        own = self.images - 1
        if self.features is None:
            clean, noisy = hidden.split([self.sets * own, self.sets * self.images])
            k, v = attention.keys_and_values(clean.unflatten(0, (self.sets, own)))
        else:
            clean, noisy = hidden[:0], hidden
            k, v = attention.keys_and_values(self.features.to(hidden))
        q = attention.queries(noisy.unflatten(0, (self.sets, self.images)))
        if self.reads is not None:
            read = chosen_attention(q, k, v, self.reads)
        else:
            keep = None if self.keep is None else self.keep.to(q.device)  # layers may lie on several devices
            read = TRAINING_ATTENTIONS[self.attention](q, k, v, keep)
        return [Nothing(len(clean)), read.flatten(0, 1).flatten(2)]

    def going_on(self, hidden: Tensor) -> Tensor:
        return hidden[hidden.shape[0] - self.sets * self.images :]


@dataclass(frozen=True)
class Recording(_Conditioned):
    """A pass over clean images that remembers their keys and values; they read nothing."""

    sets: int
    images: int
    _found: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)

    def attend(self, attention: ImageSetAttention, hidden: Tensor) -> Sequence[Tensor | Nothing]:
        self._found[attention.layer] = attention.keys_and_values(hidden.unflatten(0, (self.sets, self.images)))
        return [Nothing(len(hidden))]

    def going_on(self, hidden: Tensor) -> Tensor:
        return hidden[:0]

    def context(self) -> Context:
        layers = [self._found[layer] for layer in sorted(self._found)]
        return Context(keys=tuple(k for k, _ in layers), values=tuple(v for _, v in layers))


@dataclass(frozen=True)
class FromContexts(_Conditioned):
    """A denoising pass: equal parts of the batch, the same noisy images, each read a context of their own, or none."""

    contexts: Sequence[KeptContext | None]

    @property
    def copies(self) -> int:
        return len(self.contexts)

    def attend(self, attention: ImageSetAttention, hidden: Tensor) -> Sequence[Tensor | Nothing]:
        parts = hidden.chunk(len(self.contexts))
        return [self._read(attention, part, context) for part, context in zip(parts, self.contexts)]

    def going_on(self, hidden: Tensor) -> Tensor:
        return hidden

    @staticmethod
    def _read(attention: ImageSetAttention, hidden: Tensor, context: KeptContext | None) -> Tensor | Nothing:
        if context is None:
            return Nothing(len(hidden))
        k, v = context.layer(attention.layer)
        return set_attention(attention.queries(hidden), k, v).flatten(2)
