"""The small Stable Diffusion: a U-Net of SD-2.1's kind, on our latents and CLIP's text tower.

Belongs here: its configuration and its training. Not here: sampling (we ship a `StableDiffusionPipeline`).
"""

import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import Tensor
from transformers import CLIPTextModel

from m2m.tiny.autoencoder import encode, load_autoencoder
from m2m.tiny.clip import build_clip, load_clip, load_tokenizer, name_some
from m2m.tiny.training import OUTPUTS, bank, load_checkpoint, train
from m2m.tiny.world import ATTRIBUTES, describe

NAME = "text-to-image"
# The shipped pipeline's tokenizer pads to this and not to 77: the world's captions have at most 14 tokens, and
# attending to padding would cost a third of every step.
TOKENS = 16
_BATCH = 64


def build_unet() -> UNet2DConditionModel:
    """SD-2.1-base's U-Net in small: cross-attention at both levels, linear projections, heads of 32 dimensions."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        attention_head_dim=(2, 4),  # the number of heads, as in SD-2.1's config  # type: ignore
        cross_attention_dim=64,
        use_linear_projection=True,
    )


def build_scheduler() -> EulerDiscreteScheduler:
    """Stable Diffusion's noise schedule, sampled with Euler's method."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="leading",
        steps_offset=1,
    )


def text_encoder() -> CLIPTextModel:
    """The text tower of the trained CLIP."""
    clip, _ = load_clip()
    model = CLIPTextModel(build_clip().config.text_config)  # type: ignore
    tower = {name.removeprefix("text_model."): weight for name, weight in clip.text_model.state_dict().items()}
    prefix = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
    model.load_state_dict({prefix + name: weight for name, weight in tower.items()})
    return model.eval()


def train_text_to_image(
    steps: int = 10_000, resume: bool = True, seed: int = 0, init_from: Path | None = None
) -> UNet2DConditionModel:
    """Predict the velocity; one caption in ten is dropped, for guidance.

    A U-Net this small, of 8x8 latents, can't predict noise exactly enough to see an image in the last timesteps' noise.

    Args:
        init_from: a folder of a U-Net to start from, which may have learned to predict the noise.
    """
    torch.manual_seed(seed)
    model, pictures = build_unet(), bank()
    if init_from is not None:
        model.load_state_dict(UNet2DConditionModel.from_pretrained(init_from).state_dict())
    model.set_attn_processor(AttnProcessor())  # the plain one is the faster in training so few tokens on a CPU
    latents = _bank_latents()
    states = _caption_states()
    kept = build_scheduler().alphas_cumprod

    def loss_of_step(step: int, rng: np.random.Generator, noise: torch.Generator) -> dict[str, Tensor]:
        index = rng.integers(len(pictures), size=_BATCH)
        named = [{} if rng.random() < 0.1 else name_some(pictures.scene(place), rng) for place in index]
        text = torch.stack([states[_key(some)] for some in named]).float()
        clean = latents[index].float()
        timestep = torch.from_numpy(rng.integers(1000, size=_BATCH))
        epsilon = torch.randn(clean.shape, generator=noise)
        share = kept[timestep][:, None, None, None]
        noisy = share.sqrt() * clean + (1 - share).sqrt() * epsilon
        velocity = share.sqrt() * epsilon - (1 - share).sqrt() * clean
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(noisy, timestep, text).sample.float()
        squared = (predicted - velocity).square().mean((1, 2, 3))
        return {"loss": squared.mean(), "of_noise": (squared * kept[timestep]).mean()}

    train(
        NAME,
        {"unet": model},
        loss_of_step,
        steps=steps,
        rate=1e-3 if init_from is None else 7e-4,
        resume=resume,
        average=0.999,
        seed=seed,
        weight_decay=0.0,
    )
    return model


def load_unet() -> tuple[UNet2DConditionModel, dict[str, float]]:
    """The newest checkpoint's averaged weights."""
    model = build_unet()
    return model, load_checkpoint(NAME, {"unet": model})


def _key(named: Mapping[str, str]) -> tuple[str | None, ...]:
    return tuple(named.get(name) for name in ATTRIBUTES)


@torch.no_grad()
def _caption_states() -> dict[tuple[str | None, ...], Tensor]:
    """What the text tower makes of every caption there is (5,880), (16, 64) each; the empty caption stands for none."""
    encoder, tokenizer = text_encoder(), load_tokenizer()
    keys = list(itertools.product(*((None, *values) for values in ATTRIBUTES.values())))
    states = {}
    for start in range(0, len(keys), 256):
        part = keys[start : start + 256]
        named = [{name: value for name, value in zip(ATTRIBUTES, key) if value is not None} for key in part]
        captions = [describe(some) if some else "" for some in named]
        tokens = tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt")
        states.update(zip(part, encoder(tokens["input_ids"]).last_hidden_state.half()))
    return states


def _bank_latents() -> Tensor:
    """The bank's pictures as scaled latents, kept on disk under the autoencoder's digest."""
    model, _ = load_autoencoder()
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.numpy().tobytes())
    path = OUTPUTS / "bank" / f"latents-{digest.hexdigest()[:12]}.pt"
    if not path.exists():
        pictures = bank()
        with torch.autocast("cpu", torch.bfloat16):
            latents = encode(model, pictures, np.arange(len(pictures))) * float(model.config["scaling_factor"])
        torch.save(latents.half(), path)
    return torch.load(path, weights_only=True)
