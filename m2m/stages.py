"""Every stage of the project, and the one way to run any of them.

Belongs here: the registry (names, inputs, checks, what Dagster shows) and `run_stage`. Not here: the work, which is
named by import path so that listing the stages needs neither torch nor diffusers.
"""

import hashlib
import importlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, get_type_hints

from m2m import artifacts
from m2m.artifacts import Manifest, Summary
from m2m.config import Profile, Resources, StageConfig, resolve
from m2m.errors import CheckFailed, ConfigError
from m2m.progress import Progress
from m2m.recall import recall_identity, remember_identity


@dataclass(frozen=True)
class Stage:
    """One step of the way from captions to the report."""

    command: str
    function: str
    asset: str
    version: int
    description: str
    group: str
    kinds: frozenset[str]
    variant: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)  # input name -> stage key
    checks: tuple[str, ...] = ()
    partitioned: bool = False
    deterministic: bool = True

    @property
    def key(self) -> str:
        """`filter-captions`, `pretrain@self`."""
        return f"{self.command}@{self.variant}" if self.variant else self.command

    @property
    def argv(self) -> list[str]:
        """The arguments of `python -m m2m` that run this stage, less the profile."""
        return [self.command, *(["--variant", self.variant] if self.variant else [])]

    def load(self) -> tuple[Callable[..., None], type[StageConfig]]:
        """Import the stage's function and the config class that its first parameter names."""
        module, _, name = self.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        return function, get_type_hints(function)["config"]

    def configured(self, profile: Profile, overrides: Sequence[str] = ()) -> tuple[Callable[..., None], StageConfig]:
        """The stage's function and its config from the profile.

        Raises:
            ConfigError: a setting that is unknown or not allowed.
        """
        function, config_class = self.load()
        return function, profile.stage_config(config_class, self.command, self.variant, overrides)

    def folder(self, profile: Profile) -> Path:
        return profile.outputs / self.command / (self.variant or "")

    def make_command(self, profile: Profile) -> str:
        return f"python -m m2m {' '.join(self.argv)} --config {profile.path}"


@dataclass
class StageRun:
    """What a stage's function gets beside its config: where to read, where to write, whom to tell."""

    stage: Stage
    profile: Profile
    out: Path
    inputs: Mapping[str, Path]
    fingerprint: str
    progress: Progress
    shards: Sequence[int] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    summary: dict[str, dict[str, Any]] = field(default_factory=dict)
    incomplete: str = ""

    def source(self, path: Path | str) -> Path:
        """A source of the config as a path that can be opened, from whatever folder the command was started."""
        return resolve(path, self.profile.root)

    def count(self, **counts: int) -> None:
        """Counts for the manifest."""
        self.counts.update(counts)

    def figure(self, **figures: float | int | str | None) -> None:
        """Headline figures for people; deterministic ones only."""
        self.summary.setdefault("figures", {}).update(figures)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.summary.setdefault("tables", {})[name] = [dict(row) for row in rows]

    def curve(self, name: str, columns: Mapping[str, Sequence[float]]) -> None:
        """A curve; the first column is the x axis."""
        self.summary.setdefault("curves", {})[name] = {key: list(values) for key, values in columns.items()}

    def picture(self, caption: str, path: Path) -> None:
        """A picture that the stage wrote below `out`."""
        self.summary.setdefault("pictures", {})[caption] = path.relative_to(self.out).as_posix()

    def check(self, name: str, holds: bool, why: str) -> None:
        """Record one of the stage's promises; `why` tells what was found where it does not hold.

        Raises:
            KeyError: the stage does not declare this check.
        """
        if name not in self.stage.checks:
            raise KeyError(f"{self.stage.key} declares no check {name}")
        self.summary.setdefault("checks", {})[name] = "" if holds else why

    def finish_later(self, why: str) -> None:
        """Not all shards are there yet: keep what was made, and put nothing in place."""
        self.incomplete = why

    def lock(self, name: str):
        """Hold a lock of this output, for example one shard's, while other workers make the others."""
        return artifacts.locked(_lock_path(self.profile, self.stage, name), self.progress.log)


@dataclass(frozen=True)
class Outcome:
    """What a run of a stage came to."""

    folder: Path
    manifest: Manifest | None
    fresh: bool
    note: str


def _stage(command: str, function: str, asset: str, description: str, group: str, kinds: str, **more: Any) -> Stage:
    return Stage(command, function, asset, more.pop("version", 1), description, group, frozenset(kinds.split()), **more)


_MODELS = {"m2m_self": "pretrain@self", "m2m_dino": "pretrain@dino"}
_EVALUATIONS = {
    "table_1": ({**_MODELS, "sets": "generate-sets"}, "FID, IS and CLIP scores by n-th generated image (Table 1)."),
    "preceding_images": (
        {**_MODELS, "sets": "generate-sets"},
        "What one to four preceding images tell (Fig. 6).",
    ),
    "consistency": ({**_MODELS, "sets": "generate-sets"}, "Content and style kept, and nothing copied (Fig. 4)."),
    "real_images": (_MODELS, "Sets of real photographs continued (Fig. 5)."),
    "novel_views": ({"m2m_nvs": "finetune@nvs"}, "New views of held-out objects (Fig. 7)."),
    "procedures": ({"m2m_vgsi": "finetune@vgsi"}, "The next steps of held-out procedures (Fig. 8)."),
    "sampling_speed": (_MODELS, "Seconds an image by number of preceding images (Fig. 9)."),
    "rollouts": ({**_MODELS, "sets": "generate-sets"}, "How quality holds over long sequences (section 9)."),
}

_ALL = [
    _stage(
        "filter-captions",
        "m2m.data.captions:filter_captions",
        "filtered_captions",
        "Captions of at most 77 CLIP tokens, with their split; rejected rows with their reason (section 4).",
        "data",
        "parquet",
        checks=("counts_add_up", "captions_kept"),
    ),
    _stage(
        "generate-sets",
        "m2m.generation.image_sets:generate_sets",
        "mis_shards",
        "25 images for each caption from 25 noises (section 4).",
        "data",
        "stablediffusion webdataset",
        inputs={"captions": "filter-captions"},
        checks=("shards_valid", "no_nan"),
        partitioned=True,
    ),
    _stage(
        "cache-features",
        "m2m.generation.features:cache_features",
        "dino_features",
        "DINOv2's last hidden states of the images that training reads (section 5.2).",
        "data",
        "dinov2 webdataset",
        inputs={"sets": "generate-sets"},
        checks=("shards_valid", "no_nan"),
        partitioned=True,
    ),
    *(
        _stage(
            "pretrain",
            "m2m.training.pretrain:pretrain",
            f"m2m_{variant}",
            f"M2M-{'Self' if variant == 'self' else 'DINO'} trained on MIS (sections 5 and 6.1).",
            "models",
            "pytorch diffusers",
            variant=variant,
            inputs={"sets": "generate-sets", **({"features": "cache-features"} if variant == "dino" else {})},
            checks=("loss_finite", "weights_finite"),
        )
        for variant in ("self", "dino")
    ),
    *(
        _stage(
            "finetune",
            "m2m.training.finetune:finetune",
            f"m2m_{variant}",
            {
                "nvs": "M2M-DINO fine-tuned for novel view synthesis with camera poses (sections 6.2, 8.5.1).",
                "vgsi": "M2M-DINO fine-tuned for visual procedures with step positions (sections 6.2, 8.5.2).",
            }[variant],
            "models",
            "pytorch diffusers",
            variant=variant,
            inputs={"base": "pretrain@dino"},
            checks=("loss_finite", "weights_finite"),
        )
        for variant in ("nvs", "vgsi")
    ),
    *(
        _stage(
            "evaluate",
            f"m2m.evaluation.{module}:evaluate_{name}",
            name,
            description,
            "evaluation",
            "pytorch torchmetrics",
            variant=name,
            inputs=inputs,
            checks=("metrics_finite",),
            deterministic=name != "sampling_speed",
        )
        for name, (inputs, description) in _EVALUATIONS.items()
        for module in [{"table_1": "table"}.get(name, name)]
    ),
    _stage(
        "report",
        "m2m.evaluation.report:write_report",
        "evaluation_report",
        "One self-contained HTML page: tables, curves, image grids, and what they were made from.",
        "evaluation",
        "html",
        inputs={
            "captions": "filter-captions",
            "sets": "generate-sets",
            "features": "cache-features",
            **_MODELS,
            "m2m_nvs": "finetune@nvs",
            "m2m_vgsi": "finetune@vgsi",
            **{name: f"evaluate@{name}" for name in _EVALUATIONS},
        },
        checks=("report_complete",),
        deterministic=False,
    ),
]

STAGES: dict[str, Stage] = {stage.key: stage for stage in _ALL}


def commands() -> dict[str, list[str]]:
    """Stage commands and their variants, in the order of the work."""
    found: dict[str, list[str]] = {}
    for stage in STAGES.values():
        found.setdefault(stage.command, []).extend([stage.variant] if stage.variant else [])
    return found


def find_stage(command: str, variant: str | None) -> Stage:
    """Look a stage up.

    Raises:
        ConfigError: an unknown command or variant; names the ones there are.
    """
    variants = commands().get(command)
    if variants is None:
        raise ConfigError(f"{command} is not a stage. There are: {', '.join(commands())}")
    if bool(variants) != bool(variant) or (variant and variant not in variants):
        said = f"--variant {variant}" if variant else "no --variant"
        raise ConfigError(f"{command} has variants {', '.join(variants) or 'none'}; {said} was given")
    return STAGES[f"{command}@{variant}" if variant else command]


def fingerprint(stage: Stage, settings: Mapping[str, Any], inputs: Mapping[str, Manifest]) -> str:
    """The one judge of staleness: the stage, its settings that can change bytes, and its inputs' manifests.

    Args:
        settings: `config.identity` of the stage's config.
    """
    said = {
        "stage": stage.key,
        "version": stage.version,
        "config": settings,
        "inputs": {name: manifest.digest for name, manifest in sorted(inputs.items())},
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def run_stage(
    stage: Stage,
    profile: Profile,
    *,
    overrides: Sequence[str] = (),
    shards: Sequence[int] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Bring one output up to date; do nothing if it is whole and current.

    Work is done in a folder beside the output, named by the fingerprint, and swapped into place when it is whole:
    what a crash leaves is picked up by the next run, and an older output stays until then.

    Args:
        shards: for partitioned stages, the ones to make; all by default.
        force: make it again although it is current.

    Raises:
        M2MError: bad settings, inputs that are not whole, or a check that does not hold.
    """
    progress = progress or Progress()
    settings = _settings(stage, profile, overrides)
    folders = {name: STAGES[key].folder(profile) for name, key in stage.inputs.items()}
    manifests = {
        name: artifacts.require_whole(folder, STAGES[stage.inputs[name]].make_command(profile))
        for name, folder in folders.items()
    }
    print_ = fingerprint(stage, settings, manifests)
    final = stage.folder(profile)
    keys = None if shards is None else [shard_key(shard) for shard in shards]
    with _maybe_locked(profile, stage, progress):
        artifacts.recover(final)
        current = artifacts.read_manifest(final)
        whole = current is not None and not artifacts.faults(final, current)
        if current is not None and current.fingerprint == print_ and whole and not force:
            progress.made(current, final, shards=keys, fresh=False)
            _drop_leftovers(final)
            return Outcome(final, current, False, f"{final} is current: nothing to do")
        function, config = stage.configured(profile, overrides)
        partial = final.with_name(f"{final.name}.partial-{print_[:12]}")
        if current is not None and current.fingerprint == print_ and not whole and not partial.exists():
            os.rename(final, partial)  # damaged: keep its good parts, finish the rest
        if force:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        run = StageRun(stage, profile, partial, folders, print_, progress, shards)
        started = time.time()
        manifest = artifacts.read_manifest(partial)
        if manifest is None or artifacts.faults(partial, manifest):  # whole if a crash came just before the swap
            (partial / artifacts.MANIFEST).unlink(missing_ok=True)
            function(config, run)
            if run.incomplete:
                _record_run(stage, profile, run, started, None)
                return Outcome(partial, None, True, run.incomplete)
        # workers that made the last shards together come here together: one finishes, the others find it done
        with artifacts.locked(_lock_path(profile, stage, "finish-output"), progress.log):
            if not partial.exists():
                manifest = artifacts.require_whole(final, stage.make_command(profile))
            else:
                if manifest is None or not (partial / artifacts.MANIFEST).exists():
                    manifest = _finish(stage, settings, manifests, run)
                artifacts.promote(partial, final)
        _drop_leftovers(final)
        _record_run(stage, profile, run, started, manifest)
    progress.made(manifest, final, shards=keys, fresh=True)
    return Outcome(final, manifest, True, f"{final}: {len(manifest.files)} files, {_counted(manifest.counts)}")


def shard_key(shard: int) -> str:
    """A shard's name on disk and as a partition: five digits."""
    return f"{shard:05d}"


def resources(stage: Stage, profile: Profile) -> Resources:
    """What a launch of this stage asks for in this profile."""
    return profile.resources(stage.command, stage.variant)


def _settings(stage: Stage, profile: Profile, overrides: Sequence[str]) -> Mapping[str, Any]:
    """The identity of the stage's config; recalled where possible, for the stage's module may import torch."""
    asked = (stage.key, stage.function, profile, profile.section(stage.command, stage.variant), overrides)
    recalled = recall_identity(*asked)
    return recalled if recalled is not None else remember_identity(*asked, stage.configured(profile, overrides)[1])


def _keep(stage: Stage, run: StageRun) -> None:
    """Tell of the shards that were made while others are missing."""
    checks: dict[str, str] = run.summary.get("checks", {})
    _refuse_broken(stage, run, {name: why for name, why in checks.items() if why})
    found = {name: checks.get(name) for name in stage.checks}
    run.progress.kept(run.counts, found, fingerprint=run.fingerprint, why=run.incomplete)


def _refuse_broken(stage: Stage, run: StageRun, failed: Mapping[str, str]) -> None:
    for name, why in failed.items():
        run.progress.failed_check(name, why)
    if failed:
        raise CheckFailed("; ".join(f"{stage.key}: check {name} does not hold: {why}" for name, why in failed.items()))


def _finish(stage: Stage, settings: Mapping[str, Any], inputs: Mapping[str, Manifest], run: StageRun) -> Manifest:
    summary = Summary.model_validate(run.summary)
    missing = [name for name in stage.checks if name not in summary.checks]
    failed = {name: why for name, why in summary.checks.items() if why} | dict.fromkeys(missing, "was not checked")
    _refuse_broken(stage, run, failed)
    # columns of tables and curves stand in the order in which they were given
    artifacts.write_json(run.out / artifacts.SUMMARY, summary.model_dump(), sort_keys=False)
    manifest = Manifest(
        stage=stage.key,
        version=stage.version,
        fingerprint=run.fingerprint,
        deterministic=stage.deterministic,
        config=dict(settings),
        inputs={name: found.digest for name, found in sorted(inputs.items())},
        counts=dict(sorted(run.counts.items())),
        files=artifacts.record_files(run.out),
    )
    artifacts.write_bytes(run.out / artifacts.MANIFEST, manifest.encoded())
    return manifest


def _maybe_locked(profile: Profile, stage: Stage, progress: Progress):
    # several workers make the shards of one output: each locks the shard it makes, not the output
    name = f"worker-{os.getpid()}" if stage.partitioned else "output"
    return artifacts.locked(_lock_path(profile, stage, name), progress.log)


def _lock_path(profile: Profile, stage: Stage, name: str) -> Path:
    return profile.outputs / ".locks" / f"{stage.key}.{name}.lock"


def _drop_leftovers(final: Path) -> None:
    """Remove what other settings left half-made, once a whole output stands."""
    for leftover in final.parent.glob(f"{final.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _record_run(stage: Stage, profile: Profile, run: StageRun, started: float, manifest: Manifest | None) -> None:
    """Write what varies between equal runs (times, machine, versions, git) beside the outputs, never into them."""
    folder = profile.outputs / "runs" / stage.key
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(
        folder / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(started))}-{os.getpid()}.json",
        {
            "stage": stage.key,
            "fingerprint": run.fingerprint,
            "manifest": manifest.digest if manifest else None,
            "seconds": round(time.time() - started, 3),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "machine": {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count()},
            "packages": _versions(("torch", "diffusers", "transformers", "accelerate", "numpy", "torchmetrics")),
            "git": _git_state(profile.root),
            "job": {key: os.environ[key] for key in ("SLURM_JOB_ID", "DAGSTER_RUN_ID") if key in os.environ},
        },
    )


def _versions(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_state(root: Path) -> dict[str, Any]:
    def ask(*argv: str) -> str | None:
        try:
            done = subprocess.run(["git", *argv], cwd=root, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = ask("rev-parse", "HEAD")
    return {"revision": revision, "dirty": bool(ask("status", "--porcelain")) if revision else None}


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items()) or "nothing to count"
