"""Image sets as training and evaluation read them: which sets, in which order, which N images of each.

Belongs here: orders, choices, reading sets back. Not here: the bytes of a shard (`m2m.data.shards`), making sets.
"""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from pydantic import Field, ValidationError

from m2m.artifacts import write_bytes, write_json
from m2m.config import Settings
from m2m.data.shard_reader import ShardFolder
from m2m.data.verified import verify_once
from m2m.errors import ArtifactError, ConfigError
from m2m.generation.noise import keyed_generator, namespaced

INDEX, SETS = "index.json", "sets.parquet"
LATENTS, FEATURES, SCALES = "latents.npy", "features.npy", "scales.npy"


class SetsIndex(Settings):
    """`index.json` of a generate-sets output: what all of its sets have in common."""

    format_version: int = 1
    shards: int
    sets_per_shard: int
    splits: dict[str, int]
    images_per_set: int
    image_size: int
    latent_shape: tuple[int, int, int]
    pictures: str | None


class FeaturesIndex(Settings):
    """`index.json` of a cache-features output."""

    format_version: int = 1
    shards: int
    splits: dict[str, int]
    images_per_set: int = Field(description="N: the first N - 1 chosen images of a set are there")
    choice_seed: int
    tokens: int
    width: int
    storage: str


class SetTable:
    """Where each set of a folder lies, `sets.parquet`: id, shard, position in the shard, split; in the order of shards.

    Columns, not rows: twelve million sets take 200 MB.
    """

    COLUMNS = pa.schema([("id", pa.int64()), ("shard", pa.int32()), ("position", pa.int32()), ("split", pa.string())])

    def __init__(self, folder: Path, split: str | None) -> None:
        try:
            filters = [("split", "=", split)] if split is not None else None
            table = pq.read_table(folder / SETS, columns=["id", "shard", "position"], filters=filters)
        except (OSError, pa.ArrowInvalid) as error:
            raise ArtifactError(f"{folder / SETS}: can't be read: {error}") from None
        self.ids, self.shards, self.positions = (table.column(name).to_numpy() for name in table.column_names)

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def write(folder: Path, shards: Iterable[tuple[int, Sequence[int], Sequence[str]]]) -> dict[str, int]:
        """Write where sets lie, from (shard, ids in the order of positions, their splits); returns sets by split."""
        tables = [
            pa.table([ids, [shard] * len(ids), range(len(ids)), splits], schema=SetTable.COLUMNS)
            for shard, ids, splits in shards
        ]
        table = pa.concat_tables([SetTable.COLUMNS.empty_table(), *tables])
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        write_bytes(folder / SETS, sink.getvalue())
        counts = table.column("split").value_counts().to_pylist()
        return {entry["values"]: entry["counts"] for entry in counts}


class ImageSets:
    """The image sets of a generate-sets output, by position in the split.

    Args:
        verify: check each shard's bytes when it is first read (once on a machine), and refuse damaged ones.

    Raises:
        ArtifactError: the folder is no such output, or has no set in the split.
    """

    def __init__(self, folder: Path | str, split: str | None = None, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder, SetsIndex)
        self.split = split
        self.table = SetTable(self.folder, split)
        if not len(self.table):
            there = ", ".join(f"{count} in {name}" for name, count in self.index.splits.items() if count) or "none"
            raise ArtifactError(f"{self.folder} has no sets in the {split or 'whole'} split. There are: {there}")
        self._shards = ShardFolder(self.folder, opening=verify_once if verify else None)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents."""
        return self.index.latent_shape

    @property
    def image_size(self) -> int:
        """Height and width of a picture in pixels."""
        return self.index.image_size

    @property
    def images_per_set(self) -> int:
        return self.index.images_per_set

    @property
    def sets_per_shard(self) -> int:
        """How many neighbouring sets of this split lie in one file, on average: `epoch_order`'s `per_shard`."""
        return -(-len(self) // max(1, self.index.shards))

    def caption_id(self, i: int) -> int:
        return int(self.table.ids[i])

    def place(self, i: int) -> tuple[int, int]:
        """The set's shard and its position in it."""
        return int(self.table.shards[i]), int(self.table.positions[i])

    def first_of_shards(self) -> dict[int, int]:
        """For each shard, which set of this split is its first (the others follow)."""
        shards, first = np.unique(self.table.shards, return_index=True)
        return dict(zip(shards.tolist(), first.tolist()))

    def caption(self, i: int) -> str:
        return self.said(i)["caption"]

    def said(self, i: int) -> dict[str, Any]:
        """What is noted of the set: id, caption, split."""
        shard, position = self.place(i)
        return json.loads(self._shards[shard].read(position, "json"))

    def latents(self, i: int, which: Sequence[int] | None = None) -> torch.Tensor:
        """Latents as the U-Net sees them (scaled), float32 (images, C, h, w); all images or the ones named."""
        shard, position = self.place(i)
        rows = range(self.images_per_set) if which is None else which
        return torch.from_numpy(self._shards[shard].rows(position, LATENTS, rows).astype(np.float32))

    def pictures(self, i: int, which: Sequence[int]) -> torch.Tensor:
        """Stored pictures, uint8 (n, 3, H, W).

        Raises:
            ArtifactError: the sets were made without pictures.
        """
        kind = self.index.pictures
        if kind is None:
            raise ArtifactError(
                f"{self.folder} holds latents only: decode them with the VAE, or make the sets with "
                "generate-sets store_images=png"
            )
        shard, position = self.place(i)
        reader = self._shards[shard]
        decoded = [decode_picture(reader.read(position, picture_name(image, kind))) for image in which]
        return (
            torch.stack(decoded) if decoded else torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
        )


class TrainingSets(torch.utils.data.Dataset):
    """What a training step reads of a set: N latents and, for M2M-DINO, the features of the N - 1 that are context.

    Every shard's checksums are verified when it is first read.

    Args:
        sets_folder: a generate-sets output.
        split: usually "train".
        images_per_set: N of the paper (5).
        seed: chooses the N images; must be cache-features' `choice_seed` where features are read.
        features_folder: a cache-features output; None to train without or to encode while training.
        frozen_choice: the same N images in every epoch; False draws anew each epoch (see `set_epoch`), which cached
            features can't serve.

    Raises:
        ArtifactError, ConfigError: the folders don't fit each other or what is asked for.
    """

    def __init__(
        self,
        sets_folder: Path | str,
        split: str,
        images_per_set: int,
        seed: int,
        features_folder: Path | str | None = None,
        frozen_choice: bool = True,
    ) -> None:
        self.sets = ImageSets(sets_folder, split, verify=True)
        self.images_per_set, self.seed, self.frozen_choice = images_per_set, seed, frozen_choice
        self.epoch = 0
        if images_per_set > self.sets.images_per_set:
            raise ConfigError(f"images_per_set is {images_per_set}, but sets hold {self.sets.images_per_set} images")
        self._kept = np.arange(len(self.sets))
        self._features = None if features_folder is None else _CachedFeatures(Path(features_folder), self)
        if self._features is not None:
            self._kept = self._features.present(self.sets)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def sets_per_shard(self) -> int:
        return self.sets.sets_per_shard

    def set_epoch(self, epoch: int) -> None:
        """Choose other images from now on, unless the choice is frozen; before a DataLoader's workers start."""
        self.epoch = epoch

    def images(self, sample: int) -> list[int]:
        """Which images of the set are read, in the order of the sequence."""
        caption, per_set = self.sets.caption_id(int(self._kept[sample])), self.sets.images_per_set
        seed = self.seed if self.frozen_choice else namespaced(self.seed, f"epoch {self.epoch}")
        return chosen_images(caption, seed, per_set, self.images_per_set)

    def __getitem__(self, sample: int) -> dict[str, Any]:
        """`latents` (N, C, h, w) float32, `sample`, and `features` (N - 1, S, D) float32 where cached."""
        i = int(self._kept[sample])
        found: dict[str, Any] = {"latents": self.sets.latents(i, self.images(sample)), "sample": int(sample)}
        if self._features is not None:
            found["features"] = self._features.read(self.sets.caption_id(i), self.images_per_set - 1)
        return found


class _CachedFeatures:
    def __init__(self, folder: Path, wanted: TrainingSets) -> None:
        self.index = index = read_index(folder, FeaturesIndex)
        if not wanted.frozen_choice:
            raise ConfigError("frozen_choice=false needs features of all images: encode while training, or freeze it")
        if index.choice_seed != wanted.seed:
            raise ConfigError(
                f"{folder} caches the images that choice_seed {index.choice_seed} chooses; training asks for "
                f"{wanted.seed}: give both the same"
            )
        if index.images_per_set < wanted.images_per_set:
            raise ConfigError(
                f"{folder} caches features for {index.images_per_set} images a set; training asks for "
                f"{wanted.images_per_set}: raise cache-features' images_per_set"
            )
        self._table = SetTable(folder, wanted.sets.split)
        if not len(self._table):
            raise ArtifactError(
                f"{folder} has no features of the {wanted.sets.split} split; see cache-features' splits"
            )
        self._order = np.argsort(self._table.ids, kind="stable")
        self._shards = ShardFolder(folder, opening=verify_once)

    def present(self, sets: ImageSets) -> np.ndarray:
        """The positions of the sets that have features (some may have failed)."""
        return np.flatnonzero(np.isin(sets.table.ids, self._table.ids))

    def read(self, caption_id: int, images: int) -> torch.Tensor:
        row = self._order[np.searchsorted(self._table.ids, caption_id, sorter=self._order)]
        reader, position = self._shards[int(self._table.shards[row])], int(self._table.positions[row])
        features = torch.from_numpy(reader.rows(position, FEATURES, range(images)).astype(np.float32))
        if self.index.storage == "int8":
            features *= torch.from_numpy(reader.rows(position, SCALES, range(images)))[..., None]
        return features


IndexKind = TypeVar("IndexKind", SetsIndex, FeaturesIndex)


def read_index(folder: Path, kind: type[IndexKind]) -> IndexKind:
    """The folder's `index.json`.

    Raises:
        ArtifactError: missing, or of another kind of output.
    """
    try:
        return kind.model_validate_json((folder / INDEX).read_bytes())
    except OSError:
        maker = "generate-sets" if kind is SetsIndex else "cache-features"
        raise ArtifactError(f"{folder} holds no whole {maker} output: {INDEX} is missing") from None
    except ValidationError as error:
        raise ArtifactError(f"{folder / INDEX} is of another kind: {error.errors()[0]['loc']} is wrong") from None


def write_index(folder: Path, index: SetsIndex | FeaturesIndex) -> None:
    write_json(folder / INDEX, index.model_dump(mode="json"))


def picture_name(image: int, kind: str) -> str:
    """The name of an image's picture in a shard: `07.png`."""
    return f"{image:02d}.{kind}"


def decode_picture(content: bytes) -> torch.Tensor:
    """An encoded picture as uint8 (3, H, W)."""
    with Image.open(io.BytesIO(content)) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def epoch_order(n: int, per_shard: int, seed: int, epoch: int, window: int = 16) -> np.ndarray:
    """The order in which an epoch reads `n` sets: shards shuffled, then sets shuffled inside a window of shards.

    A pure function, so that (seed, epoch, step) is all there is to resume, on any number of ranks and workers.

    Args:
        per_shard: neighbouring sets that lie in one file.
        window: shards whose sets are mixed; bounds the files that are read at a time.

    Returns:
        int64 permutation of range(n).
    """
    drawn = keyed_generator(namespaced(seed, "epoch order"), epoch)
    shards = drawn.permutation(-(-n // per_shard))
    order, at = np.empty(n, np.int64), 0
    for first in range(0, len(shards), window):
        ids = [
            np.arange(shard * per_shard, min(n, (shard + 1) * per_shard), dtype=np.int64)
            for shard in shards[first : first + window]
        ]
        mixed = drawn.permutation(np.concatenate(ids))
        order[at : at + len(mixed)] = mixed
        at += len(mixed)
    return order


def chosen_images(caption_id: int, seed: int, per_set: int = 25, n: int = 5) -> list[int]:
    """Which `n` of a set's images training reads, in order: frozen per set, so that features can be cached for them.

    A smaller `n` is a prefix of a larger one. The cache holds the first n - 1 (the last image is no context).

    Raises:
        ValueError: the set has fewer than `n` images.
    """
    if n > per_set:
        raise ValueError(f"{n} images of a set of {per_set} were asked for")
    return keyed_generator(namespaced(seed, "chosen images"), caption_id).permutation(per_set)[:n].tolist()
