"""
The BentoML store's folder of models: which are there, what they say of themselves, and adding to it.

Tags and descriptions are read from BentoML's own files, so they are known without
importing it. Models trained for one project lie beside the others, and are never
anybody else's latest.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from celestial_backend import body, decode, errors, exported, network
from celestial_backend.errors import ModelError
from celestial_backend.files import reason, replace_text
from celestial_backend.settings import MODEL_NAME
from celestial_backend.tags import project_of

SAVING, SAVING_MAX_S = "saving-", 3600.0
STORE_REMEDY = "Set BENTOML_HOME to a folder that this user can read and write, with space on its disk."


@dataclass(frozen=True)
class Described:
    """A model of the store and its metadata; `created` is ISO text in UTC."""

    tag: str
    created: str
    metadata: dict[str, Any]

    @property
    def project(self) -> str | None:
        """The project that it was trained for, None for a model of all projects."""
        return project_of(self.tag)

    @property
    def parent(self) -> str | None:
        """The tag of the model that it was trained from."""
        return self.metadata.get("parent")


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
        name, _, number = tag.partition(":")
        return self._models / name / number

    def holds(self, tag: str) -> bool:
        """
        Whether a model is there; it appears whole, in one step.

        Raises:
            ModelError: The store cannot be read.
        """
        with _disk("read"):
            return (self.path(tag) / "model.yaml").is_file()

    def versions(self, name: str) -> list[str]:
        """The versions of a model, in the order of their names."""
        with _disk("read"):
            return sorted(path.parent.name for path in (self._models / name).glob("*/model.yaml"))

    def latest(self, name: str) -> str | None:
        """The version that BentoML calls the latest; the newest of all projects' models where it is one project's."""
        with _disk("read"):
            path = self._models / name / "latest"
            found = path.read_text().strip() if path.is_file() else ""
        if found and not project_of(f"{name}:{found}") and self.holds(f"{name}:{found}"):
            return found
        shared = [number for number in self.versions(name) if not project_of(f"{name}:{number}")]
        return max(shared, key=lambda number: self._saved_at(f"{name}:{number}"), default=None)

    def describe(self, tag: str) -> Described:
        """
        A model's description.

        Raises:
            ModelError: It cannot be read.
        """
        path = self.path(tag) / "model.yaml"
        try:
            return _described(path, path.stat().st_mtime_ns)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise ModelError(
                f"The description of {tag} cannot be read ({type(error).__name__}). "
                f"Remove it with `bentoml models delete {tag}` and save it again."
            ) from error

    def models(self, name: str = MODEL_NAME) -> list[Described]:
        """The models of a name that can be read, the oldest first."""
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
    ) -> str:
        """
        Save a network's plain files as a BentoML model, readable by `bentoml.keras.load_model` too.

        The code of our own preprocess and postprocess goes with it, so that a later release of this
        package shows it the same pixels, and a process without this package can use it.

        Args:
            tag: Its name, and the version unless BentoML shall make one. What a save that was
                killed has left under it is replaced.
            folder: Holds `network.FILES`.
            preprocess: Picture to network input.
            postprocess: Network output to named probabilities.
            metadata: Anything that JSON can hold.

        Returns:
            The tag, which is from now on the store's latest unless it is a project's.
        """
        import bentoml

        with _disk("written"), self._aside() as aside:
            with bentoml.models.create(
                tag,
                module="bentoml.keras",
                context=bentoml.models.ModelContext(
                    framework_name="keras", framework_versions={"tensorflow": version("tensorflow")}
                ),
                custom_objects={"preprocess": preprocess, "postprocess": postprocess},
                external_modules=[network, body, decode, errors],
                metadata=_plain(json.loads(json.dumps(metadata))),  # lists for tuples: plain YAML, no Python in it
                _model_store=aside.store,
            ) as model:
                for name in network.FILES:
                    shutil.copyfile(folder / name, model.path_of(name))
            self._appear(aside.place, str(model.tag))
            self._make_latest(str(model.tag))
        return str(model.tag)

    def add_folder(self, folder: Path, model_version: str | None = None) -> str:
        """Save what `training.save` wrote into a folder; gives the new tag."""
        card = network.load_card(folder)
        tag = f"{MODEL_NAME}:{model_version}" if model_version else MODEL_NAME
        pre, post = network.Preprocess(card.size_px), network.Postprocess(card.classes)
        return self.add(tag, folder, pre, post, asdict(card))

    def import_archive(self, archive: Path, tag: str) -> None:
        """Import an exported model under the tag it was exported with."""
        with self._aside() as aside:
            exported.import_into(aside.store, archive)
            self._appear(aside.place, tag)
            shared = [model.tag for model in self.models(tag.partition(":")[0]) if model.project is None]
            self._make_latest(shared[-1])  # by the time of its making, which may be long ago

    def remove(self, tag: str) -> None:
        """Remove a model, if it is there."""
        folder = self.path(tag)
        (folder / "model.yaml").unlink(missing_ok=True)  # first, because half a model is none
        shutil.rmtree(folder, ignore_errors=True)
        latest = folder.parent / "latest"
        if latest.is_file() and latest.read_text().strip() == folder.name:
            newest = [model.tag.partition(":")[2] for model in self.models(tag.partition(":")[0])]
            latest.write_text(newest[-1]) if newest else latest.unlink()

    @contextmanager
    def _aside(self) -> Iterator[_Aside]:
        """A store for one model that is being saved: BentoML copies into a store file by file, in any order."""
        from bentoml._internal.models import ModelStore

        self._models.mkdir(parents=True, exist_ok=True)
        for left in self._models.parent.glob(f"{SAVING}*"):  # by a save that was killed
            if left.stat().st_mtime < time.time() - SAVING_MAX_S:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=self._models.parent, prefix=SAVING) as place:
            yield _Aside(Path(place), ModelStore(place))

    def _appear(self, place: Path, tag: str) -> None:
        """Move a model from aside to where it is served, in one step; half a model that lies there gives way."""
        path = self.path(tag)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self.holds(tag):
            shutil.rmtree(path, ignore_errors=True)
        Path(place, *tag.split(":")).rename(path)

    def _make_latest(self, tag: str) -> None:
        """Let BentoML call a model the latest, unless it is a project's; a clock that was moved does not matter."""
        if project_of(tag) is None:
            replace_text(self.path(tag).with_name("latest"), tag.partition(":")[2])

    def _saved_at(self, tag: str) -> float:
        return (self.path(tag) / "model.yaml").stat().st_mtime

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time: several start at once on one store."""
        with _disk("written"):
            self._models.mkdir(parents=True, exist_ok=True)
            with (self._models / ".celestial.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield


@contextmanager
def _disk(done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(f"The BentoML store cannot be {done} ({reason(error)}). {STORE_REMEDY}") from error


def _plain(value: Any) -> Any:
    """What BentoML takes as metadata, which is anything but None."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items() if each is not None}
    return [_plain(each) for each in value if each is not None] if isinstance(value, list) else value


@lru_cache(maxsize=256)
def _described(path: Path, _written_ns: int) -> Described:
    described = yaml.safe_load(path.read_text())
    metadata = described.get("metadata") or {}
    return Described(f"{described['name']}:{described['version']}", str(described.get("creation_time", "")), metadata)
