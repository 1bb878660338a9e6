"""Something done to a run while it goes on: what a test does to clusters beside the run that it waits for."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def beside(meanwhile: Callable[[], object], end: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Do `meanwhile` in a thread as long as the block is at work; what it raises is raised when both are done.

    Args:
        end: ends what the block waits for, which otherwise might wait for ever where `meanwhile` failed.
    """
    failed: list[BaseException] = []

    def work() -> None:
        try:
            meanwhile()
        except BaseException as error:
            failed.append(error)
            end()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failed:
        raise failed[0]
