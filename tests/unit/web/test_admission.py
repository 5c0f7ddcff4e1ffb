"""How many predictions a process takes on: places and turns."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest

from celestial_backend.errors import BusyError
from celestial_backend.settings import Settings
from celestial_backend.web.admission import LINE, Admission
from tests.support.bounds import MB, WAIT_S


def soon(seconds: float = WAIT_S) -> float:
    return time.monotonic() + seconds


def test_places_are_bounded_and_given_back() -> None:
    """THREADS at work and a line behind them; one who leaves makes room for one more."""
    admission = Admission(Settings(threads=2))
    with ExitStack() as held:
        for _ in range(2 + LINE):
            held.enter_context(admission.predictions.place())
        with pytest.raises(BusyError, match=r"Too many predictions are asked for at once: 130 .* raise WORKERS"):
            held.enter_context(admission.predictions.place())
    with admission.predictions.place():
        pass


def test_bytes_are_bounded_as_they_come_and_one_large_request_is_always_let_in() -> None:
    """While the others hold less than the bound even the largest is served; what comes then is refused, halfway too."""
    places = Admission(Settings(request_max_mb=10)).predictions
    with places.place() as small, places.place() as large, places.place() as halfway:
        small.take(9 * MB)
        large.take(10 * MB)
        with pytest.raises(BusyError, match=r"3 with 19\.0 MB are here"):
            halfway.take(1)
        with pytest.raises(BusyError):
            places.place().__enter__()
    with places.place() as large:
        large.take(9 * MB)
        large.take(1 * MB)


def test_a_turn_is_waited_for_and_not_for_ever() -> None:
    """With one of THREADS the second batch waits: in vain until its time is up, and no longer than the first works."""
    admission = Admission(Settings(threads=1))
    got = threading.Event()

    def second() -> None:
        with admission.turn(2, soon()):
            got.set()

    with admission.turn(1000, soon()):
        with pytest.raises(BusyError, match="turn did not come in time"), admission.turn(2, soon(0.05)):
            pass
        waiting = threading.Thread(target=second)
        waiting.start()
        assert not got.wait(0.1)
    assert got.wait(WAIT_S)
    waiting.join()


def test_a_single_task_waits_for_no_turn() -> None:
    """While batches have all of THREADS, single tasks go on, and take no turn from a batch."""
    admission = Admission(Settings(threads=1))
    with (
        admission.turn(2, soon()), admission.turn(1, soon(0)), admission.turn(1, soon(0)),
        pytest.raises(BusyError), admission.turn(2, soon(0.05)),
    ):  # fmt: skip
        pass
    with admission.turn(1, soon(0)), admission.turn(2, soon(0)):
        pass


def test_a_turn_that_failed_is_given_back() -> None:
    """An error in the middle costs no turn, nor does giving up in line."""
    admission = Admission(Settings(threads=1))
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), admission.turn(1000, soon(0)):
            raise ZeroDivisionError
