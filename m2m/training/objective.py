"""The training objective: Eq. 5 over all images of a set, and everything random that it needs.

Belongs here: noise, timesteps, what is dropped, the loss. Not here: where sets come from, optimisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from m2m.errors import InputError
from m2m.generation.noise import keyed_generator, keyed_normal, namespaced
from m2m.models.unet import ManyToManyUNet


@dataclass(frozen=True)
class Draws:
    """What chance decides for a batch of B sets of N images."""

    noise: Tensor  # (B, N, C, h, w) float32
    timesteps: Tensor  # (B, N) int64
    keep_context: Tensor  # (B,) bool; False: the set's images see no preceding images
    keep_condition: Tensor  # (B,) bool; False: the set's images see no camera or position

    def to(self, device: torch.device) -> "Draws":
        return Draws(*(tensor.to(device) for tensor in vars(self).values()))


@dataclass(frozen=True)
class Objective:
    """Who is noised how much and who sees what; a function of (seed, epoch, sample) alone.

    So no result depends on how samples are spread over batches, ranks or workers.
    """

    seed: int
    timesteps: Literal["image", "set"] = "image"
    context_dropout: float = 0.1
    condition_dropout: float = 0.0
    drop_together: bool = False
    num_train_timesteps: int = 1000
    purpose: str = "training"

    def draw(self, samples: Sequence[int], epoch: int, shape: Sequence[int]) -> Draws:
        """The draws of a batch.

        Args:
            samples: the sets' numbers.
            shape: of one set's latents, (N, C, h, w).
        """
        images = shape[0]
        steps, contexts, conditions, noises = [], [], [], []
        for sample in samples:
            drawn = keyed_generator(namespaced(self.seed, f"{self.purpose}: timesteps and dropout"), epoch, sample)
            # always both numbers, so that a setting of one kind of dropout leaves all other draws as they are
            context, condition = drawn.random(2)
            contexts.append(context >= self.context_dropout)
            conditions.append((context if self.drop_together else condition) >= self.condition_dropout)
            count = images if self.timesteps == "image" else 1
            steps.append(torch.from_numpy(drawn.integers(0, self.num_train_timesteps, count)).expand(images))
            noises.append(keyed_normal(namespaced(self.seed, f"{self.purpose}: noise"), epoch, sample, shape=shape))
        return Draws(torch.stack(noises), torch.stack(steps), torch.tensor(contexts), torch.tensor(conditions))


class SetLoss(nn.Module):
    """The loss of Eq. 5 around a U-Net, as a module, so that autocast reaches all of its forward pass."""

    def __init__(self, unet: ManyToManyUNet, schedule: DDPMScheduler | DDIMScheduler) -> None:
        """
        Args:
            schedule: the forward diffusion of the text-to-image model that the weights come from.

        Raises:
            InputError: the model predicts something else than the noise.
        """
        super().__init__()
        if schedule.config["prediction_type"] != "epsilon":
            raise InputError(
                f"the text-to-image model's scheduler predicts {schedule.config['prediction_type']}, and the paper's "
                "objective (Eq. 5) predicts the noise: take a model with prediction_type epsilon"
            )
        self.unet = unet
        self.schedule = schedule

    def forward(
        self,
        latents: Tensor,
        draws: Draws,
        *,
        features: Tensor | None = None,
        condition: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """The loss of each set: squared error of the predicted noise, averaged over its images (Eq. 5).

        Args:
            latents: clean latents (B, N, C, h, w).
            features: DINO features of the preceding images (B, N-1, S, D), for M2M-DINO.
            condition: (B, N, P) camera poses or step positions, for fine-tuned models.
            counts: (B,) true images of each set where short sets are padded at their end: as no image sees a later
                one, leaving the padding out of the mean leaves it out altogether.

        Returns:
            (B,) float32.
        """
        sets, images = latents.shape[:2]
        noisy = self.schedule.add_noise(
            latents.flatten(0, 1),
            draws.noise.flatten(0, 1),
            draws.timesteps.flatten(),  # type: ignore[arg-type]
        ).unflatten(0, (sets, images))
        predicted = self.unet.training_forward(
            noisy,
            draws.timesteps,
            clean=latents if self.unet.variant == "self" else None,
            features=features,
            keep_context=draws.keep_context,
            condition=condition,
            keep_condition=None if condition is None else draws.keep_condition,
        )
        errors = (predicted.float() - draws.noise.float()).square().flatten(2).mean(2)
        if counts is None:
            return errors.mean(1)
        there = torch.arange(images, device=counts.device) < counts[:, None]
        return (errors * there).sum(1) / counts
