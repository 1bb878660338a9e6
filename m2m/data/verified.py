"""Whether a shard's files are still the ones that were written: looked at, or read to the last byte.

Belongs here: sizes, checksums, remembering that a shard was found sound. Not here: mending (`m2m.data.shard_repair`).
"""

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from m2m.data.shard_reader import ShardReader
from m2m.data.shards import ShardPaths, ShardRecord, read_record
from m2m.data.tars import blocks_of, open_tar
from m2m.errors import ArtifactError


def is_current(out: Path, number: int, fingerprint: str) -> bool:
    """Whether the shard is whole (by sizes) and was made from the same things in the same way."""
    paths = ShardPaths(out, number)
    try:
        record = read_record(out, number)
        return (
            record.fingerprint == fingerprint
            and record.bytes == _size(paths)
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
    found += _tar_faults(paths, record, content=content)
    return found or _index_faults(out, number, record)


def _tar_faults(paths: ShardPaths, record: ShardRecord, *, content: bool) -> list[str]:
    try:
        tar = open_tar(paths)
    except OSError:
        return [f"{paths.tar} is missing"]
    with contextlib.closing(tar):
        if tar.size != record.bytes:
            return [f"{paths.tar} has {tar.size} bytes, not {record.bytes}"]
        digest = hashlib.sha256()
        for block in blocks_of(tar) if content else ():
            digest.update(block)
        if content and digest.hexdigest() != record.sha256:
            return [f"{paths.tar} has other content than when it was made"]
    return []


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


def verify_once(out: Path, number: int) -> None:
    """Verify a shard, read whole, unless that was done before on this machine and its files are still the same ones.

    The same: size, time and inode, of a tar that lies elsewhere what its store says.

    Other processes that open it meanwhile wait. The memory lies beside the output, in `.verified/`; where nothing can
    be written, each process verifies for itself.

    Raises:
        ArtifactError: the shard is damaged.
    """
    paths = ShardPaths(out, number)
    with _mark(out.parent / ".verified" / out.name / f"{number:05d}") as mark:
        found = _state(paths)
        if found and mark is not None and mark.read() == found:
            return
        if faults := shard_faults(out, number):
            raise ArtifactError(f"{'; '.join(faults)}. Mend it with: python -m m2m shards repair")
        if mark is not None:
            mark.seek(0)
            mark.truncate()
            mark.write(found)


def _state(paths: ShardPaths) -> str:
    try:
        with contextlib.closing(open_tar(paths)) as tar:
            tars = tar.state
        states = [path.stat() for path in (paths.index, paths.record)]
    except OSError:
        return ""  # no mark says this
    return " ".join([tars, *(f"{state.st_size}:{state.st_mtime_ns}:{state.st_ino}" for state in states)])


def _size(paths: ShardPaths) -> int:
    with contextlib.closing(open_tar(paths)) as tar:
        return tar.size


@contextlib.contextmanager
def _mark(path: Path) -> Iterator[IO[str] | None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError:
        yield None
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file
