"""The log: one line of printable text for each record, whoever wrote it and whatever strangers sent."""

from __future__ import annotations

import logging
import re
import warnings

import pytest

from celestial_backend import logs
from tests.support import logging_kept

left_as_it_was = logging_kept.left_as_it_was
RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ \S+: .*")
SIGNS = "a\nb\r\n\x1b[31m\x07\0\x85\u2028\u202e\ud800\U000e0001é–"
SHOWN = r"a\nb\r\n\x1b[31m\x07\x00\x85\u2028\u202e\ud800\U000e0001é–"
FORGED = "2026-01-01 00:00:00,000 ERROR celestial_backend.web.app: forged"


def fail(text: str) -> None:
    raise ValueError(text)


def written(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("name", ["celestial_backend.web.app", "httpx", "huey", "somebody.else"])
def test_a_record_is_one_printable_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What a host or a person sent stands in the log as text, whichever logger it goes through."""
    logs.configure("INFO")
    logging.getLogger(name).warning("it said %s", f"{SIGNS}\n{FORGED}")
    (line,) = written(capsys)
    assert line.endswith(rf"WARNING {name}: it said {SHOWN}\n{FORGED}")
    assert line.isprintable()


def test_the_name_of_a_logger_is_text_too(capsys: pytest.CaptureFixture[str]) -> None:
    """All of the line is filtered, not the message alone."""
    logs.configure("INFO")
    logging.getLogger("odd\nname").warning("hello")
    assert written(capsys)[0].endswith(r"WARNING odd\nname: hello")


def test_ordinary_lines_are_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    """Accents, other alphabets and signs are printable."""
    logs.configure("INFO")
    logging.getLogger("celestial_backend").info("Größe 3 × 4, 日本語, 🙂, back\\slash")
    (line,) = written(capsys)
    assert RECORD.fullmatch(line)
    assert line.endswith("INFO celestial_backend: Größe 3 × 4, 日本語, 🙂, back\\slash")


def test_a_traceback_is_readable_and_makes_no_record(capsys: pytest.CaptureFixture[str]) -> None:
    """Each of its lines is indented and printable, also those of an error whose text has lines."""
    logs.configure("INFO")
    try:
        fail(f"a host said {SIGNS}\n{FORGED}")
    except ValueError:
        logging.getLogger("celestial_backend").exception("It failed", stack_info=True)
    first, *more = written(capsys)
    assert RECORD.fullmatch(first)
    assert all(line.startswith("    ") and line.isprintable() for line in more)
    assert more[0] == "    Traceback (most recent call last):"
    assert "    ValueError: a host said a" in more
    assert f"    {FORGED}" in more
    assert "    Stack (most recent call last):" in more


def test_long_messages_and_tracebacks_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """A megabyte of message is some thousand characters and a count; a traceback has so many lines."""
    logs.configure("INFO")
    logging.getLogger("celestial_backend").warning("x" * 1_000_000)
    (line,) = written(capsys)
    assert re.search(r"x … and 9960\d\d characters more$", line)
    assert len(line) < logs.SIGNS_MAX + 50
    try:
        fail("y" * 10_000 + "\n" * 10_000)
    except ValueError:
        logging.getLogger("celestial_backend").exception("It failed")
    lines = written(capsys)
    assert len(lines) == 1 + logs.LINES_MAX + 1
    assert re.fullmatch(r"    … and 9\d\d\d lines more", lines[-1])
    assert max(map(len, lines)) < logs.SIGNS_MAX + 50


def test_warnings_are_lines_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Python's own way to write them to stderr takes several lines, and repeats text as it is."""
    logs.configure("INFO")
    warnings.simplefilter("always")
    warnings.warn(f"a library read {SIGNS}", stacklevel=1)
    (line,) = written(capsys)
    assert "WARNING py.warnings: " in line
    assert SHOWN in line


def test_pillows_warnings_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    """They repeat numbers from a picture without naming it, and each text stays in memory."""
    logs.configure("INFO")
    registry: dict[object, object] = {}
    warnings.warn_explicit("Tag 7", UserWarning, "x.py", 1, module="PIL.TiffImagePlugin", registry=registry)
    assert written(capsys) == []
    assert not any(isinstance(key, tuple) for key in registry)
