"""The live model of a project: one file, changed in one step."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from celestial_backend.errors import RequestError, StateError
from celestial_backend.models.store import Pointer, Pointers


def test_a_project_without_a_pointer_has_none(tmp_path: Path) -> None:
    """It works with the model of the settings."""
    assert Pointers(tmp_path).read("3") is None
    assert Pointers(tmp_path).projects() == {}


def test_another_process_sees_what_was_written(tmp_path: Path) -> None:
    """Nothing is remembered in between, so every process sees it at its next request."""
    reader = Pointers(tmp_path)
    for pointer in (Pointer("a:1", "0badcafe"), Pointer("a:2")):
        Pointers(tmp_path).write("3", pointer)
        assert reader.read("3") == pointer
    Pointers(tmp_path).write("12", Pointer("a:3"))
    assert list(reader.projects().items()) == [("3", "a:2"), ("12", "a:3")]


def test_a_reader_never_sees_half_a_pointer(tmp_path: Path) -> None:
    """Whoever reads while others write gets one of the tags, whole."""
    pointers = Pointers(tmp_path)
    tags = [f"model:{letter * 2000}" for letter in "ab"]
    pointers.write("3", Pointer(tags[0]))
    done = threading.Event()

    def write() -> None:
        for turn in range(300):
            pointers.write("3", Pointer(tags[turn % 2]))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        found = pointers.read("3")
        assert found is not None
        seen.add(found.tag)
    writer.join()
    assert seen <= set(tags)


@pytest.mark.parametrize("project", ["", "../../etc/passwd", "3/../4", "٣", "-1", "3.json", "03", "9" * 19, "3" * 4301])
def test_a_strange_project_has_no_pointer(tmp_path: Path, project: str) -> None:
    """A request may name anything as its project: no other file is read for it, and none is made."""
    pointers = Pointers(tmp_path)
    pointers.write("3", Pointer("a:1"))
    assert pointers.read(project) is None
    with pytest.raises(RequestError, match="must be a whole number from 1 to 9223372036854775807, got "):
        pointers.write(project, Pointer("a:2"))
    assert pointers.projects() == {"3": "a:1"}


@pytest.mark.parametrize("name", ["none.json", "3 copy.json", "-1.json", "03.json"])
def test_a_file_that_is_no_pointer_is_passed_over(tmp_path: Path, name: str) -> None:
    """It costs those that are pointers nothing."""
    Pointers(tmp_path).write("3", Pointer("a:1"))
    (tmp_path / "live" / name).write_text('{"tag": "a:2"}')
    assert Pointers(tmp_path).projects() == {"3": "a:1"}


def test_a_damaged_pointer_is_said_with_its_remedy(tmp_path: Path) -> None:
    """It is not taken for a project that has none: another model would be served silently."""
    Pointers(tmp_path).write("3", Pointer("a:1"))
    (tmp_path / "live" / "3.json").write_text('{"tag": "a')
    with pytest.raises(StateError, match=r"project 3 cannot be read .* models use TAG --project 3"):
        Pointers(tmp_path).read("3")


def test_a_pointer_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a disk that is full at the last moment; and no half one lies beside it."""
    Pointers(tmp_path).write("3", Pointer("a:1"))

    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StateError, match="project 3 cannot be changed"):
        Pointers(tmp_path).write("3", Pointer("a:2"))
    assert Pointers(tmp_path).read("3") == Pointer("a:1")
    assert [path.name for path in (tmp_path / "live").iterdir()] == ["3.json"]
