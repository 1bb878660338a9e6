"""A folder of blocks of files that lie far away: bounded, shared by all processes of a machine, safe to delete.

Belongs here: keeping, finding and throwing away blocks. Not here: fetching them (`m2m.data.tars`).
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

_TO_BE_LEFT = 0.9  # of the limit, after blocks were thrown away: not every new block then costs a listing


class BlockCache:
    """Blocks by file and number. What was not read for longest goes first.

    Args:
        limit: bytes that all blocks together may have; a new block is counted before it is written.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit

    def get(self, file: str, number: int) -> bytes | None:
        """A block, or None where it is not (or no longer) kept."""
        path = self._path(file, number)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return content

    def put(self, file: str, number: int, content: bytes) -> None:
        """Keep a block. Where nothing can be written (a full or read-only disk) it is not kept."""
        path = self._path(file, number)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            if len(content) > self._limit:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._total() as total:
                if total[0] + len(content) > self._limit:
                    total[0] = self._thrown_away(int(_TO_BE_LEFT * self._limit) - len(content))
                total[0] += len(content)
            try:
                path.parent.mkdir(exist_ok=True)
                temporary.write_bytes(content)
                os.replace(temporary, path)
            except OSError:
                temporary.unlink(missing_ok=True)

    def _path(self, file: str, number: int) -> Path:
        return self._folder / hashlib.sha256(file.encode()).hexdigest()[:24] / f"{number:08d}"

    @contextlib.contextmanager
    def _total(self) -> Iterator[list[int]]:
        """The bytes of all blocks, to be changed by one process at a time."""
        with (self._folder / "bytes").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            said = file.read()
            total = [int(said) if said.isdigit() else self._thrown_away(self._limit)]
            yield total
            file.seek(0)
            file.truncate()
            file.write(str(total[0]))

    def _thrown_away(self, left: int) -> int:
        """Delete the blocks that were not read for longest until so many bytes are left; returns what is left."""
        found = []
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(OSError):  # another process may have thrown it away
                state = path.stat()
                found.append((state.st_mtime_ns, state.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= left:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total
