"""Small models of the tests: two levels with attention, 8x8 latents, weights that are far from zero."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from m2m.models.conditions import ConditionEmbedder
from m2m.models.unet import ManyToManyUNet

SMALL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "attention_head_dim": (2, 4),
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "use_linear_projection": True,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
FEATURES = 20
NUMBERS = {None: 0, "camera": 12, "position": 1}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text_to_image() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**SMALL).eval()


@pytest.fixture(scope="session")
def make_unet(text_to_image: UNet2DConditionModel) -> Callable[..., ManyToManyUNet]:
    """A U-Net of M2M whose condition embedder, if any, is trained: its last layer is not zero."""

    def make(variant: str, condition: str | None = None, **own: Any) -> ManyToManyUNet:
        feature_dim = FEATURES if variant == "dino" else None
        made = ManyToManyUNet.from_text_to_image(text_to_image, variant, feature_dim, condition, seed=1, **own)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(2)
        for module in made.modules():
            if isinstance(module, ConditionEmbedder):
                for parameter in module.heads.parameters():
                    torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        return made.eval()

    return make


@pytest.fixture
def make_sets() -> Callable[..., dict[str, torch.Tensor]]:
    """Arguments of `training_forward` for random sets."""

    def make(variant: str, condition: str | None = None, sets: int = 2, images: int = 4) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(3)
        given = {
            "noisy": torch.randn(sets, images, 4, 8, 8, generator=g),
            "timesteps": torch.randint(0, 1000, (sets, images), generator=g),
        }
        if variant == "self":
            given["clean"] = torch.randn(sets, images, 4, 8, 8, generator=g)
        else:
            given["features"] = torch.randn(sets, images - 1, 5, FEATURES, generator=g)
        if condition is not None:
            given["condition"] = torch.rand(sets, images, NUMBERS[condition], generator=g) * 3
        return given

    return make
