"""Generation of image sets: how much of its time is outside the models' forward passes.

The stage's own function makes whole shards with pictures; what it does while some forward pass runs in another thread
costs nothing and does not count. Loading the models, once a worker, is stated apart. `python -m benchmarks.generation`
runs the tiny models; `--sd21` models of Stable Diffusion 2.1 base's size with random weights, two sets of one image in
two steps where nothing else is asked for: a real run takes 25 times as many steps, and its share is the smaller.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.measuring import Machine
from benchmarks.models import as_large_as_sd21
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
    parser.add_argument("--sd21", action="store_true", help="the size of Stable Diffusion 2.1 base, random weights")
    parser.add_argument("--sets", type=int)
    parser.add_argument("--images", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    args = parser.parse_args()
    sets, images, steps = (2, 1, 2) if args.sd21 else (8, 25, 15)
    sets, images, steps = args.sets or sets, args.images or images, args.steps or steps
    tiny = load_profile("tiny")
    compute = {"device": args.device, "dtype": args.dtype, "threads": 2}
    with tempfile.TemporaryDirectory() as name:
        own = {"shards": 2, "sets_per_shard": max(1, sets // 2), "per_split": None, "steps": steps}
        own |= {"images_per_set": images, "compute": compute}
        sections = {**tiny.sections, "generate-sets": {**tiny.sections["generate-sets"], **own}}
        profile = Profile(tiny.path, sections, Path(name), root=tiny.root)
        captions = run_stage(STAGES["filter-captions"], profile, progress=QUIET).folder
        config = profile.stage_config(GenerateSets, "generate-sets")
        started = time.perf_counter()
        pipeline = SetMaker(config, profile.root).pipeline
        if args.sd21:
            machine = Machine(torch.device(args.device), getattr(torch, args.dtype), 2, 0)
            pipeline = as_large_as_sd21(pipeline, machine)
        loading = time.perf_counter() - started
        watched = Watched([pipeline.unet, pipeline.text_encoder, pipeline.vae.decoder, pipeline.vae.post_quant_conv])
        out = Path(name) / "out"
        out.mkdir()
        run = StageRun(STAGES["generate-sets"], profile, out, {"captions": captions}, "", QUIET)
        with patch.object(SetMaker, "pipeline", pipeline):  # the stage's own maker takes the one that is watched
            SetMaker(config, profile.root).latents(0, "warm")
            watched.spans.clear()
            started = time.perf_counter()
            generate_sets(config, run)
            seconds = time.perf_counter() - started
    outside, most = 1 - watched.seconds() / seconds, 0.03 if args.sd21 else 0.1
    print(
        f"{sets} sets of {config.images_per_set} in {seconds:.1f} s ({loading:.1f} s of loading before them): "
        f"{outside:.1%} outside forward passes"
    )
    figures = {
        "outside_forward": round(outside, 4),
        "sets_per_second": round(sets / seconds, 3),
        "loading_seconds": round(loading, 1),
    }
    ok, reach = outside <= most, {"outside_forward": f"<= {most}"}
    print(json.dumps({"name": "generation", "figures": figures, "reach": reach, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
