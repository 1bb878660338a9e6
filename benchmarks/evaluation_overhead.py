"""Time that Table 1 spends outside of the models: reading sets, drawing noise, scoring, errors, grids, writing.

Run `python -m benchmarks.evaluation_overhead --config tiny` once that profile's models and sets are made (with
`generate-sets per_split.test=1000` for the full measure; all test sets are taken). The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from m2m.cli import add_profile_argument, open_profile
from m2m.evaluation.encoders import ClassifierBackbone, Clip
from m2m.evaluation.protocol import Sampler
from m2m.evaluation.table import evaluate_table_1
from m2m.pipelines.many_to_many import ManyToManyPipeline
from m2m.progress import Progress
from m2m.stage_run import StageRun
from m2m.stages import STAGES

REACH = {"outside_share": 0.1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_profile_argument(parser)
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    profile, stage = open_profile(args.config), STAGES["evaluate@table_1"]
    _, config = stage.configured(profile, [f"sets={args.sets}", *args.overrides])
    folders = {name: STAGES[key].folder(profile) for name, key in stage.inputs.items()}
    clock = _Clock()
    loading = _Clock()
    loading.watch(Sampler, "__init__")
    loading.watch(Clip, "__init__")
    loading.watch(ClassifierBackbone, "__init__")
    clock.watch(ManyToManyPipeline, "__call__")
    clock.watch(ClassifierBackbone, "__call__")
    clock.watch(Clip, "pictures")
    clock.watch(Clip, "texts")
    with tempfile.TemporaryDirectory() as out:
        run = StageRun(stage, profile, Path(out), folders, "a benchmark", Progress(quiet=True))
        started = time.perf_counter()
        evaluate_table_1(config, run)  # type: ignore[arg-type]
        total = time.perf_counter() - started - loading.seconds
    figures: dict[str, Any] = {
        "sets": run.counts["sets"],
        "images": run.counts["generated_images"],
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
