"""Two steps at a time change nothing but the time."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2m.generation.one_behind import one_behind


class Begun(Exception):
    pass


class Finished(Exception):
    pass


@given(items=st.lists(st.integers(0, 9), max_size=12))
def test_results_and_errors_come_in_order(items):
    def begin(item: int) -> int:
        if item == 3:
            raise Begun
        return 10 * item

    def finish(item: int, begun: int) -> int:
        if item == 5:
            raise Finished
        return begun + item

    for expected, (item, done) in zip(items, one_behind(items, begin, finish), strict=True):
        assert item == expected
        if item in (3, 5):
            with pytest.raises(Begun if item == 3 else Finished):
                done.result()
        else:
            assert done.result() == 11 * item


def test_two_steps_take_the_time_of_one():
    def begin(item: int) -> int:
        time.sleep(0.05)
        return item

    def finish(item: int, begun: int) -> int:
        time.sleep(0.05)
        return begun

    started = time.monotonic()
    assert [done.result() for _, done in one_behind(range(10), begin, finish)] == list(range(10))
    assert time.monotonic() - started < 0.85  # one after the other: 1.0; alone: 0.5


def test_no_more_is_begun_than_one_ahead():
    begun: list[int] = []
    for item, done in one_behind(range(5), lambda item: begun.append(item), lambda item, _: item):
        assert done.result() == item and len(begun) <= item + 2
