"""Measures of pictures and of features already computed: distances, scores, likeness.

Belongs here: arithmetic, torchmetrics' where that is exact enough. Not here: models that make features
(`m2m.evaluation.encoders`), protocols that decide what is compared with what.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.inception import InceptionScore

from m2m.errors import InputError


class _Given(nn.Module):
    """Stands where torchmetrics expects a feature extractor: its input already is the features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


@dataclass(frozen=True)
class Moments:
    """A Gaussian fitted to features: their number, mean and covariance, in float64.

    Moments of parts add up to the moments of the whole, so that features may come in batches and from processes.

    Attributes:
        mean: (D,).
        root: (r, D), r at most D where there are that many samples: root.T @ root is the scatter matrix, the covariance
            times count - 1. Kept as a root, because roots of a covariance's small eigenvalues keep half the digits.
    """

    count: int
    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Of features (n, D).

        Raises:
            InputError: no features, or some that are not finite.
        """
        if features.ndim != 2 or not len(features):
            raise InputError(f"expected features (n, D) of one picture or more, got {tuple(features.shape)}")
        require_finite(features, "features")
        features = features.double()
        mean = features.mean(0)
        return cls(len(features), mean, _triangle(features - mean))

    def __add__(self, other: "Moments") -> "Moments":
        if len(self.mean) != len(other.mean):
            raise InputError(
                f"features of {len(self.mean)} and of {len(other.mean)} numbers can't be compared: "
                "they were made by different backbones or layers"
            )
        count = self.count + other.count
        shift = other.mean - self.mean
        between = shift[None] * math.sqrt(self.count * other.count / count)
        root = _triangle(torch.cat([self.root, other.root, between]))
        return Moments(count, self.mean + shift * (other.count / count), root)


def frechet_distance(real: Tensor | Moments, generated: Tensor | Moments) -> float:
    """Fréchet distance of two Gaussians fitted to features: FID where the features are Inception's.

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). The last trace is the sum of the singular values of A B^T where
    S1 = A^T A and S2 = B^T B: no matrix square root, whose eigenvalues near 0 would lose half their digits.

    Args:
        real, generated: features (n, D) and (m, D), or their moments. Float64 from here on: float32 was off by 0.04 on
            a true 0.19.

    Raises:
        InputError: no more samples than features on either side: their covariance would be singular, and the distance
            would say more about the number of samples than about the pictures. Or features that are not finite, or of
            different backbones.
    """
    one, two = (part if isinstance(part, Moments) else Moments.of(part) for part in (real, generated))
    dimension, fewest = len(one.mean), min(one.count, two.count)
    if dimension != len(two.mean):
        raise InputError(
            f"FID of {dimension} and of {len(two.mean)} features: they were made by different backbones or layers"
        )
    if fewest <= dimension:
        raise InputError(
            f"FID needs more samples than features: {fewest} samples, {dimension} features. "
            f"Set sets to {dimension + 1} or more (and make that many test sets)"
        )
    first, second = (part.root / math.sqrt(part.count - 1) for part in (one, two))
    shared = torch.linalg.svdvals(first @ second.T).sum()
    apart = (one.mean - two.mean).square().sum()
    # of equal sides the sum is 0 up to rounding, to either side of it
    return max(0.0, (apart + first.square().sum() + second.square().sum() - 2 * shared).item())


def inception_score(logits: Tensor, splits: int = 1, seed: int = 0) -> float:
    """exp of the mean KL divergence between each picture's classes and all pictures' (Salimans et al., 2016).

    Args:
        logits: (n, classes).
        splits: the score is the mean over so many parts of a shuffled order (10 in the literature's 50,000 pictures).

    Returns:
        Between 1 and the smaller of `classes` and n / splits.

    Raises:
        InputError: logits that are not finite.
    """
    require_finite(logits, "logits")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory, and of the deviation over parts, which is not used
        metric = InceptionScore(feature=_Given(logits.shape[1]), splits=splits)
        metric.update(logits.double())
        torch.manual_seed(seed)  # torchmetrics shuffles with the global generator
        return metric.compute()[0].item()


def clip_scores(embeddings: Tensor, others: Tensor) -> Tensor:
    """100 times the cosine of CLIP embeddings, of which CLIP score is the mean (Hessel et al., 2021, in torchmetrics'
    scale; its cut at 0 is left out, for no mean of real scores comes near it).

    Args:
        embeddings, others: (..., D) each, of pictures or of texts; broadcast over the axes before the last.

    Raises:
        InputError: embeddings that are not finite.
    """
    require_finite(embeddings, "embeddings")
    require_finite(others, "embeddings")
    return 100 * cosine(embeddings, others)


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


def require_finite(features: Tensor, what: str) -> None:
    """Refuse what would turn every score into no number.

    Raises:
        InputError: names the first row that is not finite.
    """
    wrong = (~torch.isfinite(features)).flatten(1).any(1).nonzero()[:, 0]
    if len(wrong):
        raise InputError(
            f"{len(wrong)} of {len(features)} pictures have {what} that are not finite (the first: {int(wrong[0])}): "
            "the backbone's weights are damaged, or compute.dtype is too small for them"
        )


def _triangle(rows: Tensor) -> Tensor:
    """Fewer rows with the same rows.T @ rows."""
    return torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows


def _unit(pictures: Tensor) -> Tensor:
    return pictures.float() / 255
