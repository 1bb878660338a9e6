"""Image sets: many images of one caption from as many noises (the paper's section 4).

Belongs here: running the text-to-image model over captions. Not here: noise (`noise`), files (`m2m.data.shards`).
"""

import contextlib
import importlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from pydantic import Field

from m2m.artifacts import write_bytes
from m2m.config import Compute, Later, ModelSource, StageConfig, is_hub_id, resolve
from m2m.data.captions import SPLITS, caption_shards, count_captions
from m2m.data.sets import LATENTS, ImageSets, SetsIndex, SetTable, picture_name, write_index
from m2m.data.shard_reader import ShardReader
from m2m.data.shards import ShardWriter, npy_bytes
from m2m.errors import ArtifactError, ConfigError, InputError
from m2m.generation.drawn import drawn_pictures
from m2m.generation.noise import keyed_normal, namespaced
from m2m.generation.one_behind import one_behind
from m2m.generation.shard_work import (
    PlannedShard,
    check_shards,
    drop_leftovers,
    make_shards,
    settings_of,
    shard_fingerprint,
)
from m2m.models.autoencoder import decode_latents, encode_images, pixels_per_latent
from m2m.models.sd21 import SD21_BASE_UNET, SD21_VAE_SCALE_FACTOR
from m2m.models.text_to_image import as_ddim, load_text_to_image, load_unet_config, model_folder
from m2m.pictures import contact_sheet
from m2m.stage_run import StageRun

SHEET = "contact_sheet.png"
_SHEET_SETS, _SHEET_IMAGES = 4, 8


class GenerateSets(StageConfig):
    """A set of images for each caption, by a text-to-image model."""

    text_to_image: ModelSource = Field(description="Stable Diffusion: a folder, or a hub id; paper: 2.1 base")
    drawn: Annotated[bool, Later()] = Field(
        default=False,
        description="the tiny world draws what captions name, and of the text-to-image model only the autoencoder is "
        "used: sets of which the truth is known; for the world's captions",
    )
    shards: int = Field(ge=1, description="files to make, each a partition; captions used: shards x sets_per_shard")
    sets_per_shard: int = Field(default=1000, ge=1, description="the last shard may hold fewer")
    per_split: dict[Literal["train", "validation", "test"], Annotated[int, Field(ge=0)]] | None = Field(
        default=None, description="of these splits use at most so many captions"
    )
    images_per_set: int = Field(default=25, ge=1, le=100, description="paper, section 4")
    image_size: int | None = Field(default=None, ge=8, description="pixels; the model's own by default")
    scheduler: Literal["euler", "ddim", "dpmsolver++"] = Field(default="euler", description="paper: Euler Discrete")
    steps: int = Field(default=50, ge=1, description="the paper does not say for MIS; 50 as it has for sampling")
    guidance_scale: float = Field(default=7.5, ge=1, description="paper, section 4")
    seed: int = Field(default=0, ge=0, description="of the noise, with the caption's id and the image's number")
    store_images: Literal["png", "webp", "jpeg"] | None = Field(
        default=None, description="pictures beside the latents; latents alone are the smallest"
    )
    channels_last: Annotated[bool, Later()] = Field(
        default=False, description="weights in the memory format that a GPU's 16-bit convolutions are fastest in"
    )
    compile: Annotated[bool, Later()] = Field(
        default=False, description="torch.compile the U-Net: a minute at the start, then faster; needs a C++ compiler"
    )
    picture_quality: int = Field(default=90, ge=1, le=100, description="of WebP and JPEG")
    decode_batch: int = Field(default=5, ge=1, description="images that the autoencoder decodes at a time")
    max_failed: float = Field(default=0.01, ge=0, lt=1, description="share of sets that may fail (NaN, an error)")
    content_filter: str | None = Field(
        default=None,
        pattern=r"^[\w.]+:\w+$",
        description="`module:function` that is given a caption and its pictures, uint8 (images, 3, H, W), and returns "
        "why the set is dropped, or an empty text",
    )
    compute: Compute = Compute.model_validate({})

    def preview(self, root: Path, variant: str | None) -> list[str]:
        if resolve(self.text_to_image, root).is_dir() or not is_hub_id(self.text_to_image):
            where, unet, pixels = "a folder", load_unet_config(self.text_to_image, root), _pixels(self, root)
        else:
            where, unet, pixels = "from the hub; sizes as of SD 2.1 base", SD21_BASE_UNET, SD21_VAE_SCALE_FACTOR
        side = self.image_size // pixels if self.image_size else unet["sample_size"]
        each, sets = self.images_per_set * unet["in_channels"] * side * side * 2, self.shards * self.sets_per_shard
        return [
            f"text-to-image: {self.text_to_image} ({where})",
            f"{self.shards:,} shards of {self.sets_per_shard:,} sets of {self.images_per_set} images, "
            f"{self.scheduler} with {self.steps} steps: {sets * self.images_per_set * self.steps * 2:,} U-Net passes",
            f"latents: {each / 1e3:,.0f} kB a set, {each * sets / 1e9:,.3f} GB; images: {self.store_images or 'none'}",
        ]


def generate_sets(config: GenerateSets, run: StageRun) -> None:
    """Write shards of sets, `sets.parquet`, `index.json` and a contact sheet into `run.out`.

    A shard holds, for each caption in the order of ids, `latents.npy` (float16 (images, C, h, w), as the U-Net sees
    them), `json` (id, caption, split) and, where asked for, pictures (`00.png`, ...). One set is one batch of the
    U-Net, whose output depends on the batch size in its last bits. Pictures of a set are decoded and encoded while the
    next one is sampled. A set with NaN or infinity, or one that the model
    stumbles over, is left out, noted with its error and tried again by the next run.

    Raises:
        InputError: fewer captions than the shards need, or a size that the model can't make.
        ConfigError: a shard that there is not, a content filter that can't be imported, or sets that are too large for
            the device's memory (the batch is never made smaller: other batches give other bytes).
    """
    captions = run.inputs["captions"]
    expected = _require_captions(config, captions)
    settings = settings_of(config, run, without=("shards", "sets_per_shard", "per_split", "max_failed"))

    per_split: dict[str, int] = {str(split): most for split, most in (config.per_split or {}).items()}

    def planned() -> Iterator[PlannedShard[pd.DataFrame]]:
        parts = caption_shards(captions, config.shards, config.sets_per_shard, per_split)
        for number, part in enumerate(parts):
            content = list(zip(part["id"].tolist(), part["caption"], part["split"]))
            yield PlannedShard(number, part, shard_fingerprint(settings, content))

    maker = SetMaker(config, run.profile.root)

    def fill(shard: PlannedShard[pd.DataFrame], writer: ShardWriter) -> None:
        label = f"shard {shard.number + 1} of {config.shards}"
        rows = run.progress.each(shard.content.to_dict(orient="records"), unit="set", label=label)
        for row, files in one_behind(rows, maker.sampled, maker.finished):
            key = f"{row['id']:09d}"
            try:
                writer.add(key, files.result())
            except SetFailed as error:
                writer.fail(key, str(error))
            except SetDropped as error:
                writer.drop(key, str(error))

    def retry(shard: PlannedShard[pd.DataFrame], keys: Sequence[str]) -> dict[str, Mapping[str, bytes]]:
        found: dict[str, Mapping[str, bytes]] = {}
        again = shard.content.loc[shard.content["id"].isin([int(key) for key in keys])]
        for row in again.to_dict(orient="records"):
            with contextlib.suppress(SetFailed, SetDropped):
                found[f"{row['id']:09d}"] = maker.finished(row, maker.sampled(row))
        return found

    if not make_shards(run, config.shards, planned, fill, retry):
        return
    run.finish_alone()
    drop_leftovers(run.out)
    check_shards(run, config.shards, expected, config.max_failed)
    _write_index(config, run, planned, maker)


class SetFailed(Exception):
    """The model made nothing usable of a caption."""


class SetDropped(Exception):
    """The content filter does not let a set pass."""


class SetMaker:
    """The text-to-image model, loaded when the first set is made, and what it makes.

    Args:
        root: where relative model folders start.
    """

    def __init__(self, config: GenerateSets, root: Path) -> None:
        self._config, self._root = config, root
        self._namespace = namespaced(config.seed, "image sets")
        self._filter = _content_filter(config.content_filter)

    @cached_property
    def pipeline(self) -> StableDiffusionPipeline:
        """The model with the config's scheduler."""
        pipeline = load_text_to_image(self._config.text_to_image, self._root, self._config.compute)
        old = pipeline.scheduler.config
        match self._config.scheduler:
            case "euler":
                pipeline.scheduler = EulerDiscreteScheduler.from_config(old)
            case "ddim":
                pipeline.scheduler = as_ddim(pipeline.scheduler)
            case "dpmsolver++":
                pipeline.scheduler = DPMSolverMultistepScheduler.from_config(old, algorithm_type="dpmsolver++")
        pipeline.set_progress_bar_config(disable=True)
        if self._config.channels_last:
            for part in (pipeline.unet, pipeline.vae):
                part.to(memory_format=torch.channels_last)
        if self._config.compile:
            pipeline.unet.compile(dynamic=False)
        return pipeline

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w).

        Raises:
            InputError: the image size is no multiple of a latent's.
        """
        unet, pixels = self.pipeline.unet.config, pixels_per_latent(self.pipeline.vae)
        size = self._config.image_size or unet["sample_size"] * pixels
        if size % pixels:
            raise InputError(f"generate-sets.image_size: {size} is no multiple of {pixels}, the model's latent pixel")
        return unet["in_channels"], size // pixels, size // pixels

    @property
    def image_size(self) -> int:
        """Pixels along each side."""
        return self.latent_shape[1] * pixels_per_latent(self.pipeline.vae)

    def noise(self, caption_id: int) -> torch.Tensor:
        """The set's starting noises, float32 (images, C, h, w): keyed by (caption, image), free of any batch."""
        images = range(self._config.images_per_set)
        return torch.stack([keyed_normal(self._namespace, caption_id, i, shape=self.latent_shape) for i in images])

    def latents(self, caption_id: int, caption: str) -> np.ndarray:
        """One set's latents as the U-Net sees them, float16 (images, C, h, w)."""
        if self._config.drawn:
            return self._latents_of_drawn(caption_id, caption)
        made: Any = self.pipeline(
            prompt=[caption],
            num_images_per_prompt=self._config.images_per_set,
            height=self.image_size,
            width=self.image_size,
            num_inference_steps=self._config.steps,
            guidance_scale=self._config.guidance_scale,
            latents=self.noise(caption_id).to(self.pipeline.unet.dtype),
            output_type="latent",
            return_dict=False,
        )
        return made[0].float().cpu().numpy().astype(np.float16)

    @torch.no_grad()
    def _latents_of_drawn(self, caption_id: int, caption: str) -> np.ndarray:
        images, size = self._config.images_per_set, self.image_size
        drawn = drawn_pictures(self._namespace, caption_id, caption, images, size)
        return encode_images(self.pipeline.vae, drawn).float().cpu().numpy().astype(np.float16)

    def sampled(self, row: Mapping[str, Any]) -> np.ndarray:
        """The latents of one caption's set.

        Args:
            row: the caption's id, caption and split.

        Raises:
            SetFailed: there are none, and why.
            ConfigError: it does not fit the device's memory, or the U-Net can't be compiled.
        """
        try:
            latents = self.latents(row["id"], row["caption"])
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"generate-sets: a set of {self._config.images_per_set} images does not fit the device's memory: take "
                f"compute.dtype float16, or a smaller images_per_set or image_size ({str(error).splitlines()[0]})"
            ) from error
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if self._config.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                said = " ".join(str(error).split())[:300]
                raise ConfigError(f"generate-sets.compile: torch can't compile the U-Net here: {said}") from error
            raise SetFailed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
        if not np.isfinite(latents).all():
            raise SetFailed("the latents hold NaN or infinity")
        return latents

    def finished(self, row: Mapping[str, Any], latents: np.ndarray) -> dict[str, bytes]:
        """The files of a set.

        Raises:
            SetDropped: the content filter says why.
        """
        pictures = self.decode(latents) if self._filter or self._config.store_images else None
        if self._filter and pictures is not None and (reason := self._filter(row["caption"], pictures)):
            raise SetDropped(reason)
        said = {"caption": row["caption"], "id": row["id"], "split": row["split"]}
        files = {LATENTS: npy_bytes(latents), "json": json.dumps(said, ensure_ascii=False).encode()}
        return files | self.encoded(pictures)

    def decode(self, latents: np.ndarray) -> torch.Tensor:
        """Pictures of stored latents, uint8 (n, 3, H, W).

        Raises:
            ConfigError: so many at a time do not fit the device's memory.
        """
        try:
            return decode_pictures(self.pipeline.vae, torch.from_numpy(latents), self._config.decode_batch)
        except torch.OutOfMemoryError as error:
            said = str(error).splitlines()[0]
            raise ConfigError(
                f"generate-sets: {self._config.decode_batch} pictures do not fit the device's memory beside the U-Net: "
                f"take a smaller decode_batch ({said})"
            ) from error

    def encoded(self, pictures: torch.Tensor | None) -> dict[str, bytes]:
        """The pictures of a set as files by their name in the shard; none unless the config wants them."""
        kind = self._config.store_images
        if kind is None or pictures is None:
            return {}
        return {
            picture_name(i, kind): encode_picture(picture, kind, self._config.picture_quality)
            for i, picture in enumerate(pictures)
        }


@torch.no_grad()
def decode_pictures(vae, latents: torch.Tensor, batch: int) -> torch.Tensor:
    """Scaled latents (n, C, h, w) to pictures, uint8 (n, 3, H, W), some at a time to bound the memory."""
    decoded = [decode_latents(vae, part).float().cpu() for part in latents.split(batch)]
    return (torch.cat(decoded) * 255).round().to(torch.uint8)


def encode_picture(picture: torch.Tensor, kind: str, quality: int) -> bytes:
    """A uint8 (3, H, W) picture as PNG (exact), WebP or JPEG."""
    file = io.BytesIO()
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    image.save(file, format=kind.upper(), **({} if kind == "png" else {"quality": quality}))
    return file.getvalue()


def _content_filter(name: str | None) -> Callable[[str, torch.Tensor], str] | None:
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"generate-sets.content_filter: {name} can't be imported: {error}") from None


def _pixels(config: GenerateSets, root: Path) -> int:
    """Pixels along each side of a latent, from the autoencoder's config alone."""
    path = model_folder(config.text_to_image, root) / "vae" / "config.json"
    try:
        return 2 ** (len(json.loads(path.read_text(encoding="utf-8"))["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"generate-sets.text_to_image: {path} can't be read: {error!r}") from None


def _require_captions(config: GenerateSets, folder: Path) -> int:
    """How many captions will be used."""
    there = count_captions(folder)
    usable = sum(min(there.get(s, 0), (config.per_split or {}).get(s, there.get(s, 0))) for s in SPLITS)
    needed = (config.shards - 1) * config.sets_per_shard + 1
    if usable < needed:
        limits = f" (of {there}, with per_split {config.per_split})" if config.per_split else ""
        raise InputError(
            f"generate-sets: {config.shards} shards of {config.sets_per_shard} sets need at least {needed} captions; "
            f"there are {usable}{limits}. Set shards={-(-usable // config.sets_per_shard)} or filter more captions"
        )
    return min(usable, config.shards * config.sets_per_shard)


def _write_index(config: GenerateSets, run: StageRun, planned, maker: SetMaker) -> None:
    def places() -> Iterator[tuple[int, list[int], list[str]]]:
        for shard in planned():
            reader = ShardReader(run.out, shard.number)
            splits = dict(zip(shard.content["id"].tolist(), shard.content["split"]))
            ids = [int(key) for key in reader.keys]
            reader.close()
            yield shard.number, ids, [splits[i] for i in ids]

    splits = SetTable.write(run.out, places())
    if not splits:
        raise ArtifactError("generate-sets: not one set could be made; see the failures in shards/*.json")
    index = SetsIndex(
        shards=config.shards,
        sets_per_shard=config.sets_per_shard,
        splits={split: splits.get(split, 0) for split in SPLITS},
        images_per_set=config.images_per_set,
        image_size=maker.image_size,
        latent_shape=maker.latent_shape,
        pictures=config.store_images,
    )
    write_index(run.out, index)
    run.count(images=sum(splits.values()) * config.images_per_set, **index.splits)
    sets = ImageSets(run.out)
    shown = range(min(_SHEET_SETS, len(sets)))
    images = range(min(_SHEET_IMAGES, config.images_per_set))
    if config.store_images:
        rows = [sets.pictures(i, images) for i in shown]
    else:
        rows = [maker.decode(sets.latents(i, images).numpy()) for i in shown]
    sheet = contact_sheet(rows, [sets.caption(i) for i in shown])
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    write_bytes(run.out / SHEET, file.getvalue())
    run.picture("Image sets, a row each", run.out / SHEET)
