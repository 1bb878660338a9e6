"""Where a result came from: its manifest, its inputs' manifests, back to the captions.

Belongs here: walking manifests. Not here: DVC's and git's records of them.
"""

import argparse
from collections.abc import Iterator

from m2m import artifacts
from m2m.config import Profile
from m2m.stages import STAGES, Stage, find_stage


def trace(stage: Stage, profile: Profile, depth: int = 0) -> Iterator[str]:
    """One line an output, its inputs indented below it; says where an input was made anew since."""
    folder = stage.folder(profile)
    manifest = artifacts.read_manifest(folder)
    if manifest is None:
        yield f"{'  ' * depth}{stage.key}: {folder} is not whole"
        return
    yield f"{'  ' * depth}{stage.key}: {folder} fingerprint {manifest.fingerprint[:12]} manifest {manifest.digest[:12]}"
    for name, key in stage.inputs.items():
        there = artifacts.read_manifest(STAGES[key].folder(profile))
        if there is None or there.digest != manifest.inputs.get(name):
            yield f"{'  ' * (depth + 1)}(its {name} was {manifest.inputs.get(name, '?')[:12]}; another stands there)"
        yield from trace(STAGES[key], profile, depth + 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from m2m.cli import add_profile_argument

    add_profile_argument(parser)
    parser.add_argument("stage", help="for example report, or pretrain@self")


def main(args: argparse.Namespace) -> None:
    from m2m.cli import open_profile

    command, _, variant = args.stage.partition("@")
    for line in trace(find_stage(command, variant or None), open_profile(args.config)):
        print(line)
