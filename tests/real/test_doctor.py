"""`doctor` on set-ups that were broken on purpose: what is wrong is named, and what fixes it does."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from click.testing import CliRunner
from packaging.specifiers import SpecifierSet

from celestial_backend.commands.cli import main
from celestial_backend.database import VERSION, Database
from celestial_backend.doctor import machine
from celestial_backend.doctor import studio as studio_checks
from celestial_backend.jobs.ledger import Ledger
from celestial_backend.models.store import DEFAULT_MODEL
from celestial_backend.planets import network
from celestial_backend.services import build
from celestial_backend.settings import MODEL_NAME, NEEDS_LABELS, Settings
from celestial_backend.studio.project import LIVE
from tests.support.backend_server import (
    BODIES,
    REPOSITORY,
    Backends,
    BackendServer,
    ServerProcess,
    free_port,
    label_config,
    plain_environ,
)
from tests.support.label_studio import LabelStudioServer
from tests.support.postgres_server import PostgresServer
from tests.support.stores import store_of

MonkeyPatch = pytest.MonkeyPatch


@dataclass
class Told:
    """What one run of `doctor` said."""

    code: int
    findings: dict[str, dict[str, Any]]
    text: str

    def state(self, name: str) -> str:
        return str(self.findings[name]["state"])


def doctor(*arguments: object) -> Told:
    ran = CliRunner().invoke(main, ["doctor", "--json", *map(str, arguments)])
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    found = json.loads(ran.stdout)["checks"]
    named = {each["name"] if not each["name"].startswith("Backend at ") else "Backend": each for each in found}
    for each in found:
        assert each["state"] in ("ok", "not checked") or each["mend"], f"no mend: {each}"
    return Told(ran.exit_code, named, ran.output)


@pytest.fixture
def port(monkeypatch: MonkeyPatch) -> int:
    """A free port as the setting."""
    number = free_port()
    monkeypatch.setenv("PORT", str(number))
    return number


# On this machine


def test_an_empty_machine_has_warnings_only_but_for_label_studio(port: int) -> None:
    """Nothing is put into the store or the state folder by a look."""
    told = doctor()
    assert told.code == 1
    assert [name for name in told.findings if told.state(name) == "fail"] == ["Label Studio"]
    assert told.state("Model") == told.state("Worker") == "warn"
    assert told.state("Token") == "not checked"
    assert str(port) in told.text
    assert not [*Path(os.environ["MODEL_DIR"]).iterdir(), *Path(os.environ["BENTOML_HOME"]).rglob("model.yaml")]


def files_in(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file."""
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: ((stat := path.stat()).st_size, stat.st_mtime_ns) for path in found}


@pytest.mark.usefixtures("port")
def test_a_look_after_an_upgrade_changes_nothing(monkeypatch: MonkeyPatch) -> None:
    """The default model of the older release is looked at, and a start is told to bring the new one."""
    services = build(Settings.from_environ())
    with monkeypatch.context() as older:
        older.setattr(network, "version", lambda _: "default-0123456789ab")
        old = services.store.live_tag()
    services.store.publish("3", old)
    services.jobs.request("3")
    services.jobs.huey.storage.close()
    places = Path(os.environ["MODEL_DIR"]), Path(os.environ["BENTOML_HOME"])
    before = files_in(*places)
    found = doctor().findings["Model"]
    assert files_in(*places) == before
    new = f"{MODEL_NAME}:{network.version(DEFAULT_MODEL)}"
    assert found["state"] == "warn"
    assert f"{old} loads, with 10 classes" in found["what"]
    assert f"the next start serves {new} in its place." in found["what"]
    assert store_of(Settings.from_environ()).live_tag() == new
    found = doctor().findings["Model"]
    assert found["state"] == "ok"
    assert f"{new} loads" in found["what"]


def test_packages_and_python_are_those_of_the_project(tmp_path: Path) -> None:
    """A package that is missing and one that is too old are named; the range of Python is pyproject's."""
    (tmp_path / "_wsgi.py").touch()
    (tmp_path / "requirements.txt").write_text("# All\nnumpy>=99  # much newer\n\nno-such-package-here\nclick\n")
    found = machine.python_and_packages(tmp_path)
    assert found.state == "fail"
    assert "numpy>=99 is asked for" in found.what
    assert "no-such-package-here is missing" in found.what
    assert "click" not in found.what
    assert found.mend.endswith(" -m pip install --no-deps 'numpy>=99' no-such-package-here")
    text = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"]
    (oldest, too_new) = (".".join(map(str, part)) for part in (machine.OLDEST, machine.TOO_NEW))
    assert SpecifierSet(text) == SpecifierSet(f">={oldest},<{too_new}")


def test_a_copy_that_does_not_know_its_packages_says_so(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Another package's requirements.txt, such as one among installed packages, is not believed."""

    def not_installed(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", not_installed)
    (tmp_path / "requirements.txt").write_text("no-such-package-here\n")
    found = machine.python_and_packages(tmp_path)
    assert found.state == "not checked"
    assert "no requirements.txt" in found.what


@pytest.mark.usefixtures("port")
def test_a_model_file_that_was_cut(model_store: Path, monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    """The model is named; removed as it is said, the default is offered again."""
    shutil.copytree(model_store, tmp_path / "broken")
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "broken"))
    (weights,) = (tmp_path / "broken").rglob("model.weights.h5")
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    told = doctor()
    found = told.findings["Model"]
    assert found["state"] == "fail"
    command = found["mend"].split(": ", 1)[1].split(" - ")[0].split()
    assert command[:4] == ["bentoml", "models", "delete", "-y"]
    program = Path(sys.executable).with_name("bentoml")
    subprocess.run([program, *command[1:]], check=True, env=os.environ, capture_output=True, timeout=120)
    assert doctor().state("Model") == "warn"
    subprocess.run([sys.executable, "-m", "celestial_backend", "models"], check=True, env=os.environ, cwd=REPOSITORY)
    assert doctor().state("Model") == "ok"


@pytest.mark.usefixtures("port")
def test_a_state_folder_that_cannot_be_written(monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    """A file in its place, also for root, who may write wherever modes forbid it."""
    place = tmp_path / "state-file"
    place.write_text("")
    monkeypatch.setenv("MODEL_DIR", str(place))
    found = doctor().findings["State folder"]
    assert found["state"] == "fail"
    assert "MODEL_DIR" in found["mend"]
    monkeypatch.setenv("MODEL_DIR", str(tmp_path / "other"))
    assert doctor().state("State folder") == "ok"


@pytest.mark.usefixtures("port")
def test_a_disk_that_is_full(monkeypatch: MonkeyPatch) -> None:
    """Little space is a warning, none a failure."""
    usage = shutil.disk_usage("/")
    for free, state in ((500, "warn"), (5, "fail")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=int(free * 1e6)))
        assert doctor().state("Disk") == state


def test_a_port_that_another_program_has(label_studio: LabelStudioServer, monkeypatch: MonkeyPatch) -> None:
    """Label Studio is not the backend."""
    monkeypatch.setenv("PORT", str(label_studio.port))
    told = doctor()
    assert told.state("Backend") == "fail"
    assert "PORT" in told.findings["Backend"]["mend"]


@pytest.mark.usefixtures("port")
def test_a_database_that_is_away_broken_or_new(monkeypatch: MonkeyPatch, database_url: str) -> None:
    """A look makes no tables in an empty one; the address is not shown, for it may hold a password."""
    monkeypatch.setenv("CELESTIAL_DATABASE_URL", database_url)
    empty, database = doctor(), Database(Settings.from_environ())
    assert empty.state("Database") == "ok"
    assert "first use" in empty.findings["Database"]["what"]
    with database.writing("tables") as transaction:
        transaction.run("UPDATE about SET value = :newer", newer=VERSION + 1)
    newer = doctor()
    assert newer.state("Database") == "fail"
    assert "newer release" in newer.findings["Database"]["what"]
    monkeypatch.setenv("CELESTIAL_DATABASE_URL", f"postgresql://me:sesame@127.0.0.1:{free_port()}/here")
    away = doctor()
    assert away.state("Database") == "fail"
    assert "sesame" not in away.text
    monkeypatch.delenv("CELESTIAL_DATABASE_URL")
    (Path(os.environ["MODEL_DIR"]) / "celestial.db").write_text("this is no database " * 100)
    assert doctor().state("Database") == "fail"


@pytest.mark.usefixtures("port")
def test_a_database_in_which_no_schema_may_be_made(monkeypatch: MonkeyPatch, postgres_server: PostgresServer) -> None:
    """The user of the backend is none that Label Studio's database lets make one."""
    url = postgres_server.fresh()
    with psycopg.connect(url) as connection:
        connection.execute("CREATE ROLE guest LOGIN PASSWORD 'sesame'")
    address = urlsplit(url)
    guest = address._replace(netloc=f"guest:sesame@{address.hostname}:{address.port}").geturl()
    monkeypatch.setenv("CELESTIAL_DATABASE_URL", guest)
    told = doctor()
    assert told.state("Database") == "fail"
    assert "GRANT CREATE" in told.findings["Database"]["mend"]
    with psycopg.connect(url) as connection:
        connection.execute("CREATE SCHEMA celestial AUTHORIZATION guest")
    assert doctor().state("Database") == "ok", "an administrator has made it"


def test_a_worker_that_is_dead(
    monkeypatch: MonkeyPatch, model_store: Path, port: int, tmp_path: Path
) -> None:
    """A backend that nothing keeps a worker for, and then the worker that is told to be started."""
    monkeypatch.setenv("BENTOML_HOME", str(model_store))
    folder = Path(sys.executable).parent
    environ = plain_environ(folder) | {name: os.environ[name] for name in ("MODEL_DIR", "BENTOML_HOME", "PORT")}
    command = [folder / "gunicorn", "--bind", f"127.0.0.1:{port}", "_wsgi:app"]
    backend = ServerProcess(command, cwd=REPOSITORY, environ=environ, log=tmp_path / "backend.log")
    try:
        backend.wait_for_answer(f"http://127.0.0.1:{port}/health", 60)
        told = doctor()
        assert told.state("Backend") == "ok"
        assert told.state("Worker") == "fail"
        assert "huey_consumer celestial_backend.worker.huey" in told.findings["Worker"]["mend"]
        command = [folder / "huey_consumer", "celestial_backend.worker.huey"]
        worker = ServerProcess(command, cwd=REPOSITORY, environ=environ, log=tmp_path / "worker.log")
        try:
            _wait_for_worker()
            assert doctor().state("Worker") == "ok"
        finally:
            worker.stop()
        assert doctor().state("Worker") == "fail"
    finally:
        backend.stop()


def _wait_for_worker() -> None:
    deadline = time.monotonic() + 30
    while not Ledger(Database(Settings.from_environ())).workers():
        assert time.monotonic() < deadline
        time.sleep(0.2)


# Label Studio itself


@pytest.fixture
def studio(label_studio: LabelStudioServer, monkeypatch: MonkeyPatch) -> LabelStudioServer:
    """Label Studio as the settings name it."""
    monkeypatch.setenv("LABEL_STUDIO_URL", label_studio.url)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", label_studio.legacy_token)
    return label_studio


@pytest.mark.usefixtures("port")
def test_label_studio_is_down(monkeypatch: MonkeyPatch) -> None:
    """What depends on it is not checked."""
    monkeypatch.setenv("LABEL_STUDIO_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "sesame")
    told = doctor()
    assert told.code == 1
    assert "LABEL_STUDIO_URL" in told.findings["Label Studio"]["mend"]
    assert told.state("Token") == told.state("Projects") == told.state("Clock") == "not checked"
    assert "sesame" not in told.text


def _personal(expiry: float) -> str:
    parts = ({"alg": "HS256", "typ": "JWT"}, {"token_type": "refresh", "exp": int(expiry), "jti": "0", "user_id": 1})
    packed = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*packed, "c2lnbmF0dXJl"])


@pytest.mark.usefixtures("port")
def test_tokens(studio: LabelStudioServer, monkeypatch: MonkeyPatch) -> None:
    """A wrong one, one that has run out and one that is refused; and each kind that is accepted."""
    cases = {
        "0" * 40: "legacy token is refused",
        _personal(time.time() - 3600): "has run out on",
        _personal(time.time() + 3600): "personal access token is refused",
    }
    for key, said in cases.items():
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", key)
        told = doctor()
        assert told.code == 1
        assert said in told.findings["Token"]["what"]
        assert "LABEL_STUDIO_API_KEY" in told.findings["Token"]["mend"]
        assert told.state("Projects") == "not checked"
        assert key not in told.text
        assert "sessionid" not in told.text
    for key, kind in ((studio.legacy_token, "legacy token"), (studio.personal_access_token, "personal access token")):
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", key)
        found = doctor("--project", 999_999).findings
        assert found["Token"]["what"].startswith(f"The {kind} is accepted")
        assert "999999" in found["Project 999999"]["what"]
        assert found["Clock"]["state"] == "ok"


@pytest.mark.usefixtures("port")
def test_a_legacy_token_where_they_are_switched_off(studio: LabelStudioServer) -> None:
    """As in every new Label Studio; switched on as it is said, the token is accepted."""
    headers = {"X-CSRFToken": studio.session.cookies["csrftoken"], "Referer": studio.url}
    for allowed in (False, True):
        body = {"api_tokens_enabled": True, "legacy_api_tokens_enabled": allowed}
        studio.session.post(f"{studio.url}/api/jwt/settings", json=body, headers=headers).raise_for_status()
        found = doctor("--project", 999_999).findings["Token"]
        assert found["state"] == ("ok" if allowed else "fail")
        assert allowed or "switch legacy tokens on" in found["mend"]


@pytest.mark.usefixtures("port", "studio")
def test_a_clock_that_is_wrong(monkeypatch: MonkeyPatch) -> None:
    """Two minutes are a warning, as personal access tokens would fail."""
    real = time.time
    monkeypatch.setattr(studio_checks.time, "time", lambda: real() + 120)
    told = doctor("--project", 999_999)
    assert told.state("Clock") == "warn"
    assert "seconds ahead of Label Studio" in told.findings["Clock"]["what"]


# A project that is connected


@pytest.fixture
def backend(
    studio: LabelStudioServer, backends: Backends, model_store: Path, monkeypatch: MonkeyPatch, request: Any
) -> BackendServer:
    """A backend that shares state folder and store with `doctor`, and its settings."""
    more = getattr(request, "param", {})
    for name, value in (more | {"BENTOML_HOME": str(model_store)}).items():
        monkeypatch.setenv(name, value)
    server = backends(
        LABEL_STUDIO_URL=studio.url, LABEL_STUDIO_API_KEY=studio.legacy_token, MODEL_DIR=os.environ["MODEL_DIR"],
        BENTOML_HOME=model_store, **more,
    )  # fmt: skip
    monkeypatch.setenv("PORT", str(server.port))
    _wait_for_worker()
    return server


def connect(studio: LabelStudioServer, backend: BackendServer, title: str | None = None, **more: Any) -> int:
    project = studio.create_project("Doctor")
    studio.connect_backend(project, backend.url, title or backend.model_version, **more)
    return project


def test_a_good_set_up(studio: LabelStudioServer, backend: BackendServer) -> None:
    """Everything is fine once an event has come; one project is looked at, or all that are connected to us."""
    project = connect(studio, backend)
    told = doctor("--project", project)
    assert told.code == 0
    assert [name for name in told.findings if told.state(name) != "ok"] == ["Webhook events"]
    (task,) = studio.import_tasks(project, ["/data/upload/none.png"])
    studio.annotate(task, "Mars")
    told = doctor()  # other tests leave projects whose backends are gone
    found = [each for each in json.loads(told.text[told.text.index("{") :])["checks"] if each["project"] == project]
    assert "Webhook events" in {each["name"] for each in found}
    assert {each["state"] for each in found} == {"ok"}, told.text
    assert studio.legacy_token not in told.text
    plain = CliRunner().invoke(main, ["doctor", "--project", str(project)])
    assert "0 failed, 0 with a warning" in plain.stdout
    studio.api("DELETE", f"/api/projects/{project}/")


def test_what_the_running_backend_sees(
    studio: LabelStudioServer, backend: BackendServer, backends: Backends, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """It has settings of its own: a shell that is right does not hide them, and one that differs is named."""
    assert doctor("--project", 999_999).state("Running backend") == "ok"
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", studio.personal_access_token)
    told = doctor("--project", 999_999)
    assert (told.state("Token"), told.state("Running backend")) == ("ok", "warn")
    assert told.findings["Running backend"]["what"].endswith("than are set here: LABEL_STUDIO_API_KEY.")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("MODEL_DIR", str(tmp_path / "elsewhere"))
    assert doctor("--project", 999_999).state("Running backend") == "fail"
    assert str(studio.personal_access_token) not in told.text

    store = os.environ["BENTOML_HOME"]
    wrong = backends(LABEL_STUDIO_URL=studio.url, LABEL_STUDIO_API_KEY="0" * 40, BENTOML_HOME=store)
    told = doctor("--project", 999_999, "--backend-url", f"{wrong.url}/docs")
    assert told.state("Token") == "ok", "the shell's own is right"
    assert told.state("Running backend") == "fail"
    assert "answered 401" in told.findings["Running backend"]["what"]
    assert "what is set in this shell does not reach it" in told.findings["Running backend"]["mend"]
    assert backend.url != wrong.url


@pytest.mark.usefixtures("port")
def test_a_project_that_is_not_connected(studio: LabelStudioServer) -> None:
    """Its label config is looked at first; then it is told to connect, with the address to type."""
    for config, state in ((label_config(), "ok"), (label_config(("Mars", "Dog")), "warn")):
        project = studio.create_project("Not connected", config)
        build(Settings.from_environ()).store.live_tag()
        told = doctor("--project", project, "--backend-url", f"http://127.0.0.1:{os.environ['PORT']}")
        assert told.code == 1
        names = list(told.findings)
        assert names.index("Label config") < names.index("Connection")
        assert (told.state("Label config"), told.state("Connection")) == (state, "fail")
        assert f"http://127.0.0.1:{os.environ['PORT']}" in told.findings["Connection"]["mend"]


def test_a_webhook_that_is_missing_or_off(studio: LabelStudioServer, backend: BackendServer) -> None:
    """It is made again, and an event comes through it; without --fix nothing is changed."""
    project = connect(studio, backend)
    (hook,) = studio.webhooks(project)
    studio.api("DELETE", f"/api/webhooks/{hook['id']}/")
    told = doctor("--project", project)
    assert told.code == 1
    assert told.state("Webhook") == "fail"
    assert told.state("Webhook events") == "not checked"
    assert not studio.webhooks(project)
    assert told.findings["Webhook"]["mend"].endswith(f"doctor --project {project} --fix")
    told = doctor("--project", project, "--fix")
    assert told.code == 0
    assert told.findings["Webhook"]["changed"]
    assert told.findings["Webhook events"]["changed"]
    (hook,) = studio.webhooks(project)
    studio.api("PATCH", f"/api/webhooks/{hook['id']}/", json={"url": hook["url"], "is_active": False})
    assert doctor("--project", project).state("Webhook") == "fail"
    assert doctor("--project", project, "--fix").code == 0
    assert doctor("--project", project).state("Webhook events") == "ok"


@pytest.mark.parametrize("backend", [{"BASIC_AUTH_USER": "mars", "BASIC_AUTH_PASS": "sesame"}], indirect=True)
def test_a_webhook_that_lacks_the_password(
    studio: LabelStudioServer, backend: BackendServer, monkeypatch: MonkeyPatch
) -> None:
    """Label Studio does not send the model's password with events, until it is told to."""
    login = {"auth_method": "BASIC_AUTH", "basic_auth_user": "mars", "basic_auth_pass": "sesame"}
    project = connect(studio, backend, **login)
    told = doctor("--project", project)
    assert told.code == 1
    assert told.state("Connection") == told.state("Backend") == "ok"
    assert told.state("Webhook password") == "fail"
    assert "sesame" not in told.text
    told = doctor("--project", project, "--fix")
    assert told.code == 0
    assert told.state("Webhook events") == "ok"
    secret = base64.b64encode(b"mars:sesame").decode()
    assert secret not in told.text
    (hook,) = studio.webhooks(project)
    assert hook["headers"] == {"Authorization": f"Basic {secret}"}
    monkeypatch.setenv("BASIC_AUTH_PASS", "wrong")
    assert doctor("--project", project).state("Backend") == "fail"


def test_label_configs_that_do_not_fit(studio: LabelStudioServer, backend: BackendServer) -> None:
    """Choices that the model does not know, all or some, are a warning, and both sides are named; no choice fails."""
    project = connect(studio, backend)
    for choices, state in ((("Mars", "Dog"), "warn"), (("Cat", "Dog"), "warn"), (BODIES, "ok")):
        studio.api("PATCH", f"/api/projects/{project}/", json={"label_config": label_config(choices)})
        told = doctor("--project", project)
        assert told.code == 0, told.text
        found = told.findings["Label config"]
        assert (found["state"], told.state("Connection"), told.state("Version")) == (state, "ok", "ok")
        if state != "ok":
            assert "'Dog'" in found["what"]
            assert "'Saturn'" in found["what"] or "'Earth'" in found["what"]
        for name in ("Label config", "Version"):
            assert (NEEDS_LABELS in told.findings[name]["what"]) == ("Cat" in choices)
    boxes = '<View><Image name="i" value="$image"/><RectangleLabels name="b" toName="i"><Label value="Cat"/>'
    config = f"{boxes}</RectangleLabels></View>"
    studio.api("PATCH", f"/api/projects/{project}/", json={"label_config": config})
    told = doctor("--project", project)
    assert told.code == 1
    assert told.state("Label config") == told.state("Connection") == "fail"
    assert "Put Choices on an Image" in told.findings["Label config"]["mend"]


def test_labels_that_are_missing(studio: LabelStudioServer, backend: BackendServer, monkeypatch: MonkeyPatch) -> None:
    """A hint, as the worker has counted them; whatever else keeps a training from beginning is one too."""
    project, ledger = connect(studio, backend), Ledger(Database(Settings.from_environ()), wait_s=30)
    (task,) = studio.import_tasks(project, ["/data/upload/none.png"])
    studio.annotate(task, "Mars")
    deadline = time.monotonic() + 60
    while not (known := ledger.known(str(project))) or "1 label" not in known.hindrance:
        assert time.monotonic() < deadline, known
        time.sleep(0.1)
    said = (
        "choice: 1 label of 'Mars'; at least 2 choices need 3 labels each, so label 2 more pictures of 'Mars' and 3 of"
        " another choice."
    )
    told = doctor("--project", project)
    assert (told.code, told.state("Labels"), told.findings["Labels"]["what"]) == (0, "ok", said)
    ran = CliRunner().invoke(main, ["jobs", "--project", str(project)])
    assert " ".join(ran.stdout.split("─\n")[1].split()).startswith(f"{project} not begun choice: 1 label of 'Mars';")
    backend.stop()  # so that no look of its worker comes between
    ledger.looked(str(project), labels=1, missing="", brought="It was brought.")
    assert doctor("--project", project).findings["Labels"]["what"] == "It was brought."
    ledger.looked(str(project), labels=1, missing="", brought="")
    assert doctor("--project", project).findings["Labels"]["what"] == "There are enough to learn from."
    monkeypatch.setenv("CELESTIAL_TRAIN_EVERY", "off")
    assert "Start Training alone trains" in doctor("--project", project).findings["Labels"]["what"]
    ledger.forget(str(project))
    assert "a worker does so within a minute" in doctor("--project", project).findings["Labels"]["what"]


def test_a_version_that_is_out_of_step(studio: LabelStudioServer, backend: BackendServer) -> None:
    """A title that is an old tag; and one that a person chose, which is no failure."""
    version = backend.model_version
    old = f"{version.split(':')[0]}:old"
    project = connect(studio, backend, title=old)
    told = doctor("--project", project)
    assert told.code == 1
    assert old in told.findings["Version"]["what"]
    told = doctor("--project", project, "--fix")
    assert told.code == 0
    assert told.state("Version") == "ok"
    assert "title is the same now" in told.findings["Version"]["changed"]
    assert studio.model(project)["title"] == version
    other = connect(studio, backend, title="My model")
    told = doctor("--project", other)
    assert told.code == 0
    assert told.state("Version") == "warn"
    record = studio.model(other)
    body = {"url": record["url"], "project": other, "title": version}
    assert version in told.findings["Version"]["mend"]
    studio.api("PATCH", f"/api/ml/{record['id']}", json=body)
    (task,) = studio.import_tasks(other, ["http://127.0.0.1/a.png"])
    assert doctor("--project", other).state("Version") == "ok"
    studio.api("POST", "/api/predictions/", json={"task": task, "result": [], "model_version": version})
    studio.api("PATCH", f"/api/ml/{record['id']}", json=body | {"title": version + LIVE})
    studio.api("PATCH", f"/api/projects/{other}/", json={"model_version": version})
    stored = doctor("--project", other).findings["Version"]
    assert stored["state"] == "ok"
    assert "stored predictions" in stored["what"]


def test_a_private_address_that_label_studio_blocks(studio: LabelStudioServer, backend: BackendServer) -> None:
    """A connection from before the update that blocks them: today's Label Studio would not save its address."""
    if studio.is_before("1.23.1") or studio.on_postgresql:
        pytest.skip("it blocks them since 1.23.1, and is made to have one in a database of SQLite's")
    project = connect(studio, backend)
    record = studio.model(project)
    with sqlite3.connect(studio.data_folder / "label_studio.sqlite3", timeout=30) as database:
        blocked = f"http://127.0.0.2:{backend.port}"
        database.execute("UPDATE ml_mlbackend SET url = ? WHERE id = ?", (blocked, record["id"]))
    database.close()
    told = doctor("--project", project)
    assert told.code == 1
    found = told.findings["Connection"]
    assert "private address" in found["what"]
    assert "127.0.0.0/" in found["what"] or "127.0.0.2" in found["what"]
    assert "private-addresses ADDRESS" in found["mend"]
    body = {"url": backend.url, "project": project, "title": record["title"]}
    studio.api("PATCH", f"/api/ml/{record['id']}", json=body)  # an address that is allowed
    assert doctor("--project", project).state("Connection") == "ok"


def test_a_backend_that_has_stopped(studio: LabelStudioServer, backend: BackendServer) -> None:
    """Label Studio says that it does not reach it."""
    project = connect(studio, backend)
    backend.stop()
    told = doctor("--project", project)
    assert told.code == 1
    assert told.state("Connection") == "fail"
    assert told.state("Version") == "not checked"
    assert told.state("Worker") == "warn"


@pytest.mark.usefixtures("port")
def test_nothing_is_connected(studio: LabelStudioServer) -> None:
    """A project without a model is a failure where it was asked for."""
    project = studio.create_project("Alone")
    told = doctor("--project", project)
    assert told.state("Connection") == "fail"
    assert "Connect Model" in told.findings["Connection"]["mend"]
