"""The page at `/`, and the versions of a project: for people, for Label Studio, and never more than they may know."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
from flask.testing import FlaskClient

from celestial_backend import __version__
from celestial_backend.jobs.ledger import Ending
from celestial_backend.models import headed
from celestial_backend.services import Services, build
from celestial_backend.settings import MODEL_NAME, Settings, project_tag
from celestial_backend.web.app import create_app
from tests.support.backend_server import free_port
from tests.support.heads import KIND

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"}


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return build(Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path / "state"))


@pytest.fixture
def client(services: Services) -> FlaskClient:
    return create_app(services).test_client()


def changed(services: Services, **values: object) -> FlaskClient:
    """The app of the same with other settings."""
    return create_app(build(replace(services.settings, **values))).test_client()  # type: ignore[arg-type]


def added(services: Services, project: str, job: str, place: Path) -> str:
    """A model of a project, as a training leaves it in the store."""
    folder = place / job
    folder.mkdir()
    manifest = headed.save(folder, [KIND], "colours-1", None, None)
    return services.store.registry.add_heads(project_tag(project, job), folder, manifest)


@pytest.mark.parametrize("accept", [None, "*/*", "application/json", "application/json, text/html;q=0.5", "text/plain"])
def test_programs_get_what_they_got(client: FlaskClient, accept: str | None) -> None:
    """Label Studio, the SDK and whoever watches: JSON, the same as of /health."""
    answer = client.get("/", headers={"Accept": accept} if accept else {})
    assert answer.json == {"status": "UP", "model_class": "CelestialBodiesBackend", "version": __version__}
    assert answer.data == client.get("/health", headers=BROWSER).data


def test_people_read_what_runs(services: Services) -> None:
    """The version, the model, projects, trainings, the worker, the password, and what to type into Label Studio."""
    services.jobs.know("9")
    job = services.jobs.request("7")["job"]
    client = changed(services, backend_url="http://backend.example:9090", label_studio_api_key="t" * 40)
    answer = client.get("/", headers=BROWSER)
    assert (answer.status_code, answer.content_type) == (200, "text/html; charset=utf-8")
    assert answer.headers["Vary"] == "Accept"
    page = answer.text
    for fact in (
        f"Version {__version__}", f"<dt>Name</dt><dd><code>{services.store.live_tag()}</code>", "Earth, Jupiter", "http://backend.example:9090",
        "1 waiting", "None has shown itself", "no password is set", "The backend is not told where",
        'href="versions?project=7"',
        'href="versions?project=9"', 'href="docs"', 'href="metrics"', 'href="health"', "operations.md",
    ):  # fmt: skip
        assert fact in page
    assert '<meta http-equiv="refresh"' in page, "while a training waits"
    assert services.jobs.ledger.start("worker") is not None
    assert services.jobs.ledger.job(job) is not None
    assert "1 running" in client.get("/", headers=BROWSER).text


def test_it_tells_no_secret_and_no_path(services: Services, tmp_path: Path) -> None:
    """Neither of the settings nor in the reason of a job that failed."""
    services.jobs.request("7")
    started = services.jobs.ledger.start("worker")
    assert started is not None
    services.jobs.ledger.end(started, Ending("failed", f"The disk of {services.settings.model_dir} is full."))
    client = changed(
        services, basic_auth_user="u", basic_auth_pass="pass-word", label_studio_api_key="t" * 40,
        label_studio_url="http://me:secret@studio.example",
    )  # fmt: skip
    assert client.get("/", headers=BROWSER).status_code == 401
    page = client.get("/", headers=BROWSER, auth=("u", "pass-word")).text
    assert "The disk of … is full." in page
    assert "http://studio.example" in page
    for secret in (str(tmp_path), "pass-word", "t" * 40, "secret", "me:s"):
        assert secret not in page


def test_the_database_may_be_away(services: Services) -> None:
    """Then the page says so, and still tells what is served."""
    client = changed(services, database_url=f"postgresql+psycopg://u:p4ss@127.0.0.1:{free_port()}/x")
    answer = client.get("/", headers=BROWSER)
    assert answer.status_code == 200
    assert services.store.live_tag() in answer.text
    assert "CELESTIAL_DATABASE_URL" in answer.text
    assert "p4ss" not in answer.text


def test_a_model_that_cannot_be_served_is_said(services: Services) -> None:
    page = changed(services, model=f"{MODEL_NAME}:none").get("/", headers=BROWSER)
    assert page.status_code == 200
    assert f"The model {MODEL_NAME}:none is not in the BentoML store" in page.text


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_browser_is_told_what_may_run(client: FlaskClient, path: str) -> None:
    """Our own style and script by their hashes, requests to us alone, in nobody's frame."""
    answer = client.get(path, headers=BROWSER)
    rules = dict(rule.strip().split(" ", 1) for rule in answer.headers["Content-Security-Policy"].split(";"))
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert (rules["default-src"], rules["connect-src"], rules["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert rules[rule] == ("".join(f"'sha256-{each}'" for each in hashes) or "'none'")


@pytest.mark.parametrize("path", ["/setup", "/predict", "/webhook"])
def test_our_own_page_may_send_and_no_other(client: FlaskClient, path: str) -> None:
    """As a browser marks what a page sends."""
    own = {"Origin": "http://127.0.0.1:9090", "Host": "127.0.0.1:9090", "Sec-Fetch-Site": "same-origin"}
    assert client.post(path, json={}, headers=own).status_code == 400, "it was read"
    for other in (
        own | {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"},
        own | {"Origin": "http://127.0.0.1:8080", "Sec-Fetch-Site": "same-site"},
        own | {"Origin": "null"},
    ):
        assert client.post(path, json={}, headers=other).status_code == 403


def test_the_versions_of_a_project(services: Services, client: FlaskClient, tmp_path: Path) -> None:
    """Its live one first, then the others that are kept of it, the newest first; of all where no project is named."""
    default = services.store.live_tag()
    first, second, third, other = (
        added(services, project, f"{number:08}", tmp_path) for number, project in enumerate(("7", "7", "7", "8"))
    )
    services.store.publish("7", second)
    services.store.publish("8", other)
    assert client.get("/versions?project=7").json == {"versions": [second, third, first]}
    assert client.get("/versions?project=7.1795374408").json == {"versions": [second, third, first]}
    assert client.get("/versions?project=9").json == {"versions": [default]}
    assert client.get("/versions").json == {"versions": [second, other, default, third, first]}
    refused = client.get("/versions?project=../x")
    assert (refused.status_code, refused.json["code"]) == (400, "request")
    assert client.post("/versions", json={"project": "7"}).status_code == 405
