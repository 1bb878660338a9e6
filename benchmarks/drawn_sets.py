"""Inputs of an evaluation for which nothing has to be made before: drawn test sets, the shipped models."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from m2m.data.sets import LATENTS, SetsIndex, SetTable, picture_name, write_index
from m2m.data.shards import ShardWriter, npy_bytes
from m2m.evaluation.planted import WorldSets
from m2m.models.text_to_image import load_ddim, load_dino, load_vae
from m2m.pipelines.many_to_many import ManyToManyPipeline
from m2m.training.starting import continued_unet

_SIDE = 64


def draw_sets(folder: Path, count: int, images: int) -> None:
    """A generate-sets output of test sets that the tiny world draws; nobody reads its latents."""
    drawn = WorldSets.drawn(count, 0, 0.5)
    latents = npy_bytes(np.zeros((images, 4, 1, 1), np.float16))
    with ShardWriter(folder, 0, "a benchmark") as writer:
        for key, caption in enumerate(drawn.captions()):
            pictures = drawn.pictures(key, range(images))
            files = {picture_name(i, "png"): _png(picture) for i, picture in enumerate(pictures)}
            said = {"caption": caption, "id": key, "split": "test"}
            writer.add(f"{key:09d}", {LATENTS: latents, "json": json.dumps(said).encode(), **files})
    SetTable.write(folder, [(0, range(count), ["test"] * count)])
    write_index(
        folder,
        SetsIndex(
            shards=1,
            sets_per_shard=count,
            splits={"test": count},
            images_per_set=images,
            image_size=_SIDE,
            latent_shape=(4, 1, 1),
            pictures="png",
        ),
    )


def shipped(variant: str, weights: Path) -> ManyToManyPipeline:
    """The shipped checkpoint that the tiny profile's training starts from."""
    dino = load_dino(weights / "dinov2") if variant == "dino" else None
    width = None if dino is None else dino.config.hidden_size
    unet = continued_unet(weights / f"m2m-{variant}", variant, width, {})
    source = weights / "stable-diffusion"
    return ManyToManyPipeline(load_vae(source), unet.float(), load_ddim(source), dino)


def _png(picture: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()
