"""`python -m orchestration.lineage`: what people ask of lakeFS: naming a release, reading an output at a commit.

Belongs here: the command line. Not here: lakeFS (`orchestration.lineage.lakefs`), what is recorded after runs.
"""

import argparse
import sys
from pathlib import Path

from assets_defs.profile import PROFILE
from m2m.errors import ConfigError, M2MError
from m2m.stages import find_stage
from orchestration.lineage.chosen import lakefs_of_surroundings


def main(argv: list[str] | None = None) -> int:
    """Exits with 2 and one line where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m orchestration.lineage", description="lakeFS, as M2M_LAKEFS says")
    actions = parser.add_subparsers(dest="action", required=True)
    tag = actions.add_parser("tag", help="name a commit, for example a release")
    tag.add_argument("name")
    tag.add_argument("--at", metavar="REF", help="a commit, branch or tag (default: the head of main)")
    fetch = actions.add_parser("fetch", help="bring an output as it was at a commit, every byte checked")
    fetch.add_argument("stage", help="for example generate-sets or pretrain@self, of the profile of M2M_PROFILE")
    fetch.add_argument("ref", help="a commit, branch or tag")
    fetch.add_argument("--out", type=Path, help="folder (default: the stage's own)")
    given = parser.parse_args(argv)
    try:
        lake = lakefs_of_surroundings()
        if lake is None:
            raise ConfigError("M2M_LAKEFS is not set: it says where lakeFS is (docs/lineage.md)")
        if given.action == "tag":
            lake.tag(given.name, given.at)
            print(f"{given.name} is {given.at or 'the head of main'}")
        else:
            command, _, variant = given.stage.partition("@")
            stage = find_stage(command, variant or None)
            folder = given.out or stage.folder(PROFILE)
            manifest = lake.fetch(stage, PROFILE.name, given.ref, folder)
            print(f"{folder}: {len(manifest.files)} files, manifest {manifest.digest[:16]}")
    except M2MError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
