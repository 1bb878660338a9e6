"""Random access to the sets of shards, by their index.

Belongs here: reading sets, arrays and rows of arrays. Not here: where a tar lies (`m2m.data.tars`), whether its bytes
are still the ones (`m2m.data.verified`), what a set holds (`m2m.data.sets`).
"""

import io
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2m.data.shards import ShardPaths, read_record
from m2m.data.tars import open_tar
from m2m.errors import ArtifactError


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
            self._tar = open_tar(self.paths)
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
        self._tar.close()

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
        content = self._tar.read_at(offset, size)
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
