"""Time that Table 1 spends outside of the models: reading sets, drawing noise, scoring, errors, grids, writing.

The sets are drawn by the tiny world and the models are the shipped ones, so that nothing has to be made before. Few
denoising steps make the models' share small: with the profile's own 12 or the paper's 50 it is so much larger. Run
`python -m benchmarks.evaluation_overhead`; the last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.drawn_sets import draw_sets, shipped
from m2m.arguments import open_profile
from m2m.evaluation.encoders import ClassifierBackbone, Clip
from m2m.evaluation.sampler import Sampler
from m2m.evaluation.table import evaluate_table_1
from m2m.models.unet import VARIANTS
from m2m.pipelines.many_to_many import ManyToManyPipeline
from m2m.progress import Progress
from m2m.stage_run import StageRun
from m2m.stages import STAGES

REACH = {"outside_share": 0.1}
_PRECEDING, _IMAGES = 4, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2, help="denoising steps")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    profile, stage = open_profile("tiny"), STAGES["evaluate@table_1"]
    overrides = [f"sets={args.sets}", f"sampling.num_inference_steps={args.steps}", f"compute.threads={args.threads}"]
    _, config = stage.configured(profile, overrides)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        inputs = {"sets": root / "sets"} | {f"m2m_{variant}": root / variant for variant in VARIANTS}
        draw_sets(inputs["sets"], args.sets, _PRECEDING + _IMAGES)
        for variant in VARIANTS:
            shipped(variant, profile.root / "m2m" / "tiny" / "weights").save_pretrained(root / variant)
        clock, loading = _Clock(), _Clock()
        for opened in (Sampler, Clip, ClassifierBackbone):
            loading.watch(opened, "__init__")
        clock.watch(ManyToManyPipeline, "__call__")
        clock.watch(ClassifierBackbone, "__call__")
        clock.watch(Clip, "pictures")
        clock.watch(Clip, "texts")
        (root / "out").mkdir()
        run = StageRun(stage, profile, root / "out", inputs, "a benchmark", Progress(quiet=True))
        started = time.perf_counter()
        evaluate_table_1(config, run)  # type: ignore[arg-type]
        total = time.perf_counter() - started - loading.seconds
    figures: dict[str, Any] = {
        "sets": run.counts["sets"],
        "images": run.counts["generated_images"],
        "steps": args.steps,
        "seconds": round(total, 2),
        "seconds_outside_models": round(total - clock.seconds, 2),
        "outside_share": round(1 - clock.seconds / total, 4),
    }
    print(*(f"{name}: {value}" for name, value in figures.items()), sep="\n")
    ok = figures["outside_share"] <= REACH["outside_share"]
    print(json.dumps({"name": "evaluation_overhead", "figures": figures, "reach": REACH, "ok": ok}))


class _Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, owner: type, name: str) -> None:
        """Count the time of a method."""
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        setattr(owner, name, timed)


if __name__ == "__main__":
    main()
