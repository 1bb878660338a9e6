"""Pictures to what the U-Net trains on: latents of the autoencoder E and features of DINOv2 (section 5).

Belongs here: encoding a batch while training. Not here: the encoders' use of a picture (`m2m.pipelines`), the cache of
features on disk (`m2m.generation.features`).
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from m2m.models.autoencoder import decode_latents, encode_images
from m2m.pipelines.many_to_many import ManyToManyPipeline
from m2m.training.loop import Batch


@dataclass(frozen=True)
class Encoding:
    """Adds what is missing in a batch: latents of `pictures`, features of M2M-DINO.

    Latents are the mode of E's posterior, not a sample: the same whenever a picture is encoded, so that they can be
    kept; its spread is far below the noise of all but the first timesteps.

    Args:
        pipeline: whose parts encode; as sampling will.
        encode_latents: make latents of pictures also where the batch has the sampler's own.
    """

    pipeline: ManyToManyPipeline
    accelerator: Accelerator
    encode_latents: bool = False

    def __call__(self, batch: Batch) -> Batch:
        """`pictures` uint8 (B, N, 3, H, W), or `latents` (B, N, C, h, w) to decode -> `latents` and `features`."""
        ready = {key: value for key, value in batch.items() if key != "pictures"}
        wants_latents = self.encode_latents or "latents" not in ready
        wants_features = self.pipeline.unet.variant == "dino" and "features" not in ready
        if not wants_latents and not wants_features:
            return ready
        pictures = pictures_of(batch, self.pipeline)
        if wants_latents:
            ready["latents"] = self.latents(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])
        if wants_features:
            read = pictures[:, :-1]  # the last image is no context: nobody reads it
            ready["features"] = self.features(read.flatten(0, 1)).unflatten(0, read.shape[:2])
        return ready

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, C, h, w) float32."""
        return encode_images(self.pipeline.vae, pictures).float()

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, S, D) float32."""
        with self.accelerator.autocast():
            return self.pipeline.encode(pictures).float()


@torch.no_grad()
def pictures_of(batch: Batch, pipeline: ManyToManyPipeline) -> Tensor:
    """The batch's pictures, decoded from latents where it has none: (B, N, 3, H, W) in [0, 1]."""
    if "pictures" in batch:
        return batch["pictures"].float() / 255
    latents = batch["latents"]
    return decode_latents(pipeline.vae, latents.flatten(0, 1)).unflatten(0, latents.shape[:2]).float()
