"""Assets hand over their own stage, with the shards of the run and what the launchpad says, and decide nothing."""

from collections.abc import Sequence

import dagster as dg
import pytest

from assets_defs.launching import Launch, Results
from assets_defs.partitions import shard_keys
from m2m.config import Profile, load_profile
from m2m.errors import ConfigError
from m2m.stages import STAGES, Stage
from orchestration.definitions import build_defs


class NotingLauncher:
    """Keeps every promise without running anything."""

    def __init__(self) -> None:
        self.asked: dict[str, tuple[str, Launch, list[str] | None]] = {}

    def materialize(
        self, context: dg.AssetExecutionContext, stage: Stage, launch: Launch, *, shards: Sequence[str] | None = None
    ) -> Results:
        asset = context.asset_key.to_user_string()
        self.asked[asset] = (stage.key, launch, None if shards is None else list(shards))
        yield dg.MaterializeResult(asset_key=context.asset_key)
        for check in stage.checks:
            yield dg.AssetCheckResult(passed=True, check_name=check, asset_key=context.asset_key)


def test_every_asset_asks_for_its_own_stage():
    launcher = NotingLauncher()
    told = {"mis_shards": {"config": {"overrides": ["steps=3"], "force": True}}}
    job = build_defs(resource_overrides={"launcher": launcher}).resolve_job_def("m2m_pipeline")
    assert job.execute_in_process(run_config={"ops": told}).success
    assert {asset: asked[0] for asset, asked in launcher.asked.items()} == {s.asset: s.key for s in STAGES.values()}
    all_shards = shard_keys(load_profile())
    for stage in STAGES.values():
        _, launch, shards = launcher.asked[stage.asset]
        assert (sorted(shards) if shards is not None else None) == (all_shards if stage.partitioned else None)
        assert (launch.overrides, launch.force) == ((["steps=3"], True) if stage.asset == "mis_shards" else ([], False))


def test_a_shard_is_a_partition(tmp_path):
    profile = Profile(tmp_path / "p.yaml", {"generate-sets": {"shards": 3}}, tmp_path)
    assert shard_keys(profile) == ["00000", "00001", "00002"]


@pytest.mark.parametrize("count", [0, "many", 2.5])
def test_a_count_that_is_none_is_refused(tmp_path, count):
    with pytest.raises(ConfigError, match=r"generate-sets\.shards must be a count"):
        shard_keys(Profile(tmp_path / "p.yaml", {"generate-sets": {"shards": count}}, tmp_path))
