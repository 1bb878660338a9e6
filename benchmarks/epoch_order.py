"""The order of an epoch over all of the paper's 12,237,187 sets, and its first batches: seconds and memory.

`python -m benchmarks.epoch_order`
"""

import json
import resource
import time

from m2m.data.sets import epoch_order
from m2m.training.batches import BatchPlan
from m2m.training.settings import TrainingSettings

SETS = 12_237_187


def main() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    order = epoch_order(SETS, 1000, seed=0, epoch=0)
    seconds, cpu = time.perf_counter() - started, time.process_time()
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    del order
    plan = BatchPlan(TrainingSettings.model_validate({}), SETS, 1000, processes=8, process=3)
    next(plan.reading_order(SETS // 256 - 2))
    plan_cpu = time.process_time() - cpu
    total = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"order of {SETS:,} sets: {seconds:.2f} s, {taken:.0f} MB; first batch of a resumed plan: {plan_cpu:.2f} s CPU"
    )
    figures = {"seconds": round(seconds, 2), "plan_cpu_seconds": round(plan_cpu, 2), "mb": round(total)}
    ok = seconds < 2 and total < 200
    print(json.dumps({"name": "epoch_order", "figures": figures, "reach": {"seconds": "< 2", "mb": "< 200"}, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
