"""How often the regression gate rings: for the same model with other seeds, and for models that are truly worse.

Values by set as two models' Table 1 and a hundred other metrics would leave them: sets differ, and so does what each
seed makes of them. Run `python -m benchmarks.evaluation_gate`; the last line is one JSON object.
"""

import json

import numpy as np

from m2m.evaluation.compare import HEADLINES, regressions
from m2m.evaluation.per_set import Metric

_SETS, _OTHERS, _ROUNDS = 200, 40, 100
REACH = {"false_alarms_in_twenty": 1.0, "measured_two_errors_caught": 1.0, "true_three_errors_caught": 0.9}


def main() -> None:
    # every round has an accepted evaluation of its own: with one for all, its luck would be in every round
    alarms = [bool(_worse(_evaluation(5000 + seed), _evaluation(seed))) for seed in range(_ROUNDS)]
    figures = {"false_alarms_in_twenty": 20 * float(np.mean(alarms)), "worst_twenty": _worst_twenty(alarms)}
    # a worsening measured at two errors of the difference, on the noise of one re-evaluation
    accepted = _evaluation(0)
    measured = {name: _shifted(metric, 2.0) for name, metric in accepted.items()}
    figures["measured_two_errors_caught"] = float(bool(_worse(accepted, measured)))
    for name, by in {"two": 2.0, "three": 3.0, "four": 4.0}.items():
        caught = [bool(_worse(_evaluation(5000 + seed), _evaluation(1000 + seed, by))) for seed in range(_ROUNDS)]
        figures[f"true_{name}_errors_caught"] = float(np.mean(caught))
    for name, value in figures.items():
        print(f"{name:28} {value:.2f}")
    ok = figures["false_alarms_in_twenty"] <= REACH["false_alarms_in_twenty"] and all(
        figures[name] >= reach for name, reach in REACH.items() if name.endswith("caught")
    )
    print(json.dumps({"name": "evaluation_gate", "figures": figures, "reach": REACH, "ok": ok}))


def _evaluation(seed: int, worse_by: float = 0.0) -> dict[str, Metric]:
    names = [*HEADLINES, *(f"metric {i}" for i in range(_OTHERS))]
    of_sets = np.random.default_rng(0).normal(70, 1, (len(names), _SETS))
    noise = np.random.default_rng([1, seed]).normal(0, 1, (len(names), _SETS))
    # one standard error of an evaluation's mean, which here is also that of a paired difference
    error = np.sqrt(2 / _SETS)
    return {
        name: Metric(row - worse_by * error, np.arange(_SETS), "higher") for name, row in zip(names, of_sets + noise)
    }


def _shifted(metric: Metric, errors: float) -> Metric:
    """Worse by so many errors of the difference, as it will be measured."""
    noise = np.random.default_rng(3).normal(0, 1, _SETS)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    # a little more, since the bootstrap's error is itself an estimate
    return Metric(metric.values + noise - 1.1 * errors / np.sqrt(_SETS), metric.units, metric.better)


def _worse(accepted: dict[str, Metric], new: dict[str, Metric]) -> list[str]:
    return regressions(accepted, new, resamples=300)


def _worst_twenty(alarms: list[bool]) -> float:
    return float(max(sum(alarms[start : start + 20]) for start in range(0, len(alarms), 20)))


if __name__ == "__main__":
    main()
