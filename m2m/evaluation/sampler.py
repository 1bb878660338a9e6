"""A trained model as evaluations ask it: to continue sets of pictures, with keyed noise.

Belongs here: loading it with an evaluation's settings, its noise, its pictures in bytes. Not here: what is measured of
them, models that are no trained ones (`m2m.evaluation.planted`).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from m2m.errors import ArtifactError
from m2m.evaluation.protocol import SEEN_TOGETHER, BothModels, EvaluationConfig
from m2m.generation.noise import keyed_normal, namespaced, torch_generator
from m2m.models.autoencoder import decode_latents, encode_images, pixels_per_latent
from m2m.models.unet import VARIANTS
from m2m.pipelines.schedulers import named_scheduler
from m2m.stage_run import StageRun


class Sampler:
    """One trained model that continues sets of pictures, with noise keyed by (set, image)."""

    def __init__(self, folder: Path, variant: str, config: EvaluationConfig) -> None:
        from m2m.pipelines.many_to_many import load_pipeline

        self.pipeline = load_pipeline(folder, variant, config.compute)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.scheduler = named_scheduler(config.sampling.scheduler, self.pipeline.scheduler)
        self._config = config
        number = f" {config.noise_seed}" if config.noise_seed else ""
        self._noise = namespaced(config.seed, f"evaluation noise{number}")
        self._later_noise = namespaced(config.seed, f"evaluation noise{number} between steps")
        unet = self.pipeline.unet.config
        size = int(unet.sample_size)
        self.size = size * pixels_per_latent(self.pipeline.vae)
        self._latent_shape = (int(unet.in_channels), size, size)

    def continue_sets(
        self,
        preceding: Tensor,
        keys: Sequence[int],
        num_images: int = 1,
        *,
        first_image: int = 0,
        guidance_scale: float | None = None,
        **conditions: Any,
    ) -> Tensor:
        """Generate the next pictures of sets, each seeing the ones before it.

        Args:
            preceding: uint8 (B, W, 3, H, W).
            keys: one number a set: the same key and image number give the same noise in every batch and run.
            first_image: number of the first generated image in the noise's key.
            guidance_scale: instead of the settings'.
            conditions: `condition`, `target_condition`, `condition_guidance_scale` of the pipeline; or its
                `context_window`, `context_sink`, `context_noise`, instead of the settings'.

        Returns:
            uint8 (B, num_images, 3, H, W) on the CPU.

        Raises:
            ArtifactError: the model makes pictures that are not finite.
        """
        numbers = range(first_image, first_image + num_images)
        noise = [
            torch.stack([keyed_normal(self._noise, key, n, shape=self._latent_shape) for n in numbers]) for key in keys
        ]
        sampling = self._config.sampling
        made = self.pipeline(
            images=preceding.float() / 255,
            num_images=num_images,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale if guidance_scale is None else guidance_scale,
            latents=torch.stack(noise),
            generator=[torch_generator(self._later_noise, key, first_image) for key in keys],
            output_type="pt",
            **{"context_window": sampling.context_window, "context_sink": sampling.context_sink, **conditions},
        ).images
        return _to_bytes(made)

    @torch.inference_mode()
    def reconstruct(self, pictures: Tensor) -> Tensor:
        """Pictures uint8 (..., 3, H, W) through the autoencoder and back: the best that the model could do."""
        pixels = pictures.reshape(-1, *pictures.shape[-3:]).float() / 255
        return self.decode(encode_images(self.pipeline.vae, pixels)).reshape(pictures.shape)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (n, C, h, w) -> uint8 pictures (n, 3, H, W)."""
        return _to_bytes(decode_latents(self.pipeline.vae, latents))


def samplers(config: BothModels, run: StageRun) -> Iterable[tuple[str, Sampler]]:
    """The models, one after the other (each is freed before the next is loaded), by their name in the paper."""
    for variant, name in VARIANTS.items():
        if variant in config.models:
            yield name, Sampler(run.inputs[f"m2m_{variant}"], variant, config)


class Continues(Protocol):
    """What evaluations ask of a model: a trained one's `Sampler`, or a planted one (`m2m.evaluation.planted`)."""

    size: int

    def continue_sets(
        self, preceding: Tensor, keys: Sequence[int], num_images: int = 1, *, guidance_scale: float | None = None
    ) -> Tensor: ...

    def reconstruct(self, pictures: Tensor) -> Tensor: ...


def _to_bytes(pictures: Any) -> Tensor:
    pictures = torch.as_tensor(pictures).detach()
    made = torch.empty(pictures.shape, dtype=torch.uint8)
    # part by part: of a long rollout's pictures no further copies in floats are made
    for part, kept in zip(pictures.flatten(0, -4).split(SEEN_TOGETHER), made.flatten(0, -4).split(SEEN_TOGETHER)):
        if not torch.isfinite(part).all():
            raise ArtifactError(
                "the model made a picture that is not finite: train it again, or use compute.dtype float32"
            )
        kept.copy_((part.float().clamp(0, 1) * 255).round())
    return made
