"""The true pictures that evaluations on the test split show models and compare with.

Belongs here: reading or decoding them. Not here: the shards (`m2m.data.sets`), trials that are drawn
(`m2m.evaluation.agreement`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from m2m.data.sets import ImageSets
from m2m.errors import ArtifactError, InputError
from m2m.evaluation.sampler import Sampler
from m2m.stage_run import StageRun


class SetPictures:
    """The pictures of generate-sets' test split: the stored ones, or decoded latents where a profile stores none.

    Raises:
        InputError: they are of another size than the model's pictures.
    """

    def __init__(self, run: StageRun, decoder: Sampler) -> None:
        self._sets = ImageSets(run.inputs["sets"], "test")
        if self._sets.image_size != decoder.size:
            raise InputError(
                f"{self._sets.folder}: sets of {self._sets.image_size} pixels; the model makes pictures of "
                f"{decoder.size}. "
                "Evaluate a model with sets of the text-to-image model that it was made from"
            )
        self._decoder = decoder if self._sets.index.pictures is None else None

    def __len__(self) -> int:
        return len(self._sets)

    @property
    def images_per_set(self) -> int:
        return self._sets.images_per_set

    def caption(self, i: int) -> str:
        return self._sets.caption(i)

    def key(self, i: int) -> int:
        """The caption's id: the key of the set's noise."""
        return self._sets.caption_id(i)

    def pictures(self, i: int, which: Sequence[int]) -> Tensor:
        """uint8 (len(which), 3, H, W).

        Raises:
            InputError: sets do not have as many pictures.
            ArtifactError: a picture is missing or can't be read.
        """
        if which and max(which) >= self.images_per_set:
            raise InputError(
                f"{self._sets.folder}: sets of {self.images_per_set} images; picture {max(which) + 1} was asked for: "
                "lower evaluate.preceding, or make larger sets"
            )
        if self._decoder is not None:
            return self._decoder.decode(self._sets.latents(i, which))
        try:
            return self._sets.pictures(i, which)
        except (OSError, KeyError, ValueError) as error:
            raise ArtifactError(
                f"{self._sets.folder}: pictures {list(which)} of set {self.key(i)} can't be read ({error}). "
                "`python -m m2m shards verify` names the damaged shards; generate-sets makes them again"
            ) from None

    def stack(self, indices: Sequence[int], which: Sequence[int]) -> Tensor:
        """uint8 (len(indices), len(which), 3, H, W)."""
        return torch.stack([self.pictures(i, which) for i in indices])
