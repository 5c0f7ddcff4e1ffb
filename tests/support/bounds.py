"""What tests of bounds count in, and how long they wait for what must come."""

from __future__ import annotations

import time
from collections.abc import Callable

MB = 1_000_000
WAIT_S = 60


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
