"""What people are shown, and what is held back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from celestial_backend.database import Database
from celestial_backend.settings import Settings
from celestial_backend.trust.trial import WITHHELD, Trial, Unshown

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
    assert [each.at for each in trial.kept("7")] == [4000.0]
