"""The regression gate on real models: twenty re-evaluations with other seeds, and models that are truly worse.

Table 1 and consistency with the shipped tiny models, small, on sets that the tiny world draws. The accepted evaluations
have as many noises as `python -m m2m accept` takes; the others begin with one and go on as far as the gate asks. What
is done is kept in `--folder`: the same command goes on. Run `python -m benchmarks.evaluation_again` (half an hour on
one core); the last line is one JSON object.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.drawn_sets import draw_sets, shipped
from m2m.arguments import open_profile
from m2m.evaluation.gate import LOOKS, WORSENING, Tested, gate
from m2m.evaluation.noises import of_part
from m2m.evaluation.per_set import PER_SET, Metric, read_per_set, write_per_set
from m2m.models.unet import VARIANTS
from m2m.pipelines.many_to_many import ManyToManyPipeline
from m2m.progress import Progress
from m2m.stage_run import StageRun
from m2m.stages import STAGES

_SETS, _IMAGES, _TWENTY, _WORSE_SEEDS = 34, 6, 20, 3
_TRUTH = 4
"""Noises by which it is known how much worse a worse model truly is."""
_PARTS = {
    "table_1": [f"sets={_SETS}", "num_images=1"],
    "consistency": ["sets=12", "num_images=2"],
}
_STEPS, _FEWER = 6, 3
_NOISED = 0.16
"""Noise added to the U-Net's weights, over each tensor's own deviation."""
REACH = {"false_alarms_in_twenty": 1, "caught": 1.0}


@dataclass(frozen=True)
class Model:
    """What is evaluated: shipped weights, as they are or with noise in them, and how they are sampled."""

    name: str
    noised: float = 0.0
    steps: int = _STEPS


_SAME = Model("same")
_WORSE = (Model("noise in the weights", noised=_NOISED), Model("fewer steps", steps=_FEWER))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="outputs/benchmarks/evaluation_again by default")
    args = parser.parse_args()
    folder = args.folder or open_profile("tiny").outputs.parent / "benchmarks" / "evaluation_again"
    figures: dict[str, float] = {}
    accepted = _evaluated(folder, _SAME, 0, LOOKS[-1])
    write_per_set(folder / PER_SET, accepted)
    alarms, noises = [], []
    for again in range(1, _TWENTY + 1):
        tested = _tested(folder, _SAME, again, accepted)
        alarms.append([one.metric for one in tested if one.worse])
        noises += [one.second.noises for one in tested]
        print(f"re-evaluation {again}: {', '.join(alarms[-1]) or 'not refused'}", flush=True)
    figures["metrics"] = len(tested)
    figures["false_alarms_in_twenty"] = sum(map(bool, alarms))
    figures["noises_of_an_unchanged_model"] = sum(noises) / len(noises)
    caught = []
    for model in _WORSE:
        truth = _evaluated(folder, model, 0, _TRUTH)
        worsened = {one.metric: _worsening(one) for one in gate(accepted, truth)}
        most = max(worsened, key=lambda name: worsened[name])
        print(f"{model.name}: truly worse by {worsened[most]:.1f} standard errors in {most}", flush=True)
        figures[f"{model.name}: standard_errors_worse"] = worsened[most]
        figures[f"{model.name}: metrics_worse_by_two"] = sum(by >= WORSENING for by in worsened.values())
        ends = [_tested(folder, model, seed, accepted) for seed in range(1, _WORSE_SEEDS + 1)]
        caught += [any(one.worse for one in tested) for tested in ends]
        figures[f"{model.name}: caught"] = sum(caught[-_WORSE_SEEDS:]) / _WORSE_SEEDS
        print(f"{model.name}: caught with {sum(caught[-_WORSE_SEEDS:])} of {_WORSE_SEEDS} seeds", flush=True)
    for name, value in figures.items():
        print(f"{name:50} {value:.3g}")
    ok = figures["false_alarms_in_twenty"] <= REACH["false_alarms_in_twenty"] and all(caught)
    print(json.dumps({"name": "evaluation_again", "figures": figures, "reach": REACH, "ok": ok}))


def _worsening(one: Tested) -> float:
    """In standard errors of one evaluation, as the gate counts them."""
    sign = -1 if one.second.better == "higher" else 1
    return sign * (one.second.mean - one.first.mean) / one.unit if one.unit else 0.0


def _tested(folder: Path, model: Model, seed: int, accepted: Mapping[str, Metric]) -> list[Tested]:
    return gate(accepted, _evaluated(folder, model, seed, None))


def _evaluated(folder: Path, model: Model, seed: int, noises: int | None) -> dict[str, Metric]:
    """All parts, evaluated with noises that no other seed has: so many, or as many as the gate asks for."""
    metrics: dict[str, Metric] = {}
    for part, settings in _PARTS.items():
        profile, stage = open_profile("tiny"), STAGES[f"evaluate@{part}"]
        function, config = stage.configured(
            profile,
            [
                *settings,
                "compute.threads=1",
                f"sampling.num_inference_steps={model.steps}",
                f"noise_seed={1000 * seed}",
                f"noise_seeds={noises or 1}",
                f"accepted={'null' if noises else (folder / PER_SET).absolute()}",
            ],
        )
        out = folder / f"{model.name}, {model.noised:g}, {model.steps} steps" / str(seed) / part
        out.mkdir(parents=True, exist_ok=True)
        run = StageRun(stage, profile, out, _inputs(folder, model), "a benchmark", Progress(quiet=True))
        done = out / "done"
        if not done.is_file():
            function(config, run)
            done.touch()
        metrics |= of_part(run, read_per_set(out / PER_SET))
    return metrics


def _inputs(folder: Path, model: Model) -> dict[str, Path]:
    """Drawn sets and both models, made unless they stand."""
    inputs = {"sets": folder / "sets"}
    if not inputs["sets"].is_dir():
        draw_sets(inputs["sets"], _SETS, _IMAGES)
    for variant in VARIANTS:
        path = inputs[f"m2m_{variant}"] = folder / "models" / f"{variant}, {model.noised:g}"
        if not path.is_dir():
            pipeline = shipped(variant, open_profile("tiny").root / "m2m" / "tiny" / "weights")
            _add_noise(pipeline, model.noised)
            pipeline.save_pretrained(path)
    return inputs


@torch.no_grad()
def _add_noise(pipeline: ManyToManyPipeline, share: float) -> None:
    drawn = torch.Generator().manual_seed(0)
    for weight in pipeline.unet.parameters() if share else ():
        if weight.numel() > 1:
            weight += share * weight.std() * torch.randn(weight.shape, generator=drawn)


if __name__ == "__main__":
    main()
