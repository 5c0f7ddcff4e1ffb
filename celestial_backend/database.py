"""
The database: one SQLite file in the state folder, or a PostgreSQL that several machines share.

What is accepted is written here, in one transaction or not at all. The statements are the same for both; what differs
stands in this file. Who writes names a key, mostly a project, and is alone with it: on SQLite one writes at a time
anyway, on PostgreSQL a lock of the transaction sees to it.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, RowMapping, TextClause, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as NoneLeftError
from sqlalchemy.pool import NullPool

from celestial_backend.errors import DATABASE_REMEDY, STATE_REMEDY, StateError
from celestial_backend.settings import Settings

WRITE_S = 0.7  # for another writer: Label Studio gives /webhook one second
ANSWER_S = 1.0  # for a PostgreSQL that runs and says nothing
SILENT = "no answer in time"
TABLES_S = 30.0  # for another process that makes the tables, or takes over what an older release has left
CONNECT_S = 2  # the least that psycopg can be told
LOOK_S = 0.001, 0.003  # between two looks whether another process has ended its writing; SQLite itself sleeps longer
CONNECTIONS = 8  # that one process keeps, of each kind; more while they are needed
ALIVE: dict[str, Any] = {
    "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 15_000,
}  # fmt: skip
SCHEMA = "celestial"  # of PostgreSQL, so that one database may serve Label Studio too
VERSION = 2  # of the tables
OLDEST = 1  # the oldest release, by the version of its tables, that can work with these
TABLES = (
    """CREATE TABLE IF NOT EXISTS work (
        seq {serial}, id TEXT NOT NULL UNIQUE, project TEXT NOT NULL, state TEXT NOT NULL,
        token TEXT NOT NULL DEFAULT '', worker TEXT NOT NULL DEFAULT '', lease DOUBLE PRECISION NOT NULL DEFAULT 0,
        requests INTEGER NOT NULL, attempts INTEGER NOT NULL, requested_at DOUBLE PRECISION NOT NULL,
        started_at DOUBLE PRECISION, ended_at DOUBLE PRECISION,
        reason TEXT NOT NULL, progress TEXT NOT NULL, outcome TEXT NOT NULL, told INTEGER NOT NULL DEFAULT 1)""",
    "CREATE UNIQUE INDEX IF NOT EXISTS one_waits ON work (project) WHERE state = 'waiting'",
    "CREATE UNIQUE INDEX IF NOT EXISTS one_runs ON work (project) WHERE state = 'running'",
    "CREATE INDEX IF NOT EXISTS of_project ON work (project, seq)",
    """CREATE TABLE IF NOT EXISTS projects (
        seq {serial}, project TEXT NOT NULL UNIQUE, labels INTEGER NOT NULL DEFAULT 0, read_until TEXT,
        trained_labels INTEGER, trained_at TEXT, pressed INTEGER NOT NULL DEFAULT 0, look INTEGER NOT NULL DEFAULT 1,
        looked_at DOUBLE PRECISION NOT NULL DEFAULT 0, missing TEXT, brought TEXT NOT NULL DEFAULT '',
        looking DOUBLE PRECISION NOT NULL DEFAULT 0, event_at DOUBLE PRECISION,
        made TEXT NOT NULL DEFAULT '', doubted INTEGER NOT NULL DEFAULT 0)""",
    """CREATE TABLE IF NOT EXISTS live (
        project TEXT PRIMARY KEY, tag TEXT NOT NULL, job TEXT NOT NULL, made TEXT NOT NULL DEFAULT '')""",
    """CREATE TABLE IF NOT EXISTS models (
        tag TEXT PRIMARY KEY, project TEXT NOT NULL, made TEXT NOT NULL, size INTEGER NOT NULL, digest TEXT NOT NULL,
        metadata TEXT NOT NULL)""",
    "CREATE TABLE IF NOT EXISTS bodies (tag TEXT, part INTEGER, body {blob} NOT NULL, PRIMARY KEY (tag, part))",
    "CREATE TABLE IF NOT EXISTS workers (name TEXT PRIMARY KEY, lease DOUBLE PRECISION NOT NULL)",
    """CREATE TABLE IF NOT EXISTS pages (
        seq {serial}, id TEXT NOT NULL UNIQUE, run TEXT NOT NULL, state TEXT NOT NULL,
        token TEXT NOT NULL DEFAULT '', worker TEXT NOT NULL DEFAULT '', lease DOUBLE PRECISION NOT NULL,
        turn INTEGER NOT NULL DEFAULT 0, body TEXT NOT NULL, answer TEXT NOT NULL DEFAULT '')""",
    "CREATE TABLE IF NOT EXISTS pruned (state TEXT PRIMARY KEY, jobs INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS secrets (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """CREATE TABLE IF NOT EXISTS unshown (
        project TEXT NOT NULL, task BIGINT NOT NULL, version TEXT NOT NULL, made TEXT NOT NULL DEFAULT '',
        arm TEXT NOT NULL, said TEXT NOT NULL, shown TEXT NOT NULL DEFAULT '[]', score DOUBLE PRECISION NOT NULL,
        at DOUBLE PRECISION NOT NULL, removed_at DOUBLE PRECISION, PRIMARY KEY (project, task, version, made))""",
    "CREATE INDEX IF NOT EXISTS of_arm ON unshown (project, arm)",
    "CREATE INDEX IF NOT EXISTS standing ON unshown (project) WHERE arm = 'planted' AND removed_at IS NULL",
    """CREATE TABLE IF NOT EXISTS places (
        project TEXT NOT NULL, task BIGINT NOT NULL, made TEXT NOT NULL DEFAULT '', place DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (project, task))""",
    """CREATE TABLE IF NOT EXISTS audits (
        seq {serial}, project TEXT NOT NULL, made TEXT NOT NULL DEFAULT '', version TEXT NOT NULL, state TEXT NOT NULL,
        at DOUBLE PRECISION NOT NULL, about TEXT NOT NULL)""",
)
OF_SQLITE = "INTEGER PRIMARY KEY AUTOINCREMENT", "BLOB"  # a serial number, and bytes
OF_POSTGRESQL = "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY", "BYTEA"
IN_USE, WRONG_USER = "it is in use", "it does not accept the user or the password"
NO_SUCH, ALL_TAKEN = "it has no database of that name", "all its connections are taken"
STOPPED = "it is starting or stopping"
OF_SQLITE_ERRORS = {
    "SQLITE_BUSY": IN_USE, "SQLITE_LOCKED": IN_USE, "SQLITE_CANTOPEN": "its file cannot be opened",
    "SQLITE_NOTADB": "its file is no database", "SQLITE_CORRUPT": "its file is damaged",
    "SQLITE_READONLY": "its file can only be read", "SQLITE_FULL": "its disk is full",
    "SQLITE_IOERR": "its disk cannot be read or written",
}  # fmt: skip
OF_CODES = {
    "28P01": WRONG_USER, "28000": WRONG_USER, "3D000": NO_SUCH, "53300": ALL_TAKEN, "53100": "its disk is full",
    "42501": "its user lacks a right", "25006": "it can only be read", "55P03": IN_USE,
    "57P01": STOPPED, "57P02": STOPPED, "57P03": STOPPED,
}  # fmt: skip
OF_REFUSALS = {  # by what PostgreSQL and its library say
    "too many ": ALL_TAKEN, "connection slots": ALL_TAKEN,
    "password authentication failed": WRONG_USER, "no password supplied": WRONG_USER, "role \"": WRONG_USER,
    "pg_hba.conf": "it lets this user in from no such machine", "does not exist": NO_SUCH,
    "resolve host": "no machine has its name",
    "translate host": "no machine has its name", "starting up": STOPPED, "shutting down": STOPPED,
    "recovery mode": STOPPED, "SSL": "it and this machine do not agree on SSL", "FATAL": "it refuses the connection",
}  # fmt: skip
ABOUT = "SELECT name, value FROM about"
NOW = "SELECT extract(epoch FROM clock_timestamp()) AS now"
UNDEFINED_TABLE = "42P01"  # a code of PostgreSQL's
Row = RowMapping  # what a statement gives, by the names of the columns


class Transaction:
    """What is written together; ends with the `with` that gave it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def rows(self, statement: str, **values: Any) -> Sequence[Row]:
        """What a statement gives, row by row."""
        return self._connection.execute(_text(statement), _storable(values)).mappings().all()

    def row(self, statement: str, **values: Any) -> Row | None:
        """The first of its rows; None without any."""
        return self._connection.execute(_text(statement), _storable(values)).mappings().first()

    def run(self, statement: str, **values: Any) -> int:
        """How many rows a statement changed."""
        return self._connection.execute(_text(statement), _storable(values)).rowcount

    def run_all(self, statement: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run a statement for each of some rows of values, at least one, in few trips to the database."""
        self._connection.execute(_text(statement), [_storable(row) for row in rows])

    def now(self) -> float:
        """
        Seconds on the clock by which leases are told, which is the same for all who share the database.

        On SQLite they are those since this machine was started, which nobody moves forward or back.
        """
        if self._connection.dialect.name == "sqlite":
            return _since_start()
        return float(self._connection.execute(_text(NOW)).scalar_one())


class Database:
    """
    The database of a process; safe between threads, and across a fork. Nothing is opened before it is asked for.

    All that reads or writes raises `StateError` where that cannot be done, and then nothing was written.

    Attributes:
        old: What older releases have left, and what takes it over in the transaction that sees to the tables, and
            says whether it did; the path is renamed then. It may be called again after it has succeeded.
    """

    def __init__(self, settings: Settings, *, look_only: bool = False) -> None:
        """
        Args:
            settings: Of the process.
            look_only: Nothing is made or changed; where there are no tables, there are no rows.
        """
        self.old: dict[Path, Callable[[Transaction], bool]] = {}
        own = URL.create("sqlite", database=str(settings.state.database))  # whatever signs are in the path
        self._url = make_url(settings.database_url) if settings.database_url else own
        self._file = None if self._url.get_backend_name() == "postgresql" else Path(self._url.database or "")
        self._look_only = look_only
        self._opening = threading.Lock()
        self._turn = threading.Lock()  # one thread at a time: those that SQLite lets wait are passed by newcomers
        self._opened: _Opened | None = None
        self._failure: Exception | None = None  # of the last opening, if that failed

    @property
    def name(self) -> str:
        """What it is, for people, without its address."""
        return "PostgreSQL" if self._file is None else "The file in the state folder"

    def rows(self, statement: str, *, answer_s: float = ANSWER_S, **values: Any) -> Sequence[Row]:
        """
        What a statement reads, row by row; once more where the connection turns out to have been lost.

        Args:
            statement: A SELECT.
            answer_s: For a PostgreSQL to answer.
            values: What stands in it as ``:name``.
        """
        with self._told("read"):
            try:
                engine = self._ready().reading
            except (DBAPIError, OSError) as error:
                if self._is_empty() and not isinstance(error, FileExistsError):  # so nothing was accepted
                    return []
                raise
            try:
                return _read(engine, statement, values, answer_s)
            except DBAPIError as error:
                if self._look_only and _lacks_table(error):
                    return []
                if not error.connection_invalidated or _is_silent(error):
                    raise
            return _read(engine, statement, values, answer_s)

    def row(self, statement: str, **values: Any) -> Row | None:
        """The first of its rows; None without any."""
        return next(iter(self.rows(statement, **values)), None)

    def close(self) -> None:
        """Let all connections go; what is asked for next opens new ones."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def now(self) -> float:
        """As `Transaction.now`."""
        return _since_start() if self._file is not None else float(self.rows(NOW)[0]["now"])

    @contextmanager
    def writing(self, key: str, wait_s: float = WRITE_S) -> Iterator[Transaction]:
        """
        A transaction that is alone with a key; what is raised inside undoes it.

        Args:
            key: What is changed: a project's number, or a word.
            wait_s: For others that write.
        """
        deadline = time.monotonic() + wait_s
        with self._told("written"):
            opened = self._ready()
            with self._alone(wait_s), self._unhindered(opened), _begun(opened.writing, deadline) as transaction:
                if self._file is None:
                    alone = "SELECT set_config('lock_timeout', :wait, true), pg_advisory_xact_lock(hashtext(:key))"
                    transaction.rows(alone, wait=f"{max(1, round(1000 * wait_s))}ms", key=f"celestial {key}")
                yield transaction

    @contextmanager
    def _unhindered(self, opened: _Opened) -> Iterator[None]:
        """Where a PostgreSQL allows no more connections, those that only wait to read leave room for the next time."""
        try:
            yield
        except DBAPIError as error:
            if self._file is None and not _code(error):
                opened.reading.dispose()
            raise

    @contextmanager
    def _alone(self, wait_s: float) -> Iterator[None]:
        """The turn of one thread to write into SQLite."""
        if self._file is None:
            yield
            return
        if not self._turn.acquire(timeout=wait_s):
            raise NoTurnError
        try:
            yield
        finally:
            self._turn.release()

    def _ready(self) -> _Opened:
        """The connections of this process, with the tables made; a fork has none of its parent's."""
        if (ready := self._still_opened()) is not None:
            return ready
        before = self._failure
        with self._opening:
            if (ready := self._still_opened()) is not None:
                return ready
            if self._failure is not None and self._failure is not before:
                raise self._failure  # who has waited meanwhile does not try in vain too, for seconds each
            try:
                opened = self._open()
            except (DBAPIError, OSError) as error:
                self._failure = error
                raise
            if self._look_only or not self._is_fixed():  # else for this once: it may be possible to write there soon
                self._opened = opened
            return opened

    def _open(self) -> _Opened:
        opened = self._connected()
        try:
            if not self._look_only and self._wants_tables(opened.reading):
                self._see_to_tables(opened.writing)
            return replace(opened, file=self._identity())
        except BaseException:
            opened.close()
            raise

    def _still_opened(self) -> _Opened | None:
        """The connections that there are; none to a file in whose place is another one, or none."""
        opened = self._opened
        if opened is None or opened.process != os.getpid():
            return None
        if opened.file == self._identity():
            return opened
        self.close()
        return None

    def _identity(self) -> tuple[int, int] | None:
        """What is another one when the file was removed, or a copy was put back."""
        with suppress(FileNotFoundError):
            found = self._file.stat() if self._file is not None else None
            return found and (found.st_dev, found.st_ino)
        return None

    def _is_empty(self) -> bool:
        """Whether it is a file that is not there, or has nothing in it."""
        return self._file is not None and not (self._file.exists() and self._file.stat().st_size)

    def _is_fixed(self) -> bool:
        """Whether it is a file where nothing can be written."""
        folder = self._file.parent if self._file is not None else None
        return folder is not None and folder.is_dir() and not os.access(folder, os.W_OK)

    def _connected(self) -> _Opened:
        if self._file is None:
            address = address_of(self._url)
            options = f"-c search_path={SCHEMA} -c default_transaction_read_only={'on' if self._look_only else 'off'}"
            shared = {"pool_size": CONNECTIONS, "max_overflow": 4 * CONNECTIONS, "pool_timeout": WRITE_S,
                      "creator": partial(_patient(), address, options=options)}  # fmt: skip
            reading = create_engine(self._url, isolation_level="AUTOCOMMIT", pool_reset_on_return=None, **shared)
            return _Opened(os.getpid(), reading, create_engine(self._url, pool_pre_ping=True, **shared))
        url = self._url
        pool: dict[str, Any] = {"pool_size": CONNECTIONS, "max_overflow": -1}
        if looks := self._look_only or self._is_fixed():
            if self._is_empty():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            url = URL.create("sqlite", database=f"file:{quote(str(self._file))}", query={"mode": "ro", "uri": "true"})
            pool = {"poolclass": NullPool}  # one that stays open would keep others of this process from writing
        else:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        reading = create_engine(url, isolation_level="AUTOCOMMIT", pool_reset_on_return=None,
                                connect_args={"timeout": WRITE_S}, **pool)  # fmt: skip
        if looks:
            event.listen(reading, "do_connect", partial(_leave_alone, self._file))
        writing = create_engine(url, connect_args={"timeout": 0}, **pool)
        event.listen(writing, "connect", _prepare)
        event.listen(writing, "begin", _begin)
        return _Opened(os.getpid(), reading, writing)

    def _wants_tables(self, engine: Engine) -> bool:
        """Whether tables are to be made, or anything is to be taken over; who only reads waits for nobody else."""
        try:
            about = {row["name"]: row["value"] for row in _read(engine, ABOUT, {}, ANSWER_S)}
        except DBAPIError as error:
            if not _lacks_table(error):
                raise
            return True
        _check(about)
        return about.get("version", 0) < VERSION or any(path.exists() for path in self.old)

    def _see_to_tables(self, engine: Engine) -> None:
        serial, blob = OF_POSTGRESQL if self._file is None else OF_SQLITE
        with _begun(engine, time.monotonic() + TABLES_S) as transaction:
            if self._file is None:
                transaction.rows("SELECT pg_advisory_xact_lock(hashtext('celestial tables'))")
                if transaction.row(f"SELECT 1 WHERE to_regnamespace('{SCHEMA}') IS NULL"):  # else no right is needed
                    transaction.run(f"CREATE SCHEMA {SCHEMA}")
            transaction.run("CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value INTEGER NOT NULL)")
            about = {row["name"]: row["value"] for row in transaction.rows(ABOUT)}
            _check(about)
            if about.get("version", 0) < VERSION:
                for table in TABLES:
                    transaction.run(table.format(serial=serial, blob=blob))
                for name, value in {"version": VERSION, "oldest": OLDEST}.items():
                    transaction.run("INSERT INTO about (name, value) VALUES (:name, :value) ON CONFLICT (name)"
                                    " DO UPDATE SET value = excluded.value", name=name, value=value)  # fmt: skip
            there = [path for path in self.old if path.exists()]  # no other process has been quicker
            done = [path for path in there if self.old[path](transaction)]
        for path in done:
            with suppress(OSError):
                path.rename(_free(path))

    @contextmanager
    def _told(self, done: str) -> Iterator[None]:
        """Say in a sentence that the database cannot be used, and why; no address, name or value of it gets in."""
        try:
            yield
        except (SQLAlchemyError, OSError, NoTurnError) as error:
            if isinstance(error, DBAPIError) and _lacks_table(error):
                self.close()  # the database was made anew: whoever asks next makes the tables
            place, remedy = ("", DATABASE_REMEDY) if self._file is None else (" in the state folder", STATE_REMEDY)
            nothing = "" if done == "read" else " Nothing was accepted."
            raise StateError(f"The database{place} cannot be {done} ({why(error)}).{nothing} {remedy}") from error


def address_of(url: str | URL) -> str:
    """The address of a PostgreSQL as its own library reads it, of one that SQLAlchemy reads."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False).replace(" ", "%20")


def _check(about: Mapping[str, int]) -> None:
    """See that this release knows the tables well enough."""
    if about.get("oldest", 0) > VERSION:
        raise StateError(
            f"The database is used by a newer release of celestial-backend, whose tables have version"
            f" {about['version']}; this one knows version {VERSION}. Upgrade celestial-backend here too."
        )


def _free(path: Path) -> Path:
    """Where what was taken over goes: beside what went there before, if an older release was started again."""
    names = (path.with_name(f"{path.name}.old{number}") for number in ("", *range(2, 1000)))
    return next(name for name in names if not name.exists())


class NoTurnError(Exception):
    """Others wrote for as long as one may wait."""


@dataclass(frozen=True)
class _Opened:
    """The connections of one process."""

    process: int
    reading: Engine
    writing: Engine
    file: tuple[int, int] | None = None

    def close(self) -> None:
        """Let the connections go."""
        self.reading.dispose()
        self.writing.dispose()


@cache
def _text(statement: str) -> TextClause:
    return text(statement)


def _storable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values without what no text of PostgreSQL may hold, NUL and halves of signs; a stranger may have sent them."""
    return {
        name: value.encode(errors="replace").decode().replace("\0", "?") if isinstance(value, str) else value
        for name, value in values.items()
    }


def _read(engine: Engine, statement: str, values: Mapping[str, Any], answer_s: float) -> Sequence[Row]:
    with engine.connect() as connection:
        _wait(connection, answer_s)
        return connection.execute(_text(statement), _storable(values)).mappings().all()


@contextmanager
def _begun(engine: Engine, deadline: float) -> Iterator[Transaction]:
    with engine.connect().execution_options(deadline=deadline) as connection:
        _wait(connection, ANSWER_S + deadline - time.monotonic())
        with connection.begin():
            yield Transaction(connection)


@cache
def _patient() -> Callable[..., Any]:
    """What connects to a PostgreSQL, and waits no longer for an answer than `_wait` has said."""
    import psycopg

    class Patient(psycopg.Connection[Any]):
        answer_s = ANSWER_S

        def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
            try:
                return super().wait(gen, interval, self.answer_s if timeout is None else timeout)
            except psycopg.errors._WaitTimeout as silent:  # there is no public name for it
                self.pgconn.finish()
                raise psycopg.OperationalError(SILENT) from silent

    # A statement that the server has prepared fails once a newer release has added a column to a table.
    return partial(Patient.connect, connect_timeout=CONNECT_S, prepare_threshold=None, **ALIVE)


def _wait(connection: Connection, answer_s: float) -> None:
    """How long the next statements wait for their answers."""
    if connection.dialect.name == "postgresql":
        connection.connection.driver_connection.answer_s = answer_s  # type: ignore[union-attr]


def _is_silent(error: DBAPIError) -> bool:
    return str(error.orig) == SILENT


def _prepare(connection: Any, _: object) -> None:
    """What a connection that writes into SQLite is like: transactions are begun by hand, and readers go on beside."""
    connection.isolation_level = None
    wal = partial(connection.execute, "PRAGMA journal_mode = WAL")
    _in_turn(wal, time.monotonic() + TABLES_S, connection.OperationalError)
    connection.execute("PRAGMA synchronous = FULL")


def _leave_alone(file: Path, _dialect: object, _record: object, words: list[str], _options: object) -> None:
    """Put nothing beside a file that nobody has open, as even a reader of SQLite does, unless it takes it as it is."""
    if not file.with_name(f"{file.name}-wal").exists():
        words[0] += "&immutable=1"


def _begin(connection: Connection) -> None:
    _in_turn(partial(connection.exec_driver_sql, "BEGIN IMMEDIATE"), connection.get_execution_options()["deadline"])


def _in_turn(begin: Callable[[], object], deadline: float, refused: type[Exception] = DBAPIError) -> None:
    """Begin what SQLite lets one process do at a time, as soon as the others have ended to."""
    while True:
        try:
            begin()
        except refused as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(*LOOK_S))  # noqa: S311 - so that none of them always comes too late
        else:
            return


def _since_start() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _lacks_table(error: DBAPIError) -> bool:
    return _code(error) == UNDEFINED_TABLE or "no such table" in str(error.orig)


def _code(error: DBAPIError) -> str:
    return getattr(error.orig, "sqlstate", None) or ""


def why(error: BaseException) -> str:
    """What went wrong, in a few words of ours: the database's own tell addresses, names and values."""
    error = getattr(error, "orig", None) or error
    if isinstance(error, NoTurnError | NoneLeftError):
        return IN_USE
    if name := getattr(error, "sqlite_errorname", ""):
        return next((words for start, words in OF_SQLITE_ERRORS.items() if name.startswith(start)), f"code {name}")
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    code: str | None = getattr(error, "sqlstate", "none")
    if code == "none":
        return type(error).__name__
    if code:
        return OF_CODES.get(code, f"code {code}")
    said = str(error)  # a connection that is refused has no code
    return next((words for sign, words in OF_REFUSALS.items() if sign in said), "it does not answer")
