"""
What people made of pre-labels: every answer of every person, and what the model had said of it, shown or not.

It is read from Label Studio's annotations and predictions, and from what the database keeps of what was not shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from celestial_backend.labels import ChoiceMap, Control
from celestial_backend.learning.votes import ACCEPTED, UNAIDED, Choices, Vote, votes_of
from celestial_backend.settings import NEEDS_LABELS
from celestial_backend.studio.client import is_certified, moment
from celestial_backend.studio.labels import ProjectLabels, origins
from celestial_backend.trust.trial import PLANTED, Trial, Unshown

SHOWN, UNPREDICTED = "shown", "unpredicted"  # beside WITHHELD, AUDITED and PLANTED of `trial`
IMPORTED, AT_ONCE = "imported", "made for many tasks at once"
FROM_PREDICTIONS = "made of predictions, without a look"


@dataclass(frozen=True)
class Given:
    """
    What one person answered to one control of one task, and what the model had said of it.

    Attributes:
        annotator: Label Studio's number of the person, as text.
        chosen: The choices; none where nothing was ticked.
        arm: `SHOWN`: the person saw the pre-label; `WITHHELD`, `AUDITED` or `PLANTED`, as `Unshown.arm` says;
            `UNPREDICTED`: there was none, as of a picture unlike all that was learned.
        said: What the model said, of `PLANTED` that was shown in its place; None without any, and of `SHOWN` where
            it was changed and the prediction is gone.
        confidence: Of what the model said, 0 to 1: the region's score; None where nobody knows.
        version: The model's tag, "" where nobody knows, or where there was no model yet.
        seconds: That Label Studio measured until it was submitted; None where it did not.
        truth: Whether it is marked as ground truth; then it is no person's judgement.
        at: When it was made, as Label Studio writes it.
    """

    task: int
    annotation: int
    annotator: str
    control: str
    chosen: Choices
    arm: str
    said: Choices | None = None
    confidence: float | None = None
    version: str = ""
    seconds: float | None = None
    truth: bool = False
    at: str = ""

    @property
    def kept(self) -> bool:
        """Whether it is what the model said."""
        return self.said == self.chosen


@dataclass(frozen=True)
class Evidence:
    """
    All that is known of a project's labels at one moment.

    Attributes:
        number: Label Studio's number of the project.
        title: Its name.
        link: Where people open it.
        controls: Those that are served, in the config's order.
        given: In the order of tasks and annotations; each person's newest of a task.
        data: Task id -> its data, of all tasks with a label.
        people: Annotator -> a name for people, such as an e-mail address.
        tasks: How many the project has.
        made: When the project was made, as `settings.project_parts` gives it.
        left_out: Why annotations do not count, and how many (of each control).
    """

    number: str
    title: str
    link: str
    controls: tuple[Control, ...]
    given: tuple[Given, ...]
    data: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    people: Mapping[str, str] = field(default_factory=dict)
    tasks: int = 0
    made: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)


def read_evidence(labels: ProjectLabels, trial: Trial) -> Evidence:
    """
    All that is known of a project's labels now; some six seconds for a thousand tasks.

    Raises:
        ProjectGoneError: Label Studio has no such project.
        StudioError: It stayed away, or refused.
        LabelConfigError: The project's config has no control that can be served.
        StateError: The database cannot be read.
    """
    about = labels.about()
    choices = ChoiceMap.for_learning(about.config)
    unshown: dict[int, list[Unshown]] = {}
    for each in trial.kept(labels.project_id, about.made):
        unshown.setdefault(each.task, []).append(each)
    given, data, left_out = list[Given](), {}, Counter[str]()
    for task in labels.judged():
        data[task["id"]] = task["data"]
        given += _given(task, choices, unshown.get(task["id"], ()), left_out)
    people, known = {each.annotator for each in given if each.annotator.isdigit()}, labels.people()
    return Evidence(
        number=labels.project_id,
        title=about.title,
        link=about.link,
        controls=choices.controls,
        given=tuple(given),
        data=data,
        people={each: known.get(each, f"person {each}") for each in sorted(people, key=int)},
        tasks=about.tasks,
        made=about.made,
        left_out={why: left_out[why] for why in sorted(left_out)},
    )


def by_task(given: Iterable[Given]) -> dict[int, list[Given]]:
    """The answers of each task."""
    found: dict[int, list[Given]] = {}
    for each in given:
        found.setdefault(each.task, []).append(each)
    return found


def most_chosen(given: Sequence[Given]) -> Choices | None:
    """What most of them chose; None for a tie, or of nobody."""
    counts = Counter(each.chosen for each in given).most_common(2)
    return counts[0][0] if counts and (len(counts) == 1 or counts[0][1] > counts[1][1]) else None


def _given(
    task: Mapping[str, Any], choices: ChoiceMap, unshown: Sequence[Unshown], left_out: Counter[str]
) -> Iterator[Given]:
    """What people answered to a task, and what is marked as the truth."""
    true, judged = list[Mapping[str, Any]](), list[Mapping[str, Any]]()
    for each in task["annotations"]:
        if each.get("ground_truth"):
            true.append(each)
        elif why := _no_judgement(each):
            left_out[why] += 1
        else:
            judged.append(each)
    for counted in (true, judged):
        votes, out = votes_of({**task, "annotations": counted}, choices)
        left_out += out
        by_id = {int(each["id"]): each for each in counted}
        yield from (_answer(vote, by_id[vote.annotation_id], task, choices, unshown) for vote in votes)


def _no_judgement(annotation: Mapping[str, Any]) -> str:
    """
    Why an annotation is not what a person thought of the picture, "" if it is.

    The editor tells time and origin, and what is submitted in somebody's name has them as the last who changed it;
    what Label Studio makes in bulk has none of it.
    """
    if annotation.get("was_cancelled"):
        return ""  # counted with the others that were skipped
    if is_certified(annotation):
        return FROM_PREDICTIONS
    if annotation.get("import_id") is not None:
        return IMPORTED
    if annotation.get("bulk_created"):
        return AT_ONCE
    if annotation.get("lead_time") is not None or annotation.get("updated_by") is not None or origins(annotation):
        return ""
    return IMPORTED if annotation.get("parent_prediction") is None else FROM_PREDICTIONS


def _answer(
    vote: Vote, annotation: Mapping[str, Any], task: Mapping[str, Any], choices: ChoiceMap, unshown: Sequence[Unshown]
) -> Given:
    prediction = _prediction(annotation, task)
    version = str(prediction.get("model_version") or "")
    held = _held(unshown, version, annotation)
    arm, (said, confidence) = SHOWN, _said(prediction, vote.control, choices)
    if said is not None:
        arm = PLANTED if held is not None and held.arm == PLANTED else SHOWN
    elif held is not None and (prediction or vote.source == UNAIDED or held.arm == PLANTED):
        what = held.shown if held.arm == PLANTED else held.said  # what was planted is removed once the task is done
        said, confidence = _said({"result": what, "score": held.score}, vote.control, choices)
        arm, version = UNPREDICTED if said is None else held.arm, held.version
    elif not prediction and vote.source != UNAIDED:
        said = vote.choices if vote.source == ACCEPTED else None
    else:
        arm = UNPREDICTED
    return Given(
        task=vote.task_id,
        annotation=vote.annotation_id,
        annotator=vote.annotator,
        control=vote.control,
        chosen=vote.choices,
        arm=arm,
        said=said,
        confidence=confidence,
        version="" if version == NEEDS_LABELS else version,
        seconds=annotation.get("lead_time"),
        truth=vote.ground_truth,
        at=str(annotation.get("created_at") or vote.updated_at),
    )


def _prediction(annotation: Mapping[str, Any], task: Mapping[str, Any]) -> Mapping[str, Any]:
    """The prediction that an annotation started from, or what is left of it; empty without one."""
    parent, copy = annotation.get("parent_prediction"), annotation.get("prediction")
    if parent is not None:
        return next((each for each in task["predictions"] if each["id"] == parent), {})
    started = any(origin.startswith("prediction") for origin in origins(annotation))
    return copy if started and isinstance(copy, Mapping) and copy.get("result") else {}


def _held(unshown: Sequence[Unshown], version: str, annotation: Mapping[str, Any]) -> Unshown | None:
    """What was held back of a task when it was labelled: of the version that its prediction has, or the newest."""
    if version:
        return next((each for each in unshown if each.version == version), None)
    made = moment(annotation.get("created_at") or annotation.get("updated_at")).timestamp()
    return next((each for each in reversed(unshown) if each.at <= made), None)


def _said(prediction: Mapping[str, Any], control: str, choices: ChoiceMap) -> tuple[Choices | None, float | None]:
    """The choices of a prediction for one control, None without any, and the score of their region, or else its own."""
    result = prediction.get("result")
    said = choices.choices_of(result).get(control)
    if not said or not isinstance(result, list):
        return None, None
    scores = [each.get("score") for each in result if isinstance(each, Mapping) and each.get("from_name") == control]
    sure = (score for score in (*scores, prediction.get("score")) if isinstance(score, int | float) and 0 <= score <= 1)
    return frozenset(said), next(map(float, sure), None)
