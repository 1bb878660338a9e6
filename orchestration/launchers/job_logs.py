"""What a job prints into files, passed on to where Dagster collects it.

Belongs here: copying while it grows. Not here: reading a growing file (`tail`), where the files lie (the launchers).
"""

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestration.launchers.outcome import LINES_KEPT
from orchestration.launchers.tail import Tail


@contextlib.contextmanager
def passed_on(files: Sequence[tuple[Path, Path]]) -> Iterator[Sequence[deque[str]]]:
    """Copy the stdout and stderr of each task to this process's; yields the end of each one's stderr."""
    kept: list[deque[str]] = [deque(maxlen=LINES_KEPT) for _ in files]
    over = threading.Event()
    pairs = [(Tail(out), Tail(err)) for out, err in files]

    def copy() -> None:
        last = False
        while not last:
            last = over.wait(0.2 + 0.01 * len(pairs))
            for (out, err), end in zip(pairs, kept):
                for tail, to in ((out, sys.stdout), (err, sys.stderr)):
                    lines = tail.last_lines() if last else tail.lines()
                    if tail is err:
                        end.extend(lines)
                    to.writelines(f"{line}\n" for line in lines)
                    to.flush()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield kept
    finally:
        over.set()
        thread.join()
