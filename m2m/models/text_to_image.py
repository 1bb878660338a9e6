"""Loading the pretrained models that M2M starts from: a Stable Diffusion pipeline, its parts, a DINOv2.

Belongs here: finding a local folder or a pinned hub revision, and loading it safely. Not here: M2M's own models.
Only safetensors are read; pickles can run code. Of weights that were saved under a name of their own (`variant`, for
example "fp16") those that are asked for are read; where nobody asks, the plain ones, or else the only others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import Dinov2Model

from m2m.config import Compute, is_hub_id, resolve
from m2m.errors import InputError
from m2m.models.saved import (
    WEIGHTS,
    WEIGHTS_OF_TRANSFORMERS,
    has_weights,
    only_variant,
    read_json,
    realigned,
    variants_of,
)

_NOT_WANTED = ("*.fp16*", "*.non_ema*", "*.bin", "*.ckpt", "*.msgpack", "*.onnx")


def torch_dtype(compute: Compute | None) -> torch.dtype:
    """torch's type of the config's name."""
    return getattr(torch, compute.dtype) if compute else torch.float32


def start_compute(compute: Compute | None) -> torch.device:
    """The device to compute on, with the number of CPU threads set; without settings the CPU, threads as they are.

    Raises:
        InputError: cuda is asked for and there is none.
    """
    if compute is None:
        return torch.device("cpu")
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise InputError("compute.device is cuda, but torch finds no CUDA device here; set compute.device=cpu")
    torch.set_num_threads(compute.threads)
    return torch.device(compute.device)


def model_folder(
    source: str | Path, root: Path | None = None, parts: Sequence[str] = ("",), variant: str | None = None
) -> Path:
    """Where a model's files are: the local folder, or a download of a hub id (`owner/name[@revision]`).

    Args:
        root: relative folders start here.
        parts: subfolders that are needed of a hub repository; "" is its top.
        variant: of the weights that are needed.

    Raises:
        InputError: neither a folder nor a hub id, or the download failed.
    """
    path = resolve(source, root or Path.cwd())
    if path.is_dir():
        return path
    if not is_hub_id(str(source)):
        raise InputError(f"{source}: no such model folder (looked at {path}), and no hub id owner/name[@revision]")
    from huggingface_hub import snapshot_download

    name, _, revision = str(source).partition("@")
    wanted = [f"{part}/{kind}".lstrip("/") for part in ("", *parts) for kind in ("*.json", "*.txt", "*.model")] + [
        f"{part}/*.safetensors".lstrip("/") for part in parts
    ]
    try:
        unwanted = [pattern for pattern in _NOT_WANTED if pattern != f"*.{variant}*"]
        found = snapshot_download(name, revision=revision or None, allow_patterns=wanted, ignore_patterns=unwanted)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{source}: no such folder here, and the hub did not give it: {first}") from None
    return Path(found)


def load_text_to_image(
    source: str | Path, root: Path | None = None, compute: Compute | None = None, variant: str | None = None
) -> StableDiffusionPipeline:
    """A whole text-to-image pipeline, on the device. It has a safety checker only where the folder has one.

    Parts that have no weights of the `variant` are read from their plain ones, as diffusers does.

    Raises:
        InputError: no such pipeline.
    """
    device = start_compute(compute)
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker")
    folder = model_folder(source, root, parts, variant)
    variant = variant or only_variant(folder / "unet")
    index = read_json(folder / "model_index.json")
    given = {}
    if not (index.get("safety_checker") or [None])[0]:
        given = {"safety_checker": None, "requires_safety_checker": False}
    pipeline = _loaded(StableDiffusionPipeline, folder, dtype=torch_dtype(compute), variant=variant, **given)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            realigned(part)
    return pipeline.to(device)


def load_unet(
    source: str | Path, root: Path | None = None, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> UNet2DConditionModel:
    """The text-to-image U-Net of a pipeline: what M2M's is initialised from."""
    return _load(UNet2DConditionModel, _part(source, root, "unet", variant), WEIGHTS, dtype, variant)


def load_vae(
    source: str | Path, root: Path | None = None, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> AutoencoderKL:
    """The autoencoder of a pipeline."""
    vae = _load(AutoencoderKL, _part(source, root, "vae", variant), WEIGHTS, dtype, variant)
    return vae.eval().requires_grad_(False)


def load_unet_config(source: str | Path, root: Path | None = None) -> dict[str, Any]:
    """The U-Net's config alone: enough to build M2M's on the meta device."""
    return read_json(_part(source, root, "unet") / "config.json")


def load_ddim(source: str | Path, root: Path | None = None, prediction_type: str | None = None) -> DDIMScheduler:
    """The pipeline's noise schedule with the paper's sampler, DDIM (section 6.1).

    Args:
        prediction_type: of the model that is to be sampled from, where it is another than the pipeline's.
    """
    config = read_json(_part(source, root, "scheduler") / "scheduler_config.json")
    return as_ddim(config if prediction_type is None else config | {"prediction_type": prediction_type})


def as_ddim(scheduler: SchedulerMixin | dict[str, Any]) -> DDIMScheduler:
    """DDIM on another scheduler's noise schedule, with Stable Diffusion's settings for it."""
    config = dict(scheduler if isinstance(scheduler, dict) else scheduler.config)  # type: ignore[attr-defined]
    # diffusers' defaults of both are for pixels; latents go beyond [-1, 1]
    config |= {"clip_sample": False, "set_alpha_to_one": False}
    return DDIMScheduler.from_config(config)  # type: ignore[return-value]


def load_dino(
    source: str | Path, root: Path | None = None, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> Dinov2Model:
    """A DINOv2 image encoder, frozen.

    Raises:
        InputError: no such model, or one of another kind.
    """
    folder = model_folder(source, root, variant=variant)
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "dinov2":
        raise InputError(f"{folder / 'config.json'}: model_type is {kind!r}; M2M-DINO reads features of dinov2")
    return _load(Dinov2Model, folder, WEIGHTS_OF_TRANSFORMERS, dtype, variant).eval().requires_grad_(False)


def _part(source: str | Path, root: Path | None, part: str, variant: str | None = None) -> Path:
    folder = model_folder(source, root, (part,), variant)
    if not (folder / part).is_dir():
        raise InputError(f"{folder} has no folder {part}: not a text-to-image pipeline")
    return folder / part


def _load(model: Any, folder: Path, weights: str, dtype: torch.dtype, variant: str | None) -> Any:
    """A model whose every tensor comes from the folder: what is missing would be left to chance, with a warning."""
    variant = variant or only_variant(folder, weights)
    if variant is not None and not has_weights(folder, weights, variant):
        there = ["plain ones"] * has_weights(folder, weights) + variants_of(folder, weights)
        raise InputError(f"{folder}: no weights of variant {variant!r}. There are: {', '.join(there) or 'none'}")
    loaded, found = _loaded(model, folder, output_loading_info=True, dtype=dtype, variant=variant)
    for fault in ("missing", "mismatched", "unexpected"):
        if names := sorted(str(name) for name in found.get(f"{fault}_keys") or ()):
            raise InputError(f"{folder}: tensor {names[0]} is {fault} ({len(names)} are) for a {model.__name__}")
    realigned(loaded)
    return loaded


def _loaded(model: Any, folder: Path, **kwargs: Any) -> Any:
    try:
        return model.from_pretrained(folder, use_safetensors=True, local_files_only=True, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder}: can't be loaded as {model.__name__}: {first}") from None
