"""An output is whole or it is not an output."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from m2m import artifacts
from m2m.artifacts import Manifest
from m2m.errors import ArtifactError


def make(folder: Path, text: str = "hello") -> Manifest:
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text(text)
    manifest = Manifest(
        stage="s", version=1, fingerprint="f", config={}, inputs={}, counts={}, files=artifacts.record_files(folder)
    )
    artifacts.write_bytes(folder / artifacts.MANIFEST, manifest.encoded())
    return manifest


def test_equal_work_gives_equal_bytes(tmp_path):
    assert make(tmp_path / "one").encoded() == make(tmp_path / "two").encoded()
    assert make(tmp_path / "three", "other").digest != make(tmp_path / "four").digest


@pytest.mark.parametrize("damage", ["truncate", "delete", "no_manifest", "bad_manifest"])
def test_a_damaged_output_is_refused_with_the_command_that_makes_it(tmp_path, damage):
    make(tmp_path / "o")
    match damage:
        case "truncate":
            os.truncate(tmp_path / "o" / "a.txt", 2)
        case "delete":
            (tmp_path / "o" / "a.txt").unlink()
        case "no_manifest":
            (tmp_path / "o" / "manifest.json").unlink()
        case "bad_manifest":
            (tmp_path / "o" / "manifest.json").write_text('{"stage": ')
    with pytest.raises(ArtifactError, match="python -m m2m filter-captions"):
        artifacts.require_whole(tmp_path / "o", "python -m m2m filter-captions")


def test_other_bytes_of_the_same_size_are_found_when_content_is_read(tmp_path):
    manifest = make(tmp_path / "o")
    (tmp_path / "o" / "a.txt").write_text("jello")
    assert artifacts.faults(tmp_path / "o", manifest) == []
    assert artifacts.faults(tmp_path / "o", manifest, content=True) == ["a.txt has other content than when it was made"]


def test_a_swap_cut_in_two_is_undone(tmp_path):
    make(tmp_path / "o.old")
    artifacts.recover(tmp_path / "o")
    assert artifacts.require_whole(tmp_path / "o", "").files[0].path == "a.txt"


def test_promotion_replaces_the_older_output(tmp_path):
    make(tmp_path / "o", "old")
    make(tmp_path / "new", "new")
    artifacts.promote(tmp_path / "new", tmp_path / "o")
    assert (tmp_path / "o" / "a.txt").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o"]


def test_json_is_written_whole_and_sorted(tmp_path):
    artifacts.write_json(tmp_path / "x.json", {"b": 1, "a": "é"})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == json.dumps(
        {"a": "é", "b": 1}, indent=1, ensure_ascii=False
    ) + "\n"


def _append_under_lock(folder: Path, name: str) -> None:
    with artifacts.locked(folder / "x.lock", say=lambda _: None):
        for _ in range(50):
            with (folder / "log").open("a") as f:
                f.write(name)


def test_a_lock_keeps_two_processes_apart(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_under_lock, args=(tmp_path, name)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (tmp_path / "log").read_text() in ("a" * 50 + "b" * 50, "b" * 50 + "a" * 50)
