"""
What `doctor` looks at on this machine: packages, model, folders, port, worker, queue.

Each check is a function that gives a `Finding` and changes nothing; it never raises
what it looks for.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from celestial_backend import exported
from celestial_backend.errors import CelestialError, ModelError, StateError
from celestial_backend.job_queue import make_queue
from celestial_backend.jobs import HOW_TO_START, worker_lives
from celestial_backend.reach import ANSWER_S, asks_for_password, health, is_free, is_ours
from celestial_backend.settings import MODEL_NAME, Settings
from celestial_backend.store import ModelStore
from celestial_backend.wiring import Services

State = Literal["ok", "warn", "fail", "not checked"]
OLDEST, TOO_NEW = (3, 11), (3, 14)  # as pyproject.toml says
REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
NEEDED_MB, WISHED_MB = 100, 1000  # a model has some ten megabytes, and a training keeps its pictures for a while


@dataclass(frozen=True)
class Finding:
    """What one check found, as a sentence; what mends it, as another; and what was changed to mend it."""

    name: str
    state: State
    what: str
    mend: str = ""
    project: int | None = None
    changed: str = ""


def not_checked(name: str, reason: str) -> Finding:
    """The finding of a check that could not be made."""
    return Finding(name, "not checked", f"Not checked, because {reason}.")


def python_and_packages(requirements: Path = REQUIREMENTS) -> Finding:
    """The versions of Python and of each package that the backend asks for."""
    from packaging.requirements import Requirement

    name, here = "Python and packages", ".".join(map(str, sys.version_info[:3]))
    if not OLDEST <= sys.version_info[:2] < TOO_NEW:
        wanted = f"{OLDEST[0]}.{OLDEST[1]} to {TOO_NEW[0]}.{TOO_NEW[1] - 1}"
        return Finding(name, "fail", f"Python must be {wanted}, and is {here}.", "Install with another Python.")
    lines = [line.split("#")[0].strip() for line in requirements.read_text().splitlines()]
    wrong = []
    wanted_packages = [Requirement(line) for line in lines if line]
    for package in wanted_packages:
        try:
            version = metadata.version(package.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{package.name} is missing")
            continue
        if not package.specifier.contains(version, prereleases=True):
            wrong.append(f"{package} is asked for and {version} installed")
    if wrong:
        mend = f"Install them: {sys.executable} -m pip install -r {requirements}"
        return Finding(name, "fail", f"{'; '.join(wrong)}.", mend)
    return Finding(name, "ok", f"Python {here}, and all {len(wanted_packages)} packages as they are asked for.")


def model(services: Services) -> tuple[Finding, tuple[str, ...]]:
    """Whether the model that all projects get is in the store and works; and its classes, none where it does not."""
    name, settings, store = "Model", services.settings, services.store
    try:
        if missing := _comes_at_start(settings, store):
            return Finding(name, "warn", missing, "Start the backend, or: python -m celestial_backend models"), ()
        tag = store.live_tag()
    except CelestialError as error:
        mend = "Set CELESTIAL_MODEL to one that `python -m celestial_backend models` lists, or leave it unset."
        return Finding(name, "fail", str(error), mend), ()
    return model_of(services, tag)


def model_of(services: Services, tag: str, project: str = "") -> tuple[Finding, tuple[str, ...]]:
    """Whether a model loads; and its classes."""
    try:
        classes = services.store.current(project).classes
    except ModelError as error:
        mend = f"Remove it: bentoml models delete -y {tag} - the default model comes back at the next start."
        if not tag.startswith(f"{MODEL_NAME}:default-"):
            mend = f"Export it again where it was made, or remove it: bentoml models delete -y {tag}"
        return Finding("Model", "fail", str(error), mend), ()
    return Finding("Model", "ok", f"{tag} loads, with {len(classes)} classes: {', '.join(classes)}."), classes


def _comes_at_start(settings: Settings, store: ModelStore) -> str:
    """What the first use of the store would put there, and a look must not; empty if nothing."""
    if settings.bentomodel is not None:
        tag = exported.tag_of(settings.bentomodel)
        return "" if store.registry.holds(tag) else f"{tag} of CELESTIAL_BENTOMODEL is not in the store yet."
    if settings.model in (MODEL_NAME, f"{MODEL_NAME}:latest") and store.registry.latest(MODEL_NAME) is None:
        return "The store holds no model yet; the default model is put there at the first start."
    return ""


def state_folder(settings: Settings) -> Finding:
    """Whether a file can really be written where the backend keeps its state."""
    name, place = "State folder", settings.model_dir
    existing = next(path for path in (place, *place.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".doctor-") as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        mend = "Set MODEL_DIR to a folder that this user may write, or make that one so (its owner, its mount)."
        return Finding(name, "fail", f"{place} cannot be written ({error.strerror}).", mend)
    made = "" if existing == place else " It is made at the first use."
    return Finding(name, "ok", f"{place} can be written.{made}")


def disk(settings: Settings) -> Finding:
    """Whether state folder and model store have space left."""
    worst, state = "", "ok"
    for variable, place in (("MODEL_DIR", settings.model_dir), ("BENTOML_HOME", settings.bentoml_home)):
        existing = next(path for path in (place, *place.parents) if path.exists())
        free = shutil.disk_usage(existing).free / 1e6
        if free < WISHED_MB and state != "fail":
            worst, state = f"{free:.0f} MB are left for {variable}.", "fail" if free < NEEDED_MB else "warn"
    if state == "ok":
        return Finding("Disk", "ok", f"More than {WISHED_MB} MB are free.")
    mend = "Free some space: old models (bentoml models list), CELESTIAL_KEEP_MODELS."
    return Finding("Disk", "fail" if state == "fail" else "warn", worst, mend)


def worker(settings: Settings, *, running: bool) -> Finding:
    """Whether a worker lives, which trains."""
    name = "Worker"
    try:
        if worker_lives(settings.model_dir):
            return Finding(name, "ok", "A worker waits for trainings.")
    except StateError as error:
        return not_checked(name, f"the state folder cannot be used ({error})")
    if not running:
        mend = "Start the backend: label-studio-ml start ."
        return Finding(name, "warn", "No worker runs, and no backend that would keep one.", mend)
    what = f"The backend answers, and no worker runs on {settings.model_dir}: trainings would wait forever."
    return Finding(name, "fail", what, HOW_TO_START)


def queue(settings: Settings) -> Finding:
    """Whether the queue that wakes workers can be reached."""
    name = "Queue"
    if settings.redis_url is not None:
        return _redis(settings)
    path = settings.model_dir / "queue.db"
    if not path.exists():
        return Finding(name, "ok", "A file in the state folder, made at the first start.")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=ANSWER_S)) as connection:
            connection.execute("select count(*) from sqlite_master").fetchone()
    except sqlite3.Error as error:
        mend = f"Stop the backend and remove the file; the list of jobs is kept elsewhere: rm {path}"
        return Finding(name, "fail", f"{path} cannot be read ({error}).", mend)
    return Finding(name, "ok", "The file in the state folder can be read.")


def _redis(settings: Settings) -> Finding:
    from redis import RedisError

    try:
        make_queue(settings).storage.conn.ping()
    except (RedisError, OSError) as error:
        said = re.sub(r"//[^/\s]*@", "//", str(error))
        mend = "Start it, or correct REDIS_URL; without REDIS_URL the queue is a file."
        return Finding("Queue", "fail", f"Redis does not answer ({said or type(error).__name__}).", mend)
    return Finding("Queue", "ok", "Redis answers.")


def backend(settings: Settings, url: str | None) -> tuple[bool, Finding]:
    """Whether our backend answers; a port that is free is as good, for it can be started there."""
    address = (url or f"http://127.0.0.1:{settings.port}").rstrip("/")
    name, body = f"Backend at {address}", health(address, settings.basic_auth_user, settings.basic_auth_pass)
    if is_ours(body):
        if not asks_for_password(body):
            return True, Finding(name, "ok", "It answers.")
        mend = "Set BASIC_AUTH_USER and BASIC_AUTH_PASS here to those that the backend was started with."
        return True, Finding(name, "fail", "It refuses the user name and password that are set here, or none.", mend)
    if body is None and url:
        mend = "Start the backend (label-studio-ml start .), or correct --backend-url."
        return False, Finding(name, "fail", "Nothing answers there.", mend)
    if body is None and is_free(settings.port):
        return False, Finding(name, "ok", "The port is free; label-studio-ml start . starts the backend there.")
    mend = "Stop it, or set PORT to a port that is free."
    return False, Finding(name, "fail", "Another program listens there, and it is not this backend.", mend)
