"""The U-Net of M2M: Stable Diffusion's, with Image-Set Attention where it read text.

Belongs here: the network, its passes (training, encoding a context, denoising) and how it starts from a text-to-image
model. Not here: the attention itself (`image_set_attention`), strict reading of files (`saved`), sampling (pipelines).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import ModelMixin as ModelMixin  # DiffusionPipeline looks here for how a part's class is loaded
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from m2m.errors import ConfigError, InputError
from m2m.models.conditions import ConditionEmbedder
from m2m.models.context import Context
from m2m.models.image_set_attention import (
    TRAINING_ATTENTIONS,
    FromContexts,
    ImageSetAttention,
    Reading,
    Recording,
    WholeSets,
    as_reads,
)
from m2m.models.int8_context import KeptContext
from m2m.models.origin import Origin, check_plain, many_to_many_config, model_from, new_model
from m2m.models.saved import FORMAT_VERSION, SavedStrictly, config_keys
from m2m.models.spared_rows import BLOCKS, spare_rows

VARIANTS = {"self": "M2M-Self", "dino": "M2M-DINO"}
Variant = Literal["self", "dino"]
Branch = tuple[KeptContext | None, Tensor | None]
"""What one prediction is given: preceding images and the target's condition, (sets, numbers); None drops either."""


class ManyToManyUNet(SavedStrictly, UNet2DConditionModel):
    """Predicts the noise of an image from the images before it in its set.

    M2M-Self (section 5.1) reads hidden states that the same U-Net computes of clean images; M2M-DINO (section 5.2)
    reads DINOv2 features. `forward` is `training_forward`, so that wrappers (DDP, autocast) see the training pass.
    """

    # blocks go by the names of their classes, and two have one of their own (`spared_rows`)
    _repeated_blocks = ["BasicTransformerBlock", *BLOCKS]
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", *BLOCKS]

    def __init__(
        self,
        *,
        variant: Variant = "self",
        condition: str | None = None,
        clean_timestep: int | None = 0,
        dropped_context: Literal["empty", "zeroed"] = "empty",
        format_version: int = FORMAT_VERSION,
        **unet: Any,
    ) -> None:
        """
        Args:
            variant: what is read of preceding images: "self" their latents, "dino" their DINO features.
            condition: None, "camera" or "position" (section 6.2).
            clean_timestep: timestep of clean images in M2M-Self. The paper does not say; a fixed one lets an image's
                keys and values be computed once in its life. None: the noisy images' own (one timestep a set; a
                context is then encoded again at every step).
            dropped_context: what "randomly zeroing out the clean image condition" means in M2M-Self: "empty" reads
                nothing, as the first image of a set; "zeroed" reads latents of zeros, as written in the paper.
            unet: settings of diffusers' UNet2DConditionModel.

        Raises:
            ConfigError: an unknown variant, condition or format, or a kind of U-Net that M2M does not know.
        """
        if variant not in VARIANTS:
            raise ConfigError(f"variant {variant!r} is not known. There are: {', '.join(VARIANTS)}")
        if format_version != FORMAT_VERSION:
            raise ConfigError(f"format_version {format_version} of a saved U-Net: this version reads {FORMAT_VERSION}")
        if dropped_context not in ("empty", "zeroed"):
            raise ConfigError(f"dropped_context {dropped_context!r} is not known. There are: empty, zeroed")
        check_plain(unet)
        super().__init__(**unet)
        self.register_to_config(
            variant=variant,
            condition=condition,
            clean_timestep=clean_timestep,
            dropped_context=dropped_context,
            format_version=format_version,
        )
        self.origin: Origin | None = None
        self._training_attention = "prefix"
        layers: list[ImageSetAttention] = []
        for module in self.modules():
            if isinstance(module, BasicTransformerBlock) and module.attn2 is not None:
                layers.append(ImageSetAttention.in_place_of(module.attn2, len(layers), unet.get("dropout", 0.0)))
                setattr(module, "attn2", layers[-1])  # noqa: B010 (declared as an Attention there)
        if not layers:
            raise ConfigError("the U-Net has no cross-attention block to put Image-Set Attention into")
        spare_rows(self)
        # a tuple, so that the layers are not registered a second time
        self._image_set_layers: tuple[ImageSetAttention, ...] = tuple(layers)
        if condition is not None:
            hidden = 4 * self.config["block_out_channels"][0]  # as wide as the time embedding
            self.condition_embedder = ConditionEmbedder(condition, hidden, [layer.query_dim for layer in layers])
            if variant == "dino":  # E_c, "a distinct conditional embedder"
                self.feature_condition_embedder = ConditionEmbedder(condition, hidden, [self.feature_dim])

    @property
    def variant(self) -> Variant:
        return self.config["variant"]

    @property
    def feature_dim(self) -> int:
        """Width of the features that M2M-DINO reads."""
        return self._image_set_layers[0].context_dim

    def set_training_attention(self, kind: str) -> None:
        """How `training_forward` attends: "prefix", a loop over images (the default and the reference), or "flex".

        FlexAttention's fused kernel needs a GPU to be trained with. The results are equal but for rounding, and the
        choice is not part of the model: it is not saved.

        Raises:
            ConfigError: another kind.
        """
        if kind not in TRAINING_ATTENTIONS:
            raise ConfigError(f"training attention {kind!r} is not known. There are: {', '.join(TRAINING_ATTENTIONS)}")
        self._training_attention = kind

    def enable_group_offload(self, *devices: Any, offload_type: str = "block_level", **more: Any) -> None:  # type: ignore[override]
        """diffusers' own, by leaves: what is read of images is also computed outside of the blocks' forward passes.

        Raises:
            ConfigError: `offload_type="block_level"`, diffusers' default.
        """
        if offload_type != "leaf_level":
            raise ConfigError('group offloading of M2M\'s U-Net goes by leaves: give offload_type="leaf_level"')
        super().enable_group_offload(*devices, offload_type=offload_type, **more)

    # --- passes -------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, reading: Reading | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """`training_forward`; with a `reading`, diffusers' own forward pass over rows that read so."""
        if reading is None:
            return self.training_forward(*args, **kwargs)
        # encoder_hidden_states goes untouched to every attn2, and to nothing else
        return super().forward(*args, encoder_hidden_states=reading, return_dict=False)[0]  # type: ignore[arg-type]

    def training_forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        *,
        clean: Tensor | None = None,
        clean_timesteps: Tensor | None = None,
        features: Tensor | None = None,
        keep_context: Tensor | None = None,
        condition: Tensor | None = None,
        keep_condition: Tensor | None = None,
    ) -> Tensor:
        """The noise of every image of every set in one pass, each image given those before it (Eq. 5).

        Equal to N separate predictions with `denoise`, image i from the context of images 1..i-1.

        Args:
            noisy: (sets, N, C, h, w).
            timesteps: (sets, N) integers; equal within a set where `clean_timestep` is None.
            clean: M2M-Self: (sets, N, C, h, w) or without the last image, which nobody reads.
            clean_timesteps: M2M-Self: (sets, N - 1) integers in place of `clean_timestep`, for noised clean images.
            features: M2M-DINO: (sets, N or N - 1, tokens, feature width).
            keep_context: (sets,) or (sets, N) bool; False drops what the set's, or the image's, prediction is given.
                Or (sets, N, N - 1): which of the images before it each image reads.
            condition: (sets, N, numbers), clean and noisy image i alike; None drops it everywhere.
            keep_condition: (sets,) bool.

        Returns:
            (sets, N, C, h, w).
        """
        sets, images = noisy.shape[:2]
        own = images - 1
        read = self._what_is_read(clean, features, sets, own)
        keep = keep_context
        if keep is not None and keep.ndim == 1:
            keep = keep[:, None].expand(sets, images)
        reads = None
        if keep is not None and keep.ndim == 3:
            keep, reads = None, as_reads(keep)
        rows, times = noisy.flatten(0, 1), timesteps.to(noisy.device).flatten()
        if self.variant == "self":
            if keep is not None and self.config["dropped_context"] == "zeroed":
                if keep_context is None or keep_context.ndim != 1:
                    raise InputError("dropped_context=zeroed drops whole sets: keep_context must be (sets,)")
                read, keep = read * keep_context.view(-1, 1, 1, 1, 1).to(read.dtype), None
            fixed = self.config["clean_timestep"]
            times_clean = (
                timesteps[:, :1].expand(sets, own) if fixed is None else timesteps.new_full((sets, own), fixed)
            )
            if clean_timesteps is not None:
                times_clean = clean_timesteps
            rows = torch.cat([read.flatten(0, 1), rows])
            times = torch.cat([times_clean.to(noisy.device).flatten(), times])
        shifts, feature_shift = self._embed_training(condition, keep_condition)
        if self.variant == "dino" and feature_shift is not None:
            read = read + feature_shift
        reading = WholeSets(
            sets,
            images,
            features=read if self.variant == "dino" else None,
            keep=keep,
            reads=reads,
            attention=self._training_attention,
            shifts=shifts,
        )
        predicted = self._pass(rows, times, reading)[-sets * images :]
        return predicted.unflatten(0, (sets, images))

    @apply_forward_hook
    def encode_context(
        self,
        images: Tensor,
        condition: Tensor | None = None,
        timestep: int | Tensor | None = None,
        clean_timestep: int | None = None,
    ) -> Context:
        """Keys and values of clean images, whatever stands before or after them.

        Args:
            images: M2M-Self: latents (sets, W, C, h, w); M2M-DINO: features (sets, W, tokens, feature width).
            condition: (sets, W, numbers).
            timestep: the noisy images' one, needed by M2M-Self where the model's `clean_timestep` is None.
            clean_timestep: M2M-Self: in place of the model's, for noised images.
        """
        sets, count = images.shape[:2]
        flat = None if condition is None else self._checked(condition, sets, count).flatten(0, 1)
        if self.variant == "dino":
            features = self._what_is_read(None, images, sets, count).to(self.dtype)
            if flat is not None:
                features = features + self.feature_condition_embedder(flat)[0].view(sets, count, 1, -1)
            pairs = [layer.keys_and_values(features) for layer in self._image_set_layers]
            return Context(keys=tuple(k for k, _ in pairs), values=tuple(v for _, v in pairs))
        clean = self._what_is_read(images, None, sets, count)
        fixed = self.config["clean_timestep"] if clean_timestep is None else clean_timestep
        if fixed is None and timestep is None:
            raise InputError("this M2M-Self gives clean images the timestep of the noisy ones: encode_context needs it")
        times = torch.as_tensor(timestep if fixed is None else fixed, device=clean.device)
        shifts = None if flat is None else self.condition_embedder(flat)
        recording = Recording(sets, count, shifts=shifts)
        self._pass(clean.flatten(0, 1), times.expand(sets * count), recording)
        return recording.context()

    def denoise(
        self,
        noisy: Tensor,
        timestep: int | Tensor,
        context: KeptContext | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """The noise of one image of every set, given its context (or none) and its own condition (or none).

        Args:
            noisy: (sets, C, h, w).
            timestep: one for all or (sets,).
            condition: (sets, numbers).

        Returns:
            (sets, C, h, w).
        """
        return self.denoise_branches(noisy, timestep, [(context, condition)])[0]

    @apply_forward_hook
    def denoise_branches(self, noisy: Tensor, timestep: int | Tensor, branches: Sequence[Branch]) -> list[Tensor]:
        """Several predictions for the same noisy images in one pass: what guidance needs (Eqs. 6 and 7)."""
        sets, count = noisy.shape[0], len(branches)
        for context, _ in branches:
            if context is not None and context.sets != sets:
                raise InputError(f"{sets} noisy images but a context of {context.sets} sets")
        times = torch.as_tensor(timestep, device=noisy.device).expand(sets).repeat(count)
        shifts = self._embed_branches([condition for _, condition in branches], noisy)
        reading = FromContexts([context if context else None for context, _ in branches], shifts=shifts)
        return list(self._pass(noisy.repeat(count, 1, 1, 1), times, reading).chunk(count))

    def null_context(self, like: Tensor) -> Context | None:
        """What a dropped context is to this model: None, or one image of zeros (any number of them reads the same).

        Args:
            like: noisy latents (sets, C, h, w).
        """
        if self.variant == "dino" or self.config["dropped_context"] == "empty":
            return None
        return self.encode_context(torch.zeros_like(like)[:, None], timestep=0)

    # --- making one ---------------------------------------------------------------------------------------------

    @classmethod
    def from_text_to_image(
        cls,
        unet: UNet2DConditionModel | Mapping[str, Any],
        variant: Variant,
        feature_dim: int | None = None,
        condition: str | None = None,
        seed: int = 0,
        **own: Any,
    ) -> "ManyToManyUNet":
        """Start from a text-to-image U-Net: all of it but the cross-attention to text (section 6.1).

        Image-Set Attention is new (torch's initialisation of linear layers, under `seed`). `origin` of the result
        lists what was copied, what is new and what was left out; nothing is ever left uninitialised.

        Args:
            unet: the model, or its config alone: everything is then new (on the meta device: nothing is allocated).
            feature_dim: width of DINO features; M2M-DINO needs it.
            own: further settings of `ManyToManyUNet`.

        Raises:
            ConfigError: settings that don't fit together.
            InputError: a tensor of the source fits nowhere, or one of the new model's has no source.
        """
        own = {"variant": variant, "condition": condition, **own}
        if not isinstance(unet, UNet2DConditionModel):
            return new_model(cls, many_to_many_config(unet, variant, feature_dim) | own, seed)
        source = {name: tensor for name, tensor in unet.state_dict().items() if ".attn2." not in name}
        left_out = tuple(name for name in unet.state_dict() if ".attn2." in name)
        return model_from(cls, many_to_many_config(unet.config, variant, feature_dim) | own, source, left_out, seed)

    def add_condition(self, condition: str, seed: int = 0) -> "ManyToManyUNet":
        """This model with a fresh condition embedder, for fine-tuning (section 6.2); predicts the same until trained.

        Raises:
            ConfigError: no such condition, or this model has one already.
        """
        if self.config["condition"] is not None:
            raise ConfigError(
                f"this U-Net has a {self.config['condition']} condition already; {condition} can't be added"
            )
        config = {key: value for key, value in self.config.items() if key in config_keys(type(self))}
        return model_from(type(self), config | {"condition": condition}, self.state_dict(), (), seed)

    # --- inside -------------------------------------------------------------------------------------------------

    def _pass(self, rows: Tensor, timesteps: Tensor, reading: Reading) -> Tensor:
        # by the module's call, which compilers and offloading take hold of
        return self(rows, timesteps, reading=reading)

    def _what_is_read(self, clean: Tensor | None, features: Tensor | None, sets: int, images: int) -> Tensor:
        """The variant's kind of clean images, without the last where one more than `images` are given."""
        given, other = (clean, features) if self.variant == "self" else (features, clean)
        kind, axes = ("latents (clean)", 5) if self.variant == "self" else ("DINO features (features)", 4)
        if other is not None or given is None:
            raise InputError(f"{VARIANTS[self.variant]} reads {kind} of preceding images, and nothing else")
        if given.ndim != axes or given.shape[0] != sets or given.shape[1] not in (images, images + 1):
            raise InputError(
                f"{kind} of shape {tuple(given.shape)}: expected {axes} axes, {sets} sets, "
                f"{images} or {images + 1} images"
            )
        if self.variant == "dino" and given.shape[-1] != self.feature_dim:
            raise InputError(f"DINO features of width {given.shape[-1]}; this M2M-DINO reads {self.feature_dim}")
        return given[:, :images]

    def _checked(self, condition: Tensor, sets: int, images: int) -> Tensor:
        if self.config["condition"] is None:
            raise InputError("this U-Net has no condition embedder: fine-tune one first (add_condition)")
        if tuple(condition.shape[:2]) != (sets, images) or condition.ndim != 3:
            raise InputError(
                f"a condition of shape {tuple(condition.shape)}: expected ({sets}, {images}, numbers of one condition)"
            )
        return condition

    def _embed_training(
        self, condition: Tensor | None, keep: Tensor | None
    ) -> tuple[list[Tensor] | None, Tensor | None]:
        """E(c) for the rows of a training pass, and E_c(c) to add to features, (sets, N - 1, 1, width)."""
        if condition is None:
            return None, None
        sets, images = condition.shape[:2]
        self._checked(condition, sets, images)
        keep_rows = None if keep is None else keep[:, None].expand(sets, images).flatten()
        each = self.condition_embedder(condition.flatten(0, 1), keep_rows)
        if self.variant == "dino":
            of_features = self.feature_condition_embedder(condition.flatten(0, 1), keep_rows)[0]
            return list(each), of_features.unflatten(0, (sets, images))[:, :-1, None]
        clean = [vector.unflatten(0, (sets, images))[:, :-1].flatten(0, 1) for vector in each]
        return [torch.cat(pair) for pair in zip(clean, each)], None

    def _embed_branches(self, conditions: Sequence[Tensor | None], noisy: Tensor) -> list[Tensor] | None:
        if all(condition is None for condition in conditions):
            return None
        sets = noisy.shape[0]
        columns = []
        for condition in conditions:
            if condition is None:
                columns.append([noisy.new_zeros(sets, layer.query_dim) for layer in self._image_set_layers])
            else:
                columns.append(self.condition_embedder(self._checked(condition[:, None], sets, 1)[:, 0]))
        return [torch.cat(list(parts)) for parts in zip(*columns)]
