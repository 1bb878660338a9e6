"""`python -m m2m data`: what real data sets hold, and what of them is set aside and why, before a stage reads them.

Belongs here: the validation report. Not here: layouts (each has its own module).
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from m2m.arguments import EXIT_BAD_INPUT, add_profile_argument, open_profile
from m2m.config import Profile, resolve
from m2m.data.coco import CocoSets
from m2m.data.objaverse import ObjaverseViews
from m2m.data.photo_sets import PhotoSets
from m2m.data.set_aside import SetAside
from m2m.data.vgsi import SPLITS, Procedures
from m2m.errors import ConfigError, M2MError

KINDS = ("objaverse", "vgsi", "photo-sets", "coco")
_NAMED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_profile_argument(parser)
    parser.add_argument("kind", nargs="?", choices=KINDS, help="with a path: one data set; without: the profile's own")
    parser.add_argument("path", nargs="?", type=Path, help="the folder; coco: instances_*.json")
    parser.add_argument("--images", type=Path, help="coco: the folder of images")
    parser.add_argument("--all", action="store_true", help="name everything that is set aside, not the first ten")


def main(args: argparse.Namespace) -> int:
    """Report on one data set or on all that a profile names; 2 where one can't be read.

    Raises:
        ConfigError: a kind without its path.
    """
    if args.kind and (args.path is None or (args.kind == "coco" and args.images is None)):
        raise ConfigError(f"data {args.kind}: give its path{' and --images' if args.kind == 'coco' else ''}")
    wanted = [(args.kind, args.path, args.images)] if args.kind else list(_of_profile(open_profile(args.config)))
    if not wanted:
        print(f"{open_profile(args.config).path} names no data set beside captions")
    unreadable = 0
    for kind, path, images in wanted:
        try:
            for line in report(kind, path, images, None if args.all else _NAMED):
                print(line)
        except M2MError as error:
            unreadable += 1
            print(f"{kind}: can't be used: {error}")
    return EXIT_BAD_INPUT if unreadable else 0


def report(kind: str, path: Path, images: Path | None = None, named: int | None = _NAMED) -> Iterator[str]:
    """What a data set holds, every file opened however many there are, and what is set aside and why.

    Args:
        kind: one of `KINDS`.
        named: so many files that are set aside are named; None names all.

    Raises:
        InputError: it is not there, or nothing in it can be used.
    """
    counts, aside = _LOOKS[kind](path, images)
    yield f"{kind}: {path}"
    for line in counts:
        yield f"  {line}"
    yield f"  {len(aside):,} set aside" + (":" if aside else "")
    for reason, count in Counter(one.reason for one in aside).most_common():
        yield f"    {count:,} x {reason}"
    for one in aside[:named]:
        yield f"    {one}"
    if named is not None and len(aside) > named:
        yield f"    ... and {len(aside) - named:,} more (--all names them)"


def _objaverse(path: Path, _: Path | None) -> tuple[list[str], list[SetAside]]:
    found = ObjaverseViews(path)
    views: list[int] = []
    for i in range(len(found)):
        try:
            views.append(len(found[i].images))
        except M2MError:
            continue  # it stands among what is set aside
    splits = ", ".join(f"{len(ObjaverseViews(path, split)):,} to {split}" for split in ("train", "validation"))
    said = [f"{len(views):,} objects ({splits}), {sum(views):,} views", f"views an object: {_spread(views)}"]
    return said, found.set_aside


def _vgsi(path: Path, _: Path | None) -> tuple[list[str], list[SetAside]]:
    said: list[str] = []
    aside: dict[str, SetAside] = {}  # a malformed article is met in both splits
    for split in SPLITS:
        found, steps = Procedures(path, split), []
        for i in range(len(found)):
            try:
                steps.append(len(found.images(i, 8)))
            except M2MError:
                continue
        said.append(f"{split}: {len(steps):,} procedures, {sum(steps):,} illustrated steps ({_spread(steps)} each)")
        aside |= {str(one): one for one in found.set_aside}
    return said, list(aside.values())


def _photo_sets(path: Path, _: Path | None) -> tuple[list[str], list[SetAside]]:
    return _categories(found := PhotoSets(path)), found.set_aside


def _coco(path: Path, images: Path | None) -> tuple[list[str], list[SetAside]]:
    assert images is not None
    return _categories(found := CocoSets(path, images)), found.set_aside


def _categories(found: PhotoSets | CocoSets) -> list[str]:
    counts = [len(found[i].paths) for i in range(len(found))]
    pictures = len({path for i in range(len(found)) for path in found[i].paths})
    return [f"{len(found)} categories, {pictures:,} photographs", f"photographs a category: {_spread(counts)}"]


_LOOKS: dict[str, Callable[[Path, Path | None], tuple[list[str], list[SetAside]]]] = {
    "objaverse": _objaverse,
    "vgsi": _vgsi,
    "photo-sets": _photo_sets,
    "coco": _coco,
}


def _spread(counts: Sequence[int]) -> str:
    if not counts:
        return "none"
    return f"{min(counts)} to {max(counts)}, on average {sum(counts) / len(counts):.1f}"


def _of_profile(profile: Profile) -> Iterator[tuple[str, Path, Path | None]]:
    """The data sets that a profile's fine-tuning and evaluations read, each once."""
    fields = {"nvs": ("data", "objaverse"), "vgsi": ("data", "vgsi"), "novel_views": ("objaverse", "objaverse")}
    fields |= {"procedures": ("vgsi", "vgsi")}
    seen = set()
    for command, variants in (("finetune", ("nvs", "vgsi")), ("evaluate", ("novel_views", "procedures"))):
        for variant in variants:
            name, kind = fields[variant]
            source = profile.section(command, variant).get(name)
            if source and (kind, source) not in seen:
                seen.add((kind, source))
                yield kind, resolve(source, profile.root), None
    photographs = profile.section("evaluate", "real_images")
    if source := photographs.get("photo_sets"):
        yield "photo-sets", resolve(source, profile.root), None
    if (instances := photographs.get("coco_instances")) and (images := photographs.get("coco_images")):
        yield "coco", resolve(instances, profile.root), resolve(images, profile.root)
