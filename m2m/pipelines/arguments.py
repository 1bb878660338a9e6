"""Arguments of a call checked against the model and each other, and brought into tensors.

Belongs here: sizes, what is read, conditions, noise. Not here: pictures (`pictures`) and what is done with any of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from m2m.errors import InputError
from m2m.models.unet import VARIANTS, ManyToManyUNet

Generators = torch.Generator | Sequence[torch.Generator] | None


def image_size(
    scale: int,
    sample_size: Any,
    images: Any,
    latents: Any,
    height: int | None,
    width: int | None,
) -> tuple[int, int]:
    """Height and width in pixels: as asked for, or else as the given tensors have it, or else as the model was made.

    Args:
        scale: pixels a latent.
        sample_size: the U-Net's, in latents.
        images, latents: a tensor of all sets, or a list with one for each.

    Raises:
        InputError: not a multiple of `scale`.
    """
    sides = list(sample_size) if isinstance(sample_size, list | tuple) else [sample_size, sample_size]
    size = [side * scale for side in sides]
    if isinstance(latents, Tensor) and latents.ndim == 5:
        size = [side * scale for side in latents.shape[-2:]]
    elif of_latents := _sides(latents):
        size = [side * scale for side in of_latents]
    elif of_images := _sides(images):
        size = of_images
    tall, wide = int(height or size[0]), int(width or size[1])
    if tall < 1 or wide < 1 or tall % scale or wide % scale:
        raise InputError(f"height={tall}, width={wide}: both must be multiples of {scale} pixels")
    return tall, wide


def count_sets(latents: Tensor | None, target_condition: Tensor | None, generator: Generators) -> int:
    """How many sets a call without preceding images makes: one unless other arguments speak of more."""
    counts = [len(given) for given in (latents, target_condition) if given is not None]
    counts += [len(generator)] if isinstance(generator, list | tuple) else []
    return max(counts, default=1)


def preceding_sets(unet: ManyToManyUNet, preceding: Tensor | Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """What the U-Net reads of each set's preceding images, on the device.

    Args:
        preceding: (sets, W, ...) or a list of (W, ...): latents (C, h, w) or DINO features (tokens, width) an image.

    Raises:
        InputError: something else than this variant reads, sets that differ in more than W, or numbers not finite.
    """
    if unet.variant == "self":
        kind, axes, place, width = "scaled latents (W, C, h, w)", 4, 1, unet.config["in_channels"]
    else:
        kind, axes, place, width = "DINO features (W, tokens, width)", 3, 2, unet.feature_dim
    found = []
    for number, one in enumerate(preceding):
        if not isinstance(one, Tensor) or one.ndim != axes or one.shape[place] != width:
            got = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
            raise InputError(
                f"preceding[{number}] is {got}: {VARIANTS[unet.variant]} reads {kind} with {width} on axis {place}"
            )
        if one.shape[1:] != preceding[0].shape[1:]:
            raise InputError(
                f"preceding[{number}] is {tuple(one.shape)}, preceding[0] {tuple(preceding[0].shape)}: "
                "sets may differ in the number of images only"
            )
        found.append(_finite(one, f"preceding[{number}]").to(device, unet.dtype))
    return found


def paired_conditions(
    unet: ManyToManyUNet,
    condition: Any,
    target: Tensor | None,
    sets: Sequence[Tensor],
    num_images: int,
    condition_guidance_scale: float | None,
) -> tuple[list[Tensor], Tensor] | None:
    """Conditions of each set's preceding images, (W, numbers) each, and of the targets; None where there are none.

    Raises:
        InputError: the model takes no condition, or needs one that is not given, or they don't fit the images.
    """
    kind = unet.config["condition"]
    if condition is None and target is None:
        if kind is not None and condition_guidance_scale != 0:
            raise InputError(
                f"this model is fine-tuned for a {kind} condition: give target_condition and, for preceding images, "
                "condition; or condition_guidance_scale=0 to leave it out"
            )
        return None
    if kind is None:
        raise InputError("this model takes no condition: it was not fine-tuned for one")
    numbers = unet.condition_embedder.numbers
    if target is None or tuple(target.shape) != (len(sets), num_images, numbers):
        got = "None" if target is None else tuple(target.shape)
        raise InputError(f"target_condition ({kind}) is {got}; expected {(len(sets), num_images, numbers)}")
    if condition is None:
        condition = [torch.zeros(0, numbers)] * len(sets)
    found = [one.to(sets[0].device, torch.float32) for one in condition]
    if len(found) != len(sets):
        raise InputError(f"condition ({kind}) is given for {len(found)} sets; there are {len(sets)}")
    for number, (one, images) in enumerate(zip(found, sets)):
        if tuple(one.shape) != (len(images), numbers):
            raise InputError(
                f"condition ({kind}) of set {number} is {tuple(one.shape)}; expected {(len(images), numbers)}, "
                "a row for each of its preceding images"
            )
        _finite(one, f"condition ({kind}) of set {number}")
    return found, _finite(target, f"target_condition ({kind})").to(sets[0].device, torch.float32)


def initial_noise(
    shape: tuple[int, ...], latents: Tensor | None, generator: Generators, device: torch.device
) -> Tensor:
    """The noise that sampling starts from, in float32: as given, or drawn for all images before the first is made.

    Args:
        shape: (sets, images, C, h, w).

    Raises:
        InputError: noise of another shape or not finite, or another number of generators than sets.
    """
    generators = list(generator) if isinstance(generator, list | tuple) else generator
    if isinstance(generators, list) and len(generators) != shape[0]:
        raise InputError(f"{len(generators)} generators for {shape[0]} sets: give one for all or one for each")
    if latents is None:
        return randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)  # type: ignore[arg-type]
    if tuple(latents.shape) != shape:
        raise InputError(f"latents of shape {tuple(latents.shape)}; expected {shape}")
    return _finite(latents, "latents").to(device, torch.float32)


def _finite(given: Tensor, name: str) -> Tensor:
    if not torch.isfinite(given).all():
        raise InputError(f"{name} holds NaN or infinite numbers")
    return given


def _sides(given: Any) -> list[int] | None:
    """Height and width of a tensor of all sets, or of the first of a list of tensors; None where nothing says so."""
    sets = [given] if isinstance(given, Tensor) else given if isinstance(given, list | tuple) else []
    axes = 5 if isinstance(given, Tensor) else 4
    tensors = [one for one in sets if isinstance(one, Tensor) and one.ndim == axes and one.numel()]
    return list(tensors[0].shape[-2:]) if tensors else None
