"""One evaluation with several noises: the same sets sampled again and again, their values averaged by set.

What the sampler's noise adds to a metric's error falls with the root of their number: that is what lets the regression
gate see a small worsening (`m2m.evaluation.gate`).

Belongs here: repeating an evaluation, averaging. Not here: how noise is keyed (`m2m.evaluation.protocol`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import TypeVar

import numpy as np

from m2m import artifacts, processes
from m2m.errors import InputError
from m2m.evaluation.per_set import PER_SET, Metric, read_per_set, write_per_set
from m2m.evaluation.protocol import METRICS, EvaluationConfig, kept_folder
from m2m.stage_run import StageRun

Config = TypeVar("Config", bound=EvaluationConfig)


def over_noises(evaluate: Callable[[Config, StageRun], None]) -> Callable[[Config, StageRun], None]:
    """Let an evaluation follow `noise_seeds`.

    Its tables, curves and pictures are those of the first noise; its values by set, of which error bars, comparisons
    and the gate are made, are the means over all of them, told in a table of their own.
    """

    @wraps(evaluate)
    def over(config: Config, run: StageRun) -> None:
        further = []
        for number in range(config.noise_seed + 1, config.noise_seed + config.noise_seeds):
            part = replace(run, out=kept_folder(run, f"noise {number}"), counts={}, summary={})
            if not (part.out / PER_SET).is_file():  # what a killed run has finished is not made again
                evaluate(config.model_copy(update={"noise_seed": number, "noise_seeds": 1}), part)
                if why := part.summary["checks"]["metrics_finite"]:
                    raise InputError(f"noise_seed {number}: {why}")
            further.append(read_per_set(part.out / PER_SET))
        evaluate(config, run)
        if further:
            _average(config, run, [read_per_set(run.out / PER_SET), *further])

    return over


def averaged(evaluations: Sequence[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Each metric's mean over evaluations, set by set.

    Raises:
        InputError: they are not of the same sets.
    """
    first, *others = evaluations
    found = {}
    for name, metric in first.items():
        values = [metric.values]
        for other in others:
            if name not in other or not np.array_equal(other[name].units, metric.units):
                raise InputError(f"{name}: evaluations of other sets can't be averaged by set")
            values.append(other[name].values)
        found[name] = replace(metric, values=np.mean(values, 0))
    return found


def _average(config: EvaluationConfig, run: StageRun, evaluations: Sequence[Mapping[str, Metric]]) -> None:
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
    run.count(noises=config.noise_seeds)
    if processes.leads():
        write_per_set(run.out / PER_SET, told)
        metrics = json.loads((run.out / METRICS).read_bytes())
        artifacts.write_json(run.out / METRICS, metrics | {"over_noises": rows})
