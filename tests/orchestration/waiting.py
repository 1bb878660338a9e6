"""Waiting for what other processes do."""

import time
from collections.abc import Callable
from typing import Any


def wait_for(happens: Callable[[], Any], seconds: float = 120) -> Any:
    """What it gives, as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (found := happens()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found
