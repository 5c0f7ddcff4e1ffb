"""What people see while a command works, on stderr: a bar or a turning sign on a terminal, else a line now and then."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Item = TypeVar("Item")
SOON_S, EVERY_S = 2.0, 10.0  # from the begin to the first line, and from line to line


class Shown:
    """
    What a command is doing; entered for as long as it does it. Called, it tells how far that is.

    On a terminal it draws a bar, and without a total a sign that moves, however long nothing is told. Elsewhere it
    writes a line after two seconds, and then every ten. What others write to stderr meanwhile stands above it.
    """

    def __init__(self, what: str) -> None:
        self._what, self._far = what, ""
        self._began, self._ended = time.monotonic(), threading.Event()
        self._bar = _bar() if sys.stderr.isatty() else None
        if self._bar is not None:
            self._task = self._bar.add_task(what, total=None, far="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        else:
            threading.Thread(target=self._tell, name="shown", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int = 0, total: int | None = None, *, what: str = "", words: str = "") -> None:
        """How much of how much is done, and in words what is being done, or how; safe in any thread."""
        self._what = what or self._what
        self._far = ", ".join(filter(None, [f"{done} of {total}" if total else "", words]))
        if self._bar is not None:
            self._bar.update(self._task, description=self._what, completed=done, total=total or None, far=self._far)

    def _tell(self) -> None:
        pause = SOON_S
        while not self._ended.wait(pause):
            pause = EVERY_S
            seconds = f"{time.monotonic() - self._began:.0f} s"
            click.echo(f"{self._what}: {', '.join(filter(None, [self._far, seconds]))}", err=True)


def each(what: str, items: Iterable[Item]) -> Iterator[Item]:
    """Items that take their time, with a sign of life while one is waited for."""
    waiting = iter(items)
    while True:
        with Shown(what):
            try:
                item = next(waiting)
            except StopIteration:
                return
        yield item


class _Clock(ProgressColumn):
    """The time that is left, and where nobody knows it, the time that it has taken."""

    def render(self, task: Task) -> Text:
        return (TimeRemainingColumn() if task.total else TimeElapsedColumn()).render(task)


def _bar() -> Progress:
    """Drawn on a copy of stderr, so that it goes on where `logs.hushed` takes the file away from libraries."""
    terminal = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding=sys.stderr.encoding, errors="backslashreplace")
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[far]}"), _Clock(),
        console=Console(file=terminal), transient=True, redirect_stdout=sys.stdout.isatty(),
    )  # fmt: skip
