"""From the draw to the certificate, with a Label Studio of a few lines; `tests/real` has the real one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from celestial_backend.database import Database
from celestial_backend.errors import LabelConfigError, ModelError, SettingsError
from celestial_backend.settings import Settings
from celestial_backend.trust import certificate, finish
from celestial_backend.trust.audit import ALL
from celestial_backend.trust.finish import (
    CERTIFIED,
    DRAWN,
    LABEL_ALL,
    MISSING,
    NOT_REACHED,
    Certificates,
    Outcome,
    Wish,
)
from celestial_backend.trust.trial import Trial

TAG = "celestial_bodies_classifier_model:one"
CONFIG = """<View><Image name="image" value="$image"/><Choices name="body" toName="image"><Choice value="Mars"/>
<Choice value="Moon"/><Choice value="other" predicted_values="__unknown__"/></Choices><Choices name="seen"
toName="image" choice="multiple"><Choice value="ring"/><Choice value="spot"/></Choices></View>"""


def region(control: str, *choices: str) -> dict[str, Any]:
    return {"from_name": control, "to_name": "image", "type": "choices", "value": {"choices": list(choices)}}


class FakeDesk:
    """Tasks with their annotations and predictions."""

    project_id = "7"

    def __init__(self, count: int) -> None:
        self.made, self.config, self.numbers = "1795374408", CONFIG, 0
        self.tasks: dict[int, dict[str, Any]] = {
            task: {"annotations": [], "predictions": []} for task in range(1, count + 1)
        }

    def about(self) -> Any:
        return type("About", (), {"title": "<i>All</i>", "config": self.config, "made": self.made})

    def open_tasks(self) -> Iterator[dict[str, Any]]:
        return ({"id": task, "data": {}} for task in sorted(self.open_numbers()))

    def open_numbers(self) -> set[int]:
        return {task for task, each in self.tasks.items() if not each["annotations"]}

    def chosen(self, tasks: Collection[int]) -> dict[int, dict[str, Any]]:
        return {task: self.tasks[task] for task in tasks if task in self.tasks}

    def remove(self, predictions: Mapping[int, Sequence[int]], *, whole: Collection[int]) -> None:
        for task, gone in predictions.items():
            kept = [each for each in self.tasks[task]["predictions"] if each["id"] not in gone]
            assert not (task in whole and kept), "what others made was to be removed"
            self.tasks[task]["predictions"] = kept

    def predict(self, rows: Mapping[int, Mapping[str, Any]], version: str) -> int:
        free = [task for task in rows if task in self.open_numbers()
                and version not in {each["version"] for each in self.tasks[task]["predictions"]}]  # fmt: skip
        for task in free:
            self.add(task, rows[task]["result"], version)
        return len(free)

    def add(self, task: int, result: list[Any], version: str) -> None:
        self.numbers += 1
        self.tasks[task]["predictions"].append({"id": self.numbers, "result": result, "version": version})

    def annotate(self, rows: Mapping[int, Mapping[str, Any]]) -> int:
        free = [task for task in rows if task in self.open_numbers()]
        for task in free:
            self.label(task, rows[task]["result"])
        return len(free)

    def label(self, task: int, result: list[Any], **more: Any) -> None:
        self.numbers += 1
        self.tasks[task]["annotations"].append({"id": self.numbers, "result": result, "completed_by": 3} | more)

    def show_predicted(self, _title: str, _version: str) -> int:
        return 5

    def people(self) -> dict[str, str]:
        return {"3": "anna@example.com"}


class Project:
    """A project of 400 tasks, of which the model says Mars and a ring; the surer the lower the number."""

    def __init__(self, folder: Path, count: int = 400, share: float = 0.0) -> None:
        settings = replace(Settings(), model_dir=folder, control_share=share)
        self.desk, self.database = FakeDesk(count), Database(settings)
        self.trial, self.version, self.says = Trial(settings, self.database), TAG, ["Mars"]

    def answers(self, tasks: Sequence[Any], _config: str) -> list[Any]:
        return [
            {"result": [region("body", *self.says) | {"score": 1 - task["id"] / 9000}, region("seen", "ring")],
             "score": 1 - task["id"] / 9000, "model_version": self.version}
            for task in tasks
        ]  # fmt: skip

    def go_on(self, wish: Wish = Wish()) -> Outcome:  # noqa: B008 - immutable
        desk: Any = self.desk
        return Certificates(desk, self.database, self.trial, TAG, self.answers).go_on(wish)

    @property
    def drawn(self) -> list[int]:
        return [each.task for each in self.trial.kept("7") if each.arm == "audited"]

    def label(self, wrong: Collection[int] = (), **more: Any) -> None:
        """Label all that was drawn."""
        for task in set(self.drawn) & self.desk.open_numbers():
            self.desk.label(task, [region("body", "Moon" if task in wrong else "Mars"), region("seen", "ring")], **more)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "ASK_AGAIN_S", -0.5)


def said(outcome: Outcome) -> str:
    return " ".join(certificate.sentences(outcome))


def test_tasks_on_which_only_our_predictions_stand_are_cleared_at_once(tmp_path: Path) -> None:
    """Empty ones included, which models without an answer leave; one by one, a hundred tasks would take minutes."""
    project, cleared = Project(tmp_path), list[int]()
    for task in project.desk.tasks:
        project.desk.add(task, [], "celestial_bodies_classifier_model:needs-labels")
        project.desk.add(task, [region("body", "Mars")], TAG)
    remove = project.desk.remove

    def seen(predictions: Mapping[int, Sequence[int]], *, whole: Collection[int]) -> None:
        cleared.extend(whole)
        remove(predictions, whole=whole)

    project.desk.remove = seen  # type: ignore[method-assign]
    project.go_on(Wish(error=0.05))
    assert sorted(cleared) == sorted(project.drawn)


def test_too_many_faults_accept_nothing_and_more_can_be_drawn(tmp_path: Path) -> None:
    """The level stays; what would have been reached is told; a given-up audit counts as a look."""
    project = Project(tmp_path, 2000)
    assert project.go_on(Wish(error=0.05)).state == DRAWN
    first = project.drawn
    with pytest.raises(SettingsError, match="once all that was drawn is labelled"):
        project.go_on(Wish(more=True))
    project.label(wrong=first[::9])
    found = project.go_on()
    assert (found.state, found.faults, found.accepted) == (NOT_REACHED, len(first[::9]), 0)
    assert 0.05 < (found.reachable or 0) < 0.3
    assert "promises nothing" in said(found)
    assert project.go_on(Wish(more=True)).drawn == 2 * len(first)
    project.label()
    again = project.go_on()
    assert again.looks == 2
    assert project.go_on(Wish(error=0.05, anew=True)).state == DRAWN
    assert len(project.drawn) > 2 * len(first)
    project.label()
    assert project.go_on().looks == 3


def test_without_a_fault_the_few_tasks_that_are_left_are_said_to_be_the_reason(tmp_path: Path) -> None:
    """People have labelled nearly all others meanwhile; nobody is told of too many faults where there are none."""
    project = Project(tmp_path, 100)
    project.go_on(Wish(error=0.05))
    project.label()
    for task in sorted(project.desk.open_numbers())[:-2]:
        project.desk.label(task, [region("body", "Mars"), region("seen", "ring")])
    found = project.go_on()
    assert (found.state, found.faults, found.left) == (NOT_REACHED, 0, 2)
    assert "is wrong, but they are too few to accept any of the 2 open tasks" in said(found)
    assert "Label the 2 open tasks" in said(found)


def test_an_audit_is_given_up_only_for_another_one(tmp_path: Path) -> None:
    """And counts as a look as soon as it has a label, since other commands tell what that says."""
    project = Project(tmp_path, 2000)
    project.go_on(Wish(error=0.1))
    with pytest.raises(SettingsError, match="needs the share"):
        project.go_on(Wish(anew=True))
    assert project.go_on(Wish(error=0.0001, anew=True)).state == LABEL_ALL
    assert project.go_on().number == 1
    old = project.drawn
    new = project.go_on(Wish(error=0.1, anew=True))
    assert (new.number, len(project.trial.audited("7"))) == (2, new.drawn)
    assert not project.desk.tasks[min(set(old) - set(project.drawn))]["predictions"]
    project.label()
    assert project.go_on(Wish(error=0.1, anew=True)).number == 3
    project.label()
    assert project.go_on().looks == 2


def test_a_certificate_lets_nobody_begin_anew(tmp_path: Path) -> None:
    """Trying until luck comes is paid for, as long as it is for the same tasks and the same control."""
    project = Project(tmp_path, 2000)
    project.go_on(Wish(error=0.05))
    project.label(wrong=project.drawn)
    assert project.go_on().state == NOT_REACHED
    project.go_on(Wish(error=0.5, control="seen", anew=True))
    project.label()
    certified = project.go_on()
    assert (certified.state, certified.looks) == (CERTIFIED, 2)
    project.go_on(Wish(error=0.05, control="body", anew=True))
    project.label()
    assert project.go_on().looks == 2
    project.go_on(Wish(error=0.05, control="seen", anew=True))
    project.label()
    assert project.go_on().looks == 3
    for task in project.desk.open_numbers():
        project.desk.label(task, [])
    project.desk.tasks |= {task: {"annotations": [], "predictions": []} for task in range(3001, 3401)}
    project.go_on(Wish(error=0.1, anew=True))
    project.label()
    assert project.go_on().looks == 1


def test_only_what_was_labelled_blind_counts(tmp_path: Path) -> None:
    """Not what began with a pre-label, was made of one in bulk, or was labelled before the draw had an end."""
    project = Project(tmp_path)
    answers = project.answers

    def slow(tasks: Sequence[Any], config: str) -> list[Any]:
        for task in tasks:
            if task["id"] % 2:
                project.desk.label(task["id"], [region("body", "Mars")])
        return answers(tasks, config)

    project.answers = slow  # type: ignore[method-assign]
    drawn = project.go_on(Wish(error=0.1))
    assert (drawn.open, drawn.predicted) == (200, 200)
    assert not any(task % 2 for task in project.drawn)
    kept, bulk, gone, *_ = project.drawn
    project.desk.label(kept, [region("body", "Mars") | {"origin": "prediction"}, region("seen", "ring")], lead_time=2.0)
    project.desk.label(bulk, [region("body", "Mars"), region("seen", "ring")], parent_prediction=5, lead_time=None)
    del project.desk.tasks[gone]
    project.label()
    found = project.go_on()
    assert (found.seen, found.deleted, found.labelled) == (2, 1, found.drawn - 3)
    assert sum(group[1] for group in found.groups) == found.drawn - 2
    assert sum(group[2] for group in found.groups) == 1
    assert "2 tasks of the audit were not labelled blind" in said(found)


def test_what_a_task_holds_decides_whether_it_counts(tmp_path: Path) -> None:
    """A control that is answered otherwise, a skipped task and a tie are wrong; a ground truth goes before votes."""
    project = Project(tmp_path)
    project.go_on(Wish(error=0.1, of=ALL))
    other, skipped, tied, true, *rest = project.drawn
    project.desk.label(other, [region("body", "Mars"), region("seen", "ring", "spot")])
    project.desk.label(skipped, [region("body", "Mars")], was_cancelled=True)
    project.desk.label(tied, [region("body", "Mars"), region("seen", "ring")])
    project.desk.label(tied, [region("body", "Moon"), region("seen", "ring")], completed_by=4)
    project.desk.label(true, [region("body", "Moon"), region("seen", "ring")], completed_by=4)
    project.desk.label(true, [region("body", "Mars"), region("seen", "ring")], ground_truth=True)
    for task in rest:
        project.desk.label(task, [region("body", "Mars"), region("seen", "ring")])
    found = project.go_on()
    assert (found.labelled, found.skipped) == (len(rest) + 4, 1)
    assert sum(group[2] for group in found.groups) == 3


def test_one_control_may_count_alone(tmp_path: Path) -> None:
    """Then it is accepted alone, as predictions only."""
    project = Project(tmp_path)
    project.go_on(Wish(error=0.1, control="seen"))
    project.label(wrong=project.drawn)
    with pytest.raises(SettingsError, match="no answer but to 'seen'"):
        project.go_on(Wish(annotate=True))
    found = project.go_on()
    assert (found.state, found.faults) == (CERTIFIED, 0)
    written = [each for task in project.desk.tasks.values() for each in task["predictions"] if each["result"]]
    assert len(written) == found.accepted > 200
    assert {each["result"][0]["from_name"] for each in written} == {"seen"}
    assert project.go_on().written == 0


def test_the_control_sample_stays_with_people(tmp_path: Path) -> None:
    """What is withheld by chance is accepted by no certificate."""
    project = Project(tmp_path, share=0.2)
    project.go_on(Wish(error=0.1))
    project.label()
    found = project.go_on(Wish(annotate=True))
    assert found.state == CERTIFIED
    open_tasks = project.desk.open_numbers()
    assert {task for task in project.desk.tasks if project.trial.arm("7", task)} - set(project.drawn) <= open_tasks
    assert found.left == len(open_tasks)


def test_an_audit_survives_what_happens_to_a_project(tmp_path: Path) -> None:
    """Another model goes live, tasks are deleted, the config changes, the project is set up anew."""
    project = Project(tmp_path)
    project.go_on(Wish(error=0.1))
    gone, *others = project.drawn
    del project.desk.tasks[gone]
    project.version = "celestial_bodies_classifier_model:two"
    project.desk.add(others[0], [region("body", "Mars")], "celestial_bodies_classifier_model:two")
    project.desk.add(others[1], [region("body", "Mars")], "somebody-else")
    found = project.go_on()
    assert (found.state, found.deleted, found.others) == (MISSING, 1, 1)
    assert "predictions of other makers" in said(found)
    told = [each for task in others for each in project.desk.tasks[task]["predictions"] if each["result"]]
    assert [each["version"] for each in told] == ["somebody-else"]
    project.desk.config = CONFIG.replace("Mars", "Venus")
    with pytest.raises(LabelConfigError, match=r"no 'body' with .'Mars'. any more"):
        project.go_on()
    project.desk.config = CONFIG
    project.label()
    assert project.go_on().version == TAG
    with pytest.raises(ModelError, match="changed from"):
        project.go_on(Wish(error=0.1, anew=True))
    project.desk.made = "1795374999"
    with pytest.raises(SettingsError, match="needs the share"):
        project.go_on()


@pytest.mark.parametrize(
    ("count", "wish", "told"),
    [
        pytest.param(0, Wish(error=0.03), "nothing to finish", id="no task is open"),
        pytest.param(60, Wish(error=0.03), "Label them all", id="few tasks"),
        pytest.param(400, Wish(error=0.0001), "Label them all", id="hardly an error"),
    ],
)
def test_where_labelling_all_is_less_it_says_so(count: int, wish: Wish, told: str, tmp_path: Path) -> None:
    project = Project(tmp_path, count)
    found = project.go_on(wish)
    assert found.state == LABEL_ALL
    assert told in said(found)
    assert project.drawn == []


def test_the_unknown_is_never_accepted(tmp_path: Path) -> None:
    """Nor is a choice for what is unlike all that was learned a prediction to audit."""
    project = Project(tmp_path)
    project.says = ["other"]
    assert "Label a few pictures" in said(project.go_on(Wish(error=0.1)))


def test_a_sample_that_can_never_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is too small: at least"):
        Project(tmp_path).go_on(Wish(error=0.05, size=20))
    with pytest.raises(SettingsError, match="less than the 400 open tasks"):
        Project(tmp_path).go_on(Wish(error=0.05, size=400))


def test_the_page_escapes_what_strangers_wrote(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.go_on(Wish(error=0.1))
    project.label()
    page = certificate.page(project.go_on())
    assert "&lt;i&gt;All&lt;/i&gt;" in page
    assert "<i>" not in page
    assert "anna@example.com" in page
    assert "<script" not in page
