"""A shard's tar wherever it lies: beside its index, or far away (S3 and whatever else fsspec reads) by range requests.

Belongs here: reading bytes at an offset, asking again when a store stumbles. Not here: what the bytes are
(`m2m.data.shard_reader`), which blocks are kept here (`m2m.data.block_cache`).
"""

import os
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from m2m.artifacts import read_elsewhere
from m2m.data.block_cache import BlockCache
from m2m.data.shards import FOLDER, ShardPaths
from m2m.errors import ArtifactError, ConfigError, M2MError

BLOCK = 1 << 20
"""Bytes that are asked for at a time: a set's latents at the paper's size, as one request costs more than its bytes."""

CACHE, CACHE_GB = "M2M_SHARD_CACHE", "M2M_SHARD_CACHE_GB"
_ATTEMPTS = 6
_FIRST_WAIT = 0.1  # seconds; doubled after each failure

Answer = TypeVar("Answer")


class Tar(Protocol):
    """Bytes at an offset. May be used by forked workers."""

    @property
    def size(self) -> int: ...

    @property
    def state(self) -> str:
        """Changes when the file does."""
        ...

    def read_at(self, offset: int, size: int) -> bytes:
        """So many bytes, fewer where the file ends."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill a buffer; returns how many bytes there were, fewer where the file ends."""
        ...

    def close(self) -> None: ...


class LocalTar:
    """A tar on this machine; reads carry their own offset.

    Raises:
        OSError: it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._fd = self._file.fileno()

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    @property
    def state(self) -> str:
        found = os.fstat(self._fd)
        return f"{found.st_size}:{found.st_mtime_ns}:{found.st_ino}"

    def read_at(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        return os.preadv(self._fd, [buffer], offset)

    def close(self) -> None:
        self._file.close()


class RemoteTar:
    """A tar at a URL that fsspec knows (`s3://`, `https://`, ...), read block by block, blocks kept in a cache.

    A request that fails is made again, with growing pauses. Credentials and endpoints are the store's own business:
    for S3 `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`.

    Raises:
        ArtifactError: it is not there, may not be read, or the store failed again and again.
    """

    def __init__(self, url: str, cache: BlockCache | None = None) -> None:
        self.url, self._cache = url, cache or default_cache()

    @cached_property
    def _info(self) -> dict[str, Any]:
        return _asked(self.url, "its size", lambda: self._file_system.info(self._path))

    @property
    def size(self) -> int:
        size = self._info.get("size")
        if size is None:
            raise ArtifactError(f"{self.url}: the store does not say how long it is: ranges of it can't be read")
        return int(size)

    @property
    def state(self) -> str:
        said = ("ETag", "etag", "LastModified", "mtime", "created", "size")
        return " ".join(f"{name}={self._info[name]}" for name in said if self._info.get(name) is not None)

    def read_at(self, offset: int, size: int) -> bytes:
        end = min(offset + size, self.size)
        if end <= offset:
            return b""
        numbers = range(offset // BLOCK, -(-end // BLOCK))
        blocks = self._blocks(numbers)
        start = numbers[0] * BLOCK
        return b"".join(blocks)[offset - start : end - start]

    def read_into(self, offset: int, buffer: memoryview) -> int:
        content = self.read_at(offset, len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Nothing is held."""

    def _blocks(self, numbers: range) -> list[bytes]:
        """Neighbouring blocks; those that are not in the cache come in one request."""
        key = f"{self.url} {self.state}"
        found = {number: self._cache.get(key, number) for number in numbers}
        missing = [number for number in numbers if len(found[number] or b"") != self._length(number)]
        if missing:
            first, last = missing[0], missing[-1]
            fetched = self._range(first * BLOCK, last * BLOCK + self._length(last))
            for number in range(first, last + 1):
                block = fetched[(number - first) * BLOCK :][: self._length(number)]
                found[number] = block
                self._cache.put(key, number, block)
        return [content for number in numbers if (content := found[number]) is not None]

    def _length(self, number: int) -> int:
        return min(BLOCK, self.size - number * BLOCK)

    def _range(self, start: int, end: int) -> bytes:
        def ask() -> bytes:
            content = self._file_system.cat_file(self._path, start=start, end=end)
            if len(content) != end - start:
                raise OSError(f"{len(content)} bytes came for {end - start}")
            return content

        return _asked(self.url, f"bytes {start}-{end}", ask)

    @property
    def _file_system(self) -> Any:
        return _file_system(self.url)[0]  # fsspec keeps one for each process; a fork's own

    @property
    def _path(self) -> str:
        return _file_system(self.url)[1]


def read_remote(url: str) -> bytes:
    """A small file at a URL.

    Raises:
        ArtifactError: as of `RemoteTar`.
    """
    system, path = _file_system(url)
    return _asked(url, "it", lambda: system.cat_file(path))


def _asked(url: str, what: str, ask: Callable[[], Answer]) -> Answer:
    """A store's answer, asked for again where it fails.

    Raises:
        ArtifactError: there is no such thing, it may not be read, or all attempts failed; says which.
    """
    failed: BaseException | None = None
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_FIRST_WAIT * 2 ** (attempt - 1))
        try:
            return ask()
        except M2MError:
            raise
        except FileNotFoundError as error:
            # fsspec says so of web servers whatever they answered
            if getattr(error.__cause__, "status", 404) == 404:
                raise ArtifactError(f"{url}: no such file there") from None
            failed = error.__cause__ or error
        except PermissionError as error:
            raise ArtifactError(f"{url}: may not be read ({error}); look at the store's credentials") from None
        except Exception as error:  # every store's client has its own
            failed = error
    said = " ".join(str(failed).split())[:200] or type(failed).__name__
    raise ArtifactError(
        f"{url}: the store failed {_ATTEMPTS} times to give {what}, at last with: {said}. Nothing is lost: give the "
        "same command again when it answers"
    ) from failed


def open_tar(paths: ShardPaths) -> Tar:
    """A shard's tar: the one beside its index, or where the folder's `elsewhere.json` says.

    Raises:
        OSError: neither.
        ArtifactError: it can't be reached.
    """
    there = read_elsewhere(paths.out)
    if there is None or paths.tar.exists():
        return LocalTar(paths.tar)
    return RemoteTar(f"{there.url}/{FOLDER}/{paths.tar.name}")


def blocks_of(tar: Tar, size: int = 16 * BLOCK) -> Iterator[bytes]:
    """The whole tar from its beginning."""
    at = 0
    while content := tar.read_at(at, size):
        yield content
        at += len(content)


def default_cache() -> BlockCache:
    """What `M2M_SHARD_CACHE` (a folder) and `M2M_SHARD_CACHE_GB` (50) say.

    Raises:
        ConfigError: no number.
    """
    given = os.environ.get(CACHE_GB) or "50"
    try:
        limit = int(float(given) * 1e9)
    except ValueError:
        raise ConfigError(f"{CACHE_GB}={given}: expected a number of gigabytes") from None
    return BlockCache(Path(os.environ.get(CACHE) or Path.home() / ".cache" / "m2m" / "shards"), limit)


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:
        kind = url.partition("://")[0]
        known = "pip install 'm2m[s3]'" if kind in ("s3", "s3a") else f"install what fsspec wants for it: {error}"
        raise ConfigError(f"{url}: {kind}:// can't be read here: {known}") from None
    except ValueError as error:
        raise ConfigError(f"{url}: {error}") from None
