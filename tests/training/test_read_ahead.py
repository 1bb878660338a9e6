"""Reading ahead changes when batches are read, and nothing else."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2m.training.read_ahead import read_ahead


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 20), ahead=st.integers(1, 4))
def test_items_come_in_order_and_an_error_in_its_place(count, ahead):
    assert list(read_ahead(iter(range(count)), ahead)) == list(range(count))

    def failing():
        yield from range(count)
        raise KeyError("broken")

    found = []
    with pytest.raises(KeyError, match="broken"):
        for item in read_ahead(failing(), ahead):
            found.append(item)
    assert found == list(range(count))


def test_no_more_is_read_than_asked_for_and_the_thread_ends():
    read: list[int] = []

    def items():
        for i in range(1000):
            read.append(i)
            yield i

    ahead = read_ahead(items(), 2)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.3)
    assert len(read) <= 3 + 2 + 1  # waiting in the queue, and one in the thread's hands
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "read ahead"]


def test_reading_costs_no_time_where_it_is_faster_than_the_work():
    def items():
        for i in range(8):
            time.sleep(0.03)
            yield i

    waited = 0.0
    ahead = read_ahead(items())
    next(ahead)
    for _ in range(7):
        time.sleep(0.1)
        asked = time.monotonic()
        next(ahead)
        waited += time.monotonic() - asked
    assert waited < 0.1  # one after the other: 0.21
