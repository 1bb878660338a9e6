"""Between pictures and the latents that the U-Net sees.

Belongs here: scale and range of both. Not here: the autoencoder itself (diffusers' AutoencoderKL).
"""

import torch
from diffusers import AutoencoderKL
from torch import Tensor


def encode_images(vae: AutoencoderKL, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pictures to scaled latents: the mode of the posterior, or a sample of it where a generator is given.

    Args:
        images: (B, 3, H, W), floats in [0, 1].

    Returns:
        (B, C, h, w), of about unit variance (times `scaling_factor`).
    """
    posterior = vae.encode(images.to(_device(vae), vae.dtype) * 2 - 1).latent_dist  # type: ignore[union-attr]
    latents = posterior.mode() if generator is None else posterior.sample(generator)
    return (latents - _shift(vae)) * vae.config["scaling_factor"]


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) to pictures (B, 3, H, W), floats in [0, 1]."""
    unscaled = latents.to(_device(vae), vae.dtype) / vae.config["scaling_factor"] + _shift(vae)
    decoded: Tensor = vae.decode(unscaled).sample  # type: ignore[union-attr]
    return (decoded / 2 + 0.5).clamp(0, 1)


def pixels_per_latent(vae: AutoencoderKL) -> int:
    """Pixels along each side that one latent stands for: 8 for Stable Diffusion."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def _shift(vae: AutoencoderKL) -> float:
    return vae.config.get("shift_factor") or 0.0


def _device(vae: AutoencoderKL) -> torch.device:
    # an offloaded model lies on the CPU, or nowhere, until it is called; its hooks know where it will compute
    hooks = (getattr(module, "_hf_hook", None) for module in vae.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), vae.device))
