"""Sets for task-specific fine-tuning: views of an object with their poses, steps of a procedure with their positions.

Belongs here: which images of an object or procedure make a set, and their conditions. Not here: files' layouts
(`m2m.data.objaverse`, `m2m.data.vgsi`), encoding.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from m2m.data.objaverse import ObjaverseViews, relative_poses
from m2m.data.set_aside import SetAside
from m2m.data.vgsi import Procedures
from m2m.generation.noise import keyed_generator, namespaced
from m2m.training.loop import Batch


class Task(Protocol):
    """Objects or procedures, by number; each a number of images with what is known of them."""

    condition: str
    set_aside: list[SetAside]

    def __len__(self) -> int: ...

    def read(self, sample: int) -> tuple[Tensor, Tensor]:
        """All images uint8 (V, 3, S, S), and what their conditions are made of, (V, ...)."""
        ...

    def choose(self, sample: int, there: int, images: int, key: tuple[int, int]) -> list[int]:
        """Which of `there` images make a set of at most `images`, in order; `key` is (seed, epoch)."""
        ...

    def conditions(self, known: Tensor) -> Tensor:
        """What is known of a set's images -> their conditions (n, P) float32."""
        ...


class NovelViews:
    """Any views of an object in any order; poses are relative to the first preceding image (section 8.5.1)."""

    condition = "camera"

    def __init__(self, views: ObjaverseViews) -> None:
        self._views = views
        self.set_aside = views.set_aside

    def __len__(self) -> int:
        return len(self._views)

    def read(self, sample: int) -> tuple[Tensor, Tensor]:
        found = self._views[sample]
        return found.images, found.poses

    def choose(self, sample: int, there: int, images: int, key: tuple[int, int]) -> list[int]:
        seed, epoch = key
        drawn = keyed_generator(namespaced(seed, "views of an object"), epoch, sample)
        return drawn.permutation(there)[:images].tolist()

    def conditions(self, known: Tensor) -> Tensor:
        return relative_poses(known).float()


class VisualProcedures:
    """Steps that follow each other, from any step on; positions count the procedure's steps from 0 (section 8.5.2).

    Procedures of one step tell nothing of a next one: they are set aside.
    """

    condition = "position"

    def __init__(self, procedures: Procedures, size: int) -> None:
        self._procedures, self._size = procedures, size
        steps = [len(procedures[number].step_ids) for number in range(len(procedures))]
        self._numbers = [number for number, count in enumerate(steps) if count > 1]
        single = [procedures[number].step_ids[0] for number, count in enumerate(steps) if count == 1]
        self.set_aside = procedures.set_aside + [SetAside(step, "its procedure's only step") for step in single]

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, sample: int) -> tuple[Tensor, Tensor]:
        images = self._procedures.images(self._numbers[sample], self._size)
        return images, torch.arange(len(images))[:, None]

    def choose(self, sample: int, there: int, images: int, key: tuple[int, int]) -> list[int]:
        seed, epoch = key
        drawn = keyed_generator(namespaced(seed, "steps of a procedure"), epoch, sample)
        first = int(drawn.integers(max(1, there - images + 1)))
        return list(range(first, min(there, first + images)))

    def conditions(self, known: Tensor) -> Tensor:
        return known.float()


class TaskSets:
    """Sets of N images of a task by (epoch, sample), chosen anew each epoch.

    A set with fewer images than N is padded at its end, and `counts` says how many are true: as no image sees a
    later one, the padding changes nothing.

    Args:
        limit: only the first so many objects or procedures.
        kept: what was encoded of all images of a sample, by name, in memory; pictures are then not read again.
    """

    def __init__(
        self,
        task: Task,
        images: int,
        seed: int,
        *,
        limit: int | None = None,
        kept: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._task, self._images, self._seed, self._kept = task, images, seed, kept
        self._count = len(task) if limit is None else min(limit, len(task))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        """`sample`, `counts`, `condition` (N, P), and `pictures` (N, 3, S, S) or what is kept of them."""
        epoch, sample = key
        if self._kept is None:
            pictures, known = self._task.read(sample)
            found: Mapping[str, Tensor] = {"pictures": pictures}
        else:
            found = {name: value for name, value in self._kept[sample].items() if name != "known"}
            known = self._kept[sample]["known"]
        chosen = self._task.choose(sample, len(known), self._images, (self._seed, epoch))
        padded = chosen + [chosen[-1]] * (self._images - len(chosen))
        item = {
            "sample": torch.tensor(sample),
            "counts": torch.tensor(len(chosen)),
            "condition": self._task.conditions(known[padded]),
        }
        for name, value in found.items():
            # features of the last image are read by nobody
            item[name] = value[padded[:-1] if name == "features" else padded]
        return item
