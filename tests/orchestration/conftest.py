"""Toy stages under the real definitions, for tests of how things are run."""

import sys
from pathlib import Path

import dagster as dg
import pytest

from m2m.config import load_profile

sys.path.insert(0, str(Path(__file__).parent))
from small_stages import Small
from toy_ground import Ground


@pytest.fixture
def ground(tmp_path) -> Ground:
    return Ground.laid(tmp_path)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory) -> Small:
    """What an undisturbed run of the real stages makes."""
    return Small.made_here(tmp_path_factory.mktemp("unbroken"))


@pytest.fixture
def materialize(ground, monkeypatch):
    """Materialize one asset in this process, its stage a toy that does what `act` says."""
    from toy_definitions import defs

    from orchestration.launchers import local

    monkeypatch.setattr(local, "PROFILE", load_profile(ground.environment["M2M_PROFILE"]))

    def run(asset: str, act: str = "work", **launch) -> dg.ExecuteInProcessResult:
        overrides = [*launch.pop("overrides", []), f"act={act}"]
        return defs.resolve_job_def("m2m_pipeline").execute_in_process(
            asset_selection=[dg.AssetKey(asset)],
            run_config={"ops": {asset: {"config": {"overrides": overrides, **launch}}}},
            raise_on_error=False,
        )

    return run
