"""Seeing that there is nothing to do: without importing the stage, and never where something did change."""

import subprocess
import sys
from pathlib import Path

import pytest

STAGE = """
import sys
from m2m.config import SourcePath, StageConfig
from m2m.stage_run import StageRun

class Copy(StageConfig):
    source: SourcePath
    times: int = {default}

def copy(config: Copy, run: StageRun) -> None:
    (run.out / "copy.txt").write_text(run.source(config.source).read_text() * config.times)
"""
RUN = """
import sys
from pathlib import Path
from m2m.config import Profile
from m2m.progress import Progress
from m2m.stage_run import run_stage
from m2m.stages import STAGES, Stage

stage = STAGES["copy"] = Stage("copy", "copying:copy", "copies", 1, "Copies.", "data", frozenset())
root = Path(sys.argv[1])
profile = Profile(Path("configs/p.yaml"), {"copy": {"source": "in.txt"}}, root / "out", root=root)
outcome = run_stage(stage, profile, overrides=sys.argv[2:], progress=Progress(quiet=True))
print("fresh" if outcome.fresh else "current", "copying" in sys.modules)
"""


def write_stage(folder: Path, default: int) -> None:
    (folder / "copying.py").write_text(STAGE.format(default=default))


def run(folder: Path, *overrides: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-B", "-c", RUN, str(folder), *overrides],
        env={"PYTHONPATH": f"{folder}:{Path(__file__).parent.parent}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.fixture
def made(tmp_path):
    write_stage(tmp_path, 2)
    (tmp_path / "in.txt").write_text("x")
    assert run(tmp_path) == ["fresh", "True"]
    return tmp_path


def test_a_current_stage_is_not_even_imported(made):
    assert run(made) == ["current", "False"]


def test_whatever_changes_is_seen(made):
    write_stage(made, 3)  # only a default, in the code
    assert run(made) == ["fresh", "True"]
    (made / "in.txt").write_text("y")
    assert run(made) == ["fresh", "True"]
    assert run(made, "times=4") == ["fresh", "True"]
    assert (made / "out" / "copy" / "copy.txt").read_text() == "yyyy"


def test_a_spoilt_memory_is_found_out_anew(made):
    (memory,) = (made / "out" / ".identities").iterdir()
    memory.write_text("{")
    assert run(made) == ["current", "True"]
    assert run(made) == ["current", "False"]
