"""The log of a training: a line for each optimizer step, the same bytes for equal trainings.

Belongs here: what a line says, reading and writing it, what it tells of loss spikes and the best validation loss.
Not here: times, speed and memory, which differ from run to run (`run_log`).
"""

import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields

LOG = "training_log.jsonl"
SMOOTHING_STEPS = 50


@dataclass(frozen=True)
class LogLine:
    """What is written of one optimizer step. No times: equal trainings write equal logs."""

    step: int
    epoch: int
    loss: float
    smoothed: float
    lr: float
    grad_norm: float
    # written only where they say something
    skipped: bool = False  # a spike: the batch changed no weight and no smoothed loss
    validation_loss: float | None = None  # of the averaged weights after this step

    def encoded(self) -> str:
        """The line as JSON, with its end."""
        said = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.default is MISSING or getattr(self, field.name) != field.default
        }
        return json.dumps(said) + "\n"


def encoded(log: Sequence[LogLine]) -> bytes:
    """All lines, as the file has them."""
    return "".join(line.encoded() for line in log).encode()


def decoded(text: str) -> list[LogLine]:
    """The lines of a file."""
    return [LogLine(**json.loads(line)) for line in text.splitlines()]


def smoothed(log: Sequence[LogLine], loss: float) -> float:
    """The mean of the losses so far, later an exponential one over about the last 50."""
    before = log[-1].smoothed if log else loss
    return before + (loss - before) * max(1 / (len(log) + 1), 1 / SMOOTHING_STEPS)


def is_spike(log: Sequence[LogLine], loss: float, factor: float | None) -> bool:
    """Whether a loss is over `factor` times the smoothed one; never before there is as much to smooth over."""
    return factor is not None and len(log) >= SMOOTHING_STEPS and loss > factor * log[-1].smoothed


def skipped_in_a_row(log: Sequence[LogLine]) -> int:
    """How many of the last steps were skipped."""
    return next((count for count, line in enumerate(reversed(log)) if not line.skipped), len(log))


def best(log: Sequence[LogLine]) -> LogLine | None:
    """The step with the smallest validation loss, the first of equals; None where nothing was validated."""
    known = [line for line in log if line.validation_loss is not None]
    return min(known, key=lambda line: line.validation_loss or 0.0, default=None)
