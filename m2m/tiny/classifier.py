"""The classifier: a small conv net that reads five attributes and stands where Inception does in evaluation.

Belongs here: the model, its file format and its training. Not here: scores made from its features.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from m2m.tiny.training import bank, load_checkpoint, train
from m2m.tiny.world import ATTRIBUTES, SIZE

FORMAT = 1


class Classifier(nn.Module):
    """Pictures in, 32 features and a distribution over each attribute's values out."""

    def __init__(self, width: int = 32, features: int = 32, heads: dict[str, int] | None = None) -> None:
        super().__init__()
        heads = heads or {name: len(values) for name, values in ATTRIBUTES.items()}
        self.config = {"format_version": FORMAT, "width": width, "features": features, "heads": heads}
        self.body = nn.Sequential(
            *_block(3, width, stride=2),
            *_block(width, width * 2, stride=2),
            *_block(width * 2, width * 3, stride=2),
            *_block(width * 3, width * 4, stride=1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(width * 16, features),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(features, count) for name, count in heads.items()})

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features.

        Args:
            images: (B, 3, H, W), uint8 or floats in [0, 1]; resized to 64x64 where they have another size.

        Returns:
            (B, 32), after the last nonlinearity: what the heads read.
        """
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images.to(self.heads["shape"].weight.dtype)  # type: ignore
        if pixels.shape[-2:] != (SIZE, SIZE):
            pixels = F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
        return F.silu(self.body(pixels * 2 - 1))

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """For each attribute (B, number of its values), in the order of `ATTRIBUTES`."""
        return self.read(self.features(images))

    def read(self, features: Tensor) -> dict[str, Tensor]:
        """The attributes' logits from features already computed."""
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def predict(self, images: Tensor, batch: int = 256) -> np.ndarray:
        """Index of the likeliest value of each attribute, (n, attributes)."""
        found = [torch.stack([v.argmax(1) for v in self.logits(part).values()], 1) for part in images.split(batch)]
        return torch.cat(found).cpu().numpy()

    def save_pretrained(self, folder: Path | str, dtype: torch.dtype = torch.float16) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        weights = {name: weight.detach().to(dtype).contiguous() for name, weight in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "Classifier":
        """Load strictly: an unknown config key, or a missing, extra or mismatched tensor, is an error."""
        config = json.loads((Path(folder) / "config.json").read_text())
        if config.pop("format_version", None) != FORMAT:
            raise ValueError(f"{folder}: not a classifier of format version {FORMAT}")
        model = cls(**config)
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return model.eval()


def train_classifier(steps: int = 1500, resume: bool = True, seed: int = 0, name: str = "classifier") -> Classifier:
    """Cross-entropy on every attribute, on pictures that were shifted, blurred and noised a little.

    The disturbances are there because the classifier is to judge pictures that come out of an autoencoder.
    """
    torch.manual_seed(seed)
    model, pictures = Classifier(), bank()
    labels = torch.from_numpy(pictures.labels)

    def loss_of_step(step: int, rng: np.random.Generator, noise: torch.Generator) -> dict[str, Tensor]:
        index = rng.integers(len(pictures), size=128)
        images = pictures.batch(index)
        if rng.random() < 0.3:
            images = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2.0, mode="bilinear")
        images = torch.roll(images, tuple(int(shift) for shift in rng.integers(-1, 2, 2)), (2, 3))
        images = images + rng.uniform(0, 0.06) * torch.randn(images.shape, generator=noise)
        with torch.autocast("cpu", torch.bfloat16):
            read = {key: value.float() for key, value in model.logits(images).items()}
        losses = {key: F.cross_entropy(read[key], labels[index, place]) for place, key in enumerate(ATTRIBUTES)}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    train(name, {"model": model}, loss_of_step, steps=steps, rate=2e-3, resume=resume, average=0.99, seed=seed)
    return model


def load_training(name: str = "classifier") -> tuple[Classifier, dict[str, float]]:
    """The newest checkpoint of `train_classifier`."""
    model = Classifier()
    return model, load_checkpoint(name, {"model": model})


def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    # Group and not batch norm: the same picture gives the same features in any batch, in training and out of it.
    return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()]
