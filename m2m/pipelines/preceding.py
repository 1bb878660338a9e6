"""The preceding images of a running rollout: each encoded once in its life, the oldest leaving by the window.

Belongs here: adding images, the context window, contexts with and without conditions. Not here: pictures.
"""

from typing import Any

import torch
from torch import Tensor

from m2m.errors import InputError
from m2m.models.int8_context import Int8Context, KeptContext
from m2m.models.unet import ManyToManyUNet
from m2m.pipelines.context_noise import ContextNoise


class PrecedingImages:
    """What targets read, growing by one image for each that is made (paper, section 6.1, inference)."""

    def __init__(
        self,
        unet: ManyToManyUNet,
        window: int | None = None,
        sink: int = 0,
        with_condition: bool = False,
        without_condition: bool = True,
        int8: bool = False,
        keep: bool = True,
        noise: ContextNoise | None = None,
    ) -> None:
        """
        Args:
            window: the paper's W: at most so many images are read; None reads all.
            sink: how many of them are always the first ones; the others are the newest.
            with_condition, without_condition: which of the two contexts guidance will ask for.
            int8: keep contexts in bytes.
            keep: contexts last for the images' life; else they are computed anew at every step.
            noise: of what is read of images; None: none.

        Raises:
            InputError: a window that can't hold its sink, or int8 where nothing is kept from step to step.
        """
        if sink < 0 or (window is not None and window < sink):
            raise InputError(f"context_window={window} can't hold context_sink={sink} images")
        self._unet = unet
        self._recent = None if window is None else window - sink
        self._sink = sink
        self._kinds = [kind for kind, wanted in ((True, with_condition), (False, without_condition)) if wanted]
        self._contexts: dict[bool, KeptContext] = {}
        # a model whose clean images share the noisy ones' timestep has nothing that lasts longer than a step
        shared = unet.variant == "self" and unet.config["clean_timestep"] is None
        self._forgetful = shared or not keep
        if int8 and self._forgetful:
            why = (
                "this model's clean images share the timestep of the noisy ones (clean_timestep is None)"
                if shared
                else "cache_context is off"
            )
            raise InputError(f"int8_context: {why}, so that there is no context to keep from step to step")
        self._int8, self._noise = int8, noise
        self._told = None if noise is None else noise.timestep
        self._clean: Tensor | None = None
        self._conditions: Tensor | None = None

    def add(self, clean: Tensor, condition: Tensor | None = None) -> None:
        """Append images to every set, and let the window forget.

        Args:
            clean: what the U-Net reads of them: latents (sets, n, C, h, w) or features (sets, n, tokens, width).
            condition: (sets, n, numbers).
        """
        if not self._contexts and self._clean is None:
            clean, condition = self._windowed(clean), None if condition is None else self._windowed(condition)
        if clean.shape[1] == 0 or self._recent == self._sink == 0:
            return
        if self._noise is not None:
            clean = self._noise.on(clean)
        if self._forgetful:
            self._clean = self._windowed(_joined(self._clean, clean))
            if condition is not None:
                self._conditions = self._windowed(_joined(self._conditions, condition))
            return
        for kind in self._kinds:
            newer = self._unet.encode_context(clean, condition if kind else None, clean_timestep=self._told)
            if self._int8:
                newer = Int8Context.of(newer)
            older: Any = self._contexts.get(kind)  # of the kind of `newer`
            context = newer if older is None else older.append(newer)
            kept = context if self._recent is None else context.window(self._recent, self._sink)
            if kept is not None:
                self._contexts[kind] = kept

    def contexts(self, timestep: Tensor) -> tuple[KeptContext | None, KeptContext | None]:
        """What targets read at a step: (with conditions, without); None where there is no image."""
        if self._forgetful and self._clean is not None:
            self._contexts = {
                kind: self._unet.encode_context(self._clean, self._conditions if kind else None, timestep, self._told)
                for kind in self._kinds
            }
        return self._contexts.get(True), self._contexts.get(False)

    def _windowed(self, images: Tensor) -> Tensor:
        if self._recent is None or images.shape[1] <= self._recent + self._sink:
            return images
        newest = images[:, images.shape[1] - self._recent :]
        return torch.cat([images[:, : self._sink], newest], dim=1)


def _joined(older: Tensor | None, newer: Tensor) -> Tensor:
    return newer if older is None else torch.cat([older, newer], dim=1)
