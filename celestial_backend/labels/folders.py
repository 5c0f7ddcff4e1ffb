"""A folder of pictures: what of it counts, and which classes its sub-folders are named after."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from celestial_backend.labels.config import some

# What systems and programs put beside pictures, in lower case; so is all that is hidden.
IGNORED = frozenset(
    ("__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin",
     "system volume information", "lost+found", "node_modules")
)  # fmt: skip
SPLIT = re.compile(
    r"(train(ing)?|val(id(ation)?)?|dev(elopment)?|test(ing)?|eval(uation)?|hold[ _-]?out)"
    r"([ _-]?(set|split|data|images|pictures))?",
    re.IGNORECASE,
)


class Sorted(NamedTuple):
    """
    The files of a folder by class; all in the order of their names.

    Attributes:
        classes: The files of each, those of its own sub-folders too.
        loose: Those in no class.
        notes: Sentences about what was passed over, or understood.
        doubt: Why the sub-folders cannot be classes, and the way out, as a sentence; "" if they can.
    """

    classes: Mapping[str, Sequence[Path]]
    loose: Sequence[Path]
    notes: tuple[str, ...] = ()
    doubt: str = ""

    @property
    def files(self) -> list[Path]:
        """All of them, sorted."""
        return sorted([*self.loose, *(path for files in self.classes.values() for path in files)])

    def class_of(self) -> dict[Path, str]:
        """The class of each file that has one."""
        return {path: name for name, files in self.classes.items() for path in files}


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is none that a person has put beside pictures."""
    return name.startswith(".") or name.lower() in IGNORED


def files_in(folder: Path) -> list[Path]:
    """
    All files in a folder and its sub-folders, sorted, apart from ignored ones; links are followed, circles are not.

    What cannot be looked at is among them, a dangling link or a closed sub-folder.

    Raises:
        OSError: The folder itself cannot be read.
    """
    return sorted(_walk(folder, ()))


def by_class(folder: Path, wanted: Callable[[Path], bool] = lambda _: True) -> Sorted:
    """
    The files of a folder by the sub-folder that they lie in, however deep.

    Where the sub-folders are the parts of a split, such as ``train`` and ``val``, the classes are those inside them.

    Args:
        folder: With a sub-folder for each class.
        wanted: Whether a file is one of those that are looked for.

    Raises:
        OSError: The folder cannot be read.
    """
    parts = {path: path.relative_to(folder).parts for path in files_in(folder) if wanted(path)}
    tops = sorted({names[0] for names in parts.values() if len(names) > 1})
    splits = [name for name in tops if SPLIT.fullmatch(name)]
    depth = int(bool(splits) and splits == tops)
    classes: dict[str, list[Path]] = {}
    for path, names in parts.items():
        if len(names) > depth + 1:
            classes.setdefault(names[depth], []).append(path)
    classes = {name: classes[name] for name in sorted(classes)}
    loose = [path for path, names in parts.items() if len(names) <= depth + 1]
    notes = [f"{some(tops)} in {folder} are the parts of a split: what they hold of one class is put together."] * depth
    seen = {place for path in parts for place in (path, *path.parents)}
    if empty := sorted({place.name for place in _places(folder, tops if depth else ()) if place not in seen}):
        notes.append(f"{folder} has no pictures in {some(empty)}, so no class comes of that.")
    inner = {name: {parts[path][1] for path in files if len(parts[path]) > 2} for name, files in classes.items()}
    if not depth and len(inner) > 1 and len(shared := set.intersection(*inner.values())) > 1:
        notes.append(f"{some(classes)} are taken as the classes, and {some(sorted(shared))} in each of them as parts of"
                     " it. If it is the other way round, sort the pictures so.")  # fmt: skip
    return Sorted(classes, loose, tuple(notes), _doubt(folder, splits, tops, classes, loose))


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    own = folder.stat()
    above = (*above, (own.st_dev, own.st_ino))
    for path in folder.iterdir():
        if is_ignored(path.name):
            continue
        try:
            found = path.stat()
        except OSError:
            yield path
            continue
        if stat.S_ISREG(found.st_mode):
            yield path
        elif stat.S_ISDIR(found.st_mode) and (found.st_dev, found.st_ino) not in above:
            try:
                yield from _walk(path, above)
            except OSError:
                yield path


def _places(folder: Path, splits: Sequence[str]) -> list[Path]:
    """The sub-folders that may be classes."""
    found = []
    for place in [folder / name for name in splits] or [folder]:
        if os.access(place, os.R_OK):
            inside = (path for path in place.iterdir() if not is_ignored(path.name))
            found += [path for path in inside if os.path.isdir(path)]  # noqa: PTH112 - `is_dir` raises in a closed folder
    return found


def _doubt(
    folder: Path, splits: list[str], tops: list[str], classes: Mapping[str, Sequence[Path]], loose: Sequence[Path]
) -> str:
    if len(splits) > 1 and splits != tops:
        others = [name for name in tops if name not in splits]
        return (
            f"{some(splits)} in {folder} look like the parts of a split, and {some(others)} beside them do not. Move"
            " the others elsewhere, or rename the parts if they are classes."
        )
    if not classes and splits:
        return (
            f"{some(splits)} in {folder} look like the parts of a split, and hold no sub-folders named after classes."
            " Sort the pictures inside them into such, or rename the parts if they are classes."
        )
    if not classes and loose:
        return (
            f"{folder} holds {len(loose)} files, and none of them lies in a sub-folder named after a class. Sort them"
            " into one sub-folder for each class."
        )
    if len(classes) == 1:
        ((name, files),) = classes.items()
        inner = {place.name for path in files for place in path.parents if place.parent.name == name}
        if len(inner) > 1:
            place = next(place for path in files for place in path.parents if place.name == name)
            return (
                f"{folder} holds the one sub-folder {name!r}, and in it lie {some(sorted(inner))}. Give {place} if"
                " these are the classes."
            )
    return ""
