"""
What the annotations of a task say about its pictures, and where they have it from.

Reads tasks as Label Studio's ``/api/tasks?fields=all`` gives them. A *vote* is one
person's one class for one picture; all else that was submitted is counted and left out.

Where a label came from is told by comparing it with the prediction that it started
from, because Label Studio's own word for it misleads (seen on 1.23.2):

====================================  =======================  ===================
what the annotator did                ``result[0].origin``     parent prediction
====================================  =======================  ===================
accepted the pre-label                ``prediction``           its id
changed it                            ``prediction-changed``   its id
changed it and changed it back        ``prediction-changed``   its id
labelled without a pre-label          ``manual``               null
Create Annotations From Predictions   absent                   its id
====================================  =======================  ===================

The parent becomes null when the prediction is deleted; ``origin`` stays, and so does
the copy of the prediction in the annotation, which ``/api/tasks`` does not show but
exports and events do. That copy is also filled where nobody saw a pre-label, so it
counts only beside an ``origin`` that names a prediction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from celestial_backend.labels import ChoiceMap
from celestial_backend.studio import moment

UNAIDED, ACCEPTED, CORRECTED = "unaided", "accepted", "corrected"
SKIPPED = "skipped by the annotator"
NOT_TRUTH = "beside a ground truth"
REPLACED = "replaced by a later one of the same annotator"
NO_CLASS = "without a class"
SEVERAL = "with several classes"
NOT_OFFERED = "with a choice that the label config does not offer"


@dataclass(frozen=True)
class Vote:
    """
    One person's class for one picture.

    Attributes:
        annotator: Who; every annotation of an account that was deleted counts as another person's.
        data_key: Which picture of the task.
        source: ``unaided``, made without a pre-label; ``accepted`` as it was pre-labelled; ``corrected``.
        updated_at: When it was last changed, as Label Studio writes it.
    """

    annotation_id: int
    task_id: int
    annotator: str
    data_key: str
    class_name: str
    source: str
    ground_truth: bool
    updated_at: str


def votes_of(task: Mapping[str, Any], choices: ChoiceMap) -> tuple[list[Vote], Counter[str]]:
    """
    The votes of a task, in the order of their annotations, and what was left out.

    If an annotation is marked as ground truth, only such count. Of several annotations
    by one person the newest counts, also if it says nothing.

    Returns:
        Votes, and for each reason the number of annotations (of each picture) without one.
    """
    left_out: Counter[str] = Counter()
    given = [each for each in task.get("annotations") or () if isinstance(each, Mapping)]
    standing = [each for each in given if not each.get("was_cancelled")]
    left_out[SKIPPED] = len(given) - len(standing)
    true = [each for each in standing if each.get("ground_truth")]
    left_out[NOT_TRUTH] = len(standing) - len(true) if true else 0
    latest = _latest(true or standing)
    left_out[REPLACED] = len(true or standing) - len(latest)
    votes = []
    for annotation in sorted(latest, key=lambda each: int(each["id"])):
        said = classes_by_key(annotation.get("result"), choices)
        for data_key in choices.data_keys:
            names = said.get(data_key, frozenset())
            if len(names) != 1 or not names <= set(choices.classes):
                left_out[NO_CLASS if not names else SEVERAL if len(names) > 1 else NOT_OFFERED] += 1
                continue
            votes.append(
                Vote(
                    annotation_id=int(annotation["id"]),
                    task_id=int(task["id"]),
                    annotator=_annotator(annotation),
                    data_key=data_key,
                    class_name=next(iter(names)),
                    source=_source(names, annotation, task, data_key, choices),
                    ground_truth=bool(annotation.get("ground_truth")),
                    updated_at=str(annotation.get("updated_at") or ""),
                )
            )
    return votes, +left_out


def classes_by_key(result: object, choices: ChoiceMap) -> dict[str, frozenset[str]]:
    """The classes that a result names for each picture of the task, by all controls about that picture."""
    by_control = choices.classes_of(result)
    found: dict[str, frozenset[str]] = {}
    for control in choices.controls:
        names = by_control.get(control.from_name, ())
        if names:
            found[control.data_key] = found.get(control.data_key, frozenset()) | frozenset(names)
    return found


def _latest(annotations: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    latest: dict[str, Mapping[str, Any]] = {}
    for annotation in sorted(annotations, key=lambda each: (moment(each.get("updated_at")), int(each["id"]))):
        latest[_annotator(annotation)] = annotation
    return list(latest.values())


def _annotator(annotation: Mapping[str, Any]) -> str:
    person = annotation.get("completed_by")
    return f"somebody's annotation {annotation['id']}" if person is None else str(person)


def _source(
    names: frozenset[str],
    annotation: Mapping[str, Any],
    task: Mapping[str, Any],
    data_key: str,
    choices: ChoiceMap,
) -> str:
    parent = annotation.get("parent_prediction")
    origin = _origin(annotation.get("result"), data_key, choices)
    if parent is None and not origin.startswith("prediction"):
        return UNAIDED
    snapshot = annotation.get("prediction")
    known = [each for each in task.get("predictions") or () if parent is not None and each.get("id") == parent]
    known += [snapshot] if isinstance(snapshot, Mapping) and snapshot.get("result") else []
    if known:
        said = classes_by_key(known[0].get("result"), choices).get(data_key)
        return UNAIDED if not said else ACCEPTED if said == names else CORRECTED
    return CORRECTED if origin == "prediction-changed" else ACCEPTED


def _origin(result: object, data_key: str, choices: ChoiceMap) -> str:
    """What Label Studio says about the regions of one picture; the strongest word of several, "" without any."""
    controls = {control.from_name for control in choices.controls if control.data_key == data_key}
    said = {
        str(region.get("origin") or "")
        for region in (result if isinstance(result, list) else ())
        if isinstance(region, Mapping) and region.get("from_name") in controls
    }
    return next((word for word in ("prediction-changed", "prediction") if word in said), "")
