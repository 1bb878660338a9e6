"""What was made is recorded with real DVC and real git, whoever else records, and whatever goes wrong."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dvc.repo import Repo
from dvc.repo.reproduce import reproduce
from launching import Here, materialize
from toy_chain import git, recording

from m2m import artifacts
from m2m.config import Profile, load_profile
from m2m.errors import ConfigError
from m2m.progress import Progress
from m2m.provenance import trace, verify
from m2m.stage_run import run_stage
from m2m.stages import STAGES
from orchestration.definitions import build_defs
from orchestration.launchers import local
from orchestration.lineage import chosen
from orchestration.lineage.dvc_record import DvcRecorder, dvc_name
from orchestration.lineage.recording import RecordingError, RecordingLauncher

TOY = Path(__file__).with_name("toy_chain.py")


def record_all(profile: Profile, recorder: DvcRecorder) -> None:
    for key in STAGES:
        recorder.record(recording(profile, key))


def status(root: Path) -> dict:
    """What DVC finds changed, by the names of stages."""
    with Repo(str(root)) as repo:
        return {name.rpartition(":")[2]: changes for name, changes in repo.status().items()}


def locked_stages(root: Path) -> set[str]:
    lock = root / "dvc.lock"
    return set(yaml.safe_load(lock.read_text())["stages"]) if lock.exists() else set()


def test_after_recording_dvc_finds_nothing_changed_and_the_clone_gets_it_all_back(project, tmp_path):
    root = project.root
    record_all(project, DvcRecorder(root, git=True, push=True, remote="here"))
    assert status(root) == {}
    assert git(root, "status", "--porcelain") == ""
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(root), str(clone))
    with Repo(str(clone)) as repo:
        repo.pull(remote="here")
    for key, stage in STAGES.items():
        there = load_profile(clone / "configs" / "tiny.yaml")
        manifest = artifacts.require_whole(stage.folder(there), key)
        assert artifacts.faults(stage.folder(there), manifest, content=True) == []
        assert not run_stage(stage, there, progress=Progress(quiet=True)).fresh
    made = trace(load_profile(clone / "configs" / "tiny.yaml"), "report")
    assert [gap for node in made.each() for gap in node.gaps] == []  # the runs' records came along
    assert verify(made, load_profile(clone / "configs" / "tiny.yaml")) == []


def test_git_is_told_the_run_and_only_dvc_lock_is_committed(project, monkeypatch):
    monkeypatch.setenv("M2M_DAGSTER_URL", "http://127.0.0.1:3000/")
    root = project.root
    (root / "captions.tsv").write_text("changed by the user, and added")
    git(root, "add", "captions.tsv")
    recorder = DvcRecorder(root, git=True)
    for _ in range(2):
        recorder.record(recording(project, "filter-captions", "run-7"))
    message, *_ = git(root, "log", "-1", "--format=%B").split("\n\n", 1)
    assert message == "Record filter-captions"
    said = git(root, "log", "-1", "--format=%B")
    assert "Run: run-7\nLink: http://127.0.0.1:3000/runs/run-7" in said
    assert recording(project, "filter-captions").manifest.fingerprint in said
    assert git(root, "log", "-1", "--name-only", "--format=").split() == ["dvc.lock"]
    assert git(root, "rev-list", "--count", "HEAD").strip() == "2"  # the same again is no other commit
    assert git(root, "diff", "--cached", "--name-only").split() == ["captions.tsv"]


def _record_in_a_process(profile: Profile, key: str, failed) -> None:
    try:
        DvcRecorder(profile.root, git=True).record(recording(profile, key, f"run of {key}"))
    except BaseException as error:
        failed.put(f"{key}: {error}")


def test_eight_runs_that_record_at_once_are_all_recorded(project):
    fork = multiprocessing.get_context("fork")
    keys = list(STAGES)[:8]
    failed = fork.Queue()
    workers = [fork.Process(target=_record_in_a_process, args=(project, key, failed)) for key in keys]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(200)
    assert failed.empty(), failed.get()
    assert locked_stages(project.root) == {dvc_name(STAGES[key]) for key in keys}
    subjects = git(project.root, "log", "--format=%s").splitlines()
    assert sorted(subjects) == sorted([*(f"Record {key}" for key in keys), "Begin"])
    assert git(project.root, "status", "--porcelain") == ""


@pytest.fixture
def dvc_runs_toys(project, monkeypatch, tmp_path) -> None:
    """`python` as dvc.yaml's commands find it is one that runs the toys."""
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin" / "python"  # dvc.yaml says `python -m m2m STAGE ...`
    shim.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {TOY} "$@"\n')
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(project.root)


def test_repro_after_recording_runs_only_what_a_changed_param_reaches(project, dvc_runs_toys):
    root = project.root
    record_all(project, DvcRecorder(root))
    with Repo(str(root)) as repo:
        assert reproduce(repo) == []
    before = {key: recording(project, key).manifest.digest for key in STAGES}
    settings = root / "configs" / "tiny.yaml"
    settings.write_text(settings.read_text().replace("finetune: {value: 6}", "finetune: {value: 66}"))
    with Repo(str(root)) as repo:
        ran = {stage.addressing for stage in reproduce(repo)}
    reached = {"finetune@nvs", "finetune@vgsi", "evaluate@novel_views", "evaluate@procedures", "report"}
    assert ran == reached
    after = {key: recording(project, key).manifest.digest for key in STAGES}
    assert {key for key in STAGES if before[key] != after[key]} == reached
    assert status(root) == {}


def test_other_captions_and_another_version_of_a_stage_are_seen(project):
    root = project.root
    record_all(project, DvcRecorder(root))
    captions, registry = root / "captions.tsv", root / "m2m" / "stages.py"
    was = captions.read_bytes()
    captions.write_bytes(was + b"https://example.org/2\ta blue star\n")
    assert set(status(root)) == {"filter_captions"}
    captions.write_bytes(was)
    registry.write_text(registry.read_text().replace('"""Every stage', '"""Each stage'))
    assert status(root) == {}
    registry.write_text(registry.read_text().replace('"finetune": 2', '"finetune": 3'))
    assert set(status(root)) == {"finetune@nvs", "finetune@vgsi"}


def test_repro_from_scratch_makes_the_same_bytes(project, dvc_runs_toys):
    root = project.root
    before = {key: recording(project, key).manifest.digest for key in STAGES}
    shutil.rmtree(root / "outputs")
    with Repo(str(root)) as repo:
        assert {stage.addressing for stage in reproduce(repo)} == {dvc_name(stage) for stage in STAGES.values()}
    assert {key: recording(project, key).manifest.digest for key in STAGES} == before
    assert status(root) == {}


def test_an_experiment_is_a_commit_of_dvcs_with_its_figures(project, dvc_runs_toys):
    root = project.root
    record_all(project, DvcRecorder(root, git=True))
    with Repo(str(root)) as repo:
        (name,) = repo.experiments.run(params=["configs/tiny.yaml:evaluate.value=70"])
        compared: Any = repo.metrics.diff(a_rev="HEAD", b_rev=name)
    figures = compared["diff"]["outputs/tiny/evaluate/table_1/summary.json"]
    assert (figures["figures.fid_self"]["old"], figures["figures.fid_self"]["new"]) == (10.5, 105.0)
    assert git(root, "status", "--porcelain").split() == ["M", "configs/tiny.yaml", "M", "dvc.lock"]


def test_metrics_and_plots_are_read_from_inside_the_outputs(project, tmp_path):
    with Repo(str(project.root)) as repo:
        shown: Any = repo.metrics.show()
        found = shown[""]["data"]["outputs/tiny/evaluate/table_1/summary.json"]
        assert found["data"]["figures"]["fid_self"] == 10.5
    argv = [
        sys.executable,
        "-m",
        "dvc",
        "plots",
        "show",
        "--out",
        str(tmp_path / "plots"),
        "outputs/tiny/report/curves",
    ]
    subprocess.run(argv, cwd=project.root, check=True, capture_output=True)
    specs = map(json.loads, re.findall(r"var spec = (.*);", (tmp_path / "plots" / "index.html").read_text()))
    drawn = [{(row["of"], row["x"], row["value"]) for row in spec["data"]["values"]} for spec in specs]
    assert {("M2M-DINO", 1.0, 0.5), ("M2M-DINO", 2.0, 0.8)} in drawn


def test_only_manifests_are_versioned_where_an_object_store_holds_the_shards(project):
    root = project.root
    path = root / "dvc.yaml"
    path.write_text(path.read_text().replace('- shards: ""', "- shards: /manifest.json"))
    record_all(project, DvcRecorder(root))
    assert status(root) == {}
    outs = yaml.safe_load((root / "dvc.lock").read_text())["stages"]["generate_sets"]["outs"]
    paths = {out["path"] for out in outs}
    assert paths == {"outputs/tiny/generate-sets/manifest.json", "outputs/tiny/runs/generate-sets"}


def no_remote(root: Path) -> str:
    return "dvc push filter_captions: "


def no_dvc(root: Path) -> str:
    shutil.rmtree(root / ".dvc")
    return "dvc init"


def other_profile(root: Path) -> str:
    text = (root / "dvc.yaml").read_text().replace("- profile: tiny", "- profile: other")
    (root / "dvc.yaml").write_text(text.replace("- configs/tiny.yaml", "- configs/other.yaml"))
    shutil.copy(root / "configs" / "tiny.yaml", root / "configs" / "other.yaml")
    return "see its `vars`"


def broken_lock_file(root: Path) -> str:
    (root / "dvc.lock").write_text("schema: '2.0'\nstages: [")
    return "dvc.lock"


def git_locked(root: Path) -> str:
    (root / ".git" / "index.lock").write_text("")
    return "index.lock"


def no_cache(root: Path) -> str:
    (root / ".dvc" / "cache").write_text("")
    return "dvc commit filter_captions: "


@pytest.mark.parametrize("fault", [no_remote, no_dvc, other_profile, broken_lock_file, git_locked, no_cache])
def test_every_failure_is_one_clear_line_and_is_made_up_for(project, fault, tmp_path):
    shutil.copytree(project.root, tmp_path / "sound", symlinks=True)
    words = fault(project.root)
    push = fault is no_remote
    with pytest.raises(RecordingError) as caught:
        DvcRecorder(project.root, git=True, push=push, remote=None).record(recording(project, "filter-captions"))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert artifacts.require_whole(STAGES["filter-captions"].folder(project), "")
    for name in (".dvc", ".git", "dvc.yaml"):  # mended
        if (project.root / name).is_dir():
            shutil.rmtree(project.root / name)
        copy = shutil.copytree if (tmp_path / "sound" / name).is_dir() else shutil.copy
        copy(tmp_path / "sound" / name, project.root / name)
    if fault is broken_lock_file:
        (project.root / "dvc.lock").unlink()
    DvcRecorder(project.root, git=True, push=push, remote="here").record(recording(project, "filter-captions"))
    assert locked_stages(project.root) == {"filter_captions"}


@pytest.fixture
def full_disk(tmp_path):
    """A disk of 16 KB: what is larger than that does not fit on it."""
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path / "disk")], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield tmp_path / "disk"
    subprocess.run(["umount", "--lazy", str(tmp_path / "disk")], check=True)


def test_a_full_disk_is_named_and_what_was_made_is_recorded_when_there_is_room(project, full_disk):
    (project.outputs / "filter-captions" / "made.txt").write_bytes(os.urandom(100_000))
    remake_manifest(project, "filter-captions")
    (project.root / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {full_disk}\n")
    launcher = RecordingLauncher(Here(project), [DvcRecorder(project.root)], project)
    told = str(materialize(launcher, "filter-captions")["recorded by DVC"])
    assert told.startswith("no: ") and "No space left on device" in told and "\n" not in told
    assert artifacts.require_whole(STAGES["filter-captions"].folder(project), "")
    assert locked_stages(project.root) == set()
    (project.root / ".dvc" / "config.local").unlink()
    assert str(materialize(launcher, "filter-captions")["recorded by DVC"]).startswith("filter_captions ")
    assert locked_stages(project.root) == {"filter_captions"}


def remake_manifest(profile: Profile, key: str) -> None:
    """The manifest of an output whose files were put there by hand."""
    folder = STAGES[key].folder(profile)
    manifest = artifacts.read_manifest(folder)
    assert manifest is not None
    (folder / artifacts.MANIFEST).unlink()
    files = artifacts.record_files(folder)
    artifacts.write_bytes(folder / artifacts.MANIFEST, manifest.model_copy(update={"files": files}).encoded())


def test_a_live_dvc_is_waited_for_and_a_dead_ones_lock_is_free(project):
    root = project.root
    lock = root / ".dvc" / "tmp" / "lock"
    lock.parent.mkdir()
    lock.write_text(" 99999999\n")  # what a killed dvc leaves
    DvcRecorder(root).record(recording(project, "filter-captions"))
    hold = f"import fcntl, time; f = open({str(lock)!r}, 'a'); fcntl.flock(f, 2); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        started = time.monotonic()
        with pytest.raises(RecordingError, match="another dvc command has held"):
            DvcRecorder(root, wait_seconds=0.1).record(recording(project, "generate-sets"))
        assert time.monotonic() - started < 30
        process.kill()
    DvcRecorder(root).record(recording(project, "generate-sets"))
    assert locked_stages(root) == {"filter_captions", "generate_sets"}


def test_a_materialization_tells_its_record(project):
    launcher = RecordingLauncher(Here(project), [DvcRecorder(project.root)], project)
    told = materialize(launcher, "filter-captions")
    assert told["seconds"] == 1 and str(told["recorded by DVC"]).startswith("filter_captions ")
    assert locked_stages(project.root) == {"filter_captions"}


def test_a_failed_record_fails_no_run_and_the_next_run_makes_up_for_it(project):
    shutil.move(project.root / ".dvc", project.root / "away")
    launcher = RecordingLauncher(Here(project), [DvcRecorder(project.root)], project)
    assert str(materialize(launcher, "filter-captions")["recorded by DVC"]).startswith("no: ")
    shutil.move(project.root / "away", project.root / ".dvc")
    materialize(launcher, "filter-captions")
    assert locked_stages(project.root) == {"filter_captions"}


def test_what_is_not_the_profiles_is_not_recorded_as_such(project):
    launcher = RecordingLauncher(Here(project), [DvcRecorder(project.root)], project)
    told = materialize(launcher, "filter-captions", overrides=["value=3"])
    assert told["recorded by DVC"] == "no: made with settings other than the profile's: value=3"

    def edit() -> None:
        project.path.write_text(project.path.read_text().replace("captions.tsv}", "captions.tsv, value: 5}"))

    told = materialize(RecordingLauncher(Here(project, edit), [DvcRecorder(project.root)], project), "filter-captions")
    assert "was changed while it was made" in str(told["recorded by DVC"])
    assert locked_stages(project.root) == set()


def test_an_older_output_is_not_recorded_as_the_new_one_whose_shards_are_not_all_there(project):
    launcher = Here(project, reports="the fingerprint of the new one")
    told = materialize(RecordingLauncher(launcher, [DvcRecorder(project.root)], project), "filter-captions")
    assert told["recorded by DVC"] == "no: not all of it is made yet"
    assert locked_stages(project.root) == set()


def test_the_definitions_record_where_they_are_asked_to(project, monkeypatch):
    monkeypatch.setattr(local, "PROFILE", project)
    monkeypatch.setattr(chosen, "PROFILE", project)
    launcher = local.LocalLauncher(command=[sys.executable, str(TOY)])
    assert chosen.with_recorders(launcher) is launcher  # nothing is recorded unless somebody asks
    monkeypatch.setenv("M2M_DVC", "record")
    shutil.rmtree(project.outputs / "filter-captions")
    job = build_defs(resource_overrides={"launcher": launcher}).resolve_job_def("m2m_pipeline")
    result = job.execute_in_process(asset_selection=[dg.AssetKey("filtered_captions")])
    (event,) = result.asset_materializations_for_node("filtered_captions")
    assert str(event.metadata["recorded by DVC"].value).startswith("filter_captions ")
    assert "| source | captions.tsv | " in str(event.metadata["made_from"].value)
    assert trace(project, "filter-captions").run["job"] == {"Dagster run": result.run_id, "Dagster job": "m2m_pipeline"}
    assert locked_stages(project.root) == {"filter_captions"}


@pytest.mark.parametrize("name, value", [("M2M_DVC", "yes"), ("M2M_LAKEFS", "http://127.0.0.1:9")])
def test_settings_that_make_no_sense_are_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        chosen.with_recorders(local.LocalLauncher())
