"""How a training step is computed: choices of speed and memory that change its results by rounding alone.

Belongs here: the choices, and applying them to a U-Net and to torch. Not here: precision and device (`acceleration`).
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from pydantic import Field

from m2m.config import Settings
from m2m.models.flex_attention import allow_many_shapes
from m2m.models.unet import ManyToManyUNet

_COMPILED = (ResnetBlock2D, Attention, FeedForward)


class Kernels(Settings):
    """For GPUs; nothing of it is measured here, so all of it is off."""

    attention: Literal["prefix", "flex"] = Field(
        "prefix",
        description="Image-Set Attention by a loop over images, the reference, or by FlexAttention's fused kernel "
        "(cuda only; random contexts always go by the loop)",
    )
    compile: bool = Field(
        False,
        description="torch.compile for the parts that all rows go through alike: residual blocks, self-attention, "
        "feed-forward layers. Takes minutes at the start",
    )
    channels_last: bool = Field(
        False, description="an image's channels beside each other in memory, as convolutions in bfloat16 like them"
    )
    deterministic: bool = Field(
        True,
        description="cuda: kernels whose results do not change from run to run, which a bit-equal resume needs; "
        "false: the fastest ones, chosen by trial",
    )

    def apply(self, unet: ManyToManyUNet, backend: str = "inductor") -> None:
        """Change how a U-Net computes, in place; its tensors and their names stay.

        Args:
            backend: of torch.compile.
        """
        unet.set_training_attention(self.attention)
        if self.channels_last:
            unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compile:
            allow_many_shapes()
            for module in unet.modules():
                if isinstance(module, _COMPILED):
                    module.compile(backend=backend, dynamic=False)

    @contextlib.contextmanager
    def chosen(self, device: torch.device) -> Iterator[None]:
        """While it is open, torch takes kernels as `deterministic` says; it warns where there is none of that kind."""
        if device.type != "cuda":
            yield
            return
        filling: Any = torch.utils.deterministic  # type: ignore[attr-defined]
        before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
        filled = filling.fill_uninitialized_memory
        torch.use_deterministic_algorithms(self.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not self.deterministic
        filling.fill_uninitialized_memory = False  # costs time, mends nothing
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0])
            torch.backends.cudnn.benchmark = before[1]
            filling.fill_uninitialized_memory = filled
