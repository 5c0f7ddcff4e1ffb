"""
Which model is live for a project, and the loaded copies in this process.

The tag is known at once; the model behind it is loaded by the first request that needs it, or by `warm_up`.
"""

from __future__ import annotations

import json
import logging
import secrets
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import cast

from celestial_backend.database import Database, Transaction
from celestial_backend.errors import ModelError, ModelLoadError, ModelNotFoundError
from celestial_backend.features import FeatureCache
from celestial_backend.labels import Vocabulary
from celestial_backend.models import classifier, kept, registry
from celestial_backend.models.classifier import Classifier, Model
from celestial_backend.models.embedders import open_embedder
from celestial_backend.models.families import FAMILIES, Needs, family_of
from celestial_backend.models.kept import SharedRegistry
from celestial_backend.models.manifest import Calibration
from celestial_backend.models.pointers import Pointer, Pointers
from celestial_backend.planets import network
from celestial_backend.settings import MODEL_NAME, Settings, project_of, project_parts
from celestial_backend.state import replace_text

logger = logging.getLogger(__name__)
DEFAULT_MODEL = Path(network.__file__).with_name("default_model")
RETRY_S = 30.0  # a model that failed to load is tried again after this long
LOADED_MAX = 8  # models of each kind that one process keeps loaded, for as many projects


@dataclass
class _Loaded:
    """A model in memory; `used` grows whenever it is asked for."""

    model: Model
    used: int = 0


class ModelStore:
    """
    The models as this process serves them; lives as long as the process, safe between threads.

    Made before a fork, used after it: nothing is opened or loaded until it is asked for.
    """

    def __init__(self, settings: Settings, database: Database, *, look_only: bool = False) -> None:
        """
        Args:
            settings: Of the process.
            database: Says which models are live, and keeps those that were trained.
            look_only: Nothing is put into the store or the state folder, not even what a start would put there.
        """
        self.registry = SharedRegistry(settings.bentoml_home, database, look_only=look_only)
        self.pointers = Pointers(database)
        self.features = FeatureCache(settings)  # what this machine knows of pictures already
        self._settings = settings
        self._database = database
        self._look_only = look_only
        self._wanted: str | None = None
        self._preparing = threading.Lock()
        self._serves = False  # requests must not wait until a file is imported
        self._stand_in = ""  # the tag that is served until then; not what is the latest by then
        self._importing: threading.Thread | None = None
        self._import_again = 0.0  # on the monotonic clock
        self._import_failure: ModelError | None = None
        self._needs = Needs(lambda: open_embedder(settings), self.features, self._network)
        self._loading = {family: threading.Lock() for family in FAMILIES}  # heads wait for no seconds of TensorFlow
        self._loaded: dict[str, _Loaded] = {}
        self._uses = count(1)
        self._failures: dict[str, tuple[ModelError, float]] = {}
        self._missed: set[str] = set()

    def live_tag(self, project: str = "") -> str:
        """
        The tag that is served to a project now, as ``name:version``; known without TensorFlow.

        A project's own pointer goes before what the settings name. One that names a model that is
        no longer there is passed over, and the log says so. While a server imports the file of
        CELESTIAL_BENTOMODEL, the newest model of the store is served, or the default one.

        Raises:
            ModelNotFoundError: The store holds no such model; the message says which it holds.
            ModelError: The file cannot be imported.
            StateError: The database cannot be read, and it is not remembered which model is the project's.
        """
        return self._live(project, self.pointers.read(project) if project else None)

    def versions(self, project: str = "") -> list[str]:
        """
        The tags that a project may be served: its live one first, then its own that are kept, the newest first.

        Without a project those of all: their live ones, what the others are served, and all others.

        Raises:
            ModelError, StateError: As for `live_tag`.
        """
        number = project_parts(project)[0]
        live = [self.live_tag(project)] if project else [*map(self.live_tag, self.pointers.projects()), self.live_tag()]
        kept = [model.tag for model in self.registry.models() if not project or model.project == number]
        return list(dict.fromkeys([*live, *reversed(kept)]))

    def current(self, project: str = "") -> Model:
        """
        The live model, loaded; callers keep the one reference for their whole request.

        Raises:
            ModelError: It is not there or cannot be loaded. It is tried again half a minute later.
        """
        return self.model(self.live_tag(project))

    def model(self, tag: str) -> Model:
        """
        A model of the store, loaded.

        Raises:
            ModelError: As for `current`.
        """
        found = self._loaded.get(tag)
        if found is None:
            with self._loading[family_of(self.registry.path(tag))]:
                found = self._loaded.get(tag) or self._load(tag)
        self._note_use(found)
        return found.model

    def loaded(self, tag: str) -> bool:
        """Whether this process has a model in memory."""
        return tag in self._loaded

    def vocabulary(self, tag: str, wait_s: float) -> Vocabulary | None:
        """
        What a model can say, or None where that cannot be known within `wait_s` seconds.

        Raises:
            ModelError: The model is known to be unusable.
        """
        known = self.known(tag)
        if known is None:
            loading = threading.Thread(target=self._try, args=(tag,), daemon=True)
            loading.start()
            loading.join(wait_s)
            known = self.known(tag)
        return known

    def classes(self, tag: str, wait_s: float) -> tuple[str, ...] | None:
        """All that a model can say, of whichever control; otherwise as `vocabulary`."""
        known = self.vocabulary(tag, wait_s)
        if known is None:
            return None
        return known.classes or tuple(dict.fromkeys(name for columns in known.own for name in columns.classes))

    def known(self, tag: str) -> Vocabulary | None:
        """
        What a model can say, as it is loaded or as its metadata or an earlier load has written it down.

        Raises:
            ModelError: The model is known to be unusable.
        """
        if loaded := self._loaded.get(tag):
            return loaded.model.vocabulary
        error, until = self._failures.get(tag, (None, 0.0))
        if error is not None:
            if time.monotonic() < until:
                raise error
            return None  # it may have been fixed: who asks lets it be loaded again
        folder = self.registry.path(tag)
        return family_of(folder).vocabulary(tag, folder) or self._recorded(tag)

    def warm_up(self) -> None:
        """
        Begin to load the live model in the background, for a server; a failure is logged, and told to whoever asks.

        From now on a file of CELESTIAL_BENTOMODEL is imported in the background too, and nobody waits for it.
        """
        self._serves = True
        threading.Thread(target=self._warm_up, name="warm-up", daemon=True).start()

    def check_exported(self, archive: Path) -> None:
        """
        Look at an exported model without importing it.

        Raises:
            ModelLoadError: It can never be served here.
        """
        with tempfile.TemporaryDirectory() as place:
            registry.outline(archive, Path(place))
            family_of(Path(place)).check(registry.tag_of(archive), Path(place))

    def publish(
        self, project: str, tag: str, *, job: str = "", instead_of: str | None = None, within: Transaction | None = None
    ) -> bool:
        """
        Make a model the live one of a project, for every process from its next request on.

        Args:
            project: Label Studio's number of it.
            tag: A model of the store.
            job: The job that trained it; none where a person chose it.
            instead_of: What must be live until now; False is returned, and nothing changed, if it is not.
            within: A transaction that is alone with the project, and that this becomes part of; else one is made.

        Raises:
            ModelNotFoundError: The store does not hold the model.
            StateError: The database cannot be written.
        """
        self.held(tag)
        if within is None:
            self._wanted_now()  # nobody waits for an import in a transaction
            with self._database.writing(project) as transaction:
                return self.publish(project, tag, job=job, instead_of=instead_of, within=transaction)
        if instead_of is not None and self._live(project, self.pointers.read(project, within)) != instead_of:
            return False
        if kept.belongs_to_all_machines(self.registry, tag):
            self.keep(tag, within)
        self.pointers.write(project, Pointer(tag, job), within)
        logger.info("Project %s gets %s as its live model", project, tag)
        return True

    def keep(self, tag: str, within: Transaction) -> None:
        """
        Put a model of this machine into the database, so that it is listed and served on every machine.

        Raises:
            ModelError: It cannot be read.
        """
        kept.keep(self.registry, tag, within)

    def add(self, archive: Path) -> str:
        """
        Put an exported model into the database, so that every machine can serve it; gives its tag.

        Raises:
            ModelError: It can never be served, is too large, or its tag is that of another model.
            StateError: The database cannot be written.
        """
        kept.check_size(archive)
        self.check_exported(archive)
        return kept.add(self.registry, archive, self._database)

    def add_calibrated(self, calibration: Calibration) -> tuple[str, bool]:
        """
        Put a calibrated copy of a model from outside into the store, and into the database for all other machines.

        Returns:
            Its tag, and whether the database has it; it takes no model that is too large.

        Raises:
            ModelError: The store cannot be written.
            StateError: The database cannot be written.
        """
        name, _, number = calibration.of.partition(":")
        tag = self.registry.add_calibrated(f"{name}:{number[:40]}-calibrated-{secrets.token_hex(4)}", calibration)
        return tag, kept.keep_small(self.registry, tag, self._database)

    def prune(self, project: str) -> list[str]:
        """
        Remove a project's oldest models beyond CELESTIAL_KEEP_MODELS, here and in the database; gives their tags.

        The live models of all projects, their parents, the networks whose features a model that
        stays needs, and the models of all projects stay.
        """
        described = {model.tag: model for model in self.registry.models()}
        mine = [tag for tag in described if project_of(tag) == project]
        others = [tag for tag in described if project_of(tag) != project]
        newest = mine[-self._settings.keep_models :]
        if len(newest) == len(mine):
            return []
        shared = self.live_tag()
        with self._database.writing(project) as transaction:
            needed: set[str] = set()
            for tag in [shared, *(row["tag"] for row in transaction.rows("SELECT tag FROM live"))]:
                ancestor: str | None = tag
                while ancestor in described and ancestor not in needed:
                    needed.add(ancestor)
                    ancestor = described[ancestor].parent
            for tag in {*needed, *newest, *others}:
                needed |= {described[tag].base or tag}
            removed = [tag for tag in mine if tag not in newest and tag not in needed]
            for tag in removed:
                kept.remove(tag, transaction)
                self.registry.remove(tag)
        return removed

    def default_to_come(self) -> str:
        """The tag of the default model that the next start puts into the store, and serves; "" if it puts none."""
        wanted = self._settings.bentomodel is None and self._named() == f"{MODEL_NAME}:latest" and self._wants_default()
        return f"{MODEL_NAME}:{network.version(DEFAULT_MODEL)}" if wanted else ""

    def _live(self, project: str, pointer: Pointer | None) -> str:
        """The tag that is served to a project with this pointer."""
        wanted = self._wanted_now()
        if pointer is None:
            return self._resolve(wanted)
        if self.registry.holds(pointer.tag):
            return pointer.tag
        if pointer.tag not in self._missed:
            self._missed.add(pointer.tag)
            logger.error("The live model of project %s, %s, is not in the store; %s is served. Choose another with: "
                         "python -m celestial_backend models use TAG --project %s",
                         project, pointer.tag, wanted, project)  # fmt: skip
        return self._resolve(wanted)

    def _wanted_now(self) -> str:
        """What is served now to projects without a model of their own, ``latest`` unresolved."""
        with self._preparing:
            if self._wanted is None:
                if self._serves and self._settings.bentomodel is not None:
                    return self._meanwhile(self._settings.bentomodel)
                self._wanted = self._prepare()
            return self._wanted

    def _prepare(self) -> str:
        """Bring into the store what the settings ask for; give the tag to serve, ``latest`` unresolved."""
        archive = self._settings.bentomodel
        if archive is None:
            if self._named() == f"{MODEL_NAME}:latest" and not self._look_only:
                self._bring_default()
            return self._named()
        tag = self._remembered_tag(archive) or self._read_tag(archive)
        if not self.registry.here(tag) and not self._look_only:
            with self.registry.alone("import"):
                if not self.registry.here(tag):
                    self._import(archive, tag)
        return tag

    def _named(self) -> str:
        """What CELESTIAL_MODEL names, ``latest`` unresolved."""
        return self._settings.model if ":" in self._settings.model else f"{self._settings.model}:latest"

    def _bring_default(self) -> None:
        """Put the default model into the store, where it is to be the latest."""
        if self._wants_default():
            with self.registry.alone():
                if self._wants_default():
                    self._add_default()

    def _add_default(self, *, latest: bool = True) -> None:
        tag = self.registry.add_folder(DEFAULT_MODEL, network.version(DEFAULT_MODEL), latest=latest)
        logger.info("Registered the default model as %s", tag)

    def _meanwhile(self, archive: Path) -> str:
        """
        What is served while the file of CELESTIAL_BENTOMODEL is imported; `_preparing` is held.

        Raises:
            ModelError: It cannot be imported. It is tried again half a minute later.
        """
        if not self._stand_in:
            tag = self._remembered_tag(archive)
            if tag and self.registry.here(tag):
                self._wanted = tag
                return tag
            self._stand_in = self._newest_or_default()
            logger.info("%s of CELESTIAL_BENTOMODEL is imported in the background; until then %s is served",
                        archive.name, self._stand_in)  # fmt: skip
        if (self._importing is None or not self._importing.is_alive()) and time.monotonic() >= self._import_again:
            self._importing = threading.Thread(target=self._import_beside, name="import", daemon=True)
            self._importing.start()
        if self._import_failure is not None:
            raise self._import_failure
        return self._stand_in

    def _newest_or_default(self) -> str:
        """The tag of the newest model for all projects; the default one is put into a store that has none."""
        if self.registry.latest(MODEL_NAME) is None:
            with self.registry.alone():
                if self.registry.latest(MODEL_NAME) is None:
                    self._add_default(latest=False)  # which is to be what is imported now
        return f"{MODEL_NAME}:{self.registry.latest(MODEL_NAME)}"

    def _import_beside(self) -> None:
        """Import the file of CELESTIAL_BENTOMODEL, and have the model served once it is loaded."""
        try:
            tag = self._prepare()
            self._try(tag)  # so that no request waits for that either
            logger.info("%s of CELESTIAL_BENTOMODEL is served from now on", tag)
            with self._preparing:
                self._wanted, self._import_failure = tag, None
        except ModelError as error:
            logger.error("%s", error)  # noqa: TRY400 - the sentence says it; a traceback would hide it
            self._import_failure = error
        except Exception:
            logger.exception("The file of CELESTIAL_BENTOMODEL could not be imported")
        finally:
            self._import_again = time.monotonic() + RETRY_S

    def _remembered_tag(self, archive: Path) -> str:
        """The tag of an exported model whose file was read before and has not changed since; "" of any other."""
        try:
            found = json.loads(self._imported.read_text())
            return str(found["tag"]) if found["file"] == _identity(archive) else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _read_tag(self, archive: Path) -> str:
        """The tag of an exported model; of a large file that takes seconds, so it is written down."""
        tag = registry.tag_of(archive)
        if not self._look_only:
            with suppress(OSError):
                replace_text(self._imported, json.dumps({"file": _identity(archive), "tag": tag}))
        return tag

    @property
    def _imported(self) -> Path:
        return self._settings.state.imported

    def _import(self, archive: Path, tag: str) -> None:
        """Import the model of CELESTIAL_BENTOMODEL; one that can never be served here does not get into the store."""
        self._raise_failure(tag)
        try:
            self.check_exported(archive)
            self.registry.import_archive(archive, tag)
        except ModelLoadError as error:
            self._failures[tag] = (error, time.monotonic() + RETRY_S)
            raise

    def _wants_default(self) -> bool:
        """The store holds no model for all projects, or its latest is the default of another release."""
        latest = self.registry.latest(MODEL_NAME)
        return latest is None or (latest.startswith("default-") and latest != network.version(DEFAULT_MODEL))

    def _resolve(self, wanted: str) -> str:
        name, _, number = wanted.partition(":")
        latest = self.registry.latest(name) if number == "latest" else None
        return f"{name}:{latest}" if latest else self.held(wanted)

    def held(self, tag: str) -> str:
        """
        A tag, if the store holds its model.

        Raises:
            ModelNotFoundError: It does not; the message says which it holds.
        """
        if not self.registry.holds(tag):
            name = tag.partition(":")[0]
            held = ", ".join(f"{name}:{each}" for each in self.registry.versions(name)) or "none of that name"
            raise ModelNotFoundError(
                f"The model {tag} is not in the BentoML store, which holds {held}. "
                "Set CELESTIAL_MODEL to one that is there, or CELESTIAL_BENTOMODEL to an exported file."
            )
        return tag

    def _load(self, tag: str) -> _Loaded:
        self._raise_failure(tag)
        try:
            folder = self.registry.path(tag)
            family = family_of(folder)
            loaded = _Loaded(family.load(tag, folder, self._needs))
            if family.vocabulary(tag, folder) is None:
                self._record(tag, loaded.model.vocabulary)
        except ModelError as failure:
            self._failures[tag] = (failure, time.monotonic() + RETRY_S)
            raise
        self._failures.pop(tag, None)
        self._note_use(loaded)
        self._loaded[tag] = loaded
        alike = [each for each, other in list(self._loaded.items()) if type(other.model) is type(loaded.model)]
        for old in sorted(alike, key=lambda each: self._loaded[each].used)[:-LOADED_MAX]:
            del self._loaded[old]
        return loaded

    def _note_use(self, loaded: _Loaded) -> None:
        """Let a model that is used now, and the network that it needs, be the last to leave the memory."""
        loaded.used = next(self._uses)
        if loaded.model.base is not None and (base := self._loaded.get(loaded.model.base)):
            base.used = next(self._uses)

    def _raise_failure(self, tag: str) -> None:
        """Tell a failure again, as long as nothing is tried again."""
        error, until = self._failures.get(tag, (None, 0.0))
        if error is not None and time.monotonic() < until:
            raise error

    def _network(self, tag: str) -> Classifier:
        """Another model, which is to be a network."""
        classifier.check_files(tag, self.registry.path(self.held(tag)))
        return cast("Classifier", self.model(tag))

    def _warm_up(self) -> None:
        self._try()
        try:
            logger.info("Features of pictures are made by %s", open_embedder(self._settings).name)
        except ModelError as error:
            logger.error("%s", error)  # noqa: TRY400 - as below

    def _try(self, tag: str | None = None) -> None:
        try:
            self.model(tag or self.live_tag())
        except ModelError as error:
            logger.error("%s", error)  # noqa: TRY400 - the sentence says it; a traceback would hide it
        except Exception:
            logger.exception("The model could not be loaded")

    def _record(self, tag: str, vocabulary: Vocabulary) -> None:
        """Write down what a model says that only tells it once it is loaded."""
        if self._look_only:
            return
        try:
            replace_text(self._settings.state.classes(tag), json.dumps(vocabulary.classes))
        except OSError as error:
            logger.warning("The classes of %s are not remembered: %s", tag, error.strerror)

    def _recorded(self, tag: str) -> Vocabulary | None:
        """What an earlier load has written down."""
        try:
            found = json.loads(self._settings.state.classes(tag).read_text())
        except (OSError, ValueError):
            return None
        return Vocabulary(tuple(map(str, found))) if isinstance(found, list) else None


def _identity(file: Path) -> list[str | int]:
    """What is another one when a file was written anew."""
    found = file.stat()
    return [str(file.resolve()), found.st_size, found.st_mtime_ns]
