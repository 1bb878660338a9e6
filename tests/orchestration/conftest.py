"""Toy stages under the real definitions, for tests of how things are run."""

import sys
from pathlib import Path

import dagster as dg
import pytest

from m2m.config import load_profile

sys.path.insert(0, str(Path(__file__).parent))
from toy_ground import ROOT, Ground


@pytest.fixture
def ground(tmp_path) -> Ground:
    """Three shards, and Dagster as `make` sets it up."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "toy.yaml").write_text("generate-sets: {shards: 3}\ncache-features: {shards: 3}\n")
    (tmp_path / "dagster").mkdir()
    (tmp_path / "dagster" / "dagster.yaml").write_text((ROOT / "orchestration" / "dagster.yaml").read_text())
    return Ground(tmp_path)


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
