"""How often the regression gate rings: for the same model with other seeds, and for models that are truly worse.

Values by set as a report holds them, drawn from known truths: two headlines and 40 others of 200 sets, scores of 12
blocks of sets with heavy tails, yes-or-no answers of eight procedures, distances of two objects. The accepted side has
16 noises; the new side begins with one, and gets more as the gate asks for them, as an evaluation does. Run
`python -m benchmarks.evaluation_gate`; the last line is one JSON object.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m2m.evaluation.gate import HEADLINES, LOOKS, gate, noises_wanted
from m2m.evaluation.per_set import Better, Metric, averaged

_SETS, _OTHERS = 200, 40
_KINDS: dict[str, Better] = {"score of blocks": "lower", "answers": "higher", "objects": "higher"}
_SHARES = {"sets_differ_most": 0.16, "sets_differ_as_much_as_noise": 1.0, "all_is_noise": 1e9}
"""Variance of one noise over that of sets; the first is that of the tiny models' Image-Image CLIP."""
REACH = {"false_alarms_in_twenty": 1.0, "twenties_with_at_most_one": 0.95, "caught": 0.95}


@dataclass(frozen=True)
class Ended:
    """What became of one new evaluation: whether the gate refuses it, and after how many noises."""

    worse: bool
    noises: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="evaluations of each kind, whole twenties")
    rounds = parser.parse_args().rounds
    figures: dict[str, float] = {}
    caught: list[float] = []
    for title, share in _SHARES.items():
        same = [_end(seed, share, {}) for seed in range(rounds)]
        twenties = np.array([one.worse for one in same]).reshape(-1, 20).sum(1)
        figures[f"{title}: false_alarms_in_twenty"] = float(twenties.mean())
        figures[f"{title}: twenties_with_at_most_one"] = float((twenties <= 1).mean())
        figures[f"{title}: worst_of_the_twenties"] = float(twenties.max())
        figures[f"{title}: noises_of_an_unchanged_model"] = float(np.mean([one.noises for one in same]))
        for name, worse in {
            "one_headline": HEADLINES[:1],
            "one_other": ("metric 0",),
            "one_of_blocks": ("score of blocks 0",),
            "all": (*HEADLINES, *(f"metric {i}" for i in range(_OTHERS))),
        }.items():
            ends = [_end(seed, share, dict.fromkeys(worse, 2.0)) for seed in range(rounds)]
            caught.append(float(np.mean([one.worse for one in ends])))
            figures[f"{title}: {name}_two_errors_worse: caught"] = caught[-1]
            figures[f"{title}: {name}_two_errors_worse: noises"] = float(np.mean([one.noises for one in ends]))
    for name, value in figures.items():
        print(f"{name:75} {value:.3f}")
    ok = (
        min(caught) >= REACH["caught"]
        and all(value <= 1 for name, value in figures.items() if name.endswith("false_alarms_in_twenty"))
        and all(value >= 0.95 for name, value in figures.items() if name.endswith("with_at_most_one"))
    )
    print(json.dumps({"name": "evaluation_gate", "figures": figures, "reach": REACH, "ok": ok}))


def _end(seed: int, share: float, worse: Mapping[str, float]) -> Ended:
    """Evaluate a model that is worse in these metrics by so many standard errors of one evaluation, and go on as asked.

    Every round has an accepted evaluation of its own: with one for all, its luck would be in every round.
    """
    accepted = averaged([_evaluation([0, seed, noise], share, {}) for noise in range(LOOKS[-1])])
    found: list[dict[str, Metric]] = []
    wanted = 1
    while True:
        found += [_evaluation([1, seed, noise], share, worse) for noise in range(len(found), wanted)]
        tested = gate(accepted, averaged(found))
        wanted = noises_wanted(tested, len(found))
        if wanted == len(found):
            return Ended(any(one.worse for one in tested), wanted)


def _evaluation(seed: Sequence[int], share: float, worse: Mapping[str, float]) -> dict[str, Metric]:
    """One evaluation with one noise."""
    sets, drawn = np.random.default_rng(7), np.random.default_rng(seed)
    of_sets = (1 + share) ** -0.5  # both together vary by 1
    of_noise = (1 - of_sets**2) ** 0.5
    found = {
        name: _metric(name, worse, of_sets * sets.normal(size=_SETS) + of_noise * drawn.normal(size=_SETS))
        for name in (*HEADLINES, *(f"metric {i}" for i in range(_OTHERS)))
    }
    for i in range(4):
        blocks = of_sets * sets.normal(size=12) + of_noise * drawn.standard_t(3, 12) / 3**0.5
        answers = (drawn.random(8) < sets.random(8)).astype(float)
        objects = of_sets * sets.normal(size=2) + of_noise * drawn.normal(size=2)
        for kind, values in {"score of blocks": blocks, "answers": answers, "objects": objects}.items():
            found[f"{kind} {i}"] = _metric(f"{kind} {i}", worse, values)
    return found


def _metric(name: str, worse: Mapping[str, float], values: NDArray[np.float64]) -> Metric:
    better = _KINDS.get(name.rpartition(" ")[0], "higher")
    down = worse.get(name, 0.0) * len(values) ** -0.5  # the standard error is that of values that vary by 1
    return Metric(values + down * (1 if better == "lower" else -1), np.arange(len(values)), better)


if __name__ == "__main__":
    main()
