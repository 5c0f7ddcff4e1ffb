"""
The BentoML store's folder of models: which are there, what they say of themselves, and adding to it.

Tags and descriptions are read from BentoML's own files, and from files that `bentoml.models.export_model` wrote, so
they are known without importing it. Models trained for one project lie beside the others, and are never anybody
else's latest.
"""

from __future__ import annotations

import fcntl
import json
import logging
import platform
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from lzma import LZMAError
from pathlib import Path
from typing import Any

import yaml

from celestial_backend.errors import ModelError, ModelLoadError
from celestial_backend.models.classifier import HEADS_FILE, MADE_FROM
from celestial_backend.models.manifest import Calibration, Manifest
from celestial_backend.models.saved import DESCRIPTION, Saved, described, description_in, version
from celestial_backend.pictures import hooks
from celestial_backend.pictures.hooks import Postprocess, Preprocess
from celestial_backend.planets import network
from celestial_backend.settings import MODEL_NAME, project_of
from celestial_backend.state import reason, replace_text

logger = logging.getLogger(__name__)

UNREADABLE = (OSError, EOFError, ValueError, LookupError, TypeError, StopIteration, tarfile.TarError, LZMAError)
DESCRIBE = {"model.yaml", HEADS_FILE}
ASKED_FOR = 0.0  # when the description of a copy from the database was written
SAVING, SAVING_MAX_S = "saving-", 3600.0
STORE_REMEDY = "Set BENTOML_HOME to a folder that this user can read and write, with space on its disk."


def tag_of(archive: Path) -> str:
    """
    The tag of an exported model, read from the description inside it, without BentoML.

    Raises:
        ModelLoadError: The file is no such archive, or not a whole one.
    """
    try:
        with tarfile.open(archive) as tar:
            member = next(member for member in tar if Path(member.name).name == "model.yaml")
            kept = tar.extractfile(member)
            described = description_in(kept.read() if kept else b"")
        return f"{described['name']}:{described['version']}"
    except UNREADABLE as error:
        raise ModelLoadError(_not_exported(archive, error)) from error


def outline(archive: Path, place: Path) -> None:
    """
    Write the files of an exported model into an empty folder without what is in them, but for those that describe it.

    Raises:
        ModelLoadError: As for `tag_of`.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = (place / member.name).resolve()
                if member.isfile() and path.is_relative_to(place.resolve()):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    kept = tar.extractfile(member) if path.name in DESCRIBE else None
                    path.write_bytes(kept.read() if kept else b"")
    except UNREADABLE as error:
        raise ModelLoadError(_not_exported(archive, error)) from error


def import_into(store: Any, archive: Path) -> None:
    """
    Import an exported model into a store of BentoML, under the tag it was exported with.

    Raises:
        ModelLoadError: BentoML cannot read the file.
    """
    import bentoml

    try:
        tag = bentoml.models.import_model(str(archive), _model_store=store).tag
    except Exception as error:  # BentoML lets through whatever the archive causes
        raise ModelLoadError(_not_exported(archive, error)) from error
    logger.info("Imported %s from CELESTIAL_BENTOMODEL", tag)


def _not_exported(archive: Path, error: Exception) -> str:
    return (
        f"A model's file must be one that bentoml.models.export_model wrote, and {archive.name} is none "
        f"({type(error).__name__}). Export it again."
    )


@dataclass(frozen=True)
class Described:
    """A model of the store and its metadata; `created` is ISO text in UTC."""

    tag: str
    created: str
    metadata: dict[str, Any]

    @classmethod
    def of(cls, found: dict[str, Any]) -> Described:
        """
        What a description of BentoML's says.

        Raises:
            KeyError, TypeError: It lacks what each has.
        """
        return cls(f"{found['name']}:{found['version']}", str(found.get("creation_time", "")),
                   found.get("metadata") or {})  # fmt: skip

    @cached_property
    def manifest(self) -> Manifest:
        """What of its metadata is known here."""
        return Manifest.of(self.metadata)

    @property
    def project(self) -> str | None:
        """The project that it was trained for, None for a model of all projects."""
        return project_of(self.tag)

    @property
    def parent(self) -> str | None:
        """The tag of the model that it was trained from."""
        return self.manifest.parent

    @property
    def base(self) -> str | None:
        """The tag of the network whose features its heads need, None for other models."""
        return self.manifest.base

    @property
    def calibrated(self) -> bool:
        """Whether its scores were made to say how often it is right: all of ours, and others where somebody did so."""
        told = self.manifest
        ours = told.embedder is not None or MADE_FROM in self.metadata or network.is_ours(self.metadata)
        return ours or told.calibration is not None


@dataclass(frozen=True)
class _Aside:
    place: Path
    store: Any  # BentoML's, in that place


class Registry:
    """The models of one store; safe between threads and processes, and across a fork."""

    def __init__(self, bentoml_home: Path) -> None:
        self._models = bentoml_home / "models"

    def path(self, tag: str) -> Path:
        """The folder of a model, whether it is there or not."""
        return self.place(tag)

    def place(self, tag: str) -> Path:
        """As `path`, and always of this machine."""
        name, _, number = tag.partition(":")
        return self._models / name / number

    def holds(self, tag: str) -> bool:
        """
        Whether a model is there; it appears whole, in one step.

        Raises:
            ModelError: The store cannot be read.
        """
        return self.here(tag)

    def here(self, tag: str) -> bool:
        """As `holds`, and always of this machine."""
        with disk("read"):
            return (self.place(tag) / "model.yaml").is_file()

    def versions(self, name: str) -> list[str]:
        """The versions of a model, in the order of their names."""
        with disk("read"):
            return sorted(path.parent.name for path in (self._models / name).glob("*/model.yaml"))

    def latest(self, name: str) -> str | None:
        """The version that BentoML calls the latest; the newest of all projects' models where it is one project's."""
        with disk("read"):
            found = _text(self._models / name / "latest").strip()
        if found and not project_of(f"{name}:{found}") and self.here(f"{name}:{found}"):
            return found
        shared = [number for number in self.versions(name) if self._is_shared(f"{name}:{number}")]
        return max(shared, key=lambda number: self._saved_at(f"{name}:{number}"), default=None)

    def describe(self, tag: str) -> Described:
        """
        A model's description.

        Raises:
            ModelError: It cannot be read.
        """
        path = self.path(tag) / "model.yaml"
        try:
            return _described(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"The description of {tag} cannot be read ({type(error).__name__}). "
                f"Remove it with `bentoml models delete {tag}` and save it again."
            ) from error

    def models(self, name: str = MODEL_NAME) -> list[Described]:
        """The models of a name that can be read, the oldest first."""
        return self.on_this_machine(name)

    def on_this_machine(self, name: str = MODEL_NAME) -> list[Described]:
        """As `models`, and always of this machine."""
        found = []
        for number in self.versions(name):
            try:
                found.append(self.describe(f"{name}:{number}"))
            except ModelError:
                continue
        return sorted(found, key=lambda model: (model.created, model.tag))

    def add(
        self,
        tag: str,
        folder: Path,
        preprocess: Callable[..., Any],
        postprocess: Callable[..., Any],
        metadata: dict[str, Any],
        *,
        latest: bool = True,
    ) -> str:
        """
        Save a network's plain files as a BentoML model, readable by `bentoml.keras.load_model` too.

        The code of preprocess and postprocess goes with it, so that a process without this package can use it.
        This package reads no code of its own networks: by `network.hooks` the description says enough.

        Args:
            tag: Its name, and the version unless BentoML shall make one. What a save that was
                killed has left under it is replaced.
            folder: Holds `network.FILES`.
            preprocess: Picture to network input.
            postprocess: Network output to named probabilities.
            metadata: Anything that JSON can hold.
            latest: Whether it is the store's latest from now on; a project's never is.

        Returns:
            The tag.
        """
        import bentoml

        with disk("written"), self._aside() as aside:
            with bentoml.models.create(
                tag,
                module="bentoml.keras",
                context=bentoml.models.ModelContext(
                    framework_name="keras", framework_versions={"tensorflow": version("tensorflow")}
                ),
                custom_objects={"preprocess": preprocess, "postprocess": postprocess},
                external_modules=[hooks],
                metadata=_plain(json.loads(json.dumps(metadata))),  # lists for tuples: plain YAML, no Python in it
                _model_store=aside.store,
            ) as model:
                for name in network.FILES:
                    shutil.copyfile(folder / name, model.path_of(name))
            self._appear(aside.place, str(model.tag))
            if latest:
                self._make_latest(str(model.tag))
        return str(model.tag)

    def add_heads(self, tag: str, folder: Path, manifest: Manifest) -> str:
        """
        Save what `headed.save` wrote as a BentoML model without a pickle; otherwise as `add_files`.

        Args:
            tag: As there.
            folder: As there.
            manifest: As `headed.save` gave it.
        """
        return self.add_files(tag, folder, manifest.plain())

    def add_files(self, tag: str, folder: Path, metadata: dict[str, Any], module: str = "") -> str:
        """
        Save plain files as a BentoML model; takes milliseconds.

        Its description is written here, in BentoML's form, as importing BentoML takes four seconds.

        Args:
            tag: Its name and version. What a save that was killed has left under it is replaced.
            folder: Only holds files of the model.
            metadata: Anything that JSON can hold.
            module: What of BentoML can load it, such as "bentoml.keras"; nothing if "".

        Returns:
            The tag, which is from now on the store's latest unless it is a project's.
        """
        name, _, number = tag.partition(":")
        framework, library = module.rpartition(".")[2], "tensorflow" if module else "numpy"
        description = {
            "name": name,
            "version": number,
            "module": module,
            "labels": {},
            "options": {},
            "metadata": _plain(json.loads(json.dumps(metadata))),
            "context": {
                "framework_name": framework or "celestial_backend",
                "framework_versions": {library: version(library)},
                "bentoml_version": version("bentoml"),
                "python_version": platform.python_version(),
            },
            "signatures": {},
            "api_version": "v1",
            "creation_time": datetime.now(UTC).isoformat(),
        }
        with self.arriving(tag) as model:
            shutil.copytree(folder, model, dirs_exist_ok=True)
            (model / "model.yaml").write_text(yaml.safe_dump(description, sort_keys=False, allow_unicode=True), "utf-8")
        with disk("written"):
            self._make_latest(tag)
        return tag

    def add_calibrated(self, tag: str, calibration: Calibration) -> str:
        """
        Save a copy of a model from outside that says how it is calibrated; nothing of its own files is read or changed.

        Args:
            tag: Its name and version.
            calibration: Names the model.

        Returns:
            The tag, which is the store's latest if that of the model was.
        """
        name, _, number = calibration.of.partition(":")
        was_latest = self.latest(name) == number
        description = dict(Saved(calibration.of, self.path(calibration.of)).description)
        metadata = {**(description.get("metadata") or {}), "calibration": calibration.plain()}
        description |= {"version": tag.partition(":")[2], "creation_time": datetime.now(UTC).isoformat(),
                        "metadata": metadata}  # fmt: skip
        with self.arriving(tag) as model:
            shutil.copytree(self.path(calibration.of), model, dirs_exist_ok=True)
            (model / DESCRIPTION).write_text(yaml.safe_dump(description, sort_keys=False, allow_unicode=True), "utf-8")
        if was_latest:
            with disk("written"):
                self._make_latest(tag)
        return tag

    def add_folder(self, folder: Path, model_version: str | None = None, *, latest: bool = True) -> str:
        """Save what `training.save` wrote into a folder; gives the new tag. `latest` is as for `add`."""
        card = network.load_card(folder)
        tag = f"{MODEL_NAME}:{model_version}" if model_version else MODEL_NAME
        pre, post = Preprocess(card.size_px), Postprocess(card.classes)
        return self.add(tag, folder, pre, post, asdict(card), latest=latest)

    def import_archive(self, archive: Path, tag: str) -> None:
        """Import an exported model under the tag it was exported with."""
        with self._aside() as aside:
            import_into(aside.store, archive)
            self._appear(aside.place, tag)
            shared = [each.tag for each in self.on_this_machine(tag.partition(":")[0]) if self._is_shared(each.tag)]
            told = self.place(tag).with_name("latest").is_file()  # else all that is there is a default for the meantime
            self._make_latest(shared[-1] if shared and told else tag)  # by when it was made, which may be long ago

    def came_for_its_tag(self, tag: str) -> bool:
        """Whether a model of this machine is a copy of one of the database; it is never the latest."""
        return self._saved_at(tag) == ASKED_FOR

    def remove(self, tag: str) -> None:
        """Remove a model from this machine, if it is there."""
        folder = self.place(tag)
        (folder / "model.yaml").unlink(missing_ok=True)  # first, because half a model is none
        shutil.rmtree(folder, ignore_errors=True)
        latest = folder.parent / "latest"
        if latest.is_file() and latest.read_text().strip() == folder.name:
            newest = [model.tag.partition(":")[2] for model in self.on_this_machine(tag.partition(":")[0])]
            replace_text(latest, newest[-1]) if newest else latest.unlink()

    @contextmanager
    def arriving(self, tag: str) -> Iterator[Path]:
        """An empty folder for the files of a model, which is there in one step when the `with` ends well."""
        with disk("written"), self._beside() as place:
            folder = place.joinpath(*tag.split(":"))
            folder.mkdir(parents=True)
            yield folder
            self._appear(place, tag)

    @contextmanager
    def _aside(self) -> Iterator[_Aside]:
        """A store for one model that is being saved: BentoML copies into a store file by file, in any order."""
        from bentoml._internal.models import ModelStore

        with self._beside() as place:
            yield _Aside(place, ModelStore(place))

    @contextmanager
    def _beside(self) -> Iterator[Path]:
        """An empty folder on the store's disk, gone afterwards."""
        self._models.mkdir(parents=True, exist_ok=True)
        for left in self._models.parent.glob(f"{SAVING}*"):  # by a save that was killed
            if left.stat().st_mtime < time.time() - SAVING_MAX_S:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=self._models.parent, prefix=SAVING) as place:
            yield Path(place)

    def _appear(self, place: Path, tag: str) -> None:
        """Move a model from aside to where it is served, in one step; half a model that lies there gives way."""
        path = self.place(tag)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self.here(tag):
            shutil.rmtree(path, ignore_errors=True)
        Path(place, *tag.split(":")).rename(path)

    def _make_latest(self, tag: str) -> None:
        """Let BentoML call a model the latest, unless it is a project's; a clock that was moved does not matter."""
        if project_of(tag) is None:
            replace_text(self.place(tag).with_name("latest"), tag.partition(":")[2])

    def _is_shared(self, tag: str) -> bool:
        """Whether a model is one for all projects."""
        return project_of(tag) is None and not self.came_for_its_tag(tag)

    def _saved_at(self, tag: str) -> float:
        return (self.place(tag) / "model.yaml").stat().st_mtime

    @contextmanager
    def alone(self, what: str = "") -> Iterator[None]:
        """One process at a time for each `what`: several start at once on one store, and an import takes long."""
        with disk("written"):
            self._models.mkdir(parents=True, exist_ok=True)
            with (self._models / f".celestial{what and '-'}{what}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield


@contextmanager
def disk(done: str) -> Iterator[None]:
    """Say in a sentence that the store cannot be "read" or "written", and why."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"The BentoML store cannot be {done} ({reason(error)}). {STORE_REMEDY}") from error


def _text(path: Path) -> str:
    """What a file holds; nothing where there is none."""
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""


def _plain(value: Any) -> Any:
    """What BentoML takes as metadata, which is anything but None."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items() if each is not None}
    return [_plain(each) for each in value if each is not None] if isinstance(value, list) else value


def _described(path: Path) -> Described:
    return Described.of(described(path, path.stat().st_mtime_ns))
