"""A toy chain from captions to report, made once by the real way of running stages."""

import shutil
import sys
from pathlib import Path

import pytest

from m2m.config import Profile, load_profile
from m2m.progress import Progress
from m2m.stage_run import run_stage
from m2m.stages import STAGES

sys.path.insert(0, str(Path(__file__).parent))

import toy_chain


@pytest.fixture
def toys(monkeypatch) -> None:
    """The registry's stages do a toy's work."""
    monkeypatch.delenv("M2M_PROFILE", raising=False)
    monkeypatch.delenv("M2M_OUTPUTS", raising=False)
    for key, stage in toy_chain.toys().items():
        monkeypatch.setitem(STAGES, key, stage)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("chain") / "project"
    toy_chain.lay_ground(root)
    with pytest.MonkeyPatch.context() as patch:
        for key, stage in toy_chain.toys().items():
            patch.setitem(STAGES, key, stage)
        profile = load_profile(root / "configs" / "tiny.yaml")
        for stage in STAGES.values():
            run_stage(stage, profile, progress=Progress(quiet=True))
    return root


@pytest.fixture
def chain(made_once, toys, tmp_path) -> Profile:
    """The whole chain in a project folder of the test's own."""
    shutil.copytree(made_once, tmp_path / "project")
    return load_profile(tmp_path / "project" / "configs" / "tiny.yaml")
