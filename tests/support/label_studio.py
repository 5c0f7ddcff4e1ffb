"""A real Label Studio for the tests: its own virtual environment, its own data, its API by plain method calls."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from label_studio_sdk import LabelStudio

from tests.support.backend_server import ServerProcess, free_port, label_config, plain_environ

VERSION = "1.23.2"
DATABASE = "label_studio.sqlite3"
SILENT = {  # nothing is sent or asked outside this machine
    "COLLECT_ANALYTICS": "false",
    "LATEST_VERSION_CHECK": "false",
    "SENTRY_DSN": "",
    "FRONTEND_SENTRY_DSN": "",
    "FEATURE_FLAGS_OFFLINE": "true",
}
FILES_PER_UPLOAD = 100  # Django's DATA_UPLOAD_MAX_NUMBER_FILES as Label Studio sets it; one more is refused

# Label Studio's own list of reserved networks (core/utils/io.py in 1.23.2). It has no list of exceptions, so the one
# address that the backend listens on is left out of a copy of the list, and both protections stay on.
RESERVED_NETWORKS = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "233.252.0.0/24",
    "240.0.0.0/4",
    "255.255.255.255/32",
    "::/128",
    "::1/128",
    "::ffff:0:0/96",
    "::ffff:0:0:0/96",
    "64:ff9b::/96",
    "64:ff9b:1::/48",
    "100::/64",
    "2001::/32",
    "2001:20::/28",
    "2001:db8::/32",
    "2002::/16",
    "fc00::/7",
    "fe80::/10",
    "ff00::/8",
)


def networks_without(address: str, networks: Sequence[str] = RESERVED_NETWORKS) -> str:
    """The networks as Label Studio wants them (commas, no blanks), with a hole for one address."""
    hole, parts = ip_network(address), []
    for network in map(ip_network, networks):
        inside = network.version == hole.version and hole.subnet_of(network)  # type: ignore[arg-type]
        parts += network.address_exclude(hole) if inside else [network]  # type: ignore[arg-type]
    return ",".join(map(str, parts))


def label_studio_program(version: str = VERSION) -> Path:
    """
    The start program of a Label Studio; its virtual environment is made on first use.

    `TEST_LABEL_STUDIO_VENV` names an environment that is there already. Otherwise one is kept in the user's cache
    folder. It is made under the name it will keep, because programs of a virtual environment hold its path, and
    counts only once the note that it is complete has been written: a killed installation is made again.
    """
    given = os.environ.get("TEST_LABEL_STUDIO_VENV")
    if given:
        return Path(given) / "bin" / "label-studio"
    with locked_cache() as cache:
        folder, complete = cache / f"label-studio-{version}", cache / f"label-studio-{version}.complete"
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            uv = [sys.executable, "-m", "uv"]
            subprocess.run([*uv, "venv", "--python", sys.executable, str(folder)], check=True)
            install = [*uv, "pip", "install", "--python", str(folder / "bin" / "python"), f"label-studio=={version}"]
            subprocess.run(install, check=True)
            complete.write_text(version)
    return folder / "bin" / "label-studio"


@contextlib.contextmanager
def locked_cache() -> Iterator[Path]:
    """The folder that later sessions find again, for one process at a time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "celestial-backend"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield cache


def put_database(program: Path, folder: Path, version: str) -> None:
    """
    Give Label Studio the database that its first start would make, in a fraction of the time.

    `label-studio version` runs all migrations and makes no user; what it leaves is kept in the cache. With an
    environment of somebody's own, whose version is unknown, Label Studio makes its database itself.
    """
    if os.environ.get("TEST_LABEL_STUDIO_VENV"):
        return
    with locked_cache() as cache:
        kept = cache / f"label-studio-{version}.sqlite3"
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=cache) as new:
                environ = plain_environ(program.parent) | SILENT | {"LABEL_STUDIO_BASE_DATA_DIR": new}
                subprocess.run([program, "version"], env=environ, check=True)
                (Path(new) / DATABASE).replace(kept)
        shutil.copyfile(kept, folder / DATABASE)


def _on(postgresql: str | None) -> dict[str, str]:
    """The settings by which Label Studio uses a PostgreSQL."""
    if postgresql is None:
        return {}
    place = urlsplit(postgresql)
    names = {"HOST": place.hostname, "PORT": place.port or 5432, "NAME": place.path[1:], "USER": place.username,
             "PASSWORD": unquote(place.password or "")}  # fmt: skip
    return {"DJANGO_DB": "default"} | {f"POSTGRE_{name}": str(value) for name, value in names.items()}


class LabelStudioServer(ServerProcess):
    """
    A running Label Studio with one user; lives as long as the test session.

    `data_folder` is what `CELESTIAL_LABEL_STUDIO_DATA` would name, `local_files_root` the local-files root.
    Its database is a SQLite file, or the empty one of a PostgreSQL that `postgresql` is the url of.
    """

    user = "annotator@example.com"

    def __init__(self, folder: Path, postgresql: str | None = None, version: str = VERSION) -> None:
        self.version, self.on_postgresql, self.port = version, postgresql is not None, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.password, self.legacy_token = secrets.token_urlsafe(12), secrets.token_hex(20)
        self.data_folder, self.local_files_root = folder / "data", folder / "local-files"
        for path in (self.data_folder, self.local_files_root):
            path.mkdir()
        program = label_studio_program(version)
        if postgresql is None:
            put_database(program, self.data_folder, version)
        super().__init__(
            [program, "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(self.port)],
            cwd=folder,
            environ=plain_environ(program.parent) | SILENT | self._settings() | _on(postgresql),
            log=folder / "label-studio.log",
        )
        try:
            self.wait_for_answer(f"{self.url}/health", 240)
        except BaseException:
            self.stop()
            raise

    def _settings(self) -> dict[str, str]:
        return {
            "LABEL_STUDIO_BASE_DATA_DIR": str(self.data_folder),
            "LABEL_STUDIO_HOST": self.url,
            "LABEL_STUDIO_USERNAME": self.user,
            "LABEL_STUDIO_PASSWORD": self.password,
            "LABEL_STUDIO_USER_TOKEN": self.legacy_token,
            "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
            "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
            "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(self.local_files_root),
            "USE_DEFAULT_BANNED_SUBNETS": "false",
            "USER_ADDITIONAL_BANNED_SUBNETS": networks_without("127.0.0.1/32"),
        }

    def is_before(self, version: str) -> bool:
        """Whether this is an older Label Studio than that one."""
        mine, other = ([int(part) for part in each.split(".")] for each in (self.version, version))
        return mine < other

    # Ways in

    def api(self, method: str, path: str, timeout: float = 240, **options: Any) -> Any:
        """One API call with the legacy token; the answer's JSON; fails when the status is 400 or above."""
        headers = {"Authorization": f"Token {self.legacy_token}"}
        answer = requests.request(method, f"{self.url}{path}", headers=headers, timeout=timeout, **options)
        assert answer.status_code < 400, f"{method} {path}: {answer.status_code} {answer.text[:2000]}"
        return answer.json() if answer.content else None

    @cached_property
    def sdk(self) -> LabelStudio:
        return LabelStudio(base_url=self.url, api_key=self.legacy_token)

    @cached_property
    def session(self) -> requests.Session:
        """A browser's session, signed in."""
        session = requests.Session()
        page = f"{self.url}/user/login/"
        session.get(page, timeout=30).raise_for_status()
        form = {"email": self.user, "password": self.password, "csrfmiddlewaretoken": session.cookies["csrftoken"]}
        session.post(page, data=form, headers={"Referer": page}, timeout=30).raise_for_status()
        assert "sessionid" in session.cookies, "Label Studio did not sign the user in"
        return session

    @cached_property
    def personal_access_token(self) -> str:
        """The user's personal access token, made once: Label Studio shows it only then and refuses a second."""
        headers = {"X-CSRFToken": self.session.cookies["csrftoken"], "Referer": self.url}
        answer = self.session.post(f"{self.url}/api/token/", headers=headers, timeout=30)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["token"])

    # What people do

    def create_project(self, title: str, config: str | None = None) -> int:
        return int(self.sdk.projects.create(title=title, label_config=config or label_config()).id)

    def upload(self, project: int, paths: Sequence[Path]) -> dict[str, str]:
        """Upload pictures as tasks; returns each task's picture address by the file's own name."""
        for start in range(0, len(paths), FILES_PER_UPLOAD):
            with contextlib.ExitStack() as opened:
                # Each under a field name of its own: of several files with the same one, only the last is kept.
                files = {
                    f"file{number}": (path.name, opened.enter_context(path.open("rb")))
                    for number, path in enumerate(paths[start : start + FILES_PER_UPLOAD])
                }
                self.api("POST", f"/api/projects/{project}/import", files=files)
        addresses = [task["data"]["image"] for task in self.tasks(project, fields="task_only")]
        return {own_name(address): address for address in addresses}

    def import_tasks(self, project: int, values: Sequence[str], key: str = "image") -> list[int]:
        """Import tasks by picture address; their ids in the same order."""
        body = [{"data": {key: value}} for value in values]
        answer = self.api("POST", f"/api/projects/{project}/import?return_task_ids=true", json=body)
        return [int(task) for task in answer["task_ids"]]

    def import_labelled(self, project: int, labels: Iterable[tuple[str, str]]) -> list[int]:
        """Import tasks by picture address, each with a person's choice; their ids in the same order."""
        body = [{"data": {"image": value}, "annotations": [labelled(choice)]} for value, choice in labels]
        answer = self.api("POST", f"/api/projects/{project}/import?return_task_ids=true", json=body)
        return [int(task) for task in answer["task_ids"]]

    def add_local_files(self, project: int, folder: Path) -> None:
        """Connect a folder below the local-files root as a source of tasks and synchronise it."""
        body = {"project": project, "path": str(folder), "use_blob_urls": True, "regex_filter": r".*\.(png|jpe?g)"}
        storage = self.api("POST", "/api/storages/localfiles", json=body)["id"]
        self.api("POST", f"/api/storages/localfiles/{storage}/sync")

    def connect_backend(self, project: int, url: str, title: str = "celestial", **more: Any) -> dict[str, Any]:
        """Connect Model, through the request that the dialog sends."""
        return dict(self.api("POST", "/api/ml/", json={"project": project, "url": url, "title": title, **more}))

    def model(self, project: int) -> dict[str, Any]:
        """The record of the project's one model; Label Studio asks the backend for its version first."""
        (record,) = self.api("GET", f"/api/ml?project={project}")
        return dict(record)

    def start_training(self, project: int) -> None:
        """The model menu's Start Training, through the request that it sends."""
        self.api("POST", f"/api/ml/{self.model(project)['id']}/train", json={})

    def retrieve(self, project: int, tasks: Sequence[int] | None = None) -> float:
        """The Data Manager's Retrieve Predictions, for all tasks or some; the seconds that it took."""
        chosen = {"all": True, "excluded": []} if tasks is None else {"all": False, "included": list(tasks)}
        path = f"/api/dm/actions?id=retrieve_tasks_predictions&project={project}"
        started = time.monotonic()
        self.api("POST", path, timeout=600, json={"selectedItems": chosen})
        return time.monotonic() - started

    def tasks(self, project: int, fields: str = "all") -> list[dict[str, Any]]:
        return list(self._pages(f"/api/tasks?project={project}&fields={fields}"))

    def _pages(self, path: str, size: int = 500) -> Iterator[dict[str, Any]]:
        page, seen, total = 1, 0, 1
        while seen < total:
            answer = self.api("GET", f"{path}&page={page}&page_size={size}")
            yield from answer["tasks"]
            page, seen, total = page + 1, seen + len(answer["tasks"]), answer["total"]

    def predictions(self, project: int) -> list[dict[str, Any]]:
        return list(self.api("GET", f"/api/predictions/?project={project}"))

    def annotations(self, project: int) -> list[dict[str, Any]]:
        return [annotation for task in self.tasks(project) for annotation in task["annotations"]]

    def annotate(self, task: int, choice: str) -> dict[str, Any]:
        """A person's answer to a task, as the API takes it."""
        return dict(self.api("POST", f"/api/tasks/{task}/annotations/", json=labelled(choice)))

    def webhooks(self, project: int) -> list[dict[str, Any]]:
        return list(self.api("GET", f"/api/webhooks/?project={project}"))


def labelled(choice: str) -> dict[str, Any]:
    """An annotation with one choice, as the API takes it; imported ones would count as ground truth otherwise."""
    region = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": [choice]}}
    return {"result": [region], "ground_truth": False}


def own_name(address: str) -> str:
    """The name that a file had before Label Studio put eight hexadecimal digits and a dash in front of it."""
    return re.sub(r"^[0-9a-f]{8}-", "", address.rsplit("/", 1)[-1])
