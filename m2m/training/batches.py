"""Which samples each optimizer step reads: a pure function of the settings, the same for any number of processes.

Belongs here: counting steps, splitting batches. Not here: the order of an epoch (`m2m.data.sets`), reading.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from m2m.data.sets import epoch_order
from m2m.training.settings import TrainingSettings


def steps_per_epoch(sets: int, batch: int) -> int:
    """Full batches of an epoch, the rest left out (other sets each epoch); one where a batch is more than all sets."""
    return max(1, sets // batch)


def total_steps(settings: TrainingSettings, sets: int) -> int:
    """Optimizer steps of the whole training."""
    return settings.epochs * steps_per_epoch(sets, settings.sets_per_step) if settings.steps is None else settings.steps


@dataclass(frozen=True)
class BatchPlan:
    """Which samples each step of this process reads: a pure function of the settings."""

    settings: TrainingSettings
    sets: int
    per_shard: int | None
    processes: int
    process: int

    @property
    def per_epoch(self) -> int:
        return steps_per_epoch(self.sets, self.settings.sets_per_step)

    @property
    def steps(self) -> int:
        return total_steps(self.settings, self.sets)

    def batches(self, start: int) -> Iterator[tuple[int, int, list[int]]]:
        """(step from 1, epoch from 0, samples of the whole batch) from after step `start`."""
        order, of_epoch, size = None, -1, self.settings.sets_per_step
        for step in range(start, self.steps):
            epoch, place = divmod(step, self.per_epoch)
            if epoch != of_epoch or order is None:
                order = epoch_order(self.sets, self.per_shard or self.sets, self.settings.seed, epoch)
                of_epoch = epoch
            yield step + 1, epoch, order[place * size : (place + 1) * size].tolist()

    def micro_batches(self, batch: Sequence[int]) -> list[Sequence[int]]:
        """What this process reads of a batch, in forward passes."""
        own = batch[self.process :: self.processes]
        return [own[at : at + self.settings.micro_batch] for at in range(0, len(own), self.settings.micro_batch)]

    def reading_order(self, start: int) -> Iterator[list[tuple[int, int]]]:
        """(epoch, sample) of each forward pass of this process, from after step `start`."""
        for _, epoch, batch in self.batches(start):
            for micro in self.micro_batches(batch):
                yield [(epoch, sample) for sample in micro]
