"""A shown step of a procedure compared with the true one, and told apart from others.

Belongs here: what next steps are measured by. Not here: which steps are asked for (`m2m.evaluation.procedures`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from m2m.evaluation.encoders import Clip, Dino
from m2m.evaluation.measures import cosine, psnr

LIKENESS = {"psnr": "PSNR, dB", "dino": "DINO likeness", "clip": "CLIP likeness"}
FOUND = {"among_others": "found among others' steps", "among_own": "found among its own"}


@dataclass(frozen=True)
class StepMeasures:
    """How shown steps are compared with the true one."""

    dino: Dino
    clip: Clip

    def compare(self, shown: Tensor, steps: Tensor, place: int, distractors: Tensor) -> dict[str, Tensor]:
        """Measure pictures shown for one step of a procedure.

        Args:
            shown: uint8 (n, 3, H, W).
            steps: the procedure's true ones, uint8 (steps, 3, H, W).
            place: the step that was to be shown.
            distractors: steps of other procedures, uint8 (d, 3, H, W).

        Returns:
            float64 (n,): `psnr`, `dino` and `clip` likeness to the true step; `among_others` and `among_own`: whether,
            by DINO likeness, the true step is the nearest one among the distractors and among its own procedure's.
        """
        count, truth = len(shown), steps[place]
        seen = self.dino.pictures(torch.cat([shown, truth[None], distractors, steps]))
        like = cosine(seen[:count, None], seen[None, count:])
        own = like[:, 1 + len(distractors) :]
        embedded = self.clip.pictures(torch.cat([shown, truth[None]]))
        return {
            "psnr": psnr(shown, truth.expand_as(shown)).double(),
            "dino": like[:, 0],
            "clip": cosine(embedded[:count], embedded[count]),
            "among_others": (like[:, 0] > like[:, 1 : 1 + len(distractors)].amax(1)).double(),
            "among_own": (own.argmax(1) == place).double(),
        }
