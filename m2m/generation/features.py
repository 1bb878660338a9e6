"""What DINOv2 sees in the images that training reads (the paper's section 5.2): encoded once, kept beside the sets.

Belongs here: preprocessing, encoding, caching. Not here: reading the cache (`m2m.data.sets`), the model's use of it.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from transformers import Dinov2Model

from m2m.config import Compute, ModelSource, StageConfig, is_hub_id, resolve
from m2m.data.captions import SPLITS
from m2m.data.sets import (
    FEATURES,
    SCALES,
    FeaturesIndex,
    ImageSets,
    SetsIndex,
    SetTable,
    chosen_images,
    read_index,
    write_index,
)
from m2m.data.shard_reader import ShardReader
from m2m.data.shards import ShardWriter, npy_bytes, read_record
from m2m.errors import ArtifactError, ConfigError, InputError
from m2m.generation.image_sets import decode_pictures
from m2m.generation.shard_work import (
    PlannedShard,
    check_shards,
    drop_leftovers,
    make_shards,
    settings_of,
    shard_fingerprint,
)
from m2m.models.text_to_image import load_dino, load_vae, start_compute, torch_dtype
from m2m.stage_run import StageRun

# of the pixels that DINOv2 was trained on
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Split = Literal["train", "validation", "test"]


class CacheFeatures(StageConfig):
    """Encode the images that are context in training: of each set the first N - 1 chosen ones."""

    dino: ModelSource = Field(description="DINOv2: a folder, or a hub id; paper: giant")
    text_to_image: ModelSource | None = Field(
        default=None, description="whose VAE decodes the latents; not needed where pictures are stored"
    )
    feature_size: int | None = Field(
        default=None, ge=1, description="pixels along each side that DINOv2 sees; its own image size by default"
    )
    images_per_set: int = Field(default=5, ge=2, description="N; the last image is no context. Paper: 5 (Self)")
    choice_seed: int = Field(default=0, ge=0, description="which N of a set's images; pretrain must have the same")
    sets: int | None = Field(default=None, ge=1, description="the first so many training sets; paper: 6M (DINO)")
    splits: tuple[Split, ...] = Field(default=("train", "validation"), description="whose sets are encoded")
    storage: Literal["fp16", "int8"] = Field(default="fp16", description="int8: a scale a token, half the size")
    sets_per_batch: int = Field(default=4, ge=1, description="sets that are encoded at a time")
    decode_batch: int = Field(default=4, ge=1, description="images that the VAE decodes at a time")
    max_failed: float = Field(default=0.01, ge=0, lt=1, description="share of sets that may fail (NaN)")
    compute: Compute = Compute.model_validate({})

    def preview(self, root: Path, variant: str | None) -> list[str]:
        path, said = resolve(self.dino, root), f"image encoder: {self.dino}"
        if path.is_dir() or not is_hub_id(self.dino):
            config = _read_config(path / "config.json")
            side = (self.feature_size or config["image_size"]) // config["patch_size"]
            each = (self.images_per_set - 1) * (1 + side * side) * config["hidden_size"]
            each *= 2 if self.storage == "fp16" else 1
            said += f", {1 + side * side} tokens of width {config['hidden_size']}: {each / 1e3:,.0f} kB a set"
        return [said, f"encodes {self.images_per_set - 1} images a set of {', '.join(self.splits) or 'no split'}"]


def cache_features(config: CacheFeatures, run: StageRun) -> None:
    """Write shards of features, numbered as the sets' shards are, `sets.parquet` and `index.json` into `run.out`.

    A set's `features.npy` is (N - 1, tokens, width), float16, or int8 with `scales.npy` (N - 1, tokens) float32. A set
    whose features are not finite, or whose batch the model stumbles over, is noted with its error and tried again by
    the next run.

    Raises:
        ConfigError: a shard that there is not, or batches that are too large for the device's memory.
        InputError: neither pictures nor a VAE, or a set with fewer than N images.
    """
    folder = run.inputs["sets"]
    index = read_index(folder, SetsIndex)
    if config.images_per_set > index.images_per_set:
        raise InputError(
            f"cache-features.images_per_set is {config.images_per_set}; sets hold {index.images_per_set} images"
        )
    if index.pictures is None and config.text_to_image is None:
        raise InputError(
            f"{folder} holds latents only: give cache-features text_to_image, whose VAE decodes them, or make the sets "
            "with pictures (generate-sets store_images=png)"
        )
    settings = settings_of(
        config, run, without=("max_failed", "sets", "splits", *(["text_to_image"] if index.pictures else []))
    )
    places = _places(folder, config.splits, config.sets)

    def planned() -> Iterator[PlannedShard[dict[int, str]]]:
        for number in range(index.shards):
            content = places.get(number, {})
            source = read_record(folder, number).sha256
            yield PlannedShard(number, content, shard_fingerprint(settings, [source, sorted(content.items())]))

    encoder = SetEncoder(config, run.profile.root, folder)

    def chunks(shard: PlannedShard[dict[int, str]]) -> list[list[int]]:
        positions = sorted(shard.content)
        return [positions[i : i + config.sets_per_batch] for i in range(0, len(positions), config.sets_per_batch)]

    def fill(shard: PlannedShard[dict[int, str]], writer: ShardWriter) -> None:
        label = f"shard {shard.number + 1} of {index.shards}"
        for chunk in run.progress.each(chunks(shard), unit="batch", label=label):
            for key, found in encoder.files(shard.number, chunk).items():
                if isinstance(found, str):
                    writer.fail(key, found)
                else:
                    writer.add(key, found)

    def retry(shard: PlannedShard[dict[int, str]], keys: Sequence[str]) -> dict[str, Mapping[str, bytes]]:
        again: dict[str, Mapping[str, bytes]] = {}
        for chunk in chunks(shard):  # whole batches: other batches give other last bits
            if any(encoder.key(shard.number, position) in keys for position in chunk):
                found = encoder.files(shard.number, chunk)
                again |= {key: files for key in keys if isinstance(files := found.get(key), dict)}
        return again

    if not make_shards(run, index.shards, planned, fill, retry):
        return
    run.finish_alone()
    drop_leftovers(run.out)
    check_shards(run, index.shards, sum(map(len, places.values())), config.max_failed)
    _write_index(config, run, places, index.shards)
    if config.storage == "int8":
        _report_error(config, run, places, encoder)


class DinoEncoder:
    """DINOv2 as M2M-DINO reads it: all last hidden states of the whole picture, the class token first.

    Args:
        model: a folder, a hub id, or a loaded model.
        feature_size: pixels along each side that the model sees; its own image size by default.
        root: where relative folders start.
    """

    def __init__(
        self,
        model: str | Path | Dinov2Model,
        compute: Compute | None = None,
        *,
        feature_size: int | None = None,
        root: Path | None = None,
    ) -> None:
        device = start_compute(compute)
        loaded = model if isinstance(model, Dinov2Model) else load_dino(model, root, torch_dtype(compute))
        self.model: Dinov2Model = loaded.to(device).eval()  # type: ignore[arg-type]
        config = self.model.config.to_dict()
        self.feature_size: int = feature_size or config["image_size"]
        self.tokens: int = 1 + (self.feature_size // config["patch_size"]) ** 2
        """S: patches and the class token."""
        self.width: int = config["hidden_size"]
        """D."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), uint8 or floats in [0, 1], to (B, S, D) in the model's type, on its device."""
        pixels = dino_preprocess(images.to(self.model.device), self.feature_size)
        return self.model(pixel_values=pixels.to(self.model.dtype), interpolate_pos_encoding=True).last_hidden_state


def dino_preprocess(
    images: Tensor, size: int, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """Pictures as DINOv2 wants them: the whole of each resized and normalised.

    The model's own preprocessing cuts out the centre, which loses the borders; a set's content may lie there.

    Args:
        images: (B, 3, H, W), uint8 or floats in [0, 1].
        size: pixels along each side.

    Returns:
        float32 (B, 3, size, size).
    """
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    shape = (1, 3, 1, 1)
    return (pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(std).view(shape)


class SetEncoder:
    """Reads sets' pictures, decoding them where only latents are stored, and encodes the chosen ones."""

    def __init__(self, config: CacheFeatures, root: Path, folder: Path) -> None:
        self._config, self._root = config, root
        self._sets = ImageSets(folder)
        self._first = self._sets.first_of_shards()

    @cached_property
    def dino(self) -> DinoEncoder:
        return DinoEncoder(
            self._config.dino, self._config.compute, feature_size=self._config.feature_size, root=self._root
        )

    @cached_property
    def _vae(self):
        assert self._config.text_to_image is not None
        vae = load_vae(self._config.text_to_image, self._root, torch_dtype(self._config.compute))
        return vae.to(start_compute(self._config.compute))  # type: ignore[arg-type]

    def pictures(self, i: int) -> Tensor:
        """The context images of a set, uint8 (N - 1, 3, H, W)."""
        chosen = chosen_images(
            self._sets.caption_id(i), self._config.choice_seed, self._sets.images_per_set, self._config.images_per_set
        )[:-1]
        if self._sets.index.pictures:
            return self._sets.pictures(i, chosen)
        return decode_pictures(self._vae, self._sets.latents(i, chosen), self._config.decode_batch)

    def key(self, shard: int, position: int) -> str:
        """A set's name in the shard, in the sets' and in the features'."""
        return f"{self._sets.caption_id(self._first[shard] + position):09d}"

    def files(self, shard: int, positions: Sequence[int]) -> dict[str, dict[str, bytes] | str]:
        """By their keys the files of some sets of a shard, encoded together, or why there are none.

        Raises:
            ConfigError: they do not fit the device's memory.
        """
        try:
            _, features = self.encode(shard, positions)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"cache-features: {len(positions)} sets do not fit the device's memory: take compute.dtype float16, or "
                f"smaller sets_per_batch and decode_batch ({str(error).splitlines()[0]})"
            ) from error
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return {self.key(shard, position): why for position in positions}
        return {
            self.key(shard, position): stored(found, self._config.storage)
            if torch.isfinite(found).all()
            else "the features hold NaN or infinity"
            for position, found in zip(positions, features)
        }

    def encode(self, shard: int, positions: Sequence[int]) -> tuple[list[int], Tensor]:
        """Caption ids and features, float (sets, N - 1, S, D) on the CPU, of some sets of a shard."""
        rows = [self._first[shard] + position for position in positions]
        pictures = torch.stack([self.pictures(i) for i in rows])
        features = self.dino.encode(pictures.flatten(0, 1)).float().cpu()
        return [self._sets.caption_id(i) for i in rows], features.unflatten(0, pictures.shape[:2])


def stored(features: Tensor, storage: str) -> dict[str, bytes]:
    """The files of one set's features (N - 1, S, D): `features.npy`, and `scales.npy` for int8."""
    if storage == "fp16":
        return {FEATURES: npy_bytes(features.numpy().astype(np.float16))}
    scales = features.abs().amax(-1).clamp(min=1e-12) / 127
    whole = (features / scales[..., None]).round().to(torch.int8)
    return {FEATURES: npy_bytes(whole.numpy()), SCALES: npy_bytes(scales.numpy())}


def _places(folder: Path, splits: Sequence[str], training_sets: int | None) -> dict[int, dict[int, str]]:
    """Of each shard the positions of the sets that are encoded, with their splits."""
    places: dict[int, dict[int, str]] = {}
    for split in splits:
        table = SetTable(folder, split)
        most = training_sets if split == "train" else None
        for shard, position in zip(table.shards[:most].tolist(), table.positions[:most].tolist()):
            places.setdefault(shard, {})[position] = split
    return places


def _write_index(config: CacheFeatures, run: StageRun, places: dict[int, dict[int, str]], shards: int) -> None:
    all_sets = SetTable(run.inputs["sets"], None)
    split_of = {
        int(i): places[shard][position]
        for i, shard, position in zip(all_sets.ids, all_sets.shards.tolist(), all_sets.positions.tolist())
        if position in places.get(shard, {})
    }
    shape: tuple[int, ...] = (0, 0, 0)
    written = []
    for number in range(shards):
        reader = ShardReader(run.out, number)
        ids = [int(key) for key in reader.keys]
        written.append((number, ids, [split_of[i] for i in ids]))
        if ids:
            shape = reader.array(0, FEATURES).shape
        reader.close()
    splits = SetTable.write(run.out, written)
    if split_of and not splits:
        raise ArtifactError("cache-features: not one set could be encoded; see the failures in shards/*.json")
    index = FeaturesIndex(
        shards=shards,
        splits={split: splits.get(split, 0) for split in SPLITS},
        images_per_set=config.images_per_set,
        choice_seed=config.choice_seed,
        tokens=shape[1],
        width=shape[2],
        storage=config.storage,
    )
    write_index(run.out, index)
    run.count(images=sum(splits.values()) * shape[0], **index.splits)
    run.figure(tokens=shape[1], width=shape[2])


def _report_error(config: CacheFeatures, run: StageRun, places: dict[int, dict[int, str]], encoder: SetEncoder) -> None:
    """What int8 costs, measured on the first batch of sets: the error's size in parts of the features' own."""
    shard = min(number for number, content in places.items() if content)
    ids, features = encoder.encode(shard, sorted(places[shard])[: config.sets_per_batch])
    reader = ShardReader(run.out, shard)
    error = size = 0.0
    for caption_id, exact in zip(ids, features):
        if (key := f"{caption_id:09d}") not in reader.keys:  # it failed
            continue
        position = reader.keys.index(key)
        whole, scales = (torch.from_numpy(reader.array(position, name)) for name in (FEATURES, SCALES))
        error += float((whole * scales[..., None] - exact).double().square().sum())
        size += float(exact.double().square().sum())
    reader.close()
    run.figure(int8_relative_error=float(f"{(error / size) ** 0.5:.3g}") if size else None)


def _read_config(path: Path) -> dict:
    try:
        return json.load(io.StringIO(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"cache-features.dino: {path} can't be read: {error}") from None
