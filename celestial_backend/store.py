"""
Which model is live, and the one loaded copy of it in this process.

The tag is read from the BentoML store's own files, so it is known at once; the
model behind it is loaded by the first request that needs it, or by `warm_up`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import yaml

from celestial_backend import body, classifier, decode, errors, exported, network
from celestial_backend.classifier import Classifier
from celestial_backend.errors import ModelError, ModelNotFoundError
from celestial_backend.settings import MODEL_NAME, Settings

logger = logging.getLogger(__name__)

DEFAULT_MODEL = Path(__file__).parent / "default_model"
RETRY_S = 30.0  # a model that failed to load is tried again after this long


class ModelStore:
    """
    The BentoML store as this backend sees it; lives as long as the process, safe between threads.

    Made before a fork, used after it: nothing is opened or loaded until it is asked for.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._models = settings.bentoml_home / "models"
        self._wanted: str | None = None
        self._preparing = threading.Lock()
        self._loading = threading.Lock()
        self._classifier: Classifier | None = None
        self._failure: tuple[str, ModelError, float] | None = None

    def live_tag(self) -> str:
        """
        The tag that is served now, as ``name:version``; known without TensorFlow.

        Raises:
            ModelNotFoundError: The store holds no such model; the message says which it holds.
        """
        with self._preparing:
            if self._wanted is None:
                self._wanted = self._prepare()
        return self._resolve(self._wanted)

    def current(self) -> Classifier:
        """
        The live model, loaded; callers keep the one reference for their whole request.

        Raises:
            ModelError: It is not there or cannot be loaded. It is tried again half a minute later.
        """
        tag = self.live_tag()
        with self._loading:
            if self._classifier is None or self._classifier.tag != tag:
                self._classifier = self._load(tag)
            return self._classifier

    def classes(self, tag: str, wait_s: float) -> tuple[str, ...] | None:
        """
        The classes of a model, or None where they cannot be known within `wait_s` seconds.

        Raises:
            ModelError: The model is known to be unusable.
        """
        known = self._recorded_classes(tag)
        if known is None:
            loading = threading.Thread(target=self._try_current, daemon=True)
            loading.start()
            loading.join(wait_s)
            known = self._recorded_classes(tag)
        return known

    def warm_up(self) -> None:
        """Begin to load the live model in the background; a failure is logged, and told to whoever asks."""
        threading.Thread(target=self._try_current, name="warm-up", daemon=True).start()

    def register(self, folder: Path, model_version: str | None = None) -> str:
        """
        Save a trained network's plain files as a BentoML model, readable by `bentoml.keras.load_model` too.

        The code of its `preprocess` and `postprocess` goes with it, so that a later release of this
        package shows it the same pixels, and a process without this package can use it.

        Args:
            folder: As `training.save` writes it: `network.FILES` and a card.
            model_version: The version part of the tag; BentoML makes one where it is not given.

        Returns:
            The new tag, which is from now on the store's latest.
        """
        import bentoml

        card = network.load_card(folder)
        tag = f"{MODEL_NAME}:{model_version}" if model_version else MODEL_NAME
        with bentoml.models.create(
            tag,
            module="bentoml.keras",
            context=bentoml.models.ModelContext(
                framework_name="keras", framework_versions={"tensorflow": version("tensorflow")}
            ),
            custom_objects={
                "preprocess": network.Preprocess(card.size_px),
                "postprocess": network.Postprocess(card.classes),
            },
            external_modules=[network, body, decode, errors],
            metadata=json.loads(json.dumps(asdict(card))),  # lists for tuples: plain YAML, no Python in it
        ) as model:
            for name in network.FILES:
                shutil.copyfile(folder / name, model.path_of(name))
        return str(model.tag)

    def _prepare(self) -> str:
        """Bring into the store what the settings ask for; give the tag to serve, ``latest`` unresolved."""
        archive = self._settings.bentomodel
        wanted = exported.tag_of(archive) if archive else self._settings.model
        wanted = wanted if ":" in wanted else f"{wanted}:latest"
        if archive and not self._holds(wanted):
            with self._alone():
                if not self._holds(wanted):
                    shutil.rmtree(self._path(wanted), ignore_errors=True)  # left by an import that was killed
                    exported.import_into_store(archive)
        elif wanted == f"{MODEL_NAME}:latest" and self._wants_default():
            with self._alone():
                if self._wants_default():
                    self._register_default()
        return wanted

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time: several workers start at once on one store."""
        try:
            self._models.mkdir(parents=True, exist_ok=True)
            with (self._models / ".celestial.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise ModelError(
                f"The BentoML store cannot be written ({error.strerror}). "
                "Set BENTOML_HOME to a folder that this user may write to, with space on its disk."
            ) from error

    def _wants_default(self) -> bool:
        """The store holds no model, or its latest is the default of another release."""
        latest = self._latest(MODEL_NAME)
        return not self._versions(MODEL_NAME) or (latest.startswith("default-") and latest != _default_version())

    def _register_default(self) -> None:
        default = _default_version()
        shutil.rmtree(self._path(f"{MODEL_NAME}:{default}"), ignore_errors=True)  # left by a start that was killed
        tag = self.register(DEFAULT_MODEL, default)
        logger.info("Registered the default model as %s", tag)

    def _versions(self, name: str) -> list[str]:
        return sorted(path.parent.name for path in (self._models / name).glob("*/model.yaml"))

    def _path(self, tag: str) -> Path:
        name, _, number = tag.partition(":")
        return self._models / name / number

    def _holds(self, tag: str) -> bool:
        return (self._path(tag) / "model.yaml").is_file()

    def _resolve(self, wanted: str) -> str:
        name, _, number = wanted.partition(":")
        tag = f"{name}:{self._latest(name)}" if number == "latest" else wanted
        if not self._holds(tag):
            held = ", ".join(f"{name}:{each}" for each in self._versions(name)) or "none of that name"
            raise ModelNotFoundError(
                f"The model {wanted} is not in the BentoML store, which holds {held}. "
                "Set CELESTIAL_MODEL to one that is there, or CELESTIAL_BENTOMODEL to an exported file."
            )
        return tag

    def _latest(self, name: str) -> str:
        """The version that BentoML calls the latest, from the file in which it keeps it."""
        try:
            return (self._models / name / "latest").read_text().strip()
        except OSError:
            return next(reversed(self._versions(name)), "latest")

    def _load(self, tag: str) -> Classifier:
        if self._failure is not None and self._failure[0] == tag and time.monotonic() < self._failure[2]:
            raise self._failure[1]
        try:
            loaded = classifier.load(tag)
        except ModelError as error:
            self._failure = (tag, error, time.monotonic() + RETRY_S)
            raise
        self._failure = None
        self._record_classes(loaded)
        return loaded

    def _try_current(self) -> None:
        try:
            self.current()
        except ModelError as error:
            logger.error("%s", error)  # noqa: TRY400 - the sentence says it; a traceback would hide it
        except Exception:
            logger.exception("The model could not be loaded")

    def _recorded_classes(self, tag: str) -> tuple[str, ...] | None:
        """Classes that the model's own metadata or an earlier load has written down."""
        current, failure = self._classifier, self._failure
        if current is not None and current.tag == tag:
            return current.classes
        if failure is not None and failure[0] == tag:
            raise failure[1]
        classifier.check_files(tag, self._path(tag))
        try:
            metadata = yaml.safe_load((self._path(tag) / "model.yaml").read_text())["metadata"]
            recorded = metadata.get("classes") or json.loads(self._record(tag).read_text())
        except (OSError, ValueError, KeyError, AttributeError, yaml.YAMLError):
            return None
        return tuple(recorded)

    def _record_classes(self, loaded: Classifier) -> None:
        path = self._record(loaded.tag)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps(loaded.classes))
            fresh.replace(path)
        except OSError as error:
            logger.warning("The classes of %s are not remembered: %s", loaded.tag, error.strerror)

    def _record(self, tag: str) -> Path:
        return self._settings.model_dir / "classes" / f"{tag.replace(':', '-')}.json"


def _default_version() -> str:
    """Names the embedded default by its content."""
    digest = hashlib.sha256(b"".join((DEFAULT_MODEL / name).read_bytes() for name in network.FILES))
    return f"default-{digest.hexdigest()[:12]}"
