"""What is broken in a folder of shards, down to the file, and remaking that alone.

Belongs here: comparing shards with their records and the output's manifest, mending an index, discarding what can't be
trusted. Not here: making shards (their stage does), the command line (`m2m.data.shards_cli`).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from m2m import artifacts
from m2m.artifacts import FileRecord, Manifest
from m2m.config import Profile, identity
from m2m.data.shards import FOLDER, ShardPaths, rebuild_index
from m2m.data.verified import shard_faults
from m2m.errors import ArtifactError
from m2m.progress import Progress
from m2m.stage_run import StageRun, fingerprint, run_stage
from m2m.stages import STAGES, Stage


@dataclass(frozen=True)
class Damage:
    """What is wrong in a folder of shards: by shard, and in the files beside them (by path in the folder)."""

    shards: dict[int, list[str]]
    others: dict[str, str]

    def __bool__(self) -> bool:
        return bool(self.shards or self.others)

    def lines(self) -> Iterator[str]:
        """A line for each shard and each file, naming it."""
        for number, faults in sorted(self.shards.items()):
            yield f"{number:05d}  {'; '.join(faults)}"
        for path, fault in sorted(self.others.items()):
            yield f"{path}  {fault}"


def shard_numbers(out: Path) -> list[int]:
    """The shards that the folder has or had: by their files, and by its manifest."""
    names = [path.name for path in (out / FOLDER).glob("[0-9]*.*")] + [Path(path).name for path in _records(out)]
    return sorted({int(stem) for name in names for stem in [name.partition(".")[0]] if stem.isdigit()})


def find_damage(out: Path, numbers: Sequence[int] | None = None) -> Damage:
    """Read every byte of some shards (all by default, and then the folder's other files too) and compare.

    A tar is held against its record, record and index also against the manifest where there is one: a record says how
    its shard was made, which no other file of the shard repeats.
    """
    records = _records(out)
    shards = {}
    for number in shard_numbers(out) if numbers is None else numbers:
        if found := [*shard_faults(out, number), *_unlike_manifest(out, number, records)]:
            shards[number] = list(dict.fromkeys(found))
    others = {}
    if numbers is None:
        if (out / artifacts.MANIFEST).exists() and not records:
            others[artifacts.MANIFEST] = "can't be read"
        for path, record in records.items():
            if not path.startswith(f"{FOLDER}/") and (fault := _fault(out, record)):
                others[path] = fault
    return Damage(shards, others)


def repair(
    stage: Stage,
    profile: Profile,
    out: Path,
    numbers: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Damage:
    """Find damage, mend indices from their tars, discard what else is broken and let the stage remake that alone.

    Args:
        out: the stage's output, or the folder in which it is being made.
        numbers: look at these shards only; at everything by default.
        overrides: the ones that the output was made with.

    Returns:
        What was found.

    Raises:
        ArtifactError: the output was made with other settings or inputs, so that nothing could be kept; or its tars
            lie elsewhere.
    """
    progress = progress or Progress()
    damage = find_damage(out, numbers)
    if not damage:
        return damage
    if (there := artifacts.read_elsewhere(out)) is not None:
        raise ArtifactError(f"{out}: its tars lie at {there.url}: repair them where they were made, and attach again")
    manifest = artifacts.read_manifest(out)
    _require_same_work(stage, profile, out, manifest, overrides)
    run = StageRun(stage, profile, out, {}, "", progress)
    broken = []
    for number, faults in sorted(damage.shards.items()):
        with run.lock(f"shard-{number:05d}"):
            if rebuild_index(out, number) and not find_damage(out, [number]):
                progress.log(f"{number:05d}  index made again from the tar")
                continue
            progress.log(f"{number:05d}  to be made again: {'; '.join(faults)}")
            paths = ShardPaths(out, number)
            for path in (paths.record, paths.index, paths.tar):  # the record first: without it there is no shard
                path.unlink(missing_ok=True)
            broken.append(number)
    for path in damage.others:
        progress.log(f"{path}  to be made again")
        (out / path).unlink(missing_ok=True)
    if broken or damage.others:
        # of an output all shards are asked for, the whole ones are kept; one that is in the making stays so
        whole = out == stage.folder(profile)
        run_stage(stage, profile, overrides=overrides, shards=None if whole else broken, progress=progress)
    return damage


def _require_same_work(
    stage: Stage, profile: Profile, out: Path, manifest: Manifest | None, overrides: Sequence[str]
) -> None:
    inputs = {
        name: artifacts.require_whole(STAGES[key].folder(profile), STAGES[key].make_command(profile))
        for name, key in stage.inputs.items()
    }
    _, config = stage.configured(profile, overrides)
    wanted = fingerprint(stage, identity(config, profile.root), inputs)
    _, is_partial, made_as = out.name.rpartition(".partial-")
    differs = made_as != wanted[:12] if is_partial else manifest is not None and manifest.fingerprint != wanted
    if differs:
        raise ArtifactError(
            f"{out} was made with other settings or inputs than {profile.path} gives now: repair would make all of it "
            f"anew. Give the overrides that it was made with, or make the new one: {stage.make_command(profile)}"
        )


def _records(out: Path) -> dict[str, FileRecord]:
    manifest = artifacts.read_manifest(out)
    return {record.path: record for record in manifest.files} if manifest else {}


def _unlike_manifest(out: Path, number: int, records: dict[str, FileRecord]) -> Iterator[str]:
    paths = ShardPaths(out, number)
    for path in (paths.record, paths.index):  # small files; the tar's digest stands in the record
        record = records.get(path.relative_to(out).as_posix())
        if record and (fault := _fault(out, record)):
            yield f"{path} {fault}"


def _fault(out: Path, record: FileRecord) -> str:
    try:
        with (out / record.path).open("rb") as f:
            same = hashlib.file_digest(f, "sha256").hexdigest() == record.sha256
    except OSError:
        return "is missing"
    return "" if same else "has other content than the manifest says"
