"""The next batches are taken while the model works on this one: a step waits for data only where reading is slower.

Belongs here: the thread that takes them. Not here: what is read and in which order (`batches`, `m2m.data.sets`).
"""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

_END = object()
_LOOK_EVERY = 0.1  # seconds, for a reader that nobody listens to any more


def read_ahead(items: Iterator[Item], ahead: int = 2) -> Generator[Item, None, None]:
    """The items in their order, at most `ahead` of them taken before they are asked for; an error comes in its place.

    The thread ends with the items, or when this iterator is closed.
    """
    taken: queue.Queue[Any] = queue.Queue(ahead)
    unwanted = threading.Event()

    def put(item: Any) -> bool:
        while not unwanted.is_set():
            try:
                taken.put(item, timeout=_LOOK_EVERY)
                return True
            except queue.Full:
                continue
        return False

    def take() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:
            put((_END, error))

    thread = threading.Thread(target=take, name="read ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = taken.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        unwanted.set()
        thread.join()
