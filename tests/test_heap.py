"""What pictures leave behind in memory."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from celestial_backend.heap import EVERY, Heap

THREADS, PIECES, PIECE = 4, 2000, 20_000  # 160 MB in all


def resident_mb() -> float:
    return float(psutil.Process().memory_info().rss / 1e6)


def scattered(_: int) -> list[bytearray]:
    """Many pieces are made in this thread, and of all that go few stay, so that the space between is kept for later."""
    pieces = [bytearray(PIECE) for _ in range(PIECES)]
    return pieces[::100]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps it, and can give it back")
def test_what_threads_have_freed_goes_back_to_the_system() -> None:
    """Not at once, but after a thousand tasks."""
    heap = Heap()
    with ThreadPoolExecutor(THREADS) as pool:
        kept = list(pool.map(scattered, range(THREADS)))
        heap.used(EVERY - 1)
        before = resident_mb()
        heap.used(1)
        after = resident_mb()
    assert after < before - 80, f"{before:.0f} MB before, {after:.0f} MB after, {len(kept)} lists are kept"


def test_a_system_without_glibc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    Heap().used(EVERY)
