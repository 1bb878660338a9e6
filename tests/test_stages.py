"""Running a stage: current is left alone, stale is replaced when the new one is whole, a crash goes on."""

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from m2m import artifacts
from m2m.config import Profile, SourcePath, StageConfig
from m2m.errors import ArtifactError, CheckFailed, ConfigError
from m2m.progress import Progress
from m2m.stage_run import StageRun, run_stage
from m2m.stages import STAGES, Stage, find_stage

calls: list[str] = []


class Copy(StageConfig):
    source: SourcePath
    times: int = 2
    fail_at: int | None = None
    promise: bool = True


def copy(config: Copy, run: StageRun) -> None:
    """Write the source's text `times` times, a file each, going on from those that are there."""
    text = run.source(config.source).read_text()
    for i in range(config.times):
        file = run.out / f"{i}.txt"
        if file.exists():
            continue
        if i == config.fail_at and not calls.count("failed"):
            calls.append("failed")
            raise KeyboardInterrupt
        calls.append(f"wrote {i}")
        artifacts.write_bytes(file, text.encode())
    run.count(copies=config.times)
    run.check("promise_kept", config.promise, "it was broken")


@pytest.fixture
def stage(monkeypatch) -> Stage:
    calls.clear()
    stage = Stage("copy", f"{__name__}:copy", "copies", 1, "Copies.", "data", frozenset(), checks=("promise_kept",))
    monkeypatch.setitem(STAGES, "copy", stage)
    return stage


def profile(tmp_path: Path, **settings) -> Profile:
    if not (tmp_path / "in.txt").exists():
        (tmp_path / "in.txt").write_text("x")
    section = {"source": "in.txt"} | settings
    return Profile(Path("configs/p.yaml"), {"copy": section}, tmp_path / "out", root=tmp_path)


quiet = Progress(quiet=True)


def test_a_current_output_is_left_alone(tmp_path, stage):
    first = run_stage(stage, profile(tmp_path), progress=quiet)
    again = run_stage(stage, profile(tmp_path), progress=quiet)
    assert (first.fresh, again.fresh) == (True, False)
    assert calls == ["wrote 0", "wrote 1"]
    assert again.manifest and again.manifest.counts == {"copies": 2}


@pytest.mark.parametrize("change", ["setting", "source", "version", "damage", "force"])
def test_what_makes_an_output_stale(tmp_path, stage, change):
    run_stage(stage, profile(tmp_path), progress=quiet)
    calls.clear()
    settings: dict = {}
    match change:
        case "setting":
            settings = {"times": 3}
        case "source":
            (tmp_path / "in.txt").write_text("y")
        case "version":
            stage = dataclasses.replace(stage, version=2)
        case "damage":
            (tmp_path / "out" / "copy" / "1.txt").unlink()
    outcome = run_stage(stage, profile(tmp_path, **settings), progress=quiet, force=change == "force")
    assert outcome.fresh
    # what is damaged is mended, not made anew
    assert calls == (["wrote 1"] if change == "damage" else [f"wrote {i}" for i in range(settings.get("times", 2))])


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, stage):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, profile(tmp_path / "a", times=5, fail_at=3), progress=quiet)
    assert not (tmp_path / "a" / "out" / "copy").exists()
    resumed = run_stage(stage, profile(tmp_path / "a", times=5, fail_at=3), progress=quiet)
    assert calls == ["wrote 0", "wrote 1", "wrote 2", "failed", "wrote 3", "wrote 4"]
    whole = run_stage(stage, profile(tmp_path / "b", times=5, fail_at=3), progress=quiet)
    assert whole.manifest and resumed.manifest and whole.manifest.encoded() == resumed.manifest.encoded()


class OfRun(Progress):
    """As a stage is heard that a Dagster run has launched."""

    def __init__(self, run: str) -> None:
        super().__init__(quiet=True)
        self._run = run

    @property
    def job(self) -> dict[str, str]:
        return {"Dagster run": self._run}


def test_a_forced_launch_that_its_own_run_repeats_goes_on(tmp_path, stage):
    """A cluster that requeues the job, a retry: what was made before it was forced is not kept, what came after is."""
    made = profile(tmp_path, times=4, fail_at=2)
    calls.append("failed")
    run_stage(stage, made, progress=quiet)
    for run, wrote in (("a", [0, 1]), ("b", [0, 1]), ("b", [2, 3]), ("b", []), ("a", [0, 1])):
        calls.clear()
        if wrote == [2, 3]:
            calls.append("failed")
        with contextlib.suppress(KeyboardInterrupt):
            outcome = run_stage(stage, made, progress=OfRun(run), force=True)
            assert outcome.fresh == bool(wrote)
        assert [call for call in calls if call != "failed"] == [f"wrote {i}" for i in wrote]


def test_a_forced_command_typed_twice_is_from_the_start_twice(tmp_path, stage):
    made = profile(tmp_path, times=4, fail_at=2)
    for failed in ([], ["failed"]):
        calls[:] = failed
        with contextlib.suppress(KeyboardInterrupt):
            run_stage(stage, made, progress=quiet, force=True)
        assert calls[len(failed) : len(failed) + 2] == ["wrote 0", "wrote 1"]


def test_the_older_output_stands_until_the_new_one_is_whole(tmp_path, stage):
    run_stage(stage, profile(tmp_path), progress=quiet)
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, profile(tmp_path, times=4, fail_at=2), progress=quiet)
    kept = artifacts.require_whole(tmp_path / "out" / "copy", "")
    assert kept.counts == {"copies": 2}


def test_a_crash_just_before_the_swap_loses_nothing(tmp_path, stage, monkeypatch):
    monkeypatch.setattr(artifacts, "promote", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, profile(tmp_path), progress=quiet)
    monkeypatch.undo()
    monkeypatch.setitem(STAGES, "copy", stage)
    calls.clear()
    assert run_stage(stage, profile(tmp_path), progress=quiet).manifest
    assert calls == []


def test_a_worker_whose_folder_another_puts_in_place_finds_it_done(tmp_path, stage, monkeypatch):
    """Tasks of an array that come to a whole output together: one finishes while the others still look at it."""
    workers = dataclasses.replace(stage, partitioned=True, function=f"{__name__}:overtaken")
    monkeypatch.setitem(STAGES, "copy", workers)
    outcome = run_stage(workers, profile(tmp_path), progress=quiet)
    assert not outcome.fresh and outcome.manifest == artifacts.read_manifest(tmp_path / "out" / "copy")
    assert [file.name for file in sorted(outcome.folder.glob("*.txt"))] == ["0.txt", "1.txt"]


def overtaken(config: Copy, run: StageRun) -> None:
    """Another process makes all of it meanwhile."""
    if "overtaken" not in calls:
        calls.append("overtaken")
        other = os.fork()
        if other == 0:
            run_stage(run.stage, run.profile, progress=quiet)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0
    copy(config, run)


def test_a_broken_promise_keeps_the_output_out_of_place(tmp_path, stage):
    with pytest.raises(CheckFailed, match="promise_kept does not hold: it was broken"):
        run_stage(stage, profile(tmp_path, promise=False), progress=quiet)
    assert not (tmp_path / "out" / "copy").exists()


def test_inputs_must_be_whole(tmp_path, stage):
    needy = dataclasses.replace(stage, inputs={"copies": "copy"})
    with pytest.raises(ArtifactError, match="Make it with: python -m m2m copy --config"):
        run_stage(needy, profile(tmp_path), progress=quiet)


def test_what_varies_is_recorded_beside_the_output(tmp_path, stage):
    outcome = run_stage(stage, profile(tmp_path), progress=quiet)
    (record,) = (tmp_path / "out" / "runs" / "copy").glob("*.json")
    told = json.loads(record.read_text())
    assert outcome.manifest and told["manifest"] == outcome.manifest.digest and told["seconds"] >= 0
    assert str(tmp_path) not in (tmp_path / "out" / "copy" / "manifest.json").read_text()


def test_unknown_stages_and_variants_are_named():
    with pytest.raises(ConfigError, match="There are: filter-captions"):
        find_stage("filter", None)
    with pytest.raises(ConfigError, match="pretrain has variants self, dino"):
        find_stage("pretrain", None)


def test_every_input_is_a_stage_before_it():
    order = list(STAGES)
    for stage in STAGES.values():
        assert all(order.index(key) < order.index(stage.key) for key in stage.inputs.values())


def test_what_one_worker_finishes_no_other_touches(tmp_path, stage, monkeypatch):
    """A task of an array finds all shards whole while another hashes them for the manifest."""
    workers = dataclasses.replace(stage, partitioned=True, function=f"{__name__}:finishing")
    monkeypatch.setitem(STAGES, "copy", workers)
    record_files, hashing = artifacts.record_files, tmp_path / "hashing"
    other = os.fork()  # now: a child would share the locks that are held
    if other == 0:
        while not hashing.exists():
            time.sleep(0.01)
        calls.append("the other")
        outcome = run_stage(workers, profile(tmp_path), progress=quiet)
        os._exit(outcome.manifest is None)

    def slowly(folder: Path):
        hashing.touch()
        time.sleep(1)
        return record_files(folder)

    monkeypatch.setattr(artifacts, "record_files", slowly)
    outcome = run_stage(workers, profile(tmp_path), progress=quiet)
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0
    assert outcome.manifest and artifacts.faults(outcome.folder, outcome.manifest) == []
    assert [file.path for file in outcome.manifest.files if file.path.endswith("tmp")] == []


def finishing(config: Copy, run: StageRun) -> None:
    """As stages of shards do, with a file that is there for a while."""
    copy(config, run)
    run.finish_alone()
    passing = run.out / "passing.tmp"
    passing.write_text("")
    time.sleep(2 if "the other" in calls else 0)
    passing.unlink()
