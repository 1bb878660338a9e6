"""How often the regression gate rings: for the same model with other seeds, and for models that are truly worse.

Values by set as a report holds them: two headlines and 40 others of 200 sets, where sets differ as much as each noise
makes of them; scores of 12 blocks of sets with heavy tails, yes-or-no answers of eight procedures, and distances of two
objects. Run `python -m benchmarks.evaluation_gate`; the last line is one JSON object.
"""

import json
from collections.abc import Mapping

import numpy as np

from m2m.evaluation.gate import HEADLINES, gate
from m2m.evaluation.per_set import Metric

_SETS, _OTHERS, _TWENTIES = 200, 40, 20
_NOISES = (1, 6, 10)
REACH = {
    "false_alarms_in_twenty": 1.0,
    "twenties_with_at_most_one": 0.95,
    "one_headline_two_errors_6_noises": 0.95,
    "one_other_two_errors_10_noises": 0.95,
    "all_two_errors_6_noises": 0.95,
}
"""`..._two_errors_K_noises`: how often a true worsening of two standard errors of one evaluation is caught, where both
sides are means over K noises."""


def main() -> None:
    rounds = 20 * _TWENTIES
    # every round has an accepted evaluation of its own: with one for all, its luck would be in every round
    alarms = np.array([_rings(seed, 1) for seed in range(rounds)])
    twenties = alarms.reshape(-1, 20).sum(1)
    figures = {
        "false_alarms_in_twenty": float(twenties.mean()),
        "worst_of_twenty_twenties": float(twenties.max()),
        "twenties_with_at_most_one": float((twenties <= 1).mean()),
    }
    for noises in _NOISES:
        for name, worse in {
            "one_headline": HEADLINES[:1],
            "one_other": ("metric 0",),
            "all": (*HEADLINES, *(f"metric {i}" for i in range(_OTHERS))),
        }.items():
            caught = [_rings(seed, noises, dict.fromkeys(worse, 2.0)) for seed in range(rounds)]
            figures[f"{name}_two_errors_{noises}_noises"] = float(np.mean(caught))
    for name, value in figures.items():
        print(f"{name:34} {value:.3f}")
    ok = figures["false_alarms_in_twenty"] <= REACH["false_alarms_in_twenty"] and all(
        figures[name] >= reach for name, reach in REACH.items() if name != "false_alarms_in_twenty"
    )
    print(json.dumps({"name": "evaluation_gate", "figures": figures, "reach": REACH, "ok": ok}))


def _rings(seed: int, noises: int, worse: Mapping[str, float] | None = None) -> bool:
    """Whether the gate refuses a model that is worse in these metrics by so many standard errors of one evaluation."""
    accepted, new = _evaluation([0, seed], noises, {}), _evaluation([1, seed], noises, worse or {})
    return any(one.worse for one in gate(accepted, new))


def _evaluation(seed: list[int], noises: int, worse: Mapping[str, float]) -> dict[str, Metric]:
    names = [*HEADLINES, *(f"metric {i}" for i in range(_OTHERS))]
    sets, drawn = np.random.default_rng(7), np.random.default_rng(seed)
    of_sets = sets.normal(70, 1, (len(names), _SETS))
    values = of_sets + drawn.normal(0, 1, (noises, len(names), _SETS)).mean(0)
    error = np.sqrt(2 / _SETS)  # of one evaluation's mean: sets and one noise
    found = {
        name: Metric(row - worse.get(name, 0.0) * error, np.arange(_SETS), "higher") for name, row in zip(names, values)
    }
    for i in range(4):
        blocks = sets.normal(5, 1, 12) + drawn.standard_t(3, (noises, 12)).mean(0)
        found[f"score of blocks {i}"] = Metric(blocks, np.arange(12), "lower")
        answers = (drawn.random((noises, 8)) < sets.random(8)).mean(0)
        found[f"answers {i}"] = Metric(answers.astype(float), np.arange(8), "higher")
        objects = sets.normal(20, 3, 2) + drawn.normal(0, 1, (noises, 2)).mean(0)
        found[f"objects {i}"] = Metric(objects, np.arange(2), "higher")
    return found


if __name__ == "__main__":
    main()
