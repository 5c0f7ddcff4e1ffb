"""
What `doctor` looks at on this machine: packages, model, folders, port, worker, database.

Each check is a function that gives a `Finding` and changes nothing; it never raises what it looks for.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from celestial_backend import __version__
from celestial_backend.database import SCHEMA, VERSION, Database
from celestial_backend.errors import (
    DATABASE_REMEDY,
    PASSWORD,
    STATE_REMEDY,
    CelestialError,
    ModelError,
    StateError,
)
from celestial_backend.jobs.processes import PLACE
from celestial_backend.jobs.trainings import HOW_TO_START
from celestial_backend.models import registry, saved
from celestial_backend.models.store import ModelStore
from celestial_backend.services import Services
from celestial_backend.settings import MODEL_NAME, Settings

ANSWER_S = 5.0
MAY_MAKE = (  # tables: in a schema that is there, or in one of its own
    f"SELECT COALESCE(has_schema_privilege(CAST(to_regnamespace('{SCHEMA}') AS oid), 'CREATE'),"
    " has_database_privilege(current_database(), 'CREATE')) AS may"
)
OF_STATE = ("MODEL_DIR", "BENTOML_HOME", "CELESTIAL_DATABASE_URL")
COMPARED = (*OF_STATE, "LABEL_STUDIO_URL", "LABEL_STUDIO_HOST", "LABEL_STUDIO_API_KEY", "CELESTIAL_LABEL_STUDIO_DATA",
            "LOCAL_FILES_DOCUMENT_ROOT", "CELESTIAL_DATA_FOLDER", "CELESTIAL_MODEL", "CELESTIAL_EMBEDDER",
            "CELESTIAL_UNKNOWN", "CELESTIAL_SCORE", "CELESTIAL_CONTROL_SHARE", "CELESTIAL_PLANTED_SHARE")  # fmt: skip
OURS = "CelestialBodiesBackend"  # the model class that /health tells
State = Literal["ok", "warn", "fail", "not checked"]
OLDEST, TOO_NEW = (3, 11), (3, 14)  # as pyproject.toml says
NEEDED_MB, WISHED_MB = 100, 1000  # a model has some ten megabytes, and a training keeps its pictures for a while


def health(url: str, user: str | None = None, password: str | None = None) -> dict[str, Any] | None:
    """
    What an address answers to /health: None if nothing listens, an empty object if it makes no sense.

    Args:
        url: Of an ML backend.
        user: Credentials, only for an address that the operator has named.
        password: The same.
    """
    return _object(f"{url.rstrip('/')}/health", user, password)


def _object(address: str, user: str | None, password: str | None) -> dict[str, Any] | None:
    import httpx

    pair = (user, password or "") if user else None
    try:
        with httpx.Client(timeout=ANSWER_S, trust_env=False, auth=pair) as client:
            body = client.get(address).json()
    except httpx.ConnectError:
        return None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def is_ours(body: dict[str, Any] | None) -> bool:
    """Whether an answer to /health is this backend's, also one that asks for a password."""
    return (body or {}).get("model_class") == OURS or asks_for_password(body)


def asks_for_password(body: dict[str, Any] | None) -> bool:
    """Whether it is this backend's refusal of a request without the right password."""
    return (body or {}).get("code") == PASSWORD


def is_free(port: int) -> bool:
    """Whether a server can be started on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


@dataclass(frozen=True)
class Finding:
    """What one check found, as a sentence; what fixes it, as another; and what was changed to fix it."""

    name: str
    state: State
    what: str
    mend: str = ""
    project: int | None = None
    changed: str = ""


def not_checked(name: str, reason: str) -> Finding:
    """The finding of a check that could not be made."""
    return Finding(name, "not checked", f"Not checked, because {reason.removesuffix('.')}.")


def requirements(place: Path) -> list[str]:
    """
    What the backend asks for, one requirement each.

    A checkout and the image have a file for it; an installed package carries the same lines in its metadata.

    Args:
        place: The folder that the package is in.

    Raises:
        PackageNotFoundError: The package was copied from elsewhere, without either.
    """
    file = place / "requirements.txt"
    if (place / "_wsgi.py").is_file() and file.is_file():  # another package's file may lie among installed ones
        lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
        return [line for line in lines if line]
    return metadata.requires("celestial-backend") or []


def python_and_packages(place: Path = Path(PLACE)) -> Finding:
    """
    The versions of Python and of each package that the backend asks for.

    Args:
        place: The folder that the package is in.
    """
    from packaging.requirements import Requirement

    name, here = "Python and packages", ".".join(map(str, sys.version_info[:3]))
    if not OLDEST <= sys.version_info[:2] < TOO_NEW:
        wanted = f"{OLDEST[0]}.{OLDEST[1]} to {TOO_NEW[0]}.{TOO_NEW[1] - 1}"
        return Finding(name, "fail", f"Python must be {wanted}, and is {here}.", "Install with another Python.")
    try:
        wanted_packages = [Requirement(line) for line in requirements(place)]
    except metadata.PackageNotFoundError:
        return not_checked(name, "the package is not installed and has no requirements.txt beside it")
    wrong = {}
    for package in wanted_packages:
        try:
            version = saved.version(package.name)
        except metadata.PackageNotFoundError:
            wrong[str(package)] = f"{package.name} is missing"
            continue
        if not package.specifier.contains(version, prereleases=True):
            wrong[str(package)] = f"{package} is asked for and {version} installed"
    if wrong:
        # Without --no-deps, pip would go back to the Flask of 2020 that label-studio-ml 1.0.9 pins.
        mend = f"Install them: {sys.executable} -m pip install --no-deps {shlex.join(wrong)}"
        return Finding(name, "fail", f"{'; '.join(wrong.values())}.", mend)
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
        if settings.bentomodel is not None:
            mend = "Set CELESTIAL_BENTOMODEL to a file for which that holds, or leave it unset."
        return Finding(name, "fail", str(error), mend), ()
    found, classes = model_of(services, tag)
    if found.state == "ok" and (newer := store.default_to_come()):
        what = f"{found.what} It is the default model of another release; the next start serves {newer} in its place."
        found = replace(found, state="warn", what=what, mend="Start the backend anew.")
    return found, classes


def model_of(services: Services, tag: str, project: str = "") -> tuple[Finding, tuple[str, ...]]:
    """Whether a model loads; and its classes."""
    try:
        services.store.current(project)
        classes = services.store.classes(tag, 0) or ()
    except ModelError as error:
        return Finding("Model", "fail", str(error), _without(tag)), ()
    except Exception as error:  # noqa: BLE001 - a model from outside runs code of whoever made it
        return Finding("Model", "fail", f"{tag} fails in a way of its own ({type(error).__name__}).", _without(tag)), ()
    return Finding("Model", "ok", f"{tag} loads, with {len(classes)} classes: {', '.join(classes)}."), classes


def _without(tag: str) -> str:
    """What there is to be done about a model that does not load."""
    if tag.startswith(f"{MODEL_NAME}:default-"):
        return f"Remove it: bentoml models delete -y {tag} - the default model comes back at the next start."
    return f"Do what it says, or remove the model: bentoml models delete -y {tag}"


def _comes_at_start(settings: Settings, store: ModelStore) -> str:
    """What the first use of the store would put there, and a look must not; empty if nothing."""
    if settings.bentomodel is not None:
        tag = registry.tag_of(settings.bentomodel)
        if store.registry.here(tag):
            return ""
        store.check_exported(settings.bentomodel)
        return f"{tag} of CELESTIAL_BENTOMODEL is not in the store yet."
    if store.registry.latest(MODEL_NAME) is None and store.default_to_come():
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


def worker(services: Services, *, running: bool) -> Finding:
    """Whether a worker lives, which trains."""
    name = "Worker"
    try:
        if services.jobs.ledger.workers():
            return Finding(name, "ok", "A worker waits for trainings.")
    except StateError as error:
        return not_checked(name, f"the database cannot be used ({error})")
    if not running:
        mend = "Start the backend: python -m celestial_backend serve"
        return Finding(name, "warn", "No worker runs, and no backend that would keep one.", mend)
    what = "The backend answers, and no worker runs on this database: trainings would wait forever."
    return Finding(name, "fail", what, HOW_TO_START)


def database(settings: Settings) -> Finding:
    """Whether the database can be read, and its tables are those of this release."""
    name, looked_at = "Database", Database(settings, look_only=True)
    shared = (settings.database_url or "").startswith("postgresql")
    may_make = True
    try:
        about = {row["name"]: row["value"] for row in looked_at.rows("SELECT name, value FROM about")}
        if shared and not about:
            (row,) = looked_at.rows(MAY_MAKE)
            may_make = row["may"]
    except StateError as error:
        remedy = DATABASE_REMEDY if shared else STATE_REMEDY
        more = "" if shared else " If the file is damaged, stop the backend and put a copy of it back."
        return Finding(name, "fail", str(error).removesuffix(f" {remedy}"), f"{remedy}{more}")
    if about.get("oldest", 0) > VERSION:
        newer = f"of a newer release, version {about['version']}; this one knows {VERSION}"
        what = f"{looked_at.name} has tables {newer}."
        return Finding(name, "fail", what, "Upgrade celestial-backend here too.")
    if not may_make:
        mend = "Let the user of CELESTIAL_DATABASE_URL make one: GRANT CREATE ON DATABASE name TO user"
        return Finding(name, "fail", "The tables are missing, and the user may make no schema for them.", mend)
    made = "" if about else " Tables are made at the first use."
    return Finding(name, "ok", f"{looked_at.name} can be read.{made}")


def seen(settings: Settings, url: str | None) -> Finding:
    """What the running backend sees, which has settings of its own: Label Studio, its token, and what differs here."""
    name, pair = "Running backend", (settings.basic_auth_user, settings.basic_auth_pass)
    told = _object(f"{url or settings.address}/doctor", *pair) or {}
    if "settings" not in told:
        return not_checked(name, f"it does not say what it sees ({told.get('detail', 'another release, perhaps')})")
    studio, own = told["label_studio"], settings.digests(told["salt"])
    differing = [variable for variable in COMPARED if told["settings"].get(variable) != own[variable]]
    if studio["state"] != "accepted":
        mend = "Variables are set where the backend is started; what is set in this shell does not reach it."
        return Finding(name, "fail", f"It says: {studio['detail']}", mend)
    if told["version"] != __version__:
        what = f"It is release {told['version']}, and this command is {__version__}."
        return Finding(name, "warn", what, "Start the backend anew.")
    if differing:
        lost = any(variable in OF_STATE for variable in differing)
        mend = "Set them here as for the backend, or start the backend anew with these."
        what = f"It was started with other values than are set here: {', '.join(differing)}."
        return Finding(name, "fail" if lost else "warn", what, mend)
    return Finding(name, "ok", "It has the same settings as are set here, and Label Studio accepts its token.")


def backend(settings: Settings, url: str | None) -> tuple[bool, Finding]:
    """Whether our backend answers; a port that is free is as good, for it can be started there."""
    address = url or settings.address
    name, body = f"Backend at {address}", health(address, settings.basic_auth_user, settings.basic_auth_pass)
    if is_ours(body):
        if not asks_for_password(body):
            return True, Finding(name, "ok", "It answers.")
        mend = "Set BASIC_AUTH_USER and BASIC_AUTH_PASS here to those that the backend was started with."
        return True, Finding(name, "fail", "It refuses the user name and password that are set here, or none.", mend)
    if body is None and (url or settings.backend_url):
        mend = "Start the backend (python -m celestial_backend serve), or correct CELESTIAL_BACKEND_URL."
        return False, Finding(name, "fail", "Nothing answers there.", mend)
    if body is None and is_free(settings.port):
        return False, Finding(name, "ok", "The port is free for the backend: python -m celestial_backend serve")
    mend = "Stop it, or set PORT to a port that is free."
    return False, Finding(name, "fail", "Another program listens there, and it is not this backend.", mend)
