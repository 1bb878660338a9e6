"""Arguments of a call checked against the model and each other, and brought into tensors.

Belongs here: sizes, conditions, noise. Not here: pictures (`pictures`) and what is done with any of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from m2m.errors import InputError
from m2m.models.unet import ManyToManyUNet

Generators = torch.Generator | Sequence[torch.Generator] | None


def image_size(
    scale: int,
    sample_size: Any,
    images: Any,
    latents: Tensor | None,
    height: int | None,
    width: int | None,
) -> tuple[int, int]:
    """Height and width in pixels: as asked for, or else as the given tensors have it, or else as the model was made.

    Args:
        scale: pixels a latent.
        sample_size: the U-Net's, in latents.

    Raises:
        InputError: not a multiple of `scale`.
    """
    sides = list(sample_size) if isinstance(sample_size, list | tuple) else [sample_size, sample_size]
    size = [side * scale for side in sides]
    if latents is not None and latents.ndim == 5:
        size = [side * scale for side in latents.shape[-2:]]
    elif isinstance(images, Tensor) and images.ndim == 5 and images.numel():
        size = list(images.shape[-2:])
    tall, wide = int(height or size[0]), int(width or size[1])
    if tall % scale or wide % scale:
        raise InputError(f"height={tall}, width={wide}: both must be multiples of {scale} pixels")
    return tall, wide


def count_sets(latents: Tensor | None, target_condition: Tensor | None, generator: Generators) -> int:
    """How many sets a call without preceding images makes: one unless other arguments speak of more."""
    counts = [len(given) for given in (latents, target_condition) if given is not None]
    counts += [len(generator)] if isinstance(generator, list | tuple) else []
    return max(counts, default=1)


def paired_conditions(
    unet: ManyToManyUNet, condition: Any, target: Tensor | None, sets: Sequence[Tensor], num_images: int
) -> tuple[list[Tensor], Tensor] | None:
    """Conditions of each set's preceding images, (W, numbers) each, and of the targets; None where there are none.

    Raises:
        InputError: the model takes no condition, or they don't fit the images.
    """
    if condition is None and target is None:
        return None
    kind = unet.config["condition"]
    if kind is None:
        raise InputError("this model takes no condition: it was not fine-tuned for one")
    numbers = unet.condition_embedder.numbers
    if target is None or tuple(target.shape) != (len(sets), num_images, numbers):
        got = "None" if target is None else tuple(target.shape)
        raise InputError(f"target_condition ({kind}) is {got}; expected {(len(sets), num_images, numbers)}")
    if condition is None:
        condition = [torch.zeros(0, numbers)] * len(sets)
    found = [one.to(unet.device, torch.float32) for one in condition]
    if len(found) != len(sets):
        raise InputError(f"condition ({kind}) is given for {len(found)} sets; there are {len(sets)}")
    for number, (one, images) in enumerate(zip(found, sets)):
        if tuple(one.shape) != (len(images), numbers):
            raise InputError(
                f"condition ({kind}) of set {number} is {tuple(one.shape)}; expected {(len(images), numbers)}, "
                "a row for each of its preceding images"
            )
    return found, target.to(unet.device, torch.float32)


def initial_noise(
    shape: tuple[int, ...], latents: Tensor | None, generator: Generators, device: torch.device
) -> Tensor:
    """The noise that sampling starts from, in float32: as given, or drawn for all images before the first is made.

    Args:
        shape: (sets, images, C, h, w).

    Raises:
        InputError: noise of another shape, or another number of generators than sets.
    """
    generators = list(generator) if isinstance(generator, list | tuple) else generator
    if isinstance(generators, list) and len(generators) != shape[0]:
        raise InputError(f"{len(generators)} generators for {shape[0]} sets: give one for all or one for each")
    if latents is None:
        return randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)  # type: ignore[arg-type]
    if tuple(latents.shape) != shape:
        raise InputError(f"latents of shape {tuple(latents.shape)}; expected {shape}")
    return latents.to(device, torch.float32)
