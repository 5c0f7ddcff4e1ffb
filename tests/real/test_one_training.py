"""One training, from labels to the live model: what goes in is written down, and nothing is published that is worse."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from celestial_backend.errors import ModelLoadError, NotEnoughDataError, StudioError, TrainingError
from celestial_backend.jobs import trainings
from celestial_backend.jobs.ledger import KEPT, PUBLISHED, Job
from celestial_backend.learning import dataset as dataset_module
from celestial_backend.learning import project as learning
from celestial_backend.learning.project import Learner, Outcome, Request
from celestial_backend.models import headed, store
from celestial_backend.models import kept as kept_models
from celestial_backend.models.manifest import Manifest
from celestial_backend.models.store import DEFAULT_MODEL
from celestial_backend.pictures.hooks import Postprocess, Preprocess
from celestial_backend.planets import network
from celestial_backend.planets.renderer import render
from celestial_backend.services import Services, build
from celestial_backend.settings import MODEL_NAME, Settings, project_tag
from celestial_backend.worker.training import ProgressOfJob, end
from tests.support.backend_server import BODIES, label_config
from tests.support.new_bodies import render_new
from tests.support.shapes import KINDS, data_uri, drawn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
CONFIG = label_config(KINDS)
TWO = (
    '<View><Image name="image" value="$image"/>'
    '<Choices name="shape" toName="image"><Choice value="round"/><Choice value="square"/></Choices>'
    '<Choices name="light" toName="image"><Choice value="bright"/><Choice value="dark"/></Choices></View>'
)
ROUND = {"disc": "round", "box": "square"}


class FakeProject:
    """A project of Label Studio, as far as a training sees it."""

    def __init__(self) -> None:
        self.labelled: list[dict[str, Any]] = []
        self.others: list[dict[str, Any]] = []
        self.config = CONFIG
        self.told: list[str] = []

    def __call__(self, _studio: object, project_id: str) -> FakeProject:
        assert project_id == "7"
        return self

    def label_config(self) -> str:
        return self.config

    def labelled_tasks(self) -> Iterator[dict[str, Any]]:
        yield from self.labelled

    def tasks(self) -> Iterator[dict[str, Any]]:
        for each in [*self.labelled, *self.others]:
            yield {"id": each["id"], "data": each["data"]}

    def in_step(self, tag: str, *, keep_predictions: bool) -> list[str]:
        assert not keep_predictions
        self.told.append(tag)
        return ["Label Studio was told."]


def shown(number: int, picture: Image.Image, **said: str | Sequence[str]) -> dict[str, Any]:
    """A task and what was said of its picture, by control."""
    result = [
        {"from_name": name, "to_name": "image", "type": "choices",
         "value": {"choices": [choices] if isinstance(choices, str) else list(choices)}}
        for name, choices in said.items()
    ]  # fmt: skip
    annotation = {
        "id": 1000 + number, "completed_by": 1, "result": result, "was_cancelled": False, "ground_truth": False,
        "parent_prediction": None, "prediction": {}, "updated_at": f"2026-11-23T01:{number // 60:02}:{number % 60:02}Z",
    }  # fmt: skip
    return {"id": number, "data": {"image": data_uri(picture)}, "annotations": [annotation], "predictions": []}


def task(number: int, choice: str, kind: str = "") -> dict[str, Any]:
    """A labelled task; the picture is of another kind where the label is wrong."""
    return shown(number, drawn(kind or choice, number), choice=choice)


def some(count: int, start: int = 1, kinds: Sequence[str] = KINDS) -> list[dict[str, Any]]:
    """Tasks whose kinds take turns."""
    return [task(number, kinds[number % len(kinds)]) for number in range(start, start + count)]


@pytest.fixture(scope="module")
def known_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one test has computed of a picture, the next one need not."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def services(tmp_path: Path, known_features: Path) -> Iterator[Services]:
    services = build(
        Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path / "state", cache_dir=known_features)
    )
    yield services
    services.store.features.close()


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> FakeProject:
    fake = FakeProject()
    for module in (learning, trainings):
        monkeypatch.setattr(module, "StudioProject", fake)
    monkeypatch.setattr(dataset_module, "RETRY_PAUSE_S", 0)
    return fake


def begun(services: Services) -> Job:
    services.jobs.ledger.request("7")
    job = services.jobs.ledger.start("somebody")
    assert job is not None
    return job


def learned(services: Services, job: Job, folder: Path) -> Outcome:
    (folder / job.id).mkdir()
    learner = Learner(services.settings, services.store, services.studio, services.images)
    ledger, request = services.jobs.ledger, Request(job.project, job.id, job.attempts, folder / job.id)
    return learner.learn(request, ProgressOfJob(ledger, job), partial(ledger.read_until, job.project))


def run(services: Services, folder: Path) -> Job:
    """Train, publish what is better, and tell Label Studio, as the process of a training does; the job afterwards."""
    job = begun(services)
    ended = end(services, services.jobs.ledger, job, learned(services, job, folder))
    assert ended is not None
    if ended.state == PUBLISHED:
        services.jobs.tell(job, ended.manifest.tag or "")
    found = services.jobs.ledger.job(job.id)
    assert found is not None
    return found


def facts(job: Job) -> dict[str, Any]:
    """What is told of the new model, as the job shows it."""
    return job.manifest.plain()


def forget(services: Services, tag: str) -> None:
    """Let nobody remember that a model was made."""
    with services.database.writing("7") as work:
        kept_models.remove(tag, work)
    services.store.registry.remove(tag)


def published(services: Services, folder: Path) -> str:
    """Train, and give the new model's tag."""
    outcome = run(services, folder)
    assert outcome.state == PUBLISHED, outcome.reason
    return str(facts(outcome)["tag"])


def says(services: Services, *pictures: Image.Image, config: str = CONFIG) -> list[dict[str, list[str]]]:
    """What the live model predicts, by control."""
    model = services.store.current("7")
    choices = model.vocabulary.choices(config)
    rows: NDArray[np.float64] = model.probabilities(np.concatenate([model.prepare(each) for each in pictures]))
    told = [choices.prediction({"image": row})[0] for row in rows.tolist()]
    return [{region["from_name"]: region["value"]["choices"] for region in regions} for regions in told]


def share_right(services: Services, kinds: Sequence[str] = KINDS) -> float:
    pictures = [(kind, drawn(kind, (99, number))) for kind in kinds for number in range(6)]
    told = says(services, *(picture for _, picture in pictures))
    return float(np.mean([said["choice"] == [kind] for said, (kind, _) in zip(told, pictures, strict=True)]))


def test_foreign_choices_are_learned_and_published(services: Services, project: FakeProject, tmp_path: Path) -> None:
    """The model is live, knows the project's own choices, and carries everything that went into it."""
    parent = services.store.live_tag("7")
    project.labelled = some(24)
    outcome = run(services, tmp_path)
    assert outcome.state == PUBLISHED, outcome.reason
    tag = facts(outcome)["tag"]
    assert (services.store.live_tag("7"), services.store.live_tag("8")) == (tag, parent)
    assert project.told == [tag]
    right = facts(outcome)["scores"]["choice"]["right"]
    assert outcome.reason == (
        f"Published: {right} of 24 labels that it had not learned are right. Label Studio was told."
    )
    assert share_right(services) > 0.9
    told = services.store.registry.describe(tag).metadata
    assert (told["parent"], told["project"], told["decision"]) == (parent, "7", "passed")
    assert (told["annotations"], told["taught"]["choice"]["annotations"]) == ("1001-1024", "1001-1024")
    assert told["labels"]["labels"] == {"choice": dict.fromkeys(sorted(KINDS), 6)}
    assert told["choices"] == {"choice": list(KINDS)}
    assert "base" not in told, "the default network has nothing to do with it"
    assert services.jobs.ledger.projects() == {"7": "2026-11-23T01:00:24Z"}
    assert sorted(path.name for path in services.store.registry.path(tag).iterdir()) == [
        "heads.json", "heads.npz", "model.yaml",
    ]  # fmt: skip

    again = run(services, tmp_path)
    assert again.state == KEPT
    assert "has learned from these very labels" in again.reason
    services.store.publish("7", parent)
    back = run(services, tmp_path)
    assert back.state == KEPT
    assert f"models use {tag} --project 7" in back.reason


def test_the_same_labels_give_the_same_model(services: Services, project: FakeProject, tmp_path: Path) -> None:
    """To the last bit, also when Label Studio gives the tasks in another order."""
    parent, arrays, digests = services.store.live_tag("7"), [], []
    project.labelled = some(16)
    project.others = [task(number, "disc") for number in range(200, 210)]
    for _ in range(2):
        outcome = run(services, tmp_path)
        tag = facts(outcome)["tag"]
        with np.load(services.store.registry.path(tag) / headed.ARRAYS) as file:
            arrays.append({name: file[name].tobytes() for name in file})
        digests.append(facts(outcome)["digest"])
        services.store.publish("7", parent)
        forget(services, tag)
        project.labelled, project.others = project.labelled[::-1], project.others[::-1]
    assert arrays[0] == arrays[1]
    assert digests[0] == digests[1]


def test_more_labels_are_learned_again(services: Services, project: FakeProject, tmp_path: Path) -> None:
    """The new model is judged beside the live one on the labels that this one has not seen."""
    project.labelled = some(12)
    first = published(services, tmp_path)
    project.labelled = some(24)
    outcome = run(services, tmp_path)
    assert outcome.state == PUBLISHED, outcome.reason
    assert services.store.registry.describe(facts(outcome)["tag"]).parent == first
    assert facts(outcome)["scores"]["choice"]["fresh"]["pictures"] == 12


def test_changed_labels_are_learned_again(services: Services, project: FakeProject, tmp_path: Path) -> None:
    """What was a disc is round now: another choice of the config, and nothing is left of the old one."""
    project.labelled = some(16)
    published(services, tmp_path)
    names = [*KINDS[1:], "ring"]
    project.config = label_config(names)
    project.labelled = [
        shown(number, drawn(KINDS[number % 4], number), choice={"disc": "ring"}.get(kind, kind))
        for number, kind in ((number, KINDS[number % 4]) for number in range(1, 17))
    ]
    published(services, tmp_path)
    assert says(services, drawn("disc", 77), config=project.config) == [{"choice": ["ring"]}]


def test_a_choice_without_labels_is_kept_by_other_pictures(
    services: Services, project: FakeProject, tmp_path: Path
) -> None:
    """Those of the project that the live model is sure of; where there are none, what is lost is said."""
    project.labelled = some(24)
    first = published(services, tmp_path)
    without = [each for each in some(40) if each["annotations"][0]["result"][0]["value"]["choices"] != ["dots"]]
    project.labelled = without
    project.others = [task(number, "dots") for number in range(300, 320)]
    kept = run(services, tmp_path)
    assert kept.state == PUBLISHED, kept.reason
    assert facts(kept)["training"]["choice"]["kept"]["dots"] >= 10
    assert share_right(services) > 0.9

    services.store.publish("7", first)
    forget(services, facts(kept)["tag"])
    project.others = []
    lost = run(services, tmp_path)
    assert lost.state == PUBLISHED, lost.reason
    said = "Not known any more, as no picture of it could be had: 'dots'. Label some to teach it again."
    assert said in lost.reason


def test_random_labels_change_nothing(services: Services, project: FakeProject, tmp_path: Path) -> None:
    """The model stays in the store, out of use; nobody is sent to check labels, and nothing is tried twice."""
    parent = services.store.live_tag("7")
    rng = random.Random(4)  # noqa: S311 - an order, not a secret
    names = rng.sample(KINDS * 8, 32)
    project.labelled = [task(number, name, KINDS[number % 4]) for number, name in enumerate(names, 1)]
    outcome = run(services, tmp_path)
    assert outcome.state == KEPT
    assert outcome.reason.startswith("Kept the old answers: ")
    assert outcome.reason.endswith("which guessing could be, too; label more pictures.")
    assert (services.store.live_tag("7"), project.told) == (parent, [])
    assert services.store.registry.describe(facts(outcome)["tag"]).metadata["decision"] == "refused"
    assert facts(outcome)["suspects"] == {}
    again = run(services, tmp_path)
    assert again.state == KEPT
    assert "was refused" in again.reason


def test_a_fifth_of_wrong_labels_does_no_harm(services: Services, project: FakeProject, tmp_path: Path) -> None:
    """What is right is learned, the wrong ones are named, ten at most, and no right one."""
    wrong = set(range(2, 62, 5))
    project.labelled = [
        task(number, KINDS[(number + (number in wrong)) % 4], KINDS[number % 4]) for number in range(1, 61)
    ]
    outcome = run(services, tmp_path)
    assert outcome.state == PUBLISHED, outcome.reason
    assert share_right(services) > 0.9
    suspects = facts(outcome)["suspects"]["choice"]
    assert 3 <= len(suspects) <= 10
    assert set(suspects) <= wrong
    assert f"Labels to look at again: tasks {', '.join(map(str, suspects))}." in outcome.reason


def test_new_labels_drawn_at_random_are_not_learned(services: Services, project: FakeProject, tmp_path: Path) -> None:
    """Though the old ones are still said well; right ones that come later are."""
    project.labelled = some(24)
    good = published(services, tmp_path)
    drawn_names = random.Random(6).sample(KINDS * 6, 24)  # noqa: S311 - an order, not a secret
    strange = [task(100 + number, name, KINDS[number % 4]) for number, name in enumerate(drawn_names)]
    project.labelled = [*some(24), *strange]
    outcome = run(services, tmp_path)
    assert outcome.state == KEPT
    assert "guessing could say them as well" in outcome.reason or "of all 48 labels" in outcome.reason
    assert services.store.live_tag("7") == good
    project.labelled = [*some(24), *some(24, 100)]
    assert published(services, tmp_path) != good


def both(number: int, kind: str, light: str) -> dict[str, Any]:
    """A disc or a box, in a picture that is bright or dark."""
    values = np.asarray(drawn(kind, number), float)
    picture = Image.fromarray((values * 0.3 if light == "dark" else 255 - (255 - values) * 0.5).astype(np.uint8))
    return shown(number, picture, shape=ROUND[kind], light=light)


def test_controls_are_judged_each_by_itself(services: Services, project: FakeProject, tmp_path: Path) -> None:
    """A control whose labels are rubbish keeps its old head to the last bit, and what that has learned, with it."""
    project.config = TWO
    kinds = [(kind, light) for kind in ROUND for light in ("bright", "dark")]
    project.labelled = [both(number, *kinds[number % 4]) for number in range(1, 25)]
    first = published(services, tmp_path)
    old = services.store.current("7")
    assert isinstance(old, headed.HeadsModel)
    rng = random.Random(2)  # noqa: S311 - no secret
    for number in range(25, 61):
        one = both(number, *kinds[number % 4])
        one["annotations"][0]["result"][1]["value"]["choices"] = [rng.choice(("bright", "dark"))]
        project.labelled.append(one)
    outcome = run(services, tmp_path)
    assert outcome.state == PUBLISHED, outcome.reason
    assert "Published: 'shape': " in outcome.reason
    assert "Kept the old answers: 'light': " in outcome.reason
    new = services.store.current("7")
    assert isinstance(new, headed.HeadsModel)
    assert [head.control for head in new.heads] == ["shape", "light"]
    assert np.array_equal(new.heads[1].weights, old.heads[1].weights)
    assert not np.array_equal(new.heads[0].weights, old.heads[0].weights)
    taught = services.store.registry.describe(new.tag).metadata["taught"]
    assert taught["light"] == services.store.registry.describe(first).metadata["taught"]["light"]
    assert taught["shape"]["labels"] == 60
    (said,) = says(services, Image.new("RGB", (96, 96), (10, 10, 10)), config=TWO)
    assert said["light"] == ["dark"]


def test_several_choices_of_one_picture(services: Services, project: FakeProject, tmp_path: Path) -> None:
    """Each is ticked by itself, or none."""
    project.config = TWO.replace(
        '<Choices name="light" toName="image"><Choice value="bright"/><Choice value="dark"/>',
        '<Choices name="has" toName="image" choice="multiple"><Choice value="stripes"/><Choice value="frame"/>',
    )

    def picture(number: int) -> Image.Image:
        found = drawn("stripes" if number % 2 else "disc", number)
        if number // 2 % 2:
            framed = Image.new("RGB", found.size, "red")
            framed.paste(found.resize((60, 60)), (18, 18))
            return framed
        return found

    def has(number: int) -> list[str]:
        return ["stripes"] * (number % 2) + ["frame"] * (number // 2 % 2)

    project.labelled = [shown(number, picture(number), shape="round", has=has(number)) for number in range(1, 41)]
    outcome = run(services, tmp_path)
    assert outcome.state == PUBLISHED, outcome.reason
    told = says(services, *map(picture, range(101, 117)), config=project.config)
    right = [set(said.get("has", [])) == set(has(number)) for said, number in zip(told, range(101, 117), strict=True)]
    assert np.mean(right) > 0.8
    assert {"shape"} & set().union(*told) == set(), "one choice alone is not learned"


# The default model and what it knows


def planet_picture(choice: str, seed: int) -> Image.Image:
    return render_new(choice, seed) if choice == "Comet" else render(choice, (5, seed))


def planet(number: int, choice: str) -> dict[str, Any]:
    return shown(number, planet_picture(choice, number), choice=choice)


def test_planets_are_not_forgotten(services: Services, project: FakeProject, tmp_path: Path) -> None:
    """
    One new class is labelled, and nothing else: the ten old ones are said as before.

    And so they are after the next training, whose live model is no network any more.
    """
    project.config = label_config((*BODIES, "Comet"))
    project.labelled = [planet(number, "Comet") for number in range(1, 9)]
    first = run(services, tmp_path)
    assert first.state == PUBLISHED, first.reason
    assert facts(first)["scores"]["choice"]["kept"]["pictures"] > 10 * len(BODIES)
    assert set(facts(first)["taught"]["choice"]["sampled"]) == set(BODIES)
    project.labelled += [planet(number, "Comet") for number in range(9, 13)]
    project.labelled += [planet(number, "Mars") for number in range(20, 26)]
    second = run(services, tmp_path)
    assert second.state == PUBLISHED, second.reason
    assert "Not known any more" not in second.reason
    names = [name for name in (*BODIES, "Comet") for _ in range(3)]
    pictures = [planet_picture(name, 900 + number) for number, name in enumerate(names)]
    told = says(services, *pictures, config=project.config)
    right = [said["choice"] == [name] for said, name in zip(told, names, strict=True)]
    assert np.mean(right) > 0.95, list(zip(names, told, strict=True))


def test_a_network_that_knows_as_much_stays(services: Services, project: FakeProject, tmp_path: Path) -> None:
    """The default model says planets right; a head that says no more of them right is not published."""
    parent = services.store.live_tag("7")
    project.config = label_config(BODIES)
    project.labelled = [planet(number, BODIES[number % 3]) for number in range(1, 19)]
    outcome = run(services, tmp_path)
    assert outcome.state == KEPT, outcome.reason
    assert "is as good" in outcome.reason
    assert services.store.live_tag("7") == parent


# Another embedder


class Tiny:
    """Sixteen patches of a picture, each with its mean colour and how rough it is."""

    name, width = "tiny-1", 64

    def prepare(self, picture: Image.Image) -> NDArray[np.uint8]:
        return np.asarray(picture.convert("RGB").resize((64, 64)))[None]

    def vectors(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        patches = batch.reshape(len(batch), 4, 16, 4, 16, 3).astype(np.float32) / 255
        colours, rough = patches.mean(axis=(2, 4)), patches.std(axis=(2, 4)).mean(axis=-1, keepdims=True)
        return np.concatenate([colours, 4 * rough], axis=-1).reshape(len(batch), 64)


def test_another_embedder_begins_anew(
    services: Services, project: FakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The live model's features are not its own: the labels are learned again, and what is lost is said."""
    project.labelled = some(24)
    first = published(services, tmp_path)
    for module in (learning, store):
        monkeypatch.setattr(module, "open_embedder", lambda _: Tiny())
    again = build(services.settings)
    project.labelled = some(60, kinds=("disc", "stripes", "dots"))
    outcome = run(again, tmp_path)
    assert outcome.state == PUBLISHED, outcome.reason
    assert "as no picture of it could be had: 'box'." in outcome.reason
    described = again.store.registry.describe(facts(outcome)["tag"])
    assert (described.parent, described.metadata["embedder"]) == (first, "tiny-1")
    assert share_right(again, ("disc", "stripes", "dots")) > 0.6


# Too little, and pictures that cannot be had


def test_too_few_labels_are_refused_with_their_counts(
    services: Services, project: FakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any picture is read."""
    monkeypatch.setattr(services.images, "file", None)
    project.labelled = [task(number, kind) for number, kind in enumerate(("disc", "disc", "disc", "box"), 1)]
    with pytest.raises(NotEnoughDataError, match=r"at least 2 choices of a control .*'choice' has disc: 3, box: 1"):
        learned(services, begun(services), tmp_path)


def test_labels_that_count_nothing_leave_nothing_to_learn(
    services: Services, project: FakeProject, tmp_path: Path
) -> None:
    """CELESTIAL_ACCEPTED_WEIGHT reaches the examples: labels that only agree with a prediction are not learned at 0."""
    for number, one in enumerate(some(8)):
        annotation = one["annotations"][0]
        prediction = {"id": 5000 + number, "result": annotation["result"]}
        project.labelled.append(one | {
            "predictions": [prediction], "annotations": [annotation | {"parent_prediction": prediction["id"]}]
        })  # fmt: skip
    weightless = build(replace(services.settings, accepted_weight=0.0))
    with pytest.raises(NotEnoughDataError, match=r"8 pictures accepted .* CELESTIAL_ACCEPTED_WEIGHT"):
        learned(weightless, begun(weightless), tmp_path)


@pytest.mark.parametrize(("broken", "ends"), [pytest.param(2, False, id="a tenth"), pytest.param(3, True, id="more")])
def test_broken_pictures(services: Services, project: FakeProject, tmp_path: Path, broken: int, ends: bool) -> None:
    """A tenth is passed over and told; more end the training, with the first reasons."""
    project.labelled = some(20)
    for one in project.labelled[:broken]:
        one["data"]["image"] = "data:image/png;base64,aaaa"
    if ends:
        with pytest.raises(TrainingError, match=r"3 of 20 cannot be had.* Task 1: The picture data:image/png"):
            learned(services, begun(services), tmp_path)
        return
    outcome = run(services, tmp_path)
    assert outcome.state == PUBLISHED, outcome.reason
    told = facts(outcome)["labels"]
    assert told["pictures left out"] == {"that cannot be had": 2}
    assert [each["task"] for each in told["pictures that cannot be had"]] == [1, 2]


def test_pictures_without_a_label_have_a_few_seconds(
    services: Services, project: FakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A project may have a hundred thousand; after that the training goes on without the rest."""
    monkeypatch.setattr(learning, "POOL_S", -1.0)
    project.labelled = some(16)
    project.others = [task(number, "disc") for number in range(100, 120)]
    outcome = run(services, tmp_path)
    assert outcome.state == PUBLISHED, outcome.reason
    assert facts(outcome)["labels"]["without a label"] == 0


# Ends that are not as hoped


def test_where_it_is_can_be_seen(
    services: Services, project: FakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage, in this order, with the seconds since it began."""
    stages: list[str] = []
    write = services.jobs.ledger.progress

    def seen(job: Job, **where: Any) -> None:
        stages.append(where["stage"])
        assert where["seconds"] >= 0
        write(job, **where)

    monkeypatch.setattr(services.jobs.ledger, "progress", seen)
    project.labelled = some(12)
    published(services, tmp_path)
    assert list(dict.fromkeys(stages)) == [
        "reading labels", "reading pictures", "looking at pictures without a label", "learning", "saving",
    ]  # fmt: skip


def test_a_model_that_a_person_chose_meanwhile_stays(
    services: Services, project: FakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new model has not been compared with that one."""
    services.store.publish("7", services.store.live_tag())
    card = network.load_card(DEFAULT_MODEL)
    hooks = (Preprocess(card.size_px), Postprocess(card.classes))
    chosen = services.store.registry.add(f"{MODEL_NAME}:chosen", DEFAULT_MODEL, *hooks, {"classes": list(card.classes)})
    teach = learning.teach

    def meanwhile(*arguments: Any) -> Any:
        services.store.publish("7", chosen)
        return teach(*arguments)

    monkeypatch.setattr(learning, "teach", meanwhile)
    project.labelled = some(12)
    outcome = run(services, tmp_path)
    assert outcome.state == KEPT
    assert "another model is now" in outcome.reason
    assert services.store.live_tag("7") == chosen


def test_a_label_studio_that_is_gone_at_the_end_costs_nothing(
    services: Services, project: FakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is live, and the job says that Label Studio could not be told."""

    def gone(_tag: str, **_options: bool) -> list[str]:
        raise StudioError("Label Studio cannot be reached.")

    monkeypatch.setattr(project, "in_step", gone)
    project.labelled = some(12)
    outcome = run(services, tmp_path)
    assert outcome.state == PUBLISHED
    assert outcome.reason.endswith("Label Studio could not be told: Label Studio cannot be reached.")
    assert services.store.live_tag("7") == facts(outcome)["tag"]


def test_what_an_attempt_left_that_was_killed_is_replaced(
    services: Services, project: FakeProject, tmp_path: Path
) -> None:
    """Half a model under the job's own tag."""
    project.labelled = some(12)
    job = begun(services)
    left = services.store.registry.path(project_tag("7", job.id, job.attempts))
    left.mkdir(parents=True)
    (left / "heads.json").write_text("{")
    outcome = learned(services, job, tmp_path)
    assert outcome.better, outcome.reason
    end(services, services.jobs.ledger, job, outcome)
    assert share_right(services) > 0.8


def test_a_model_that_was_saved_wrong_is_not_published(
    services: Services, project: FakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read back from the store and compared with itself before the pointer is changed."""
    parent = services.store.live_tag("7")
    add = services.store.registry.add_heads

    def damaged(tag: str, folder: Path, manifest: Manifest) -> str:
        with np.load(folder / headed.ARRAYS) as file:
            arrays = {name: np.zeros_like(file[name]) if name.startswith("weights") else file[name] for name in file}
        np.savez(folder / headed.ARRAYS, **arrays)
        return add(tag, folder, manifest)

    monkeypatch.setattr(services.store.registry, "add_heads", damaged)
    project.labelled = some(12)
    with pytest.raises(ModelLoadError, match="must say from the store what it said before"):
        learned(services, begun(services), tmp_path)
    assert services.store.live_tag("7") == parent


@pytest.mark.parametrize("name", [headed.ARRAYS, headed.ABOUT])
def test_a_damaged_live_model_is_replaced_by_training(
    services: Services, project: FakeProject, tmp_path: Path, name: str
) -> None:
    """Also by one on the very labels that it had learned."""
    project.labelled = some(24)
    tag = published(services, tmp_path)
    file = services.store.registry.path(tag) / name
    file.write_bytes(file.read_bytes()[:50])
    services.store._loaded.clear()
    again = published(services, tmp_path)
    assert again != tag
    assert services.store.live_tag("7") == again
    assert share_right(services) > 0.9


def test_a_live_model_whose_description_was_edited_is_learned_from_no_less(
    services: Services, project: FakeProject, tmp_path: Path
) -> None:
    """What is told of its head cannot be read, so it counts as a model that has learned none of these labels."""
    project.labelled = some(24)
    tag = published(services, tmp_path)
    file = services.store.registry.path(tag) / "model.yaml"
    described = yaml.safe_load(file.read_text())
    described["metadata"] |= {"taught": {"choice": {"annotations": "all", "right": "most"}}, "tried": [1], "digest": 7}
    file.write_text(yaml.safe_dump(described))
    project.labelled = some(36)
    outcome = run(services, tmp_path)
    assert facts(outcome)["parent"] == tag
    assert facts(outcome)["scores"]["choice"]["fresh"]["pictures"] == 36


def test_a_training_that_is_anothers_by_now_publishes_nothing(
    services: Services, project: FakeProject, tmp_path: Path
) -> None:
    """Its worker was taken for dead; who begins the job again learns the same labels, and publishes."""
    parent = services.store.live_tag("7")
    project.labelled = some(12)
    job = begun(services)
    late = learned(services, job, tmp_path)
    services.jobs.ledger.give_back(job)
    assert end(services, services.jobs.ledger, job, late) is None
    assert services.store.live_tag("7") == parent
    (tmp_path / job.id).rename(tmp_path / "late")
    again = run(services, tmp_path)
    assert (again.id, again.state) == (job.id, PUBLISHED), again.reason
    assert services.store.live_tag("7") == facts(again)["tag"] != late.manifest.tag
