"""What of a folder counts, and which classes its sub-folders are: as people unpack, sort and share pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from celestial_backend.labels import by_class, files_in
from celestial_backend.studio.setup import pictures_by_class

CAT_AND_DOG = {"cat": ["a.png"], "dog": ["b.png"]}


def laid_out(folder: Path, files: Sequence[str]) -> Path:
    """A folder with these files; a name that ends with a slash is an empty folder."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "cat/.DS_Store", "cat/._a.png", "cat/Thumbs.db", "THUMBS.DB", "desktop.ini", ".hidden.png",
        "__MACOSX/cat/._a.png", "__MACOSX/cat/a.png", ".ipynb_checkpoints/a-checkpoint.png", ".git/objects/a",
        "cat/.ipynb_checkpoints/a-checkpoint.png", "cat/@eaDir/a.png/thumb.png", "__pycache__/a.pyc",
    ],
)  # fmt: skip
def test_what_programs_put_beside_pictures_is_ignored(tmp_path: Path, name: str) -> None:
    """It is no picture, no class, and nothing that a word is lost about."""
    found = by_class(laid_out(tmp_path / "pictures", ["cat/a.png", "dog/b.png", name]))
    assert {key: [path.name for path in paths] for key, paths in found.classes.items()} == CAT_AND_DOG
    assert (found.loose, found.notes, found.doubt) == ([], (), "")


@pytest.mark.parametrize(
    "parts",
    [
        ("train", "val", "test"), ("training", "validation"), ("TRAIN", "Val"), ("Train_Set", "test-set"), ("train",),
        ("training_data", "eval"), ("dev", "test images", "train"), ("holdout", "train"),
    ],
)  # fmt: skip
def test_the_parts_of_a_split_are_no_classes(tmp_path: Path, parts: tuple[str, ...]) -> None:
    """Their classes are put together, and it is said; a part without classes leaves its files in none."""
    files = [f"{part}/{name}/{part}{name}.png" for part in parts for name in ("cat", "dog")]
    found = by_class(laid_out(tmp_path / "pictures", [*files, f"{parts[0]}/loose.png", f"{parts[-1]}/bird/deep/x.png"]))
    assert {key: len(paths) for key, paths in found.classes.items()} == {
        "bird": 1, "cat": len(parts), "dog": len(parts)
    }  # fmt: skip
    assert [path.name for path in found.loose] == ["loose.png"]
    (note,) = found.notes
    assert "parts of a split" in note
    assert all(repr(part) in note for part in parts)
    assert found.doubt == ""


@pytest.mark.parametrize(
    ("files", "doubt"),
    [
        pytest.param(["train/a.png", "val/b.png"], "hold no sub-folders named after classes", id="a split, flat"),
        pytest.param(["train/cat/a.png", "val/cat/b.png", "more/cat/c.png"], "['more'] beside them do not", id="more"),
        pytest.param(["a.png", "b.png"], "none of them lies in a sub-folder named after a class", id="no sub-folder"),
        pytest.param(["pets/cat/a.png", "pets/dog/b.png"], "Give {folder}/pets if these are", id="one folder around"),
        pytest.param(["x/train/cat/a.png", "x/val/cat/b.png"], "Give {folder}/x if these are", id="around a split"),
    ],
)
def test_sub_folders_that_are_no_classes_are_doubted(tmp_path: Path, files: list[str], doubt: str) -> None:
    """The sentence names them, and the way out."""
    assert doubt.format(folder=tmp_path / "pictures") in by_class(laid_out(tmp_path / "pictures", files)).doubt


def test_a_class_may_be_called_like_a_part(tmp_path: Path) -> None:
    """Among others that are not, one name is a class."""
    found = by_class(laid_out(tmp_path / "pictures", ["train/a.png", "bus/b.png", "car/c.png"]))
    assert (list(found.classes), found.doubt, found.notes) == (["bus", "car", "train"], "", ())


def test_what_cannot_be_looked_at_hides_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose files may be listed and not opened: its pictures are among all, and the notes are no pictures."""
    look = Path.stat

    def closed(path: Path, **how: bool) -> os.stat_result:
        if path.parent.name == "closed":
            raise PermissionError(13, "Permission denied")
        return look(path, **how)

    folder = laid_out(tmp_path / "pictures", ["cat/a.png", "dog/b.png", "closed/c.png", "closed/notes.txt"])
    monkeypatch.setattr(Path, "stat", closed)
    found = pictures_by_class(folder)
    assert {key: [path.name for path in paths] for key, paths in found.classes.items()} == CAT_AND_DOG | {
        "closed": ["c.png"]
    }
    assert found.notes == ()


def test_a_folder_that_is_closed_is_not_called_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows; it is among what is in no class."""
    look = Path.iterdir

    def closed(path: Path) -> Iterator[Path]:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return look(path)

    folder = laid_out(tmp_path / "pictures", ["cat/a.png", "dog/b.png", "closed/"])
    monkeypatch.setattr(Path, "iterdir", closed)
    found = by_class(folder)
    assert (found.loose, found.notes) == ([folder / "closed"], ())


@pytest.mark.parametrize(
    ("files", "empty"),
    [
        pytest.param(["cat/a.png", "dog/b.png", "bird/", "fish/deep/"], "['bird', 'fish']", id="classes"),
        pytest.param(["train/cat/a.png", "val/dog/b.png", "val/bird/"], "['bird']", id="in a part"),
    ],
)
def test_empty_class_folders_are_named(tmp_path: Path, files: list[str], empty: str) -> None:
    found = by_class(laid_out(tmp_path / "pictures", files))
    assert list(found.classes) == ["cat", "dog"]
    assert f"{tmp_path / 'pictures'} has no pictures in {empty}" in found.notes[-1]


def test_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    """A dangling link is among the files, so that whoever reads them says so."""
    away = laid_out(tmp_path / "away", ["b.png"])
    folder = laid_out(tmp_path / "pictures", ["cat/a.png"])
    (folder / "dog").symlink_to(away)
    (folder / "cat" / "circle").symlink_to(folder)
    (folder / "cat" / "gone.png").symlink_to("nowhere")
    os.mkfifo(folder / "cat" / "pipe.png")
    assert [str(path.relative_to(folder)) for path in files_in(folder)] == ["cat/a.png", "cat/gone.png", "dog/b.png"]


def test_deeper_folders_belong_to_the_class_around_them(tmp_path: Path) -> None:
    files = ["cat/2023/may/a.png", "cat/train/b.png", "dog/c.png", "dog/val/d.png"]
    found = by_class(laid_out(tmp_path / "pictures", files))
    assert {name: len(paths) for name, paths in found.classes.items()} == {"cat": 2, "dog": 2}


def test_sub_folders_that_are_alike_in_each_class_are_pointed_out(tmp_path: Path) -> None:
    """They may be the classes; which ones are cannot be known."""
    files = [f"{part}/{name}/{name}.png" for part in ("first", "second") for name in ("cat", "dog")]
    found = by_class(laid_out(tmp_path / "pictures", files))
    assert list(found.classes) == ["first", "second"]
    assert "['first', 'second'] are taken as the classes, and ['cat', 'dog'] in each of them" in found.notes[0]
