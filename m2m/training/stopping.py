"""Being asked to stop: the step in progress ends whole, a checkpoint is written, the exit code says "call me again".

Belongs here: which signals ask, remembering that one did. Not here: checkpoints, who looks.
"""

import signal
from typing import Any

STOPPED = 75  # EX_TEMPFAIL: asked to stop, checkpoint written, run again to go on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Clusters send the first when they take a machine back, and the second, where asked to, ahead of a job's end."""


class Stop:
    """While it is open, a signal of `SIGNALS` is remembered in `asked` instead of obeyed."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        for number in SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._remember)
            except ValueError:  # not the main thread: whoever owns it takes care of signals
                break
        return self

    def _remember(self, number: int, frame: object) -> None:
        self.asked = True

    def __exit__(self, *exc: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)


def ignore_signals(worker: int) -> None:
    """For data workers: a cluster's signals reach them too, and the trainer still needs them to end its step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
