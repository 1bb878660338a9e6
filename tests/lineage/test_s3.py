"""DVC and stores over a real S3 server: what is sent is what comes back, whatever is interrupted or wrong."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from toy_chain import git, recording

from m2m import artifacts
from m2m.cli import main
from m2m.config import load_profile
from m2m.progress import Progress
from m2m.provenance import trace, verify
from m2m.stage_run import run_stage
from m2m.stages import STAGES
from m2m.stores import StoreError, fetch
from orchestration.lineage.dvc_record import DvcRecorder
from orchestration.lineage.recording import RecordingError
from orchestration.lineage.store_record import StoreRecorder

pytestmark = pytest.mark.services


def dvc(root: Path, *argv: str) -> None:
    ran = subprocess.run([sys.executable, "-m", "dvc", *argv], cwd=root, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr


def on_s3(root: Path, url: str = "s3://m2m/dvc", **settings: str) -> None:
    """Make S3 the remote `store`, as docs/lineage.md says."""
    dvc(root, "remote", "add", "--force", "--default", "store", url)
    for name, value in {"endpointurl": os.environ["AWS_ENDPOINT_URL"], **settings}.items():
        dvc(root, "remote", "modify", "--local", "store", name, value)


def sums(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def interrupted(root: Path, what: str, moments: list[float], done) -> int:
    """Start `dvc push` or `dvc pull` once a moment and kill it then; how often it was not through yet."""
    killed = 0
    for moment in moments:
        before = done()
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", what], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 300
        while done() == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)  # a random moment of the transfer, not of its preparation
        time.sleep(moment)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    return killed


@pytest.mark.parametrize(
    "count, size, least", [(200, 100_000, 1), pytest.param(2000, 500_000, 4, marks=pytest.mark.slow)]
)
@pytest.mark.timeout(1800)
def test_files_come_back_whatever_is_interrupted(s3, tmp_path, count, size, least):
    """The larger one is a gigabyte; of five interruptions at random moments `least` come before the end."""
    import s3fs

    origin, drawn, moments = tmp_path / "origin", np.random.default_rng(0), random.Random(time.time_ns())
    (origin / "data").mkdir(parents=True)
    for n in range(count):
        (origin / "data" / f"{n:04d}.bin").write_bytes(drawn.bytes(size))
    expected = sums(origin / "data")
    git(origin, "init", "--quiet")
    dvc(origin, "init", "--quiet")
    on_s3(origin)
    dvc(origin, "add", "data")
    git(origin, "add", ".")
    git(origin, "commit", "--quiet", "--message", "Data")
    files = s3fs.S3FileSystem(use_listings_cache=False)

    def pushed() -> int:
        return len(files.find("m2m/dvc"))

    when = [moments.uniform(0, 1.5 * count / 2000) for _ in range(5)]
    assert interrupted(origin, "push", when, pushed) >= least, when
    dvc(origin, "push")
    assert pushed() == count + 1  # and the list of them
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(origin), str(clone))
    shutil.copy(origin / ".dvc" / "config.local", clone / ".dvc")
    shutil.rmtree(origin)

    def pulled() -> int:
        return sum(1 for path in (clone / ".dvc" / "cache").rglob("*") if path.is_file())

    when = [moments.uniform(0, 1.5 * count / 2000) for _ in range(5)]
    assert interrupted(clone, "pull", when, pulled) >= least, when
    dvc(clone, "pull", "--force")  # what was killed while it linked files leaves one with a name of its own
    assert sums(clone / "data") == expected


def test_a_pipeline_pushed_to_s3_is_verified_and_goes_on_in_a_clone(project, s3, tmp_path):
    root = project.root
    on_s3(root)
    git(root, "commit", "--quiet", "--all", "--message", "A store")
    for key in STAGES:
        DvcRecorder(root, git=True).record(recording(project, key))
    dvc(root, "push")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(root), str(clone))
    shutil.rmtree(root)
    dvc(clone, "remote", "modify", "--local", "store", "endpointurl", s3.endpoint)
    dvc(clone, "pull")
    there = load_profile(clone / "configs" / "tiny.yaml")
    made = trace(there, "report")
    assert [gap for node in made.each() for gap in node.gaps] == [] and verify(made, there) == []
    shutil.rmtree(there.outputs / "report")
    assert made.manifest is not None
    assert run_stage(STAGES["report"], there, progress=Progress(quiet=True)).manifest == made.manifest


def remote_down(root: Path) -> str:
    on_s3(root, endpointurl="http://127.0.0.1:9")
    return "is it up"


def wrong_credentials(root: Path) -> str:
    on_s3(root, access_key_id="m2m", secret_access_key="another")
    return "are the keys right"


def no_bucket(root: Path) -> str:
    on_s3(root, "s3://nowhere/dvc")
    return "is there such a bucket"


@pytest.mark.parametrize("fault", [remote_down, wrong_credentials, no_bucket])
def test_a_push_that_fails_says_why_and_the_next_one_makes_up_for_it(project, s3, fault):
    words = fault(project.root)
    with pytest.raises(RecordingError) as caught:
        DvcRecorder(project.root, push=True).record(recording(project, "filter-captions"))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert "in dvc.lock, but not at the remote" in str(caught.value)
    assert artifacts.require_whole(STAGES["filter-captions"].folder(project), "")
    (project.root / ".dvc" / "config.local").unlink()
    on_s3(project.root)
    DvcRecorder(project.root, push=True).record(recording(project, "filter-captions"))
    shutil.rmtree(project.root / ".dvc" / "cache")
    shutil.rmtree(project.outputs / "filter-captions")
    dvc(project.root, "pull", "filter_captions")
    assert artifacts.require_whole(STAGES["filter-captions"].folder(project), "")


def test_shards_are_sent_to_a_bucket_and_come_back_where_dvc_has_their_manifest_alone(chain, s3, capsys):
    config = ["--config", str(chain.path)]
    folder = STAGES["generate-sets"].folder(chain)
    expected = sums(folder)
    assert main(["store", "send", "generate-sets", "s3://m2m/outputs", *config]) == 0
    manifest = artifacts.require_whole(folder, "")
    assert capsys.readouterr().out.strip() == f"s3://m2m/outputs/tiny/generate-sets/{manifest.digest[:16]}"
    for path in folder.rglob("*"):
        if path.is_file() and path.name != artifacts.MANIFEST:
            path.unlink()
    assert main(["store", "fetch", "generate-sets", "s3://m2m/outputs", *config]) == 0
    assert sums(folder) == expected


def test_a_report_is_sent_by_itself_and_other_outputs_are_not(chain, s3):
    import s3fs

    recorder = StoreRecorder("s3://m2m/reports")
    assert recorder.record(recording(chain, "filter-captions")) is None
    address = recorder.record(recording(chain, "report"))
    assert address is not None and address.startswith("s3://m2m/reports/tiny/report/")
    there = s3fs.S3FileSystem(use_listings_cache=False).cat_file(f"{address}/made.txt")
    assert there == (chain.outputs / "report" / "made.txt").read_bytes()


@pytest.mark.parametrize(
    "name, value, url, words",
    [
        ("AWS_SECRET_ACCESS_KEY", "another", "s3://m2m/reports", "are the keys right"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "s3://m2m/reports", "is it up"),
        ("AWS_DEFAULT_REGION", "us-east-1", "s3://nowhere/reports", "is there such a bucket"),
    ],
)
def test_a_store_that_fails_says_why_in_one_line(chain, s3, monkeypatch, name, value, url, words):
    import s3fs

    monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RecordingError) as caught:
        StoreRecorder(url).record(recording(chain, "report"))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(StoreError):
        fetch(url, STAGES["report"], "tiny", chain.outputs / "report")
    assert artifacts.require_whole(chain.outputs / "report", "")
