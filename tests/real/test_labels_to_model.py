"""Labels that become a model: a real Label Studio, and the backend as users start it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import requests

from celestial_backend.database import Database
from celestial_backend.jobs.ledger import Ledger
from celestial_backend.planets.renderer import render
from celestial_backend.settings import NEEDS_LABELS, Settings
from tests.support.backend_server import BODIES, REPOSITORY, Backends, BackendServer, label_config, plain_environ
from tests.support.label_studio import LabelStudioServer
from tests.support.shapes import KINDS, drawn

pytestmark = pytest.mark.timeout(600)
CONFIG = label_config(KINDS)
LABELLED, FRESH = 8, 6  # pictures of each kind

Labels = list[tuple[str, str]]  # picture address and choice


@pytest.fixture(scope="module")
def pictures(label_studio: LabelStudioServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The addresses of uploaded pictures, by what they show; all projects of these tests show them."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in (*KINDS, *BODIES[:3]):
        for number in range(LABELLED + FRESH):
            picture = drawn(name, number) if name in KINDS else render(name, (4242, number))
            picture.save(folder / f"{name}-{number}.png")
    uploaded = label_studio.upload(label_studio.create_project("Pictures"), sorted(folder.iterdir()))
    return {
        name: [uploaded[f"{name}-{number}.png"] for number in range(LABELLED + FRESH)] for name in (*KINDS, *BODIES[:3])
    }


@pytest.fixture(scope="module")
def backend(label_studio: LabelStudioServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    """The backend as the README starts it, with two web server processes, whose trainings wait for the button."""
    settings = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.legacy_token}
    server = BackendServer(tmp_path_factory.mktemp("backend"), WORKERS="2", CELESTIAL_TRAIN_EVERY="off", **settings)
    yield server
    server.stop()


def labels_of(pictures: Mapping[str, Sequence[str]], names: Sequence[str], start: int, end: int) -> Labels:
    return [(address, name) for name in names for address in pictures[name][start:end]]


def command(backend: BackendServer, *arguments: str, **settings: str) -> Any:
    """What a command prints beside a server whose state and models lie where its log does; JSON as what it says."""
    folder = backend.log.parent
    folders = {"MODEL_DIR": str(folder / "state"), "BENTOML_HOME": str(folder / "bentoml")}
    done = subprocess.run(
        [sys.executable, "-m", "celestial_backend", *arguments],
        cwd=REPOSITORY, env=plain_environ(Path(sys.executable).parent) | folders | settings,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


def trained(label_studio: LabelStudioServer, backend: BackendServer, project: int) -> dict[str, Any]:
    """Press Start Training: how the training ended, as `jobs --json` shows it."""
    label_studio.start_training(project)
    ledger, deadline = Ledger(Database(Settings(model_dir=backend.log.parent / "state"))), time.monotonic() + 300
    while not (job := ledger.jobs(str(project), limit=1)[0]).ended:
        assert time.monotonic() < deadline, f"the training did not end: {job}"
        time.sleep(0.2)
    return dict(command(backend, "jobs", "--json", "--project", str(project))[0])


def version(backend: BackendServer, project: int | str, config: str = CONFIG) -> str:
    """What `/setup` says of a project."""
    answer = requests.post(f"{backend.url}/setup", json={"project": str(project), "schema": config}, timeout=10)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model_version"])


def predicted(label_studio: LabelStudioServer, project: int) -> dict[str, tuple[str, list[str]]]:
    """By picture address, the version and the choices of the newest prediction that Label Studio holds."""
    found = {}
    for task in label_studio.tasks(project):
        for each in sorted(task["predictions"], key=lambda one: one["id"]):
            choices = [choice for region in each["result"] for choice in region["value"]["choices"]]
            found[task["data"]["image"]] = (each["model_version"], choices)
    return found


def test_labels_become_a_model(
    label_studio: LabelStudioServer, backend: BackendServer, pictures: dict[str, list[str]]
) -> None:
    """
    Eight labels of each of four things that nobody has a model of, and *Start Training*.

    The new model is live for this project alone, Label Studio shows its version and its predictions, which are
    right; `models` tells where it came from, and `models use` brings the old one back.
    """
    project = label_studio.create_project("Shapes", CONFIG)
    fresh = labels_of(pictures, KINDS, LABELLED, LABELLED + FRESH)
    label_studio.import_tasks(project, [address for address, _ in fresh])
    label_studio.import_labelled(project, labels_of(pictures, KINDS, 0, LABELLED))
    other = label_studio.create_project("Another project")
    for each in (project, other):
        label_studio.connect_backend(project=each, url=backend.url)
    default = version(backend, other, label_config())
    assert version(backend, project) == NEEDS_LABELS

    job = trained(label_studio, backend, project)

    assert job["state"] == "published", job["reason"]
    tag = job["tag"]
    assert f"of {LABELLED * len(KINDS)} labels that it had not learned are right." in job["reason"]
    assert {version(backend, project) for _ in range(8)} == {tag}, "each process says it"
    assert version(backend, other, label_config()) == default
    made = datetime.fromisoformat(label_studio.api("GET", f"/api/projects/{project}/")["created_at"]).timestamp()
    assert version(backend, f"{project}.{int(made)}") == tag, "as Label Studio names it"
    assert version(backend, f"{project}.{int(made) - 1}") == NEEDS_LABELS, "one of another Label Studio"
    assert label_studio.model(project)["model_version"] == tag
    label_studio.retrieve(project)
    told = predicted(label_studio, project)
    right = [told[address] == (tag, [name]) for address, name in fresh]
    assert sum(right) >= 0.9 * len(right), told

    rows = {row["tag"]: row for row in command(backend, "models", "--json", "--project", str(project))}
    assert (rows[tag]["parent"], rows[tag]["decision"], rows[tag]["live"]) == (default, "passed", [str(project)])
    settings = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.legacy_token}
    command(backend, "models", "use", default, "--project", str(project), **settings)
    assert version(backend, project) == NEEDS_LABELS


WHEN = 'visibleWhen="choice-selected" whenTagName="look" whenChoiceValue'


def test_what_the_page_shows_is_learned(
    label_studio: LabelStudioServer, backend: BackendServer, pictures: dict[str, list[str]]
) -> None:
    """Controls that depend on another one learn where they were asked, a Taxonomy learns paths; no label is lost."""
    look_of = {name: "first" if name in KINDS[:2] else "second" for name in KINDS}
    first, second = (
        "".join(f'<Choice value="{name}"/>' for name in KINDS if look_of[name] == look) for look in ("first", "second")
    )
    config = (
        '<View><Image name="image" value="$image"/><Choices name="look" toName="image"><Choice value="first"/>'
        f'<Choice value="second"/></Choices><Choices name="one" toName="image" {WHEN}="first">{first}</Choices>'
        f'<View {WHEN}="second"><Choices name="two" toName="image">{second}</Choices></View>'
        f'<Taxonomy name="kind" toName="image"><Choice value="first">{first}</Choice><Choice value="second">{second}'
        "</Choice></Taxonomy></View>"
    )

    def answers(name: str) -> dict[str, list[Any]]:
        look = look_of[name]
        return {"look": [look], "one" if look == "first" else "two": [name], "kind": [[look, name]]}

    def result(name: str) -> list[dict[str, Any]]:
        kinds = {control: "taxonomy" if control == "kind" else "choices" for control in answers(name)}
        return [
            {"from_name": control, "to_name": "image", "type": kinds[control], "value": {kinds[control]: said}}
            for control, said in answers(name).items()
        ]

    project = label_studio.create_project("As the page shows it", config)
    fresh = labels_of(pictures, KINDS, LABELLED, LABELLED + FRESH)
    label_studio.import_tasks(project, [address for address, _ in fresh])
    body = [
        {"data": {"image": address}, "annotations": [{"result": result(name)}]}
        for address, name in labels_of(pictures, KINDS, 0, LABELLED)
    ]
    label_studio.api("POST", f"/api/projects/{project}/import", json=body)
    label_studio.connect_backend(project, backend.url)

    job = trained(label_studio, backend, project)

    assert job["state"] == "published", job["reason"]
    every, half = LABELLED * len(KINDS), LABELLED * len(KINDS) // 2
    rows = command(backend, "models", "--json", "--project", str(project))
    scores = next(row["scores"] for row in rows if row["tag"] == job["tag"])
    counts = {name: one["labels"] for name, one in scores.items()}
    assert counts == {"look": every, "one": half, "two": half, "kind": every}
    label_studio.retrieve(project)
    name_of = dict(fresh)
    told = {
        task["data"]["image"]: {region["from_name"]: region["value"][region["type"]] for region in each["result"]}
        for task in label_studio.tasks(project)
        for each in task["predictions"]
    }
    right = [told[address] == answers(name) for address, name in name_of.items()]
    assert sum(right) >= 0.9 * len(right), told


def test_too_few_labels_fail_with_their_counts_and_change_nothing(
    label_studio: LabelStudioServer, backend: BackendServer, pictures: dict[str, list[str]]
) -> None:
    """The job says how many labels there are of each choice; models and pointers stay as they were."""
    project = label_studio.create_project("Few labels", CONFIG)
    label_studio.import_labelled(project, [*labels_of(pictures, ["disc"], 0, 3), *labels_of(pictures, ["box"], 0, 1)])
    label_studio.connect_backend(project, backend.url)
    job = trained(label_studio, backend, project)
    assert (job["state"], job["attempts"], job["tag"]) == ("failed", 1, None)
    assert "'choice' has disc: 3, box: 1" in job["reason"]
    assert version(backend, project) == NEEDS_LABELS
    assert not (backend.log.parent / "state" / "live" / f"{project}.json").exists()


def test_what_an_operators_network_knows_is_kept(
    label_studio: LabelStudioServer, backends: Backends, guide: Path, pictures: dict[str, list[str]]
) -> None:
    """
    A model of the MLOps guide is taught one thing more, on its own features and general ones.

    The backend reads labels and pictures with a personal access token.
    """
    config = label_config((*BODIES, "stripes"))
    access = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.personal_access_token}
    backend = backends(**access, CELESTIAL_BENTOMODEL=guide / "guide.bentomodel", CELESTIAL_TRAIN_EVERY="off")
    backend.wait_for_log("of CELESTIAL_BENTOMODEL is served from now on")
    project = label_studio.create_project("The guide's model", config)
    names = (*BODIES[:3], "stripes")
    label_studio.import_labelled(project, labels_of(pictures, names, 0, LABELLED))
    fresh = labels_of(pictures, ["stripes"], LABELLED, LABELLED + FRESH)
    label_studio.import_tasks(project, [address for address, _ in fresh])
    label_studio.connect_backend(project, backend.url)
    guides = version(backend, project, config)

    job = trained(label_studio, backend, project)

    assert job["state"] in ("published", "kept"), job["reason"]
    assert job["outcome"]["parent"] == guides
    assert job["outcome"]["scores"]["choice"]["fresh"]["pictures"] == LABELLED * len(names)
    live = job["tag"] if job["state"] == "published" else guides
    assert version(backend, project, config) == live
    label_studio.retrieve(project)
    told = predicted(label_studio, project)
    assert {told[address][0] for address, _ in fresh} == {live}
    if job["state"] == "published":
        assert sum(told[address][1] == ["stripes"] for address, _ in fresh) >= FRESH - 1
