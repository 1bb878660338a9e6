"""How much noise a training image gets: which timesteps are drawn, and how often.

Belongs here: the distributions. Not here: who draws from them (`objective`).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class TimestepSampling:
    """A distribution of timesteps 0 (clean) to `total` - 1 (noise).

    - uniform: the paper's (section 3).
    - shifted: a uniform share u of the way to noise becomes s u / (1 + (s - 1) u): Esser et al. 2024
      (arXiv:2403.03206), Eq. 23, there for flows; over 1 it moves towards noise.
    - logit_normal: the share is the logistic function of a normal number (the same paper, Eq. 19); a mean over 0
      moves it towards noise.
    """

    kind: Literal["uniform", "shifted", "logit_normal"] = "uniform"
    shift: float = 3.0
    mean: float = 1.0
    std: float = 1.0

    def draw(self, drawn: np.random.Generator, count: int, total: int) -> np.ndarray:
        """(count,) int64."""
        if self.kind == "uniform":
            return drawn.integers(0, total, count)
        if self.kind == "shifted":
            uniform = drawn.random(count)
            share = self.shift * uniform / (1 + (self.shift - 1) * uniform)
        else:
            share = 1 / (1 + np.exp(-(self.mean + self.std * drawn.standard_normal(count))))
        return np.minimum((share * total).astype(np.int64), total - 1)
