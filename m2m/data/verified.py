"""Checksums verified on first read: a shard's bytes are read whole once on a machine, by the first who opens it.

Belongs here: remembering that a shard was found sound. Not here: what makes a shard sound (`m2m.data.shards`).
"""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from m2m.data.shards import ShardPaths, shard_faults
from m2m.errors import ArtifactError


def verify_once(out: Path, number: int) -> None:
    """Verify a shard unless it was verified before and its files are still the same ones (size, time, inode).

    Other processes that open it meanwhile wait. The memory lies beside the output, in `.verified/`; where nothing can
    be written, each process verifies for itself.

    Raises:
        ArtifactError: the shard is damaged.
    """
    paths = ShardPaths(out, number)
    with _mark(out.parent / ".verified" / out.name / f"{number:05d}") as mark:
        found = _state(paths)
        if mark is not None and mark.read() == found:
            return
        if faults := shard_faults(out, number):
            raise ArtifactError(f"{'; '.join(faults)}. Mend it with: python -m m2m shards repair")
        if mark is not None:
            mark.seek(0)
            mark.truncate()
            mark.write(found)


def _state(paths: ShardPaths) -> str:
    try:
        states = [path.stat() for path in (paths.tar, paths.index, paths.record)]
    except OSError:
        return ""  # no mark says this
    return " ".join(f"{state.st_size}:{state.st_mtime_ns}:{state.st_ino}" for state in states)


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
