"""What all commands share: the profile's argument, ranges of shards, exit codes.

Belongs here: what a stage's command and the tools beside the stages have in common. Not here: the commands (`m2m.cli`).
"""

import argparse

from m2m.config import Profile, load_profile
from m2m.stages import commands
from m2m.training.stopping import STOPPED

EXIT_BAD_INPUT = 2
EXIT_CALL_AGAIN = STOPPED  # stopped by a signal, and the same command goes on from what is whole


def add_profile_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="PROFILE", help="a file of configs/ or its name; M2M_PROFILE or tiny else")


def open_profile(name: str | None) -> Profile:
    """The profile a command was given, refused where it names stages that there are not."""
    return load_profile(name, known=commands())


def parse_shards(text: str) -> list[int]:
    """`0-3,7` -> [0, 1, 2, 3, 7]."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            found.update(range(int(first), int(last if dash else first) + 1))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is no shard number or range such as 0-3") from None
    return sorted(found)
