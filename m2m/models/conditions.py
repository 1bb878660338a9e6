"""Task conditions of the paper's section 6.2: a camera pose or a place in a procedure, embedded as E(c) and E_c(c).

Belongs here: embedders of conditions. Not here: where their output is added (`m2m.models.image_set_attention`) and
when a condition is dropped: always after E, since E of zeros is not zero.
"""

from collections.abc import Sequence

import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn

from m2m.errors import ConfigError, InputError

CONDITIONS = {"camera": 12, "position": 1}
"""Numbers a condition has: a relative 3x4 pose row by row; the index of a step (0 is the first)."""
_SINUSOIDS = 256  # numbers that the sinusoidal encoding gives one position, as many as an image's timestep has in SD


class ConditionEmbedder(nn.Module):
    """An MLP from one image's condition to a vector for each place it is added to.

    Its last layer starts at zero, so that adding it to a pretrained model changes nothing until it is trained.
    """

    def __init__(self, condition: str, hidden: int, widths: Sequence[int]) -> None:
        """`widths`: the width of each place's hidden states, in the order of the model's layers."""
        super().__init__()
        self.condition = condition
        self.numbers = numbers_of(condition)
        inputs = _SINUSOIDS if condition == "position" else self.numbers
        self.trunk = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.heads = nn.ModuleList(nn.Linear(hidden, width) for width in widths)
        self.start_at_zero()

    def start_at_zero(self) -> None:
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def forward(self, condition: Tensor, keep: Tensor | None = None) -> tuple[Tensor, ...]:
        """Vectors to add, one tensor for each place.

        Args:
            condition: (images, numbers of the condition).
            keep: (images,) bool; False drops an image's condition: its vectors are zero.

        Raises:
            InputError: another number of numbers than the condition has.
        """
        if condition.shape[-1] != self.numbers:
            raise InputError(
                f"a {self.condition} condition has {self.numbers} numbers an image, got {condition.shape[-1]}"
            )
        if self.condition == "position":
            condition = get_timestep_embedding(condition.squeeze(-1).float(), _SINUSOIDS)
        hidden = self.trunk(condition.to(get_parameter_dtype(self)))  # what it computes in, however it is stored
        vectors = tuple(head(hidden) for head in self.heads)
        if keep is None:
            return vectors
        return tuple(torch.where(keep[:, None], vector, torch.zeros_like(vector)) for vector in vectors)


def numbers_of(condition: str) -> int:
    """How many numbers an image's condition has.

    Raises:
        ConfigError: no such condition.
    """
    if condition not in CONDITIONS:
        raise ConfigError(f"condition {condition!r} is not known. There are: {', '.join(CONDITIONS)}")
    return CONDITIONS[condition]
