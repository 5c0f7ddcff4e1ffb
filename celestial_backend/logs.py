"""What the process writes to its log, set once by each entry point."""

from __future__ import annotations

import importlib.abc
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, TextIO

LIBRARIES = dict.fromkeys(("httpcore", "urllib3", "PIL", "h5py", "bentoml"), logging.INFO)
LIBRARIES |= {"httpx": logging.WARNING, "huey": logging.WARNING, "tensorflow": logging.ERROR, "absl": logging.ERROR}
LIBRARIES |= dict.fromkeys(("psycopg", "sqlalchemy"), logging.CRITICAL)  # errors say it in our words
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_HUSHED = threading.RLock()
FACTS = "facts"  # of a record: what programs read of it, by name
SIGNS_MAX = 4_000  # of a line; more are counted and left out
LINES_MAX = 400  # of a traceback; a deep one has a hundred


def configure(level: str, form: str = "text") -> None:
    """
    Log lines of this level and above to stderr, and quieten the libraries.

    Libraries log headers and addresses at DEBUG, tokens included, so theirs never
    go below INFO; and some say every request or every minute at INFO. TensorFlow and
    BentoML read the environment when they are imported, so this must come first.
    Python's warnings become lines of the log. Pillow's are dropped: a picture may bring
    thousands, and Python remembers the text of each.

    Args:
        level: One of Python's.
        form: ``text``, for people, or ``json``, an object on each line.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    handler = _Stderr()
    handler.setFormatter(JsonLines() if form == "json" else Lines(FORMAT))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name, least in LIBRARIES.items():
        logging.getLogger(name).setLevel(max(least, logging.getLevelName(level)))
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if form == "json":
        sys.excepthook = lambda *error: logging.getLogger(__name__).critical("The process ends", exc_info=error)
        threading.excepthook = _thread_ended
    if _Talkative.finder not in sys.meta_path:
        sys.meta_path.insert(0, _Talkative.finder)


def _thread_ended(said: threading.ExceptHookArgs) -> None:
    if said.exc_value is not None and said.exc_type is not SystemExit:
        error = said.exc_type, said.exc_value, said.exc_traceback
        logging.getLogger(__name__).error("The thread %s ends", said.thread and said.thread.name, exc_info=error)


def refuse(error: Exception) -> None:
    """Say why the process does not start: a sentence for people, or a line of the log where that is JSON."""
    if any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers):
        logging.getLogger(__name__).critical("%s", error)
    else:
        sys.stderr.write(f"{error}\n")


class Lines(logging.Formatter):
    """
    A record as one line of printable text, with the lines of its traceback indented below.

    Messages and errors may repeat what a stranger sent. It makes no line that looks like another
    record, and no character of it commands the terminal that shows the log.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The first line."""
        return _printable(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        """All lines."""
        first, *traceback = super().format(record).split("\n")
        return "\n    ".join([first, *_some(traceback)])


class JsonLines(logging.Formatter):
    """A record as an object of JSON, all on one line of ASCII, with its traceback in it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "message": _printable(record.getMessage()),
        }
        told |= getattr(record, FACTS, {})
        if record.exc_info:
            told["traceback"] = "\n".join(_some(self.formatException(record.exc_info).split("\n")))
        return json.dumps(told)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at that moment."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _Talkative(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """
    Imports TensorFlow without what its C++ code writes to stderr meanwhile: about graphics cards and rounding.

    TF_CPP_MIN_LOG_LEVEL counts only once it is loaded.
    """

    finder: _Talkative

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        found = PathFinder.find_spec(fullname, path, target) if fullname == "tensorflow" else None
        if found is not None and found.loader is not None:
            self._of_file, found.loader = found.loader, self
        return found

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._of_file.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._of_file
        with hushed():
            self._of_file.exec_module(module)


_Talkative.finder = _Talkative()


@contextmanager
def hushed() -> Iterator[None]:
    """Above DEBUG, what libraries write to the file of stderr is dropped; what Python writes, in any thread, is not."""
    if logging.getLogger().isEnabledFor(logging.DEBUG) or sys.stderr is None:  # which was closed: 2 is another file
        yield
        return
    with _HUSHED:
        yield from _without_stderr()


def _without_stderr() -> Iterator[None]:
    before, own = sys.stderr, os.dup(2)
    before.flush()
    if before is sys.__stderr__:
        sys.stderr = os.fdopen(os.dup(own), "w", buffering=1, errors="backslashreplace")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
        os.close(null)
        sys.stderr = before


def _some(traceback: Sequence[str]) -> list[str]:
    """The lines of a traceback, printable and not too many."""
    shown = [_printable(line) for line in traceback[:LINES_MAX]]
    left_out = len(traceback) - LINES_MAX
    return [*shown, f"… and {left_out} lines more"] if left_out > 0 else shown


def _printable(text: str) -> str:
    r"""The text with \x1b, \n or \u202e for what is no printable sign, and not too long."""
    shown = text[:SIGNS_MAX]
    if not shown.isprintable():
        shown = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in shown)
    return shown if len(text) <= SIGNS_MAX else f"{shown} … and {len(text) - SIGNS_MAX} characters more"
