"""Shards: plain WebDataset tars of equal bytes for equal work, with an index that makes any set one read away.

Belongs here: writing `NNNNN.{tar,idx,json}`, their records. Not here: reading (`m2m.data.shard_reader`), whether their
bytes are still the ones (`m2m.data.verified`), what a set holds (`m2m.data.sets`).
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydantic import Field, ValidationError

from m2m.artifacts import sync_folder, write_bytes, write_json
from m2m.config import Settings
from m2m.errors import ArtifactError

FOLDER = "shards"
FORMAT_VERSION = 1
_BLOCK = 512


class Failure(Settings):
    """A set that is not there, and why: it could not be made, or the content filter dropped it."""

    key: str
    error: str


class ShardRecord(Settings):
    """What `NNNNN.json` says of a shard; written last, so a shard without it is not there."""

    format_version: int = FORMAT_VERSION
    shard: int
    sets: int
    bytes: int = Field(description="of the tar")
    sha256: str = Field(description="of the tar")
    index_sha256: str
    fingerprint: str = Field(description="what the shard was made from and how")
    failed: list[Failure] = []
    dropped: list[Failure] = Field(default=[], description="by the content filter")

    def written(self) -> dict[str, Any]:
        """As it stands on disk: without what a shard made without a content filter can't have."""
        return self.model_dump(exclude=set() if self.dropped else {"dropped"})


@dataclass(frozen=True)
class ShardPaths:
    """The three files of a shard below `<out>/shards`."""

    out: Path
    number: int

    def path(self, ending: str) -> Path:
        return self.out / FOLDER / f"{self.number:05d}.{ending}"

    @property
    def tar(self) -> Path:
        return self.path("tar")

    @property
    def index(self) -> Path:
        return self.path("idx")

    @property
    def record(self) -> Path:
        return self.path("json")


class ShardWriter:
    """Writes one shard; nothing of it is seen before `finish`, whose last act is the json file.

    The caller holds the shard's lock: what a killed writer left is overwritten.
    """

    def __init__(self, out: Path, number: int, fingerprint: str) -> None:
        self._paths = ShardPaths(out, number)
        self._fingerprint = fingerprint
        self._sets: list[tuple[str, dict[str, list[int]]]] = []
        self._failed: list[Failure] = []
        self._dropped: list[Failure] = []
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._paths.tar.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(out, number)
        self._temporary = self._paths.tar.with_name(f".{self._paths.tar.name}.tmp")
        self._file: IO[bytes] = self._temporary.open("wb")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if failed is None:
            self.finish()
        else:
            self._discard()

    def add(self, key: str, files: Mapping[str, bytes]) -> None:
        """Append a set: `{"latents.npy": ..., "json": ...}` becomes `<key>.latents.npy`, `<key>.json`.

        Raises:
            ValueError: a dot in the key (WebDataset splits names at the first one).
        """
        if "." in key or "/" in key:
            raise ValueError(f"{key!r}: a key holds neither dots nor slashes")
        places = {}
        for name, content in files.items():
            header = tarfile.TarInfo(f"{key}.{name}")
            header.size, header.mtime, header.mode = len(content), 0, 0o644
            self._write(header.tobuf(tarfile.USTAR_FORMAT))
            places[name] = [self._bytes, len(content)]
            self._write(content)
            self._write(b"\0" * (-len(content) % _BLOCK))
        self._sets.append((key, places))

    def fail(self, key: str, error: str) -> None:
        """Note a set that could not be made; the others of the shard go on."""
        self._failed.append(Failure(key=key, error=error))

    def drop(self, key: str, reason: str) -> None:
        """Note a set that the content filter does not let pass."""
        self._dropped.append(Failure(key=key, error=reason))

    def finish(self) -> ShardRecord:
        """Close the tar and put tar, index and record in place, in this order.

        Raises:
            ArtifactError: the disk is full or broken; nothing of the shard is left.
        """
        try:
            return self._finish()
        except OSError as error:
            self._discard()
            for path in (self._paths.record, self._paths.index, self._paths.tar):
                path.unlink(missing_ok=True)
            raise _not_written(self._paths.tar, error) from error

    def _finish(self) -> ShardRecord:
        self._file.write(self._hashed(b"\0" * (2 * _BLOCK)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._paths.record.unlink(missing_ok=True)  # of the shard that this one replaces
        os.replace(self._temporary, self._paths.tar)
        sync_folder(self._paths.tar.parent)
        index = _encoded_index(self._sets)
        write_bytes(self._paths.index, index)
        record = ShardRecord(
            shard=self._paths.number,
            sets=len(self._sets),
            bytes=self._bytes,
            sha256=self._hash.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
            fingerprint=self._fingerprint,
            failed=self._failed,
            dropped=self._dropped,
        )
        write_json(self._paths.record, record.written())
        return record

    def _write(self, content: bytes) -> None:
        try:
            self._file.write(self._hashed(content))
        except OSError as error:
            self._discard()
            raise _not_written(self._paths.tar, error) from error

    def _hashed(self, content: bytes) -> bytes:
        self._hash.update(content)
        self._bytes += len(content)
        return content

    def _discard(self) -> None:
        with contextlib.suppress(OSError):  # closing writes what is buffered, which a full disk refuses again
            self._file.close()
        clear_leftovers(self._paths.out, self._paths.number)


def _not_written(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"{path}: can't be written: {error.strerror or error}. Nothing of this shard is left, the whole ones stand: "
        "mend the disk (or free space) and give the same command again"
    )


def npy_bytes(array: np.ndarray) -> bytes:
    """The bytes of a `.npy` file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def read_record(out: Path, number: int) -> ShardRecord:
    """The shard's record.

    Raises:
        ArtifactError: missing, or not one.
    """
    path = ShardPaths(out, number).record
    try:
        return ShardRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(f"{path}: no record of a whole shard ({' '.join(str(error).split())[:200]})") from None


def rebuild_index(out: Path, number: int) -> bool:
    """Write a lost or damaged index again from the tar; tells whether it is now the one that the record asks for."""
    paths = ShardPaths(out, number)
    lines: dict[str, dict[str, list[int]]] = {}
    try:
        record = read_record(out, number)
        with tarfile.open(paths.tar, "r:") as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                lines.setdefault(key, {})[name] = [member.offset_data, member.size]
    except (ArtifactError, OSError, tarfile.TarError):
        return False
    index = _encoded_index(lines.items())
    if hashlib.sha256(index).hexdigest() != record.index_sha256:
        return False
    write_bytes(paths.index, index)
    return True


def _encoded_index(sets: Iterable[tuple[str, Mapping[str, Sequence[int]]]]) -> bytes:
    return "".join(f"{json.dumps({'key': key, 'files': places})}\n" for key, places in sets).encode()


def clear_leftovers(out: Path, number: int) -> None:
    """Remove what a killed writer of this shard left; the caller holds the shard's lock."""
    for leftover in (out / FOLDER).glob(f".{number:05d}.*"):
        leftover.unlink(missing_ok=True)
