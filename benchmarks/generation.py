"""Generation with the tiny models: how much of its time is outside the models' forward passes.

The stage's own function makes whole shards with pictures; what it does while some forward pass runs in another thread
costs nothing and does not count. Loading the models, once a worker, is stated apart. `python -m benchmarks.generation`
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from m2m.config import Profile, load_profile
from m2m.generation.image_sets import GenerateSets, SetMaker, generate_sets
from m2m.progress import Progress
from m2m.stage_run import StageRun, run_stage
from m2m.stages import STAGES

QUIET = Progress(quiet=True)


class Watched:
    """When forward passes of modules ran, whatever thread they ran in."""

    def __init__(self, modules: Iterable[Any]) -> None:
        self.spans: list[tuple[float, float]] = []
        self._began = threading.local()
        for module in modules:
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self._began.at = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.spans.append((self._began.at, time.perf_counter()))

    def seconds(self) -> float:
        """In which at least one of them ran."""
        total, until = 0.0, 0.0
        for begin, end in sorted(self.spans):
            total += max(0.0, end - max(begin, until))
            until = max(until, end)
        return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=8)
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    tiny = load_profile("tiny")
    with tempfile.TemporaryDirectory() as name:
        own = {"shards": 2, "sets_per_shard": args.sets // 2, "per_split": None, "steps": args.steps}
        sections = {**tiny.sections, "generate-sets": {**tiny.sections["generate-sets"], **own}}
        profile = Profile(tiny.path, sections, Path(name), root=tiny.root)
        captions = run_stage(STAGES["filter-captions"], profile, progress=QUIET).folder
        config = profile.stage_config(GenerateSets, "generate-sets")
        started = time.perf_counter()
        pipeline = SetMaker(config, profile.root).pipeline
        loading = time.perf_counter() - started
        watched = Watched([pipeline.unet, pipeline.text_encoder, pipeline.vae.decoder, pipeline.vae.post_quant_conv])
        SetMaker.pipeline = pipeline  # type: ignore[method-assign,assignment]
        out = Path(name) / "out"
        out.mkdir()
        run = StageRun(STAGES["generate-sets"], profile, out, {"captions": captions}, "", QUIET)
        SetMaker(config, profile.root).latents(0, "warm")
        watched.spans.clear()
        started = time.perf_counter()
        generate_sets(config, run)
        seconds = time.perf_counter() - started
    outside = 1 - watched.seconds() / seconds
    print(
        f"{args.sets} sets of {config.images_per_set} in {seconds:.1f} s ({loading:.1f} s of loading before them): "
        f"{outside:.1%} outside forward passes"
    )
    figures = {
        "outside_forward": round(outside, 4),
        "sets_per_second": round(args.sets / seconds, 3),
        "loading_seconds": round(loading, 1),
    }
    ok = outside <= 0.1
    print(json.dumps({"name": "generation", "figures": figures, "reach": {"outside_forward": "<= 0.1"}, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
