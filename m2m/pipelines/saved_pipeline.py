"""A saved pipeline's folder is read strictly: its settings, its parts, and every tensor of the parts.

Belongs here: the format of the folder. Not here: the U-Net's own folder (`m2m.models.saved`), loading.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from m2m.errors import ConfigError, InputError
from m2m.models.saved import WEIGHTS, WEIGHTS_OF_TRANSFORMERS, check_saved_tensors, has_weights, read_json
from m2m.models.text_to_image import load_dino

FORMAT_VERSION = 1
"""Of a saved pipeline: counted up when the meaning of its settings changes."""


def check_saved_pipeline(pipeline: Any, folder: Path, variant: str | None = None) -> None:
    """Refuse a folder that is not exactly a saved `pipeline`, by the files' headers alone.

    The U-Net checks its own folder when it is loaded; for the image encoder see `saved_image_encoder`.

    Args:
        variant: of the weights; parts that have none of it are read from their plain ones, as diffusers does.

    Raises:
        ConfigError: an unknown or missing setting, another class or format.
        InputError: a part is missing, a tensor of the autoencoder is missing, extra or mismatched, or no part has
            weights of the variant.
    """
    path = folder / "model_index.json"
    index = read_json(path)
    if index.get("_class_name") != pipeline.__name__:
        raise ConfigError(f"{path}: a {index.get('_class_name')}, not a {pipeline.__name__}")
    if index.get("format_version") != FORMAT_VERSION:
        raise ConfigError(f"{path}: format_version {index.get('format_version')}; this version reads {FORMAT_VERSION}")
    modules, settings = pipeline._get_signature_keys(pipeline)
    known = {*modules, *settings}
    for key in index:
        if key not in known and not key.startswith("_"):
            raise ConfigError(f"{path}: {key} is not a part or a setting of {pipeline.__name__}")
    for key in sorted(known):
        if key not in index:
            raise ConfigError(f"{path}: {key} is missing")
    for part in sorted(modules):
        if index[part][0] is not None and not (folder / part).is_dir():
            raise InputError(f"{folder / part}: no such folder; {path} names it")
    if variant is not None and not any(_variant_of(folder, part, variant) for part in modules):
        raise InputError(f"{folder}: no part has weights of variant {variant!r}")
    # diffusers would start a missing tensor anew, with a warning at most
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(read_json(folder / "vae" / "config.json"))
    check_saved_tensors(vae, folder / "vae", _variant_of(folder, "vae", variant))


def saved_image_encoder(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The folder's image encoder, if it has one, as an argument of diffusers' `from_pretrained`.

    Its file names tensors otherwise than the model does, so that only loading shows what is missing.

    Args:
        given: the other arguments.

    Raises:
        InputError: a tensor is missing or left over.
    """
    if "image_encoder" in given or not (folder / "image_encoder").is_dir():
        return {}
    dtype = given.get("dtype", given.get("torch_dtype"))
    if isinstance(dtype, Mapping):
        dtype = dtype.get("image_encoder", dtype.get("default"))
    variant = _variant_of(folder, "image_encoder", given.get("variant"))
    return {"image_encoder": load_dino(folder / "image_encoder", dtype=dtype or torch.float32, variant=variant)}


def _variant_of(folder: Path, part: str, variant: str | None) -> str | None:
    """The variant where a part has weights of it; None where its plain ones are read."""
    weights = WEIGHTS_OF_TRANSFORMERS if part == "image_encoder" else WEIGHTS
    return variant if variant is not None and has_weights(folder / part, weights, variant) else None
