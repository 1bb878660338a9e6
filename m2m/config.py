"""Typed settings: how a stage's config is declared, and how a profile (`configs/<profile>.yaml`) fills it.

Belongs here: base classes, markers for fields, reading profiles, overrides, error texts, digests of sources.
Not here: the settings of a stage (they stand beside its function).
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from m2m.errors import ConfigError, InputError

_WHOLE_HASH_LIMIT = 2 << 30  # bytes; above it a folder's identity is its listing, not its content


class Source:
    """Marks a path that comes from outside the outputs: its content's digest is its identity, not its name."""


class Incidental:
    """Marks a setting that can't change a byte of the result (workers, logging): it is no part of the fingerprint."""


class Later:
    """Marks a setting that came when outputs stood already: left at its default, it is no part of the fingerprint.

    What was made before there was such a choice stays current.
    """


SourcePath = Annotated[Path, Source()]
"""A file or folder of the user's. Relative paths start at the project root (the folder above `configs/`)."""
ModelSource = Annotated[str, Source()]
"""A local model folder, or a hub id as `owner/name` or `owner/name@revision`."""


class Settings(BaseModel):
    """Base of every config: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class StageConfig(Settings):
    """Base of the one config that a stage's function takes."""

    made_together: ClassVar[bool] = False
    """Whether several processes, started together, can make one output of the stage."""

    def preview(self, root: Path, variant: str | None) -> list[str]:
        """What a dry run finds out without inputs and without writing: sources there, models that can be built.

        Raises:
            M2MError: something that would stop the stage.
        """
        return []


class Compute(Settings):
    """Where and how tensors are computed: all of it can change the last bits of a result."""

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    threads: int = Field(default=2, ge=1, description="CPU threads of torch; ignored on cuda except for data work")


class Resources(Settings):
    """What one launch of a stage asks of the machine or cluster that runs it."""

    nodes: int = Field(1, ge=1)
    gpus: int = Field(0, ge=0, description="per node")
    gpu_type: str | None = Field(None, description="as the cluster names it, for example a100-80gb")
    cpus: int = Field(1, ge=1, description="per node")
    memory_gb: float = Field(4, gt=0, description="per node")
    hours: float = Field(1, gt=0, description="time limit of one launch")


Config = TypeVar("Config", bound=StageConfig)


@dataclass(frozen=True)
class Profile:
    """One file of `configs/`: the settings of every stage, and where its outputs lie."""

    path: Path
    sections: Mapping[str, Mapping[str, Any]]
    outputs: Path
    label: str = ""
    root: Path = field(default_factory=Path.cwd)

    @property
    def name(self) -> str:
        return self.path.stem

    def section(self, command: str, variant: str | None = None) -> dict[str, Any]:
        """The raw settings of a stage: the shared ones, then its variant's."""
        section = dict(self.sections.get(command) or {})
        variants = section.pop("variants", None) or {}
        if variant is not None:
            section = _merge(section, variants.get(variant) or {})
        return section

    def stage_config(
        self, config: type[Config], command: str, variant: str | None = None, overrides: Sequence[str] = ()
    ) -> Config:
        """The stage's config from the profile with `key=value` overrides applied.

        Raises:
            ConfigError: an unknown key (with the nearest known one) or a value that is not allowed.
        """
        section = self.section(command, variant)
        section.pop("resources", None)
        for override in overrides:
            section = _merge(section, _parse_override(override))
        try:
            return config.model_validate(section, context={"root": self.root})
        except ValidationError as error:
            raise ConfigError(_explain(error, config, f"{self.path}: {command}", command)) from None

    def overridden(self, command: str, variant: str | None, overrides: Sequence[str]) -> "Profile":
        """The profile as `key=value` overrides of one stage change it."""
        section = dict(self.sections.get(command) or {})
        for override in overrides:
            parsed = _parse_override(override)
            section = _merge(section, parsed if variant is None else {"variants": {variant: parsed}})
        return replace(self, sections={**self.sections, command: section})

    def resources(self, command: str, variant: str | None = None) -> Resources:
        section = self.section(command, variant).get("resources") or {}
        try:
            return Resources.model_validate(section)
        except ValidationError as error:
            raise ConfigError(_explain(error, Resources, f"{self.path}: {command}.resources", "resources")) from None


def profile_path(name_or_path: str | None = None) -> Path:
    """`tiny` or `configs/tiny.yaml` -> the file; without an argument `M2M_PROFILE`, or else tiny."""
    given = name_or_path or os.environ.get("M2M_PROFILE") or "tiny"
    if given.endswith((".yaml", ".yml")):
        return Path(given)
    return project_root() / "configs" / f"{given}.yaml"


def project_root() -> Path:
    """The folder that holds `configs/`: where this package was checked out, or else the working directory."""
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "configs").is_dir() else Path.cwd()


def load_profile(name_or_path: str | Path | None = None, known: Mapping[str, Sequence[str]] | None = None) -> Profile:
    """Read a profile.

    Args:
        known: stage commands and their variants; other top-level keys are refused.

    Raises:
        ConfigError: the file is missing, not YAML, or names an unknown stage or variant.
    """
    path = profile_path(str(name_or_path) if name_or_path else None)
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in (project_root() / "configs").glob("*.yaml"))) or "none"
        raise ConfigError(f"{path}: no such profile. There are: {there}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected stages with their settings, got {type(content).__name__}")
    label = str(content.pop("label", ""))
    root = path.resolve().parent.parent if path.resolve().parent.name == "configs" else project_root()
    for command, section in content.items():
        if known is not None and command not in known:
            raise ConfigError(f"{path}: {command} is not a stage.{_nearest(command, known)}")
        if not isinstance(section, dict | None):
            raise ConfigError(f"{path}: {command} must hold settings (key: value), got {section!r}")
        for variant in (section or {}).get("variants") or {}:
            if known is not None and variant not in known[command]:
                raise ConfigError(
                    f"{path}: {command}.variants.{variant} is not a variant of {command}."
                    + _nearest(variant, known[command])
                )
    outputs = Path(os.environ.get("M2M_OUTPUTS") or root / "outputs") / path.stem
    return Profile(path=path, sections=content, outputs=outputs, label=label, root=root)


def identity(config: Settings, root: Path) -> dict[str, Any]:
    """The settings that can change bytes, sources replaced by the digest of their content.

    Raises:
        InputError: a source that is not there.
    """
    values: dict[str, Any] = {}
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if _marked(info, Incidental) or (_marked(info, Later) and value == info.get_default()):
            continue
        if _marked(info, Source) and value is not None:
            try:
                values[name] = source_digest(value, root)
            except InputError as error:
                raise InputError(f"{name} {error}") from None
        elif isinstance(value, Settings):
            values[name] = identity(value, root)
        else:
            values[name] = json.loads(config.model_dump_json(include={name}))[name]
    return values


def sources(config: Settings) -> Iterator[Path | str]:
    """The paths and hub ids whose content is part of the config's identity."""
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Settings):
            yield from sources(value)
        elif _marked(info, Source) and not _marked(info, Incidental) and value is not None:
            yield value


def _marked(info: FieldInfo, mark: type) -> bool:
    """Whether a field carries a mark, be it on the whole field or on the type inside `SourcePath | None`."""
    marks = [*info.metadata, *(m for part in get_args(info.annotation) for m in getattr(part, "__metadata__", ()))]
    return any(isinstance(m, mark) or m is mark for m in marks)


def resolve(source: Path | str, root: Path) -> Path:
    """A source's path, relative ones from the project root."""
    path = Path(source).expanduser()
    return path if path.is_absolute() else root / path


def source_digest(source: Path | str, root: Path) -> str:
    """sha256 of a file's bytes or of a folder's listing and bytes; a hub id stands for itself.

    Folders over 2 GiB are told apart by names and sizes alone.

    Raises:
        InputError: a path that does not exist (and does not look like a hub id).
    """
    path = resolve(source, root)
    if path.is_file():
        return _file_sha256(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        sizes = {p: p.stat().st_size for p in files}
        with_content = sum(sizes.values()) <= _WHOLE_HASH_LIMIT
        digest = hashlib.sha256()
        for p in files:
            content = _file_sha256(p) if with_content else ""
            digest.update(f"{p.relative_to(path).as_posix()}\0{sizes[p]}\0{content}\n".encode())
        return digest.hexdigest()
    if isinstance(source, str) and is_hub_id(source):
        return source
    raise InputError(f"{source}: no such file or folder (looked at {path})")


def is_hub_id(source: str) -> bool:
    """Whether a model source reads as `owner/name[@revision]` rather than as a path."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and Path(source).suffix != ".yaml"


def _file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: an override reads key=value, for example learning_rate=1e-4")
    parsed: Any = yaml.safe_load(value)
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else f" There are: {', '.join(known) or 'none'}."


def _explain(error: ValidationError, config: type[Settings], where: str, owner: str) -> str:
    lines = []
    for problem in error.errors():
        parts = [str(p) for p in problem["loc"]]
        dotted = ".".join([where, *parts]) if parts else where
        if problem["type"] == "extra_forbidden":
            model: Any = config
            for part in parts[:-1]:
                info = getattr(model, "model_fields", {}).get(part)
                model = info.annotation if info else None
            known = list(getattr(model, "model_fields", {}))
            lines.append(f"{dotted} is not a setting of {owner}.{_nearest(parts[-1], known)}")
        elif problem["type"] == "missing":
            lines.append(f"{dotted} is missing")
        else:
            lines.append(f"{dotted}: {problem['msg']} (got {problem['input']!r})")
    return "\n".join(lines)
