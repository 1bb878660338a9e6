"""What an asset asks for: somebody who runs its stage.

Belongs here: the launcher's interface, what a launch can be told, what the registry says of an asset.
Not here: launchers (`orchestration/launchers`), so that nothing here points up.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import dagster as dg
from pydantic import Field

import m2m
from assets_defs.checks import check_specs
from assets_defs.profile import PROFILE
from m2m.config import Profile
from m2m.planned import recall_plan
from m2m.stages import STAGES, Stage

Results: TypeAlias = Iterator[dg.MaterializeResult | dg.AssetCheckResult]


class Launch(dg.Config):
    """What one launch can be told in the launchpad. The profile says everything else."""

    overrides: list[str] = Field(
        default=[],
        description="settings other than the profile's, each as key=value, for example learning_rate=1e-4; "
        "they are part of the output's fingerprint",
    )
    force: bool = Field(default=False, description="make it again although it is current")


class Launcher(Protocol):
    """Runs a stage's command somewhere and tells Dagster what came of it.

    A launcher starts `python -m m2m STAGE ...`, hears it over Dagster Pipes, stops it when the run is cancelled, and
    asks for a retry where the same command would go on (preemption, a lost node). Nothing else: what is current, how
    to resume and what is whole is the stage's own business.
    """

    def materialize(
        self, context: dg.AssetExecutionContext, stage: Stage, launch: Launch, *, shards: Sequence[str] | None = None
    ) -> Results:
        """Run the stage and yield its materialization and check results.

        Args:
            shards: partition keys to make, for partitioned stages.

        Raises:
            dg.Failure: the command failed; holds its own one-line error.
            dg.RetryRequested: it was stopped, and goes on when it is started again.
        """
        ...

    def end_orphans(self, instance: dg.DagsterInstance) -> list[str]:
        """End what works on although its run is over, after a time in which a new run may take it up; says what."""
        ...


def declared(stage_key: str, *sources: dg.AssetKey) -> dict[str, Any]:
    """What the registry says of a stage, as arguments of `@asset`; `sources` are inputs that no stage makes."""
    stage = STAGES[stage_key]
    return {
        "deps": [*sources, *(STAGES[key].asset for key in stage.inputs.values())],
        "check_specs": check_specs(stage),
        "group_name": stage.group,
        "kinds": set(stage.kinds),
        "tags": {"m2m/command": stage.command, "m2m/profile": PROFILE.name},
        "description": stage.description,
        "code_version": code_version(stage, PROFILE),
        "metadata": {
            "command": stage.make_command(PROFILE),
            "output": dg.MetadataValue.path(stage.folder(PROFILE)),
            "dagster/code_references": dg.CodeReferencesMetadataValue(code_references=[_where(stage)]),
            **recall_plan(stage, PROFILE),  # what `m2m plan`, or the last run, counted for this profile
        },
    }


def code_version(stage: Stage, profile: Profile) -> str:
    """The stage's version and its settings: where either is another one, Dagster shows the asset as stale before a run.

    What is done about it is the stage's own business (its fingerprint): it leaves what no byte can differ in as it is.
    """
    settings = profile.section(stage.command, stage.variant)
    settings.pop("resources", None)
    said = json.dumps(settings, sort_keys=True, default=str)
    return f"{stage.version}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"


def _where(stage: Stage) -> dg.LocalFileCodeReference:
    """The function that does the stage's work; its module is read and not imported."""
    module, _, function = stage.function.partition(":")
    path = Path(m2m.__file__).parents[1] / f"{module.replace('.', '/')}.py"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    line = next((number for number, text in enumerate(lines, 1) if text.startswith(f"def {function}(")), 1)
    return dg.LocalFileCodeReference(file_path=str(path), line_number=line, label=f"{stage.key} ({function})")
