"""
Every setting, declared once and read once.

`Settings.from_environ` is the only reader of the environment. Each field carries
the variable's name, how its text is read, and the sentence that the README shows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from celestial_backend.errors import SettingsError

MODEL_NAME = "celestial_bodies_classifier_model"
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def _text(text: str) -> str:
    return text


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an address that starts with http:// or https://")
    return text.rstrip("/")


def _log_level(text: str) -> str:
    if text.upper() not in LOG_LEVELS:
        raise ValueError(f"must be one of {', '.join(LOG_LEVELS)}")
    return text.upper()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("must be a whole number of 1 or more")
    return int(text)


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


def _redis(text: str) -> str:
    if urlsplit(text).scheme not in ("redis", "rediss", "unix"):
        raise ValueError("must be an address that starts with redis://, rediss:// or unix://")
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
        "LABEL_STUDIO_URL", _url, None, "Where Label Studio is, as seen from the backend."
    )
    label_studio_api_key: str | None = setting(
        "LABEL_STUDIO_API_KEY",
        _text,
        None,
        "A token of Label Studio: a personal access token or a legacy token.",
        repr=False,
    )
    model_dir: Path = setting("MODEL_DIR", _path, Path("data").resolve(), "The state folder.")
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
        "Public names that this backend has, separated by commas; without a password it is asked by no others.",
    )
    log_level: str = setting("LOG_LEVEL", _log_level, "INFO", "`DEBUG`, `INFO`, `WARNING` or `ERROR`.")
    port: int = setting("PORT", _port, 9090, "Port that the web server listens on.")
    workers: int = setting("WORKERS", _count, 1, "Web server processes; each holds its own model.")
    threads: int = setting(
        "THREADS", _count, 8, "Predictions that one web server process works at side by side; more wait in line."
    )
    model: str = setting("CELESTIAL_MODEL", _text, f"{MODEL_NAME}:latest", "The BentoML tag to serve.")
    bentomodel: Path | None = setting(
        "CELESTIAL_BENTOMODEL", _file, None, "A `.bentomodel` file, imported into the store at start and served."
    )
    data_folder: Path | None = setting(
        "CELESTIAL_DATA_FOLDER", _folder, None, "Folder with the original pictures, found there by their own name."
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
        "Pictures that are fetched side by side for one batch, and as many for single tasks; other batches have a"
        " quarter more.",
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
        "Megabytes that a request to /predict may have, and a tenth of it one to /setup or /webhook; no more are let in"
        " while those that are here have as many.",
    )
    batch_size: int = setting(
        "CELESTIAL_BATCH_SIZE",
        _count,
        64,
        "Tasks in one forward pass; requests with more get half of the `THREADS` at most.",
    )
    redis_url: str | None = setting(
        "REDIS_URL", _redis, None, "A Redis that holds the queue, in place of a file in the state folder.", repr=False
    )
    train_every: int | None = setting(
        "CELESTIAL_TRAIN_EVERY", _count, None, "New or changed labels of a project after which it trains by itself."
    )
    train_max_s: float = setting("CELESTIAL_TRAIN_MAX_S", _positive, 1800.0, "Seconds that one training may take.")
    accepted_weight: float = setting(
        "CELESTIAL_ACCEPTED_WEIGHT",
        _share,
        1.0,
        "What a label counts in training that was submitted as it was pre-labelled, from 0 to 1.",
    )
    keep_models: int = setting(
        "CELESTIAL_KEEP_MODELS",
        _count,
        5,
        "Newest trained models that are kept for a project; the live one and its parents are kept in any case.",
    )

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
            f"{name} is not a setting of this backend; the README lists them all"
            for name in sorted(environ)
            if name.startswith("CELESTIAL_") and name not in known
        ]
        if ("basic_auth_user" in values) != ("basic_auth_pass" in values):
            problems.append("BASIC_AUTH_USER and BASIC_AUTH_PASS must be set together; one of them is missing")
        if problems:
            raise SettingsError(". ".join(problems) + ".")
        return cls(**values)
