"""
Vectors that were computed before, by the picture's content: one SQLite file on this machine's disk.

Web processes, worker and commands share it. It is only ever a short cut: what cannot be read counts as unknown,
what cannot be written is not remembered, and nobody waits for it.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import sqlite3
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from celestial_backend.settings import Settings

logger = logging.getLogger(__name__)

FILE = "features.db"
UNUSABLE = ".unusable"  # the ending that a file gets which is no such database
READ_S = 0.05  # for a file that another process writes into
WRITE_S = 2.0
WAITING_MAX = 5000  # vectors that wait to be written: some 25 MB; more are not remembered
TOGETHER = 512  # are written in one transaction
ASKED_MAX = 500  # digests of one question to SQLite
AGAIN_S = 60.0  # a file that cannot be used is tried again after this long
SCHEMA = """
CREATE TABLE IF NOT EXISTS vectors (
    embedder TEXT NOT NULL, digest BLOB NOT NULL, vector BLOB NOT NULL, PRIMARY KEY (embedder, digest)
)
"""
OLDEST = "DELETE FROM vectors WHERE rowid IN (SELECT rowid FROM vectors ORDER BY rowid LIMIT ?)"

Vector = NDArray[np.float32]


def digest(data: bytes) -> bytes:
    """What a picture's file is known by: 16 bytes that depend on its content alone."""
    return hashlib.sha256(data).digest()[:16]


class _Opened:
    """A connection to the file, which is closed when nobody uses it any more."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.database = database
        weakref.finalize(self, database.close)


class FeatureCache:
    """
    The remembered vectors; one per process, safe between threads, opened at the first use.

    Vectors are kept as 16-bit numbers. When the file is as large as CELESTIAL_CACHE_MAX_MB, those that were
    remembered first are forgotten.
    """

    def __init__(
        self, settings: Settings, *, write_s: float = WRITE_S, again_s: float = AGAIN_S, waiting_max: int = WAITING_MAX
    ) -> None:
        self._path = settings.cache_folder / FILE
        self._max_bytes = int(settings.cache_max_mb * 1e6)
        self._local = threading.local()
        self._waiting: queue.Queue[tuple[str, bytes, Vector]] = queue.Queue(waiting_max)
        self._write_s, self._again_s = write_s, again_s
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None
        self._unusable_until = 0.0

    def get(self, embedder: str, digests: Sequence[bytes]) -> dict[bytes, Vector]:
        """The vectors that are known, by digest; none where the file cannot be read. Never raises."""
        found: dict[bytes, Vector] = {}
        if time.monotonic() < self._unusable_until:
            return found
        try:
            opened = self._reader()
            if opened is None:
                return found
            for start in range(0, len(digests), ASKED_MAX):
                some = digests[start : start + ASKED_MAX]
                marks = ",".join("?" * len(some))
                asked = f"SELECT digest, vector FROM vectors WHERE embedder = ? AND digest IN ({marks})"  # noqa: S608 - question marks alone
                for key, vector in opened.database.execute(asked, (embedder, *some)):
                    if isinstance(vector, bytes) and len(vector) % 2 == 0:
                        numbers = np.frombuffer(vector, np.float16).astype(np.float32)
                        if np.isfinite(numbers).all():
                            found[key] = numbers
        except (sqlite3.Error, OSError) as error:
            if not _busy(error):  # a file that another one writes into just now is asked again next time
                self._renew(error)
        return found

    def put(self, embedder: str, vectors: Mapping[bytes, Vector]) -> None:
        """Remember vectors, in the background; those that there is no room for are dropped. Never raises or waits."""
        if time.monotonic() < self._unusable_until:
            return
        with suppress(queue.Full):
            for key, vector in vectors.items():
                self._waiting.put_nowait((embedder, key, vector))
        with self._lock:
            if self._writer is None or not self._writer.is_alive():
                self._writer = threading.Thread(target=self._write_all, name="features", daemon=True)
                self._writer.start()

    def close(self) -> None:
        """Wait until what was put is written, for a command that ends; at most a few seconds."""
        with self._lock:
            writer = self._writer
        if writer is not None:
            writer.join(self._write_s)

    def _reader(self) -> _Opened | None:
        """The connection of the thread; None as long as nothing was ever written."""
        if not hasattr(self._local, "opened"):
            if not self._path.is_file():
                return None
            self._local.opened = _Opened(self._opened(READ_S))
        opened: _Opened = self._local.opened
        return opened

    def _opened(self, wait_s: float) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=wait_s, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = OFF")  # what a crash takes is computed again
            database.execute(SCHEMA)
        except sqlite3.Error:
            database.close()
            raise
        return database

    def _write_all(self) -> None:
        """Write until nothing waits."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with_file = self._opened(self._write_s)
        except (sqlite3.Error, OSError) as error:
            self._renew(error)
            return
        try:
            while True:
                rows = [self._waiting.get(timeout=0.2)]
                with suppress(queue.Empty):
                    while len(rows) < TOGETHER:
                        rows.append(self._waiting.get_nowait())
                self._write(with_file, rows)
        except queue.Empty:
            return
        except (sqlite3.Error, OSError, OverflowError) as error:
            self._renew(error)
        finally:
            with_file.close()

    def _write(self, database: sqlite3.Connection, rows: Sequence[tuple[str, bytes, Vector]]) -> None:
        values = [
            (name, key, rounded(vector).astype(np.float16).tobytes())
            for name, key, vector in rows
            if np.isfinite(vector).all()
        ]
        database.execute("BEGIN IMMEDIATE")
        database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", values)
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        (free,) = database.execute("PRAGMA freelist_count").fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
        if (pages - free) * size > self._max_bytes:
            database.execute(OLDEST, (2 * len(values) + 1,))
        database.execute("COMMIT")

    def _renew(self, error: Exception) -> None:
        """A file that is no database, or a damaged one, gives way to a new one; a full disk is left alone."""
        self._give_up(error)
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            for ending in ("", "-wal", "-shm"):
                with suppress(OSError):
                    Path(f"{self._path}{ending}").replace(f"{self._path}{ending}{UNUSABLE}")
            self._unusable_until = 0.0

    def _give_up(self, error: Exception) -> None:
        """Do without for a while; each thread opens the file again afterwards."""
        logger.warning("Remembered features cannot be used (%s); pictures are computed anew.", type(error).__name__)
        self._unusable_until = time.monotonic() + self._again_s
        self._local = threading.local()


def _busy(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def rounded(vectors: NDArray[np.floating]) -> Vector:
    """Vectors as the cache keeps them, in 16 bits: so a picture's answer is the same, remembered or not."""
    return np.clip(vectors, -65504, 65504).astype(np.float16).astype(np.float32)
