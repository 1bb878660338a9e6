"""Several processes that make one output together, as `--processes`, torchrun and `accelerate launch` start them.

Belongs here: who leads, telling the others, that an error of the leader stops those who wait for it. Not here: how
they share the work (`m2m.training`), starting them (`m2m.ranks`, clusters).
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from m2m.errors import M2MError

_PATIENCE = timedelta(hours=2)  # for what the leader does alone: waiting for a lock, saving, drawing a picture


def count() -> int:
    """How many processes were started together: WORLD_SIZE, as torchrun has it, or one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """This process's number among them, from 0."""
    return int(os.environ.get("RANK") or 0)


def leads() -> bool:
    """Whether this process is the one that locks, writes and speaks."""
    return rank() == 0


def wait_for_all() -> None:
    """Go on when all of them have come here; of one process alone nothing is asked."""
    if count() > 1:
        import torch

        torch.distributed.all_reduce(torch.zeros(1))  # on the CPU, by gloo


@dataclass(frozen=True)
class _Failed:
    why: str
    code: int | None = None  # of a leader that was asked to stop


class Team:
    """The processes of one output. The leader tells what is to be done and what came of it; the others hear it.

    Of one process alone nothing is asked, and torch is not imported.
    """

    def __init__(self) -> None:
        self.count = count()
        self._heard = self.count > 1  # whether the others wait for word now

    def tell(self, word: Any) -> None:
        """Leader: what all others get from `hear`; anything that can be pickled."""
        if self.count > 1:
            _broadcast(word)

    def hear(self) -> Any:
        """The others: wait for the leader's word.

        Raises:
            M2MError: the leader has failed.
            SystemExit: it was asked to stop; with its exit code.
        """
        word = _broadcast(None)
        if isinstance(word, _Failed) and word.code is not None:
            raise SystemExit(word.code)
        if isinstance(word, _Failed):
            raise M2MError(f"the leading process has stopped: {word.why}")
        return word

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Leader: an error is told to those who wait; where they work with it, they see it go."""
        try:
            yield
        except BaseException as error:
            if self._heard:
                code = error.code if isinstance(error, SystemExit) else None
                self.tell(_Failed(str(error), code if isinstance(code, int) else None))
            raise

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Leader: all work together in here, and nobody waits for word."""
        heard, self._heard = self._heard, False
        yield
        self._heard = heard


@contextlib.contextmanager
def team() -> Iterator[Team]:
    """The processes that were started together, connected; of one alone, nothing is connected."""
    if count() == 1:
        yield Team()
        return
    import torch

    # words go by gloo, gradients on GPUs by NCCL; Accelerate takes over what is there
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=_PATIENCE)
    if torch.cuda.is_available():  # each its own GPU, where there are as many
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())
    failed = True
    try:
        yield Team()
        failed = False
    finally:
        # left to the interpreter's end, gloo's threads now and then abort the process, and its exit code is lost;
        # NCCL would wait for others, who after an error may never come
        if not failed or not torch.cuda.is_available():
            torch.distributed.destroy_process_group()


def _broadcast(word: Any) -> Any:
    import torch

    words = [word]
    torch.distributed.broadcast_object_list(words, src=0, device=torch.device("cpu"))
    return words[0]
