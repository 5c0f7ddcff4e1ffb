"""The live model of a project: a row of the database, remembered while that is away."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from celestial_backend.database import Database
from celestial_backend.errors import RequestError, StateError
from celestial_backend.models import pointers as pointers_module
from celestial_backend.models.pointers import Pointer, Pointers, take_over_pointers
from celestial_backend.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(model_dir=tmp_path / "state", bentoml_home=tmp_path / "bentoml")


@pytest.fixture
def database(settings: Settings) -> Database:
    """As a process has it, with what an older release has left."""
    database = Database(settings)
    database.old[settings.state.old_pointers] = partial(take_over_pointers, settings)
    return database


def write(database: Database, project: str, pointer: Pointer) -> None:
    with database.writing(project) as transaction:
        Pointers(database).write(project, pointer, transaction)


@pytest.fixture
def away(database: Database, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Takes the database away once a reason stands in the list."""
    reasons: list[str] = []
    rows = database.rows

    def read(statement: str, **values: str) -> object:
        if reasons:
            raise StateError(f"The database cannot be read ({reasons[0]}).")
        return rows(statement, **values)

    monkeypatch.setattr(database, "rows", read)
    return reasons


def test_a_project_without_a_pointer_has_none(database: Database) -> None:
    """It works with the model of the settings."""
    assert Pointers(database).read("3") is None
    assert Pointers(database).projects() == {}


def test_another_process_sees_what_was_written(database: Database, settings: Settings) -> None:
    """Nothing is remembered in between, so every process sees it at its next request."""
    reader = Pointers(Database(settings))
    for pointer in (Pointer("a:1", "0badcafe"), Pointer("a:2")):
        write(database, "3", pointer)
        assert reader.read("3") == pointer
    write(database, "12", Pointer("a:3"))
    assert list(reader.projects().items()) == [("3", "a:2"), ("12", "a:3")]


def test_a_pointer_is_written_with_its_transaction(database: Database) -> None:
    """Inside it is known at once; outside before its end, and after it was undone, the old one counts."""
    pointers = Pointers(database)
    write(database, "3", Pointer("a:1"))
    with suppress(ZeroDivisionError), database.writing("3") as transaction:
        pointers.write("3", Pointer("a:2"), transaction)
        assert pointers.read("3", transaction) == Pointer("a:2")
        assert pointers.read("3") == Pointer("a:1")
        raise ZeroDivisionError
    assert pointers.read("3") == Pointer("a:1")


@pytest.mark.parametrize("project", ["", "../../etc/passwd", "3/../4", "٣", "-1", "03", "9" * 19, "3" * 4301])
def test_a_strange_project_has_no_pointer(database: Database, project: str) -> None:
    """A request may name anything as its project."""
    write(database, "3", Pointer("a:1"))
    assert Pointers(database).read(project) is None
    with pytest.raises(RequestError, match="must be a whole number from 1 to 9223372036854775807, got "):
        write(database, project, Pointer("a:2"))
    assert Pointers(database).projects() == {"3": "a:1"}


def test_the_last_pointer_counts_while_the_database_is_away(
    database: Database, away: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Also that a project had none; the log says so once, and of a project that was never read nothing is guessed."""
    pointers = Pointers(database)
    write(database, "3", Pointer("a:1", "0badcafe"))
    assert (pointers.read("3"), pointers.read("4")) == (Pointer("a:1", "0badcafe"), None)
    away.append("it does not answer")
    with caplog.at_level(logging.WARNING):
        assert [pointers.read("3") for _ in range(3)] == [Pointer("a:1", "0badcafe")] * 3
        assert pointers.read("4") is None
    said = "Projects are served the models that were live when that was last known: The database cannot be read"
    assert [record.getMessage() for record in caplog.records] == [f"{said} (it does not answer)."]
    with pytest.raises(StateError, match="it does not answer"):
        pointers.read("5")
    with pytest.raises(StateError, match="it does not answer"):
        pointers.projects()


def test_a_database_that_is_back_is_asked_again(
    database: Database, away: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was published meanwhile elsewhere counts."""
    monkeypatch.setattr(pointers_module, "AWAY_S", 0.0)
    pointers = Pointers(database)
    write(database, "3", Pointer("a:1"))
    pointers.read("3")
    away.append("it is in use")
    assert pointers.read("3") == Pointer("a:1")
    away.clear()
    write(database, "3", Pointer("a:2"))
    assert pointers.read("3") == Pointer("a:2")


def test_a_database_that_is_away_holds_up_one_request(
    database: Database, away: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next ones do not wait for it too; one that wrote knows that it is back."""
    monkeypatch.setattr(pointers_module, "AWAY_S", 3600.0)
    pointers = Pointers(database)
    write(database, "3", Pointer("a:1"))
    pointers.read("3")
    away.append("it does not answer")
    pointers.read("3")
    away.clear()
    write(database, "3", Pointer("a:2"))
    assert pointers.read("3") == Pointer("a:1")
    with database.writing("4") as transaction:
        pointers.write("4", Pointer("a:3"), transaction)
    assert pointers.read("3") == Pointer("a:2")


def test_what_is_remembered_is_bounded(database: Database, away: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests may name as many projects as they like; those that were read last are remembered."""
    monkeypatch.setattr(pointers_module, "LAST_MAX", 2)
    pointers = Pointers(database)
    for project in ("1", "2", "1", "3"):
        pointers.read(project)
    away.append("it does not answer")
    assert (pointers.read("1"), pointers.read("3")) == (None, None)
    with pytest.raises(StateError):
        pointers.read("2")


def leave(settings: Settings, **files: str) -> Path:
    """The folder of an older release."""
    folder = settings.state.old_pointers
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    (folder / "3.lock").touch()
    return folder


def test_the_pointers_of_an_older_release_are_taken_over_once(database: Database, settings: Settings) -> None:
    """All of them, and what is written afterwards stays."""
    folder = leave(settings, **{
        "3": json.dumps({"tag": "a:1", "job": "0badcafe"}), "12": json.dumps({"tag": "a:2", "job": ""}),
    })  # fmt: skip
    pointers = Pointers(database)
    assert (pointers.read("3"), pointers.read("12")) == (Pointer("a:1", "0badcafe"), Pointer("a:2"))
    assert (folder.exists(), (folder.with_name("live.old") / "3.json").is_file()) == (False, True)
    write(database, "3", Pointer("a:3"))
    leave(settings, **{"3": '{"tag": "a:4"}', "5": '{"tag": "a:5"}'})
    again = Database(settings)
    again.old[settings.state.old_pointers] = partial(take_over_pointers, settings)
    assert Pointers(again).projects() == {"3": "a:3", "5": "a:5", "12": "a:2"}
    assert (folder.exists(), (folder.with_name("live.old2") / "5.json").is_file()) == (False, True)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"tag": "a', id="cut off"),
        pytest.param("[]", id="no pointer"),
        pytest.param("{}", id="no tag"),
        pytest.param('{"tag": 3}', id="a number"),
        pytest.param('{"tag": "a:1", "job": null}', id="no job"),
        pytest.param("[" * 100_000, id="nested without end"),
    ],
)
def test_a_damaged_pointer_file_is_said_with_its_remedy(
    database: Database, settings: Settings, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It costs those that are whole nothing."""
    leave(settings, **{"3": text, "4": '{"tag": "a:1"}', "03": '{"tag": "a:2"}', "3 copy": '{"tag": "a:2"}'})
    assert Pointers(database).projects() == {"4": "a:1"}
    assert "live.old/3.json cannot be read" in caplog.text
    assert "models use TAG --project 3" in caplog.text
