"""Being asked to stop: the step in progress ends whole, a checkpoint is written, the exit code says "call me again".

Belongs here: which signals ask, what they do before, while and after there is something to save. Not here: checkpoints,
who looks. Light to import: the command line does so before it knows what it will need.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

STOPPED = 75  # EX_TEMPFAIL: asked to stop, checkpoint written, run again to go on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Clusters send the first when they take a machine back, and the second, where asked to, ahead of a job's end."""


@contextlib.contextmanager
def ending_when_asked() -> Iterator[None]:
    """While it is open, a signal of `SIGNALS` ends the process at once with `STOPPED`, unless a `Stop` is open too.

    For what comes before a training and after it (imports, encoding, saving): nothing is lost that the same command
    would not make again.

    Raises:
        SystemExit: 75.
    """
    with _answered_by(_end):
        yield


class Stop:
    """While it is open, a signal of `SIGNALS` is remembered in `asked` instead of obeyed."""

    def __init__(self) -> None:
        self.asked = False
        self._answered = _answered_by(self._remember)

    def __enter__(self) -> "Stop":
        self._answered.__enter__()
        return self

    def _remember(self, number: int, frame: object) -> None:
        self.asked = True

    def __exit__(self, *exc: Any) -> None:
        self._answered.__exit__(*exc)


def ignore_signals(worker: int) -> None:
    """For data workers: a cluster's signals reach them too, and the trainer still needs them to end its step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end(number: int, frame: object) -> None:
    print("asked to stop; the same command goes on from what is whole", file=sys.stderr)
    raise SystemExit(STOPPED)


@contextlib.contextmanager
def _answered_by(handler: Any) -> Iterator[None]:
    previous: dict[signal.Signals, Any] = {}
    for number in SIGNALS:
        try:
            previous[number] = signal.signal(number, handler)
        except ValueError:  # not the main thread: whoever owns it takes care of signals
            break
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
