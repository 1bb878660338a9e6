"""Preceding images that the model made itself, so that training sees what a long rollout will read (section 9).

Belongs here: which sets are replaced, generating, encoding what was generated. Not here: the loss, whose targets stay
the true images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from m2m.generation.noise import keyed_generator, keyed_normal, namespaced
from m2m.pipelines.many_to_many import ManyToManyPipeline
from m2m.training.loop import Batch


@dataclass(frozen=True)
class OwnRollouts:
    """In a share of sets, the preceding images but the first become what the model, as it stands, makes of the first.

    Scheduled sampling (Bengio et al. 2015, arXiv:1506.03099) by whole sets, without gradient. Who is replaced and the
    noise are functions of (seed, epoch, sample): a resumed training makes the same images.

    Args:
        share: of sets.
        steps: of the sampler; few, as this is paid at every training step.
        guidance_scale: 1 guides nothing, and costs half.
    """

    pipeline: ManyToManyPipeline
    accelerator: Accelerator
    seed: int
    share: float
    steps: int
    guidance_scale: float = 1.0

    def __call__(self, batch: Batch, samples: Sequence[int], epoch: int) -> Batch:
        """A prepared batch with `context` (B, N - 1, C, h, w) for M2M-Self, or other `features` for M2M-DINO."""
        images = batch["latents"].shape[1]
        chosen = [place for place, sample in enumerate(samples) if self.replaces(epoch, sample)]
        if not chosen or images < 3:  # two images have one before the last: the given one
            return batch
        read = "context" if self.pipeline.unet.variant == "self" else "features"
        replaced = batch["features"].clone() if read == "features" else batch["latents"][:, :-1].clone()
        noise = [
            keyed_normal(
                namespaced(self.seed, "rollouts: noise"),
                epoch,
                samples[place],
                shape=(images - 2, *batch["latents"].shape[2:]),
            )
            for place in chosen
        ]
        condition = batch["condition"][chosen] if "condition" in batch else None
        replaced[chosen, 1:] = self._made(replaced[chosen, :1], torch.stack(noise), condition).to(replaced.dtype)
        return {**batch, read: replaced}

    def replaces(self, epoch: int, sample: int) -> bool:
        """Whether a set's preceding images are the model's own in this epoch."""
        return keyed_generator(namespaced(self.seed, "rollouts: who"), epoch, sample).random() < self.share

    @torch.no_grad()
    def _made(self, given: Tensor, noise: Tensor, condition: Tensor | None) -> Tensor:
        """What the U-Net reads of the images that follow the given one: (sets, images, ...)."""
        pipeline, images = self.pipeline, noise.shape[1]
        was_training = pipeline.unet.training
        pipeline.unet.eval()
        pipeline.set_progress_bar_config(disable=True)
        of_self = pipeline.unet.variant == "self"
        with self.accelerator.autocast():
            made = pipeline(
                preceding=given,
                num_images=images,
                condition=None if condition is None else condition[:, :1],
                target_condition=None if condition is None else condition[:, 1 : images + 1],
                latents=noise.to(given.device),
                num_inference_steps=self.steps,
                guidance_scale=self.guidance_scale,
                output_type="latent" if of_self else "pt",
            ).images
            assert isinstance(made, Tensor)
            read = made if of_self else pipeline.encode(made.flatten(0, 1)).unflatten(0, made.shape[:2])
        pipeline.unet.train(was_training)
        return read
