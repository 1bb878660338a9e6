"""LoRA through peft: fine-tuning with few weights (Hu et al. 2021, arXiv:2106.09685), merged into the U-Net at the end.

Belongs here: adding, saving and merging the adapter. Not here: training it (`loop`, which trains what asks for
gradients).
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from m2m.artifacts import write_bytes
from m2m.errors import ConfigError
from m2m.generation.noise import namespaced
from m2m.models.unet import ManyToManyUNet

ADAPTER = Path("lora") / "pytorch_lora_weights.safetensors"  # diffusers' name
_NAME = "default"
_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def require_peft() -> None:
    """
    Raises:
        ConfigError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("lora_rank is set, and its package is not installed: `pip install peft`, or leave it out")


def add_lora(unet: ManyToManyUNet, rank: int, alpha: int | None, seed: int) -> None:
    """Freeze the U-Net but its condition embedders, which are new, and add an adapter to every attention projection.

    The model predicts the same until it is trained.

    Args:
        alpha: the adapter's product counts alpha / rank times; `rank` where None.
    """
    require_peft()
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(namespaced(seed, "lora") % 2**32)
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(_TARGETS)), _NAME
        )
    for name, weight in unet.named_parameters():  # peft has frozen all but its own
        weight.requires_grad_("condition_embedder." in name or ".lora_" in name)


def has_lora(unet: ManyToManyUNet) -> bool:
    return hasattr(unet, "peft_config")


def save_lora(unet: ManyToManyUNet, folder: Path) -> None:
    """Write `folder/lora`, as diffusers' `load_lora_adapter` reads it (condition embedders are not in it)."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft.utils import get_peft_model_state_dict

    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(unet, adapter_name=_NAME).items()
    }
    described: dict[str, Any] = unet.peft_config[_NAME].to_dict()
    # not diffusers' own save: it lists sets in the order of their hashes, which is another in every process
    described = {name: sorted(value) if isinstance(value, set) else value for name, value in described.items()}
    # one entry: safetensors writes several in any order
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(described, indent=2, sort_keys=True)}
    (folder / ADAPTER).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / ADAPTER, save(tensors, metadata))


def merge_lora(unet: ManyToManyUNet) -> None:
    """Add the adapter to the weights that it adapts, and take it off: a plain U-Net again."""
    unet.fuse_lora()
    unet.unload_lora()
