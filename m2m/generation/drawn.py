"""Image sets that the tiny world draws itself, as their captions say: minutes where sampling them takes hours.

Belongs here: pictures of one caption. Not here: their latents and files (`image_sets`), drawing (`m2m.tiny.world`).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from m2m.errors import InputError
from m2m.generation.noise import keyed_generator
from m2m.tiny.world import SIZE, draw, read_caption, sample_scene


def drawn_pictures(namespace: int, caption_id: int, caption: str, images: int, size: int = SIZE) -> Tensor:
    """Pictures of what a caption names, all else free in each; keyed by (caption, image).

    Returns:
        Floats in [0, 1], (images, 3, size, size).

    Raises:
        InputError: the caption is none of the world's.
    """
    named = read_caption(caption)
    if not named and "shape" not in caption:
        raise InputError(f"generate-sets.drawn: caption {caption_id} ({caption!r}) names nothing that the world draws")
    streams = [keyed_generator(namespace, caption_id, image) for image in range(images)]
    pictures = torch.stack([torch.from_numpy(draw(sample_scene(rng, named), rng)).permute(2, 0, 1) for rng in streams])
    if size == SIZE:
        return pictures / 255
    return F.interpolate(pictures / 255, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
