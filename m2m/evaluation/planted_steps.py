"""Planted models among the procedures, one more than elsewhere: a *follower* knows what comes after the step that it
was given last, and nothing else, so that steps given out of order lead it astray.

Belongs here: what each of them shows, and which should win by which measure. Not here: the measures
(`m2m.evaluation.steps`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from m2m.evaluation.per_set import PerSet
from m2m.evaluation.planted import PLANTED, worsened
from m2m.evaluation.proofs import Proof, Rank
from m2m.evaluation.steps import FOUND, LIKENESS, StepMeasures

_LOST = "lost out of order: "
_TRUE = (("oracle", "drifter"), ("oracle", "copier"), ("oracle", "guesser"))
_RANKS = {title: Rank("higher", _TRUE) for title in LIKENESS.values()} | {
    FOUND["among_others"]: Rank("higher", (("oracle", "guesser"), ("copier", "guesser"))),
    FOUND["among_own"]: Rank("higher", (("oracle", "copier"), ("oracle", "guesser"))),
    **{_LOST + title: Rank("higher", (("follower", "oracle"), ("follower", "guesser"))) for title in LIKENESS.values()},
}
_PAST = 3  # the drifter's picture is the fourth one


def prove_steps(
    procedures: Sequence[Tensor], orders: Sequence[Sequence[int]], measures: StepMeasures, distractors: int
) -> Proof:
    """Let each planted model show the next step of procedures, and measure it.

    Args:
        procedures: two or more, each uint8 (steps, 3, H, W).
        orders: of each procedure's preceding steps, not the true one; the step after them is to be shown.
        distractors: steps of other procedures among which the true one is sought; as many as there are, at most.
    """
    told = {kind: PerSet() for kind in (*PLANTED, "follower")}
    values: dict[str, dict[str, list[Tensor]]] = {kind: {} for kind in told}
    for place, (steps, order) in enumerate(zip(procedures, orders)):
        before = len(order)
        others = [procedures[(place + 1 + n) % len(procedures)] for n in range(min(distractors, len(procedures) - 1))]
        # from anywhere in the others: as far into them as this procedure's next step is
        apart = torch.stack([other[min(before, len(other) - 1)] for other in others])
        shown = {
            "oracle": (steps[before], steps[before]),
            "copier": (steps[before - 1], steps[order[-1]]),
            "guesser": (others[0][0], others[0][0]),
            "drifter": (worsened(steps[None, before, None], [_PAST])[0, 0],) * 2,
            "follower": (steps[before], steps[order[-1] + 1]),
        }
        found = measures.compare(torch.stack([one for pair in shown.values() for one in pair]), steps, before, apart)
        for row, kind in enumerate(shown):
            for key, title in {**LIKENESS, **FOUND}.items():
                in_order, out_of_order = found[key][2 * row], found[key][2 * row + 1]
                values[kind].setdefault(title, []).append(in_order)
                if key in LIKENESS:
                    values[kind].setdefault(_LOST + title, []).append(in_order - out_of_order)
    for kind, of in values.items():
        for title, found in of.items():
            told[kind].add(title, torch.stack(found))
    return Proof({kind: of.metrics for kind, of in told.items()}, _RANKS, f"{len(procedures)} procedures")
