"""A launcher that has what was made recorded, and tells others of its launches.

Belongs here: when something is recorded or told, what becomes of a failure to. Not here: recorders and followers
(beside this module), launching (`orchestration.launchers`).
"""

import os
from collections.abc import Callable, Sequence
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

    def record(self, made: Recording) -> str | None:
        """Record an output; returns what the record is called, None where this output is none of the recorder's.

        Raises:
            RecordingError: it could not be.
        """
        ...


@dataclass(frozen=True)
class Attempt:
    """One launch of a stage."""

    stage: Stage
    profile: Profile
    run_id: str
    job: str
    """The Dagster job that the run is one of."""


class Follower(Protocol):
    """Is told of every launch, whatever becomes of it.

    Its methods raise `RecordingError` where it can't be told.
    """

    @property
    def name(self) -> str: ...

    def begins(self, attempt: Attempt) -> None: ...

    def ends(self, attempt: Attempt, manifest: Manifest | None, error: BaseException | None) -> None:
        """`manifest` is None where the output is not whole."""
        ...


class RecordingLauncher:
    """Runs stages with another launcher, then has each output recorded before Dagster hears of it.

    A recorder that fails leaves a warning and its reason in the materialization's metadata. The next run of the stage
    tries again, also where it finds nothing else to do.
    """

    def __init__(
        self, launcher: Launcher, recorders: Sequence[Recorder], profile: Profile, followers: Sequence[Follower] = ()
    ) -> None:
        self.launcher = launcher
        self._recorders = recorders
        self._followers = followers
        self._profile = profile

    def materialize(
        self, context: dg.AssetExecutionContext, stage: Stage, launch: Launch, *, shards: Sequence[str] | None = None
    ) -> Results:
        """See `assets_defs.launching.Launcher`."""
        attempt = Attempt(stage, self._profile, context.run.run_id, context.run.job_name)
        self._tell(context, lambda follower: follower.begins(attempt))
        error: BaseException | None = None
        reported: dg.DataVersion | None = None
        try:
            for result in self._recorded(context, stage, launch, shards):
                if isinstance(result, dg.MaterializeResult):
                    reported = result.data_version
                yield result
        except BaseException as caught:  # a run that was cancelled, too
            error = caught
            raise
        finally:
            manifest = self._made(stage, reported) if error is None else None
            self._tell(context, lambda follower: follower.ends(attempt, manifest, error))

    def end_orphans(self, instance: dg.DagsterInstance) -> list[str]:
        """See `assets_defs.launching.Launcher`."""
        return self.launcher.end_orphans(instance)

    def _recorded(
        self, context: dg.AssetExecutionContext, stage: Stage, launch: Launch, shards: Sequence[str] | None
    ) -> Results:
        before = _settings(stage, self._profile)
        told: dict[str, Any] | None = None
        for result in self.launcher.materialize(context, stage, launch, shards=shards):
            if isinstance(result, dg.MaterializeResult):
                if told is None:
                    told = self._record(context, stage, launch, before, result.data_version)
                result = result._replace(metadata={**(result.metadata or {}), **told})
            yield result

    def _tell(self, context: dg.AssetExecutionContext, what: Callable[[Follower], None]) -> None:
        for follower in self._followers:
            try:
                what(follower)
            except RecordingError as error:
                context.log.warning(f"{follower.name} was not told: {error}")

    def _record(
        self,
        context: dg.AssetExecutionContext,
        stage: Stage,
        launch: Launch,
        before: object,
        reported: dg.DataVersion | None,
    ) -> dict[str, Any]:
        manifest = self._made(stage, reported)
        if why := self._unfit(stage, launch, before, manifest):
            return {f"recorded by {recorder.name}": f"no: {why}" for recorder in self._recorders}
        assert manifest is not None
        made = Recording(stage, self._profile, manifest, context.run.run_id)
        told = {}
        for recorder in self._recorders:
            try:
                if (named := recorder.record(made)) is not None:
                    told[f"recorded by {recorder.name}"] = named
            except RecordingError as error:
                context.log.warning(f"{stage.key} is whole but not recorded by {recorder.name}: {error}")
                told[f"recorded by {recorder.name}"] = f"no: {error}"
        return told

    def _made(self, stage: Stage, reported: dg.DataVersion | None) -> Manifest | None:
        """The output that a launch reported; None while an older one stands and shards of the new one are missing."""
        manifest = artifacts.read_manifest(stage.folder(self._profile))
        older = manifest is not None and reported is not None and reported.value != manifest.fingerprint
        return None if older else manifest

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
