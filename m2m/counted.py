"""What one pass of a model costs, counted by running it on the meta device: no weights, no memory, no constants.

Belongs here: FLOPs and the peak of live tensors of a callable; building the configured models without their weights.
Not here: how many passes a stage makes (`m2m.costs`).
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model

from m2m.config import resolve
from m2m.models.saved import read_json
from m2m.training.starting import feature_width, unet_config

# Stable Diffusion 2.1 base and DINOv2-giant, by their files on the hub, for who has not downloaded them
_SD21_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 768,
}
_SD21_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_DINOV2_GIANT = {"num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True, "image_size": 518}


@dataclass(frozen=True)
class Pass:
    """One pass: floating point operations (two a multiply-add) and bytes of tensors alive at its peak."""

    flops: int
    peak_bytes: int


def count(run: Callable[[], Any]) -> Pass:
    """Run something on meta tensors; attention counts as the fused kernels do it, which keep no score matrix."""
    live = _LiveBytes()
    with _FusedAttention() as attention, FlopCounterMode(display=False) as counter, live:
        run()
    return Pass(counter.get_total_flops() + attention.flops, live.peak)


def text_to_image_unet(source: str, root: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    return _on_meta(lambda: UNet2DConditionModel.from_config(unet_config(source, root)), dtype)


def autoencoder(source: str, root: Path, dtype: torch.dtype) -> AutoencoderKL:
    folder = resolve(source, root)
    config = read_json(folder / "vae" / "config.json") if folder.is_dir() else _SD21_VAE
    unet_config(source, root)  # refuses what is not known here
    return _on_meta(lambda: AutoencoderKL.from_config(dict(config)), dtype)


def text_encoder(source: str, root: Path, dtype: torch.dtype) -> CLIPTextModel:
    folder = resolve(source, root)
    config = read_json(folder / "text_encoder" / "config.json") if folder.is_dir() else _SD21_TEXT
    return _on_meta(lambda: CLIPTextModel(CLIPTextConfig.from_dict(dict(config))), dtype)


def image_encoder(source: str, root: Path, dtype: torch.dtype) -> Dinov2Model:
    folder, width = resolve(source, root), feature_width(source, root)
    config = read_json(folder / "config.json") if folder.is_dir() else {**_DINOV2_GIANT, "hidden_size": width}
    return _on_meta(lambda: Dinov2Model(Dinov2Config(**config)), dtype)


def weight_bytes(*models: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def _on_meta(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        return nn.Module.to(make(), dtype).eval()  # diffusers' own warns of weights that there are none of


def attention_flops(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Scores and their weighted sum: q (..., L, D), k (..., S, D), v (..., S, E)."""
    return 2 * q.numel() * k.shape[-2] + 2 * q.numel() // q.shape[-1] * v.shape[-1] * v.shape[-2]


class _FusedAttention:
    """Stands in for scaled dot product attention: counted by its shapes, keeping what the fused kernels keep.

    Put in its place by name, as torch's own hook (TorchFunctionMode) is off in the forward passes that checkpoints run
    within a backward one.
    """

    def __init__(self) -> None:
        self.flops = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        if torch.is_grad_enabled():
            return _Attention.apply(self, query, key, value)  # type: ignore[return-value]
        self.flops += attention_flops(query, key, value)
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    def __enter__(self) -> "_FusedAttention":
        self._real = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        F.scaled_dot_product_attention = self._real


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mode: _FusedAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.mode, ctx.flops = mode, attention_flops(q, k, v)
        mode.flops += ctx.flops
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        ctx.mode.flops += 2 * ctx.flops
        return (None, *(torch.empty_like(tensor) for tensor in ctx.saved_tensors))


class _LiveBytes(TorchDispatchMode):
    """The most bytes that results are alive with at a time; what was there before does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
