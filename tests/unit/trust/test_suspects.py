"""Labels that look wrong: of which heads that did not learn them say otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from celestial_backend.commands import suspects as module
from celestial_backend.commands.cli import main
from celestial_backend.errors import NotEnoughDataError
from celestial_backend.labels import ChoiceMap
from celestial_backend.learning.control import Champion, Unseen, unseen
from celestial_backend.learning.dataset import Dataset, Example, Gallery
from celestial_backend.learning.project import Material
from celestial_backend.models.manifest import Counts
from celestial_backend.trust.suspects import look, suspects

CHOICES = ("cat", "dog", "fox")
CONFIG = (
    '<View><Image name="image" value="$image"/><Choices name="kind" toName="image"><Choice value="cat"/>'
    '<Choice value="dog"/><Choice value="fox"/></Choices><Choices name="rare" toName="image">'
    '<Choice value="a"/><Choice value="b"/></Choices></View>'
)


def example(number: int, *choices: str) -> Example:
    return Example(number.to_bytes(8), frozenset(choices), 1.0, (number,), (1000 + number,), "unaided")


def silent(stage: str, **where: int | None) -> None:
    """Nobody is told."""


class Read:
    """In the place of a learner: what it has read of a project."""

    def __init__(self, labels: dict[int, str], fault: Exception | None = None) -> None:
        rng = np.random.default_rng(3)
        centres = np.eye(16, dtype=np.float32)[: len(CHOICES)]
        examples = [example(number, choice) for number, choice in labels.items()]
        vectors = {
            each.picture: centres[each.task_ids[0] % 3] + rng.normal(0, 0.15, 16).astype(np.float32)
            for each in examples
        }
        gallery = Gallery({"general": vectors}, {"general": {}})
        data = Dataset({"kind": examples, "rare": []}, gallery, {}, Counts(), None, "")
        champion = Champion()
        champion.features = ("general",)  # type: ignore[attr-defined]
        self.material, self.fault = Material(ChoiceMap.for_learning(CONFIG), champion, data), fault  # type: ignore[arg-type]

    def __call__(self, *_: object) -> Read:
        return self

    def read(self, project: str, _report: object) -> Material:
        assert project == "7"
        if self.fault:
            raise self.fault
        return self.material


@pytest.fixture
def labels() -> dict[int, str]:
    """Of 60 pictures, the labels of two are wrong."""
    return {number: CHOICES[number % 3] for number in range(1, 61)} | {10: "fox", 41: "cat"}


def test_planted_faults_come_first(labels: dict[int, str]) -> None:
    found = look(Read(labels), "7", silent)  # type: ignore[arg-type]
    assert {each.tasks for each in found.found} == {(10,), (41,)}
    fault = next(each for each in found.found if each.tasks == (10,))
    assert (fault.given, fault.said, fault.annotations) == (("fox",), ("dog",), (1010,))
    assert fault.trust < 0.1 < 0.8 < fault.sure
    assert found.judged == {"kind": 60}
    assert list(found.lacking) == ["rare"]


def test_what_is_judged_has_not_learned_the_label(labels: dict[int, str]) -> None:
    """Nine of ten heads are fitted on the others; one that had learned the label would believe it."""
    read = Read(labels).material
    said = unseen(read.choices.controls[0], read.data, Champion())
    assert said is not None
    assert said.said[[each.task_ids[0] for each in said.examples].index(10)].argmax() == CHOICES.index("dog")


def test_the_least_trusted_comes_first() -> None:
    said = np.array([[0.9, 0.1, 0], [0.3, 0.6, 0.1], [0.02, 0.9, 0.08], [0.1, 0.9, 0]])
    labels = Unseen(tuple(example(number, "cat") for number in range(1, 5)), CHOICES, said)
    found = suspects("kind", labels)
    assert [(each.tasks[0], each.trust, each.sure) for each in found] == [(3, 0.02, 0.9), (4, 0.1, 0.9), (2, 0.3, 0.6)]


def test_of_several_choices_the_likeliest_fault_counts() -> None:
    said = np.array([[0.9, 0.8, 0.1], [0.9, 0.03, 0.2], [0.9, 0.1, 0.6]])
    given = [("cat", "dog"), ("cat", "dog"), ("cat",)]
    labels = Unseen(tuple(example(number, *each) for number, each in enumerate(given, 1)), CHOICES, said)
    found = suspects("kind", labels, multiple=True)
    assert [(each.tasks[0], each.given, each.said) for each in found] == [
        (2, ("cat", "dog"), ("cat",)), (3, ("cat",), ("cat", "fox")),
    ]  # fmt: skip
    assert [each.trust for each in found] == pytest.approx([0.03, 0.4])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CliRunner:
    monkeypatch.setenv("LABEL_STUDIO_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "0" * 40)
    monkeypatch.setenv("MODEL_DIR", str(tmp_path))
    return CliRunner()


def test_the_command_names_tasks_labels_and_links(
    run: CliRunner, monkeypatch: pytest.MonkeyPatch, labels: dict[int, str]
) -> None:
    monkeypatch.setattr(module, "Learner", Read(labels))
    told = run.invoke(main, ["suspects", "--project", "7", "--json", "--limit", "1"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert (found["found"], found["judged"], len(found["labels"])) == (2, {"kind": 60}, 1)
    first = found["labels"][0]
    assert first["link"] == f"http://127.0.0.1:9/projects/7/data?task={first['tasks'][0]}"
    shown = run.invoke(main, ["suspects", "--project", "7"]).stdout
    assert "The model says otherwise about 2 of 60 labels." in shown
    assert "'rare' was not judged" in shown
    assert "http://127.0.0.1:9/projects/7/data?task=10" in shown
    assert "fox" in shown
    assert "50 more labels are expected to bring" in shown
    assert found["outlook"]["kind"]["labels"] == 60


def test_too_few_labels_are_said_in_a_sentence(
    run: CliRunner, monkeypatch: pytest.MonkeyPatch, labels: dict[int, str]
) -> None:
    monkeypatch.setattr(module, "Learner", Read(labels, NotEnoughDataError("Training needs at least two choices.")))
    told = run.invoke(main, ["suspects", "--project", "7"])
    assert told.exit_code == NotEnoughDataError.exit_code
    assert told.stderr.endswith("Error: Training needs at least two choices.\n")


def test_without_a_token_it_says_where_one_comes_from(run: CliRunner) -> None:
    run.env = {"LABEL_STUDIO_API_KEY": ""}
    told = run.invoke(main, ["suspects", "--project", "7"])
    assert told.exit_code
    assert "connect --new-token" in told.stderr
