"""For tests that set up the log: it is afterwards as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from celestial_backend import logs


@pytest.fixture(autouse=True)
def left_as_it_was() -> Iterator[None]:
    """The root logger, and the levels of libraries, belong to all tests."""
    root, names = logging.getLogger(), list(logs.LIBRARIES)
    handlers, level, levels = root.handlers[:], root.level, [logging.getLogger(name).level for name in names]
    logging.captureWarnings(False)  # which a test before may have begun
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in zip(names, levels, strict=True):
        logging.getLogger(name).setLevel(before)
