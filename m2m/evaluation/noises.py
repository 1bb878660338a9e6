"""One evaluation with several noises: the same sets sampled again and again, their values averaged by set.

What the sampler's noise adds to a metric's error falls with the root of their number: that is what lets the regression
gate see a small worsening (`m2m.evaluation.gate`). An evaluation that knows the accepted one goes on until it is seen.

Belongs here: repeating an evaluation, when to stop, averaging. Not here: how noise is keyed
(`m2m.evaluation.protocol`), the test (`m2m.evaluation.gate`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import TypeVar

import numpy as np

from m2m import artifacts, processes
from m2m.errors import InputError
from m2m.evaluation.gate import gate, noises_wanted
from m2m.evaluation.per_set import PER_SET, Metric, averaged, open_per_set, read_per_set, write_per_set
from m2m.evaluation.protocol import METRICS, NOISES, EvaluationConfig, drop_kept
from m2m.stage_run import StageRun

Config = TypeVar("Config", bound=EvaluationConfig)


def over_noises(evaluate: Callable[[Config, StageRun], None]) -> Callable[[Config, StageRun], None]:
    """Let an evaluation follow `noise_seeds`, and `accepted` as far as the gate needs.

    Its tables, curves and pictures are those of the first noise; its values by set, of which error bars, comparisons
    and the gate are made, are the means over all of them, told in a table of their own.
    """

    @wraps(evaluate)
    def over(config: Config, run: StageRun) -> None:
        if config.noise_seeds == 1 and config.accepted is None:
            evaluate(config, run)
            return
        (run.out / NOISES).mkdir(exist_ok=True)  # from now on all is kept until all noises are there
        evaluate(config, run)
        found = [read_per_set(run.out / PER_SET)]
        accepted = None if config.accepted is None else open_per_set(run.source(config.accepted))
        wanted = config.noise_seeds
        while True:
            while len(found) < wanted:
                found.append(_sampled(evaluate, config, run, config.noise_seed + len(found)))
            if accepted is None or (more := _wanted(run, accepted, averaged(found))) == wanted:
                break
            wanted = more
        processes.wait_for_all()  # before what the others read is replaced
        if len(found) > 1:
            _average(run, found)
        drop_kept(run)

    return over


def of_part(run: StageRun, metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """An evaluation's metrics by the names that they have in a report."""
    return {f"{run.stage.variant}: {name}": metric for name, metric in metrics.items()}


def _sampled(
    evaluate: Callable[[Config, StageRun], None], config: Config, run: StageRun, number: int
) -> dict[str, Metric]:
    """The values by set of one further noise; what a killed run has finished is not made again."""
    part = replace(run, out=run.out / NOISES / str(number), counts={}, summary={})
    if not (part.out / PER_SET).is_file():
        part.out.mkdir(exist_ok=True)
        evaluate(config.model_copy(update={"noise_seed": number, "noise_seeds": 1}), part)
        if why := part.summary["checks"]["metrics_finite"]:
            raise InputError(f"noise_seed {number}: {why}")
    return read_per_set(part.out / PER_SET)


def _wanted(run: StageRun, accepted: Mapping[str, Metric], found: Mapping[str, Metric]) -> int:
    """How many noises to go on to."""
    count = next(iter(found.values())).noises
    tested = gate(accepted, of_part(run, found), part=True)
    wanted = noises_wanted(tested, count)
    if wanted > count:
        open_ = [one.metric for one in tested if one.undecided]
        run.progress.log(f"after {count} noises {len(open_)} metrics may be worse ({open_[0]}, ...): on to {wanted}")
    return wanted


def _average(run: StageRun, evaluations: Sequence[Mapping[str, Metric]]) -> None:
    """Rows of all noises into the summary, their means by set into the files."""
    told = averaged(evaluations)
    rows = {
        name: {
            "mean": metric.mean,
            "standard error": metric.error,
            "deviation from noise to noise": float(np.std([one[name].mean for one in evaluations], ddof=1)),
        }
        for name, metric in told.items()
    }
    run.table(f"Means over {len(evaluations)} noises", [{"metric": name, **row} for name, row in rows.items()])
    run.count(noises=len(evaluations))
    if processes.leads():
        write_per_set(run.out / PER_SET, told)
        metrics = json.loads((run.out / METRICS).read_bytes())
        artifacts.write_json(run.out / METRICS, metrics | {"over_noises": rows})
