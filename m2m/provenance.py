"""What stands behind an output: the manifests, the runs, the sources that it was made from, read back from disk.

Belongs here: finding them, saying where the chain is broken, checking bytes. Not here: showing it (`m2m.trace`), DVC's
and git's records of it (`orchestration.lineage`).
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2m import artifacts
from m2m.artifacts import Manifest
from m2m.config import Profile, load_profile, source_digest
from m2m.errors import InputError, M2MError
from m2m.run_record import records
from m2m.stage_run import fingerprint
from m2m.stages import STAGES, find_stage

_DIGEST = re.compile(r"[0-9a-f]{64}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # which no other setting looks like


@dataclass(frozen=True)
class SourceRecord:
    """Something from outside the outputs that a stage read: a file, a folder, a model of the hub."""

    setting: str
    digest: str
    """sha256 of the content, or the hub id with its revision."""
    path: str | None
    """As the settings named it; None where that is not known any more."""


@dataclass
class Made:
    """One output and what it was made from."""

    key: str
    folder: Path
    manifest: Manifest | None
    runs: list[dict[str, Any]]
    sources: list[SourceRecord]
    inputs: dict[str, "Made"] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)
    """Where the chain is broken: a reader could not go back from here."""

    @property
    def run(self) -> dict[str, Any]:
        """The record of the run that finished it; empty where there is none."""
        return self.runs[-1] if self.runs else {}

    def each(self) -> Iterator["Made"]:
        """This output and everything behind it, each once, the nearest first."""
        seen: dict[str, Made] = {}
        waiting: list[Made] = [self]
        while waiting:
            made = waiting.pop(0)
            if made.key not in seen:
                seen[made.key] = made
                waiting.extend(made.inputs.values())
        yield from seen.values()


def find_output(text: str, config: str | None = None) -> tuple[Profile, str]:
    """What a user means by a stage (`pretrain@self`), an output's folder, or a file in one.

    Returns:
        A profile whose outputs hold it, and the stage's key.

    Raises:
        InputError: a path that is in no output.
        ConfigError: neither a path nor a stage.
    """
    path = Path(text)
    if not path.exists():
        command, _, variant = text.partition("@")
        return load_profile(config), find_stage(command, variant or None).key
    for folder in (path.resolve(), *path.resolve().parents):
        manifest = artifacts.read_manifest(folder)
        if manifest is not None and manifest.stage in STAGES:
            return _profile_of(_outputs_of(folder, manifest), config), manifest.stage
    raise InputError(f"{text}: neither a whole output nor a file in one (no folder above it has a manifest.json)")


def trace(profile: Profile, key: str) -> Made:
    """Read what an output was made from, back to the sources."""
    return _trace(profile, key, {})


def one_step(folder: Path, manifest: Manifest) -> Made:
    """An output with its runs and sources, but nothing behind its inputs; needs no profile."""
    outputs = _outputs_of(folder, manifest)
    profile = Profile(outputs.with_suffix(".yaml"), {}, outputs, root=outputs.parent.parent)
    runs = _runs(records(profile, STAGES[manifest.stage]), manifest)
    return Made(manifest.stage, folder, manifest, runs, _sources(profile, manifest.stage, manifest.config))


def verify(made: Made, profile: Profile) -> list[str]:
    """Read every byte behind an output again: files wherever they lie, fingerprints, sources. What does not hold."""
    from m2m.data.attached import faults_elsewhere  # a reader of tars, which nothing else here needs

    found = []
    for node in made.each():
        if node.manifest is None:
            continue
        faults = artifacts.faults(node.folder, node.manifest, content=True)
        found += [f"{node.key}: {fault}" for fault in faults + faults_elsewhere(node.folder, node.manifest)]
        stage = dataclasses.replace(STAGES[node.key], version=node.manifest.version)
        manifests = {name: of.manifest for name, of in node.inputs.items() if of.manifest is not None}
        as_made = {name: of.digest for name, of in manifests.items()} == node.manifest.inputs
        if as_made and fingerprint(stage, node.manifest.config, manifests) != node.manifest.fingerprint:
            found.append(f"{node.key}: the fingerprint in its manifest is not that of its settings and inputs")
        found += [f"{node.key}: {fault}" for source in node.sources if (fault := _source_fault(source, profile))]
    return found


def _trace(profile: Profile, key: str, seen: dict[str, Made]) -> Made:
    if key in seen:
        return seen[key]
    stage = STAGES[key]
    folder = stage.folder(profile)
    manifest = artifacts.read_manifest(folder)
    made = seen[key] = Made(key, folder, manifest, [], [])
    if manifest is None:
        made.gaps.append(f"{folder} is not there or not whole. Make it with: {stage.make_command(profile)}")
        return made
    made.runs = _runs(records(profile, stage), manifest)
    if not made.runs:
        made.gaps.append("there is no record here of the run that made it")
    made.sources = _sources(profile, key, manifest.config)
    made.gaps += [gap for of in made.sources if (gap := _source_gap(of))]
    for name, digest in manifest.inputs.items():
        if name not in stage.inputs:
            made.gaps.append(f"its input {name} is none of {key}'s any more")
            continue
        made.inputs[name] = of = _trace(profile, stage.inputs[name], seen)
        if of.manifest is not None and of.manifest.digest != digest:
            made.gaps.append(
                f"{of.key} was made anew since: {name} was {digest[:12]}, {of.manifest.digest[:12]} is there"
            )
    return made


def _runs(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The records of the runs that worked on this very output, oldest first; the last one finished it."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_bytes())
        except ValueError:
            continue
        if record.get("fingerprint") == manifest.fingerprint:
            found.append(record)
    ended = [i for i, record in enumerate(found) if record.get("manifest") == manifest.digest]
    return found[: ended[-1] + 1] if ended else []


def _sources(profile: Profile, key: str, settings: Mapping[str, Any]) -> list[SourceRecord]:
    """What of an output's settings stands for content from outside."""
    remembered = {digest: path for path, digest in _remembered(profile, key).items()}
    section = profile.section(STAGES[key].command, STAGES[key].variant)
    found = []
    for setting, value in flat(settings).items():
        if not isinstance(value, str):
            continue
        if _DIGEST.fullmatch(value):
            found.append(
                SourceRecord(setting, value, remembered.get(value) or _named(profile, section, setting, value))
            )
        elif _HUB_ID.fullmatch(value):
            found.append(SourceRecord(setting, value, value))
    return found


def _remembered(profile: Profile, key: str) -> dict[str, str]:
    try:
        return json.loads((profile.outputs / ".identities" / f"{key}.json").read_bytes())["sources"]
    except (OSError, ValueError, KeyError):
        return {}


def _named(profile: Profile, section: Mapping[str, Any], setting: str, digest: str) -> str | None:
    """The path that the profile names for a setting, if it holds that content still."""
    named = flat(section).get(setting)
    try:
        return named if isinstance(named, str) and source_digest(named, profile.root) == digest else None
    except M2MError:
        return None


def _source_gap(source: SourceRecord) -> str | None:
    if source.path is None:
        return f"{source.setting}: not known where it lay"
    if source.path == source.digest and "@" not in source.path:
        return (
            f"{source.setting}: {source.path} has no revision: the hub may give another one now. Say {source.path}@..."
        )
    return None


def _source_fault(source: SourceRecord, profile: Profile) -> str | None:
    if source.path is None or source.path == source.digest:
        return None
    try:
        same = source_digest(source.path, profile.root) == source.digest
    except InputError as error:
        return f"{source.setting}: {error}"
    return None if same else f"{source.setting}: {source.path} has other content than when it was read"


def _outputs_of(folder: Path, manifest: Manifest) -> Path:
    """The folder of all of a profile's outputs that this one is among."""
    return folder.parents[0 if STAGES[manifest.stage].variant is None else 1]


def _profile_of(outputs: Path, config: str | None) -> Profile:
    """The profile that made these outputs: the project's that they lie in, or else the one of their name."""
    project = outputs.parent.parent
    beside = project / "configs" / f"{outputs.name}.yaml"
    try:
        profile = load_profile(config or (beside if beside.is_file() else outputs.name))
    except M2MError:
        if config:
            raise
        profile = Profile(beside, {}, outputs, root=project)  # what is on disk says most of it without settings
    return dataclasses.replace(profile, outputs=outputs)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
