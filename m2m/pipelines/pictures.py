"""Pictures as callers give and want them: PIL images or tensors, one set or many, sets of any length.

Belongs here: reading arguments into tensors and back. Not here: encoding (`m2m.models.autoencoder`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from m2m.errors import InputError

Pictures = Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | Sequence[Tensor] | Tensor


def as_sets(images: Pictures, size: tuple[int, int]) -> list[Tensor]:
    """Preceding images of every set, (images, 3, H, W) floats in [0, 1].

    Args:
        images: one set as a list of PIL images, sets as a list of lists (of any lengths, zero included), a tensor
            (sets, images, 3, H, W) with floats in [0, 1], or a list of tensors (images, 3, H, W) of any lengths. PIL
            images of another size are cropped to the middle and resized.
        size: (height, width) in pixels.

    Raises:
        InputError: something else, or a tensor of another size or range.
    """
    if isinstance(images, Tensor):
        if images.ndim != 5:
            raise InputError(f"images of shape {tuple(images.shape)}: expected (sets, images, 3, height, width)")
        return [_checked(one, size) for one in images]
    given: list[Any] = list(images)
    if all(isinstance(image, Image.Image) for image in given):
        given = [given]
    return [_stacked(one, size, number) for number, one in enumerate(given)]


def as_output(images: Tensor, kind: str) -> list[list[Image.Image]] | Tensor | np.ndarray:
    """(sets, n, 3, H, W) floats in [0, 1] as they are ("pt"), as an array (sets, n, H, W, 3) ("np") or PIL images."""
    if kind == "pt":
        return images
    floats = images.detach().float().clamp(0, 1).movedim(2, -1).cpu()
    if kind == "np":
        return floats.numpy()
    pixels = (floats * 255).round().to(torch.uint8).numpy()
    return [[Image.fromarray(picture) for picture in one] for one in pixels]


def _checked(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"a set of images of shape {tuple(images.shape)}: expected (images, 3, height, width)")
    if not images.is_floating_point():
        raise InputError(f"images of {images.dtype}: expected floats in [0, 1]")
    if images.numel() and tuple(images.shape[-2:]) != size:
        raise InputError(f"images of {tuple(images.shape[-2:])} pixels; {size} are asked for (height, width)")
    if not torch.isfinite(images).all():
        raise InputError("images hold NaN or infinite pixels: expected floats in [0, 1]")
    if images.numel() and (images.min() < 0 or images.max() > 1):
        raise InputError(f"images between {images.min():.3g} and {images.max():.3g}: expected floats in [0, 1]")
    return images


def _stacked(images: Any, size: tuple[int, int], number: int) -> Tensor:
    if isinstance(images, Tensor):
        return _checked(images, size)
    try:
        pictures = list(images)
    except TypeError:
        raise InputError(f"images[{number}] is a {type(images).__name__}; expected a list of PIL images") from None
    for place, picture in enumerate(pictures):
        if not isinstance(picture, Image.Image):
            raise InputError(f"images[{number}][{place}] is a {type(picture).__name__}; expected a PIL image")
    if not pictures:
        return torch.zeros(0, 3, *size)
    height, width = size
    fitted = [picture.convert("RGB") for picture in pictures]
    fitted = [
        picture if picture.size == (width, height) else ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
        for picture in fitted
    ]
    pixels = np.stack([np.asarray(picture) for picture in fitted])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
