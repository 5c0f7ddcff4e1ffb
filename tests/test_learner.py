"""One training, from labels to the live model: what goes in is written down, and nothing is published that is worse."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backend_server import BODIES, label_config
from new_bodies import render_new
from PIL import Image

from celestial_backend import examples, learning
from celestial_backend import finetune as finetune_module
from celestial_backend.classifier import Parts, load
from celestial_backend.errors import NotEnoughDataError, StudioError
from celestial_backend.examples import Example
from celestial_backend.finetune import Candidate
from celestial_backend.learning import Learner, Outcome
from celestial_backend.ledger import KEPT, PUBLISHED, Job
from celestial_backend.lessons import Tuning
from celestial_backend.network import Postprocess, Preprocess, load_card
from celestial_backend.renderer import render
from celestial_backend.settings import MODEL_NAME, Settings
from celestial_backend.store import DEFAULT_MODEL
from celestial_backend.wiring import Services, build

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
QUICK = Tuning(pictures=2400, epochs=(6, 6), rendered_per_class=4, check_rounds=1)
CONFIG = label_config((*BODIES, "Comet"))


class FakeProject:
    """A project of Label Studio, as far as a training sees it."""

    def __init__(self, tasks: list[dict[str, Any]]) -> None:
        self.tasks = tasks
        self.config = CONFIG
        self.told: list[str] = []

    def __call__(self, _studio: object, project_id: str) -> FakeProject:
        assert project_id == "7"
        return self

    def label_config(self) -> str:
        return self.config

    def labelled_tasks(self) -> Iterator[dict[str, Any]]:
        yield from self.tasks

    def show_version(self, tag: str) -> list[str]:
        self.told.append(tag)
        return ["Label Studio was told."]


def task(number: int, choice: str, shown: str = "") -> dict[str, Any]:
    """A labelled task; the picture is of another body where the label is wrong."""
    body, data = shown or choice, io.BytesIO()
    picture = render_new(body, number) if body == "Comet" else render(body, (5, number))
    picture.save(data, "PNG")
    region = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": [choice]}}
    annotation = {
        "id": 1000 + number, "completed_by": 1, "result": [region], "was_cancelled": False, "ground_truth": False,
        "parent_prediction": None, "prediction": {}, "updated_at": f"2026-11-23T01:{number // 60:02}:{number % 60:02}Z",
    }  # fmt: skip
    uri = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"id": number, "data": {"image": uri}, "annotations": [annotation], "predictions": []}


@pytest.fixture(scope="module")
def tasks() -> list[dict[str, Any]]:
    """Thirty comets, and three pictures of each body."""
    numbered = enumerate(["Comet"] * 30 + [body for body in BODIES for _ in range(3)], 1)
    return [task(number, choice) for number, choice in numbered]


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return build(Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path / "state"))


@cache
def drawn(name: str, seed: tuple[int, int]) -> Image.Image:
    return render(name, seed)


@pytest.fixture
def project(tasks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> FakeProject:
    fake = FakeProject(tasks)
    monkeypatch.setattr(learning, "StudioProject", fake)
    monkeypatch.setattr(finetune_module, "finetune", partial(finetune_module.finetune, tuning=QUICK))
    monkeypatch.setattr(examples, "render", lambda name, seed: drawn(name, seed).copy())  # all trainings show these
    return fake


@pytest.fixture(scope="module")
def candidates() -> dict[tuple[str, ...], Candidate]:
    """What trainings made, by the names of what they learned."""
    return {}


@pytest.fixture
def taught_once(
    project: FakeProject, candidates: dict[tuple[str, ...], Candidate], monkeypatch: pytest.MonkeyPatch
) -> FakeProject:
    """The project, in tests of what follows a training: the same labels need only be taught by the first of them."""
    finetune = finetune_module.finetune

    def once(parent: Parts, known: Any, classes: Any, learn: Sequence[Example], **options: Any) -> Candidate:
        names = tuple(example.name for example in learn)
        if names not in candidates:
            candidates[names] = finetune(parent, known, classes, learn, **options)
        return candidates[names]

    monkeypatch.setattr(finetune_module, "finetune", once)
    return project


def begun(services: Services) -> Job:
    services.jobs.ledger.request("7")
    job = services.jobs.ledger.start("7")
    assert job is not None
    return job


def learned(services: Services, job: Job, folder: Path) -> Outcome:
    (folder / job.id).mkdir()
    learner = Learner(services.settings, services.store, services.studio, services.images, services.jobs.ledger)
    return learner.learn(job, folder / job.id)


def run(services: Services, folder: Path) -> Outcome:
    job = begun(services)
    outcome = learned(services, job, folder)
    services.jobs.ledger.end(job.id, outcome.state, outcome.reason, outcome.facts)
    return outcome


def test_a_new_class_is_learned_and_published(services: Services, taught_once: FakeProject, tmp_path: Path) -> None:
    """The model is live, knows the new class and the old ones, and carries everything that went into it."""
    parent = services.store.live_tag("7")
    outcome = run(services, tmp_path)
    assert outcome.state == PUBLISHED, outcome.reason
    tag = outcome.facts["tag"]
    assert services.store.live_tag("7") == tag
    assert services.store.live_tag("8") == parent
    assert taught_once.told == [tag]
    assert "Label Studio was told." in outcome.reason

    model = services.store.current("7")
    assert model.classes == (*BODIES, "Comet")
    for name in ("Comet", "Mars", "Saturn"):
        picture = render_new(name, 900) if name == "Comet" else render(name, 900)
        assert model.classes[int(model.probabilities(model.prepare(picture)).argmax())] == name

    told = services.store.registry.describe(tag).metadata
    assert (told["parent"], told["project"], told["decision"]) == (parent, "7", "passed")
    assert told["annotations"] == "1001-1060"
    assert told["training"]["tuning"]["seed"] == QUICK.seed
    assert told["scores"]["benches"]["held-out"]["challenger_right"] >= told["scores"]["benches"]["held-out"]["lost"]
    assert sum(told["labels"]["learn"].values()) + sum(told["labels"]["held out"].values()) == 60
    assert services.jobs.ledger.projects() == {"7": "2026-11-23T01:01:00Z"}

    again = run(services, tmp_path)
    assert again.state == KEPT
    assert "has learned from these very labels" in again.reason
    services.store.publish("7", parent)
    back = run(services, tmp_path)
    assert back.state == KEPT
    assert f"models use {tag} --project 7" in back.reason


def test_the_same_labels_give_the_same_model(services: Services, project: FakeProject, tmp_path: Path) -> None:
    """Bit by bit, also when Label Studio gives the tasks in another order."""
    parent, weights, digests = services.store.live_tag("7"), [], []
    for _ in range(2):
        outcome = run(services, tmp_path)
        tag = outcome.facts["tag"]
        weights.append((services.store.registry.path(tag) / "model.weights.h5").read_bytes())
        digests.append(outcome.facts["digest"])
        services.store.publish("7", parent)
        services.store.registry.remove(tag)  # nobody remembers that it was made before
        project.tasks = project.tasks[::-1]
    assert weights[0] == weights[1]
    assert digests[0] == digests[1]


def test_wrong_labels_change_nothing(services: Services, project: FakeProject, tmp_path: Path) -> None:
    """A third of wrong labels is refused with both scores; the model stays in the store, out of use."""
    parent = services.store.live_tag("7")
    numbered = enumerate([body for body in BODIES for _ in range(6)], 1)
    project.tasks = [
        task(number, BODIES[(BODIES.index(body) + 1 + number % 8) % 10] if number % 3 == 0 else body, shown=body)
        for number, body in numbered
    ]
    outcome = run(services, tmp_path)
    assert outcome.state == KEPT
    assert services.store.live_tag("7") == parent
    assert project.told == []
    assert services.store.registry.describe(outcome.facts["tag"]).metadata["decision"] == "refused"
    assert outcome.facts["scores"]["benches"]["held-out"]["champion_right"] > 0
    again = run(services, tmp_path)
    assert again.state == KEPT
    assert "was refused" in again.reason


@pytest.mark.usefixtures("taught_once")
def test_a_model_that_a_person_chose_meanwhile_stays(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new model has not been compared with that one."""
    services.store.publish("7", services.store.live_tag())
    card = load_card(DEFAULT_MODEL)
    hooks = (Preprocess(card.size_px), Postprocess(card.classes))
    chosen = services.store.registry.add(f"{MODEL_NAME}:chosen", DEFAULT_MODEL, *hooks, {"classes": list(card.classes)})
    judge = learning.contest.judge

    def meanwhile(*arguments: Any) -> Any:
        services.store.publish("7", chosen)
        return judge(*arguments)

    monkeypatch.setattr(learning.contest, "judge", meanwhile)
    outcome = run(services, tmp_path)
    assert outcome.state == KEPT
    assert "another model is now" in outcome.reason
    assert services.store.live_tag("7") == chosen


def test_a_label_studio_that_is_gone_at_the_end_costs_nothing(
    services: Services, taught_once: FakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is live, and the job says that Label Studio could not be told."""

    def gone(_: str) -> list[str]:
        raise StudioError("Label Studio cannot be reached.")

    monkeypatch.setattr(taught_once, "show_version", gone)
    outcome = run(services, tmp_path)
    assert outcome.state == PUBLISHED
    assert outcome.reason.endswith("Label Studio could not be told: Label Studio cannot be reached.")
    assert services.store.live_tag("7") == outcome.facts["tag"]


def test_too_few_labels_are_refused_with_their_counts(
    services: Services, project: FakeProject, tmp_path: Path
) -> None:
    """Before anything is trained."""
    project.tasks = project.tasks[27:34]
    with pytest.raises(NotEnoughDataError, match=r"at least 10 labelled pictures.*Earth: 3"):
        learned(services, begun(services), tmp_path)


def test_labels_that_count_nothing_leave_nothing_to_learn(
    services: Services, project: FakeProject, tmp_path: Path
) -> None:
    """CELESTIAL_ACCEPTED_WEIGHT reaches the examples: labels that only agree with a prediction are not learned at 0."""
    for number, one in enumerate(project.tasks):
        annotation = one["annotations"][0]
        prediction = {"id": 5000 + number, "result": annotation["result"]}
        project.tasks[number] = one | {
            "predictions": [prediction], "annotations": [annotation | {"parent_prediction": prediction["id"]}]
        }  # fmt: skip
    weightless = build(replace(services.settings, accepted_weight=0.0))
    with pytest.raises(NotEnoughDataError, match="CELESTIAL_ACCEPTED_WEIGHT"):
        learned(weightless, begun(weightless), tmp_path)


def test_a_new_model_starts_from_nothing_where_that_is_asked_for(
    services: Services, project: FakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows the classes of the labels, and no others."""
    quick = replace(QUICK, pictures=2400, epochs=(4, 4), learning_rate=0.003)
    monkeypatch.setattr(finetune_module, "from_scratch", partial(finetune_module.from_scratch, tuning=quick))
    project.tasks = [one for one in project.tasks if one["id"] <= 36]  # comets, Earth, Jupiter
    job = replace(begun(services), from_scratch=True)
    outcome = learned(services, job, tmp_path)
    told = outcome.facts
    assert sorted(told["classes"]) == ["Comet", "Earth", "Jupiter"]
    assert told["from_scratch"]
    assert load(told["tag"]).classes == tuple(told["classes"])


@pytest.mark.usefixtures("taught_once")
def test_a_model_that_was_saved_wrong_is_not_published(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read back from the store and compared with itself before the pointer is changed."""
    parent = services.store.live_tag("7")
    add = services.store.registry.add

    def damaged(tag: str, folder: Path, pre: Any, post: Any, facts: dict[str, Any]) -> str:
        import keras

        network = keras.models.load_model(folder)
        network.set_weights([np.zeros_like(weights) for weights in network.get_weights()])
        network.save(folder / "damaged", zipped=False)
        return add(tag, folder / "damaged", pre, post, facts)

    monkeypatch.setattr(services.store.registry, "add", damaged)
    with pytest.raises(learning.ModelLoadError, match="must say from the store what it said before"):
        learned(services, begun(services), tmp_path)
    assert services.store.live_tag("7") == parent
