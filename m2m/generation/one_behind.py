"""Two steps of a work at a time: while the second one finishes an item in a thread, the first one is at the next.

Belongs here: the order of both. Not here: what the steps are (`image_sets`).
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Begun = TypeVar("Begun")
Done = TypeVar("Done")


def one_behind(
    items: Iterable[Item], begin: Callable[[Item], Begun], finish: Callable[[Item, Begun], Done]
) -> Iterator[tuple[Item, Future[Done]]]:
    """Each item with what `finish(item, begin(item))` came to, in order; its `result()` raises what either raised.

    `begin` runs in the caller's thread, `finish` in one other: each sees one item at a time, and at most two items are
    held.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="finish") as thread:
        behind: tuple[Item, Future[Done]] | None = None
        for item in items:
            done: Future[Done] = Future()
            try:
                begun = begin(item)
            except Exception as error:
                done.set_exception(error)
            else:
                done = thread.submit(finish, item, begun)
            if behind is not None:
                yield behind
            behind = item, done
        if behind is not None:
            yield behind
