"""What a model says of its making: written under the same names as ever, and read back from any store."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from celestial_backend.models.manifest import (
    PASSED,
    ChoiceScore,
    Comparison,
    Counts,
    Fit,
    FolderCounts,
    Manifest,
    Scores,
    Taught,
    Unreadable,
)
from celestial_backend.models.registry import Registry
from celestial_backend.settings import MODEL_NAME

TAG, NETWORK = f"{MODEL_NAME}:project-7-0badcafe", f"{MODEL_NAME}:default-1"
FRESH = Comparison(
    pictures=0, champion_right=0, challenger_right=0, champion_log_loss=None, challenger_log_loss=None,
    gained=0, lost=0, p_worse=1.0, p_chance=0.01,
)  # fmt: skip
WHOLE = Manifest(
    tag=TAG,
    project="7",
    job="0badcafe",
    parent=NETWORK,
    decision=PASSED,
    reason="Published: 2 of 3 labels that it had not learned are right.",
    scores={
        "kind": Scores(
            labels=3, right=2, choices={"hat": ChoiceScore(3, 2)}, skill=0.5, p_chance=1e-05, fresh=FRESH,
            kept=Comparison(
                pictures=40, champion_right=39, challenger_right=38, champion_log_loss=0.1, challenger_log_loss=0.25,
                gained=0, lost=1, p_worse=0.5,
            ),
            of_all=Comparison(pictures=3, champion_right=1, gained=1, lost=0, p_worse=1.0),
        )
    },
    training={
        "kind": Fit(
            kind="logistic", features=["general", "own"], loss=0.3, losses={"logistic": 0.3, "discriminant": 0.4},
            folds=10, too_few={"sock": 1}, kept={}, doubted=0,
        )
    },
    suspects={},
    labels=Counts(
        tasks=3, annotations=4, labels={"kind": {"hat": 3}}, sources={"unaided": 3}, consensus={"one vote": 3},
        duplicates=0, unlabelled=5, annotations_left_out={}, pictures_left_out={"that cannot be had": 1},
        unreadable=[Unreadable(9, "It is no picture.")],
    ),
    digest="d1",
    annotations="1-3,9",
    taught={"kind": Taught(annotations="1-3", right=2, labels=3, sampled=[], said=""), "mood": Taught()},
    tried=None,
    accepted_weight=1.0,
    choices={"kind": ["hat", "shirt"]},
    embedder="lite0",
    base=NETWORK,
)  # fmt: skip
WRITTEN: dict[str, Any] = {
    "tag": TAG,
    "project": "7",
    "job": "0badcafe",
    "parent": NETWORK,
    "decision": "passed",
    "reason": "Published: 2 of 3 labels that it had not learned are right.",
    "scores": {
        "kind": {
            "labels": 3,
            "right": 2,
            "choices": {"hat": {"labels": 3, "right": 2}},
            "skill": 0.5,
            "p_chance": 1e-05,
            "kept": {
                "pictures": 40, "champion_right": 39, "challenger_right": 38, "champion_log_loss": 0.1,
                "challenger_log_loss": 0.25, "gained": 0, "lost": 1, "p_worse": 0.5,
            },
            "fresh": {
                "pictures": 0, "champion_right": 0, "challenger_right": 0, "champion_log_loss": None,
                "challenger_log_loss": None, "gained": 0, "lost": 0, "p_worse": 1.0, "p_chance": 0.01,
            },
            "all": {"pictures": 3, "champion_right": 1, "gained": 1, "lost": 0, "p_worse": 1.0},
        }
    },
    "training": {
        "kind": {
            "kind": "logistic", "features": ["general", "own"], "loss": 0.3,
            "losses": {"logistic": 0.3, "discriminant": 0.4}, "folds": 10, "too few labels": {"sock": 1}, "kept": {},
            "doubted": 0,
        }
    },
    "suspects": {},
    "labels": {
        "tasks": 3, "annotations": 4, "labels": {"kind": {"hat": 3}}, "sources": {"unaided": 3},
        "consensus": {"one vote": 3}, "duplicates merged": 0, "without a label": 5, "annotations left out": {},
        "pictures left out": {"that cannot be had": 1},
        "pictures that cannot be had": [{"task": 9, "reason": "It is no picture."}],
    },
    "digest": "d1",
    "annotations": "1-3,9",
    "taught": {"kind": {"annotations": "1-3", "right": 2, "labels": 3, "sampled": [], "said": ""}, "mood": {}},
    "tried": None,
    "accepted_weight": 1.0,
    "choices": {"kind": ["hat", "shirt"]},
    "embedder": "lite0",
    "base": NETWORK,
}  # fmt: skip
FOLDER = Manifest(labels=FolderCounts({"cool": 9, "warm": 11}, 2), choices={"": ["cool", "warm"]})


# What is written


def test_every_fact_has_its_name() -> None:
    """In this order and no other names: scripts, and stores of older releases, go by them."""
    assert json.dumps(WHOLE.plain()) == json.dumps(WRITTEN)


def test_what_is_not_told_is_not_written() -> None:
    """None where it means that there is none is written; a folder counts in its own way."""
    assert Manifest().plain() == {}
    assert Manifest(tried=None, suspects={}).plain() == {"tried": None, "suspects": {}}
    assert FOLDER.plain()["labels"] == {"labels": {"cool": 9, "warm": 11}, "left out": 2}


# What is read back


@pytest.mark.parametrize("manifest", [WHOLE, FOLDER, Manifest()], ids=["project", "folder", "nothing"])
def test_what_is_written_is_read_back(manifest: Manifest) -> None:
    """From the result of a job, which is JSON."""
    assert Manifest.of(json.loads(json.dumps(manifest.plain()))) == manifest


@pytest.mark.parametrize("manifest", [WHOLE, FOLDER, Manifest()], ids=["project", "folder", "nothing"])
def test_the_store_keeps_it(tmp_path: Path, manifest: Manifest) -> None:
    """But for None, which BentoML does not take."""
    registry = Registry(tmp_path)
    (tmp_path / "heads").mkdir()
    registry.add_heads(TAG, tmp_path / "heads", manifest)
    described = registry.describe(TAG)
    without_none = yaml.safe_load((registry.path(TAG) / "model.yaml").read_text())["metadata"]
    assert described.metadata == without_none == pruned(manifest.plain())
    assert described.manifest.plain() == without_none
    assert (described.parent, described.base) == (manifest.parent, manifest.base)


def pruned(value: Any) -> Any:
    """Without what is None."""
    if isinstance(value, dict):
        return {name: pruned(each) for name, each in value.items() if each is not None}
    return value


def test_unknown_facts_are_passed_over() -> None:
    """A newer release, or somebody else, may tell more: of the whole, and of each part."""
    more = json.loads(json.dumps(WRITTEN)) | {"colour": "blue"}
    for part in (more["scores"]["kind"], more["training"]["kind"], more["taught"]["kind"], more["labels"]):
        part["colour"] = {"red": [1]}
    assert Manifest.of(more) == WHOLE


@pytest.mark.parametrize("told", [None, [], 3, "text", {}, {3: 4}, {None: None}, {"Tag": "a:b"}])
def test_what_is_no_manifest_tells_nothing(told: object) -> None:
    assert Manifest.of(told) == Manifest()


STRANGE = (None, True, 7, -1, 10**400, 0.5, "words", "\ud800", b"bytes", [3], [None], {"x": 3}, {3: {}}, {"kind": None},
           {"kind": {"x": 1}}, {"kind": [[]]}, date(2026, 11, 29), {1, 2}, object())  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_a_mistyped_fact_counts_as_not_told(name: str) -> None:
    """Whatever stands in its place, the others are read, and what is read can be written."""
    others = {each: fact for each, fact in WRITTEN.items() if each != name}
    for strange in STRANGE:
        found = Manifest.of(others | {name: strange})
        kept = found.plain()
        kept.pop(name, None)
        assert kept == others
        assert json.loads(json.dumps(found.plain())) == found.plain()


@pytest.mark.parametrize("name", WRITTEN["scores"]["kind"]["fresh"])
def test_a_comparison_is_told_whole_or_not(name: str) -> None:
    """One without a number that every comparison has is none; the scores are told without it."""
    broken = json.loads(json.dumps(WRITTEN))
    broken["scores"]["kind"]["fresh"][name] = "many"
    scores = (Manifest.of(broken).scores or {})["kind"]
    assert (scores.labels, scores.right, scores.kept) == (3, 2, (WHOLE.scores or {})["kind"].kept)
    optional = {"challenger_right", "champion_log_loss", "challenger_log_loss", "p_chance"}
    assert (scores.fresh is not None) == (name in optional)


@pytest.mark.parametrize("text", ["1-", "a", "1,,2", "-3", "1 2", "9" * 19, 4, ["1-3"]])
def test_numbers_that_cannot_be_read_are_not_told(text: object) -> None:
    """What else is told of the head stays."""
    taught = Manifest.of({"taught": {"kind": {"annotations": text, "said": text, "right": 2, "labels": 3}}}).taught
    assert taught == {"kind": Taught(right=2, labels=3)}


def test_a_control_whose_entry_is_no_good_costs_no_other() -> None:
    """Of two controls one was edited by hand; a name that is no text is no control."""
    told = {"choices": {"kind": ["hat"], "mood": "warm", 3: ["three"]}, "taught": {"kind": {"right": 1}, "mood": 7}}
    assert Manifest.of(told) == Manifest(choices={"kind": ["hat"]}, taught={"kind": Taught(right=1)})


def test_a_network_tells_its_classes() -> None:
    """The default model's description is one of its own training: what else it tells is not ours."""
    card = {"classes": ["Earth", "Moon"], "metrics": {"accuracy": 1.0}, "training": {"seconds": 5}, "size_px": [72, 72]}
    found = Manifest.of(card)
    assert (found.classes, found.choices, found.training) == (["Earth", "Moon"], None, {})
