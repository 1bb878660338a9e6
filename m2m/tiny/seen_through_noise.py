"""How much of an image a model sees through noise, in one prediction, with preceding images and without, on drawn sets.

Belongs here: the measure. Not here: sampling (`m2m.pipelines`): it starts from what is measured here at high noise.
"""

from pathlib import Path

import numpy as np
import torch

from m2m.models.autoencoder import encode_images
from m2m.pipelines.many_to_many import load_pipeline
from m2m.tiny.many_to_many import draw_set

TIMESTEPS = (999, 950, 900, 750, 500, 250)


@torch.no_grad()
def seen_through_noise(folder: Path, sets: int = 200, seed: int = 100) -> dict[str, list[float]]:
    """Squared error of the image that a prediction implies, over the variance of images: the mean image has 1.

    Of the last image of each set at each of `TIMESTEPS`, "after 4" before it and "after 0".

    Args:
        folder: what `pretrain` left.
        seed: of the sets and their noise, another than a training's.
    """
    pipeline = load_pipeline(folder)
    rng = np.random.default_rng(seed)
    pictures = torch.from_numpy(np.stack([draw_set(rng) for _ in range(sets)])).movedim(-1, 2).float() / 255
    latents = encode_images(pipeline.vae, pictures.flatten(0, 1)).float().unflatten(0, pictures.shape[:2])
    clean, read = latents[:, -1], latents[:, :-1]
    if pipeline.unet.variant == "dino":
        read = pipeline.encode(pictures[:, :-1].flatten(0, 1)).unflatten(0, read.shape[:2])
    context = pipeline.unet.encode_context(read)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    variance = clean.var(0, correction=0).mean()
    found: dict[str, list[float]] = {f"after {read.shape[1]}": [], "after 0": []}
    for timestep in TIMESTEPS:
        share = pipeline.scheduler.alphas_cumprod[timestep]
        noisy = share.sqrt() * clean + (1 - share).sqrt() * noise
        predictions = pipeline.unet.denoise_branches(noisy, timestep, [(context, None), (None, None)])
        for errors, predicted in zip(found.values(), predictions, strict=True):
            if pipeline.scheduler.config["prediction_type"] == "v_prediction":
                image = share.sqrt() * noisy - (1 - share).sqrt() * predicted
            else:
                image = (noisy - (1 - share).sqrt() * predicted) / share.sqrt()
            errors.append(float((image - clean).square().mean() / variance))
    return found
