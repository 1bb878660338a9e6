"""How a U-Net of M2M starts: which tensors come from an earlier model and which are new, every one accounted for.

Belongs here: its config from a text-to-image model's, copying, initialising. Not here: the network (`unet`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from torch import Tensor, nn

from m2m.errors import ConfigError, InputError
from m2m.models.conditions import ConditionEmbedder
from m2m.models.saved import config_keys, without_average

Model = TypeVar("Model", bound=ModelMixin)

# Settings of diffusers' U-Net that would give it inputs or layers which M2M does not know.
_PLAIN = {
    "only_cross_attention": (False,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None,),
    "time_cond_proj_dim": (None,),
    "attention_type": ("default",),
    "cross_attention_norm": (None,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
}


@dataclass(frozen=True)
class Origin:
    """Where every tensor of a newly made U-Net comes from."""

    copied: tuple[str, ...]
    new: tuple[str, ...]
    left_out: tuple[str, ...]
    """Tensors of the source that have no place: the cross-attention to text."""


def check_plain(settings: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: settings of diffusers' U-Net of a kind that M2M does not know.
    """
    for key, plain in _PLAIN.items():
        if settings.get(key, plain[0]) not in plain:
            raise ConfigError(f"U-Net setting {key}={settings[key]!r}: M2M is built on U-Nets with {key}={plain[0]!r}")


def many_to_many_config(text_to_image: Mapping[str, Any], variant: str, feature_dim: int | None) -> dict[str, Any]:
    """diffusers' settings of M2M's U-Net: keys and values come from the same level (self) or from features (dino).

    Raises:
        ConfigError: an unknown setting, or M2M-DINO without `feature_dim`.
    """
    known, text_to_image = config_keys(UNet2DConditionModel), without_average(text_to_image)
    unknown = [key for key in text_to_image if key not in known and not key.startswith("_")]
    if unknown:
        raise ConfigError(f"{unknown[0]} is not a setting of a text-to-image U-Net")
    if variant == "dino" and not feature_dim:
        raise ConfigError("M2M-DINO needs feature_dim, the width of the image encoder's features")
    config = {key: value for key, value in text_to_image.items() if key in known}
    levels = tuple(config.get("block_out_channels", (320, 640, 1280, 1280)))
    return config | {"cross_attention_dim": feature_dim if variant == "dino" else levels}


def new_model(model: type[Model], config: Mapping[str, Any], seed: int) -> Model:
    """All of it new, under `seed`; inside `torch.device("meta")` nothing is allocated."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = model(**config)
    made.origin = Origin(copied=(), new=tuple(made.state_dict()), left_out=())  # type: ignore
    return made


def model_from(
    model: type[Model],
    config: dict[str, Any],
    source: Mapping[str, Tensor],
    left_out: tuple[str, ...],
    seed: int,
) -> Model:
    """A U-Net of `config` with copies of `source`'s tensors; attn2 and condition embedders may be new.

    Raises:
        InputError: a tensor of the source fits nowhere, or one that must come from it is missing.
    """
    with torch.device("meta"):
        made = model(**config)
    wanted = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    for name, tensor in source.items():
        if name not in wanted:
            raise InputError(f"tensor {name} of the source has no place in M2M's U-Net")
        if tuple(tensor.shape) != wanted[name]:
            raise InputError(f"tensor {name}: the source's shape is {tuple(tensor.shape)}, M2M's {wanted[name]}")
    new = tuple(name for name in wanted if name not in source)
    for name in new:
        if ".attn2." not in name and "condition_embedder." not in name:
            raise InputError(f"tensor {name} is missing in the source")
    like = next(iter(source.values()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in new):
            layer = made.get_submodule(owner)
            assert isinstance(layer, nn.Linear), owner
            layer.to_empty(device="cpu").reset_parameters()
            layer.to(like.device, like.dtype)
    for module in made.modules():
        if isinstance(module, ConditionEmbedder) and not module.heads[0].weight.is_meta:
            module.start_at_zero()
    copies = {name: tensor.detach().clone() for name, tensor in source.items()}
    made.load_state_dict(copies, strict=False, assign=True)
    unmade = [name for name, tensor in (*made.named_parameters(), *made.named_buffers()) if tensor.is_meta]
    if unmade and not like.is_meta:
        raise InputError(f"tensor {unmade[0]} was neither copied nor initialised")
    made.origin = Origin(copied=tuple(copies), new=new, left_out=left_out)  # type: ignore
    return made
