"""Launches told to OpenLineage: a job a stage, a data set an output, versions by their manifests' digests.

Belongs here: all that knows OpenLineage's client, which decides by its own settings where events go
(`OPENLINEAGE_URL`, `OPENLINEAGE_API_KEY`, openlineage.yml). Not here: when something is told (`recording`).
"""

import datetime
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from m2m.artifacts import Manifest
from m2m.config import Profile
from m2m.errors import ConfigError
from m2m.provenance import Made, one_step
from m2m.stages import STAGES, Stage
from orchestration.lineage.recording import Attempt, RecordingError

PRODUCER = "m2m"


class OpenLineage:
    """Tells of every launch as it begins and ends, with what was read and written by then.

    Args:
        namespace: of jobs and data sets.

    Raises:
        ConfigError: the client is not installed, or its settings make no sense.
    """

    name = "OpenLineage"

    def __init__(self, namespace: str = "m2m") -> None:
        self._namespace = namespace
        try:
            from openlineage.client import OpenLineageClient
        except ImportError:
            raise ConfigError(
                "OpenLineage events were asked for, but its client is not installed: pip install 'm2m[openlineage]'"
            ) from None
        try:
            self._client = OpenLineageClient()
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(f"OpenLineage: {' '.join(str(error).split())}") from error

    def begins(self, attempt: Attempt) -> None:
        """See `Follower`."""
        self._emit("START", attempt)

    def ends(self, attempt: Attempt, manifest: Manifest | None, error: BaseException | None) -> None:
        """See `Follower`."""
        if error is None:
            self._emit("COMPLETE", attempt, manifest)
        else:
            self._emit("FAIL" if isinstance(error, Exception) else "ABORT", attempt, error=error)

    def _emit(
        self, state: str, attempt: Attempt, manifest: Manifest | None = None, error: BaseException | None = None
    ) -> None:
        from openlineage.client.event_v2 import Job, Run, RunEvent, RunState
        from openlineage.client.facet_v2 import documentation_job, error_message_run, job_type_job, parent_run

        stage = attempt.stage
        made = None if manifest is None else one_step(stage.folder(attempt.profile), manifest)
        job_facets: dict[str, Any] = {
            "jobType": job_type_job.JobTypeJobFacet(processingType="BATCH", integration="DAGSTER", jobType="ASSET"),
            "documentation": documentation_job.DocumentationJobFacet(description=stage.description),
        }
        parent = parent_run.ParentRunFacet(
            run=parent_run.Run(runId=str(_as_uuid(attempt.run_id))),
            job=parent_run.Job(namespace=self._namespace, name=attempt.job),
        )
        run_facets: dict[str, Any] = {"parent": parent}
        if error is not None:
            message = " ".join(str(error).split()) or type(error).__name__
            run_facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(
                message=message, programmingLanguage="python"
            )
        if made is not None:
            run_facets["m2m_run"] = _facet(
                {"fingerprint": made.manifest.fingerprint if made.manifest else "", **made.run}
            )
        event = RunEvent(
            eventType=RunState[state],
            eventTime=datetime.datetime.now(datetime.UTC).isoformat(),
            run=Run(runId=str(uuid.uuid5(_as_uuid(attempt.run_id), stage.key)), facets=run_facets),
            job=Job(namespace=self._namespace, name=stage.asset, facets=job_facets),
            producer=PRODUCER,
            inputs=self._inputs(stage, attempt.profile, made),
            outputs=[] if made is None else [self._output(stage, attempt.profile, made)],
        )
        try:
            self._client.emit(event)
        except Exception as caught:  # every transport has its own errors; a launch must not fail for any of them
            raise RecordingError(f"{state} of {stage.key}: {' '.join(str(caught).split())}") from caught

    def _inputs(self, stage: Stage, profile: Profile, made: Made | None) -> list[Any]:
        from openlineage.client.event_v2 import InputDataset

        versions: Mapping[str, str] = made.manifest.inputs if made is not None and made.manifest is not None else {}
        found = [
            InputDataset(self._namespace, _dataset(STAGES[key], profile), facets=_version(versions.get(name)))
            for name, key in stage.inputs.items()
        ]
        for source in made.sources if made is not None else []:
            found.append(InputDataset(self._namespace, source.path or source.setting, facets=_version(source.digest)))
        return found

    def _output(self, stage: Stage, profile: Profile, made: Made) -> Any:
        from openlineage.client.event_v2 import OutputDataset
        from openlineage.client.facet_v2 import output_statistics_output_dataset as statistics

        assert made.manifest is not None
        size = sum(of.size for of in made.manifest.files)
        told = statistics.OutputStatisticsOutputDatasetFacet(size=size, fileCount=len(made.manifest.files))
        return OutputDataset(
            self._namespace,
            _dataset(stage, profile),
            facets=_version(made.manifest.digest),
            outputFacets={"outputStatistics": told},
        )


def _dataset(stage: Stage, profile: Profile) -> str:
    """`tiny/pretrain/self`: the same on every machine."""
    return "/".join(filter(None, [profile.name, stage.command, stage.variant]))


def _version(digest: str | None) -> dict[str, Any]:
    from openlineage.client.facet_v2 import dataset_version_dataset

    return {} if digest is None else {"version": dataset_version_dataset.DatasetVersionDatasetFacet(digest)}


def _as_uuid(run_id: str) -> uuid.UUID:
    """Dagster's run ids are UUIDs; what else there may be gets one of its own."""
    with suppress(ValueError):
        return uuid.UUID(run_id)
    return uuid.uuid5(uuid.NAMESPACE_URL, run_id)


def _facet(facts: Mapping[str, Any]) -> Any:
    """A facet of our own: the record of the run that made the output (code, packages, machine)."""
    import attr
    from openlineage.client.facet_v2 import RunFacet

    kind = attr.make_class("M2MRunFacet", {"facts": attr.field(type=dict)}, bases=(RunFacet,))
    return kind(facts=dict(facts))
