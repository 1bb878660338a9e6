"""Recording what a run has made, and walking back from its report: seconds, with DVC and git for real.

`python -m benchmarks.lineage [OUTPUTS]` on a copy of a finished run's outputs (outputs/tiny: `make demo` first).
"""

import argparse
import hashlib
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from m2m import artifacts
from m2m.config import Profile, load_profile, project_root
from m2m.stages import STAGES
from orchestration.lineage.dvc_record import DvcRecorder, dvc_name
from orchestration.lineage.recording import Recording

AT_ONCE = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("outputs", nargs="?", type=Path, default=project_root() / "outputs" / "tiny")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        profile = _lay_ground(Path(folder), given.outputs)
        import dvc.repo  # noqa: F401  once a process, not once a record

        alone = {key: _seconds(profile, key) - _hashing(profile, key) for key in STAGES}
        lock = profile.root / "dvc.lock"
        lock.unlink()
        _git(profile.root, "commit", "--quiet", "--all", "--message", "Begin again")
        started = time.perf_counter()
        workers = [
            multiprocessing.get_context("fork").Process(target=_seconds, args=(profile, key))
            for key in list(STAGES)[:AT_ONCE]
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        together = time.perf_counter() - started
        recorded = sum(f"  {dvc_name(STAGES[key])}:\n" in lock.read_text() for key in list(STAGES)[:AT_ONCE])
        started = time.perf_counter()
        argv = [sys.executable, "-m", "m2m", "trace", str(profile.outputs / "report"), "--config", str(profile.path)]
        told = subprocess.run(argv, cwd=project_root(), capture_output=True, text=True, check=True).stdout
        traced = time.perf_counter() - started
    last = told.splitlines()[-1]
    print(f"recording one output: {max(alone.values()):.2f} s at most ({max(alone, key=lambda key: alone[key])})")
    print(f"{AT_ONCE} at once: {recorded} recorded in {together:.1f} s; trace of the report: {traced:.2f} s, {last}")
    figures = {
        "recording_seconds": round(max(alone.values()), 2),
        "recorded_of_8": recorded,
        "trace_seconds": round(traced, 2),
        "gaps": int(last.split(", ")[-1].split()[0]),
    }
    reach = {"recording_seconds": "<= 1", "recorded_of_8": "8", "trace_seconds": "<= 2", "gaps": "0"}
    ok = max(alone.values()) <= 1 and recorded == AT_ONCE and traced <= 2 and figures["gaps"] == 0
    print(json.dumps({"name": "lineage", "figures": figures, "reach": reach, "ok": ok}))
    return 0 if ok else 1


def _lay_ground(folder: Path, outputs: Path) -> Profile:
    """A git and DVC repository with the project's dvc.yaml and a copy of the outputs."""
    captions = str(load_profile("tiny").section("filter-captions")["source"])
    constant = ("LICENSE", "workspace.yaml")
    for name in ("dvc.yaml", ".gitignore", ".dvc/config", ".dvc/.gitignore", "m2m/stages.py", *constant, captions):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(project_root() / name, folder / name)
    shutil.copytree(project_root() / "configs", folder / "configs")
    shutil.copytree(outputs, folder / "outputs" / "tiny")
    _git(folder, "init", "--quiet")
    _git(folder, "config", "user.name", "benchmark")
    _git(folder, "config", "user.email", "benchmark@example.org")
    _git(folder, "add", ".")
    _git(folder, "commit", "--quiet", "--message", "Begin")
    return load_profile(folder / "configs" / "tiny.yaml")


def _git(folder: Path, *argv: str) -> None:
    subprocess.run(["git", *argv], cwd=folder, check=True)


def _seconds(profile: Profile, key: str) -> float:
    manifest = artifacts.require_whole(STAGES[key].folder(profile), f"python -m m2m {' '.join(STAGES[key].argv)}")
    started = time.perf_counter()
    DvcRecorder(profile.root, git=True).record(Recording(STAGES[key], profile, manifest, "a-run"))
    return time.perf_counter() - started


def _hashing(profile: Profile, key: str) -> float:
    """Seconds to read and hash the output once, as DVC does."""
    started = time.perf_counter()
    for path in STAGES[key].folder(profile).rglob("*"):
        if path.is_file():
            hashlib.md5(path.read_bytes()).hexdigest()
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
