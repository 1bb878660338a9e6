"""Planted models among the novel views: objects whose true views are known, shown well, copied, mistaken or worse.

Belongs here: what each of them shows, and which should win by which measure. Not here: the measures
(`m2m.evaluation.views`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from m2m.data.objaverse import PosedViews
from m2m.evaluation.per_set import PerSet
from m2m.evaluation.planted import PLANTED, worsened
from m2m.evaluation.proofs import Proof, Rank
from m2m.evaluation.views import AMONG, TITLES, ViewMeasures, better, view_angles

_CHANGE = "change of PSNR with n"
_TRUE = (("oracle", "drifter"), ("oracle", "copier"), ("oracle", "guesser"))
_RANKS = {TITLES[key]: Rank(better(key), _TRUE) for key in TITLES} | {
    AMONG: Rank("higher", (("oracle", "guesser"), ("copier", "guesser"))),
    _CHANGE: Rank("higher", (("oracle", "drifter"),)),
}


def prove_views(objects: Sequence[PosedViews], measures: ViewMeasures, targets: int) -> Proof:
    """Let each planted model show the last views of objects, and measure them.

    Args:
        objects: two or more, each of more than `targets` views of one size.
    """
    images = torch.stack([view.images for view in objects])
    truth = images[:, -targets:]
    angles = torch.stack([view_angles(view.poses)[-targets:, :-targets] for view in objects])
    found = {}
    for kind in PLANTED:
        made = _shown(kind, images[:, :-targets], truth, angles)
        told, seen = PerSet(), measures.compare(made, truth)
        for key, title in measures.titles.items():
            told.add(title, seen[key])
        told.add(AMONG, seen["among"])
        half = max(1, targets // 2)
        told.add(_CHANGE, seen["psnr"][:, -half:].mean(1) - seen["psnr"][:, :half].mean(1))
        found[kind] = told.metrics
    ranks = {name: rank for name, rank in _RANKS.items() if name in found["oracle"]}
    if targets == 1:  # nothing changes, and there is nothing to be alike with
        ranks = {name: rank for name, rank in ranks.items() if name not in (AMONG, _CHANGE)}
    return Proof(found, ranks, f"{len(objects)} objects, {targets} views each")


def _shown(kind: str, before: Tensor, truth: Tensor, angles: Tensor) -> Tensor:
    """What a planted model shows in place of the true views (B, n, 3, H, W)."""
    if kind == "copier":  # the nearest preceding view
        return torch.stack([row[place] for row, place in zip(before, angles.argmin(2))])
    if kind == "guesser":  # some other object, another one in every view
        count, targets = truth.shape[:2]
        others = [[(i + 1 + n % max(1, count - 1)) % count for n in range(targets)] for i in range(count)]
        return torch.stack([truth[row, range(targets)] for row in others])
    return worsened(truth, range(truth.shape[1])) if kind == "drifter" else truth
