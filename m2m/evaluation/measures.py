"""Measures of pictures and of features already computed: distances, scores, likeness.

Belongs here: arithmetic, most of it torchmetrics'. Not here: models that make features (`m2m.evaluation.encoders`),
protocols that decide what is compared with what.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.multimodal import CLIPScore

from m2m.errors import InputError


class _Given(nn.Module):
    """Stands where torchmetrics expects a feature extractor: its input already is the features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class _Embedded:
    """Stands where torchmetrics expects a CLIP model and its processor: its "images" already are embeddings (D, 1, 1).

    So that each picture is encoded once although it is compared with many; and since transformers v5 answers
    `get_image_features` with an object where torchmetrics 1.9 expects a tensor.
    """

    def __call__(self, images: Sequence[Tensor], **_: Any) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack(list(images))}

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return pixel_values.flatten(1)

    def to(self, _device: Any) -> "_Embedded":
        return self


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to features: FID where the features are Inception's.

    Args:
        real, generated: (n, D) and (m, D). Float64 from here on: float32 was off by 0.04 on a true 0.19.

    Raises:
        InputError: no more samples than features on either side: their covariance would be singular, and the distance
            would say more about the number of samples than about the pictures.
    """
    dimension = real.shape[1]
    fewest = min(len(real), len(generated))
    if fewest <= dimension:
        raise InputError(
            f"FID needs more samples than features: {fewest} samples, {dimension} features. "
            f"Set sets to {dimension + 1} or more (and make that many test sets)"
        )
    metric = FrechetInceptionDistance(feature=_Given(dimension))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return metric.compute().item()


def inception_score(logits: Tensor, splits: int = 1, seed: int = 0) -> float:
    """exp of the mean KL divergence between each picture's classes and all pictures' (Salimans et al., 2016).

    Args:
        logits: (n, classes).
        splits: the score is the mean over so many parts of a shuffled order (10 in the literature's 50,000 pictures).

    Returns:
        Between 1 and the smaller of `classes` and n / splits.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory, and of the deviation over parts, which is not used
        metric = InceptionScore(feature=_Given(logits.shape[1]), splits=splits)
        metric.update(logits.double())
        torch.manual_seed(seed)  # torchmetrics shuffles with the global generator
        return metric.compute()[0].item()


def clip_score(embeddings: Tensor, others: Tensor) -> float:
    """100 times the mean cosine of paired CLIP embeddings, not below 0 (Hessel et al., 2021, in torchmetrics' scale).

    Args:
        embeddings, others: (n, D) each, of pictures or of texts; pairs are rows.
    """
    metric = CLIPScore(model_name_or_path=lambda: (_Embedded(), _Embedded()))  # type: ignore[arg-type]
    metric.update(_as_images(embeddings), _as_images(others))
    return metric.compute().item()


def cosine(features: Tensor, others: Tensor) -> Tensor:
    """Cosine along the last axis, broadcast over the ones before it."""
    return F.cosine_similarity(features.double(), others.double(), dim=-1)


def psnr(pictures: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each uint8 picture (n, 3, H, W) in dB; (n,). Equal pictures give 100."""
    found = peak_signal_noise_ratio(
        _unit(pictures), _unit(truth), data_range=1.0, reduction="none", dim=(1, 2, 3), base=10.0
    )
    return found.clamp(max=100.0)  # one exact copy must not make every mean infinite


def ssim(pictures: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each uint8 picture (n, 3, H, W); (n,)."""
    found = structural_similarity_index_measure(_unit(pictures), _unit(truth), data_range=1.0, reduction="none")
    return torch.as_tensor(found).reshape(-1)


def rmse(pictures: Tensor, others: Tensor) -> Tensor:
    """Root mean square difference in units of the full range, over the last three axes; broadcasts over the others."""
    return (_unit(pictures) - _unit(others)).square().mean((-3, -2, -1)).sqrt()


def gram(tokens: Tensor) -> Tensor:
    """Which features occur together, wherever they occur: a description of style (Gatys et al., 2016).

    Args:
        tokens: (..., S, D) patch features.

    Returns:
        (..., D, D), divided by the number of patches.
    """
    return tokens.mT @ tokens / tokens.shape[-2]


def style_distance(first: Tensor, second: Tensor) -> Tensor:
    """Gatys et al. (2016), Eq. 4, of Gram matrices (..., D, D) divided by the number of patches: broadcasts."""
    return (first - second).square().sum((-2, -1)) / (4 * first.shape[-1] ** 2)


def appearance(pictures: Tensor) -> dict[str, Tensor]:
    """What drifts when a sequence decays: sharpness, contrast and saturation of uint8 pictures (..., 3, H, W).

    Returns:
        `sharpness` (mean absolute Laplacian of the luminance), `contrast` (the luminance's standard deviation) and
        `saturation` (mean of HSV's), each of the leading shape, in units of the full range.
    """
    unit = _unit(pictures)
    luminance = (unit * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(-3)
    centre = luminance[..., 1:-1, 1:-1]
    around = luminance[..., :-2, 1:-1] + luminance[..., 2:, 1:-1] + luminance[..., 1:-1, :-2] + luminance[..., 1:-1, 2:]
    brightest, darkest = unit.amax(-3), unit.amin(-3)
    return {
        "sharpness": (around - 4 * centre).abs().mean((-2, -1)),
        "contrast": luminance.flatten(-2).std(-1),
        "saturation": ((brightest - darkest) / brightest.clamp(min=1e-6)).mean((-2, -1)),
    }


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    told = torch.tensor(list(values), dtype=torch.float64)
    return told.mean().item(), told.std().item() if len(told) > 1 else 0.0


def _as_images(embeddings: Tensor) -> Tensor:
    return embeddings.double()[:, :, None, None]


def _unit(pictures: Tensor) -> Tensor:
    return pictures.float() / 255
