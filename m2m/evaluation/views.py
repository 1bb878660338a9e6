"""Views of one object compared: angles between cameras, likeness to the true views, likeness among each other.

Belongs here: what novel views are measured by. Not here: which views are asked for (`m2m.evaluation.novel_views`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from m2m.evaluation.encoders import Dino
from m2m.evaluation.lpips import Lpips
from m2m.evaluation.measures import cosine, psnr, ssim
from m2m.evaluation.per_set import Better
from m2m.evaluation.protocol import each_picture

TITLES = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "dino": "DINO likeness"}
AMONG = "DINO likeness among the views"


@dataclass(frozen=True)
class ViewMeasures:
    """How generated views are compared with the true ones."""

    dino: Dino
    lpips: Lpips | None = None

    @property
    def titles(self) -> dict[str, str]:
        """The measures there are: key -> what tables call it."""
        return {key: title for key, title in TITLES.items() if key != "lpips" or self.lpips}

    def compare(self, made: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Each measure of uint8 views (B, n, 3, H, W) against the true ones, float64 (B, n); `among` (B,)."""
        told = {"psnr": each_pair(psnr, made, truth), "ssim": each_pair(ssim, made, truth)}
        if self.lpips:
            told["lpips"] = each_pair(self.lpips, made, truth)
        seen = each_picture(self.dino.pictures, made)
        return told | {"dino": cosine(seen, each_picture(self.dino.pictures, truth)), "among": among(seen)}


def better(measure: str) -> Better:
    """Which way a measure is better."""
    return "lower" if measure == "lpips" else "higher"


def each_pair(measure: Callable[[Tensor, Tensor], Tensor], pictures: Tensor, truth: Tensor) -> Tensor:
    """Apply a measure of (n, 3, H, W) pairs to (B, n, 3, H, W) ones; float64 (B, n)."""
    return measure(pictures.flatten(0, 1), truth.flatten(0, 1)).double().unflatten(0, pictures.shape[:2])


def among(seen: Tensor) -> Tensor:
    """How alike the views of an object are among each other: descriptors (B, n, D) -> (B,); 1 for a single view."""
    pairs = torch.triu_indices(seen.shape[1], seen.shape[1], 1)
    if not pairs.shape[1]:
        return torch.ones(len(seen), dtype=torch.float64)
    return cosine(seen[:, pairs[0]], seen[:, pairs[1]]).mean(1)


def view_angles(poses: Tensor) -> Tensor:
    """Angles between the directions from which cameras see the origin.

    Args:
        poses: (V, 3, 4) world-to-camera [R, T]; the camera's centre is -R^T T.

    Returns:
        (V, V) in radians.
    """
    rotation, translation = poses[:, :, :3].double(), poses[:, :, 3].double()
    centres = -(rotation.mT @ translation[:, :, None])[:, :, 0]
    directions = torch.nn.functional.normalize(centres, dim=-1)
    return (directions @ directions.T).clamp(-1, 1).acos()
