"""Images from the images before them: autoregressive sampling with a trained M2M (paper, sections 6.1 and 6.2).

Belongs here: the pipeline, its arguments, its folder. Not here: guidance, windows and pictures (beside this module).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import is_compiled_module
from PIL import Image
from torch import Tensor
from transformers import Dinov2Model

from m2m.config import Compute
from m2m.errors import ArtifactError, ConfigError, InputError
from m2m.generation.features import dino_preprocess
from m2m.models.autoencoder import encode_images, pixels_per_latent
from m2m.models.saved import (
    WEIGHTS_OF_TRANSFORMERS,
    check_safe,
    only_variant,
    read_json,
    realigned,
    remove_weights,
)
from m2m.models.text_to_image import start_compute, torch_dtype
from m2m.models.unet import VARIANTS, ManyToManyUNet
from m2m.pipelines.arguments import (
    Generators,
    count_sets,
    image_size,
    initial_noise,
    paired_conditions,
    preceding_sets,
)
from m2m.pipelines.context_noise import noise_of_context
from m2m.pipelines.guidance import Interval, guided_steps
from m2m.pipelines.model_card import CardFacts, read_facts, write_card
from m2m.pipelines.pictures import Pictures, as_output, as_sets
from m2m.pipelines.rollout import Rollout
from m2m.pipelines.saved_pipeline import FORMAT_VERSION, check_saved_pipeline, saved_image_encoder
from m2m.pipelines.schedulers import check_scheduler
from m2m.tiny import EMBEDDED

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class ManyToManyPipelineOutput(BaseOutput):
    """Generated images: a list for every set, or a tensor or array (sets, images, ...)."""

    images: list[list[Image.Image]] | Tensor | np.ndarray


class ManyToManyPipeline(DiffusionPipeline):
    """Generates any number of images, one after another, from any number of preceding images.

    Every generated image becomes a preceding image of those after it. What the U-Net reads of an image is computed
    once in its life and reused by all steps of all later images.
    """

    model_cpu_offload_seq = "image_encoder->unet->vae"
    _optional_components = ["image_encoder"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: ManyToManyUNet,
        scheduler: SchedulerMixin,
        image_encoder: Dinov2Model | None = None,
        feature_size: int | None = None,
        feature_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406),
        feature_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225),
        context_window: int | None = None,
        context_sink: int = 0,
        format_version: int = FORMAT_VERSION,
    ) -> None:
        """
        Args:
            image_encoder: DINOv2 for M2M-DINO, None for M2M-Self.
            feature_size: pixels along each side that DINOv2 sees (the whole picture, resized); the encoder's own
                `image_size` where None. The paper does not say.
            feature_mean, feature_std: of the pixels that DINOv2 sees.
            context_window: W when a call does not say; None: no bound.
            context_sink: how many of W are always the first images.

        Raises:
            ConfigError: parts that don't belong together, or another format.
        """
        super().__init__()
        self.card = CardFacts()
        """What the model card says when the pipeline is saved."""
        if format_version != FORMAT_VERSION:
            raise ConfigError(f"format_version {format_version} of a pipeline: this version reads {FORMAT_VERSION}")
        if (unet.variant == "dino") != (image_encoder is not None):
            need = "needs an image_encoder" if image_encoder is None else "has no use for an image_encoder"
            raise ConfigError(f"{VARIANTS[unet.variant]} {need}")
        if image_encoder is not None and image_encoder.config.hidden_size != unet.feature_dim:
            raise ConfigError(
                f"the image encoder's features are {image_encoder.config.hidden_size} wide; "
                f"this M2M-DINO reads {unet.feature_dim}"
            )
        if vae.config["latent_channels"] != unet.config["in_channels"]:
            raise ConfigError(
                f"the autoencoder has {vae.config['latent_channels']} latent channels, "
                f"the U-Net {unet.config['in_channels']}"
            )
        # never trained, and the same bits everywhere: some CPU kernels are chosen by requires_grad, even under no_grad
        for frozen in (vae, image_encoder):
            if frozen is not None:
                frozen.requires_grad_(False)
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler, image_encoder=image_encoder)
        self.register_to_config(
            feature_size=feature_size,
            feature_mean=list(feature_mean),
            feature_std=list(feature_std),
            context_window=context_window,
            context_sink=context_sink,
            format_version=format_version,
        )

    @property
    def num_timesteps(self) -> int:
        """Steps of one image in the last call: what diffusers' callbacks reckon with."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        images: Pictures | None = None,
        num_images: int = 1,
        *,
        preceding: Tensor | Sequence[Tensor] | None = None,
        condition: Tensor | Sequence[Tensor] | None = None,
        target_condition: Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        condition_guidance_scale: float | None = None,
        guidance_interval: Interval | None = None,
        context_window: int | None = None,
        context_sink: int | None = None,
        int8_context: bool = False,
        cache_context: bool = True,
        context_noise: int = 0,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> ManyToManyPipelineOutput:
        """Generate `num_images` images for every set of preceding images.

        Args:
            images: preceding images: a list of PIL images (one set), a list of lists (sets of any lengths), or
                (sets, W, 3, H, W) floats in [0, 1], or a list of such tensors without the first axis. None or an
                empty list: no preceding images.
            preceding: in place of `images`, what the U-Net reads of them: scaled latents (sets, W, C, h, w) for
                M2M-Self, DINO features (sets, W, tokens, width) for M2M-DINO; or a list of tensors, one for each set.
            condition: of the preceding images, (sets, W, numbers); a list of (W, numbers) for sets of unequal lengths.
            target_condition: of the images to make, (sets, num_images, numbers). Poses are relative to the first
                preceding image.
            guidance_scale: s of Eq. 6, s_I of Eq. 7; 1 guides nothing.
            condition_guidance_scale: s_C of Eq. 7; s_I where None. 0 leaves the condition out.
            guidance_interval: shares of the steps, (start, stop), between which there is guidance: (0, 0.4) guides the
                noisiest two fifths. The other steps cost half: they take the conditional prediction. None: all steps.
            context_window: W: how many preceding images, given and made, a target reads. Where more are given, the
                oldest are not read, and a warning says so.
            context_sink: how many of them are always the first ones, so that a long rollout keeps real images in sight.
            int8_context: keep what was computed of preceding images in bytes: about half the memory of half precision,
                for an error well below 1 % of a prediction (benchmarks/int8_context.py).
            cache_context: False computes what the U-Net reads of preceding images anew at every step: the same
                pictures, slower; less memory between steps.
            context_noise: M2M-Self: preceding images, given and made, are read with the noise of this timestep, which
                the clean stream is told: for models trained so. Drawn from `generator`, once for each image.
            height, width: of the images, in pixels.
            generator: one for all, or one for each set (then a set's images don't depend on the other sets).
            latents: initial noise, (sets, num_images, C, h, w), in place of `generator`.
            output_type: "pil", "np" ((sets, num_images, H, W, 3) floats in [0, 1]), "pt" ((sets, num_images, 3, H, W)
                floats in [0, 1]) or "latent" (scaled latents).
            callback_on_step_end: called as `callback(pipeline, step, timestep, {"latents": ...})`; steps count on from
                image to image. May return other latents. Sets with equally many preceding images are made together,
                one such group after another, each counting from 0.
            callback_on_step_end_tensor_inputs: what the callback is given: "latents" or nothing. A diffusers
                PipelineCallback says so itself.
            return_dict: False gives a tuple of the images alone.

        Raises:
            InputError: arguments that don't fit the model or each other.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if output_type not in _OUTPUT_TYPES:
            raise InputError(f"output_type {output_type!r} is not known. There are: {', '.join(_OUTPUT_TYPES)}")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise InputError(f"callback_on_step_end_tensor_inputs: {unknown[0]!r} is not known. There is: latents")
        check_scheduler(self.scheduler)
        if is_compiled_module(self.unet):
            warnings.warn("torch.compile(unet) does not reach M2M's passes: call unet.compile() instead", stacklevel=3)
        guided_steps(num_inference_steps, guidance_interval)
        if num_images < 1 or num_inference_steps < 1:
            raise InputError(f"num_images={num_images}, num_inference_steps={num_inference_steps}: at least 1 of each")
        if images is not None and preceding is not None:
            raise InputError("give either images or what was encoded of them (preceding), not both")
        device, scale = self._execution_device, pixels_per_latent(self.vae)
        sized = preceding if latents is None and self.unet.variant == "self" else latents
        size = image_size(scale, self.unet.config["sample_size"], images, sized, height, width)
        if preceding is not None:
            sets = preceding_sets(self.unet, preceding, device)
        elif images is not None:
            sets = [one.to(device) for one in as_sets(images, size)]
        else:
            sets = [torch.zeros(0, 3, *size, device=device)] * count_sets(latents, target_condition, generator)
        if not sets:
            raise InputError("there is no set to carry on: for a set without preceding images, give an empty one, [[]]")
        conditions = paired_conditions(
            self.unet, condition, target_condition, sets, num_images, condition_guidance_scale
        )
        shape = (len(sets), num_images, self.unet.config["in_channels"], size[0] // scale, size[1] // scale)
        noise = initial_noise(shape, latents, generator, device)
        window = self.config["context_window"] if context_window is None else context_window
        sink = self.config["context_sink"] if context_sink is None else context_sink
        _say_what_is_not_read(sets, window)

        def step_end(step: int, timestep: Any, latents: Tensor) -> Tensor:
            if callback_on_step_end is None:
                return latents
            given = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
            return (callback_on_step_end(self, step, timestep, given) or {}).get("latents", latents)

        made: list[Tensor] = []
        groups = _equal_lengths(sets)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        total = len(groups) * num_images * self._num_timesteps
        with self.progress_bar(total=total) as progress:  # type: ignore[call-arg]
            for members in groups:
                given = torch.stack([sets[member] for member in members])
                own = [generator[m] for m in members] if isinstance(generator, list | tuple) else generator
                rollout = Rollout(
                    noise=noise[members],
                    steps=num_inference_steps,
                    condition=None if conditions is None else torch.stack([conditions[0][m] for m in members]),
                    target=None if conditions is None else conditions[1][members],
                    images_scale=guidance_scale,
                    condition_scale=condition_guidance_scale,
                    interval=guidance_interval,
                    window=window,
                    sink=sink,
                    int8=int8_context,
                    keep=cache_context,
                    context_noise=noise_of_context(self.unet, self.scheduler, context_noise, own),
                    generator=own,
                    decode=output_type != "latent",
                    tick=progress.update,
                    callback=step_end,
                )
                clean = given if preceding is not None else self._encoded(given)
                latent, decoded = rollout.generate(self, clean)
                made.append(latent if decoded is None else decoded)
        self.maybe_free_model_hooks()
        places = [member for members in groups for member in members]
        # sets of one length are in order, and need no second copy
        found = made[0] if len(groups) == 1 else torch.cat(made)[torch.tensor(places).argsort()]
        found = found if output_type == "latent" else as_output(found, output_type)
        return ManyToManyPipelineOutput(images=found) if return_dict else (found,)  # type: ignore[return-value]

    def encode(self, images: Tensor) -> Tensor:
        """What the U-Net reads of pictures (B, 3, H, W), floats in [0, 1].

        Returns:
            M2M-Self: scaled latents (B, C, h, w), the mode of the posterior. M2M-DINO: the last hidden states of
            DINOv2, class token included, (B, tokens, width).
        """
        if self.unet.variant == "self":
            return encode_images(self.vae, images)
        encoder = self.image_encoder
        size = self.config["feature_size"] or encoder.config.image_size
        images = images.to(self._execution_device)  # an offloaded encoder lies elsewhere until it is called
        pixels = dino_preprocess(images, size, self.config["feature_mean"], self.config["feature_std"])
        return encoder(pixel_values=pixels.to(encoder.dtype)).last_hidden_state

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "ManyToManyPipeline":
        """Load a saved pipeline, strictly; "tiny" and "tiny-self" are M2M-DINO and M2M-Self of the embedded models.

        Raises:
            InputError, ConfigError: what does not belong into the folder, or is missing there, by name.
        """
        folder = Path(pretrained_model_name_or_path)
        if _is_embedded(folder):
            from m2m.tiny.embedded import saved  # builds a pipeline of this class

            with saved(str(folder)) as there:
                return cls.from_pretrained(there, **kwargs)
        if folder.is_dir():
            check_saved_pipeline(cls, folder, kwargs.get("variant"))
            kwargs |= saved_image_encoder(folder, kwargs)
        kwargs["use_safetensors"] = True  # pickles can run code
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        loaded.card = read_facts(folder)
        for part in loaded.components.values():
            if isinstance(part, torch.nn.Module):
                realigned(part)
        return loaded

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """diffusers' own, in the place of what an earlier save left, with a model card (`card` holds its facts).

        `variant` and `max_shard_size` are passed on to every part.

        Raises:
            ConfigError: pickles are asked for.
        """
        check_safe(kwargs.get("safe_serialization", True))
        folder, variant = Path(save_directory), kwargs.get("variant")
        remove_weights(folder / "vae", variant=variant)
        remove_weights(folder / "image_encoder", WEIGHTS_OF_TRANSFORMERS, variant)
        super().save_pretrained(str(folder), **kwargs)  # a string: diffusers takes it apart where it pushes to the hub
        write_card(self, folder)

    def _upload_folder(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        write_card(self, Path(working_dir))  # in the place of the one that diffusers makes when it pushes to the hub
        return super()._upload_folder(working_dir, *args, **kwargs)

    # --- inside -------------------------------------------------------------------------------------------------

    def _encoded(self, pictures: Tensor) -> Tensor:
        """(sets, W, 3, H, W) -> what the U-Net reads, (sets, W, ...)."""
        sets, count = pictures.shape[:2]
        if count == 0:  # of no images: shapes after the second do not matter
            return pictures
        return self.encode(pictures.flatten(0, 1)).to(self.unet.dtype).unflatten(0, (sets, count))


def load_pipeline(folder: str | Path, variant: str | None = None, compute: Compute | None = None) -> ManyToManyPipeline:
    """A trained pipeline from its folder, ready to sample.

    Args:
        folder: or the name of an embedded one, "tiny" or "tiny-self".
        variant: "self" or "dino" where the caller can use only one.

    Raises:
        ArtifactError: the folder is missing, or holds the other variant.
        InputError, ConfigError: it is damaged.
    """
    folder = Path(folder)
    embedded = _is_embedded(folder)
    if not embedded and not (folder / "model_index.json").is_file():
        raise ArtifactError(f"{folder}: no trained model here (model_index.json). `python -m m2m pretrain` makes one")
    there = EMBEDDED[str(folder)] if embedded else read_json(folder / "unet" / "config.json").get("variant")
    if variant is not None and there != variant:
        raise ArtifactError(
            f"{folder} was made by {VARIANTS.get(str(there), there)} (unet/config.json: variant {there}); "
            f"{variant} was asked for"
        )
    device = start_compute(compute)
    variant_of_weights = None if embedded else only_variant(folder / "unet")
    pipeline = ManyToManyPipeline.from_pretrained(folder, dtype=torch_dtype(compute), variant=variant_of_weights)
    for part in (pipeline.vae, pipeline.unet, pipeline.image_encoder):
        if part is not None:
            part.eval()
    return pipeline.to(device)


def _say_what_is_not_read(sets: Sequence[Tensor], window: int | None) -> None:
    most = max(len(images) for images in sets)
    if window is not None and most > window:
        warnings.warn(
            f"{most} preceding images are given, context_window={window} lets a target read {window} of them",
            stacklevel=4,
        )


def _equal_lengths(sets: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of the sets, those with equally many preceding images together."""
    groups: dict[int, list[int]] = {}
    for number, images in enumerate(sets):
        groups.setdefault(len(images), []).append(number)
    return list(groups.values())


def _is_embedded(folder: Path) -> bool:
    return str(folder) in EMBEDDED and not folder.exists()
