"""Models that are measured: small ones for exactness, ones of the paper's size for speed; weights are random.

Belongs here: building them; evaluating M2M-Self jointly, as the paper's design has it. Not here: measuring.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from benchmarks.measuring import Machine
from m2m import counted
from m2m.models.image_set_attention import ImageSetAttention, Nothing, set_attention
from m2m.models.origin import many_to_many_config
from m2m.models.sd21 import DINOV2_GIANT_WIDTH, SD21_BASE_UNET, STABLE_DIFFUSION_2_1_BASE
from m2m.models.unet import ManyToManyUNet, Variant

SMALL_UNET: dict[str, Any] = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (64, 128),
    "attention_head_dim": (1, 2),  # the number of heads; each has 64 dimensions, as in Stable Diffusion
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
SMALL_FEATURES = 96


def small_unet(variant: Variant, machine: Machine) -> ManyToManyUNet:
    """Two levels, 16x16 latents, heads of 64 dimensions."""
    torch.manual_seed(0)
    feature_dim = SMALL_FEATURES if variant == "dino" else None
    made: Any = ManyToManyUNet.from_text_to_image(UNet2DConditionModel(**SMALL_UNET), variant, feature_dim, seed=1)
    return made.eval().to(machine.device, machine.dtype)


def small_images(variant: Variant, machine: Machine, sets: int, images: int) -> Tensor:
    """What a small U-Net reads of preceding images: latents, or features of 65 tokens."""
    shape = (4, 16, 16) if variant == "self" else (65, SMALL_FEATURES)
    return machine.random(sets, images, *shape, seed=1)


def paper_unet(variant: Variant, machine: Machine) -> ManyToManyUNet:
    """M2M's U-Net on Stable Diffusion 2.1 base (and DINOv2-giant)."""
    config = many_to_many_config(SD21_BASE_UNET, variant, DINOV2_GIANT_WIDTH if variant == "dino" else None)
    with torch.device("meta"):
        made = ManyToManyUNet(**config, variant=variant)
    return _allocated(made, machine)


def text_to_image_unet(machine: Machine) -> UNet2DConditionModel:
    """Stable Diffusion 2.1 base's U-Net."""
    with torch.device("meta"):
        made = UNet2DConditionModel(**SD21_BASE_UNET)
    return _allocated(made, machine)


def as_large_as_sd21(tiny: StableDiffusionPipeline, machine: Machine) -> StableDiffusionPipeline:
    """The tiny text-to-image pipeline with networks of Stable Diffusion 2.1 base's size."""
    source, root = STABLE_DIFFUSION_2_1_BASE, Path()
    encoder: Any = CLIPTextModel(counted.text_encoder(source, root, machine.dtype).config)  # its buffers must be right
    return StableDiffusionPipeline(
        vae=_allocated(counted.autoencoder(source, root, machine.dtype), machine),
        text_encoder=encoder.to(machine.device, machine.dtype).eval(),
        tokenizer=tiny.tokenizer,
        unet=text_to_image_unet(machine),
        scheduler=tiny.scheduler,
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def joint_denoise(unet: ManyToManyUNet, noisy: Tensor, timestep: int | Tensor, clean: Tensor) -> Tensor:
    """One image of every set with its preceding images evaluated beside it: nothing is kept from step to step.

    Args:
        noisy: (sets, C, h, w).
        clean: (sets, W, C, h, w).
    """
    sets, count = clean.shape[:2]
    rows = torch.cat([clean.flatten(0, 1), noisy])
    times = torch.as_tensor(timestep, device=noisy.device).expand(sets)
    times = torch.cat([times.new_full((sets * count,), unet.config["clean_timestep"]), times])
    reading: Any = _Joint(sets, count)
    return UNet2DConditionModel.forward(unet, rows, times, reading, return_dict=False)[0][-sets:]


@dataclass(frozen=True)
class _Joint:
    """A pass over the clean images of all sets, then over one noisy image of each, which reads them (Eq. 4)."""

    sets: int
    images: int
    copies: int = 1

    def shift(self, layer: int) -> None:
        return None

    def attend(self, attention: ImageSetAttention, hidden: Tensor) -> list[Tensor | Nothing]:
        clean, noisy = hidden.split([self.sets * self.images, self.sets])
        k, v = attention.keys_and_values(clean.unflatten(0, (self.sets, self.images)))
        read = set_attention(attention.queries(noisy), k, v).flatten(2)
        return [Nothing(len(clean)), read]

    def going_on(self, hidden: Tensor) -> Tensor:
        return hidden[-self.sets :]


def _allocated(model: Any, machine: Machine) -> Any:
    """Random weights of about the size of trained ones: seconds instead of minutes of torch's own initialisation."""
    made = model.to(machine.dtype).to_empty(device=machine.device).eval().requires_grad_(False)
    generator = torch.Generator(machine.device).manual_seed(0)
    for module in made.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                parameter.uniform_(-0.02, 0.02, generator=generator)
            else:
                parameter.fill_(float(name == "weight" and isinstance(module, nn.GroupNorm | nn.LayerNorm)))
    return made
