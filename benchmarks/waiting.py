"""How long a training step waits for its data, at the paper's sizes, with data workers that read ahead.

Sets of 25 SD-sized latents and DINOv2-giant features of 4 images at 224 pixels are read from shards as `pretrain` reads
them (frozen choice, checksums on first read, the epoch's order). The model's step is a pause as long as its counted
FLOPs take an A100 at 40 % of its peak: what is measured is the reading. `python -m benchmarks.waiting [--workers 2]`
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from m2m.config import load_profile
from m2m.costs import Costs
from m2m.data.sets import FEATURES, LATENTS, FeaturesIndex, SetsIndex, SetTable, TrainingSets, write_index
from m2m.data.shards import ShardWriter, npy_bytes
from m2m.stages import STAGES
from m2m.training.batches import BatchPlan
from m2m.training.pretrain import MisSets
from m2m.training.read_ahead import read_ahead
from m2m.training.settings import TrainingSettings

LATENT, FEATURE = (25, 4, 64, 64), (4, 257, 1536)
PER_SHARD = 20
VERIFYING = 6
"""Passes after which all shards were opened: they fit one window of the order."""


def write(folder: Path, sets: int) -> None:
    """A generate-sets and a cache-features output with so many training sets."""
    drawn = np.random.default_rng(0)
    shards = range(sets // PER_SHARD)
    places = [
        (number, list(range(number * PER_SHARD, (number + 1) * PER_SHARD)), ["train"] * PER_SHARD) for number in shards
    ]
    for name, file, shape in (("sets", LATENTS, LATENT), ("features", FEATURES, FEATURE)):
        content = npy_bytes(drawn.standard_normal(shape, np.float32).astype(np.float16))
        for number, ids, _ in places:
            with ShardWriter(folder / name, number, "benchmark") as writer:
                for i in ids:
                    writer.add(f"{i:09d}", {file: content, "json": b"{}"})
        SetTable.write(folder / name, places)
    counts = {"shards": len(shards), "splits": {"train": sets}}
    shape = {"images_per_set": 25, "image_size": 512, "latent_shape": LATENT[1:], "pictures": None}
    write_index(folder / "sets", SetsIndex(sets_per_shard=PER_SHARD, **shape, **counts))
    tokens = {"tokens": FEATURE[1], "width": FEATURE[2], "storage": "fp16", "choice_seed": 0, "images_per_set": 5}
    write_index(folder / "features", FeaturesIndex(**tokens, **counts))


def seconds_of_a_set() -> float:
    """What M2M-DINO's training on a set takes one A100, by the plan of `configs/paper.yaml`."""
    profile = load_profile("paper")
    cost = Costs(profile).of(STAGES["pretrain@dino"])
    return cost.gpu_hours("A100", 0.4) * 3600 / profile.section("pretrain", "dino")["sets"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=120)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write (4 MB a set); a temporary folder by default")
    args = parser.parse_args()
    pause = seconds_of_a_set()
    settings = TrainingSettings.model_validate({"batch": 8, "micro_batch": 4})
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        write(Path(name), args.sets)
        data = MisSets(TrainingSets(Path(name) / "sets", "train", 5, 0, Path(name) / "features"))
        plan = BatchPlan(settings, len(data), PER_SHARD, processes=1, process=0)
        loader = torch.utils.data.DataLoader(
            data,  # type: ignore[arg-type]
            batch_sampler=plan.reading_order(0),  # type: ignore[arg-type]
            num_workers=args.workers,
        )
        micro_batches = read_ahead(iter(loader))
        next(micro_batches)  # while a training loads its models, the workers come up
        waits, read = [], 0.0
        for _ in range(plan.steps * settings.batch // settings.micro_batch - 1):
            asked = time.perf_counter()
            micro = next(micro_batches)
            waits.append(time.perf_counter() - asked)
            read += sum(tensor.nbytes for tensor in micro.values()) / 1e6
            time.sleep(pause * settings.micro_batch)
    steps = len(waits)
    from_start, share = (
        sum(waits[first:]) / (sum(waits[first:]) + (steps - first) * pause * settings.micro_batch)
        for first in (0, min(VERIFYING, steps - 1))
    )
    print(
        f"{steps} forward passes of {settings.micro_batch} sets, {pause * settings.micro_batch * 1000:.0f} ms each, "
        f"{read / steps:.0f} MB read for each (as float32), {args.workers} workers: {share:.2%} of the time waiting, "
        f"{from_start:.2%} with the first {VERIFYING}, in which every shard is read whole to verify it"
    )
    figures = {
        "waiting_share": round(share, 5),
        "waiting_share_from_start": round(from_start, 5),
        "pass_ms": round(pause * settings.micro_batch * 1000),
    }
    ok = share < 0.02
    print(json.dumps({"name": "waiting", "figures": figures, "reach": {"waiting_share": "< 0.02"}, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
