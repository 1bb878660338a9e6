"""The command line: `python -m m2m STAGE ...` and the tools beside the stages.

Belongs here: the commands and their arguments. Not here: what a command does, what all share (`m2m.arguments`).
"""

import argparse
import contextlib
import errno
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2m import processes
from m2m.arguments import EXIT_BAD_INPUT, add_profile_argument, open_profile, parse_shards
from m2m.artifacts import Manifest
from m2m.config import Profile
from m2m.errors import M2MError
from m2m.progress import Beside, Progress, open_progress
from m2m.stage_run import run_stage
from m2m.stages import STAGES, Stage, commands, find_stage
from m2m.training.stopping import ending_when_asked

_TRAINED = "models"  # the group of stages that are trained: long, with checkpoints, by several processes
# tool name -> (module with `add_arguments(parser)` and `main(args) -> int | None`, one line of help)
TOOLS = {
    "plan": ("m2m.plan", "what a profile will do and cost, stage by stage"),
    "shards": ("m2m.data.shards_cli", "list, show, verify or repair shards; attach those of a store"),
    "data": ("m2m.data.data_cli", "what real data sets hold, and what of them is set aside and why"),
    "generate": ("m2m.pipelines.generate_cli", "images from images, with a trained model"),
    "accept": ("m2m.evaluation.accept", "the models as they are, evaluated for later evaluations to be held against"),
    "compare": ("m2m.evaluation.compare", "two or more reports or evaluations, with confidence intervals"),
    "trace": ("m2m.trace", "what an output was made from, back to the captions; what differs between two"),
    "store": ("m2m.stores", "send an output to an object store, or fetch one"),
    "export": ("m2m.export", "a trained model as a folder for the Hugging Face hub, with its card"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    tool = arguments[0] if arguments and arguments[0] in TOOLS else None
    parser = _parser(tool)
    args = parser.parse_args(arguments)
    try:
        if tool:
            return importlib.import_module(TOOLS[tool][0]).main(args) or 0
        return _run_stage_command(args, arguments)
    except M2MError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"error: {error.strerror}{where}: free some; the same command goes on from what is whole", file=sys.stderr
        )
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is whole", file=sys.stderr)
        return 130


def _parser(tool: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m m2m", description=sys.modules["m2m"].__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, variants in commands().items():
        stage = next(stage for stage in STAGES.values() if stage.command == command)
        sub = subparsers.add_parser(command, help=stage.description if not variants else f"{', '.join(variants)}")
        add_profile_argument(sub)
        if variants:
            sub.add_argument("--variant", required=True, choices=variants)
        if stage.partitioned:
            sub.add_argument("--shards", type=parse_shards, help="for example 0-3,7; all by default")
        if stage.group == _TRAINED:
            sub.add_argument("--processes", type=int, default=1, help="on this machine, one a GPU; default 1")
        sub.add_argument("--force", action="store_true", help="make it again although it is current")
        sub.add_argument(
            "--dry-run", action="store_true", help="check inputs, settings, models, resources; write nothing"
        )
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings other than the profile's")
    for name, (module, text) in TOOLS.items():
        sub = subparsers.add_parser(name, help=text)
        if name == tool:
            importlib.import_module(module).add_arguments(sub)
    return parser


def _run_stage_command(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    stage = find_stage(args.command, getattr(args, "variant", None))
    profile = open_profile(args.config)
    if args.dry_run:
        from m2m.plan import dry_run

        return _say_all(lambda: dry_run(stage, profile, args.overrides))
    if stage.group == _TRAINED and args.processes > 1 and processes.count() == 1:
        from m2m.ranks import run_together

        return run_together([sys.executable, "-m", "m2m", *arguments], args.processes)
    # others make their output shard by shard, or within minutes: a signal ends them as it ends any process
    answering = ending_when_asked() if stage.group == _TRAINED else contextlib.nullcontext()
    with answering, open_progress(_beside(stage, profile, args.overrides)) as progress:
        return _run(stage, profile, args, progress)


def _beside(stage: Stage, profile: Profile, overrides: Sequence[str]) -> Beside:
    def shown(manifest: Manifest, folder: Path, say: Callable[[str], None]) -> Mapping[str, Any]:
        from m2m.asset_metadata import asset_metadata

        return asset_metadata(stage, profile, overrides, manifest, folder, say)

    return shown


def _run(stage: Stage, profile: Profile, args: argparse.Namespace, progress: Progress) -> int:
    outcome = run_stage(
        stage,
        profile,
        overrides=args.overrides,
        shards=getattr(args, "shards", None),
        force=args.force,
        progress=progress,
    )
    progress.log(outcome.note)
    return 0


def _say_all(lines: Callable[[], Sequence[str]]) -> int:
    for line in lines():
        print(line)
    return 0
