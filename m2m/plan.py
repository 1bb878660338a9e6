"""Looking before leaping: what a stage, or a whole profile, would do and cost, with no output written.

Belongs here: dry runs and the plan. Not here: what a stage's own config knows to check (`StageConfig.preview`), what it
costs (`m2m.costs`).
"""

import argparse
from collections.abc import Sequence

from m2m import artifacts
from m2m.arguments import EXIT_BAD_INPUT, add_profile_argument, open_profile
from m2m.config import Profile
from m2m.errors import M2MError
from m2m.planned import EFFICIENCY, remember_plan
from m2m.stages import STAGES, Stage, resources


def dry_run(stage: Stage, profile: Profile, overrides: Sequence[str] = ()) -> list[str]:
    """Check a stage's config, inputs, models (built without memory) and resources; says what was found.

    Raises:
        M2MError: something that would stop the stage.
    """
    _, config_class = stage.load()
    config = profile.stage_config(config_class, stage.command, stage.variant, overrides)
    asked = resources(stage, profile)
    lines = [f"{stage.key}: {stage.description}"]
    for name, key in stage.inputs.items():
        folder = STAGES[key].folder(profile)
        manifest = artifacts.read_manifest(folder)
        state = "whole" if manifest and not artifacts.faults(folder, manifest) else f"made by {STAGES[key].key} first"
        lines.append(f"  input {name}: {folder} ({state})")
    lines += [f"  {line}" for line in config.preview(profile.root, stage.variant)]
    lines.append(
        f"  asks for {asked.nodes} x ({asked.gpus} {asked.gpu_type or 'GPU'}s, {asked.cpus} CPUs, "
        f"{asked.memory_gb:g} GB), {asked.hours:g} h a launch"
    )
    lines.append(f"  would write {stage.folder(profile)}")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_profile_argument(parser)
    parser.add_argument(
        "--efficiency", type=_share, default=EFFICIENCY, help=f"share of a GPU's peak that is reached ({EFFICIENCY})"
    )
    parser.add_argument("--gpus", type=int, help="that sharded stages are spread over; the largest launch's by default")
    parser.add_argument("--price", type=float, help="of a GPU-hour, in any money")
    parser.add_argument("--no-costs", action="store_true", help="check alone, which is faster")


def main(args: argparse.Namespace) -> int:
    """Dry-run every stage of a profile and say its cost; what would stop one is said, and the next is looked at.

    The figures are kept for the assets (`m2m.planned`).
    """
    from m2m.costs import Costs, cost_lines

    profile = open_profile(args.config)
    costs = Costs(profile)
    stopped = 0
    for stage in STAGES.values():
        for lines in (
            lambda stage=stage: dry_run(stage, profile),
            lambda stage=stage: cost_lines(stage, costs, efficiency=args.efficiency, gpus=args.gpus, price=args.price),
            lambda stage=stage: remember_plan(stage, profile, costs=costs) and [],
        ):
            try:
                for line in lines():
                    print(line, flush=True)
            except M2MError as error:
                stopped += 1
                print(f"{stage.key}: would stop: {error}")
            if args.no_costs:
                break
    return EXIT_BAD_INPUT if stopped else 0


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share between 0 and 1")
    return value
