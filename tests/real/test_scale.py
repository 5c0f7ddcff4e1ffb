"""What docker-compose.scale.yml starts, as plain processes: three backends, nginx, two workers, PostgreSQL."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from celestial_backend.jobs.ledger import PUBLISHED
from celestial_backend.planets.renderer import render
from tests.project.test_docker import WORKER, arguments
from tests.support.backend_server import BODIES, REPOSITORY, ServerProcess, free_port, label_config
from tests.support.cases import TIMES
from tests.support.label_studio import LabelStudioServer
from tests.support.nginx_server import HOW_TO_GET_ONE, NginxServer, find_nginx
from tests.support.picture_host import PictureHost, picture_host
from tests.support.postgres_server import PostgresServer
from tests.support.trainings import BIN, Place

pytestmark = pytest.mark.timeout(300)

HERE = "127.0.0.1"
RUNS_S = 2.0  # a training, so that it can be met while it runs
AWAY_S = 6.0 * TIMES


class Cluster(Place):
    """
    Backends by the image's command, workers by the compose file's, each with folders of its own, one database for all.

    Workers have names of hosts of their own, as on machines of their own, where this user may give some. What has a
    restart policy there is started again here by `restart`.
    """

    def __init__(self, folder: Path, store: Path, database_url: str) -> None:
        super().__init__(folder, store, CELESTIAL_DATABASE_URL=database_url, CELESTIAL_ALLOWED_HOSTS=HERE)
        self.others: list[ServerProcess] = []
        self.faults["FAULT_LEARN"] = str(RUNS_S)
        self.ports = [free_port() for _ in range(3)]
        self.backends: list[ServerProcess] = []
        self.nginx: NginxServer

    def start(self, nginx: str) -> None:
        self.backends = [self._backend(port) for port in self.ports]
        self.nginx = NginxServer(nginx, self.folder, self.ports)
        self.others.append(self.nginx)
        for number in range(3):
            self.wait_to_serve(number)

    def restart(self) -> None:
        """Start again what a test has ended."""
        for number, backend in enumerate(self.backends):
            if backend.process.poll() is not None:
                self.start_again(number)
        while len(self.living_workers()) < 2:
            name = f"worker-{len(self.workers)}"
            host = ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$0" "$@"'] if os.geteuid() == 0 else []
            self.worker([*host, BIN / WORKER["command"][0], *WORKER["command"][1:]], **self._folders(name))

    def living_workers(self) -> list[ServerProcess]:
        return [worker for worker in self.workers if worker.process.poll() is None]

    def start_again(self, number: int) -> None:
        """Start a killed backend; return when nginx has noticed."""
        self.backends[number] = self._backend(self.ports[number])
        self.wait_to_serve(number)
        seen = len(self.nginx.log_text())
        back = f"POST /predict 200 [0-9.]+ s, by {HERE}:{self.ports[number]}: 200"
        self.wait_for(lambda: predict(self.nginx.url, ["data:,"]) and re.search(back, self.nginx.log_text()[seen:]))

    def _backend(self, port: int) -> ServerProcess:
        environ = self.environ | {"PORT": str(port), "TMPDIR": str(self.folder)} | self._folders(f"backend-{port}")
        log = self.folder / f"backend-{port}.log"
        return ServerProcess(json.loads(arguments("CMD")[0]), cwd=REPOSITORY, environ=environ, log=log)

    def _folders(self, name: str) -> dict[str, str]:
        """What a machine has of its own."""
        folders = {"MODEL_DIR": self.folder / name / "state", "BENTOML_HOME": self.folder / name / "bentoml"}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        return {variable: str(folder) for variable, folder in folders.items()}

    def wait_to_serve(self, number: int) -> None:
        """Return when a backend answers a prediction."""
        self.backends[number].wait_for_answer(f"{self.urls[number]}/health", 60)
        predict(self.urls[number], ["data:,"])

    @property
    def urls(self) -> list[str]:
        return [f"http://{HERE}:{port}" for port in self.ports]

    @property
    def everywhere(self) -> list[str]:
        """Every backend by its own address, and nginx as often as that."""
        return [*self.urls, *[self.nginx.url] * 3]

    def press(self, project: int) -> str:
        """Press *Start training*; gives the job."""
        body = {"action": "START_TRAINING", "project": {"id": project, "label_config": label_config()}}
        answer = requests.post(f"{self.nginx.url}/webhook", json=body, timeout=10)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["result"]["job"])

    def kill(self, number: int) -> None:
        """End a backend with all its processes, as a machine that loses its power."""
        os.killpg(self.backends[number].process.pid, signal.SIGKILL)
        self.backends[number].process.wait(10)

    def fetching_from(self, host: PictureHost) -> set[int]:
        """The backends that wait for pictures of a host at this moment."""
        found = set()
        for number, backend in enumerate(self.backends):
            with contextlib.suppress(psutil.Error):
                for process in psutil.Process(backend.process.pid).children(recursive=True):
                    peers = [link.raddr for link in process.net_connections("tcp") if link.status == "ESTABLISHED"]
                    if any(peer and peer.port == host.port for peer in peers):
                        found.add(number)
        return found

    def stop(self) -> None:
        for server in (*self.workers, *self.backends):
            server.process.kill()  # with nothing to save, and their groups are gone through below
        super().stop()
        for server in (*self.backends, *self.others):
            server.stop()


@pytest.fixture(scope="module")
def started(
    tmp_path_factory: pytest.TempPathFactory, model_store: Path, postgres_server: PostgresServer
) -> Iterator[Cluster]:
    nginx = find_nginx()
    if nginx is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(HOW_TO_GET_ONE)
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), model_store, postgres_server.fresh())
    try:
        cluster.start(nginx)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(started: Cluster, label_studio: LabelStudioServer) -> Cluster:  # noqa: ARG001 - keeps all in one process
    started.restart()
    return started


class Pictures:
    """Pictures of the ten bodies by turns on a host that gives them out when it is told to."""

    def __init__(self, host: PictureHost) -> None:
        self.host = host
        self.may_answer = threading.Event()

    def urls(self, count: int) -> dict[str, str]:
        """New addresses, and the body that each shows."""
        made = {f"/{len(self.host.answers)}-{number}.png": BODIES[number % 10] for number in range(count)}
        for path, body in made.items():
            picture = BytesIO()
            render(body, 21).save(picture, "PNG")
            self.host.answers[path] = self._answer(picture.getvalue())
        return {f"{self.host.url}{path}": body for path, body in made.items()}

    def _answer(self, picture: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
        def answer(handler: BaseHTTPRequestHandler) -> None:
            self.may_answer.wait(60)
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(picture)))
            handler.end_headers()
            handler.wfile.write(picture)

        return answer


@pytest.fixture
def pictures() -> Iterator[Pictures]:
    with picture_host() as host:
        pictures = Pictures(host)
        yield pictures
        pictures.may_answer.set()


def predict(url: str, values: list[str], project: int = 1) -> list[Any]:
    tasks = [{"id": number, "data": {"image": value}} for number, value in enumerate(values)]
    body = {"project": f"{project}.1", "label_config": label_config(), "tasks": tasks}
    answer = requests.post(f"{url}/predict", json=body, timeout=100)
    assert answer.status_code == 200, f"{answer.status_code} {answer.reason}"
    return list(answer.json()["results"])


def version(url: str, project: int) -> str:
    answer = requests.post(f"{url}/setup", json={"project": f"{project}.1", "schema": label_config()}, timeout=10)
    assert answer.status_code == 200, answer.reason
    return str(answer.json()["model_version"])


def choice_of(prediction: Any) -> str:
    (region,) = prediction["result"]
    (choice,) = region["value"]["choices"]
    return str(choice)


def test_a_published_model_is_live_in_every_backend(cluster: Cluster, pictures: Pictures) -> None:
    """A worker publishes it, and the next request to each of the three, by itself or through nginx, is served by it."""
    pictures.may_answer.set()
    (url,) = pictures.urls(1)
    before = {version(each, 7) for each in cluster.everywhere}
    ended = cluster.ended(cluster.press(7), 60)
    assert ended.state == PUBLISHED
    tag = ended.outcome["tag"]
    assert [version(each, 7) for each in cluster.everywhere] == [tag] * 6
    assert tag not in before
    assert len(before) == 1
    assert [predict(each, [url], 7)[0]["model_version"] for each in cluster.everywhere] == [tag] * 6
    assert {version(each, 8) for each in cluster.everywhere} == before, "it is the one project's"


def test_a_killed_backend_costs_no_prediction(cluster: Cluster, pictures: Pictures) -> None:
    """It dies with requests in it, while others come; every one is answered as ever, and it serves again afterwards."""
    expected = pictures.urls(12)
    ended = threading.Event()

    def keep_asking() -> int:
        asked = 0
        while not ended.is_set():
            assert predict(cluster.nginx.url, ["data:,"]) == [[]]
            asked += 1
        return asked

    with ThreadPoolExecutor(16) as people:
        load: list[Future[int]] = [people.submit(keep_asking) for _ in range(4)]
        try:
            held = {url: people.submit(predict, cluster.nginx.url, [url]) for url in expected}
            cluster.wait_for(lambda: len(pictures.host.requests) == 12)
            victim = min(cluster.fetching_from(pictures.host))
            cluster.kill(victim)
            cluster.wait_for(lambda: len(pictures.host.requests) > 12)
            pictures.may_answer.set()
            answers = {url: choice_of(future.result()[0]) for url, future in held.items()}
            cluster.start_again(victim)
        finally:
            ended.set()
        assert sum(one.result() for one in load) > 20
    assert answers == expected


def test_label_studio_gets_all_predictions_from_a_killed_backend(
    cluster: Cluster, pictures: Pictures, label_studio: LabelStudioServer
) -> None:
    """Retrieve Predictions, whose one request dies with its backend, stores one prediction for each task, and once."""
    project = label_studio.create_project("Killed")
    expected = pictures.urls(20)
    tasks = dict(zip(label_studio.import_tasks(project, list(expected)), expected, strict=True))
    label_studio.connect_backend(project, cluster.nginx.url)
    with ThreadPoolExecutor(1) as person:
        retrieving = person.submit(label_studio.retrieve, project)
        cluster.wait_for(lambda: pictures.host.requests)
        (victim,) = cluster.wait_for(lambda: cluster.fetching_from(pictures.host))
        cluster.kill(victim)
        asked = len(pictures.host.requests)
        cluster.wait_for(lambda: len(pictures.host.requests) > asked)
        pictures.may_answer.set()
        retrieving.result()
    stored = label_studio.predictions(project)
    assert {each["task"]: choice_of(each) for each in stored} == {task: expected[url] for task, url in tasks.items()}
    assert len(stored) == 20
    assert {each["model_version"] for each in stored} == {version(cluster.nginx.url, project)}


def test_label_studio_shows_why_a_backend_behind_nginx_refuses(
    cluster: Cluster, label_studio: LabelStudioServer
) -> None:
    """The sentence of the status line passes through nginx to the person who connects the model."""
    boxes = '<RectangleLabels name="box" toName="image"><Label value="cat"/></RectangleLabels>'
    project = label_studio.create_project("Refused", f'<View><Image name="image" value="$image"/>{boxes}</View>')
    with pytest.raises(AssertionError, match="The label config has no Choices on an Image that the model can serve"):
        label_studio.connect_backend(project, cluster.nginx.url)


def test_each_backend_counts_for_itself(cluster: Cluster) -> None:
    """/metrics through nginx is one backend's; the sum is had by asking each."""

    def counted(url: str) -> float:
        text = requests.get(f"{url}/metrics", timeout=10).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return sum(one.value for one in samples if one.name == "celestial_tasks_total")

    before = [counted(url) for url in cluster.urls]
    for _ in range(9):
        predict(cluster.nginx.url, ["data:,"])
    after = [counted(url) for url in cluster.urls]
    assert sum(after) - sum(before) == 9
    assert all(now > then for now, then in zip(after, before, strict=True)), "nginx asks them by turns"
    assert {counted(cluster.nginx.url) for _ in range(3)} == set(after)


def test_a_training_survives_its_worker(cluster: Cluster) -> None:
    """It is killed while it trains; the other one finds out within a minute, trains anew, and publishes once."""

    def trained_by() -> int | None:
        running = [process.info["cmdline"] for process in cluster.trainers()]  # one that ends now has none any more
        return int(running[0][-1]) if running else None

    job = cluster.press(9)
    cluster.stage(job, "reading labels")
    first = cluster.wait_for(trained_by)
    victim, other = sorted(cluster.living_workers(), key=lambda worker: worker.process.pid != first)
    assert victim.process.pid == first
    os.killpg(first, signal.SIGKILL)
    killed = time.monotonic()
    second = cluster.wait_for(lambda: (pid := trained_by()) != first and pid, 75)
    print(f"taken over after {time.monotonic() - killed:.1f} s")  # noqa: T201 - shown with -s
    assert second == other.process.pid
    ended = cluster.ended(job, 60)
    assert (ended.state, ended.attempts) == (PUBLISHED, 2)
    assert cluster.publications().count(job) == 1
    assert {version(url, 9) for url in cluster.everywhere} == {ended.outcome["tag"]}


@pytest.mark.parametrize("how", ["killed", "silent"])
def test_a_database_that_is_away_costs_no_prediction(
    cluster: Cluster, pictures: Pictures, postgres_server: PostgresServer, how: str
) -> None:
    """While one job runs and another one waits: known projects keep their models, events get 503, and none is lost."""
    pictures.may_answer.set()
    (url,) = pictures.urls(1)
    project, other = (17, 18) if how == "killed" else (19, 20)
    tag = cluster.ended(cluster.press(project), 60).outcome["tag"]
    for each in cluster.urls:
        assert predict(each, [url], project)[0]["model_version"] == tag
    running, waiting = cluster.press(project), cluster.press(other)
    cluster.stage(running, "reading labels")
    if how == "killed":
        postgres_server.kill()
    else:
        postgres_server.signal(signal.SIGSTOP)
    over, refused = time.monotonic() + AWAY_S, 0
    try:
        while time.monotonic() < over:
            for each in cluster.everywhere:
                (answer,) = predict(each, [url], project)
                assert (answer["model_version"], choice_of(answer)) == (tag, BODIES[0])
            body = {"action": "START_TRAINING", "project": {"id": project, "label_config": label_config()}}
            answered = requests.post(f"{cluster.urls[0]}/webhook", json=body, timeout=30)
            assert answered.status_code == 503, answered.text
            assert "Nothing was accepted. Start the database" in answered.json()["detail"]
            refused += 1
    finally:
        postgres_server.start() if how == "killed" else postgres_server.signal(signal.SIGCONT)
    assert refused
    ended = [cluster.ended(job, 120) for job in (running, waiting)]
    assert [job.state for job in ended] == [PUBLISHED, PUBLISHED]
    assert [cluster.publications().count(job) for job in (running, waiting)] == [1, 1]
    newest = ended[0].outcome["tag"]
    cluster.wait_for(lambda: {version(each, project) for each in cluster.everywhere} == {newest})
