"""What later evaluations are held against: the models of a profile as they are, evaluated with enough noises.

The regression gate needs the accepted side's noise to be small, whatever it costs: it is paid once for each accepted
model, not with each evaluation. The profile's outputs stay as they are.

Belongs here: `python -m m2m accept`. Not here: the gate (`m2m.evaluation.gate`), sampling (`m2m.evaluation.noises`).
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from m2m import artifacts, processes
from m2m import config as configs
from m2m.arguments import add_profile_argument, open_profile
from m2m.config import Profile
from m2m.errors import CheckFailed, ConfigError
from m2m.evaluation.gate import LOOKS
from m2m.evaluation.noises import of_part
from m2m.evaluation.per_set import PER_SET, Metric, read_per_set, write_per_set
from m2m.evaluation.protocol import EvaluationConfig
from m2m.progress import Progress
from m2m.stage_run import StageRun, fingerprint
from m2m.stages import STAGES, Stage

ACCEPTED = "accepted"
"""Folder of a profile's outputs; `accepted.json` in it says which models and sets the values are of."""
_TOLD = "accepted.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_profile_argument(parser)
    parser.add_argument("--noises", type=int, default=LOOKS[-1], help=f"of each evaluation; {LOOKS[-1]} by default")
    parser.add_argument("--only", nargs="+", metavar="EVALUATION", help="for example table_1; all by default")


def main(args: argparse.Namespace) -> None:
    """Accept the profile's models: evaluate them and tell where the values lie."""
    profile = open_profile(args.config)
    with processes.team():
        path = accept(profile, args.noises, args.only, Progress(quiet=not processes.leads()))
    if processes.leads():
        print(f"{path}: name it as `accepted` of evaluate and of report")


def accept(profile: Profile, noises: int, only: list[str] | None, progress: Progress) -> Path:
    """Evaluate a profile's models with so many noises each; the file of values by set.

    Evaluations that are there already are not made again, and a killed run goes on where it was.

    Args:
        only: variants of evaluate, what was accepted of the others stays as it is; all that have noise where None.

    Raises:
        ConfigError: `only` names what is no evaluation.
        M2MError: inputs that are not whole, or an evaluation whose check does not hold.
    """
    known = [str(stage.variant) for stage in STAGES.values() if stage.command == "evaluate"]
    if strange := [name for name in only or () if name not in known]:
        raise ConfigError(f"--only {strange[0]}: there is no such evaluation; there are {', '.join(known)}")
    path = profile.outputs / ACCEPTED / PER_SET
    metrics, told = _accepted_before(path) if only else ({}, {})
    for stage in STAGES.values():
        if stage.command != "evaluate" or (only and stage.variant not in only):
            continue
        _, config = stage.configured(profile, [])
        if isinstance(config, EvaluationConfig) and config.has_noise:
            run, digests = _evaluated(stage, profile, noises, path.parent, progress)
            mine = of_part(run, read_per_set(run.out / PER_SET))
            metrics = {name: one for name, one in metrics.items() if not name.startswith(f"{stage.variant}: ")} | mine
            told[str(stage.variant)] = {"noises": noises, "fingerprint": run.fingerprint, "inputs": digests}
    if processes.leads():
        artifacts.write_json(path.with_name(_TOLD), told)
        write_per_set(path, metrics)
    return path


def _accepted_before(path: Path) -> tuple[dict[str, Metric], dict[str, Any]]:
    if not path.is_file():
        return {}, {}
    return read_per_set(path), json.loads(path.with_name(_TOLD).read_text())


def _evaluated(
    stage: Stage, profile: Profile, noises: int, folder: Path, progress: Progress
) -> tuple[StageRun, dict[str, str]]:
    """One evaluation, made unless it stands, and its inputs' digests; what other models or settings have left goes."""
    function, config = stage.configured(profile, [f"noise_seeds={noises}", "accepted=null"])
    inputs = {name: STAGES[key].folder(profile) for name, key in stage.inputs.items()}
    manifests = {
        name: artifacts.require_whole(path, STAGES[stage.inputs[name]].make_command(profile))
        for name, path in inputs.items()
    }
    print_ = fingerprint(stage, configs.identity(config, profile.root), manifests)
    place = folder / str(stage.variant)
    run = StageRun(stage, profile, place / print_[:12], inputs, print_, progress)
    done = run.out / "done"
    if not done.is_file():
        run.out.mkdir(parents=True, exist_ok=True)
        progress.log(f"{stage.key}: {noises} noises")
        function(config, run)
        if why := run.summary["checks"]["metrics_finite"]:
            raise CheckFailed(f"{stage.key}: {why}")
        processes.wait_for_all()
        if processes.leads():
            artifacts.write_bytes(done, b"")
            for other in place.iterdir():
                if other != run.out:
                    shutil.rmtree(other)
    return run, {name: manifest.digest for name, manifest in manifests.items()}
