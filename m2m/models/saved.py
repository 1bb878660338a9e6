"""Saved models are read strictly: every setting known, every tensor there, of the right shape, and no other.

Belongs here: the format of a saved U-Net's folder, saving and loading it, tensors in safetensors files. Not here:
whole pipelines (`m2m.pipelines.saved_pipeline`).
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ModelMixin
from safetensors import safe_open
from torch import nn

from m2m.errors import ConfigError, InputError

FORMAT_VERSION = 1
"""Of a saved U-Net: counted up when the meaning of its config or the names of its tensors change."""
_CONFIG = "config.json"
_ALIGNMENT = 64  # bytes; of everything that torch allocates on the CPU
_WEIGHTS = "diffusion_pytorch_model.safetensors"


class SavedStrictly(ModelMixin):
    """A diffusers model whose folder is read strictly, and written in the place of what an earlier save left."""

    config_name = _CONFIG

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a saved model, strictly.

        Raises:
            ConfigError: the config has an unknown or a missing setting, or another format.
            InputError: a tensor is missing, left over, or has another shape; or there are no safetensors.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_saved_unet(cls, folder)
        kwargs["use_safetensors"] = True  # pickles can run code
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if isinstance(loaded, cls):  # not where output_loading_info is asked for
            realigned(loaded)
        return loaded

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, max_shard_size: int | str = "10GB", **kwargs: Any
    ) -> None:
        """diffusers' own, in the place of what an earlier save left.

        A pipeline passes on what it finds in this signature: the size of shards, and always safetensors.
        """
        remove_weights(Path(save_directory))
        super().save_pretrained(save_directory, max_shard_size=max_shard_size, **kwargs)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        # a signature that ends in **unet: diffusers reads settings off signatures
        return config_keys(input_class) | {"self"}


def config_keys(model: type) -> set[str]:
    """The settings that a diffusers model class takes, those that `**unet` passes on to its base included."""
    keys: set[str] = set()
    for base in model.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        keys |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return keys - {"self"}


def read_json(path: Path) -> dict[str, Any]:
    """A file of a saved model.

    Raises:
        InputError: there is none, or it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{path}: no such file; the folder holds no saved model of this kind") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def realigned(module: nn.Module) -> None:
    """Move weights that a file put at odd addresses to where torch would have put them, in place.

    A safetensors file is mapped into memory with its tensors at any offset. CPU kernels sum in another order at other
    alignments, so that a loaded model would differ in the last bits from the one that was saved.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def remove_weights(folder: Path, weights: str = _WEIGHTS) -> None:
    """Before a model is saved anew: what diffusers leaves of an older one, saved whole or in shards, would be read."""
    for name in (weights, f"{weights}.index.json"):
        (folder / name).unlink(missing_ok=True)


def check_saved_unet(model: type, folder: Path) -> None:
    """Refuse a folder that is not exactly a saved `model` (settings and tensors, by the files' headers alone).

    Raises:
        ConfigError: an unknown or missing setting, or another format.
        InputError: a missing, extra or mismatched tensor, or no safetensors.
    """
    config = read_json(folder / _CONFIG)
    where = folder / _CONFIG
    made_by = config.get("_class_name")
    if made_by != model.__name__:
        raise ConfigError(f"{where}: a {made_by}, not a {model.__name__}; start from it with from_text_to_image")
    if config.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"{where}: format_version {config.get('format_version')}; this version reads {FORMAT_VERSION}"
        )
    known = config_keys(model)
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    for key in settings:
        if key not in known:
            raise ConfigError(f"{where}: {key} is not a setting of {model.__name__}")
    for key in sorted(known):
        if key not in settings:
            raise ConfigError(f"{where}: setting {key} is missing")
    with torch.device("meta"):
        check_saved_tensors(model(**settings), folder)


def check_saved_tensors(model: nn.Module, folder: Path, weights: str = _WEIGHTS) -> None:
    """Refuse a folder whose safetensors, whole or in shards, are not exactly the model's: by the files' headers alone.

    Args:
        model: on the meta device.
        weights: the file's name where it is whole.

    Raises:
        InputError: a missing, extra or mismatched tensor, or no safetensors.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _compare(wanted, _saved_shapes(folder, weights), folder)


def _compare(wanted: Mapping[str, tuple[int, ...]], saved: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    missing = [name for name in wanted if name not in saved]
    extra = [name for name in saved if name not in wanted]
    if missing:
        raise InputError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} of {len(wanted)} are)")
    if extra:
        raise InputError(
            f"{folder}: tensor {extra[0]} has no place in the model ({len(extra)} of {len(saved)} have none)"
        )
    for name, shape in wanted.items():
        if saved[name] != shape:
            raise InputError(f"{folder}: tensor {name} has shape {saved[name]}; the config asks for {shape}")


def _saved_shapes(folder: Path, weights: str) -> dict[str, tuple[int, ...]]:
    index = folder / f"{weights}.index.json"
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [weights]
    except (ValueError, KeyError, AttributeError):
        raise InputError(f"{index}: not an index of safetensors files") from None
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: no such file; weights are read from safetensors only")
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise InputError(f"{path}: not a whole safetensors file: {error}") from None
    return shapes
