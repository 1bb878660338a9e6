"""LPIPS (Zhang et al., 2018), version 0.1 with AlexNet: how unlike two pictures look to a network.

AlexNet is laid out here, so that torchvision is not needed: its weights are torchvision's file, known by its hash; the
five learnt weightings of its layers come with torchmetrics.

Belongs here: that one measure. Not here: what is compared (`m2m.evaluation.views`).
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
import torchmetrics
from torch import Tensor, nn

from m2m.config import Compute
from m2m.errors import InputError
from m2m.evaluation.released_weights import require_weights
from m2m.models.text_to_image import start_compute

WEIGHTS, SHA256 = "alexnet-owt-7be5be79.pth", "7be5be79"
"""torchvision's AlexNet (download.pytorch.org/models), by the start of its sha256."""
_CUTS = (0, 2, 5, 8, 10, 12)  # a layer's features are those after its ReLU
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_AT_LEAST = 31  # pixels that the first two poolings leave something of
Weights = Mapping[str, Tensor]


class Lpips:
    """LPIPS of pairs of pictures."""

    def __init__(self, trunk: Weights, heads: Weights, compute: Compute) -> None:
        """
        Args:
            trunk: AlexNet's state dict as torchvision names it; its classifier is not read.
            heads: `lin0.model.1.weight` to `lin4.model.1.weight`, (1, channels, 1, 1) each.

        Raises:
            InputError: weights of something else.
        """
        device, layers = start_compute(compute), _alexnet()
        kept = {name.removeprefix("features."): value for name, value in trunk.items() if name.startswith("features.")}
        try:
            layers.load_state_dict(kept)
            self._heads = [heads[f"lin{n}.model.1.weight"].to(device) for n in range(len(_CUTS) - 1)]
        except (KeyError, RuntimeError) as error:
            raise InputError(f"lpips: not AlexNet's weights: {str(error).splitlines()[0]}") from None
        layers = layers.to(device).eval().requires_grad_(False)
        self._slices = [layers[start:end] for start, end in pairwise(_CUTS)]
        self._shift, self._scale = (torch.tensor(of, device=device).view(3, 1, 1) for of in (_SHIFT, _SCALE))
        self._device = device

    @classmethod
    def open(cls, weights: Path, compute: Compute) -> "Lpips":
        """With the weights of a file.

        Raises:
            InputError: it is missing, or not torchvision's.
        """
        require_weights("lpips", weights, WEIGHTS, SHA256)
        return cls(torch.load(weights, "cpu", weights_only=True), learnt_heads(), compute)

    @torch.inference_mode()
    def __call__(self, pictures: Tensor, others: Tensor) -> Tensor:
        """uint8 (n, 3, H, W) twice -> (n,) on the CPU; 0 for equal pictures.

        Raises:
            InputError: pictures too small for AlexNet.
        """
        if min(pictures.shape[-2:]) < _AT_LEAST:
            raise InputError(f"LPIPS needs pictures of {_AT_LEAST} pixels or more, got {tuple(pictures.shape[-2:])}")
        one, two = (
            ((part.to(self._device).float() / 127.5 - 1) - self._shift) / self._scale for part in (pictures, others)
        )
        told = torch.zeros(len(pictures), device=self._device)
        for layer, head in zip(self._slices, self._heads):
            one, two = layer(one), layer(two)
            told += ((_unit(one) - _unit(two)).square() * head).sum(1).mean((1, 2))
        return told.cpu()


def learnt_heads() -> Weights:
    """The layers' weightings that torchmetrics brings along."""
    path = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth"
    return torch.load(path, "cpu", weights_only=True)


def _unit(features: Tensor) -> Tensor:
    return features / features.square().sum(1, keepdim=True).add(1e-8).sqrt()


def _alexnet() -> nn.Sequential:
    """torchvision's `alexnet().features` up to its last ReLU."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )
