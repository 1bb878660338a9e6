"""A launcher that has what was made recorded.

Belongs here: when something is recorded, what becomes of a recorder's failure. Not here: recorders (beside this
module), launching (`orchestration.launchers`).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import dagster as dg

from assets_defs.launching import Launch, Launcher, Results
from m2m import artifacts
from m2m.artifacts import Manifest
from m2m.config import Profile, load_profile
from m2m.errors import M2MError
from m2m.stages import Stage


class RecordingError(M2MError):
    """Something that was made could not be recorded; says why and what to do. What was made is whole all the same."""


@dataclass(frozen=True)
class Recording:
    """One whole output, and the run that brought it up to date."""

    stage: Stage
    profile: Profile
    manifest: Manifest
    run_id: str

    @property
    def link(self) -> str | None:
        """The run's page in Dagster's UI, where `M2M_DAGSTER_URL` says where that is."""
        url = os.environ.get("M2M_DAGSTER_URL")
        return f"{url.rstrip('/')}/runs/{self.run_id}" if url else None


class Recorder(Protocol):
    """Keeps a record, or the bytes, of what was made. Recording the same again is allowed and changes nothing."""

    @property
    def name(self) -> str: ...

    def record(self, made: Recording) -> str:
        """Record an output; returns what the record is called.

        Raises:
            RecordingError: it could not be.
        """
        ...


class RecordingLauncher:
    """Runs stages with another launcher, then has each output recorded before Dagster hears of it.

    A recorder that fails leaves a warning and its reason in the materialization's metadata. The next run of the stage
    tries again, also where it finds nothing else to do.
    """

    def __init__(self, launcher: Launcher, recorders: Sequence[Recorder], profile: Profile) -> None:
        self.launcher = launcher
        self._recorders = recorders
        self._profile = profile

    def materialize(
        self, context: dg.AssetExecutionContext, stage: Stage, launch: Launch, *, shards: Sequence[str] | None = None
    ) -> Results:
        """See `assets_defs.launching.Launcher`."""
        before = _settings(stage, self._profile)
        told: dict[str, Any] | None = None
        for result in self.launcher.materialize(context, stage, launch, shards=shards):
            if isinstance(result, dg.MaterializeResult):
                if told is None:
                    told = self._record(context, stage, launch, before)
                result = result._replace(metadata={**(result.metadata or {}), **told})
            yield result

    def end_orphans(self, instance: dg.DagsterInstance) -> list[str]:
        """See `assets_defs.launching.Launcher`."""
        return self.launcher.end_orphans(instance)

    def _record(
        self, context: dg.AssetExecutionContext, stage: Stage, launch: Launch, before: object
    ) -> dict[str, Any]:
        manifest = artifacts.read_manifest(stage.folder(self._profile))
        if why := self._unfit(stage, launch, before, manifest):
            return {f"recorded by {recorder.name}": f"no: {why}" for recorder in self._recorders}
        assert manifest is not None
        made = Recording(stage, self._profile, manifest, context.run.run_id)
        told = {}
        for recorder in self._recorders:
            try:
                told[f"recorded by {recorder.name}"] = recorder.record(made)
            except RecordingError as error:
                context.log.warning(f"{stage.key} is whole but not recorded by {recorder.name}: {error}")
                told[f"recorded by {recorder.name}"] = f"no: {error}"
        return told

    def _unfit(self, stage: Stage, launch: Launch, before: object, manifest: Manifest | None) -> str | None:
        """A record says that an output is what the profile makes. Why that would not be true."""
        if manifest is None:
            return "not all of it is made yet"
        if launch.overrides:
            return f"made with settings other than the profile's: {' '.join(launch.overrides)}"
        if _settings(stage, self._profile) != before:
            return f"{self._profile.path} was changed while it was made"
        return None


def _settings(stage: Stage, profile: Profile) -> object:
    return load_profile(profile.path).section(stage.command, stage.variant)
