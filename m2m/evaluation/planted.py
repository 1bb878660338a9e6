"""Planted models: samplers whose worth is known beforehand, to see whether the measures tell it.

- the *oracle* shows further pictures of the true set;
- the *copier* repeats one of the preceding pictures;
- the *guesser* ignores the preceding pictures and shows what comes to its mind;
- the *drifter* shows the oracle's pictures, worse with every further one.

Belongs here: those four, and the true sets of the tiny world. Not here: what is measured, and which of them should win
by which measure (`m2m.evaluation.instruments`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from m2m.evaluation.protocol import at_size
from m2m.generation.noise import keyed_generator, namespaced
from m2m.tiny.sketch import RENDERERS, Renderer
from m2m.tiny.world import ATTRIBUTES, describe, sample_scene

Planted = Literal["oracle", "copier", "guesser", "drifter"]
PLANTED: tuple[Planted, ...] = get_args(Planted)
_DRIFT = 0.12  # of the way to a blurred grey, for each further picture


class WorldSets:
    """Sets that the tiny world draws: some attributes shared by all pictures of a set, the others free.

    Args:
        fixed: the shared attributes of each set.
        seed: namespace of the drawing; a set's picture n is the same whoever asks for it.
        renderer: who draws.
    """

    def __init__(self, fixed: Sequence[Mapping[str, str]], seed: int, renderer: Renderer = "world") -> None:
        self.fixed = list(fixed)
        self._draw = RENDERERS[renderer]
        self._seed = namespaced(seed, "true pictures")

    @classmethod
    def drawn(cls, sets: int, seed: int, share: float) -> "WorldSets":
        """Sets that share each attribute at this rate."""
        namespace = namespaced(seed, "true sets")
        fixed = []
        for i in range(sets):
            rng = keyed_generator(namespace, i)
            scene = sample_scene(rng)
            fixed.append({name: getattr(scene, name) for name in ATTRIBUTES if rng.random() < share})
        return cls(fixed, seed)

    def __len__(self) -> int:
        return len(self.fixed)

    def captions(self) -> list[str]:
        return [describe(named) for named in self.fixed]

    def pictures(self, key: int, numbers: Sequence[int], *, ignore: bool = False) -> Tensor:
        """Pictures of a set, uint8 (len(numbers), 3, 64, 64); with `ignore` as if it shared nothing."""
        drawn = [keyed_generator(self._seed, key, 2 * n + ignore) for n in numbers]
        fixed = {} if ignore else self.fixed[key]
        return _stacked([self._draw(sample_scene(rng, fixed), rng) for rng in drawn])


class PlantedSampler:
    """One of the four, called as a trained model's `Sampler` is."""

    def __init__(self, kind: Planted, sets: WorldSets, size: int, first: int = 0) -> None:
        """
        Args:
            size: side of the pictures in pixels.
            first: which picture of a true set is the first after the preceding ones.
        """
        self.kind, self.size = kind, size
        self._sets, self._first = sets, first

    def continue_sets(
        self, preceding: Tensor, keys: Sequence[int], num_images: int = 1, *, first_image: int = 0, **_: Any
    ) -> Tensor:
        """As `Sampler.continue_sets`: uint8 (B, W, 3, H, W) -> (B, num_images, 3, H, W). Guidance changes nothing.

        Where nothing precedes, all guess.
        """
        if self.kind == "copier" and preceding.shape[1]:
            picks = torch.tensor([key % preceding.shape[1] for key in keys])
            return preceding[torch.arange(len(keys)), picks][:, None].expand(-1, num_images, -1, -1, -1).contiguous()
        numbers = range(self._first + first_image, self._first + first_image + num_images)
        ignore = self.kind == "guesser" or not preceding.shape[1]
        made = at_size(torch.stack([self._sets.pictures(key, numbers, ignore=ignore) for key in keys]), self.size)
        return worsened(made, [n - self._first for n in numbers]) if self.kind == "drifter" else made

    def reconstruct(self, pictures: Tensor) -> Tensor:
        """Planted models have no autoencoder: the pictures themselves."""
        return pictures


def worsened(pictures: Tensor, numbers: Sequence[int]) -> Tensor:
    """What a drifter makes of pictures uint8 (B, n, 3, H, W): blurred and greyed, more with every number (from 0)."""
    pixels = pictures.float()
    blurred = F.avg_pool2d(pixels.flatten(0, 1), 7, 1, 3, count_include_pad=False).unflatten(0, pictures.shape[:2])
    grey = blurred.mean(2, keepdim=True) / 2 + 64
    amount = torch.tensor([min(1.0, _DRIFT * (n + 1)) for n in numbers]).view(1, -1, 1, 1, 1)
    return (pixels + amount * (grey - pixels)).clamp(0, 255).round().to(torch.uint8)


def _stacked(pictures: Sequence[np.ndarray]) -> Tensor:
    return torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures])
