"""Memory that the C library keeps for later, given back to the system."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

EVERY = 1000  # tasks; what their pictures leave behind is some 100 MB, in pieces between what is still in use


class Heap:
    """
    Keeps a process that decodes pictures in many threads from growing; safe between threads.

    What threads have freed stays with them in glibc, so the process holds as much as every thread
    ever needed at its worst moment. Where there is no glibc, nothing is done.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used = 0
        self._trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def used(self, tasks: int) -> None:
        """Count tasks that are done with; after every 1,000 of them it takes some 10 ms."""
        with self._lock:
            self._used += tasks
            due = self._used >= EVERY
            if due:
                self._used = 0
        if due and self._trim is not None:
            self._trim(0)
