"""Making an output shard by shard: several workers, each shard by one of them, whole shards never made again.

Belongs here: who makes which shard, and when all are there. Not here: what is in a shard (`image_sets`, `features`).
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from m2m.artifacts import write_bytes
from m2m.config import StageConfig, identity
from m2m.data.shard_reader import ShardReader
from m2m.data.shards import FOLDER, Failure, ShardPaths, ShardWriter, clear_leftovers, read_record
from m2m.data.tars import blocks_of, open_tar
from m2m.data.verified import is_current, shard_faults
from m2m.errors import ConfigError
from m2m.stage_run import StageRun

Content = TypeVar("Content")


@dataclass(frozen=True)
class PlannedShard(Generic[Content]):
    """A shard to be made: its number, what goes into it, and the fingerprint of that and of how it is made."""

    number: int
    content: Content
    fingerprint: str


def settings_of(config: StageConfig, run: StageRun, *, without: Iterable[str]) -> dict[str, Any]:
    """The settings that can change a shard's bytes: all but those that only say which shards there are."""
    kept = {name: value for name, value in identity(config, run.profile.root).items() if name not in set(without)}
    return {"stage": run.stage.key, "version": run.stage.version, "config": kept}


def shard_fingerprint(settings: Mapping[str, Any], content: Any) -> str:
    """sha256 over what a shard is made from and how."""
    return hashlib.sha256(json.dumps([settings, content], sort_keys=True).encode()).hexdigest()


def make_shards(
    run: StageRun,
    total: int,
    planned: Callable[[], Iterator[PlannedShard[Content]]],
    fill: Callable[[PlannedShard[Content], ShardWriter], None],
    retry: Callable[[PlannedShard[Content], Sequence[str]], dict[str, Mapping[str, bytes]]] | None = None,
) -> bool:
    """Make the shards that this run is asked for; tells whether all of the output's are there now.

    A shard that stands already, here or in the output that this one will replace, is taken as it is if its fingerprint
    fits; a forced run takes only what stands here. Where some are missing at the end, the stage is told to finish
    later.

    Args:
        retry: makes sets that failed last time, by their keys; gives the files of those that succeed. Such sets are
            added to their shard, whose other sets are copied.

    Raises:
        ConfigError: a shard is asked for that there is not.
    """
    wanted = set(range(total)) if run.shards is None else set(run.shards)
    if beyond := sorted(wanted - set(range(total))):
        raise ConfigError(f"{run.stage.key} has shards 0 to {total - 1}; shard {beyond[0]} was asked for")
    previous = run.stage.folder(run.profile)
    for shard in planned():
        if shard.number not in wanted:
            continue
        with run.lock(f"shard-{shard.number:05d}"):
            current = is_current(run.out, shard.number, shard.fingerprint)
            if not current and not run.force and adopt(previous, run.out, shard.number, shard.fingerprint):
                run.progress.log(f"shard {shard.number:05d}: as it stands in {previous}")
                current = True
            if current:
                failed = [failure.key for failure in read_record(run.out, shard.number).failed]
                if failed and retry and (found := retry(shard, failed)):
                    run.progress.log(f"shard {shard.number:05d}: {len(found)} of {len(failed)} failed sets made now")
                    _amend(run.out, shard, found)
                continue
            with ShardWriter(run.out, shard.number, shard.fingerprint) as writer:
                fill(shard, writer)
        wanted.discard(shard.number)
        if not wanted:
            break
    missing = [number for number in range(total) if not ShardPaths(run.out, number).record.is_file()]
    if not missing:
        missing = [s.number for s in planned() if not is_current(run.out, s.number, s.fingerprint)]
    if missing:
        run.finish_later(f"{total - len(missing)} of {total} shards are whole; to be made: {_ranges(missing)}")
    return not missing


def adopt(source: Path, out: Path, number: int, fingerprint: str) -> bool:
    """Take over a shard of another output when it is the same work; tells whether it did.

    So more captions, or others elsewhere in the file, do not make whole shards anew. Links where it can, else copies.
    """
    if not is_current(source, number, fingerprint) or shard_faults(source, number):
        return False
    there, here = ShardPaths(source, number), ShardPaths(out, number)
    here.tar.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(out, number)
    temporary = here.tar.with_name(f".{here.tar.name}.tmp")
    try:
        os.link(there.tar, temporary)
    except OSError:
        with contextlib.closing(open_tar(there)) as old, temporary.open("wb") as new:
            for block in blocks_of(old):
                new.write(block)
            new.flush()
            os.fsync(new.fileno())
    os.replace(temporary, here.tar)
    write_bytes(here.index, there.index.read_bytes())
    write_bytes(here.record, there.record.read_bytes())
    return True


def _amend(out: Path, shard: PlannedShard[Any], found: Mapping[str, Mapping[str, bytes]]) -> None:
    """Write a shard anew with sets that it lacked; the bytes are those of a shard in which nothing failed."""
    old = ShardReader(out, shard.number)
    try:
        with ShardWriter(out, shard.number, shard.fingerprint) as writer:
            places = {key: position for position, key in enumerate(old.keys)}
            for key in sorted([*places, *found]):  # keys are ids in figures of equal length: in the order of ids
                files = found.get(key)
                if files is None:
                    files = {name: old.read(places[key], name) for name in old.names(places[key])}
                writer.add(key, files)
            for failure in old.record.failed:
                if failure.key not in found:
                    writer.fail(failure.key, failure.error)
            for failure in old.record.dropped:
                writer.drop(failure.key, failure.error)
    finally:
        old.close()


def check_shards(run: StageRun, total: int, expected: int, max_failed: float) -> None:
    """Report counts and both checks of a sharded stage.

    Args:
        expected: sets that the shards should hold, failed and dropped ones included.
        max_failed: the share of sets that may fail.
    """
    records = [read_record(run.out, number) for number in range(total)]
    sets, failures = sum(r.sets for r in records), [f for r in records for f in r.failed]
    dropped = [f for r in records for f in r.dropped]
    # sizes and indices only: every file is read and hashed for the manifest right after this
    faults = [fault for number in range(total) for fault in shard_faults(run.out, number, content=False)]
    if sets + len(failures) + len(dropped) != expected:
        faults.append(
            f"{sets} sets, {len(failures)} failures and {len(dropped)} dropped, but {expected} sets were to be made"
        )
    run.count(shards=total, sets=sets, failed=len(failures))
    if dropped:
        run.count(dropped=len(dropped))
        run.table("dropped by the content filter", [failure.model_dump() for failure in dropped[:100]])
    if failures:
        run.table("failed", [failure.model_dump() for failure in failures[:100]])
    run.figure(megabytes=round(sum(r.bytes for r in records) / 1e6, 3))
    run.check("shards_valid", not faults, "; ".join(faults[:3]))
    few = len(failures) <= max_failed * expected
    run.check("no_nan", few, f"{len(failures)} of {expected} sets failed, for example {_said(failures)}")


def drop_leftovers(out: Path) -> None:
    """Remove the temporary files of killed writers, once nobody writes: an output holds nothing by accident."""
    for folder in (out, out / FOLDER):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)


def _said(failures: list[Failure]) -> str:
    return f"{failures[0].key}: {failures[0].error}" if failures else "none"


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 7] -> "0-2,7", as `--shards` takes it; the first few."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    said = [str(a) if a == b else f"{a}-{b}" for a, b in spans[:8]]
    return ",".join([*said, "..."] if len(spans) > 8 else said)
