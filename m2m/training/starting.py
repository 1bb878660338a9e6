"""What a training starts from: checked folders, first weights, what is known of a model without loading it.

Belongs here: choosing and checking starting weights. Not here: making a U-Net from another (`m2m.models.origin`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from m2m.artifacts import read_manifest, read_summary
from m2m.config import is_hub_id, resolve, source_digest
from m2m.errors import ArtifactError, ConfigError, InputError
from m2m.models.saved import only_variant, read_json
from m2m.models.sd21 import DINOV2_GIANT, DINOV2_GIANT_WIDTH, SD21_BASE_UNET, STABLE_DIFFUSION_2_1_BASE
from m2m.models.text_to_image import load_unet, load_unet_config, model_folder
from m2m.models.unet import VARIANTS, ManyToManyUNet

MADE_BY = "made_by.json"
"""Beside shipped weights: the command that made them."""


def fresh_unet(
    text_to_image: str, root: Path, variant: str, feature_dim: int | None, seed: int, own: Mapping[str, Any]
) -> ManyToManyUNet:
    """M2M's U-Net with the text-to-image model's weights and Image-Set Attention from scratch (section 6.1)."""
    source = load_unet(text_to_image, root)
    return ManyToManyUNet.from_text_to_image(source, variant, feature_dim, seed=seed, **own)  # type: ignore[arg-type]


def continued_unet(
    folder: Path, variant: str, feature_dim: int | None, own: Mapping[str, Any], condition: str | None = None
) -> ManyToManyUNet:
    """The U-Net of an M2M folder, to train on.

    Raises:
        ArtifactError: no such folder, the other variant, or one of another condition (a fine-tuned model, for None).
        ConfigError: it was trained with other settings of the U-Net than are asked for.
    """
    config = check_start(folder, variant, condition)
    for name, value in own.items():
        if config.get(name) != value:
            raise ConfigError(f"{folder} was trained with {name}={config.get(name)}; {name}={value} was asked for")
    unet = ManyToManyUNet.from_pretrained(folder / "unet", variant=only_variant(folder / "unet"))
    unet.float()  # shipped weights may be of half precision
    if variant == "dino" and unet.feature_dim != feature_dim:
        raise ConfigError(f"{folder} reads features of width {unet.feature_dim}; the image encoder's are {feature_dim}")
    return unet


def check_start(folder: Path, variant: str, condition: str | None = None) -> dict[str, Any]:
    """The U-Net's config of an M2M folder, if it is of this variant.

    Raises:
        ArtifactError: it is not there, of the other variant, or has another condition.
    """
    if not (folder / "unet" / "config.json").is_file():
        raise ArtifactError(f"{folder}: no trained model here (unet/config.json). `python -m m2m pretrain` makes one")
    config = read_json(folder / "unet" / "config.json")
    found = config.get("variant")
    if found != variant:
        raise ArtifactError(
            f"{folder} was made by {VARIANTS.get(str(found), 'another model')} (unet/config.json: variant {found}); "
            f"{variant} was asked for"
        )
    if config.get("condition") != condition and condition is not None:
        raise ArtifactError(
            f"{folder} is not fine-tuned with {condition}s (unet/config.json: condition {config.get('condition')})"
        )
    if config.get("condition") != condition:
        raise ArtifactError(
            f"{folder} is fine-tuned already (unet/config.json: condition {config.get('condition')}): "
            "start from what pretrain made"
        )
    return config


def origin(source: str, folder: Path, root: Path) -> str:
    """A model source as people should read it: the command that made it and what that started from, where known.

    The command stands in the manifest of this project's outputs, or in a file `made_by.json` (`{"command": ...}`).
    """
    name = source
    if folder.is_absolute() and not is_hub_id(source):  # no path of this machine: outputs tell it to others
        name = folder.relative_to(root).as_posix() if folder.is_relative_to(root) else folder.name
    manifest = read_manifest(folder)
    if manifest is not None:
        command, _, variant = manifest.stage.partition("@")
        said = f"{name}, made by: python -m m2m {command}{f' --variant {variant}' if variant else ''}"
        earlier = _read_figures(folder).get("started_from")
        return f"{said}, started from: {earlier}" if earlier else said
    command = _made_by(folder)
    return f"{name}, made by: {command}" if command else name


def initialised_from(source: str, folder: Path, root: Path) -> str:
    """A model source as a model card names it: by what it is, the same on every machine and wherever it lies.

    A hub id as it is; this project's outputs by stage and manifest; other folders by their content, with the command of
    `made_by.json` where there is one.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        return f"{manifest.stage} (manifest {manifest.digest[:12]})"
    if is_hub_id(source) and not resolve(source, root).is_dir():
        return source
    command = _made_by(folder)
    said = f"made by: {command}" if command else "a local folder"
    return f"{said} (content {source_digest(folder, root)[:12]})"


def _made_by(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / MADE_BY).read_bytes())["command"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_figures(folder: Path) -> Mapping[str, Any]:
    try:
        return read_summary(folder).figures
    except ArtifactError:
        return {}


def unet_config(text_to_image: str, root: Path) -> dict[str, Any]:
    """The config of a text-to-image model's U-Net, of Stable Diffusion 2.1 base also without its files.

    Raises:
        InputError: no such folder, or a hub id whose config is not known here.
    """
    if resolve(text_to_image, root).is_dir():
        return load_unet_config(text_to_image, root)
    if _is_hub_model(text_to_image, STABLE_DIFFUSION_2_1_BASE):
        return dict(SD21_BASE_UNET)
    raise InputError(f"text_to_image {text_to_image}: {_not_here(text_to_image)}")


def feature_width(dino: str, root: Path) -> int:
    """Width of an image encoder's features, DINOv2-giant's also without its files.

    Raises:
        InputError: no such folder, or a hub id whose config is not known here.
    """
    if resolve(dino, root).is_dir():
        return int(read_json(resolve(dino, root) / "config.json")["hidden_size"])
    if _is_hub_model(dino, DINOV2_GIANT):
        return DINOV2_GIANT_WIDTH
    raise InputError(f"dino {dino}: {_not_here(dino)}")


def local_or_hub_folder(source: str, root: Path) -> Path:
    """An M2M folder: local, or downloaded."""
    return model_folder(source, root, ("unet", "scheduler"))


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _is_hub_model(source: str, known: str) -> bool:
    return source.partition("@")[0].rpartition("/")[2] == known.partition("@")[0].rpartition("/")[2]


def _not_here(source: str) -> str:
    if is_hub_id(source):
        return "a hub id that is not known here; a dry run downloads nothing, so give a local folder to look at it"
    return "no such folder"
