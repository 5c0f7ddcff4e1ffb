"""The database, on SQLite and on PostgreSQL: all or nothing, one writer at a time, and sentences for trouble."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from sqlalchemy import make_url

from celestial_backend.database import OLDEST, SCHEMA, VERSION, Database
from celestial_backend.errors import DATABASE_REMEDY, StateError
from celestial_backend.jobs.queue import make_queue
from celestial_backend.settings import Settings
from tests.support.postgres_server import PostgresServer

ADD = "INSERT INTO live (project, tag, job) VALUES (:project, 'a:b', '')"
READ = "SELECT project FROM live ORDER BY project"
PASSWORD = "s3cret"


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(model_dir=tmp_path / "state", database_url=database_url)


@pytest.fixture
def database(settings: Settings) -> Database:
    return Database(settings)


def add(database: Database, project: str) -> None:
    with database.writing(project) as transaction:
        transaction.run(ADD, project=project)


def projects(database: Database) -> list[str]:
    return [row["project"] for row in database.rows(READ)]


def test_what_is_written_is_there_for_all(database: Database, settings: Settings) -> None:
    """As soon as the transaction has ended, and not before; what is raised inside undoes it."""
    other = Database(settings)
    assert projects(other) == []
    with database.writing("3") as transaction:
        transaction.run(ADD, project="3")
        assert transaction.row(READ) == {"project": "3"}
        assert projects(other) == []
    assert projects(other) == ["3"]
    with suppress(ZeroDivisionError), database.writing("4") as transaction:
        transaction.run(ADD, project=str(4 // transaction.run(ADD, project="4") // 0))
    assert projects(other) == ["3"]
    assert database.row(READ + " LIMIT 0") is None


def test_one_writes_a_key_at_a_time(database: Database, settings: Settings) -> None:
    """Whoever has waited long enough gives up with a sentence, in this process as in another; then it goes on."""
    other = Database(settings)
    assert projects(other) == []
    with database.writing("3"):
        for each in (database, other):
            with ThreadPoolExecutor(1) as thread:
                refused = thread.submit(add, each, "3").exception(30)
            assert str(refused).startswith("The database")
            assert " cannot be written (" in str(refused)
    add(database, "3")
    assert projects(database) == ["3"]


def test_counts_by_many_are_right(database: Database, settings: Settings) -> None:
    """What is read in a transaction holds until it is written."""
    add(database, "3")
    both = [database, Database(settings)]

    def count(number: int) -> None:
        for _ in range(10):
            with both[number % 2].writing("3", 60) as transaction:
                row = transaction.row("SELECT job FROM live WHERE project = '3'")
                assert row is not None
                transaction.run("UPDATE live SET job = :job", job=str(int(row["job"] or 0) + 1))

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(count, range(6)))
    assert database.row("SELECT job FROM live") == {"job": "60"}


def test_many_make_the_tables_at_once(settings: Settings) -> None:
    """As processes that start together do; each then finds what the others have written."""
    begin = threading.Barrier(8)

    def start(number: int) -> None:
        database = Database(settings)
        begin.wait(30)
        with database.writing(str(number), 60) as transaction:
            transaction.run(ADD, project=str(number))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(start, range(8)))
    assert len(projects(Database(settings))) == 8


def test_a_fork_has_connections_of_its_own(database: Database) -> None:
    """And leaves those of its parent alone, as gunicorn's workers do."""
    add(database, "3")
    child = os.fork()
    if child == 0:
        try:
            add(database, "4")
            os._exit(0 if projects(database) == ["3", "4"] else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    add(database, "5")
    assert projects(database) == ["3", "4", "5"]


def test_a_clock_is_the_same_for_all(database: Database, settings: Settings) -> None:
    """In seconds, and it goes on by itself, in a transaction too."""
    before = database.now()
    with Database(settings).writing("3") as transaction:
        first = transaction.now()
        time.sleep(0.01)
        assert before <= first < transaction.now() <= database.now() < before + 60


# Releases


def aged(database: Database, version: int, oldest: int) -> None:
    """As a newer release has left its tables."""
    with database.writing("about") as transaction:
        for name, value in {"version": version, "oldest": oldest}.items():
            transaction.run("UPDATE about SET value = :value WHERE name = :name", name=name, value=value)


def test_tables_of_a_release_that_this_one_cannot_work_with_are_refused(database: Database, settings: Settings) -> None:
    """In a sentence; nothing is read or written."""
    aged(database, VERSION + 1, VERSION + 1)
    sentence = rf"used by a newer release .* version {VERSION + 1}; this one knows version {VERSION}\. Upgrade"
    for use in (projects, lambda other: add(other, "3")):
        with pytest.raises(StateError, match=sentence):
            use(Database(settings))
    assert projects(database) == []


def test_tables_of_a_newer_release_are_worked_with_where_it_allows_that(database: Database, settings: Settings) -> None:
    """During an upgrade both run, and the older one changes nothing of the tables."""
    aged(database, VERSION + 1, OLDEST)
    other = Database(settings)
    add(other, "3")
    assert projects(database) == ["3"]
    about = {row["name"]: row["value"] for row in other.rows("SELECT * FROM about")}
    assert about == {"version": VERSION + 1, "oldest": OLDEST}


def test_a_column_of_a_newer_release_disturbs_no_older_one_that_runs(database: Database, settings: Settings) -> None:
    """Whatever it has read before, often enough for a server to remember the statement."""
    add(database, "3")
    every = "SELECT * FROM live"
    for _ in range(10):
        assert len(database.rows(every)) == 1
    with Database(settings).writing("tables") as transaction:
        transaction.run("ALTER TABLE live ADD COLUMN more TEXT")
    assert [row["project"] for row in database.rows(every)] == ["3"]


# Looking only


def test_any_text_can_be_written_and_asked_for(database: Database) -> None:
    """What no text of PostgreSQL may hold has given way; a job whose reason has it could never end."""
    with database.writing("3") as transaction:
        transaction.run("INSERT INTO live (project, tag, job) VALUES ('3', :tag, '')", tag="a\0b\ud83d é 🪐")
    assert database.row("SELECT tag FROM live") == {"tag": "a?b? é 🪐"}
    assert database.rows("SELECT tag FROM live WHERE project = :project", project="\0\udcff") == []


def test_who_only_looks_makes_nothing(settings: Settings) -> None:
    """Where there are no tables there are no rows; where there are some, he sees them, and cannot write."""
    looking = Database(settings, look_only=True)
    assert projects(looking) == []
    before = Database(settings)
    add(before, "3")
    looking = Database(settings, look_only=True)
    assert projects(looking) == ["3"]
    with pytest.raises(StateError):
        add(looking, "4")
    assert projects(before) == ["3"]


def test_who_only_looks_puts_no_file_beside_it(tmp_path: Path) -> None:
    """Whether others use it meanwhile, or nobody does."""
    settings = Settings(model_dir=tmp_path / "state")
    assert projects(Database(settings, look_only=True)) == []
    assert list(settings.model_dir.iterdir()) == []


# Names


@pytest.mark.parametrize("name", ["per cent %41%", "mark?", "hash #1"])
def test_the_state_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    """Its file lies there and nowhere else, and who only looks finds it."""
    settings = Settings(model_dir=tmp_path / "odd" / name)
    database = Database(settings)
    add(database, "3")
    assert projects(Database(settings, look_only=True)) == ["3"]
    database.close()
    assert projects(Database(settings, look_only=True)) == ["3"]
    assert [path.relative_to(tmp_path / "odd").parts[0] for path in (tmp_path / "odd").rglob("*.db")] == [name]


def test_a_password_may_have_any_signs(postgres_server: PostgresServer) -> None:
    """Written as addresses have them; the database and the queue read them alike."""
    url, password = postgres_server.fresh(), "a@b:c/d e%41?#+"
    with psycopg.connect(url, autocommit=True) as administrator:
        user = f"odd_{administrator.info.dbname}"
        administrator.execute(f"CREATE ROLE {user} LOGIN PASSWORD '{password}'")
        administrator.execute(f"CREATE SCHEMA {SCHEMA} AUTHORIZATION {user}")
    settings = Settings.from_environ(
        {"CELESTIAL_DATABASE_URL": f"postgresql://{user}:{quote(password, safe='')}@{url.partition('@')[2]}"}
    )
    database = Database(settings)
    add(database, "3")
    assert projects(database) == ["3"], "in the schema that an administrator has made"
    assert make_queue(settings).storage.queue_size() == 0


# Trouble


def test_connections_that_wait_to_read_keep_nobody_from_writing(postgres_server: PostgresServer) -> None:
    """As where PostgreSQL allows few of them: one sentence, and then it goes on."""
    url = postgres_server.fresh()
    with psycopg.connect(url, autocommit=True) as administrator:
        user = f"few_{administrator.info.dbname}"
        administrator.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'few' CONNECTION LIMIT 2")
        administrator.execute(f"CREATE SCHEMA {SCHEMA} AUTHORIZATION {user}")
    database = Database(Settings(database_url=f"postgresql://{user}:few@{url.partition('@')[2]}"))
    add(database, "3")
    database.close()
    together = threading.Barrier(2)

    def read(_: int) -> None:
        together.wait(30)
        database.rows("SELECT pg_sleep(0.3)")

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(read, range(2)))
    with suppress(StateError):
        add(database, "4")
    add(database, "5")
    assert "5" in projects(database)


def test_of_many_who_ask_a_silent_database_first_none_waits_for_all_others(
    postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A web server that starts meanwhile has its threads back."""
    database, tries = Database(Settings(database_url=postgres_server.fresh())), []
    connected = Database._connected

    def counted(self: Database) -> Any:
        tries.append(self)
        return connected(self)

    monkeypatch.setattr(Database, "_connected", counted)
    begin = threading.Barrier(8)

    def ask(_: int) -> None:
        begin.wait(30)
        with pytest.raises(StateError, match="it does not answer"):
            projects(database)

    postgres_server.signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(ask, range(8)))
    finally:
        postgres_server.signal(signal.SIGCONT)
    assert len(tries) == 1
    assert projects(database) == []


def test_what_keeps_us_out_of_a_postgresql_is_told_apart(postgres_server: PostgresServer) -> None:
    """Wrong password, no such user or database, no such machine, no connection left, no right: each in our words."""
    url = postgres_server.fresh()
    base, _, _ = url.rpartition("/")
    wrong = {
        url.replace(PASSWORD, "wrong"): "it does not accept the user or the password",
        url.replace("celestial:", "stranger:"): "it does not accept the user or the password",
        f"{base}/nowhere": "it has no database of that name",
        url.replace("127.0.0.1", "nowhere.invalid"): "no machine has its name",
        url.replace(f":{postgres_server.port}/", ":1/"): "it does not answer",
        f"{url}?sslmode=require": "it and this machine do not agree on SSL",
        url.replace("celestial:", "busy:"): "all its connections are taken",
        url.replace("celestial:", "poor:"): "its user lacks a right",
    }
    with psycopg.connect(url, autocommit=True) as administrator:
        for role in ("poor", "busy CONNECTION LIMIT 0"):
            administrator.execute(f"CREATE USER {role} PASSWORD '{make_url(url).password}'")
        said = {address: refusal(address) for address in wrong}
        administrator.execute("DROP USER poor, busy")
    for address, why in wrong.items():
        assert said[address].partition(" Nothing")[0] == f"The database cannot be read ({why}). {DATABASE_REMEDY}"


def refusal(url: str) -> str:
    database = Database(Settings.from_environ({"CELESTIAL_DATABASE_URL": url}))
    try:
        projects(database)
    except StateError as error:
        return str(error)
    finally:
        database.close()
    return ""


def lose_tables(settings: Settings) -> None:
    """The database is made anew while it is in use, as by somebody who begins again or puts a copy back."""
    if settings.database_url and settings.database_url.startswith("postgresql"):
        with psycopg.connect(settings.database_url, autocommit=True) as administrator:
            administrator.execute(f"DROP SCHEMA {SCHEMA} CASCADE")
    else:
        Path((settings.database_url or "").removeprefix("sqlite:///")).unlink()


def test_a_database_that_was_made_anew_is_used_from_then_on(database: Database, settings: Settings) -> None:
    """By all who used the old one, after one sentence at most: what is accepted then is there for all."""
    other = Database(settings)
    add(database, "3")
    assert projects(other) == ["3"]
    lose_tables(settings)
    for each in (database, other):
        with suppress(StateError):
            projects(each)
    assert (projects(database), projects(other)) == ([], [])
    add(database, "4")
    add(other, "5")
    assert projects(Database(settings)) == projects(database) == projects(other) == ["4", "5"]


def test_tables_that_are_missing_at_a_writing_are_made(database: Database, settings: Settings) -> None:
    """As for one who never reads."""
    add(database, "3")
    lose_tables(settings)
    with suppress(StateError):
        add(database, "4")
    add(database, "5")
    assert "5" in projects(Database(settings))


def test_who_only_looks_sees_what_is_written_later(settings: Settings) -> None:
    """Also where nobody had the file open at the first look, and it was taken as it was."""
    add(Database(settings), "3")
    gc.collect()  # closes it
    looking = Database(settings, look_only=True)
    assert projects(looking) == ["3"]
    add(Database(settings), "4")
    assert projects(looking) == ["3", "4"]


def blocked(folder: Path) -> Settings:
    (folder / "blocked").write_text("a file where the folder should be")
    return Settings(model_dir=folder / "blocked")


def damaged(folder: Path) -> Settings:
    settings = Settings(model_dir=folder / "state")
    settings.state.database.write_text("no database, but long enough to be taken for one" * 100)
    return settings


def away(_: Path) -> Settings:
    return Settings(database_url=f"postgresql+psycopg://celestial:{PASSWORD}@127.0.0.1:1/celestial")


@pytest.mark.parametrize(
    ("trouble", "place", "why", "remedy"),
    [
        (blocked, " in the state folder", "File exists", "Check that this user can write to the folder that MODEL_DIR"),
        (damaged, " in the state folder", "its file is no database", "Check that this user can write to the folder"),
        (away, "", "it does not answer", "Start the database, or correct CELESTIAL_DATABASE_URL;"),
    ],
    ids=["blocked", "damaged", "away"],
)
def test_a_database_that_cannot_be_used_is_said(
    tmp_path: Path, trouble: Callable[[Path], Settings], place: str, why: str, remedy: str
) -> None:
    """Nothing is accepted that was not written down; and no address or password is told."""
    database = Database(trouble(tmp_path))
    with pytest.raises(StateError) as read:
        projects(database)
    with pytest.raises(StateError) as written:
        add(database, "3")
    assert str(read.value).startswith(f"The database{place} cannot be read ({why}). {remedy}")
    start = f"The database{place} cannot be written ({why}). Nothing was accepted. {remedy}"
    assert str(written.value).startswith(start)
    assert PASSWORD not in str(read.value) + str(written.value)
    assert "127.0.0.1" not in str(read.value) + str(written.value)
