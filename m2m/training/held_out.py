"""What a training is judged by while nobody looks: the loss on held-out sets, and a picture of what it makes of some.

Belongs here: the validation loss, the sample picture. Not here: the paper's metrics (`m2m.evaluation`).
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from m2m.artifacts import write_bytes
from m2m.generation.noise import keyed_normal, namespaced
from m2m.models.autoencoder import pixels_per_latent
from m2m.training.loop import Batch, Prepare, SetData, batch_losses
from m2m.training.objective import Objective, SetLoss

_GAP = 6  # pixels between given and generated images


@torch.no_grad()
def validation_loss(
    loss: SetLoss,
    objective: Objective,
    data: SetData,
    prepare: Prepare,
    accelerator: Accelerator,
    *,
    sets: int,
    micro_batch: int,
) -> float | None:
    """Eq. 5 on the first `sets` held-out sets under noise and timesteps that never change, with nothing dropped.

    Several processes share the batches; each gets the mean of all.

    Returns:
        The mean over sets; None where there are none.
    """
    steady = objective.steady("validation")
    was_training = loss.unet.training
    loss.unet.eval()
    found: list[tuple[int, list[float]]] = []
    count = min(sets, len(data))
    starts = range(0, count, micro_batch)
    for at in starts[accelerator.process_index :: accelerator.num_processes]:
        samples = list(range(at, min(at + micro_batch, count)))
        ready = prepare(stacked(data, samples, accelerator.device))
        with accelerator.autocast():
            found.append((at, batch_losses(loss, steady, ready, samples, epoch=0).tolist()))
    loss.unet.train(was_training)
    if accelerator.num_processes > 1:
        found = gather_object(found)
    # in the order of one process, so that the mean has its bits
    losses = [value for _, values in sorted(found) for value in values]
    return float(np.mean(losses)) if losses else None


def stacked(data: SetData, samples: list[int], device: torch.device) -> Batch:
    """Held-out sets as one batch on the device."""
    items = [data[0, sample] for sample in samples]
    return {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}


@torch.no_grad()
def continued(
    pipeline: Any,
    pictures: Tensor,
    num_images: int,
    *,
    seed: int,
    condition: Tensor | None = None,
    **sampling: Any,
) -> Tensor:
    """Sets with `num_images` images generated after the given ones.

    Args:
        pipeline: a ManyToManyPipeline.
        pictures: (B, W, 3, H, W) in [0, 1].
        condition: (B, W + num_images, P) for fine-tuned models.

    Returns:
        (B, W + num_images, 3, H, W).
    """
    sets, given = pictures.shape[:2]
    unet = pipeline.unet
    height, width = (side // pixels_per_latent(pipeline.vae) for side in pictures.shape[-2:])
    # the image's number counts from the first given one, so that its noise does not change with `num_images`
    noise = [
        [
            keyed_normal(
                namespaced(seed, "sample picture"), place, image, shape=(unet.config.in_channels, height, width)
            )
            for image in range(given, given + num_images)
        ]
        for place in range(sets)
    ]
    if condition is not None:
        sampling |= {"condition": condition[:, :given], "target_condition": condition[:, given : given + num_images]}
    made = pipeline(
        images=pictures,
        num_images=num_images,
        latents=torch.stack([torch.stack(own) for own in noise]).to(unet.device),
        output_type="pt",
        **sampling,
    ).images
    return torch.cat([pictures, made.to(pictures)], dim=1)


def write_grid(path: Path, sets: Tensor, given: int) -> None:
    """A PNG with a row for each set: the given images, a white gap, the generated ones.

    Args:
        sets: (B, images, 3, H, W) in [0, 1].
    """
    pixels = (sets.cpu().float().clamp(0, 1) * 255).round().byte().permute(0, 3, 1, 4, 2).numpy()  # B, H, images, W, 3
    rows, height = pixels.shape[:2]
    left = pixels[:, :, :given].reshape(rows * height, -1, 3)
    right = pixels[:, :, given:].reshape(rows * height, -1, 3)
    gap = np.full((rows * height, _GAP, 3), 255, np.uint8)
    grid = Image.fromarray(np.concatenate([left, gap, right], axis=1))
    content = io.BytesIO()
    grid.save(content, format="PNG")
    write_bytes(path, content.getvalue())
