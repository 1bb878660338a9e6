"""Shards: plain WebDataset tars of equal bytes for equal work, with an index that makes any set one read away.

Belongs here: writing, verifying and reading `NNNNN.{tar,idx,json}`. Not here: what a set holds (`m2m.data.sets`).
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
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


class ShardReader:
    """Random access to the sets of one shard; may be used by forked workers (reads carry their own offset).

    Raises:
        ArtifactError: the shard is not there or its files do not fit together.
    """

    def __init__(self, out: Path, number: int) -> None:
        self.paths = ShardPaths(out, number)
        self.record = read_record(out, number)
        try:
            lines = [json.loads(line) for line in self.paths.index.read_text(encoding="utf-8").splitlines()]
            self._file = self.paths.tar.open("rb", buffering=0)
            self.keys: list[str] = [line["key"] for line in lines]
            self._places: list[dict[str, list[int]]] = [line["files"] for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{self.paths.index}: can't be read: {error}; `m2m shards verify` tells more") from None
        self._layouts: dict[int, tuple[np.dtype, tuple[int, ...], int]] = {}

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def end(self) -> int:
        """Where the last file ends that the index points to, in bytes."""
        return max((offset + size for places in self._places for offset, size in places.values()), default=0)

    def names(self, position: int) -> list[str]:
        """The names of a set's files."""
        return list(self._places[position])

    def read(self, position: int, name: str) -> bytes:
        """One file of the set at `position`.

        Raises:
            ArtifactError: the set has no such file, or the tar is cut short.
        """
        offset, size = self._place(position, name)
        return self._read_at(offset, size)

    def array(self, position: int, name: str) -> np.ndarray:
        """A `.npy` file of the set."""
        return np.load(io.BytesIO(self.read(position, name)), allow_pickle=False)

    def rows(self, position: int, name: str, rows: Sequence[int]) -> np.ndarray:
        """Some rows of a `.npy` file, reading these only; like `array(...)[rows]`."""
        offset, _ = self._place(position, name)
        dtype, shape, start = self._layout(offset)
        stride = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        found = np.empty((len(rows), *shape[1:]), dtype)
        for i, row in enumerate(rows):
            if not 0 <= row < shape[0]:
                raise IndexError(f"row {row} of {shape[0]} in {self.keys[position]}.{name}")
            found[i] = np.frombuffer(self._read_at(offset + start + row * stride, stride), dtype).reshape(shape[1:])
        return found

    def close(self) -> None:
        self._file.close()

    def _place(self, position: int, name: str) -> list[int]:
        place = self._places[position].get(name)
        if place is None:
            raise ArtifactError(f"{self.paths.tar}: set {self.keys[position]} has no {name}")
        return place

    def _layout(self, offset: int) -> tuple[np.dtype, tuple[int, ...], int]:
        if offset not in self._layouts:
            head = io.BytesIO(self._read_at(offset, 128))
            np.lib.format.read_magic(head)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(head)
            if fortran:
                raise ArtifactError(f"{self.paths.tar}: an array in Fortran order")
            self._layouts[offset] = (dtype, shape, head.tell())
        return self._layouts[offset]

    def _read_at(self, offset: int, size: int) -> bytes:
        content = os.pread(self._file.fileno(), size, offset)
        if len(content) != size:
            raise ArtifactError(f"{self.paths.tar} is cut short: {size} bytes at {offset} are not there")
        return content


class ShardFolder:
    """The readers of a folder's shards, a bounded number of them open.

    Args:
        opening: is called with the folder and a shard's number before it is opened, for example to verify it.
    """

    def __init__(self, out: Path, keep: int = 64, opening: Callable[[Path, int], None] | None = None) -> None:
        self._out, self._keep, self._opening = out, keep, opening
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    def __getitem__(self, number: int) -> ShardReader:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if self._opening is not None:
            self._opening(self._out, number)
        reader = self._open[number] = ShardReader(self._out, number)
        if len(self._open) > self._keep:
            self._open.popitem(last=False)[1].close()
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": OrderedDict()}  # spawned workers open their own


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


def is_current(out: Path, number: int, fingerprint: str) -> bool:
    """Whether the shard is whole (by sizes) and was made from the same things in the same way."""
    paths = ShardPaths(out, number)
    try:
        record = read_record(out, number)
        return (
            record.fingerprint == fingerprint
            and record.bytes == paths.tar.stat().st_size
            and hashlib.sha256(paths.index.read_bytes()).hexdigest() == record.index_sha256
        )
    except (ArtifactError, OSError):
        return False


def shard_faults(out: Path, number: int, *, content: bool = True) -> list[str]:
    """What is wrong with a shard: missing files, sizes, an index that does not fit and, with `content`, other bytes."""
    paths = ShardPaths(out, number)
    try:
        record = read_record(out, number)
    except ArtifactError as error:
        return [str(error)]
    found = []
    if record.shard != number:
        found.append(f"{paths.record} is of shard {record.shard}")
    index = paths.index.read_bytes() if paths.index.is_file() else None
    if index is None:
        found.append(f"{paths.index} is missing")
    elif hashlib.sha256(index).hexdigest() != record.index_sha256:
        found.append(f"{paths.index} has other content than when it was made")
    size = paths.tar.stat().st_size if paths.tar.is_file() else None
    if size is None:
        found.append(f"{paths.tar} is missing")
    elif size != record.bytes:
        found.append(f"{paths.tar} has {size} bytes, not {record.bytes}")
    elif content:
        with paths.tar.open("rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != record.sha256:
                found.append(f"{paths.tar} has other content than when it was made")
    return found or _index_faults(out, number, record)


def _index_faults(out: Path, number: int, record: ShardRecord) -> list[str]:
    """Whether an index of the right bytes also fits its tar; only a fault of the writer's could make it not."""
    try:
        reader = ShardReader(out, number)
    except ArtifactError as error:
        return [str(error)]
    reader.close()
    found = []
    if len(reader) != record.sets:
        found.append(f"{reader.paths.index} lists {len(reader)} sets, not {record.sets}")
    if reader.end > record.bytes:
        found.append(f"{reader.paths.index} points beyond the end of {reader.paths.tar.name}")
    return found


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


def adopt(source: Path, out: Path, number: int, fingerprint: str) -> bool:
    """Take over a shard of another output when it is the same work; tells whether it did.

    So more captions, or others elsewhere in the file, do not make whole shards anew. Links where it can, else copies.
    """
    if not is_current(source, number, fingerprint) or shard_faults(source, number):
        return False
    there, here = ShardPaths(source, number), ShardPaths(out, number)
    here.tar.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(out, number)
    temporary = here.tar.with_name(f".{here.tar.name}.tmp")
    try:
        os.link(there.tar, temporary)
    except OSError:
        with there.tar.open("rb") as old, temporary.open("wb") as new:
            while block := old.read(1 << 24):
                new.write(block)
            new.flush()
            os.fsync(new.fileno())
    os.replace(temporary, here.tar)
    write_bytes(here.index, there.index.read_bytes())
    write_bytes(here.record, there.record.read_bytes())
    return True


def clear_leftovers(out: Path, number: int) -> None:
    """Remove what a killed writer of this shard left; the caller holds the shard's lock."""
    for leftover in (out / FOLDER).glob(f".{number:05d}.*"):
        leftover.unlink(missing_ok=True)
