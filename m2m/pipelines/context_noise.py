"""A little noise on what M2M-Self reads of preceding images, and its timestep told to the clean stream.

Belongs here: the sampling side, for models trained with it. Not here: the training side (`m2m.training.objective`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from m2m.errors import InputError
from m2m.models.unet import ManyToManyUNet
from m2m.pipelines.arguments import Generators


@dataclass(frozen=True)
class ContextNoise:
    """Noise that hides what a model's own images have wrong (conditioning augmentation; arXiv:2106.15282, section 3).

    An image's noise is drawn once, when it becomes a preceding image, and stays its own for all targets.

    Attributes:
        timestep: how much noise, as the noise schedule has it; the clean stream is told.
        kept: the share of the image's variance that is left at this timestep (alpha-bar).
        generator: one for all sets or one for each, as the pipeline's.
    """

    timestep: int
    kept: float
    generator: Generators

    def on(self, clean: Tensor) -> Tensor:
        """Noised latents, (sets, images, C, h, w)."""
        generator: Any = self.generator
        noise = randn_tensor(tuple(clean.shape), generator=generator, device=clean.device, dtype=torch.float32)
        return (self.kept**0.5 * clean.float() + (1 - self.kept) ** 0.5 * noise).to(clean.dtype)


def noise_of_context(unet: ManyToManyUNet, scheduler: Any, timestep: int, generator: Generators) -> ContextNoise | None:
    """The noise of a timestep; None at 0, where preceding images are read as they are.

    Raises:
        InputError: the model can't be told of noise, or there is no such timestep.
    """
    if timestep == 0:
        return None
    if unet.variant == "dino":
        raise InputError("context_noise is for M2M-Self: DINO features have no timestep. Leave it at 0")
    if unet.config["clean_timestep"] is None:
        raise InputError("context_noise: this model's clean images share the timestep of the noisy ones. Leave it at 0")
    last = len(scheduler.alphas_cumprod) - 1
    if not 0 <= timestep <= last:
        raise InputError(f"context_noise={timestep}: the noise schedule has timesteps 0 to {last}")
    return ContextNoise(timestep, float(scheduler.alphas_cumprod[timestep]), generator)
