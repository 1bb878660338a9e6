"""`python -m m2m shards list|show|verify|repair|attach`: what lies in a stage's shards.

Belongs here: the command. Not here: what is broken and mending it (`m2m.data.shard_repair`), making shards (stages).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from m2m.arguments import add_profile_argument, open_profile, parse_shards
from m2m.config import Profile
from m2m.data.shard_reader import ShardReader
from m2m.data.shard_repair import find_damage, repair, shard_numbers
from m2m.data.shards import FOLDER, read_record
from m2m.errors import ArtifactError, ConfigError
from m2m.progress import open_progress
from m2m.stages import STAGES, Stage

_STAGES = [stage.key for stage in STAGES.values() if stage.partitioned]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "show", "verify", "repair", "attach"))
    add_profile_argument(parser)
    parser.add_argument("stage", nargs="?", default=_STAGES[0], choices=_STAGES)
    parser.add_argument("--shards", metavar="N-M", help="for example 0-3,7; all by default")
    parser.add_argument("--sets", type=int, default=4, help="show: how many sets")
    parser.add_argument("--images", type=int, default=8, help="show: how many images of each")
    parser.add_argument("--output", type=Path, default=Path("sets.png"), help="show: the picture to write")
    parser.add_argument(
        "--url", help="attach: the output whose tars stay there and are read by range, for example s3://bucket/sets"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="repair: an override it was made with"
    )


def main(args: argparse.Namespace) -> int:
    """Run one action; 1 where shards are damaged (and stay so).

    Raises:
        ArtifactError: there are no shards, or those asked for.
    """
    stage = STAGES[args.stage]
    profile = open_profile(args.config)
    if args.action == "attach":
        return _attach(stage, profile, args.url)
    out = current_folder(stage.folder(profile))
    asked = None if args.shards is None else _asked(args.shards)
    numbers = shard_numbers(out) if asked is None else asked
    if not numbers:
        raise ArtifactError(f"{out} has no whole shard yet")
    match args.action:
        case "list":
            for line in listed(out, numbers):
                print(line)
        case "verify":
            return verify(out, asked)
        case "repair":
            return _repair(stage, profile, out, asked, args.set)
        case "show":
            if stage.command != "generate-sets":
                raise ConfigError(f"{stage.key} holds no pictures; show those of generate-sets")
            show(out, numbers, args.sets, args.images, args.output)
    return 0


def current_folder(folder: Path) -> Path:
    """The output, or where it is not there yet what is being made of it.

    Raises:
        ArtifactError: neither.
    """
    partial = sorted(folder.parent.glob(f"{folder.name}.partial-*"), key=lambda path: path.stat().st_mtime)
    for there in (folder, *reversed(partial)):
        if (there / FOLDER).is_dir():
            return there
    raise ArtifactError(f"{folder} has no shards yet; make them with: python -m m2m {folder.name}")


def listed(out: Path, numbers: list[int]) -> Iterator[str]:
    """A line for each shard, and one for all."""
    yield f"{out}"
    sets = size = 0
    for number in numbers:
        try:
            record = read_record(out, number)
        except ArtifactError as error:
            yield f"  {number:05d}  not whole: {error}"
            continue
        failed = f", {len(record.failed)} failed" if record.failed else ""
        keys = ShardReader(out, number).keys
        span = f"{keys[0]} to {keys[-1]}" if keys else "nothing"
        yield f"  {number:05d}  {record.sets} sets{failed}, {record.bytes:,} bytes, {span}, sha256 {record.sha256[:12]}"
        sets, size = sets + record.sets, size + record.bytes
    yield f"{len(numbers)} shards, {sets:,} sets, {size:,} bytes"


def verify(out: Path, numbers: list[int] | None) -> int:
    """Read every byte, of some shards or of all that the folder holds; say what is wrong with which file."""
    damage = find_damage(out, numbers)
    checked = shard_numbers(out) if numbers is None else numbers
    for number in checked:
        if number not in damage.shards:
            print(f"{number:05d}  whole")
    for line in damage.lines():
        print(line)
    if damage:
        others = f" and {len(damage.others)} other files" if damage.others else ""
        print(f"{len(damage.shards)} of {len(checked)} shards{others} are damaged: python -m m2m shards repair")
    return int(bool(damage))


def _repair(stage: Stage, profile: Profile, out: Path, asked: list[int] | None, overrides: list[str]) -> int:
    with open_progress() as progress:
        damage = repair(stage, profile, out, asked, overrides, progress)
    if not damage:
        print(f"{out}: nothing to repair")
        return 0
    return verify(current_folder(stage.folder(profile)), asked)


def _attach(stage: Stage, profile: Profile, url: str | None) -> int:
    from m2m.data.attached import attach

    if url is None:
        raise ConfigError("shards attach: --url says where the output lies, for example s3://bucket/outputs/sets")
    with open_progress() as progress:
        manifest = attach(url, stage, stage.folder(profile), progress)
    print(f"{stage.folder(profile)}: {len(manifest.files)} files, the tars are read from {url}")
    return 0


def show(out: Path, numbers: list[int], sets: int, images: int, output: Path) -> None:
    """Write a contact sheet of the first sets of some shards.

    Raises:
        ArtifactError: the sets were made without pictures.
    """
    from m2m.data.sets import ImageSets
    from m2m.pictures import contact_sheet

    found = ImageSets(out)
    wanted = set(numbers)
    chosen = [i for i in range(len(found)) if found.place(i)[0] in wanted][:sets]
    shown = range(min(images, found.images_per_set))
    rows = [found.pictures(i, shown) for i in chosen]
    contact_sheet(rows, [f"{found.caption_id(i)}: {found.caption(i)}" for i in chosen]).save(output)
    print(f"{output}: {len(rows)} sets, {len(shown)} images each")


def _asked(asked: str) -> list[int]:
    try:
        return parse_shards(asked)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--shards: {error}") from None
