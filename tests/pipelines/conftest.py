"""Small pipelines of the tests: 16x16 pictures, 8x8 latents, weights that are far from zero."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from m2m.models.conditions import ConditionEmbedder
from m2m.models.unet import ManyToManyUNet
from m2m.pipelines.many_to_many import ManyToManyPipeline

SMALL_UNET: dict[str, Any] = {
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
SMALL_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_pipeline() -> Callable[..., ManyToManyPipeline]:
    def make(variant: str = "self", condition: str | None = None, **own: Any) -> ManyToManyPipeline:
        torch.manual_seed(0)
        text_to_image = UNet2DConditionModel(**SMALL_UNET)
        vae = AutoencoderKL(**SMALL_VAE)
        dino = Dinov2Model(
            Dinov2Config(image_size=16, patch_size=8, hidden_size=20, num_hidden_layers=1, num_attention_heads=2)
        )
        unet = ManyToManyUNet.from_text_to_image(text_to_image, variant, 20, condition, **own)  # type: ignore[arg-type]
        for module in unet.modules():
            if isinstance(module, ConditionEmbedder):
                for parameter in module.heads.parameters():
                    torch.nn.init.normal_(parameter, std=0.3)
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        encoder = dino.eval() if variant == "dino" else None
        pipeline = ManyToManyPipeline(vae.eval(), unet.eval(), scheduler, encoder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def pictures() -> Callable[..., torch.Tensor]:
    """(sets, images, 3, 16, 16) floats in [0, 1]."""

    def make(sets: int = 1, images: int = 4) -> torch.Tensor:
        levels = torch.randint(0, 256, (sets, images, 3, 16, 16), generator=torch.Generator().manual_seed(4))
        return levels / 255

    return make


@pytest.fixture
def to_pil() -> Callable[[torch.Tensor], list[Image.Image]]:
    def make(images: torch.Tensor) -> list[Image.Image]:
        levels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(picture) for picture in levels]

    return make


@pytest.fixture
def encoder_calls(monkeypatch) -> list[int]:
    """How many preceding images each call of `encode_context` was given."""
    calls: list[int] = []
    encode = ManyToManyUNet.encode_context

    def counting(self, images, *args, **kwargs):
        calls.append(images.shape[1])
        return encode(self, images, *args, **kwargs)

    monkeypatch.setattr(ManyToManyUNet, "encode_context", counting)
    return calls
