"""Forward passes that are shared: requests that come while one runs go through the next one together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHARED_MAX = 32  # rows of one shared pass
FEW = 8  # rows of a request that shares; a pass of more costs hardly less per row

Forward = Callable[[NDArray[np.float32]], Any]


def rows_of(outputs: Any, start: int, end: int) -> Any:
    """The rows from `start` to `end` of a network's outputs: an array, or lists, tuples and dicts of arrays."""
    return outputs[start:end] if isinstance(outputs, np.ndarray) else nested(lambda array: array[start:end], outputs)


def nested(change: Callable[[Any], Any], outputs: Any) -> Any:
    """Each array of a network's outputs changed, in the same lists, tuples and dicts."""
    if isinstance(outputs, dict):
        return {name: nested(change, each) for name, each in outputs.items()}
    if isinstance(outputs, list | tuple):
        return type(outputs)([nested(change, each) for each in outputs])
    return change(outputs)


def flat(outputs: Any) -> list[Any]:
    """The arrays of a network's outputs, one after another."""
    found: list[Any] = []
    nested(found.append, outputs)
    return found


class SharedPasses:
    """
    One network's forward pass for many threads; nobody waits while no other pass runs.

    Whoever finds no pass running runs one at once, with the rows of all who wait, and then
    makes the first of those who have come meanwhile run the next.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._lock = threading.Lock()
        self._waiting: deque[_Wish] = deque()
        self._running = False

    def __call__(self, batch: NDArray[np.float32]) -> Any:
        """
        The network's outputs, shape (N, …), or lists and dicts of such; row i belongs to ``batch[i]``.

        Raises:
            Exception: What the network raises for this very batch.
        """
        if len(batch) > FEW:
            return self._forward(batch)
        wish = _Wish(batch)
        with self._lock:
            self._waiting.append(wish)
            leads, self._running = not self._running, True
        if not leads:
            wish.told.wait()
        if not wish.done:
            self._run()
        if wish.error is not None:
            raise wish.error
        return wish.outputs

    def _run(self) -> None:
        """One pass, for the first who waits, which is the caller, and those behind it."""
        with self._lock:
            wishes, rows = [self._waiting.popleft()], SHARED_MAX
            while self._waiting and len(self._waiting[0].batch) <= (rows := rows - len(wishes[-1].batch)):
                wishes.append(self._waiting.popleft())
        try:
            self._answer(wishes)
        finally:
            with self._lock:
                after = self._waiting[0] if self._waiting else None
                self._running = after is not None
            for wish in wishes:
                wish.told.set()
            if after is not None:
                after.told.set()

    def _answer(self, wishes: list[_Wish]) -> None:
        try:
            outputs = self._forward(np.concatenate([wish.batch for wish in wishes]))
        except Exception as error:  # noqa: BLE001 - raised again in the thread that it belongs to
            if len(wishes) == 1:
                wishes[0].error, wishes[0].done = error, True
                return
            for wish in wishes:  # the others are not to suffer from one that the network does not bear
                self._answer([wish])
            return
        start = 0
        for wish in wishes:
            wish.outputs, wish.done = rows_of(outputs, start, start + len(wish.batch)), True
            start += len(wish.batch)


class _Wish:
    """What one thread wants to know; `told` once it is known, or once this thread is to run the next pass."""

    def __init__(self, batch: NDArray[np.float32]) -> None:
        self.batch = batch
        self.outputs: Any = None
        self.error: Exception | None = None
        self.done = False
        self.told = threading.Event()
