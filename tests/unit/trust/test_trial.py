"""What people are shown, and what is held back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from celestial_backend.database import Database
from celestial_backend.errors import StateError
from celestial_backend.jobs.ledger import Ledger
from celestial_backend.services import build, rebuild
from celestial_backend.settings import Settings
from celestial_backend.trust.trial import AUDITED, PLANTED, WITHHELD, Trial, Unshown

MARS = {"from_name": "body", "to_name": "image", "type": "choices", "value": {"choices": ["Mars"]}, "score": 0.9}


def answer(score: float = 0.9) -> dict[str, Any]:
    return {"result": [MARS], "score": score, "model_version": "celestial_bodies_classifier_model:one"}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return replace(Settings(), model_dir=tmp_path, control_share=0.1)


def test_a_share_is_held_back_at_random_and_kept(settings: Settings) -> None:
    """About a tenth, the same for another process; its scores are those it would have had."""
    tasks = [{"id": number} for number in range(1, 2001)]
    given = [answer(score=number / 2001) for number in range(1, 2001)]
    trial = Trial(settings, Database(settings))
    shown = trial.shown(tasks, given, "7.1795374408")
    held = [task["id"] for task, each in zip(tasks, shown, strict=True) if not each["result"]]
    assert 150 < len(held) < 250
    assert [each["score"] for each in shown] == [each["score"] for each in given]
    again = Trial(settings, Database(settings))
    assert [task["id"] for task in tasks if again.arm("7", task["id"]) == WITHHELD] == held
    kept = again.kept("7")
    assert sorted(each.task for each in kept) == held
    assert all(each.said == [MARS] and each.made == "1795374408" for each in kept)
    assert held != [task["id"] for task in tasks if again.arm("8", task["id"]) == WITHHELD]


def test_nothing_is_held_back_unless_asked_for(settings: Settings) -> None:
    """Nor of a request without a project."""
    tasks = [{"id": number} for number in range(1, 101)]
    given = [answer() for _ in tasks]
    silent = replace(settings, control_share=0.0)
    assert Trial(silent, Database(silent)).shown(tasks, given, "7") == given
    assert Trial(settings, Database(settings)).shown(tasks, given, "") == given


def test_what_is_held_back_again_keeps_its_moment(settings: Settings) -> None:
    """Labels are matched with what was held back before them; only a project made anew begins anew."""
    trial = Trial(settings, Database(settings))
    first = Unshown(1, "v1", WITHHELD, [MARS], 0.9, at=1000.0, made="5")
    for later in (first, replace(first, at=2000.0), replace(first, at=3000.0, score=0.8)):
        trial.keep("7", [later])
    assert [(each.at, each.score) for each in trial.kept("7")] == [(1000.0, 0.8)]
    trial.keep("7", [replace(first, at=4000.0, made="6")])
    assert [each.at for each in trial.kept("7", "6")] == [4000.0]


def test_a_retrained_model_keeps_the_arms(settings: Settings) -> None:
    tasks, trial = [{"id": number} for number in range(1, 301)], Trial(settings, Database(settings))
    first, second = ([bool(each["result"]) for each in trial.shown(tasks, [answer() | {"model_version": version}
                      for _ in tasks], "7")] for version in ("one", "two"))  # fmt: skip
    assert first == second
    assert {False, True} == set(first)


def test_a_share_that_grows_holds_back_more_and_not_others(settings: Settings) -> None:
    """So that what was held back stays so; and planted errors are drawn for themselves."""
    little, more = (Trial(replace(settings, control_share=share), Database(settings)) for share in (0.1, 0.3))
    held = [{task for task in range(1, 1001) if trial.arm("7", task)} for trial in (little, more)]
    assert held[0] < held[1]
    planted = {task for task in range(1, 1001) if little.drawn("7", task, PLANTED) < 0.1}
    assert len(planted & held[0]) < 30


@pytest.mark.parametrize(
    "task",
    [{}, {"id": None}, {"id": "5"}, {"id": True}, {"id": -1}, {"id": 2**63}, {"id": 5.0}, "5", None],
    ids=str,
)
def test_what_has_no_number_of_label_studios_is_no_task_of_a_project(settings: Settings, task: Any) -> None:
    every = replace(settings, control_share=1.0)
    assert Trial(every, Database(every)).shown([task], [answer()], "7") == [answer()]


def test_what_says_nothing_stays_as_it_is(settings: Settings) -> None:
    """A task that failed is asked for again; one on which the model abstains keeps its low score."""
    every = replace(settings, control_share=1.0)
    given = [[], answer(0.004) | {"result": []}, answer()]
    shown = Trial(every, Database(every)).shown([{"id": 1}, {"id": 2}, {"id": 3}], given, "7")
    assert shown == [[], given[1], answer() | {"result": []}]
    assert [each.task for each in Trial(every, Database(every)).kept("7")] == [3]


class Away(Database):
    """A database that goes away when a test says so."""

    away = False

    def rows(self, statement: str, **values: Any) -> Any:
        if self.away:
            raise StateError("The database cannot be read (it does not answer).")
        return super().rows(statement, **values)

    def writing(self, key: str, wait_s: float = 1.0) -> Any:
        if self.away:
            raise StateError("The database cannot be written (it does not answer).")
        return super().writing(key, wait_s)


def test_while_the_database_is_away_nothing_is_shown_that_was_to_be_held_back(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """What is shown goes on; the others have no answer, so that Label Studio asks again once they can be kept."""
    half, database = replace(settings, control_share=0.5), Away(settings)
    trial, tasks = Trial(half, database), [{"id": number} for number in range(1, 41)]
    before = trial.shown(tasks, [answer() for _ in tasks], "7")
    database.away = True
    during = trial.shown(tasks, [answer() for _ in tasks], "7")
    assert during == [each if each["result"] else [] for each in before]
    assert trial.shown(tasks, [answer() for _ in tasks], "7") == during
    (line,) = caplog.messages
    assert line.startswith(f"Project 7: {during.count([])} tasks get no prediction for now, as what is held back of")
    assert "Mars" not in caplog.text
    database.away = False
    assert trial.shown(tasks, [answer() for _ in tasks], "7") == before


def test_nobody_draws_without_the_key(settings: Settings) -> None:
    """A process that never read it shows nothing of a project rather than what it must not; without a share, all."""
    database = Away(settings)
    database.away = True
    with pytest.raises(StateError, match=r"cannot be drawn without its key\. The database cannot be read"):
        Trial(settings, database).shown([{"id": 1}], [answer()], "7")
    silent = Trial(replace(settings, control_share=0.0), database)
    assert silent.shown([{"id": 1}], [answer()], "7") == [answer()]


def test_another_token_of_label_studio_changes_nothing(settings: Settings) -> None:
    """The key is not asked for again, as the database may be away by then."""
    services = build(settings)
    assert rebuild(services, replace(settings, label_studio_api_key="another")).trial is services.trial


def test_tasks_of_an_open_audit_are_labelled_blind(settings: Settings) -> None:
    """Whatever the shares are; of this project alone, and until the audit ends."""
    silent, database = replace(settings, control_share=0.0), Database(settings)
    trial = Trial(silent, database)
    trial.keep("7", [Unshown(1, "one", AUDITED, [MARS], 0.9, at=1.0, made="5")])
    with database.writing("7") as work:
        work.run("INSERT INTO audits (project, made, version, state, at, about)"
                 " VALUES ('7', '5', 'one', 'open', 1.0, '{}')")  # fmt: skip
    two = [{"id": 1}, {"id": 2}], [answer(), answer()]
    assert [bool(each["result"]) for each in trial.shown(*two, "7.5")] == [False, True]
    assert [bool(each["result"]) for each in trial.shown(*two, "7.6")] == [True, True]
    assert [bool(each["result"]) for each in trial.shown(*two, "8.5")] == [True, True]
    every = Trial(replace(settings, control_share=1.0), database)
    every.shown(*two, "7.5")
    kept = [(each.task, each.version[-3:], each.arm) for each in every.kept("7")]
    assert kept == [(1, "one", AUDITED), (1, "one", AUDITED), (2, "one", WITHHELD)]
    with database.writing("7") as work:
        work.run("UPDATE audits SET state = 'ended'")
    trial = Trial(silent, database)
    assert [bool(each["result"]) for each in trial.shown(*two, "7.5")] == [True, True]


def test_another_project_of_the_same_number_has_nothing_to_do_with_the_old_one(settings: Settings) -> None:
    """`prelabel` knows projects by their number alone: it means the one that is known."""
    every, database = replace(settings, control_share=1.0), Database(settings)
    trial, ledger = Trial(every, database), Ledger(database)
    ledger.confirm("7", "5")
    trial.shown([{"id": 1}], [answer()], "7")
    assert [(each.task, each.made) for each in trial.kept("7")] == [(1, "5")]
    trial.shown([{"id": 2}], [answer()], "7.6")  # before a worker has asked which it is
    assert [each.task for each in trial.kept("7")] == [1]
    assert [each.task for each in trial.kept("7", "6")] == [2]
    assert ledger.confirm("7", "6")
    assert [each.task for each in trial.kept("7")] == [2]
    ledger.forget("7")
    assert [each.task for each in trial.kept("7")] == [2], "Label Studio may be away only for us"
