"""What Dagster is shown of an output beside its own figures: where it came from, what the plan says of it.

Belongs here: both as Pipes metadata. Not here: the output's own figures (`m2m.progress`), finding out
(`m2m.provenance`, `m2m.planned`).
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2m.artifacts import Manifest
from m2m.config import Profile
from m2m.planned import recall_plan, remember_plan
from m2m.provenance import one_step
from m2m.stages import STAGES, Stage


def asset_metadata(
    stage: Stage,
    profile: Profile,
    overrides: Sequence[str],
    manifest: Manifest,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """All that is shown of an output of `stage` beside its own figures."""
    return {**origin(manifest, folder), **_planned(stage, profile, overrides, say)}


def origin(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """What an output was made from, with links, by which code."""
    stage = STAGES.get(manifest.stage)
    if stage is None:
        return {}
    made = one_step(folder, manifest)
    rows = [
        f"| {name} | [{(of := STAGES[stage.inputs[name]]).asset}](/assets/{of.asset}) | `{digest[:16]}` |"
        for name, digest in manifest.inputs.items()
        if name in stage.inputs
    ]
    rows += [f"| {of.setting} | {of.path or 'a source'} | `{of.digest[:16]}` |" for of in made.sources]
    git = made.run.get("git", {})
    changed = " with changes that were not committed" if git.get("dirty") else ""
    told: dict[str, Any] = {
        "manifest": manifest.digest[:16],
        "code": f"{git.get('revision') or 'not recorded'}{changed}",
    }
    if rows:
        told["made_from"] = {"raw_value": "\n".join(["| | | |", "| --- | --- | --- |", *rows]), "type": "md"}
    return told | {"trace": f"python -m m2m trace {folder}"}


def _planned(
    stage: Stage, profile: Profile, overrides: Sequence[str], say: Callable[[str], None]
) -> Mapping[str, float | str]:
    """The plan's figures; counted only where torch is loaded, which takes longer than that."""
    found = recall_plan(stage, profile, overrides)
    if found or "torch" not in sys.modules:
        return found
    try:
        return remember_plan(stage, profile, overrides)
    except Exception as error:  # the output stands, whatever can't be counted of it
        say(f"{stage.key}: the plan's figures can't be counted: {error}")
        return {}
