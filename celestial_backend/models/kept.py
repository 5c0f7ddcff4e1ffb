"""
The models that the database keeps, so that every machine can serve what one of them has trained.

Each is the archive of a model's folder in the BentoML store, in parts. A machine that lacks a model unpacks it into its
own store when it is asked for: whole or not at all, and only plain files, whatever the names in the archive say.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import tarfile
import tempfile
import time
import weakref
import zlib
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from io import SEEK_END, BufferedIOBase, BytesIO
from itertools import count
from lzma import LZMAError
from pathlib import Path

from celestial_backend.database import Database, Transaction
from celestial_backend.errors import ModelError, ModelLoadError, StateError
from celestial_backend.models import headed
from celestial_backend.models.registry import ASKED_FOR, Described, Registry, disk, tag_of
from celestial_backend.models.saved import description_in
from celestial_backend.settings import MODEL_NAME, project_of

logger = logging.getLogger(__name__)
PART_BYTES = 4_000_000
PART_S = 30.0  # in which a part must have come, over the slowest line
LARGE_BYTES = 1_000_000  # models above it come one at a time, and smaller ones wait for none of them
MAX_BYTES = 200_000_000  # of a file that a person adds
ADD_S = 30.0  # for others that write, while a person waits
AGAIN_S = 30.0  # a damaged model is looked at again after this long
OF_PROJECT = "SELECT tag FROM models WHERE project = :project"
BODY = "SELECT body FROM bodies WHERE tag = :tag AND part = :part"
TAG = re.compile(r"[A-Za-z0-9][\w.-]*:[A-Za-z0-9][\w.-]*", re.ASCII)
NO_ARCHIVE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, LZMAError, EOFError, ValueError)


class SharedRegistry(Registry):
    """The models of one store, and those that the database keeps for all machines."""

    def __init__(self, bentoml_home: Path, database: Database, *, look_only: bool = False) -> None:
        """
        Args:
            bentoml_home: As for `Registry`.
            database: Keeps models.
            look_only: What comes from the database goes into a folder that is gone with this object.
        """
        super().__init__(bentoml_home)
        self._database = database
        self._look_only = look_only
        self._told: dict[str, Described | None] = {}  # by the tag, of models that are not on this machine
        self._ask_again: dict[str, float] = {}  # by the tag, on the monotonic clock

    def path(self, tag: str) -> Path:
        """
        The folder of a model, whether it is there or not; it is, if the database keeps the model.

        Raises:
            ModelError: The store cannot be read or written.
            StateError: It is not on this machine, and the database cannot be read.
        """
        if self.here(tag) or not self._bring(tag):
            return self.place(tag)
        return self._into.place(tag)

    def holds(self, tag: str) -> bool:
        """Whether a model is there; it comes from the database if need be. Raises as `path`."""
        return self.here(tag) or self._bring(tag)

    def keeps(self, tag: str) -> bool:
        """Whether the database keeps a model, as it does those of all trainings that have ended. Raises as `models`."""
        return self._database.row("SELECT 1 FROM models WHERE tag = :tag", tag=tag) is not None

    def models(self, name: str = MODEL_NAME) -> list[Described]:
        """
        The models of a name that can be read, also those that are on other machines, the oldest first.

        Raises:
            StateError: The database cannot be read.
        """
        found = {model.tag: model for model in self.on_this_machine(name)}
        kept = [row["tag"] for row in self._database.rows("SELECT tag FROM models ORDER BY tag")]
        told = {tag: self._told.get(tag) or self._describe(tag) for tag in kept if tag not in found}
        self._told = told
        found |= {tag: each for tag, each in told.items() if each is not None and tag.startswith(f"{name}:")}
        return sorted(found.values(), key=lambda model: (model.created, model.tag))

    @cached_property
    def _into(self) -> Registry:
        """Where models come that are not on this machine."""
        if not self._look_only:
            return self
        place = tempfile.mkdtemp(prefix="celestial-")
        weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
        return Registry(Path(place))

    def _describe(self, tag: str) -> Described | None:
        """What the database tells of a model; None of one that is gone or damaged."""
        row = self._database.row("SELECT made, metadata FROM models WHERE tag = :tag", tag=tag)
        with suppress(ValueError, TypeError):
            if row is not None and isinstance(metadata := json.loads(row["metadata"]), dict):
                return Described(tag, row["made"], metadata)
        return None

    def _bring(self, tag: str) -> bool:
        """Unpack a model of the database on this machine; False if it keeps none of that tag, or a damaged one."""
        if self._into.here(tag):
            return True
        if not TAG.fullmatch(tag) or time.monotonic() < self._ask_again.get(tag, 0.0):
            return False
        row = self._database.row("SELECT size, digest FROM models WHERE tag = :tag", tag=tag)
        if row is None:
            return False
        try:
            with self._into.alone("large" if row["size"] > LARGE_BYTES else "small"):
                if not self._into.here(tag):
                    with self._into.arriving(tag) as folder:
                        self._unpack(tag, row["digest"], folder)
                        os.utime(folder / "model.yaml", (ASKED_FOR, ASKED_FOR))
                    logger.info("%s came from the database", tag)
                    with suppress(StateError):  # the next one that comes makes up for it
                        self._tidy(project_of(tag))
        except ModelLoadError as error:
            logger.error("%s", error)  # noqa: TRY400 - the sentence says it
            self._ask_again[tag] = time.monotonic() + AGAIN_S
            return False
        return True

    def _tidy(self, project: str | None) -> None:
        """Remove what came of a project's models earlier, and is not in the database any more."""
        kept = {row["tag"] for row in self._database.rows(OF_PROJECT, project=project or "")}
        for tag in (f"{MODEL_NAME}:{version}" for version in self._into.versions(MODEL_NAME)):
            if project_of(tag) == project and tag not in kept and self._into.came_for_its_tag(tag):
                self._into.remove(tag)

    def _unpack(self, tag: str, digest: str, folder: Path) -> None:
        """
        Write the files of a model of the database into a folder.

        Raises:
            ModelLoadError: It is damaged.
        """
        with tempfile.TemporaryFile(dir=folder.parent) as file:
            for part in count():
                row = self._database.row(BODY, answer_s=PART_S, tag=tag, part=part)
                if row is None:
                    break
                file.write(row["body"])
            if digest_of(file) == digest and unpack(file, folder) and (folder / "model.yaml").is_file():
                return
        raise ModelLoadError(
            f"The model {tag} in the database is damaged. Train its project again, or choose another model with: "
            "python -m celestial_backend models use TAG --project N"
        )


def keep(registry: Registry, tag: str, transaction: Transaction) -> None:
    """
    Put a model of this machine into the database, with the model whose features it needs if that is one of ours.

    Raises:
        ModelError: It cannot be read.
    """
    described = replace(registry.describe(tag), tag=tag)
    with disk("read"):
        packed = _pack(registry.place(tag))
    write(described, packed, transaction)
    if described.base is not None and _ours(described.base) and registry.here(described.base):
        keep(registry, described.base, transaction)


def keep_small(registry: Registry, tag: str, database: Database) -> bool:
    """
    Put a model of this machine into the database if it is small enough; gives whether it was.

    Raises:
        ModelError: It cannot be read.
        StateError: The database cannot be written.
    """
    with disk("read"):
        size = sum(path.stat().st_size for path in registry.place(tag).rglob("*") if path.is_file())
    if size > MAX_BYTES:
        return False
    with database.writing(tag, ADD_S) as transaction:
        keep(registry, tag, transaction)
    return True


def check_size(archive: Path) -> None:
    """
    Refuse a file that is too large for the database.

    Raises:
        ModelError: It is.
    """
    size = archive.stat().st_size
    if size > MAX_BYTES:
        raise ModelError(
            f"A model in the database may have {MAX_BYTES / 1e6:g} MB, and {archive.name} has {size / 1e6:.0f} MB. "
            "Name the file with CELESTIAL_BENTOMODEL on every machine instead."
        )


def add(registry: Registry, archive: Path, database: Database) -> str:
    """
    Put an exported model into the database; gives its tag.

    Raises:
        ModelError: Its tag is that of another model.
        StateError: The database cannot be written.
    """
    tag = tag_of(archive)
    with archive.open("rb") as file, tempfile.TemporaryDirectory() as place:
        described = _described(Path(place)) if unpack(file, Path(place)) else None
        if described is None or described.tag != tag or not TAG.fullmatch(tag):
            raise ModelLoadError(f"{archive.name} must hold nothing but the files of one model. Export it again.")
        if registry.holds(tag) and _contents(registry.path(tag)) != _contents(Path(place)):
            raise ModelError(f"There is another model {tag} already. Export this one under another version.")
        with database.writing(tag, ADD_S) as transaction:
            write(described, file, transaction)
    return tag


def belongs_to_all_machines(registry: Registry, tag: str) -> bool:
    """Whether a model was trained from labels, so that other machines can have it from the database alone."""
    return registry.here(tag) and (project_of(tag) is not None or headed.is_headed(registry.place(tag)))


def write(described: Described, file: BufferedIOBase, transaction: Transaction) -> None:
    """Put a model's archive into the database, in the place of one that is there under its tag."""
    tag, digest, size = described.tag, digest_of(file), file.seek(0, SEEK_END)
    there = transaction.row("SELECT digest FROM models WHERE tag = :tag", tag=tag)
    if there is not None and there["digest"] == digest:
        return
    remove(tag, transaction)
    file.seek(0)
    for part, body in enumerate(iter(lambda: file.read(PART_BYTES), b"")):
        transaction.run("INSERT INTO bodies (tag, part, body) VALUES (:tag, :part, :body)",
                        tag=tag, part=part, body=body)  # fmt: skip
    transaction.run(
        "INSERT INTO models (tag, project, made, size, digest, metadata)"
        " VALUES (:tag, :project, :made, :size, :digest, :metadata)",
        tag=tag, project=described.project or "", made=described.created, size=size, digest=digest,
        metadata=json.dumps(described.metadata, default=str, skipkeys=True),
    )  # fmt: skip


def remove(tag: str, transaction: Transaction) -> None:
    """Remove a model from the database, if it is there."""
    transaction.run("DELETE FROM bodies WHERE tag = :tag", tag=tag)
    transaction.run("DELETE FROM models WHERE tag = :tag", tag=tag)


def digest_of(file: BufferedIOBase) -> str:
    """Changes with what is in a file."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(file: BufferedIOBase, folder: Path) -> bool:
    """Write an archive's files into an empty folder; False if it is none, or holds anything but files for there."""
    file.seek(0)
    try:
        with tarfile.open(fileobj=file) as tar:
            for member in tar:
                path = (folder / member.name).resolve()
                if member.isdir():
                    continue
                data = tar.extractfile(member) if member.isreg() and path.is_relative_to(folder.resolve()) else None
                if data is None or path.exists():
                    return False
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as unpacked:
                    shutil.copyfileobj(data, unpacked)
    except NO_ARCHIVE:
        return False
    return True


def _pack(folder: Path) -> BytesIO:
    """A folder's files as an archive; always the same for the same files."""
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                data = path.read_bytes()
                member = tarfile.TarInfo(path.relative_to(folder).as_posix())
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    return packed


def _contents(folder: Path) -> dict[str, object]:
    """What is the same for two copies of a model; BentoML writes its description anew when it imports one."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    del files["model.yaml"]
    found: dict[str, object] = {"": _described(folder)}
    for name, path in files.items():
        with path.open("rb") as file:
            found[name] = digest_of(file)
    return found


def _described(folder: Path) -> Described | None:
    """What a model's folder says of it; None where it says nothing."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        return Described.of(description_in((folder / "model.yaml").read_bytes()))
    return None


def _ours(tag: str) -> bool:
    """Whether a network is a default model, which a machine of another release lacks, or one of a project."""
    return tag.partition(":")[2].startswith("default-") or project_of(tag) is not None
