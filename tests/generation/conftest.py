"""A random Stable Diffusion and a random DINOv2 of the smallest size that is one, saved as folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from m2m.config import load_profile
from m2m.generation.image_sets import GenerateSets

UNMAKEABLE = "~"  # the fixture's text encoder turns this token into NaN


@pytest.fixture
def unmakeable() -> str:
    return UNMAKEABLE


@pytest.fixture(scope="session")
def text_to_image(tmp_path_factory) -> Path:
    """A pipeline folder: 8 x 8 latents with 4 channels, 16 x 16 pixels, a vocabulary of single bytes."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "stable-diffusion"
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ends: dict[str, Any] = {
        "bos_token_id": len(tokens) - 2,
        "eos_token_id": len(tokens) - 1,
        "pad_token_id": len(tokens) - 1,
    }
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokens), projection_dim=8, **sizes, **ends))
    word = tokenizer(UNMAKEABLE, add_special_tokens=False)["input_ids"]
    embeddings: Any = text_encoder.get_input_embeddings()
    embeddings.weight.data[word] = float("nan")
    levels: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    optional: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler: Any = PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(layers_per_block=1, norm_num_groups=4, latent_channels=4, **levels),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=8,
        ),
        scheduler=scheduler,
        **optional,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dinov2(tmp_path_factory) -> Path:
    """A DINOv2 folder: 14 x 14 pixels in patches of 7, width 8."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models") / "dinov2"
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=7)
    Dinov2Model(config).save_pretrained(folder)
    return folder


CAPTIONS = ["a red square", "two blue circles", "a green cross", "stars, many"]


@pytest.fixture
def make_profile(tmp_path, text_to_image, dinov2):
    """`make_profile(captions=[...], shards=..., ...)` writes a profile into `tmp_path` and gives its path."""

    def make(captions=CAPTIONS, features=None, **settings) -> Path:
        (tmp_path / "configs").mkdir(exist_ok=True)
        (tmp_path / "captions.tsv").write_text("".join(f"u\t{caption}\n" for caption in captions))
        compute = {"threads": 1}
        sections = {
            "filter-captions": {"source": "captions.tsv", "validation_fraction": 0.2, "test_fraction": 0.2},
            "generate-sets": {
                "text_to_image": str(text_to_image),
                "shards": 2,
                "sets_per_shard": 2,
                "images_per_set": 3,
                "steps": 2,
                "compute": compute,
            }
            | settings,
            "cache-features": {
                "dino": str(dinov2),
                "text_to_image": str(text_to_image),
                "images_per_set": 3,
                "compute": compute,
            }
            | (features or {}),
        }
        path = tmp_path / "configs" / "small.yaml"
        path.write_text(json.dumps(sections))  # JSON is YAML
        return path

    return make


def config_of(profile_path: Path, *overrides: str) -> GenerateSets:
    return load_profile(profile_path).stage_config(GenerateSets, "generate-sets", None, overrides)
