"""The small DINOv2: a `Dinov2Model` whose last hidden states carry a picture's attributes.

Belongs here: its configuration and its training. Not here: caching its features (m2m.generation.features).

It is trained with labels and not by self-distillation: linear heads read the attributes off its mean-pooled tokens, and
each patch's token is to give the classifier's activations at that place, which teaches shapes much sooner than labels
alone. The heads are thrown away. What matters downstream is only that the tokens say what is in the picture.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from m2m.tiny.classifier import load_training
from m2m.tiny.training import bank, load_checkpoint, train
from m2m.tiny.world import ATTRIBUTES, SIZE

NAME = "dino"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_dino() -> tuple[Dinov2Model, nn.ModuleDict]:
    """The model, and the heads that only training uses."""
    config = Dinov2Config(
        image_size=SIZE, patch_size=8, hidden_size=96, num_hidden_layers=4, num_attention_heads=3, mlp_ratio=3
    )
    heads: dict[str, nn.Module] = {name: nn.Linear(96, len(values)) for name, values in ATTRIBUTES.items()}
    return Dinov2Model(config), nn.ModuleDict({**heads, "places": nn.Linear(96, 128)})


def normalised(images: Tensor) -> Tensor:
    """Floats in [0, 1], (B, 3, H, W), with ImageNet's mean and deviation taken out, as DINOv2 wants them."""
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def train_dino(steps: int = 3000, resume: bool = True, seed: int = 0) -> Dinov2Model:
    """Cross-entropy of each attribute, read linearly off the mean token, and squared error of the local activations."""
    torch.manual_seed(seed)
    model, heads = build_dino()
    pictures = bank()
    teacher, _ = load_training()
    labels = torch.from_numpy(pictures.labels)

    def loss_of_step(step: int, rng: np.random.Generator, noise: torch.Generator) -> dict[str, Tensor]:
        index = rng.integers(len(pictures), size=64)
        images = normalised(pictures.batch(index) + 0.03 * torch.randn(64, 3, SIZE, SIZE, generator=noise))
        with torch.autocast("cpu", torch.bfloat16):
            tokens = model(pixel_values=images).last_hidden_state
            with torch.no_grad():
                told = teacher.body[:12](pictures.batch(index) * 2 - 1).flatten(2).transpose(1, 2).float()
            places = F.mse_loss(heads["places"](tokens[:, 1:]).float(), told)
        pooled = tokens.float().mean(1)
        losses = {key: F.cross_entropy(heads[key](pooled), labels[index, p]) for p, key in enumerate(ATTRIBUTES)}
        return {"loss": torch.stack(list(losses.values())).sum() + 5 * places, "places": places, **losses}

    modules = {"model": model, "heads": heads}
    train(NAME, modules, loss_of_step, steps=steps, rate=1e-3, resume=resume, average=0.99, seed=seed)
    return model


def load_dino() -> tuple[Dinov2Model, dict[str, float]]:
    """The newest checkpoint of `train_dino`, without its heads."""
    model, heads = build_dino()
    return model, load_checkpoint(NAME, {"model": model, "heads": heads})
