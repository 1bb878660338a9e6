"""Classifier-free guidance of the paper: one scale for preceding images (Eq. 6), a second for a condition (Eq. 7).

Belongs here: in which steps there is guidance, which predictions it needs and how they are weighted. Not here: making
them (`ManyToManyUNet`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m2m.errors import InputError
from m2m.models.int8_context import KeptContext

Interval = tuple[float, float]
"""Shares of the steps between which there is guidance: (0, 1) is all of them, (0, 0.4) the noisiest two fifths."""


@dataclass(frozen=True)
class Prediction:
    """One prediction and its weight in the sum; the weights of one sum add up to 1."""

    weight: float
    context: KeptContext | None
    condition: Tensor | None


def guided_steps(steps: int, interval: Interval | None) -> range:
    """Numbers of the steps with guidance; the others take the conditional prediction as it is, at half the cost.

    Guidance in an interval of noise levels is Kynkäänniemi et al., 2024; the paper guides every step (None).

    Raises:
        InputError: not 0 <= start <= stop <= 1.
    """
    start, stop = interval or (0.0, 1.0)
    if not 0 <= start <= stop <= 1:
        raise InputError(f"guidance_interval=({start}, {stop}): expected shares of the steps, 0 <= start <= stop <= 1")
    return range(round(start * steps), round(stop * steps))


def guided_predictions(
    *,
    null: KeptContext | None,
    images: KeptContext | None,
    both: KeptContext | None,
    condition: Tensor | None,
    guidance_scale: float,
    condition_guidance_scale: float | None = None,
) -> list[Prediction]:
    """The predictions that Eq. 6 (no condition) or Eq. 7 is the weighted sum of.

    Eq. 7 with its terms collected: (1 - s_I) e(0, 0) + (s_I - s_C) e(z, 0) + s_C e(z, c). Predictions that are the
    same are made once, and those of weight zero not at all: three with two different scales, two with one, one where
    nothing is guided.

    Args:
        null: context of the unconditional prediction (None: nothing is read).
        images: context of preceding images without their conditions.
        both: context of preceding images with their conditions.
        condition: the target's, (sets, numbers).
        guidance_scale: s of Eq. 6, s_I of Eq. 7.
        condition_guidance_scale: s_C of Eq. 7; s_I where None.
    """
    if condition is None:
        wanted = [Prediction(1 - guidance_scale, null, None), Prediction(guidance_scale, images, None)]
    else:
        of_condition = guidance_scale if condition_guidance_scale is None else condition_guidance_scale
        wanted = [
            Prediction(1 - guidance_scale, null, None),
            Prediction(guidance_scale - of_condition, images, None),
            Prediction(of_condition, both, condition),
        ]
    merged: list[Prediction] = []
    for new in wanted:
        same = next((p for p in merged if p.context is new.context and p.condition is new.condition), None)
        if same is None:
            merged.append(new)
        else:
            merged[merged.index(same)] = Prediction(same.weight + new.weight, new.context, new.condition)
    return [prediction for prediction in merged if prediction.weight != 0]


def weighted_sum(weights: Sequence[float], predicted: Sequence[Tensor]) -> Tensor:
    """The guided noise, in float32: with scales of 7.5 half precision would lose what the images say."""
    total = torch.zeros_like(predicted[0], dtype=torch.float32)
    for weight, noise in zip(weights, predicted):
        total += weight * noise.float()
    return total
