"""The training objective: Eq. 5 over all images of a set, and everything random that it needs.

Belongs here: noise, timesteps, what is dropped, the loss. Not here: where sets come from, optimisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from m2m.errors import InputError
from m2m.generation.noise import keyed_generator, keyed_normal, namespaced
from m2m.models.unet import ManyToManyUNet
from m2m.training.timesteps import TimestepSampling

LossWeighting = Literal["noise", "velocity"]
_PREDICTED: dict[str, LossWeighting] = {"epsilon": "noise", "v_prediction": "velocity"}


@dataclass(frozen=True)
class Draws:
    """What chance decides for a batch of B sets of N images."""

    noise: Tensor  # (B, N, C, h, w) float32
    timesteps: Tensor  # (B, N) int64
    keep_context: Tensor  # (B,) or (B, N) bool; False: the set's images, or the image, see no preceding images
    keep_condition: Tensor  # (B,) bool; False: the set's images see no camera or position
    reads: Tensor | None = None  # (B, N, N - 1) bool: which preceding images each image sees; None: all
    clean_noise: Tensor | None = None  # (B, N - 1, C, h, w) float32, of preceding images; None: they are clean
    clean_timesteps: Tensor | None = None  # (B, N - 1) int64, how much of it

    def to(self, device: torch.device) -> "Draws":
        """On the device; by way of pinned memory to a GPU, so that the program need not wait for it.

        Which images are read decides which kernels run, and stays with the program.
        """
        stays = {"reads", "keep_context"} if self.reads is not None else set()
        moved = {name: one for name, one in vars(self).items() if one is not None and name not in stays}
        if device.type == "cuda":
            moved = {name: one.pin_memory() for name, one in moved.items()}
        return replace(self, **{name: one.to(device, non_blocking=True) for name, one in moved.items()})


@dataclass(frozen=True)
class Objective:
    """Who is noised how much and who sees what; a function of (seed, epoch, sample) alone.

    So no result depends on how samples are spread over batches, ranks or workers.

    Args:
        timesteps: one for each image, or one for all images of a set.
        sampling: which timesteps, how often.
        dropping: whether contexts are dropped by set or by image.
        random_context: image i sees so many of the i - 1 images before it, the nearest ones, as a context window
            of a size drawn from 1 to i - 1 would show it.
        context_noise: M2M-Self's preceding images are noised up to this timestep, each to its own, which its clean
            stream is told (conditioning augmentation; Ho et al. 2022, arXiv:2106.15282, section 3). 0: clean.
        weighting: of the errors: noise as in Eq. 5, or velocity, 1/alpha_bar times that (`SetLoss`); None: what the
            model predicts.
    """

    seed: int
    timesteps: Literal["image", "set"] = "image"
    context_dropout: float = 0.1
    condition_dropout: float = 0.0
    drop_together: bool = False
    num_train_timesteps: int = 1000
    purpose: str = "training"
    sampling: TimestepSampling = field(default_factory=TimestepSampling)
    dropping: Literal["set", "image"] = "set"
    random_context: bool = False
    context_noise: int = 0
    weighting: LossWeighting | None = None

    def steady(self, purpose: str) -> "Objective":
        """The paper's objective under draws of another purpose, with nothing dropped: to compare trainings by."""
        plain = Objective(self.seed, self.timesteps, context_dropout=0.0, condition_dropout=0.0, weighting="noise")
        return replace(plain, num_train_timesteps=self.num_train_timesteps, purpose=purpose)

    def draw(self, samples: Sequence[int], epoch: int, shape: Sequence[int]) -> Draws:
        """The draws of a batch.

        Args:
            samples: the sets' numbers.
            shape: of one set's latents, (N, C, h, w).
        """
        images = shape[0]
        steps, contexts, conditions, noises = [], [], [], []
        for sample in samples:
            drawn = self._stream("timesteps and dropout", epoch, sample)
            # always both numbers, so that a setting of one kind of dropout leaves all other draws as they are
            context, condition = drawn.random(2)
            if self.dropping == "image":
                contexts.append(self._stream("dropped images", epoch, sample).random(images) >= self.context_dropout)
            else:
                contexts.append(context >= self.context_dropout)
            conditions.append((context if self.drop_together else condition) >= self.condition_dropout)
            count = images if self.timesteps == "image" else 1
            own = self.sampling.draw(drawn, count, self.num_train_timesteps)
            steps.append(torch.from_numpy(own).expand(images))
            noises.append(keyed_normal(self._namespace("noise"), epoch, sample, shape=shape))
        draws = Draws(
            torch.stack(noises), torch.stack(steps), torch.from_numpy(np.array(contexts)), torch.tensor(conditions)
        )
        if self.random_context:
            draws = replace(draws, reads=torch.stack([self._reads(epoch, sample, images) for sample in samples]))
        if self.context_noise:
            draws = replace(draws, **self._context_noise(epoch, samples, shape))
        return draws

    def _reads(self, epoch: int, sample: int, images: int) -> Tensor:
        """(N, N - 1) bool: of the i images before image i (from 0), the nearest so many."""
        drawn = self._stream("random contexts", epoch, sample)
        before = np.arange(images)
        counts = drawn.integers(np.minimum(1, before), before + 1)  # of the first image, none
        other = np.arange(images - 1)
        return torch.from_numpy((other < before[:, None]) & (other >= (before - counts)[:, None]))

    def _context_noise(self, epoch: int, samples: Sequence[int], shape: Sequence[int]) -> dict[str, Tensor]:
        own = (shape[0] - 1, *shape[1:])
        noise = [keyed_normal(self._namespace("context noise"), epoch, sample, shape=own) for sample in samples]
        steps = [
            self._stream("context timesteps", epoch, sample).integers(0, self.context_noise + 1, own[0])
            for sample in samples
        ]
        return {"clean_noise": torch.stack(noise), "clean_timesteps": torch.from_numpy(np.stack(steps))}

    def _namespace(self, what: str) -> int:
        return namespaced(self.seed, f"{self.purpose}: {what}")

    def _stream(self, what: str, epoch: int, sample: int) -> np.random.Generator:
        return keyed_generator(self._namespace(what), epoch, sample)


class SetLoss(nn.Module):
    """The loss of Eq. 5 around a U-Net, as a module, so that autocast reaches all of its forward pass."""

    def __init__(self, unet: ManyToManyUNet, schedule: DDPMScheduler | DDIMScheduler) -> None:
        """
        Args:
            schedule: the forward diffusion of the model that the weights come from, and what it predicts.

        Raises:
            InputError: the model predicts something else than noise or velocity.
        """
        super().__init__()
        prediction_type = schedule.config["prediction_type"]
        if prediction_type not in _PREDICTED:
            raise InputError(
                f"the scheduler's model predicts {prediction_type}: the objective (Eq. 5) is that of a model with "
                f"prediction_type {' or '.join(_PREDICTED)}"
            )
        self.predicts = _PREDICTED[prediction_type]
        self.unet = unet
        self.schedule = schedule

    def forward(
        self,
        latents: Tensor,
        draws: Draws,
        *,
        context: Tensor | None = None,
        features: Tensor | None = None,
        condition: Tensor | None = None,
        counts: Tensor | None = None,
        weighting: LossWeighting | None = None,
    ) -> Tensor:
        """The loss of each set: squared error of the predicted noise, averaged over its images (Eq. 5).

        Weighted by noise, a model of the velocity has the same loss: its error times alpha_bar is the noise's.

        Weighted by velocity, an image's error is divided by alpha_bar of its timestep, which makes it that of
        the velocity sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) image (Salimans & Ho 2022, arXiv:2202.00512). At high
        noise, where preceding images decide, Eq. 5 hardly counts what is wrong with the image: 0.005 of its error at
        Stable Diffusion's last timestep.

        Args:
            latents: clean latents (B, N, C, h, w).
            context: what M2M-Self reads instead of them, (B, N-1, C, h, w); the targets stay `latents`.
            features: DINO features of the preceding images (B, N-1, S, D), for M2M-DINO.
            condition: (B, N, P) camera poses or step positions, for fine-tuned models.
            counts: (B,) true images of each set where short sets are padded at their end: as no image sees a later
                one, leaving the padding out of the mean leaves it out altogether.
            weighting: of the images' errors; None: those of what the model predicts.

        Returns:
            (B,) float32.
        """
        sets, images = latents.shape[:2]
        noisy = self.schedule.add_noise(
            latents.flatten(0, 1),
            draws.noise.flatten(0, 1),
            draws.timesteps.flatten(),  # type: ignore[arg-type]
        ).unflatten(0, (sets, images))
        clean = None
        if self.unet.variant == "self":
            clean = self._noised_context(latents[:, :-1] if context is None else context, draws)
        keep = draws.keep_context
        if draws.reads is not None:
            keep = draws.reads & keep.view(sets, -1, 1)
        predicted = self.unet.training_forward(
            noisy,
            draws.timesteps,
            clean=clean,
            clean_timesteps=draws.clean_timesteps,
            features=features,
            keep_context=keep,
            condition=condition,
            keep_condition=None if condition is None else draws.keep_condition,
        )
        errors = (predicted.float() - self._target(latents, draws)).square().flatten(2).mean(2)
        if weighting not in (None, self.predicts):
            share = self.schedule.alphas_cumprod.to(errors)[draws.timesteps]
            errors = errors * share if weighting == "noise" else errors / share
        if counts is None:
            return errors.mean(1)
        there = torch.arange(images, device=counts.device) < counts[:, None]
        return (errors * there).sum(1) / counts

    def _target(self, latents: Tensor, draws: Draws) -> Tensor:
        if self.predicts == "noise":
            return draws.noise.float()
        flat = (latents.flatten(0, 1), draws.noise.flatten(0, 1), draws.timesteps.flatten())
        return self.schedule.get_velocity(*flat).float().view_as(latents)  # type: ignore[arg-type]

    def _noised_context(self, clean: Tensor, draws: Draws) -> Tensor:
        if draws.clean_noise is None or draws.clean_timesteps is None:
            return clean
        times = draws.clean_timesteps.flatten()
        noised = self.schedule.add_noise(clean.flatten(0, 1), draws.clean_noise.flatten(0, 1), times)  # type: ignore[arg-type]
        # at timestep 0 the schedule noises a little already; sampling reads truly clean images there
        there = draws.clean_timesteps[..., None, None, None] > 0
        return torch.where(there, noised.unflatten(0, clean.shape[:2]), clean)
