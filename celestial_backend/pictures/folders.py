"""Folders with pictures: reading inside them and never outside, and finding an upload's original."""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import threading
import time
import unicodedata
from pathlib import Path, PurePath

from celestial_backend.errors import ForbiddenError, file_too_large
from celestial_backend.studio.client import rewritten

logger = logging.getLogger(__name__)

UPLOAD_PATH_MAX = 100  # letters; Label Studio cuts longer upload paths and appends _ and seven random letters
INDEX_AGE_S = 10.0
HASH = re.compile(r"[0-9a-f]{8}-(?=.)")
DIGEST = re.compile(r"[0-9a-f]{16}-(?=.)")  # what the command `connect` puts before a name
CUT = re.compile(r"_[A-Za-z0-9]{7}$")


def split_inside(path: str) -> tuple[str, ...]:
    """
    The parts of a relative path that a stranger wrote.

    Raises:
        ForbiddenError: The path is absolute, climbs with `..`, is empty or holds a NUL.
    """
    parts = tuple(part for part in path.split("/") if part not in ("", "."))
    if not parts or path[0] in "/\\" or "\0" in path or ".." in re.split(r"[/\\]", path):
        raise ForbiddenError(
            "a path must stay inside its folder: relative, without '..' and NUL signs. Correct the task."
        )
    return parts


def read_inside(folder: Path, parts: tuple[str, ...], variable: str, max_mb: float) -> bytes | None:
    """
    The bytes of a file below a folder; None when there is no file that can be read.

    Raises:
        ForbiddenError: It is, or lies behind, a link that leaves the folder.
        TooLargeError: It has more than `max_mb` megabytes.
    """
    path = folder.joinpath(*parts)
    try:
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                return None
            if not _lies_in(folder, path, file.fileno()):
                raise ForbiddenError(
                    f"a path must stay inside its folder, and a link leads this one out of {variable}."
                    " Put the picture itself there."
                )
            if found.st_size > max_mb * 1_000_000:
                raise file_too_large(max_mb, found.st_size / 1e6)
            return file.readall()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        logger.warning("A picture in %s cannot be read: %s", variable, error.strerror)
        return None


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for its writer for ever


def _lies_in(folder: Path, path: Path, opened: int) -> bool:
    """Whether the file that was opened under a path lies in the folder, wherever links lead."""
    root = os.path.realpath(folder)
    try:
        real = os.readlink(f"/proc/self/fd/{opened}")  # noqa: PTH115 - Linux says in one step what it has opened
    except OSError:
        real = os.path.realpath(path)
    return real.startswith(root.rstrip(os.sep) + os.sep)


class Originals:
    """
    The operator's folder of original pictures, searched by the names that uploads get.

    One per process, safe to share between threads. The folder is listed again when
    the list is older than ten seconds, or fifty times what listing it took.
    """

    def __init__(self, folder: Path, variable: str, max_mb: float) -> None:
        self._folder = folder
        self._variable = variable
        self._max_mb = max_mb
        self._lock = threading.Lock()
        self._index: dict[str, set[tuple[str, ...]]] = {}
        self._listed_until = 0.0

    def read(self, upload: tuple[str, ...]) -> bytes | None:
        """
        The original of an upload, or None: there is none, or there are two that differ.

        Args:
            upload: The parts of the upload's path below `upload/`.
        """
        found: bytes | None = None
        for path in sorted(self._candidates(upload)):
            data = read_inside(self._folder, path, self._variable, self._max_mb)
            if found is not None and data is not None and data != found:
                logger.info("%s has several originals named %r; none of them is used", self._variable, upload[-1])
                return None
            found = data if found is None else found
        return found

    def _candidates(self, upload: tuple[str, ...]) -> set[tuple[str, ...]]:
        index = self._fresh_index()
        name = HASH.sub("", upload[-1], count=1)
        paths = {*index.get(name, ()), *index.get(DIGEST.sub("", name, count=1), ())}
        stem, ending = _stem(name)
        if len("/".join(("upload", *upload))) == UPLOAD_PATH_MAX and CUT.search(stem):
            start = CUT.sub("", stem)
            for key, more in index.items():
                key_stem, key_ending = _stem(key)
                if key_ending == ending and len(key_stem) > len(start) and key_stem.startswith(start):
                    paths |= more
        return paths

    def _fresh_index(self) -> dict[str, set[tuple[str, ...]]]:
        if time.monotonic() < self._listed_until:
            return self._index
        if self._lock.acquire(blocking=not self._index):  # the first list is waited for, a newer one is not
            try:
                if time.monotonic() >= self._listed_until:
                    start = time.monotonic()
                    self._index = self._list()
                    end = time.monotonic()
                    self._listed_until = end + max(INDEX_AGE_S, 50 * (end - start))
            finally:
                self._lock.release()
        return self._index

    def _list(self) -> dict[str, set[tuple[str, ...]]]:
        index: dict[str, set[tuple[str, ...]]] = {}
        for place, _, names in os.walk(self._folder):
            parts = Path(place).relative_to(self._folder).parts
            for name in names:
                # Browsers on a Mac may send the decomposed form of a name that is stored composed, or the other way.
                for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
                    index.setdefault(rewritten(form), set()).add((*parts, name))
        return index


def _stem(name: str) -> tuple[str, str]:
    """A name without and with only its endings; Django counts every dot as the start of an ending."""
    ending = "".join(PurePath(f"x{name}").suffixes)
    return name.removesuffix(ending), ending
