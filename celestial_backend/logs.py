"""What the process writes to its log, set once by each entry point."""

from __future__ import annotations

import logging
import os
import warnings

LIBRARIES = dict.fromkeys(("httpcore", "urllib3", "PIL", "h5py", "bentoml"), logging.INFO)
LIBRARIES |= {"httpx": logging.WARNING, "huey": logging.WARNING, "tensorflow": logging.ERROR}
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
SIGNS_MAX = 4_000  # of a line; more are counted and left out
LINES_MAX = 400  # of a traceback; a deep one has a hundred


def configure(level: str) -> None:
    """
    Log lines of this level and above to stderr, and quieten the libraries.

    Libraries log headers and addresses at DEBUG, tokens included, so theirs never
    go below INFO; and some say every request or every minute at INFO. TensorFlow and
    BentoML read the environment when they are imported, so this must come first.
    Python's warnings become lines of the log. Pillow's are dropped: a picture may bring
    thousands, and Python remembers the text of each.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    handler = logging.StreamHandler()
    handler.setFormatter(Lines(FORMAT))
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name, least in LIBRARIES.items():
        logging.getLogger(name).setLevel(max(least, logging.getLevelName(level)))
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", module=r"PIL\.")


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
        if left_out := len(traceback[LINES_MAX:]):
            traceback[LINES_MAX:] = [f"… and {left_out} lines more"]
        return "\n    ".join([first, *map(_printable, traceback)])


def _printable(text: str) -> str:
    r"""The text with \x1b, \n or \u202e for what is no printable sign, and not too long."""
    shown = text[:SIGNS_MAX]
    if not shown.isprintable():
        shown = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in shown)
    return shown if len(text) <= SIGNS_MAX else f"{shown} … and {len(text) - SIGNS_MAX} characters more"
