"""Stages launched in this process, inside a Dagster asset, for tests of what is done with their results."""

import dagster as dg

from assets_defs.launching import Launch, Launcher
from m2m.config import Profile
from m2m.progress import Progress
from m2m.stage_run import run_stage
from m2m.stages import STAGES


class Here:
    """A launcher that runs a stage in this process."""

    def __init__(self, profile: Profile, during=lambda: None, reports: str | None = None) -> None:
        self.profile, self.during = profile, during
        self.version = None if reports is None else dg.DataVersion(reports)

    def materialize(self, context, stage, launch, *, shards=None):
        run_stage(stage, self.profile, overrides=launch.overrides, progress=Progress(quiet=True))
        self.during()
        yield dg.MaterializeResult(metadata={"seconds": 1}, data_version=self.version)

    def end_orphans(self, instance) -> list[str]:
        return []


def materialize(launcher: Launcher, key: str, **launch) -> dict:
    @dg.asset(name="made")
    def made(context: dg.AssetExecutionContext):
        yield from launcher.materialize(context, STAGES[key], Launch(**launch))

    result = dg.materialize([made])
    (event,) = result.asset_materializations_for_node("made")
    return {name: value.value for name, value in event.metadata.items()}
