"""Forward passes that requests share: who shares, in which order, and what an error costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from celestial_backend.models.passes import FEW, SHARED_MAX, SharedPasses

Rows = NDArray[np.float32]
WAIT_S = 10


class Network:
    """Doubles its input, refuses what is negative, and can be held in the middle of a pass."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.entered, self.go_on = threading.Semaphore(0), threading.Event()
        self.go_on.set()

    def __call__(self, batch: Rows) -> Rows:
        self.sizes.append(len(batch))
        self.entered.release()
        assert self.go_on.wait(WAIT_S)
        if (batch < 0).any():
            raise ValueError("negative")
        return batch * 2


def rows(*values: float) -> Rows:
    return np.array([[value] for value in values], np.float32)


def all_behind_one(
    network: Network, passes: SharedPasses, batches: list[Rows], settled: Callable[[], bool]
) -> list[Future[Rows]]:
    """Ask for `batches` while a pass of another request runs, and give their answers."""
    network.go_on.clear()
    with ThreadPoolExecutor(len(batches) + 1) as threads:
        first = threads.submit(passes, rows(1))
        assert network.entered.acquire(timeout=WAIT_S)
        asked = []
        for number, batch in enumerate(batches, 1):
            asked.append(threads.submit(passes, batch))
            deadline = time.monotonic() + WAIT_S
            while len(passes._waiting) < number and not settled() and time.monotonic() < deadline:
                time.sleep(0.001)
        network.go_on.set()
        np.testing.assert_array_equal(first.result(WAIT_S), rows(2))
    return asked


def test_alone_nobody_waits() -> None:
    """One request after another gets a pass of its own, at once."""
    network = Network()
    passes = SharedPasses(network)
    for value in range(3):
        np.testing.assert_array_equal(passes(rows(value)), rows(2 * value))
    assert network.sizes == [1, 1, 1]


def test_those_who_come_meanwhile_share_the_next_pass_and_get_their_own_rows() -> None:
    """Ten requests of one or two rows come while a pass runs: one more pass serves them all."""
    network = Network()
    batches = [rows(10 * n, 10 * n + 1) if n % 2 else rows(10 * n) for n in range(1, 11)]
    asked = all_behind_one(network, SharedPasses(network), batches, lambda: False)
    for batch, answer in zip(batches, asked, strict=True):
        np.testing.assert_array_equal(answer.result(WAIT_S), batch * 2)
    assert network.sizes == [1, 15]


def test_a_pass_is_bounded() -> None:
    """What does not fit into one pass goes through the one after it."""
    network = Network()
    batches = [rows(*range(FEW))] * 6
    asked = all_behind_one(network, SharedPasses(network), batches, lambda: False)
    assert all(len(answer.result(WAIT_S)) == FEW for answer in asked)
    assert network.sizes == [1, SHARED_MAX, 2 * FEW]


def test_a_large_batch_neither_waits_nor_shares() -> None:
    """It runs at once, beside the pass that runs."""
    network = Network()
    (asked,) = all_behind_one(network, SharedPasses(network), [rows(*range(64))], lambda: len(network.sizes) == 2)
    np.testing.assert_array_equal(asked.result(WAIT_S), rows(*range(64)) * 2)
    assert network.sizes == [1, 64]


def test_an_error_stays_with_the_request_that_caused_it() -> None:
    """Of three requests in one pass the middle one is refused by the network: the other two get their rows."""
    network = Network()
    passes = SharedPasses(network)
    good, bad, other = all_behind_one(network, passes, [rows(3), rows(-1), rows(4)], lambda: False)
    np.testing.assert_array_equal(good.result(WAIT_S), rows(6))
    np.testing.assert_array_equal(other.result(WAIT_S), rows(8))
    with pytest.raises(ValueError, match="negative"):
        bad.result(WAIT_S)
    np.testing.assert_array_equal(passes(rows(5)), rows(10))


def test_many_threads_get_their_own_answers() -> None:
    """A thousand requests from 32 threads: every answer is the asker's own."""
    passes = SharedPasses(lambda batch: batch + 1)
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(lambda n: passes(rows(n)), range(1000)))
    assert [float(answer[0, 0]) for answer in answers] == [n + 1.0 for n in range(1000)]
