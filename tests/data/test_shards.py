"""Shards: equal bytes for equal sets, any set in one read, damage found, and nothing half-written believed."""

import errno
import io
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2m.data.shard_reader import ShardFolder, ShardReader
from m2m.data.shards import ShardPaths, ShardWriter, npy_bytes, read_record, rebuild_index
from m2m.data.verified import is_current, shard_faults
from m2m.errors import ArtifactError
from m2m.generation.shard_work import adopt

NAMES = st.sampled_from(["json", "latents.npy", "00.png", "01.png"])
FILES = st.dictionaries(NAMES, st.binary(max_size=1500), min_size=1)
SETS = st.lists(FILES, max_size=5)


def write(out: Path, sets, number: int = 0, fingerprint: str = "made so") -> Path:
    with ShardWriter(out, number, fingerprint) as writer:
        for i, files in enumerate(sets):
            writer.add(f"{i:09d}", files)
    return out


def arrays(n: int = 3) -> list[dict[str, bytes]]:
    return [{"latents.npy": npy_bytes(np.arange(60, dtype=np.float16).reshape(5, 3, 4) + i)} for i in range(n)]


@settings(max_examples=25, deadline=None)
@given(sets=SETS)
def test_what_is_written_is_read(tmp_path_factory, sets):
    one, two = (write(tmp_path_factory.mktemp("shard"), sets) for _ in range(2))
    for ending in ("tar", "idx", "json"):
        assert ShardPaths(one, 0).path(ending).read_bytes() == ShardPaths(two, 0).path(ending).read_bytes()
    reader = ShardReader(one, 0)
    assert [{name: reader.read(i, name) for name in reader.names(i)} for i in range(len(reader))] == sets
    assert shard_faults(one, 0) == []
    with tarfile.open(ShardPaths(one, 0).tar) as tar:  # any reader of tars agrees
        found = [(member.name, tar.extractfile(member).read(), member.mtime) for member in tar]  # type: ignore[union-attr]
    assert found == [(f"{i:09d}.{name}", content, 0) for i, files in enumerate(sets) for name, content in files.items()]


@given(rows=st.lists(st.integers(0, 4), max_size=6))
@settings(max_examples=20, deadline=None)
def test_rows_of_an_array_are_read_alone(tmp_path_factory, rows):
    reader = ShardReader(write(tmp_path_factory.mktemp("shard"), arrays()), 0)
    assert np.array_equal(reader.rows(2, "latents.npy", rows), reader.array(2, "latents.npy")[rows])
    with pytest.raises(IndexError):
        reader.rows(0, "latents.npy", [5])


@pytest.mark.parametrize("damage", ["cut", "byte", "index", "no index", "no tar", "no record", "record"])
def test_damage_is_found(tmp_path, damage):
    paths = ShardPaths(write(tmp_path, arrays()), 0)
    content = bytearray(paths.tar.read_bytes())
    match damage:
        case "cut":
            paths.tar.write_bytes(content[:-700])
        case "byte":
            content[800] ^= 1
            paths.tar.write_bytes(content)
        case "index":
            paths.index.write_text(paths.index.read_text().replace("512", "513"))
        case "no index":
            paths.index.unlink()
        case "no tar":
            paths.tar.unlink()
        case "no record":
            paths.record.unlink()
        case "record":
            paths.record.write_text("{")
    assert len(shard_faults(tmp_path, 0)) == 1
    assert is_current(tmp_path, 0, "made so") == (damage == "byte")  # sizes alone; `shards verify` reads every byte


def test_a_writer_that_fails_leaves_no_shard(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, 0, "f") as writer:
        writer.add("a", {"json": b"{}"})
        raise RuntimeError
    assert list((tmp_path / "shards").iterdir()) == []
    assert not is_current(tmp_path, 0, "f")


def test_a_new_writer_clears_what_a_killed_one_left(tmp_path):
    whole = {p.name: p.read_bytes() for p in (write(tmp_path / "a", arrays()) / "shards").iterdir()}
    left = tmp_path / "b" / "shards"
    left.mkdir(parents=True)
    (left / ".00000.tar.tmp").write_bytes(b"half")
    (left / ".00000.json.4711.tmp").write_bytes(b"half")
    (left / ".00001.tar.tmp").write_bytes(b"another worker's")
    (left / "00000.tar").write_bytes(b"of another fingerprint")
    write(tmp_path / "b", arrays())
    (left / ".00001.tar.tmp").unlink()
    assert {p.name: p.read_bytes() for p in left.iterdir()} == whole


class FullDisk:
    """Files opened for writing share so many bytes; then they say what a full disk says."""

    def __init__(self, monkeypatch, left: int) -> None:
        opened = Path.open

        class Limited:
            def __init__(self, file) -> None:
                self.file = file

            def write(self, content: bytes) -> None:
                nonlocal left
                left -= len(content)
                if left < 0:
                    self.file.write(content[: len(content) + left])
                    raise OSError(errno.ENOSPC, "No space left on device")
                self.file.write(content)

            def __getattr__(self, name: str):
                return getattr(self.file, name)

            def __enter__(self) -> "Limited":
                return self

            def __exit__(self, *_) -> None:
                self.file.close()

        def limited(path: Path, mode: str = "r", *args, **kwargs):
            file = opened(path, mode, *args, **kwargs)
            return Limited(file) if mode == "wb" else file

        monkeypatch.setattr(Path, "open", limited)


@pytest.mark.parametrize("share", [0, 0.3, 0.99, 1.0, 1.05, 1.2])
def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch, share):
    paths = ShardPaths(write(tmp_path / "free", arrays()), 0)
    tar, rest = paths.tar.stat().st_size, paths.index.stat().st_size + paths.record.stat().st_size
    with monkeypatch.context() as patched, pytest.raises(ArtifactError, match=r"No space left.*Nothing of this shard"):
        FullDisk(patched, int(share * tar) if share <= 1 else tar + int((share - 1) * 4 * rest))
        write(tmp_path / "full", arrays())
    assert list((tmp_path / "full" / "shards").iterdir()) == []
    write(tmp_path / "full", arrays())
    assert shard_faults(tmp_path / "full", 0) == []


def test_a_file_that_may_not_grow_leaves_no_half_shard(tmp_path):
    """A real limit of the system's, in a process of its own."""
    limited = (
        "import resource, sys; from pathlib import Path; from m2m.data.shards import ShardWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "with ShardWriter(Path(sys.argv[1]), 1, 'f') as writer:\n"
        "    for i in range(10): writer.add(f'{i:09d}', {'latents.npy': bytes(9_000)})"
    )
    write(tmp_path, arrays())
    before = sorted((tmp_path / "shards").iterdir())
    done = subprocess.run([sys.executable, "-B", "-c", limited, str(tmp_path)], capture_output=True, text=True)
    assert "00001.tar: can't be written: File too large. Nothing of this shard is left" in done.stderr
    assert sorted((tmp_path / "shards").iterdir()) == before and shard_faults(tmp_path, 0) == []


def test_an_index_is_made_again_from_its_tar(tmp_path):
    paths = ShardPaths(write(tmp_path, arrays()), 0)
    index = paths.index.read_bytes()
    paths.index.write_bytes(index[:50])
    assert rebuild_index(tmp_path, 0) and paths.index.read_bytes() == index
    paths.tar.write_bytes(paths.tar.read_bytes()[:900])
    assert not rebuild_index(tmp_path, 0)


def test_what_a_filter_dropped_is_kept_apart_from_failures(tmp_path):
    with ShardWriter(tmp_path, 0, "f") as writer:
        writer.add("000000001", {"json": b"{}"})
        writer.drop("000000002", "nudity")
    record = read_record(tmp_path, 0)
    assert record.failed == [] and [(f.key, f.error) for f in record.dropped] == [("000000002", "nudity")]
    assert "dropped" not in ShardPaths(write(tmp_path / "other", arrays()), 0).record.read_text()


def test_failures_are_kept(tmp_path):
    with ShardWriter(tmp_path, 3, "f") as writer:
        writer.add("000000001", {"json": b"{}"})
        writer.fail("000000002", "NaN")
    record = read_record(tmp_path, 3)
    assert (record.sets, [(f.key, f.error) for f in record.failed]) == (1, [("000000002", "NaN")])


def test_a_shard_of_the_same_work_is_adopted(tmp_path):
    write(tmp_path / "old", arrays())
    assert not adopt(tmp_path / "old", tmp_path / "new", 0, "made otherwise")
    assert adopt(tmp_path / "old", tmp_path / "new", 0, "made so")
    assert shard_faults(tmp_path / "new", 0) == []
    tar = ShardPaths(tmp_path / "old", 0).tar
    content = bytearray(tar.read_bytes())
    content[800] ^= 1
    tar.unlink()
    tar.write_bytes(content)
    assert not adopt(tmp_path / "old", tmp_path / "other", 0, "made so")
    assert not adopt(tmp_path / "nowhere", tmp_path / "other", 0, "made so")


def test_keys_hold_no_dots(tmp_path):
    with pytest.raises(ValueError), ShardWriter(tmp_path, 0, "f") as writer:
        writer.add("a.b", {"json": b""})


def test_few_shards_are_open_and_workers_open_their_own(tmp_path):
    for number in range(4):
        write(tmp_path, arrays(number + 1), number)
    folder = ShardFolder(tmp_path, keep=2)
    assert [len(folder[number]) for number in (0, 1, 2, 3, 0)] == [1, 2, 3, 4, 1]
    assert len(folder._open) == 2
    assert len(pickle.loads(pickle.dumps(folder))[2]) == 3  # noqa: S301 (our own bytes)
    with pytest.raises(ArtifactError, match=r"00009\.json"):
        folder[9]
    with pytest.raises(ArtifactError, match="no other"):
        folder[0].read(0, "other")


def test_arrays_are_never_unpickled(tmp_path):
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    reader = ShardReader(write(tmp_path, [{"latents.npy": file.getvalue()}]), 0)
    with pytest.raises(ValueError, match="allow_pickle"):
        reader.array(0, "latents.npy")
