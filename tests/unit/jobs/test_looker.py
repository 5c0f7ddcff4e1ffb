"""What a project's labels ask for, when Label Studio is asked for them, and what such a look costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from celestial_backend.jobs.ledger import FAILED, KEPT, PUBLISHED, WAITING, Ledger
from celestial_backend.jobs.looker import NOT_CONNECTED
from celestial_backend.jobs.trainings import NOBODY_TO_ASK, REST, SLOW_S, Jobs
from celestial_backend.models.pointers import Pointer
from celestial_backend.models.store import ModelStore
from celestial_backend.services import build
from celestial_backend.settings import MODEL_NAME, NEVER, Settings, project_tag
from tests.support import fake_project
from tests.support.backend_server import label_config
from tests.support.fake_project import (
    DEFAULT,
    FakeProject,
    Look,
    begun,
    end,
    look_after,
    looked,
    messages,
    missing,
    run_next,
    states,
)

BROUGHT = f"{MODEL_NAME}:of-somebody"
by_itself, ledger, live, look = fake_project.by_itself, fake_project.ledger, fake_project.live, fake_project.look
minutes, trained = fake_project.minutes, fake_project.trained
settings, studio = fake_project.settings, fake_project.studio


def test_two_choices_with_three_labels_each_begin_the_first_training(
    studio: Any, by_itself: Jobs, ledger: Ledger
) -> None:
    """Not before; until then it is written down how many labels of which choices are missing."""
    studio.tasks.clear()
    ledger.know("7")
    run_next(by_itself)
    assert by_itself.missing("7") == (
        "choice: no labels yet; at least 2 choices need 3 labels each, so label 3 pictures each of 2 choices."
    )
    studio.label(Mars=4, Venus=2)
    by_itself.note_labels("7", 6)
    run_next(by_itself)
    assert by_itself.missing("7") == (
        "choice: 4 labels of 'Mars' and 2 of 'Venus'; at least 2 choices need 3 labels each, so label 1 more picture of"
        " 'Venus'."
    )
    assert states(ledger) == []
    studio.label(Venus=1)
    by_itself.note_labels("7", 1)
    by_itself.look("7")
    assert (states(ledger), by_itself.missing("7")) == ([WAITING], "")
    assert studio.asked == [], "nothing was learned, so all labels are new"


@pytest.mark.parametrize("state", [PUBLISHED, KEPT, FAILED])
def test_the_next_begins_when_the_labels_have_grown_by_a_fifth(
    studio: Any, by_itself: Jobs, live: dict[str, str], ledger: Ledger, state: str
) -> None:
    """However the last one ended; and as long as events do not tell of so many, Label Studio is not asked."""
    ledger.request("7")
    studio.label(Mars=24)
    end(ledger, state, 30, "2026-11-23T01:02:03Z")
    ledger.looked("7", labels=0, missing="", brought="")
    ledger.look("7")
    ledger.let_look("7")
    if state == PUBLISHED:
        live["7"] = project_tag("7", "ab12")
    studio.new = 5
    by_itself.note_labels("7", 5)
    run_next(by_itself)
    assert (states(ledger), studio.asked) == ([state], [])
    by_itself.note_labels("7", 1)
    by_itself.look("7")
    assert (states(ledger), studio.asked) == ([state], [("7", "2026-11-23T01:02:03Z")]), "an event came twice"
    studio.label(Mars=1)
    by_itself.note_labels("7", 1)
    by_itself.look("7")
    assert states(ledger) == [WAITING, state]


def test_few_labels_must_grow_by_five(studio: Any, by_itself: Jobs, ledger: Ledger) -> None:
    """A fifth of six would be every second one."""
    ledger.request("7")
    end(ledger, KEPT, 6, "2026-11-23T01:02:03Z")
    for labels, expected in ((4, [KEPT]), (1, [WAITING, KEPT])):
        studio.label(Mars=labels)
        by_itself.look("7")
        assert states(ledger) == expected


def test_what_was_asked_for_with_too_few_labels_is_no_attempt(studio: Any, by_itself: Jobs, ledger: Ledger) -> None:
    """Somebody pressed the button too early: as soon as there are enough a training begins, by then it can learn."""
    studio.tasks.clear()
    studio.label(Mars=3, Venus=1)
    by_itself.look("7")
    by_itself.request("7")
    end(ledger, FAILED, 4, "2026-11-23T01:02:03Z")
    by_itself.look("7")
    assert str(missing(ledger)).startswith("choice: 3 labels of 'Mars' and 1 of 'Venus'")
    studio.label(Venus=1)
    by_itself.look("7")
    assert states(ledger) == [FAILED]
    studio.label(Venus=1)
    by_itself.look("7")
    assert states(ledger) == [WAITING, FAILED]


def test_a_number_of_labels(studio: Any, look: Look, ledger: Ledger) -> None:
    """As many new or changed ones as it says, but never fewer than can be learned."""
    studio.tasks.clear()
    ledger.know("7")
    studio.label(Mars=4)
    look()
    assert states(ledger) == []
    studio.label(Venus=3)
    look()
    assert states(ledger) == [WAITING]
    end(ledger, KEPT, 7, "2026-11-23T01:02:03Z")
    for new, expected in ((2, [KEPT]), (3, [WAITING, KEPT])):
        studio.new = new
        studio.moment += "+"
        look()
        assert states(ledger) == expected


def test_a_large_number_is_waited_for_the_first_time_too(studio: Any, settings: Settings, ledger: Ledger) -> None:
    """With enough to learn from long before."""
    jobs = build(replace(settings, train_every=50)).jobs
    for labels, expected in ((43, []), (1, [WAITING])):
        studio.label(Mars=labels)
        studio.new = len(studio.tasks)
        ledger.know("7")
        jobs.look("7")
        assert states(ledger) == expected


def test_off_is_the_button_alone(
    studio: Any, settings: Settings, ledger: Ledger, minutes: Callable[[Jobs], Look]
) -> None:
    """What is missing before it can learn is told all the same."""
    jobs = build(replace(settings, train_every=NEVER)).jobs
    studio.tasks.clear()
    ledger.know("7")
    look = minutes(jobs)
    look()
    assert jobs.missing("7").startswith("choice: no labels yet")
    studio.label(Mars=50, Venus=50)
    jobs.note_labels("7", 100)
    look()
    run_next(jobs)
    assert (jobs.missing("7"), states(ledger)) == ("", [])
    jobs.request("7")
    assert states(ledger) == [WAITING]


def test_a_model_that_was_brought_waits_for_the_button(
    studio: Any, by_itself: Jobs, live: dict[str, str], ledger: Ledger
) -> None:
    """It knows the choices; once somebody has asked, trainings begin by themselves."""
    live["7"] = BROUGHT
    studio.new = 100
    by_itself.note_labels("7", 100)
    by_itself.look("7")
    known = ledger.known("7")
    assert known is not None
    assert known.hindrance == (
        f"{BROUGHT} was not trained here, and knows choices of the project: no training begins by itself before Start"
        " Training was pressed once."
    )
    assert (states(ledger), by_itself.missing("7"), studio.read) == ([], "", 0)
    by_itself.request("7")
    end(ledger, KEPT, 6, "2026-11-23T01:02:03Z")
    by_itself.look("7")
    assert states(ledger) == [WAITING, KEPT]
    known = ledger.known("7")
    assert known is not None
    assert known.hindrance == ""


def test_a_model_that_was_brought_and_knows_no_choice_is_replaced(
    studio: Any, by_itself: Jobs, live: dict[str, str], ledger: Ledger
) -> None:
    live["7"] = BROUGHT
    studio.config = label_config(["dress", "hat"])
    studio.tasks.clear()
    studio.label(dress=3, hat=3)
    ledger.know("7")
    by_itself.look("7")
    assert states(ledger) == [WAITING]


@pytest.mark.parametrize(
    ("tag", "brought"),
    [
        pytest.param(DEFAULT, False, id="the embedded default"),
        pytest.param(project_tag("7", "ab12"), False, id="its own"),
        pytest.param(project_tag("8", "ab12"), False, id="another project's"),
        pytest.param(BROUGHT, True, id="the store's latest"),
        pytest.param("another_name:1", True, id="of another name"),
    ],
)
def test_what_we_trained_ourselves_was_not_brought(
    studio: Any, by_itself: Jobs, live: dict[str, str], ledger: Ledger, tag: str, *, brought: bool
) -> None:
    live["7"] = tag
    studio.new = 100
    ledger.know("7")
    by_itself.look("7")
    assert states(ledger) == ([] if brought else [WAITING])


@pytest.mark.usefixtures("studio")
@pytest.mark.parametrize("chosen", [{"model": DEFAULT}, {"bentomodel": Path("a.bentomodel")}], ids=["tag", "file"])
def test_whatever_the_settings_name_was_brought(settings: Settings, ledger: Ledger, chosen: dict[str, Any]) -> None:
    """But for a project that has a model of its own, which goes before it."""
    services = build(replace(settings, **chosen))
    with services.database.writing("8") as work:
        services.store.pointers.write("8", Pointer(DEFAULT), work)
    for project in ("7", "8"):
        ledger.know(project)
        services.jobs.look(project)
    assert (states(ledger, "7"), states(ledger, "8")) == ([], [WAITING])


@pytest.mark.usefixtures("studio")
def test_a_model_of_which_nothing_is_known_may_know_the_choices(
    by_itself: Jobs, live: dict[str, str], ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was never loaded, and a look loads nothing."""
    live["7"] = BROUGHT
    monkeypatch.setattr(ModelStore, "known", lambda *_: None)
    ledger.know("7")
    by_itself.look("7")
    assert states(ledger) == []


def test_a_config_that_cannot_be_learned_is_what_is_missing(
    studio: Any, by_itself: Jobs, live: dict[str, str], ledger: Ledger
) -> None:
    """As a new project has none; whichever model is live."""
    for tag in (DEFAULT, BROUGHT):
        live["7"] = tag
        studio.config = "<View></View>"
        ledger.know("7")
        by_itself.look("7")
        assert "has no Choices on an Image" in str(missing(ledger))
        studio.config = "<View>"
        by_itself.look("7")
        assert "not readable XML" in str(missing(ledger))
    assert states(ledger) == []


# What a look costs


def test_nothing_is_read_again_that_has_not_changed(studio: Any, by_itself: Jobs, ledger: Ledger) -> None:
    """Each minute Label Studio is asked whether there are other labels, or another config, and for no more."""
    studio.tasks.clear()
    ledger.know("7")
    for _ in range(5):
        by_itself.look("7")
    assert studio.read == 2, "and once more as now it is known what is missing"
    studio.label(Mars=1)
    by_itself.look("7")
    by_itself.look("7")
    assert studio.read == 4
    studio.config = label_config(["Mars", "Venus"])
    by_itself.look("7")
    assert "so label 2 more pictures of 'Mars' and 3 of 'Venus'" in by_itself.missing("7")


def test_many_events_are_one_look(
    studio: Any, by_itself: Jobs, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many messages they left, and not beside a training, which reads all labels itself."""
    seen: list[str] = []
    look = Jobs.look

    def counted(self: Jobs, project: str) -> None:
        seen.append(project)
        look(self, project)

    monkeypatch.setattr(Jobs, "look", counted)
    studio.tasks.clear()
    for _ in range(20):
        by_itself.note_labels("7", 1)
    for _ in range(3):
        run_next(by_itself)
    assert seen == ["7"]
    ledger.look("7")
    by_itself.note_labels("7", 1)
    run_next(by_itself)
    assert ledger.looks(wanted=True) == ["7"], "another worker was at it: its turn is kept"
    ledger.let_look("7")
    by_itself.request("7")
    begun(ledger)
    by_itself.look("7")
    assert studio.read == 1


@pytest.mark.usefixtures("studio")
def test_a_worker_is_woken_by_labels_that_may_be_enough(by_itself: Jobs, ledger: Ledger, trained: list[str]) -> None:
    """A message lies in the queue, and what takes it looks and trains."""
    by_itself.note_labels("7", 1)
    deadline = time.monotonic() + 30
    while not messages(by_itself):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    task = by_itself.huey.dequeue()
    by_itself.huey.execute(task)
    looked()
    while task := by_itself.huey.dequeue():
        by_itself.huey.execute(task)
    assert trained == ["7"]
    ledger.trained("7", 6, "2026-11-23T01:02:03Z")
    by_itself.note_labels("7", 4)
    assert ledger.looks(wanted=True) == []


def test_a_look_that_took_long_is_not_repeated_at_once(
    studio: Any, by_itself: Jobs, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ten thousand labels of one choice must be read, a tenth of the time is spent on it."""
    moment = time.monotonic()

    def slow(_: FakeProject) -> Iterator[list[dict[str, Any]]]:
        nonlocal moment
        moment += SLOW_S + 1
        FakeProject.read += 1
        yield from ()

    monkeypatch.setattr("celestial_backend.jobs.trainings.time.monotonic", lambda: moment)
    monkeypatch.setattr(FakeProject, "annotations", slow)
    ledger.know("7")
    by_itself.look("7")
    studio.label(Mars=1)
    by_itself.look("7")
    assert studio.read == 1
    moment += REST * (SLOW_S + 1)
    by_itself.look("7")
    assert studio.read == 2


def test_nobody_is_asked_without_an_address_and_a_token(studio: Any, ledger: Ledger) -> None:
    """A backend that only predicts needs neither; what it lacks to learn is told where somebody asks."""
    jobs = build(Settings.from_environ()).jobs
    jobs.know("7")
    look_after(jobs)
    run_next(jobs)
    assert (studio.read, studio.asked, missing(ledger)) == (0, [], None)
    assert jobs.missing("7") == NOBODY_TO_ASK


def test_what_is_missing_is_told_without_fail(settings: Settings, ledger: Ledger) -> None:
    """The rule where nobody has looked, or the list of jobs cannot be read; it takes no time."""
    jobs = build(settings).jobs
    rule = "At least 2 choices need 3 labels each."
    assert [jobs.missing(project) for project in ("7", "", "x" * 300)] == [rule] * 3
    ledger.know("7")
    ledger.looked("7", labels=0, missing="Two more.", brought="")
    assert jobs.missing("7") == "Two more."
    away = replace(settings, database_url="postgresql+psycopg://127.0.0.1:1/celestial")
    assert build(away).jobs.missing("7") == rule


@pytest.mark.usefixtures("studio")
def test_a_project_that_is_new_is_looked_at_at_once(by_itself: Jobs, ledger: Ledger) -> None:
    """It may have been labelled for long before it was connected; later /setups wake nobody."""
    by_itself.know("7")
    deadline = time.monotonic() + 30
    while not messages(by_itself):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    by_itself.huey.storage.flush_queue()
    by_itself.look("7")
    assert states(ledger) == [WAITING]
    build(by_itself._settings).jobs.know("7")
    assert messages(by_itself) <= 1, "that of the training"


def test_a_project_that_was_disconnected_trains_no_more(
    studio: Any, look: Look, ledger: Ledger, by_itself: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    """Its webhook stays, and tells of labels; `jobs` and one line of the log say why, until it is connected again."""
    studio.connected, studio.new = False, 6
    ledger.know("7")
    for _ in range(3):
        look()
    by_itself.note_labels("7", 6)
    look()
    known = ledger.known("7")
    assert known is not None
    assert (states(ledger), known.hindrance) == ([], NOT_CONNECTED)
    assert caplog.text.count(NOT_CONNECTED) == 1
    studio.connected = True
    look()
    known = ledger.known("7")
    assert known is not None
    assert (states(ledger), known.hindrance) == ([WAITING], "")


def test_a_person_trains_a_project_that_is_not_connected(
    studio: Any, look: Look, ledger: Ledger, by_itself: Jobs
) -> None:
    """`train --project` asks for one training; no other follows by itself."""
    studio.connected = False
    ledger.know("7")
    by_itself.request("7")
    end(ledger, KEPT, 6, "2026-11-23T01:02:03Z")
    studio.label(Mars=20)
    look()
    assert states(ledger) == [KEPT]
    by_itself.request("7")
    assert states(ledger) == [WAITING, KEPT]
