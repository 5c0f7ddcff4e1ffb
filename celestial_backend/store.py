"""
Which model is live for a project, and the loaded copies in this process.

The tag is known at once, from small files; the model behind it is loaded by the
first request that needs it, or by `warm_up`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict
from pathlib import Path

from celestial_backend import classifier, exported, network
from celestial_backend.classifier import Classifier
from celestial_backend.errors import ModelError, ModelNotFoundError
from celestial_backend.files import replace_text
from celestial_backend.pointers import Pointer, Pointers
from celestial_backend.registry import Registry
from celestial_backend.settings import MODEL_NAME, Settings
from celestial_backend.tags import project_of

logger = logging.getLogger(__name__)

DEFAULT_MODEL = Path(__file__).parent / "default_model"
RETRY_S = 30.0  # a model that failed to load is tried again after this long
LOADED_MAX = 8  # models that one process keeps loaded, for as many projects


class ModelStore:
    """
    The models as this process serves them; lives as long as the process, safe between threads.

    Made before a fork, used after it: nothing is opened or loaded until it is asked for.
    """

    def __init__(self, settings: Settings) -> None:
        self.registry = Registry(settings.bentoml_home)
        self.pointers = Pointers(settings.model_dir)
        self._settings = settings
        self._wanted: str | None = None
        self._preparing = threading.Lock()
        self._loading = threading.Lock()
        self._loaded: OrderedDict[str, Classifier] = OrderedDict()
        self._failures: dict[str, tuple[ModelError, float]] = {}
        self._missed: set[str] = set()

    def live_tag(self, project: str = "") -> str:
        """
        The tag that is served to a project now, as ``name:version``; known without TensorFlow.

        A project's own pointer goes before what the settings name. One that names a model that is
        no longer there is passed over, and the log says so.

        Raises:
            ModelNotFoundError: The store holds no such model; the message says which it holds.
        """
        with self._preparing:
            if self._wanted is None:
                self._wanted = self._prepare()
        pointer = self.pointers.read(project) if project else None
        if pointer is None:
            return self._resolve(self._wanted)
        if self.registry.holds(pointer.tag):
            return pointer.tag
        if pointer.tag not in self._missed:
            self._missed.add(pointer.tag)
            logger.error("The live model of project %s, %s, is not in the store; %s is served. Choose another with: "
                         "python -m celestial_backend models use TAG --project %s",
                         project, pointer.tag, self._wanted, project)  # fmt: skip
        return self._resolve(self._wanted)

    def current(self, project: str = "") -> Classifier:
        """
        The live model, loaded; callers keep the one reference for their whole request.

        Raises:
            ModelError: It is not there or cannot be loaded. It is tried again half a minute later.
        """
        tag = self.live_tag(project)
        found = self._loaded.get(tag)
        if found is None:
            with self._loading:
                found = self._loaded.get(tag) or self._load(tag)
        return found

    def classes(self, tag: str, wait_s: float) -> tuple[str, ...] | None:
        """
        The classes of a model, or None where they cannot be known within `wait_s` seconds.

        Raises:
            ModelError: The model is known to be unusable.
        """
        known = self._recorded_classes(tag)
        if known is None:
            loading = threading.Thread(target=self._try, args=(tag,), daemon=True)
            loading.start()
            loading.join(wait_s)
            known = self._recorded_classes(tag)
        return known

    def warm_up(self) -> None:
        """Begin to load the live model in the background; a failure is logged, and told to whoever asks."""
        threading.Thread(target=self._try, name="warm-up", daemon=True).start()

    def publish(self, project: str, tag: str, *, job: str = "", instead_of: str | None = None) -> bool:
        """
        Make a model the live one of a project, for every process from its next request on.

        Args:
            project: Label Studio's number of it.
            tag: A model of the store.
            job: The job that trained it; none where a person chose it.
            instead_of: What must be live until now; False is returned, and nothing changed, if it is not.

        Raises:
            ModelNotFoundError: The store does not hold the model.
            StateError: The pointer cannot be written.
        """
        with self.pointers.alone(project):
            self._held(tag)
            if instead_of is not None and self.live_tag(project) != instead_of:
                return False
            self.pointers.write(project, Pointer(tag, job))
        logger.info("Project %s is served %s from now on", project, tag)
        return True

    def prune(self, project: str) -> list[str]:
        """
        Remove a project's oldest models beyond CELESTIAL_KEEP_MODELS; gives the removed tags.

        The live models of all projects, their parents and the models of all projects stay.
        """
        with self.pointers.alone(project):
            described = {model.tag: model for model in self.registry.models()}
            kept = set()
            for tag in [*self.pointers.projects().values(), self.live_tag(project)]:
                ancestor: str | None = tag
                while ancestor in described and ancestor not in kept:
                    kept.add(ancestor)
                    ancestor = described[ancestor].parent
            mine = [tag for tag in described if project_of(tag) == project]
            removed = [tag for tag in mine[: -self._settings.keep_models] if tag not in kept]
            for tag in removed:
                self.registry.remove(tag)
            return removed

    def _prepare(self) -> str:
        """Bring into the store what the settings ask for; give the tag to serve, ``latest`` unresolved."""
        archive = self._settings.bentomodel
        wanted = exported.tag_of(archive) if archive else self._settings.model
        wanted = wanted if ":" in wanted else f"{wanted}:latest"
        if archive and not self.registry.holds(wanted):
            with self.registry.alone():
                if not self.registry.holds(wanted):
                    self.registry.import_archive(archive, wanted)
        elif wanted == f"{MODEL_NAME}:latest" and self._wants_default():
            with self.registry.alone():
                if self._wants_default():
                    tag = self.registry.add_folder(DEFAULT_MODEL, _default_version())
                    logger.info("Registered the default model as %s", tag)
        return wanted

    def _wants_default(self) -> bool:
        """The store holds no model for all projects, or its latest is the default of another release."""
        latest = self.registry.latest(MODEL_NAME)
        return latest is None or (latest.startswith("default-") and latest != _default_version())

    def _resolve(self, wanted: str) -> str:
        name, _, number = wanted.partition(":")
        return self._held(f"{name}:{self.registry.latest(name) or number}" if number == "latest" else wanted)

    def _held(self, tag: str) -> str:
        if not self.registry.holds(tag):
            name = tag.partition(":")[0]
            held = ", ".join(f"{name}:{each}" for each in self.registry.versions(name)) or "none of that name"
            raise ModelNotFoundError(
                f"The model {tag} is not in the BentoML store, which holds {held}. "
                "Set CELESTIAL_MODEL to one that is there, or CELESTIAL_BENTOMODEL to an exported file."
            )
        return tag

    def _load(self, tag: str) -> Classifier:
        error, until = self._failures.get(tag, (None, 0.0))
        if error is not None and time.monotonic() < until:
            raise error
        try:
            loaded = classifier.load(tag)
        except ModelError as failure:
            self._failures[tag] = (failure, time.monotonic() + RETRY_S)
            raise
        self._failures.pop(tag, None)
        self._loaded[tag] = loaded
        while len(self._loaded) > LOADED_MAX:
            self._loaded.popitem(last=False)
        self._record_classes(loaded)
        return loaded

    def _try(self, tag: str | None = None) -> None:
        try:
            tag = tag or self.live_tag()
            with self._loading:
                if tag not in self._loaded:
                    self._load(tag)
        except ModelError as error:
            logger.error("%s", error)  # noqa: TRY400 - the sentence says it; a traceback would hide it
        except Exception:
            logger.exception("The model could not be loaded")

    def _recorded_classes(self, tag: str) -> tuple[str, ...] | None:
        """Classes that the model's own metadata or an earlier load has written down."""
        if loaded := self._loaded.get(tag):
            return loaded.classes
        error, until = self._failures.get(tag, (None, 0.0))
        if error is not None:
            if time.monotonic() < until:
                raise error
            return None  # it may have been mended: who asks lets it be loaded again
        classifier.check_files(tag, self.registry.path(tag))
        try:
            recorded = self.registry.describe(tag).metadata.get("classes") or json.loads(self._record(tag).read_text())
        except (OSError, ValueError, ModelError):
            return None
        return tuple(recorded)

    def _record_classes(self, loaded: Classifier) -> None:
        path = self._record(loaded.tag)
        try:
            replace_text(path, json.dumps(loaded.classes))
        except OSError as error:
            logger.warning("The classes of %s are not remembered: %s", loaded.tag, error.strerror)

    def _record(self, tag: str) -> Path:
        return self._settings.model_dir / "classes" / f"{tag.replace(':', '-')}.json"


def _default_version() -> str:
    """Names the embedded default by its content."""
    digest = hashlib.sha256(b"".join((DEFAULT_MODEL / name).read_bytes() for name in network.FILES))
    return f"default-{digest.hexdigest()[:12]}"
