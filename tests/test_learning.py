"""
Labels that become a model: a real Label Studio, and the backend as users start it.

The training that is started in the browser is one as it is by default; others have fewer epochs (`hasty`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import requests
from backend_server import (
    BODIES,
    REPOSITORY,
    Backends,
    BackendServer,
    ServerProcess,
    free_port,
    label_config,
    plain_environ,
)
from browser import HOW_TO_GET_ONE, annotator, find_chromium
from label_studio import LabelStudioServer
from new_bodies import render_new
from PIL import Image
from playwright.sync_api import expect
from redis_server import RedisServer
from trainings import FAULTS

from celestial_backend.ledger import Ledger
from celestial_backend.renderer import render

pytestmark = pytest.mark.timeout(1500)

NEW = ("Comet", "Galaxy")  # the default model has never seen them
CLASSES = (*BODIES, *NEW)
LABELLED, FRESH = 20, 20  # pictures of each class
WIDE = "Comet-wide.png"
ENDED = ("published", "kept", "failed")
BIN = Path(sys.executable).parent

logger = logging.getLogger(__name__)

Labels = list[tuple[str, str]]  # picture address and choice


@dataclass(frozen=True)
class Pictures:
    """Addresses of uploaded pictures and what they show: to be labelled, and never shown to any training."""

    to_label: Labels
    fresh: Labels
    wide: str


@pytest.fixture(scope="module")
def pictures(label_studio: LabelStudioServer, tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """Uploaded once; all projects of these tests show them."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in CLASSES:
        for number in range(LABELLED + FRESH):
            seed = (4242, number)
            picture = render_new(name, seed) if name in NEW else render(name, seed)
            picture.save(folder / f"{name}-{number}.png")
    wide = Image.new("RGB", (640, 360))
    wide.paste(render_new("Comet", (4242, LABELLED + FRESH + 6), size_px=360), (140, 0))
    wide.save(folder / WIDE)
    uploaded = label_studio.upload(label_studio.create_project("Pictures"), sorted(folder.iterdir()))
    address = {name: [uploaded[f"{name}-{number}.png"] for number in range(LABELLED + FRESH)] for name in CLASSES}
    to_label = [(each, name) for name in CLASSES for each in address[name][:LABELLED]]
    fresh = [(each, name) for name in CLASSES for each in address[name][LABELLED:]]
    return Pictures(to_label, fresh, uploaded[WIDE])


@pytest.fixture(scope="module")
def backend(label_studio: LabelStudioServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    """The backend as the README starts it, with three web server processes."""
    settings = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.legacy_token}
    server = BackendServer(tmp_path_factory.mktemp("backend"), WORKERS="3", **settings)
    yield server
    server.stop()


# What people and Label Studio do with a backend


def command(backend: ServerProcess, *arguments: str, **settings: str) -> str:
    """What `python -m celestial_backend` prints beside a server whose state and models lie where its log does."""
    folder = backend.log.parent
    folders = {"MODEL_DIR": str(folder / "state"), "BENTOML_HOME": str(folder / "bentoml")}
    done = subprocess.run(
        [sys.executable, "-m", "celestial_backend", *arguments],
        cwd=REPOSITORY, env=plain_environ(BIN) | folders | settings,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def jobs_of(backend: ServerProcess, project: int) -> list[dict[str, Any]]:
    return list(json.loads(command(backend, "jobs", "--json", "--project", str(project))))


def models_of(backend: ServerProcess, project: int) -> dict[str, dict[str, Any]]:
    """What `models` lists for a project, by tag."""
    rows = json.loads(command(backend, "models", "--json", "--project", str(project)))
    return {row["tag"]: row for row in rows}


def wait_for_end(backend: ServerProcess, project: int, seconds: float = 1200) -> dict[str, Any]:
    """The project's newest training once it has ended."""
    deadline = time.monotonic() + seconds
    ledger = Ledger(backend.log.parent / "state", locked_s=30)
    while not (job := ledger.jobs(str(project), limit=1)[0]).ended:
        assert time.monotonic() < deadline, f"the training did not end in {seconds} s: {job}"
        time.sleep(0.5)
    return jobs_of(backend, project)[0]


def hasty(folder: Path, epochs: int) -> dict[str, str]:
    """What a backend or a worker is started with, so that its trainings have so many epochs (`faults`)."""
    return {"PYTHONPATH": str(FAULTS), "FAULT_MARKS": str(folder), "FAULT_EPOCHS": str(epochs)}


def setup_says(url: str, project: int) -> str:
    """The model version of a project, asked for on a connection of its own."""
    body = {"project": f"{project}.1", "schema": label_config(CLASSES)}
    answer = requests.post(f"{url}/setup", json=body, timeout=10)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model_version"])


def each_process_says(backend: BackendServer, project: int) -> list[str]:
    """What `/setup` says of a project, from each web server process; the others stand still while one is asked."""
    web, said = [], []
    for one in psutil.Process(backend.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a trainer that is about to end
            if one.cmdline() == psutil.Process(one.ppid()).cmdline():  # forked by gunicorn's master
                web.append(one)
    for asked in web:
        others = [one for one in web if one != asked]
        for one in others:
            one.suspend()
        try:
            said.append(setup_says(backend.url, project))
        finally:
            for one in others:
                one.resume()
    return said


def predict(backend: BackendServer, project: int, addresses: Sequence[str]) -> list[tuple[str, str]]:
    """What `/predict` says of picture addresses: the version and the choice of each."""
    tasks = [{"id": number, "data": {"image": value}} for number, value in enumerate(addresses, start=1)]
    body = {"project": f"{project}.1", "label_config": label_config(CLASSES), "tasks": tasks}
    answer = backend.post("/predict", body)
    assert answer.status_code == 200, answer.text
    return [(each["model_version"], choice_of(each)) for each in answer.json()["results"]]


def choice_of(prediction: Mapping[str, Any]) -> str:
    (region,) = prediction["result"]
    (choice,) = region["value"]["choices"]
    return str(choice)


def spoiled(labels: Labels, share: float, seed: int) -> Labels:
    """The same labels, a share of them wrong."""
    rng = random.Random(seed)  # noqa: S311 - an order, not a secret
    wrong = set(rng.sample(range(len(labels)), round(share * len(labels))))
    return [
        (address, rng.choice([name for name in CLASSES if name != choice]) if number in wrong else choice)
        for number, (address, choice) in enumerate(labels)
    ]


# One training, started in the browser, and what it brings about


@dataclass(frozen=True)
class Learned:
    """
    A project that was trained once, and another one on the same backend that was not.

    Attributes:
        default: The version that both were served before.
        tag: The version that the project is served now.
        job: The training, as `jobs --json` shows it at the end.
        seen: The same, while it waited and ran.
        versions: What `/setup` said of the project meanwhile, and `/predict` of the other one.
        seconds: From Start Training to the end.
        tasks: The project's unlabelled tasks; the first shows the wide picture.
        right: How many of the fresh pictures of each body the default model names rightly.
    """

    project: int
    other: int
    default: str
    tag: str
    job: dict[str, Any]
    seen: list[dict[str, Any]]
    versions: tuple[set[str], set[str]]
    seconds: float
    tasks: list[int]
    right: dict[str, int]


@pytest.fixture(scope="module")
def learned(
    label_studio: LabelStudioServer,
    backend: BackendServer,
    pictures: Pictures,
    tmp_path_factory: pytest.TempPathFactory,
) -> Learned:
    """Twenty labels of each of twelve classes, *Start Training* in the browser, and the end of it waited for."""
    program = find_chromium()
    if program is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(HOW_TO_GET_ONE)
    project = label_studio.create_project("Celestial bodies", label_config(CLASSES))
    other = label_studio.create_project("Another project")
    tasks = label_studio.import_tasks(project, [pictures.wide, *(address for address, _ in pictures.fresh)])
    label_studio.import_labelled(project, pictures.to_label)
    known = [(address, name) for address, name in pictures.fresh if name in BODIES]
    label_studio.import_tasks(other, [address for address, _ in known[::20]])
    for each in (project, other):
        label_studio.connect_backend(each, backend.url, title="celestial-backend")
    default = setup_says(backend.url, project)
    label_studio.retrieve(project, tasks[:3])
    label_studio.retrieve(other)
    right = dict.fromkeys(BODIES, 0)
    for (_, name), (_, choice) in zip(known, predict(backend, other, [address for address, _ in known]), strict=True):
        right[name] += choice == name

    kept = Path(os.environ.get("TEST_SCREENSHOTS") or tmp_path_factory.mktemp("seen"))
    with annotator(program, label_studio, kept) as person:
        person.open_model_menu(project)
        person.photograph("start-training")
        person.start_training()
        assert person.refused == [], "Label Studio's page asked for something outside this machine"
    started = time.monotonic()
    seen: list[dict[str, Any]] = []
    mine: set[str] = set()
    others: set[str] = set()
    while not seen or seen[-1]["state"] not in ENDED:
        assert time.monotonic() < started + 1200, f"the training did not end: {seen[-1]}"
        (job,) = jobs_of(backend, project)
        seen.append(job)
        mine.add(setup_says(backend.url, project))
        others |= {version for version, _ in predict(backend, other, [known[0][0]])}
        time.sleep(6)
    seconds = time.monotonic() - started
    assert job["state"] == "published", job["reason"]
    return Learned(project, other, default, job["tag"], job, seen, (mine, others), seconds, tasks, right)


def count_right(
    label_studio: LabelStudioServer, project: int, version: str, shown: Mapping[str, str]
) -> dict[str, int]:
    """How many pictures of each class a version's predictions name rightly, by what Label Studio holds."""
    right = dict.fromkeys(shown.values(), 0)
    found = 0
    for task in label_studio.tasks(project):
        name = shown.get(task["data"]["image"])
        for prediction in task["predictions"]:
            if name and prediction["model_version"] == version:
                right[name] += choice_of(prediction) == name
                found += 1
    assert found == len(shown), f"{found} of {len(shown)} tasks hold a prediction of {version}"
    return right


def test_a_training_started_in_the_browser_is_listed_and_published(learned: Learned) -> None:
    """`jobs` shows where it is while it runs: stage, epoch, step, seconds; and at the end both models' scores."""
    running = [job["progress"] for job in learned.seen if job["state"] == "running"]
    assert "learning" in {at.get("stage") for at in running}
    learning = [at for at in running if at.get("stage") == "learning" and "epoch" in at]
    assert all(at["epoch"] < at["epochs"] and 1 <= at["step"] <= at["steps"] for at in learning)
    epochs = [at["epoch"] for at in learning]
    assert epochs == sorted(epochs)
    assert len(set(epochs)) > 1
    spent = [at["seconds"] for at in running if "seconds" in at]
    assert spent == sorted(spent)

    job = learned.job
    assert (job["state"], job["requests"], job["attempts"]) == ("published", 1, 1)
    bench = job["outcome"]["scores"]["benches"]["held-out"]
    assert bench["challenger_right"] > bench["champion_right"], "it knows two classes more"
    told = f"{bench['challenger_right']} of {bench['pictures']} held-out pictures right"
    assert f"{told}, {bench['champion_right']} before" in job["reason"]


def test_every_web_process_serves_the_new_version_and_other_projects_the_old(
    backend: BackendServer, learned: Learned
) -> None:
    """Nothing was restarted, and each of the three processes serves the new model to the one project alone."""
    assert each_process_says(backend, learned.project) == [learned.tag] * 3
    assert each_process_says(backend, learned.other) == [learned.default] * 3
    mine, others = learned.versions
    assert mine <= {learned.default, learned.tag}
    assert others == {learned.default}, "another project was served something else meanwhile"


def test_new_classes_are_predicted_and_old_ones_are_not_forgotten(
    label_studio: LabelStudioServer, pictures: Pictures, learned: Learned
) -> None:
    """
    Retrieve Predictions brings the new classes, also to tasks that hold an old prediction.

    Of 240 fresh pictures, at least 8 of 10 of each new class are named rightly, and of those of the ten old classes
    at most 2 in 100 fewer than by the default model. The other project keeps its predictions, and gets no others.
    """
    label_studio.retrieve(learned.project, learned.tasks)
    label_studio.retrieve(learned.other)
    right = count_right(label_studio, learned.project, learned.tag, dict(pictures.fresh))

    logger.info("%.0f s to the end; right before: %s, now: %s", learned.seconds, learned.right, right)
    assert all(right[name] >= 0.8 * FRESH for name in NEW), str(right)
    old, now = sum(learned.right.values()), sum(right[name] for name in BODIES)
    assert old > 0.9 * FRESH * len(BODIES), "a model that knows nothing can forget nothing"
    assert now >= old - 0.02 * FRESH * len(BODIES), f"{now} of the old classes are right, {old} were: {right}"
    (task,) = [task for task in label_studio.tasks(learned.project) if task["id"] == learned.tasks[0]]
    assert [each["model_version"] for each in task["predictions"]].count(learned.default) == 1
    others = label_studio.predictions(learned.other)
    assert [each["model_version"] for each in others] == [learned.default] * len(BODIES)


def test_label_studio_is_in_step(label_studio: LabelStudioServer, learned: Learned, tmp_path: Path) -> None:
    """The record of the model shows the new version, and the label stream its prediction, not the old one beside it."""
    assert label_studio.model(learned.project)["model_version"] == learned.tag
    assert label_studio.model(learned.other)["model_version"] == learned.default
    task = label_studio.api("GET", f"/api/projects/{learned.project}/next")
    (prediction,) = task["predictions"]
    assert prediction["model_version"] == learned.tag
    assert choice_of(prediction) in NEW, "the old prediction is of an old class"

    program = find_chromium()
    assert program is not None
    with annotator(program, label_studio, Path(os.environ.get("TEST_SCREENSHOTS") or tmp_path)) as person:
        person.label_all_tasks(learned.project)
        person.sees_task(learned.tasks[0])
        expect(person.page.locator(".lsf-choices input:checked")).to_have_count(1)
        assert person.selected() == [choice_of(prediction)]
        person.photograph("learned")


def test_models_lists_parents_scores_and_what_is_live(backend: BackendServer, learned: Learned) -> None:
    """The new model is live for its project, the default for all others; how it came about stands beside it."""
    rows = models_of(backend, learned.project)
    assert {tag: row["live"] for tag, row in rows.items()} == {
        learned.default: ["all others"],
        learned.tag: [str(learned.project)],
    }
    row = rows[learned.tag]
    assert (row["project"], row["parent"], row["decision"]) == (str(learned.project), learned.default, "passed")
    assert row["scores"] == learned.job["outcome"]["scores"]
    assert row["reason"] in learned.job["reason"]
    assert learned.tag not in models_of(backend, learned.other)


def test_an_older_model_is_live_again_at_once(
    label_studio: LabelStudioServer, backend: BackendServer, pictures: Pictures, learned: Learned
) -> None:
    """`models use` brings the default back for the one project, for all processes and Label Studio; and forth again."""
    comet = [pictures.wide]
    settings = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.legacy_token}
    for tag in (learned.default, learned.tag):
        started = time.monotonic()
        command(backend, "models", "use", tag, "--project", str(learned.project), **settings)
        said = each_process_says(backend, learned.project)
        ((version, choice),) = predict(backend, learned.project, comet)
        seconds = time.monotonic() - started
        assert said == [tag] * 3
        assert version == tag
        assert (choice in NEW) == (tag == learned.tag)
        logger.info("%s is live again after %.1f s", tag, seconds)
        assert seconds < 30  # seconds on a quiet machine
        task = label_studio.api("GET", f"/api/projects/{learned.project}/next")
        assert {each["model_version"] for each in task["predictions"]} == {tag}
        assert models_of(backend, learned.project)[tag]["live"][-1] == str(learned.project)
        assert setup_says(backend.url, learned.other) == learned.default


# Trainings that end otherwise, or run elsewhere


def test_too_few_labels_fail_with_their_counts_and_change_nothing(
    label_studio: LabelStudioServer, backend: BackendServer, pictures: Pictures
) -> None:
    """The job says how many labels there are of each class; models, pointers and Label Studio stay as they were."""
    project = label_studio.create_project("Few labels", label_config(CLASSES))
    few = [label for label in pictures.to_label if label[1] in ("Comet", "Saturn", "Venus")][::7]
    label_studio.import_labelled(project, few)
    label_studio.connect_backend(project, backend.url)
    before = (setup_says(backend.url, project), models_of(backend, project), label_studio.model(project))

    label_studio.start_training(project)

    job = wait_for_end(backend, project)
    assert (job["state"], job["attempts"], job["tag"]) == ("failed", 1, None)
    counted = {name: sum(choice == name for _, choice in few) for name in ("Comet", "Saturn", "Venus")}
    for name, count in counted.items():
        assert f"{name}: {count}" in job["reason"]
    assert "Training needs at least 10 labelled pictures" in job["reason"]
    after = (setup_says(backend.url, project), models_of(backend, project), label_studio.model(project))
    assert after[:2] == before[:2]
    assert after[2]["model_version"] == before[2]["model_version"]
    assert not (backend.log.parent / "state" / "live" / f"{project}.json").exists()


def test_two_workers_on_redis_publish_good_labels_and_keep_spoiled_ones_out(
    label_studio: LabelStudioServer, pictures: Pictures, redis_server: RedisServer, tmp_path: Path
) -> None:
    """
    With `REDIS_URL`, gunicorn takes the requests and two workers train two projects side by side.

    What is asked for while no worker runs waits in Redis. Of the same pictures, the labels of one project are
    right, and its new model is served; 30 % of the other's are wrong, and both models' scores say why its new
    model is not.
    """
    good = label_studio.create_project("Good labels", label_config(CLASSES))
    bad = label_studio.create_project("Spoiled labels", label_config(CLASSES))
    label_studio.import_labelled(good, pictures.to_label)
    label_studio.import_labelled(bad, spoiled(pictures.to_label, 0.3, seed=1))
    with contextlib.ExitStack() as running:
        settings = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.legacy_token}
        site = Site(tmp_path, settings | hasty(tmp_path, epochs=8) | {"REDIS_URL": redis_server.url})
        url = f"http://127.0.0.1:{(port := free_port())}"
        web = site.start(running, "web", "gunicorn", "--bind", f"127.0.0.1:{port}", "--threads", "8", "_wsgi:app")
        web.wait_for_answer(f"{url}/health", 60)
        for project in (good, bad):
            label_studio.connect_backend(project, url)
            label_studio.start_training(project)
        default = setup_says(url, bad)
        assert [job["state"] for project in (good, bad) for job in jobs_of(web, project)] == ["waiting", "waiting"]
        with redis.Redis.from_url(redis_server.url) as client:
            assert client.llen("huey.redis.celestial") == 2
        for number in (1, 2):
            site.start(running, f"worker-{number}", "huey_consumer", "--max-delay=1", "celestial_backend.worker.huey")

        published, kept = wait_for_end(web, good), wait_for_end(web, bad)

        logger.info("%s", [(job["reason"], job["ended_at"] - job["started_at"]) for job in (published, kept)])
        assert published["state"] == "published", published["reason"]
        assert kept["state"] == "kept", kept["reason"]
        assert published["attempts"] == kept["attempts"] == 1
        assert max(job["started_at"] for job in (published, kept)) < min(job["ended_at"] for job in (published, kept))
        for project, version in ((good, published["tag"]), (bad, default)):
            assert setup_says(url, project) == version
            assert label_studio.model(project)["model_version"] == version
        scores = kept["outcome"]["scores"]
        assert {"champion_right", "challenger_right"} <= set(scores["benches"]["held-out"])
        assert kept["reason"].startswith("Kept the old model: ")
        row = models_of(web, bad)[kept["tag"]]
        assert (row["live"], row["decision"], row["parent"]) == ([], "refused", default)
        assert row["scores"] == scores


@dataclass(frozen=True)
class Site:
    """A folder for the state, the models and the logs of several programs with the same settings."""

    folder: Path
    settings: dict[str, str]

    def start(self, running: contextlib.ExitStack, name: str, program: str, *arguments: str) -> ServerProcess:
        """Run a program of this environment until the stack is left."""
        folders = {"MODEL_DIR": str(self.folder / "state"), "BENTOML_HOME": str(self.folder / "bentoml")}
        environ = plain_environ(BIN) | folders | self.settings
        log = self.folder / f"{name}.log"
        started = ServerProcess([BIN / program, *arguments], cwd=REPOSITORY, environ=environ, log=log)
        running.callback(started.stop)
        return started


GREY_AND_SMALL = """
import json, sys
import numpy as np
from celestial_backend.classifier import read_parts
from celestial_backend.renderer import render
old, new = (read_parts(tag) for tag in sys.argv[1:])
pictures = [render(name, 7) for name in ("Earth", "Mars")]
print(json.dumps({
    "same": all(np.array_equal(old.preprocess(one), new.preprocess(one)) for one in pictures),
    "shape": list(np.shape(new.preprocess(pictures[0]))),
    "columns": [int(one.network.output_shape[-1]) for one in (old, new)],
}))
"""


def test_the_guides_model_learns_with_its_own_preprocess_and_a_personal_token(
    label_studio: LabelStudioServer, backends: Backends, guide: Path, pictures: Pictures, tmp_path: Path
) -> None:
    """
    A model of the MLOps guide, plain and with logits, grows for a new class and goes on seeing small grey pictures.

    The backend reads labels and pictures with a personal access token.
    """
    access = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.personal_access_token}
    backend = backends(**access, **hasty(tmp_path, epochs=4), CELESTIAL_BENTOMODEL=guide / "guide.bentomodel")
    project = label_studio.create_project("The guide's model", label_config(CLASSES))
    label_studio.import_labelled(project, [label for label in pictures.to_label if label[1] != "Galaxy"][::2])
    label_studio.connect_backend(project, backend.url)
    guides = setup_says(backend.url, project)

    label_studio.start_training(project)

    job = wait_for_end(backend, project)
    assert job["state"] in ("published", "kept"), job["reason"]
    bench = job["outcome"]["scores"]["benches"]["held-out"]
    assert f"{bench['challenger_right']} of {bench['pictures']} held-out pictures right" in job["reason"]
    assert (job["outcome"]["parent"], job["outcome"]["classes"]) == (guides, [*BODIES, "Comet"])
    live = job["tag"] if job["state"] == "published" else guides
    assert setup_says(backend.url, project) == live
    assert {version for version, _ in predict(backend, project, [pictures.wide])} == {live}

    home = {"BENTOML_HOME": str(backend.log.parent / "bentoml")}
    done = subprocess.run([sys.executable, "-c", GREY_AND_SMALL, guides, job["tag"]], cwd=REPOSITORY,
                          env=plain_environ(BIN) | home, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts == {"same": True, "shape": [1, 32, 32], "columns": [10, 11]}
