"""One group of sets carried on: image after image, each denoised from those before it (paper, section 6.1, Eq. 6).

Belongs here: the loops over images and steps. Not here: arguments (`arguments`), which predictions guidance needs
(`guidance`), what is kept of preceding images (`preceding`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m2m.models.autoencoder import decode_latents
from m2m.pipelines.arguments import Generators
from m2m.pipelines.context_noise import ContextNoise
from m2m.pipelines.guidance import Interval, guided_predictions, guided_steps, weighted_sum
from m2m.pipelines.preceding import PrecedingImages
from m2m.pipelines.schedulers import step_arguments


@dataclass(frozen=True)
class Rollout:
    """What sets with equally many preceding images are generated with; tensors as in `ManyToManyPipeline.__call__`."""

    noise: Tensor
    steps: int
    condition: Tensor | None
    target: Tensor | None
    images_scale: float
    condition_scale: float | None
    interval: Interval | None
    window: int | None
    sink: int
    int8: bool
    keep: bool
    context_noise: ContextNoise | None
    generator: Generators
    decode: bool
    tick: Callable[[], Any]
    callback: Callable[[int, Any, Tensor], Tensor]
    """Called with the number of the step, its timestep and the latents; gives the latents to go on with."""

    def generate(self, pipeline: Any, clean: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents (sets, n, C, h, w) and, where they are wanted, pictures of one image after another.

        Args:
            pipeline: a ManyToManyPipeline.
            clean: what the U-Net reads of the given images.
        """
        unet = pipeline.unet
        three = self.target is not None and self.condition_scale not in (None, self.images_scale)
        memory = PrecedingImages(
            unet,
            self.window,
            self.sink,
            with_condition=self.target is not None,
            without_condition=self.target is None or three,
            int8=self.int8,
            keep=self.keep,
            noise=self.context_noise,
        )
        memory.add(clean, self.condition)
        sets, count = self.noise.shape[:2]
        latents: list[Tensor] = []
        pictures: Tensor | None = None
        for number in range(count):
            target = None if self.target is None else self.target[:, number]
            latents.append(self._denoise(unet, pipeline.scheduler, number, target, memory))
            is_read = number < count - 1
            seen = self.decode or (is_read and unet.variant == "dino")
            picture = decode_latents(pipeline.vae, latents[-1]) if seen else None
            if self.decode and picture is not None:
                # laid out once for all of them: of a rollout with a window nothing else grows
                pictures = picture.new_empty(sets, count, *picture.shape[1:]) if pictures is None else pictures
                pictures[:, number] = picture
            if is_read:
                # a latent is read as it was made: encoding its picture again would only lose detail
                read = latents[-1].to(unet.dtype) if unet.variant == "self" else pipeline.encode(picture)
                memory.add(read[:, None], None if target is None else target[:, None])
        return torch.stack(latents, 1), pictures

    def _denoise(
        self, unet: Any, scheduler: Any, number: int, target: Tensor | None, memory: PrecedingImages
    ) -> Tensor:
        scheduler.set_timesteps(self.steps, device=self.noise.device)
        latents = self.noise[:, number] * scheduler.init_noise_sigma
        guided = guided_steps(len(scheduler.timesteps), self.interval)
        null = unet.null_context(latents.to(unet.dtype)) if self.images_scale != 1 and guided else None
        for step, timestep in enumerate(scheduler.timesteps):
            both, images = memory.contexts(timestep)
            images_scale, condition_scale = self._scales(step in guided)
            predictions = guided_predictions(
                null=null if both or images else None,
                images=images,
                both=both,
                condition=target,
                guidance_scale=images_scale,
                condition_guidance_scale=condition_scale,
            )
            noisy = scheduler.scale_model_input(latents, timestep).to(unet.dtype)
            branches = [(prediction.context, prediction.condition) for prediction in predictions]
            noise = weighted_sum(
                [prediction.weight for prediction in predictions], unet.denoise_branches(noisy, timestep, branches)
            )
            arguments = step_arguments(scheduler, self.generator)
            latents = scheduler.step(noise, timestep, latents, **arguments).prev_sample
            latents = self.callback(number * len(scheduler.timesteps) + step, timestep, latents)
            self.tick()
        return latents

    def _scales(self, guided: bool) -> tuple[float, float | None]:
        """s_I and s_C of Eq. 7; where nothing is guided, those that leave one prediction, given all that is told."""
        if guided:
            return self.images_scale, self.condition_scale
        return 1.0, 0.0 if self.condition_scale == 0 else 1.0
