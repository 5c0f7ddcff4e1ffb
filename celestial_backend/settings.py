"""
Every setting, declared once and read once; and what numbers of projects and tags of models look like.

`Settings.from_environ` is the only reader of the environment. Each field carries the variable's name, how its
text is read, and the sentence that the page of settings shows. A tag says for which project and by which job a
model was made.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from celestial_backend.errors import SettingsError
from celestial_backend.state import StateFolder

MODEL_NAME = "celestial_bodies_classifier_model"
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
LOG_FORMATS = ("text", "json")
ON, OFF = ("on", "true", "1", "yes"), ("off", "false", "0", "no")
WITHHOLD, LABEL = "withhold", "label"  # of CELESTIAL_UNKNOWN
CONFIDENCE, MARGIN, TYPICAL = SCORES = "confidence", "margin", "typical"  # of CELESTIAL_SCORE
NEVER = 0  # of CELESTIAL_TRAIN_EVERY: `off`
PROJECT_MAX = 2**63 - 1  # what a database holds
NEEDS_LABELS = f"{MODEL_NAME}:needs-labels"  # the version as long as nothing can be predicted; no model has it
POSTGRESQL = re.compile(r"[+a-z]+://([^@]*@)?(\[[0-9A-Fa-f:.]+\]|[^@:/?\[\]]*)(:\d+)?([/?][^@]*)?", re.ASCII)
NUMBER = re.compile(r"[1-9][0-9]{0,18}")
QUOTES = "\"'“”‘’ "  # which come along when a value is pasted
LINE_BREAKS = re.compile(r"\s*[\r\n]\s*")
TOKEN_HEAD = re.compile(r"(authorization:\s*)?((token|bearer)\s+)?", re.IGNORECASE)
# Pages that a browser shows in the place of a server's address; any other path is where the server is installed.
STUDIO_PAGES = re.compile(
    r"/(projects(/[0-9]+(/.*)?)?|user/(login|signup|logout|account)(/.*)?|organization(/(webhooks|models)(/.*)?)?|models"
    r"|(data/(upload|local-files)|tasks/[0-9]+|docs/api|api/(annotations|current-user|dm|import|ml|organizations"
    r"|predictions|projects|storages|tasks|templates|token|users|version|webhooks))(/.*)?|api|docs|health|version)/*$"
)
BACKEND_PAGES = re.compile(r"/(health|setup|predict|webhook|versions|metrics|docs|doctor|openapi\.json)/*$")
PROJECT_VERSION = re.compile(r"project-(?P<project>[0-9]+)-[0-9a-z]+")


def _place() -> Path:
    """The state folder where no setting names one: the same from whatever folder a program is started."""
    root = Path(__file__).resolve().parents[1]
    if (root / "_wsgi.py").is_file():
        return root / "data"
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "celestial-backend"


PLACE = _place()


def _text(text: str) -> str:
    return text


def _token(text: str) -> str:
    """A token alone, as it is pasted with quotes, with line breaks, or with the header around it."""
    text = LINE_BREAKS.sub("", text.strip(QUOTES))
    return TOKEN_HEAD.sub("", text).strip(QUOTES)


def _studio(text: str) -> str:
    return _address(text, STUDIO_PAGES)


def backend_address(text: str) -> str:
    """
    The address of a backend, also where one of its pages is given.

    Raises:
        ValueError: It is none; with the rule.
    """
    return _address(text, BACKEND_PAGES)


def _address(text: str, pages: re.Pattern[str]) -> str:
    """An address without a slash at its end; of a page that was pasted from a browser, where its server is."""
    text = text.strip(QUOTES)
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or not _has_port(parts):
        meant = re.sub(r"^[a-z]*:?/+", "", text, flags=re.IGNORECASE) if "://" not in text else ""
        example = f"http://{meant or 'localhost:8080'}"
        raise ValueError(f"must be an address that starts with http:// or https://, such as {example}")
    return f"{parts.scheme}://{parts.netloc}{pages.sub('', parts.path)}".rstrip("/")


def _has_port(parts: SplitResult) -> bool:
    """Whether its port is a number, or left out."""
    try:
        return parts.port != 0
    except ValueError:
        return False


def _log_level(text: str) -> str:
    if text.upper() not in LOG_LEVELS:
        raise ValueError(f"must be one of {', '.join(LOG_LEVELS)}")
    return text.upper()


def _log_format(text: str) -> str:
    if text.lower() not in LOG_FORMATS:
        raise ValueError(f"must be one of {', '.join(LOG_FORMATS)}")
    return text.lower()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("must be a whole number of 1 or more")
    return int(text)


def _count_or_off(text: str) -> int:
    if text.lower() == "off":
        return NEVER
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("must be a whole number of 1 or more, or off")
    return int(text)


def _switch(text: str) -> bool:
    if text.lower() not in ON + OFF:
        raise ValueError(f"must be one of {', '.join(ON + OFF)}")
    return text.lower() in ON


def _unknown(text: str) -> str:
    if text.lower() not in (WITHHOLD, LABEL):
        raise ValueError(f"must be {WITHHOLD} or {LABEL}")
    return text.lower()


def _score(text: str) -> str:
    if text.lower() not in SCORES:
        raise ValueError(f"must be one of {', '.join(SCORES)}")
    return text.lower()


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ValueError("must be a port number from 1 to 65535")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError("must be a number above 0")
    return number


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise ValueError("must be a number from 0 to 1")
    return number


def _database(text: str) -> str:
    if not re.match(r"sqlite:///[^:?]|postgresql(\+psycopg)?://", text):
        raise ValueError("must be an address that starts with postgresql://, or sqlite:/// and the path of a file")
    if not text.startswith("sqlite") and not POSTGRESQL.fullmatch(text):
        raise ValueError("must be postgresql://user:password@host:port/name, with %40 for an @ in the password")
    return re.sub(r"^postgresql://", "postgresql+psycopg://", text)


def _embedder(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*(:[a-z0-9][a-z0-9._-]*)?", text, re.ASCII):
        raise ValueError("must be lite0, a BentoML tag (name:version), or the name of a network of keras.applications")
    return text


def _folder(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if not path.is_dir():
        raise ValueError("must name a folder that exists")
    return path


def _file(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if not path.is_file():
        raise ValueError("must name a file that exists")
    return path


def _path(text: str) -> Path:
    return Path(text).expanduser().resolve()


def _hosts(text: str) -> tuple[str, ...]:
    hosts = tuple(host.strip().lower() for host in text.split(",") if host.strip())
    for host in hosts:
        if "://" in host:
            raise ValueError("must list host names, addresses or networks, without http://")
        if "/" in host:
            ip_network(host)
    return hosts


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip().lower().rstrip(".") for name in text.split(",") if name.strip())
    if any(not re.fullmatch(r"[^\s:/?#@*]+", name) for name in names):
        raise ValueError("must list names of hosts, without http://, port and stars")
    return names


def setting(variable: str, read: Callable[[str], Any], default: Any, about: str, **more: Any) -> Any:
    """Declare a field: its variable, the function that reads its text, its default, its sentence."""
    return field(default=default, metadata={"variable": variable, "read": read, "about": about}, **more)


@dataclass(frozen=True)
class Settings:
    """All settings of one process; immutable, safe to share between threads."""

    label_studio_url: str | None = setting(
        "LABEL_STUDIO_URL", _studio, None, "Where Label Studio is, as seen from the backend."
    )
    label_studio_host: str | None = setting(
        "LABEL_STUDIO_HOST",
        _studio,
        None,
        "Where people open Label Studio in a browser, as Label Studio's own variable of this name says; without it,"
        " `LABEL_STUDIO_URL`.",
    )
    label_studio_api_key: str | None = setting(
        "LABEL_STUDIO_API_KEY",
        _token,
        None,
        "A token of Label Studio: a personal access token or a legacy token.",
        repr=False,
    )
    model_dir: Path = setting(
        "MODEL_DIR",
        _path,
        PLACE,
        "The state folder: `data` in the backend's folder; for an installed package"
        " `~/.local/share/celestial-backend`.",
    )
    bentoml_home: Path = setting(
        "BENTOML_HOME", _path, Path("~/bentoml").expanduser(), "BentoML's folder, which holds the model store."
    )
    basic_auth_user: str | None = setting(
        "BASIC_AUTH_USER", _text, None, "User name that every request must carry; needs `BASIC_AUTH_PASS`."
    )
    basic_auth_pass: str | None = setting(
        "BASIC_AUTH_PASS", _text, None, "Password that goes with `BASIC_AUTH_USER`.", repr=False
    )
    hosts: tuple[str, ...] = setting(
        "CELESTIAL_HOSTS",
        _names,
        (),
        "Public names of this backend, separated by commas; without a password it answers under no others.",
    )
    backend_url: str | None = setting(
        "CELESTIAL_BACKEND_URL",
        backend_address,
        None,
        "Where the backend is, as seen from Label Studio; without it, `http://127.0.0.1:PORT`.",
    )
    log_level: str = setting("LOG_LEVEL", _log_level, "INFO", "`DEBUG`, `INFO`, `WARNING` or `ERROR`.")
    log_format: str = setting(
        "LOG_FORMAT", _log_format, "text", "Form of the log: `text`, or `json` with an object on each line."
    )
    port: int = setting("PORT", _port, 9090, "Port that the web server listens on.")
    workers: int = setting(
        "WORKERS", _count, 1, "Web server processes, each with its own model; the worker, which trains, is not counted."
    )
    threads: int = setting(
        "THREADS",
        _count,
        8,
        "Requests with several tasks that one web server process works at side by side; more wait in line.",
    )
    model: str = setting("CELESTIAL_MODEL", _text, f"{MODEL_NAME}:latest", "The BentoML tag to serve.")
    bentomodel: Path | None = setting(
        "CELESTIAL_BENTOMODEL", _file, None, "A `.bentomodel` file, imported into the store at start and served."
    )
    data_folder: Path | None = setting(
        "CELESTIAL_DATA_FOLDER",
        _folder,
        None,
        "Folder with the original pictures, which are found by the names of their files.",
    )
    label_studio_data: Path | None = setting(
        "CELESTIAL_LABEL_STUDIO_DATA",
        _folder,
        None,
        "Label Studio's data folder on this machine: uploads are read from disk.",
    )
    local_files_root: Path | None = setting(
        "LOCAL_FILES_DOCUMENT_ROOT",
        _folder,
        None,
        "Label Studio's local-files folder on this machine: such pictures are read from disk.",
    )
    allowed_hosts: tuple[str, ...] = setting(
        "CELESTIAL_ALLOWED_HOSTS",
        _hosts,
        (),
        "Private hosts that may give pictures: names (`name:port` too), addresses or networks, separated by commas.",
    )
    image_timeout_s: float = setting(
        "CELESTIAL_IMAGE_TIMEOUT_S", _positive, 20.0, "Seconds that fetching one picture may take."
    )
    image_max_mb: float = setting(
        "CELESTIAL_IMAGE_MAX_MB", _positive, 50.0, "Megabytes that one picture file may have."
    )
    image_max_megapixels: float = setting(
        "CELESTIAL_IMAGE_MAX_MEGAPIXELS", _positive, 50.0, "Millions of pixels that one picture may have."
    )
    fetch_threads: int = setting(
        "CELESTIAL_FETCH_THREADS",
        _count,
        8,
        "Pictures that are fetched side by side for one batch, and a quarter more for other batches; single tasks have"
        " as many of their own.",
    )
    predict_max_s: float = setting(
        "CELESTIAL_PREDICT_MAX_S",
        _positive,
        90.0,
        "Seconds after which a batch is answered with what is done; Label Studio waits 100 and drops what comes later.",
    )
    request_max_mb: float = setting(
        "CELESTIAL_REQUEST_MAX_MB",
        _positive,
        100.0,
        "Megabytes that a request to /predict may have, and all at one time together; one to /setup or /webhook may"
        " have a tenth.",
    )
    batch_size: int = setting("CELESTIAL_BATCH_SIZE", _count, 64, "Tasks in one forward pass.")
    database_url: str | None = setting(
        "CELESTIAL_DATABASE_URL",
        _database,
        None,
        "A PostgreSQL (`postgresql://user:password@host/name`), which several machines may share; without it, the file"
        " `celestial.db` in the state folder.",
        repr=False,
    )
    unknown: str = setting(
        "CELESTIAL_UNKNOWN",
        _unknown,
        WITHHOLD,
        "What becomes of a picture unlike all that was learned: `withhold` gives it no pre-label and a low score,"
        " `label` the likeliest choice.",
    )
    score: str = setting(
        "CELESTIAL_SCORE",
        _score,
        CONFIDENCE,
        "What Label Studio sorts by: `confidence`, the probability of what is said; `margin`, the lead over the next"
        " choice; or `typical`, so that the pictures come first that teach most.",
    )
    control_share: float = setting(
        "CELESTIAL_CONTROL_SHARE",
        _share,
        0.0,
        "Share of the tasks, drawn at random, that are shown without their pre-label, so that `report` can tell what"
        " pre-labels do to people; 0.1 is a good one.",
    )
    planted_share: float = setting(
        "CELESTIAL_PLANTED_SHARE",
        _share,
        0.0,
        "Share of the tasks with a ground truth, drawn at random, that are shown with a wrong pre-label.",
    )
    train_every: int | None = setting(
        "CELESTIAL_TRAIN_EVERY",
        _count_or_off,
        None,
        "New or changed labels of a project after which a training starts, or `off` for *Start Training* alone;"
        " without it, as soon as there are enough labels, and whenever they have grown by a fifth.",
    )
    train_max_s: float = setting("CELESTIAL_TRAIN_MAX_S", _positive, 1800.0, "Seconds that one training may take.")
    accepted_weight: float = setting(
        "CELESTIAL_ACCEPTED_WEIGHT",
        _share,
        1.0,
        "How much a label counts that was submitted as it was pre-labelled, from 0 to 1.",
    )
    embedder: str = setting(
        "CELESTIAL_EMBEDDER",
        _embedder,
        "lite0",
        "What turns pictures into features: `lite0`, the tag of a Keras network, or a name given to `features add`.",
    )
    cache_dir: Path | None = setting(
        "CELESTIAL_CACHE_DIR",
        _path,
        None,
        "Folder on a disk of this machine for remembered features; without it, `cache` in the state folder.",
    )
    cache_max_mb: float = setting(
        "CELESTIAL_CACHE_MAX_MB", _positive, 1000.0, "Megabytes that remembered features may take; 2.6 KB a picture."
    )
    keep_models: int = setting(
        "CELESTIAL_KEEP_MODELS",
        _count,
        5,
        "How many of a project's newest trained models are kept; the live one and its parents are always kept.",
    )
    keep_predictions: bool = setting(
        "CELESTIAL_KEEP_PREDICTIONS",
        _switch,
        False,
        "Whether predictions of older models stay in Label Studio after a training: `on` or `off`.",
    )

    @property
    def state(self) -> StateFolder:
        """What lies where in `model_dir`."""
        return StateFolder(self.model_dir)

    @property
    def cache_folder(self) -> Path:
        """Where what can be computed again is kept."""
        return self.cache_dir or self.state.features

    @property
    def studio_link(self) -> str | None:
        """Where people open Label Studio; without a password, as it is printed."""
        link = self.label_studio_host or self.label_studio_url
        return link and re.sub(r"//[^/]*@", "//", link)

    @property
    def address(self) -> str:
        """Where Label Studio finds the backend: what a person types into *Connect Model*."""
        return self.backend_url or f"http://127.0.0.1:{self.port}"

    def digests(self, salt: str) -> dict[str, str]:
        """By variable what tells whether another process has the same value, and not which; without passwords."""
        values = {field.metadata["variable"]: getattr(self, field.name) for field in fields(self)}
        values |= {"CELESTIAL_DATABASE_URL": re.sub(r"//[^@]*@|\?.*", "", self.database_url or "")}
        return {
            variable: hashlib.sha256(f"{salt}\n{variable}\n{value}".encode()).hexdigest()[:16]
            for variable, value in values.items()
            if not variable.startswith("BASIC_AUTH_")
        }

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """
        The settings that an environment holds; an empty variable counts as unset.

        Raises:
            SettingsError: One or more variables cannot be used; the message names all of them.

        """
        values: dict[str, Any] = {}
        problems: list[str] = []
        for declared in fields(cls):
            variable, text = declared.metadata["variable"], environ.get(declared.metadata["variable"], "").strip()
            if not text:
                continue
            try:
                values[declared.name] = declared.metadata["read"](text)
            except ValueError as error:
                seen = "a hidden value" if not declared.repr else repr(text)
                problems.append(f"{variable} {error}, got {seen}")
        known = {declared.metadata["variable"] for declared in fields(cls)}
        problems += [
            f"{name} is not a setting of this backend; docs/settings.md lists them all"
            for name in sorted(environ)
            if name.startswith("CELESTIAL_") and name not in known
        ]
        values.setdefault("model_dir", _older_place() or PLACE)
        if ("basic_auth_user" in values) != ("basic_auth_pass" in values):
            problems.append("BASIC_AUTH_USER and BASIC_AUTH_PASS must be set together; one of them is missing")
        if problems:
            raise SettingsError(". ".join(problems) + ".")
        told = _connection(StateFolder(values["model_dir"]).connection)
        url = values.get("label_studio_url")
        if "label_studio_api_key" not in values and url in (None, told.get("label_studio_url")):
            values |= told  # the token is for that Label Studio alone
        return cls(**values)

    def reconnected(self) -> Settings:
        """These settings with Label Studio's address and token as they are now, where `connect` was given others."""
        told = ("LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY")  # of the others some may be arguments of this process
        environ = {name: os.environ[name] for name in told if name in os.environ}
        now = Settings.from_environ({**environ, "MODEL_DIR": str(self.model_dir)})
        return replace(self, label_studio_url=now.label_studio_url, label_studio_api_key=now.label_studio_api_key)


def _connection(file: Path) -> dict[str, str]:
    """Label Studio's address and token, as `connect` was given them; nothing if it was not, or somebody else was."""
    try:
        told = json.loads(file.read_text())
        return {"label_studio_url": _studio(told["url"]), "label_studio_api_key": _token(told["token"])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def state_note(environ: Mapping[str, str] = os.environ) -> str:
    """A sentence about state that an earlier release left below the folder of this process; empty without any."""
    left = Path("data").resolve()
    if environ.get("MODEL_DIR", "").strip() or left == PLACE or not _has_state(left):
        return ""
    if _older_place() is None:
        return f"The state folder is {PLACE}; there is one in {left} too, which MODEL_DIR={left} uses."
    return (
        f"The state folder is {left}, as in earlier releases, and {PLACE} for programs that are started in another"
        f" folder. Set MODEL_DIR={left} for all, or stop all and move it to {PLACE}."
    )


def _older_place() -> Path | None:
    """
    The folder `data` where this process was started, if an earlier release has left its state there.

    In a clone, one that was started in another folder by mistake does not take the place of the clone's own.
    """
    left = Path("data").resolve()
    in_clone = PLACE.name == left.name
    return left if left != PLACE and _has_state(left) and not (in_clone and _has_state(PLACE)) else None


def _has_state(folder: Path) -> bool:
    state = StateFolder(folder)
    return any(path.exists() for path in (state.database, state.old_jobs, state.old_pointers))


def is_project(text: object) -> bool:
    """Whether it is the number of a project of Label Studio: ASCII digits, the first one no 0, below 2^63."""
    return isinstance(text, str) and NUMBER.fullmatch(text) is not None and int(text) <= PROJECT_MAX


def project_parts(text: str) -> tuple[str, str]:
    """
    The number of a project and when it was made, of what Label Studio sends as ``"7.1795374408"``.

    Numbers begin anew in another Label Studio, and in one that was set up again; the seconds tell them apart. Either
    part is "" where it is not sent, or is no number. An @ is as good as the point, at which the SDK cuts.
    """
    number, _, made = text[:40].replace("@", ".").partition(".")
    return (number, made if is_project(made) else "") if is_project(number) else ("", "")


def no_project(text: str) -> str:
    """The sentence for a text that is no number of a project."""
    return (
        f"The number of a Label Studio project must be a whole number from 1 to {PROJECT_MAX}, got {text[:40]!r}."
        " It stands in the address of the project's page."
    )


def is_tag(text: str) -> bool:
    """Whether a text, such as a title, is the tag of a model of ours."""
    return text.startswith(f"{MODEL_NAME}:")


def project_of(tag: str) -> str | None:
    """
    The project that a tag's model was trained for, None for a model of all projects.

    Releases before `is_project` trained for texts such as "0007"; those models stay out of what all projects get.
    """
    found = PROJECT_VERSION.fullmatch(tag.partition(":")[2])
    return found["project"] if found else None


def project_tag(project: str, job_id: str, attempt: int = 1) -> str:
    """The tag of the model that a job trains for a project; one for each attempt, as a machine may come back late."""
    return f"{MODEL_NAME}:project-{project}-{job_id}{f'x{attempt}' if attempt > 1 else ''}"
