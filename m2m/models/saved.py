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
WEIGHTS = "diffusion_pytorch_model.safetensors"
"""Of diffusers' models, where they are whole."""
WEIGHTS_OF_TRANSFORMERS = "model.safetensors"
_AVERAGE = {"decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"}
"""What diffusers' EMAModel writes beside a model's settings: of how its weights were averaged, nothing of the model."""


class SavedStrictly(ModelMixin):
    """A diffusers model whose folder is read strictly, and written in the place of what an earlier save left."""

    config_name = _CONFIG

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a saved model, strictly. `variant="fp16"` reads the weights that were saved under that name.

        Raises:
            ConfigError: the config has an unknown or a missing setting, or another format.
            InputError: a tensor is missing, left over, or has another shape; or there are no safetensors.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_saved_unet(cls, folder, kwargs.get("variant"))
        kwargs["use_safetensors"] = True  # pickles can run code
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if isinstance(loaded, cls):  # not where output_loading_info is asked for
            realigned(loaded)
        return loaded

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **kwargs: Any,
    ) -> None:
        """diffusers' own, in the place of what an earlier save of this `variant` left.

        Raises:
            ConfigError: pickles are asked for.
        """
        check_safe(safe_serialization)
        remove_weights(Path(save_directory), variant=variant)
        # a string: diffusers takes it apart where the model is pushed to the hub
        super().save_pretrained(str(save_directory), variant=variant, max_shard_size=max_shard_size, **kwargs)

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


def check_safe(safe_serialization: bool) -> None:
    """
    Raises:
        ConfigError: pickles are asked for.
    """
    if not safe_serialization:
        raise ConfigError("safe_serialization=False: weights are written, and read, as safetensors only")


def of_variant(name: str, variant: str | None) -> str:
    """The name of a file of weights that were saved under a name of their own ("fp16"), as diffusers has it."""
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def has_weights(folder: Path, weights: str = WEIGHTS, variant: str | None = None) -> bool:
    """Whether there are weights of this variant, whole or in shards."""
    return any((folder / of_variant(name, variant)).is_file() for name in (weights, f"{weights}.index.json"))


def variants_of(folder: Path, weights: str = WEIGHTS) -> list[str]:
    """The names that weights were saved under beside, or in the place of, the plain ones."""
    stem, _, suffix = weights.rpartition(".")
    found = set()
    for before, after in ((f"{stem}.", f".{suffix}"), (f"{weights}.index.", ".json")):  # whole, in shards
        names = (path.name for path in folder.glob(f"{before}*{after}"))
        found |= {name.removeprefix(before).removesuffix(after) for name in names if "-of-" not in name}
    return sorted(found)


def only_variant(folder: Path, weights: str = WEIGHTS) -> str | None:
    """None where there are plain weights; where there are others alone, their name.

    Raises:
        InputError: there are several others, so that someone has to choose.
    """
    if has_weights(folder, weights):
        return None
    found = variants_of(folder, weights)
    if len(found) > 1:
        raise InputError(
            f"{folder}: no {weights}, but several variants of it: {', '.join(found)}. Say which, or keep one"
        )
    return found[0] if found else None


def remove_weights(folder: Path, weights: str = WEIGHTS, variant: str | None = None) -> None:
    """Before a model is saved anew: what diffusers leaves of an older one, saved whole or in shards, would be read."""
    for name in (weights, f"{weights}.index.json"):
        (folder / of_variant(name, variant)).unlink(missing_ok=True)


def check_saved_unet(model: type, folder: Path, variant: str | None = None) -> None:
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
    settings = {key: value for key, value in without_average(config).items() if not key.startswith("_")}
    for key in settings:
        if key not in known:
            raise ConfigError(f"{where}: {key} is not a setting of {model.__name__}")
    for key in sorted(known):
        if key not in settings:
            raise ConfigError(f"{where}: setting {key} is missing")
    with torch.device("meta"):
        check_saved_tensors(model(**settings), folder, variant)


def without_average(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what diffusers' EMAModel adds to it."""
    return {key: value for key, value in config.items() if key not in _AVERAGE}


def check_saved_tensors(model: nn.Module, folder: Path, variant: str | None = None) -> None:
    """Refuse a folder whose safetensors, whole or in shards, are not exactly the model's: by the files' headers alone.

    Args:
        model: on the meta device.

    Raises:
        InputError: a missing, extra or mismatched tensor, or no safetensors.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _compare(wanted, _saved_shapes(folder, variant), folder)


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


def _saved_shapes(folder: Path, variant: str | None) -> dict[str, tuple[int, ...]]:
    index, whole = folder / of_variant(f"{WEIGHTS}.index.json", variant), of_variant(WEIGHTS, variant)
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [whole]
    except (ValueError, KeyError, AttributeError):
        raise InputError(f"{index}: not an index of safetensors files") from None
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            others = [f"variant={one!r}" for one in variants_of(folder) if one != variant]
            more = f"; there are others: {', '.join(others)}" if others else ""
            raise InputError(f"{path}: no such file; weights are read from safetensors only{more}")
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise InputError(f"{path}: not a whole safetensors file: {error}") from None
    return shapes
