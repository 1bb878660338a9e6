"""What M2M starts from is found, loaded safely, or refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, Dinov2Config, Dinov2Model

import m2m.data
from m2m.config import Compute
from m2m.errors import InputError
from m2m.models.autoencoder import decode_latents, encode_images, pixels_per_latent
from m2m.models.text_to_image import (
    as_ddim,
    load_ddim,
    load_dino,
    load_text_to_image,
    load_unet,
    load_unet_config,
    load_vae,
    model_folder,
    start_compute,
)
from m2m.models.unet import ManyToManyUNet

VOCABULARY = Path(m2m.data.__file__).parent / "clip_tokenizer"

SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
SMALL_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def folder(text_to_image, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    vae = AutoencoderKL(**SMALL_VAE)
    text = CLIPTextConfig(hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(VOCABULARY),
        unet=text_to_image,
        scheduler=EulerDiscreteScheduler(**SCHEDULE),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    made = tmp_path_factory.mktemp("models") / "stable-diffusion"
    pipeline.save_pretrained(made)
    return made


def test_a_whole_pipeline_is_loaded_without_a_safety_checker(folder):
    pipeline: Any = load_text_to_image(folder, compute=Compute(threads=1))
    assert pipeline.safety_checker is None
    made = pipeline("a cat", num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(0))
    assert made.images.shape == (1, 4, 8, 8)


def test_parts_are_loaded_alone(folder, text_to_image):
    unet = load_unet(folder.name, folder.parent)
    assert isinstance(unet, UNet2DConditionModel)
    assert torch.equal(unet.conv_in.weight, text_to_image.conv_in.weight)
    assert load_unet_config(folder)["cross_attention_dim"] == 12
    assert not any(parameter.requires_grad for parameter in load_vae(folder).parameters())
    assert load_unet(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.fixture
def with_half(folder, tmp_path) -> Path:
    """The pipeline's folder with its weights as variant fp16 beside the plain ones."""
    made = shutil.copytree(folder, tmp_path / "both")
    pipeline: Any = load_text_to_image(folder, compute=Compute(threads=1))
    pipeline.to(torch.float16).save_pretrained(made, variant="fp16")
    Dinov2Model(Dinov2Config(image_size=16, patch_size=8, hidden_size=20, num_hidden_layers=1)).half().save_pretrained(
        made / "dino", variant="fp16"
    )
    return made


def test_weights_of_a_variant_are_read_where_they_are_asked_for_or_alone(with_half, text_to_image):
    exact, rounded = text_to_image.conv_in.weight, text_to_image.conv_in.weight.half().float()
    assert torch.equal(load_unet(with_half).conv_in.weight, exact)
    assert torch.equal(load_unet(with_half, variant="fp16").conv_in.weight, rounded)
    for path in with_half.glob("*/*.safetensors"):
        if ".fp16." not in path.name:
            path.unlink()
    assert torch.equal(load_unet(with_half).conv_in.weight, rounded)
    assert load_vae(with_half, dtype=torch.float16).dtype == torch.float16
    assert load_dino(with_half / "dino").dtype == torch.float32
    whole: Any = load_text_to_image(with_half, compute=Compute(threads=1))
    assert torch.equal(whole.unet.conv_in.weight, rounded)
    with pytest.raises(InputError, match=r"no weights of variant 'ema'\. There are: fp16"):
        load_vae(with_half, variant="ema")
    shutil.copy(
        with_half / "unet/diffusion_pytorch_model.fp16.safetensors",
        with_half / "unet/diffusion_pytorch_model.non_ema.safetensors",
    )
    with pytest.raises(InputError, match="several variants of it: fp16, non_ema"):
        load_unet(with_half)


def test_a_tensor_that_is_missing_in_a_variant_is_named(with_half):
    path = with_half / "vae/diffusion_pytorch_model.fp16.safetensors"
    state = load_file(path)
    state.pop("encoder.conv_in.bias")
    save_file(state, path, {"format": "pt"})
    assert load_vae(with_half).dtype == torch.float32
    with pytest.raises(InputError, match=r"encoder\.conv_in\.bias.* is missing"):
        load_vae(with_half, variant="fp16")


def test_an_average_of_a_text_to_image_u_net_can_be_the_start(text_to_image, tmp_path):
    average = EMAModel(text_to_image.parameters(), model_cls=UNet2DConditionModel, model_config=text_to_image.config)
    average.save_pretrained(tmp_path / "unet")
    unet = ManyToManyUNet.from_text_to_image(load_unet(tmp_path), "self")
    assert torch.equal(unet.conv_in.weight, text_to_image.conv_in.weight)
    with torch.device("meta"):
        ManyToManyUNet.from_text_to_image(load_unet_config(tmp_path), "self")


def test_ddim_keeps_the_noise_schedule_and_clips_nothing(folder):
    euler = EulerDiscreteScheduler(**SCHEDULE)
    for ddim in (load_ddim(folder), as_ddim(euler)):
        assert torch.equal(ddim.alphas_cumprod, euler.alphas_cumprod)
        assert not ddim.config["clip_sample"] and not ddim.config["set_alpha_to_one"]


@torch.no_grad()
def test_latents_are_the_scaled_mode_of_the_posterior(folder):
    vae: Any = load_vae(folder)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = encode_images(vae, images)
    torch.testing.assert_close(latents, vae.encode(images * 2 - 1).latent_dist.mean * 0.18215)
    torch.testing.assert_close(
        decode_latents(vae, latents), (vae.decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    )
    sampled = encode_images(vae, images, torch.Generator().manual_seed(0))
    assert (sampled - latents).abs().max() > 1e-4
    assert pixels_per_latent(vae) == 2


def test_a_dino_is_loaded_and_another_kind_refused(tmp_path):
    config = Dinov2Config(image_size=16, patch_size=8, hidden_size=20, num_hidden_layers=1, num_attention_heads=2)
    Dinov2Model(config).save_pretrained(tmp_path)
    assert load_dino(tmp_path).config.hidden_size == 20
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(InputError, match="model_type is 'vit'"):
        load_dino(tmp_path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda state, name: state.pop(name), "missing"),
        (lambda state, name: state.update({f"{name}.more": torch.zeros(1)}), "unexpected"),
    ],
)
def test_no_tensor_is_left_to_chance_or_left_over(folder, tmp_path, change, fault):
    """diffusers and transformers start what is missing anew, and ignore what is left over, with a warning at most."""
    Dinov2Model(Dinov2Config(image_size=16, patch_size=8, hidden_size=20, num_hidden_layers=1)).save_pretrained(
        tmp_path / "dino"
    )
    shutil.copytree(folder, tmp_path / "sd")
    for load, source, file, name in (
        (load_unet, "sd", "unet/diffusion_pytorch_model.safetensors", "conv_in.bias"),
        (load_vae, "sd", "vae/diffusion_pytorch_model.safetensors", "encoder.conv_in.bias"),
        (load_dino, "dino", "model.safetensors", "layernorm.bias"),
    ):
        path = tmp_path / source / file
        state = load_file(path)
        change(state, name)
        save_file(state, path, {"format": "pt"})
        with pytest.raises(InputError, match=f"{name}.* is {fault}"):
            load(tmp_path / source)


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        model_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no folder unet"):
        load_unet(tmp_path / "empty")
    with pytest.raises(InputError, match=r"model_index\.json: no such file"):
        load_text_to_image(tmp_path / "empty")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named():
    with pytest.raises(InputError, match=r"compute\.device is cuda"):
        start_compute(Compute(device="cuda", threads=1))
