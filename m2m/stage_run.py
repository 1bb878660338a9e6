"""The one way to run a stage: what its function is given, and how its output comes to stand whole in its place.

Belongs here: staleness, locks, crash safety. Not here: which stages there are (`m2m.stages`), the record of a run
(`m2m.run_record`).
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2m import artifacts, processes
from m2m.artifacts import Manifest, Summary
from m2m.config import Profile, resolve
from m2m.errors import ArtifactError, CheckFailed, ConfigError
from m2m.progress import Progress
from m2m.recall import recall_identity, remember_identity
from m2m.run_record import record_run, records
from m2m.stages import STAGES, Stage, shard_key


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
    force: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    summary: dict[str, dict[str, Any]] = field(default_factory=dict)
    incomplete: str = ""
    until_placed: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _alone: bool = False

    @property
    def records(self) -> Path:
        """Where the records of this stage's runs lie: what varies between equal runs goes there, not into `out`."""
        return records(self.profile, self.stage)

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

    def finish_alone(self) -> None:
        """Of several workers that find all shards whole, one goes on, until the output stands in its place.

        What the others do then fails, for `out` is gone; `run_stage` takes it for done.
        """
        if not self._alone:
            self.until_placed.enter_context(self.lock("finish-output"))
            self._alone = True


@dataclass(frozen=True)
class Outcome:
    """What a run of a stage came to."""

    folder: Path
    manifest: Manifest | None
    fresh: bool
    note: str


@dataclass(frozen=True)
class _Work:
    """What the leader tells the processes that make an output with it."""

    partial: Path
    inputs: Mapping[str, Path]
    fingerprint: str


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

    Started by torchrun, all processes call this, and the first one does what only one can do.

    Args:
        shards: for partitioned stages, the ones to make; all by default.
        force: make it again although it is current. Of `shards`, those that were made again since the output stood
            are kept: once all have been, it is put in its place. The same Dagster run, launched again by a cluster
            or a retry, goes on with what it has made.

    Raises:
        M2MError: bad settings, inputs that are not whole, or a check that does not hold.
    """
    with processes.team() as team:
        if not processes.leads():
            return _follow(stage, profile, overrides, team)
        with team.leading():
            outcome = _lead(stage, profile, overrides, shards, force, progress or Progress(), team)
        team.tell(outcome)
        return outcome


def _lead(
    stage: Stage,
    profile: Profile,
    overrides: Sequence[str],
    shards: Sequence[int] | None,
    force: bool,
    progress: Progress,
    team: processes.Team,
) -> Outcome:
    """What one process alone does, or of several the first: the only one that locks, finishes and records."""
    settings = _settings(stage, profile, overrides)
    folders = {name: STAGES[key].folder(profile) for name, key in stage.inputs.items()}
    manifests = {
        name: artifacts.require_whole(folder, STAGES[stage.inputs[name]].make_command(profile))
        for name, folder in folders.items()
    }
    print_ = fingerprint(stage, settings, manifests)
    final = stage.folder(profile)
    keys = None if shards is None else [shard_key(shard) for shard in shards]
    records(profile, stage).mkdir(parents=True, exist_ok=True)  # for DVC an out of every stage
    with _maybe_locked(profile, stage, progress), contextlib.ExitStack() as until_placed:
        partial = final.with_name(f"{final.name}.partial-{print_[:12]}")
        anew = force and shards is None  # of shards, others may be in the making here
        begun = anew and _begun(profile, stage, print_, progress)
        artifacts.recover(final)
        current = artifacts.read_manifest(final)
        whole = current is not None and not artifacts.faults(final, current)
        forced = force and not (begun and not partial.exists())  # this run has put it in its place already
        if current is not None and current.fingerprint == print_ and whole and not forced:
            progress.made(current, final, shards=keys, fresh=False)
            _drop_leftovers(final)
            return Outcome(final, current, False, f"{final} is current: nothing to do")
        function, config = stage.configured(profile, overrides)
        if current is not None and current.fingerprint == print_ and not whole and not partial.exists():
            if (there := artifacts.read_elsewhere(final)) is not None:
                raise ArtifactError(
                    f"{final} is damaged, and its tars lie at {there.url}: give `python -m m2m shards attach --url "
                    f"{there.url}` again, or remove the folder to make it anew here"
                )
            os.rename(final, partial)  # damaged: keep its good parts, finish the rest
        if anew and not begun:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        if anew and not begun:
            artifacts.write_json(_forced_note(profile, stage), _forced_by(print_, progress))
        run = StageRun(stage, profile, partial, folders, print_, progress, shards, force, until_placed=until_placed)
        started = time.time()
        manifest = artifacts.read_manifest(partial)
        if manifest is None or artifacts.faults(partial, manifest):  # whole if a crash came just before the swap
            if manifest is not None:  # where there was none, another worker may have written it by now
                (partial / artifacts.MANIFEST).unlink(missing_ok=True)
            if team.count > 1 and not config.made_together:
                raise ConfigError(f"{stage.key} is made by one process; {team.count} were started together")
            team.tell(_Work(partial, folders, print_))
            try:
                with team.working():
                    function(config, run)
            except Exception:
                placed = artifacts.read_manifest(final)
                if current == placed or placed is None or placed.fingerprint != print_:
                    raise
                # another worker found all shards whole, and put the folder in its place under this one's hands
                progress.made(placed, final, shards=keys, fresh=False)
                return Outcome(final, placed, False, f"{final} was finished by another worker")
            if run.incomplete:
                record_run(stage, profile, print_, started, None, progress.job)
                return Outcome(partial, None, True, run.incomplete)
        # workers that made the last shards together come here together: one finishes, the others find it done
        run.finish_alone()
        if not partial.exists():
            manifest = artifacts.require_whole(final, stage.make_command(profile))
        else:
            if manifest is None or not (partial / artifacts.MANIFEST).exists():
                manifest = _finish(stage, settings, manifests, run)
            artifacts.promote(partial, final)
        _drop_leftovers(final)
        record_run(stage, profile, print_, started, manifest, progress.job)
    progress.made(manifest, final, shards=keys, fresh=True)
    return Outcome(final, manifest, True, f"{final}: {len(manifest.files)} files, {_counted(manifest.counts)}")


def _follow(stage: Stage, profile: Profile, overrides: Sequence[str], team: processes.Team) -> Outcome:
    """What the other processes do: the stage's function, in the leader's folder, in silence."""
    word = team.hear()
    if isinstance(word, _Work):
        function, config = stage.configured(profile, overrides)
        run = StageRun(stage, profile, word.partial, word.inputs, word.fingerprint, Progress(quiet=True))
        function(config, run)
        word = team.hear()
    return word


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


def _forced_by(fingerprint: str, progress: Progress) -> dict[str, str]:
    return {"fingerprint": fingerprint, **progress.job}


def _forced_note(profile: Profile, stage: Stage) -> Path:
    return _lock_path(profile, stage, "forced").with_suffix(".json")


def _begun(profile: Profile, stage: Stage, fingerprint: str, progress: Progress) -> bool:
    """Whether it was this Dagster run that last began to make the output again; a command typed twice is two runs."""
    note = _forced_note(profile, stage)
    return bool(progress.job) and note.exists() and json.loads(note.read_text()) == _forced_by(fingerprint, progress)


def _lock_path(profile: Profile, stage: Stage, name: str) -> Path:
    return profile.outputs / ".locks" / f"{stage.key}.{name}.lock"


def _drop_leftovers(final: Path) -> None:
    """Remove what other settings left half-made, once a whole output stands."""
    for leftover in final.parent.glob(f"{final.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items()) or "nothing to count"
