"""The order of an epoch: of all the paper's 12,237,187 sets, and the same whoever reads and however many they are.

Seconds and memory of the whole order and of the plan of one process of eight; global batches as 1, 2, 4 and 8 ranks
with 0, 1 and 2 data workers read them through torch's DataLoader; eight ranks that go on where one stopped.
`python -m benchmarks.epoch_order`
"""

import json
import resource
import time
from itertools import chain

from m2m.data.sets import epoch_order
from m2m.training.batches import BatchPlan
from m2m.training.settings import TrainingSettings

SETS = 12_237_187
_BATCH, _MICRO, _SMALL_SETS = 64, 4, 1000


class Numbers:
    """What is read of a set: its epoch and number."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
        return key


def global_batches(ranks: int, workers: int, first: int = 0) -> list[list[tuple[int, int]]]:
    """Two epochs of global batches, put together from what each rank reads, from after step `first`."""
    import torch.utils.data

    settings = TrainingSettings.model_validate({"batch": _BATCH, "micro_batch": _MICRO, "epochs": 2, "seed": 5})
    shares = []
    for rank in range(ranks):
        plan = BatchPlan(settings, _SMALL_SETS, per_shard=70, processes=ranks, process=rank)
        loader = torch.utils.data.DataLoader(
            Numbers(),  # type: ignore[arg-type]
            batch_sampler=list(plan.reading_order(first)),
            num_workers=workers,
            collate_fn=list,
        )
        read, passes = list(loader), _BATCH // ranks // _MICRO
        shares.append([list(chain(*read[i : i + passes])) for i in range(0, len(read), passes)])
    return [[share[i % ranks][i // ranks] for i in range(_BATCH)] for share in zip(*shares)]


def main() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    order = epoch_order(SETS, 1000, seed=0, epoch=0)
    seconds, cpu = time.perf_counter() - started, time.process_time()
    del order
    plan = BatchPlan(TrainingSettings.model_validate({}), SETS, 1000, processes=8, process=3)
    next(plan.reading_order(SETS // 256 - 2))
    plan_cpu = time.process_time() - cpu
    total = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"order of {SETS:,} sets: {seconds:.2f} s; first batch of a resumed plan: {plan_cpu:.2f} s; {total:.0f} MB")
    expected = global_batches(1, 0)
    layouts = [(ranks, workers) for ranks in (1, 2, 4, 8) for workers in (0, 1, 2)]
    differing = [layout for layout in layouts if global_batches(*layout) != expected]
    resumed = all(global_batches(8, workers, first=9) == expected[9:] for workers in (0, 2))
    print(
        f"{len(layouts) - len(differing)} of {len(layouts)} layouts of ranks and workers read the same global batches"
    )
    print(f"eight ranks go on after step 9 of one: {'the same' if resumed else 'OTHER'} batches")
    figures = {
        "seconds": round(seconds, 2),
        "plan_cpu_seconds": round(plan_cpu, 2),
        "mb": round(total),
        "layouts": len(layouts),
        "differing_layouts": len(differing),
        "resumed_on_8_differs": int(not resumed),
    }
    reach = {"seconds": "< 2", "plan_cpu_seconds": "< 2", "mb": "< 200"} | dict.fromkeys(
        ("differing_layouts", "resumed_on_8_differs"), "0"
    )
    ok = seconds < 2 and plan_cpu < 2 and total < 200 and not differing and resumed
    print(json.dumps({"name": "epoch_order", "figures": figures, "reach": reach, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
