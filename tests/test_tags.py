"""What is the number of a project, and what the tags of models say of theirs."""

from __future__ import annotations

import pytest

from celestial_backend.settings import MODEL_NAME
from celestial_backend.tags import is_project, no_project, project_of, project_tag

STRANGE = ["", "0", "0007", "-1", "+7", " 7", "7 ", "7\n", "7.0", "1_000", "x", "٣", "१२", "7²", str(2**63), "9" * 20,
           "1" * 4301, None, 7, 7.0, b"7", ["7"]]  # fmt: skip


@pytest.mark.parametrize("text", ["1", "7", "10", "9876543210", str(2**63 - 1)])
def test_a_number_of_label_studio_is_one(text: str) -> None:
    """Every number that a database can give to a project."""
    assert is_project(text)


@pytest.mark.parametrize("text", STRANGE, ids=lambda text: repr(text)[:20])
def test_anything_else_is_none(text: object) -> None:
    """Also what Python's int() would take, so that a project never has two names."""
    assert not is_project(text)


def test_two_million_digits_are_refused() -> None:
    """The length is looked at before the number; int() refuses more than 4,300 digits with an error of its own."""
    assert not is_project("1" * 2_000_000)
    assert len(no_project("1" * 2_000_000)) < 300


@pytest.mark.parametrize("version", ["project-7-0badcafe", "project-0007-0badcafe"])
def test_no_models_of_a_project_are_for_all(version: str) -> None:
    """Also those that an older release has trained under a text that is no number."""
    assert project_of(f"{MODEL_NAME}:{version}") == version.split("-")[1]
    assert project_of(project_tag("7", "0badcafe")) == "7"
    assert project_of(f"{MODEL_NAME}:default-0badcafe") is None
