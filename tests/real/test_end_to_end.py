"""A real Label Studio and the backend as a user starts it: what ends up in Label Studio, and what the log says."""

from __future__ import annotations

import base64
import random
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from celestial_backend.labels.controls import UNKNOWN_SCORE
from celestial_backend.planets.renderer import render
from tests.support.backend_server import BODIES, BackendServer
from tests.support.label_studio import LabelStudioServer, own_name

pytestmark = pytest.mark.timeout(900)

UPLOADS = 250
PEOPLE = "https://labels.example.com/studio"  # a name of Label Studio that nobody knows here
HEALTH_S, SETUP_S, PREDICT_S = 5.0, 10.0, 100.0  # Label Studio waits 1, 3 and 100; other tests want the processor too


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Small pictures, no two alike, the ten bodies by turns."""
    folder = tmp_path_factory.mktemp("pictures")
    drawn = [render(BODIES[number % 10], seed=number, size_px=64) for number in range(50)]
    paths = [folder / f"picture_{number}.jpg" for number in range(UPLOADS)]
    for number, path in enumerate(paths):
        drawn[number % 50].rotate(number / UPLOADS * 360).save(path, quality=90)
    return paths


@pytest.fixture(scope="module")
def connected(label_studio: LabelStudioServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    """A backend that gets its pictures from Label Studio over HTTP, as in a first try of the README."""
    settings = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.legacy_token}
    backend = BackendServer(tmp_path_factory.mktemp("backend"), **settings)
    yield backend
    backend.stop()


def data_uri(path: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"


def choice_of(prediction: dict[str, Any]) -> str | None:
    """None of a picture that is taken for unlike all that was learned, as one in fifty is."""
    choices = [choice for region in prediction["result"] for choice in region["value"]["choices"]]
    assert len(choices) == (prediction["score"] > UNKNOWN_SCORE)
    return str(choices[0]) if choices else None


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_every_upload_gets_the_prediction_of_its_own_picture(
    label_studio: LabelStudioServer, connected: BackendServer, pictures: list[Path]
) -> None:
    """
    One Retrieve Predictions gives every one of many tasks one prediction of one version, its own.

    What is right is asked of the backend beforehand with the pictures written into the request, in another
    order and in other batches, so nothing that could mix up tasks is shared.
    """
    project = label_studio.create_project("Many uploads")
    addresses = label_studio.upload(project, pictures)
    assert len(addresses) == UPLOADS
    shuffled = random.Random(7).sample(pictures, UPLOADS)  # noqa: S311 - an order, not a secret
    expected: dict[str, Any] = {}
    for some in (shuffled[start : start + 70] for start in range(0, UPLOADS, 70)):
        expected |= zip([path.name for path in some], connected.predict([data_uri(path) for path in some]), strict=True)

    label_studio.connect_backend(project, connected.url)
    with ThreadPoolExecutor(1) as pool:
        retrieving = pool.submit(label_studio.retrieve, project)
        health_s, setup_s = slowest_answers(connected, until=retrieving.done)
    assert seconds_of(connected, "POST /predict")[-1] < PREDICT_S, "Label Studio drops what comes later"
    assert retrieving.exception() is None

    tasks, version = label_studio.tasks(project), connected.model_version
    assert len(tasks) == UPLOADS
    for task in tasks:
        (prediction,) = task["predictions"]
        right = expected[own_name(task["data"]["image"])]
        assert choice_of(prediction) == choice_of(right)
        assert prediction["score"] == pytest.approx(right["score"], abs=1e-3)
        assert prediction["model_version"] == right["model_version"] == version
    known = {choice_of(right) for right in expected.values()} - {None}
    assert known == set(BODIES), "a constant model would prove nothing"
    assert health_s < HEALTH_S, "late answers to /health cost annotators their pre-labels"
    assert setup_s < SETUP_S, "late answers to /setup cost annotators their pre-labels"


def seconds_of(backend: BackendServer, request: str) -> list[float]:
    """How long each of these requests took, as the log says."""
    return [float(seconds) for seconds in re.findall(rf"{request} 200 ([0-9.]+) s", backend.log_text())]


def slowest_answers(backend: BackendServer, until: Any) -> tuple[float, float]:
    """The longest that /health and /setup took, asked time and again until `until()` is true."""
    health_s, setup_s = [0.0], [0.0]
    while not until():
        started = time.monotonic()
        assert requests.get(f"{backend.url}/health", timeout=30).status_code == 200
        health_s.append(time.monotonic() - started)
        started = time.monotonic()
        assert backend.model_version
        setup_s.append(time.monotonic() - started)
        time.sleep(0.2)
    return max(health_s), max(setup_s)


def test_retrieving_again_adds_nothing(
    label_studio: LabelStudioServer, connected: BackendServer, pictures: list[Path]
) -> None:
    """/setup says one version as often as it is asked, so a second Retrieve Predictions has nothing to do."""
    project = label_studio.create_project("Again")
    label_studio.upload(project, pictures[:20])
    label_studio.connect_backend(project, connected.url)
    label_studio.retrieve(project)
    before = label_studio.predictions(project)
    asked = connected.log_text().count("POST /predict")

    label_studio.retrieve(project)

    assert len(before) == 20
    assert label_studio.predictions(project) == before
    assert connected.log_text().count("POST /predict") == asked
    assert len({connected.model_version for _ in range(5)} | {each["model_version"] for each in before}) == 1


def test_broken_pictures_cost_only_their_own_predictions(
    label_studio: LabelStudioServer, connected: BackendServer, pictures: list[Path], tmp_path: Path
) -> None:
    """Of 50 tasks in one batch, 45 get their predictions; each of the 5 others gets a line in the log that says why."""
    project = label_studio.create_project("Broken")
    text, bomb = tmp_path / "text.jpg", tmp_path / "bomb.png"
    text.write_text("This is no picture.\n" * 50)
    Image.new("1", (10_000, 10_000)).save(bomb)
    addresses = label_studio.upload(project, [*pictures[:45], text, bomb])
    label_studio.import_tasks(
        project,
        [
            f"/data/upload/{project}/00000000-missing.jpg",
            "http://no-such-host.invalid/saturn.jpg",
            "/data/local-files/?d=../../../../etc/passwd",
        ],
    )
    reasons = {
        addresses["text.jpg"]: "picture",
        addresses["bomb.png"]: "CELESTIAL_IMAGE_MAX_MEGAPIXELS",
        f"/data/upload/{project}/00000000-missing.jpg": "Label Studio",
        "http://no-such-host.invalid/saturn.jpg": "no-such-host.invalid",
        "/data/local-files/?d=../../../../etc/passwd": "must stay inside its folder",
    }
    label_studio.connect_backend(project, connected.url)
    written = len(connected.log_text())

    label_studio.retrieve(project)

    log = connected.log_text()[written:]
    tasks = {task["data"]["image"]: task for task in label_studio.tasks(project)}
    assert len(tasks) == 50
    assert {address for address, task in tasks.items() if not task["predictions"]} == set(reasons)
    assert sum(len(task["predictions"]) for task in tasks.values()) == 45
    for address, reason in reasons.items():
        (line,) = re.findall(rf"^.*\bTask {tasks[address]['id']}: .*$", log, re.MULTILINE)
        assert reason in line
    assert label_studio.legacy_token not in log


@pytest.fixture(scope="module")
def opened(
    request: pytest.FixtureRequest, label_studio: LabelStudioServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BackendServer]:
    """A backend with one kind of token, and with Label Studio's folders or without, for all tests that want this."""
    token, folders = request.param
    if (token, folders) == ("legacy", False):
        yield request.getfixturevalue("connected")
        return
    settings: dict[str, str | Path] = {
        "LABEL_STUDIO_URL": f"{label_studio.url}/projects/1/data?tab=1",  # as it is copied from a browser
        "LABEL_STUDIO_HOST": PEOPLE,
        "LABEL_STUDIO_API_KEY": "0" * 40 if token == "invalid" else label_studio.personal_access_token,
    }
    if folders:
        settings["CELESTIAL_LABEL_STUDIO_DATA"] = label_studio.data_folder
        settings["LOCAL_FILES_DOCUMENT_ROOT"] = label_studio.local_files_root
    backend = BackendServer(tmp_path_factory.mktemp("backend"), **settings)
    yield backend
    backend.kill_group()


@pytest.mark.parametrize(
    ("source", "opened"),
    [
        pytest.param("uploads", ("legacy", False), id="uploads-over-http-with-a-legacy-token"),
        pytest.param("local files", ("legacy", False), id="local-files-over-http"),
        pytest.param("uploads", ("personal", False), id="uploads-over-http-with-a-personal-access-token"),
        pytest.param("another name", ("personal", False), id="uploads-under-another-name-over-http"),
        pytest.param("another name", ("invalid", True), id="uploads-under-another-name-from-label-studios-folder"),
        pytest.param("uploads", ("invalid", True), id="uploads-from-label-studios-folder-without-a-valid-token"),
        pytest.param("local files", ("invalid", True), id="local-files-from-their-folder-without-a-valid-token"),
    ],
    indirect=["opened"],
)
def test_pictures_come_by_every_way_that_the_settings_open(
    label_studio: LabelStudioServer, opened: BackendServer, pictures: list[Path], source: str
) -> None:
    """Uploads and local files are had with either kind of token over HTTP, or from the disk without any."""
    project = label_studio.create_project(f"{source}, one way")
    if source == "uploads":
        label_studio.upload(project, pictures[:10])
    elif source == "another name":
        known = label_studio.upload(label_studio.create_project("Where the uploads are"), pictures[:10])
        label_studio.import_tasks(project, [f"{PEOPLE}{address}" for address in known.values()])
    else:
        folder = Path(tempfile.mkdtemp(prefix="Größen & ", dir=label_studio.local_files_root))
        for path in pictures[:10]:
            (folder / f"the {path.name}").write_bytes(path.read_bytes())
        label_studio.add_local_files(project, folder)
    written = len(opened.log_text())
    label_studio.connect_backend(project, opened.url)

    label_studio.retrieve(project)

    tasks = label_studio.tasks(project)
    assert [len(task["predictions"]) for task in tasks] == [1] * 10
    assert "Task " not in opened.log_text()[written:]


@pytest.mark.parametrize("opened", [("invalid", False)], indirect=True)
def test_a_token_that_is_refused_is_named_where_the_model_is_connected(
    label_studio: LabelStudioServer, opened: BackendServer, pictures: list[Path]
) -> None:
    """For uploads; pictures that stand in the tasks need none, and are predicted."""
    opened.wait_for_log("answered 401 (Invalid token)")
    project = label_studio.create_project("uploads, and a wrong token")
    label_studio.upload(project, pictures[:2])
    refused = requests.post(
        f"{label_studio.url}/api/ml/", json={"project": project, "url": opened.url, "title": "celestial"},
        headers={"Authorization": f"Token {label_studio.legacy_token}"}, timeout=60,
    )  # fmt: skip
    assert refused.status_code == 400
    assert "Set LABEL_STUDIO_API_KEY to a valid token, from Account & Settings" in refused.text
    assert "0" * 40 not in refused.text + opened.log_text()

    other = label_studio.create_project("pictures in tasks, and a wrong token")
    packed = base64.b64encode(pictures[0].read_bytes()).decode()
    label_studio.import_tasks(other, [f"data:image/png;base64,{packed}"])
    label_studio.connect_backend(other, opened.url)
    label_studio.retrieve(other)
    assert len(label_studio.predictions(other)) == 1


@pytest.fixture(scope="module")
def guarded(
    request: pytest.FixtureRequest, label_studio: LabelStudioServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BackendServer]:
    """A backend that asks for the user `studio` and a password, for all tests with this password."""
    backend = BackendServer(
        tmp_path_factory.mktemp("backend"),
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.legacy_token,
        BASIC_AUTH_USER="studio",
        BASIC_AUTH_PASS=request.param,
    )
    yield backend
    backend.kill_group()


@pytest.mark.parametrize("guarded", ["p@ss:word/", "Größe"], indirect=True)
def test_basic_auth_lets_label_studio_in_and_strangers_out(
    label_studio: LabelStudioServer, guarded: BackendServer, pictures: list[Path]
) -> None:
    """
    With the dialog's Basic Authentication the model connects and predicts.

    Label Studio sends no credentials with its events, so they arrive once the webhook has the header. It writes
    credentials in Latin-1, where others write UTF-8.
    """
    assert guarded.auth is not None
    user, password = guarded.auth
    project = label_studio.create_project(f"Basic auth {password}")
    label_studio.upload(project, pictures[:3])
    with pytest.raises(AssertionError, match="authentication parameters were either not provided or are incorrect"):
        label_studio.connect_backend(project, guarded.url)
    credentials = {"auth_method": "BASIC_AUTH", "basic_auth_user": user, "basic_auth_pass": password}
    label_studio.connect_backend(project, guarded.url, **credentials)
    label_studio.retrieve(project)
    assert len(label_studio.predictions(project)) == 3
    for path in ("/setup", "/predict", "/webhook"):
        assert requests.post(f"{guarded.url}{path}", json={}, timeout=10).status_code == 401

    first, second, _ = sorted(task["id"] for task in label_studio.tasks(project))
    (webhook,) = label_studio.webhooks(project)
    seen = len(guarded.log_text())
    label_studio.annotate(first, "Mars")
    guarded.wait_for_log("POST /webhook 401", since=seen)

    headers = {"Authorization": basic(user, password)}
    label_studio.api("PATCH", f"/api/webhooks/{webhook['id']}/", json={"headers": headers})
    seen = len(guarded.log_text())
    label_studio.annotate(second, "Mars")
    guarded.wait_for_log("POST /webhook 2", since=seen)


@pytest.mark.parametrize("guarded", ["p@ss:word/"], indirect=True)
def test_credentials_in_the_backends_address_reach_the_webhook_too(
    label_studio: LabelStudioServer, guarded: BackendServer, pictures: list[Path]
) -> None:
    """http://user:password@host as Backend URL is enough for predictions and for events."""
    project = label_studio.create_project("Credentials in the address")
    label_studio.upload(project, pictures[:2])
    label_studio.connect_backend(project, guarded.url.replace("//", "//studio:p%40ss%3Aword%2F@"))
    label_studio.retrieve(project)
    assert len(label_studio.predictions(project)) == 2
    seen = len(guarded.log_text())
    label_studio.annotate(label_studio.tasks(project)[0]["id"], "Mars")
    guarded.wait_for_log("POST /webhook 2", since=seen)


def test_send_test_request_shows_a_prediction_and_stores_none(
    label_studio: LabelStudioServer, connected: BackendServer, pictures: list[Path]
) -> None:
    """The model menu's Send Test Request answers with one task's prediction."""
    project = label_studio.create_project("Test request")
    label_studio.upload(project, pictures[:1])
    model = label_studio.connect_backend(project, connected.url)

    answer = label_studio.api("POST", f"/api/ml/{model['id']}/predict/test?random=true")

    (prediction,) = answer["response"]
    (expected,) = connected.predict([data_uri(pictures[0])])
    assert choice_of(prediction) == choice_of(expected)
    assert label_studio.predictions(project) == []


def test_the_label_stream_asks_for_each_task_as_it_opens(
    label_studio: LabelStudioServer, connected: BackendServer, pictures: list[Path]
) -> None:
    """Connected and nothing else done, Label All Tasks brings each task with the live model's prediction, once."""
    project = label_studio.create_project("Stream")
    label_studio.upload(project, pictures[:2])
    label_studio.connect_backend(project, connected.url)
    seen = []
    for _ in pictures[:2]:
        for _again in range(2):
            task = label_studio.api("GET", f"/api/projects/{project}/next")
            (prediction,) = task["predictions"]
            assert prediction["model_version"] == connected.model_version
        label_studio.annotate(task["id"], str(choice_of(prediction)))
        seen.append(task["id"])
    assert len(set(seen)) == 2
    assert len(label_studio.predictions(project)) == 2
