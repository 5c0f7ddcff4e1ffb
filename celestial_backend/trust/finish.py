"""
From an audit to a certificate: draws tasks for people to label blind, and accepts what their labels allow.

All that is decided is written into the database before it is done in Label Studio, and what is done there may be done
again. So a run may be killed at any moment, and the next one goes on. The predictions are kept as they were at the
draw, so that the certificate holds whatever model is live later.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from celestial_backend.database import Database
from celestial_backend.errors import LabelConfigError, ModelError, SettingsError
from celestial_backend.labels import ChoiceMap, short, some
from celestial_backend.learning.votes import agree, votes_of
from celestial_backend.settings import is_tag
from celestial_backend.studio.client import CERTIFICATE, is_certified, moment
from celestial_backend.studio.desk import Desk
from celestial_backend.studio.labels import About, origins
from celestial_backend.trust.audit import (
    ACCEPTED,
    ACCEPTING,
    DONE,
    GIVEN_UP,
    OPEN,
    Audit,
    Audits,
    Ranked,
    Round,
    Verdict,
    draw,
    judge,
    least,
    more,
    plan,
    reachable,
)
from celestial_backend.trust.trial import ASK_AGAIN_S, AUDITED, Trial, Unshown

logger = logging.getLogger(__name__)
LABEL_ALL, DRAWN, MISSING, NOT_REACHED, CERTIFIED = "label all", "drawn", "labels missing", "not reached", "certified"
PREDICTIONS, ANNOTATIONS = "predictions", "annotations"
PAGE = 200  # tasks that are predicted at once
TAKES = 3  # looks whether predictions that were on their way have come
NAMESPACE = uuid.UUID("5a0f4c0e-2f0b-4b7e-9b0e-6f2c1d7a9e33")  # of the annotations' numbers
Answers = Callable[[Sequence[Any], str], Sequence[Any]]  # tasks, label config -> the predictor's answers
Told = Callable[[str, int, int], None]  # what is done, and how much of how much


@dataclass(frozen=True)
class Wish:
    """What is asked for; the first four go for a new audit only, and None stands for what an open one says."""

    error: float | None = None
    confidence: float | None = None
    of: str | None = None
    control: str | None = None
    size: int | None = None
    more: bool = False
    anew: bool = False
    annotate: bool = False


@dataclass(frozen=True)
class Outcome:
    """
    Where an audit stands, in what a page and a script need.

    Attributes:
        link: Where people open the project; left to whoever knows.
        state: `LABEL_ALL`, `DRAWN`, `MISSING`, `NOT_REACHED` or `CERTIFIED`.
        number: Of the audit, 0 without one.
        error: The share that may be wrong, and `confidence` with which; `of` what, and `control` that counts, or "".
        open: Tasks that were open at the draw, of which `predicted` had a prediction.
        least: How many must be labelled without a fault at least.
        drawn: How many people are to label blind, `labelled` so far, of those `skipped`; `deleted` are gone, and of
            others somebody had `seen` the pre-label.
        looks: How often the labels were judged.
        audited: Those that count for what is accepted, or for all, and `faults` among them.
        groups: Of each: tasks, labelled blind, faults, accepted; the surest first.
        threshold: The lowest score that is accepted.
        accepted: How many tasks, `written` by this run as `how`.
        left: Open tasks that stay for people.
        more: Labels that are missing for a certificate, about; None where none is in sight.
        reachable: The share of errors that the labels would have been enough for.
        others: Audited tasks on which predictions of other makers stand, which people may see.
        changed: The labels of the audit were changed since, and do not allow any more what was accepted.
        people: Who labelled, and how many tasks; `first` and `last` when.
        tab: The number of the tab.
    """

    state: str
    project: str
    title: str
    link: str
    number: int = 0
    version: str = ""
    error: float = 0.0
    confidence: float = 0.9
    of: str = ACCEPTED
    control: str = ""
    open: int = 0
    predicted: int = 0
    least: int | None = None
    drawn: int = 0
    drawn_at: tuple[float, ...] = ()
    labelled: int = 0
    skipped: int = 0
    deleted: int = 0
    seen: int = 0
    looks: int = 0
    audited: int = 0
    faults: int = 0
    groups: tuple[tuple[int, int, int, int], ...] = ()
    threshold: float | None = None
    accepted: int = 0
    accepted_at: float | None = None
    written: int = 0
    how: tuple[str, ...] = ()
    left: int = 0
    more: int | None = None
    reachable: float | None = None
    others: int = 0
    changed: bool = False
    people: Mapping[str, int] = field(default_factory=dict)
    first: str = ""
    last: str = ""
    tab: int | None = None


@dataclass(frozen=True)
class _Labels:
    """What people said of the tasks of an audit; those that are deleted are wrong, those that were seen are no part."""

    right: dict[int, bool]
    missing: int
    skipped: int
    deleted: int
    seen: int
    people: dict[str, int]
    first: str
    last: str


class Certificates:
    """The audits of one project; for one thread, and one process at a time."""

    def __init__(
        self, desk: Desk, database: Database, trial: Trial, version: str, answers: Answers, told: Told = lambda *_: None
    ) -> None:
        """
        Args:
            desk: The project in Label Studio.
            database: Keeps the audits.
            trial: Knows what people are not shown.
            version: The live model's tag.
            answers: What it says of tasks, whether shown or not.
            told: Called with what is done now.
        """
        self._desk, self._trial, self._version, self._answers, self._told = desk, trial, version, answers, told
        self._number = desk.project_id
        self._kept = Audits(database, self._number)

    def go_on(self, wish: Wish) -> Outcome:
        """
        Draw an audit, or look at the labels of the open one and accept what they allow.

        Raises:
            SettingsError: What is wished for cannot be; the message says what can.
            CelestialError: Label Studio, the database or the model failed; the next run goes on.
        """
        about = self._desk.about()
        choices = ChoiceMap.for_learning(about.config)
        kept = self._kept.last(about.made)
        if kept is None or kept[0].state == GIVEN_UP or wish.anew:
            return self._first(about, choices, wish, kept[0] if kept else None)
        audit, facts = kept
        _same(audit, wish)
        _see_choices(audit, choices)
        if audit.state == OPEN:
            return self._look(about, choices, audit, wish)
        return self._accept(about, choices, audit, facts, wish)

    # The draw

    def _first(self, about: About, choices: ChoiceMap, wish: Wish, before: Audit | None) -> Outcome:
        """Draw an audit, and only then give up the one before it."""
        if before and before.state == OPEN and self._may_be_known(before):
            self._kept.turn(before, OPEN, {"judged": True})
        audit = self._ranked(about, choices, wish)
        if audit.groups == 0:
            return self._outcome(LABEL_ALL, about, audit)
        if before and before.state in (OPEN, GIVEN_UP):
            self._give_up(before)
        fresh = self._drawn(audit, {one.task for one in audit.order})
        audit = self._kept.add(replace(audit, rounds=(fresh,)), before.number if before else 0,
                               lambda each: self._unshown(each, choices, fresh), self._trial)  # fmt: skip
        return self._asked_for(about, choices, audit, DRAWN)

    def _may_be_known(self, audit: Audit) -> bool:
        """Whether anything was labelled of what was drawn last: others than `finish` can tell what that says."""
        return any(task["annotations"] for task in self._desk.chosen(audit.rounds[-1].tasks).values())

    def _ranked(self, about: About, choices: ChoiceMap, wish: Wish) -> Audit:
        """An audit that is not drawn yet: all open tasks with what the model says of them; without groups, for none."""
        error, confidence, of = wish.error, wish.confidence or 0.9, wish.of or ACCEPTED
        if error is None:
            raise SettingsError("A new audit needs the share that may be wrong, such as --error 0.03.")
        control = wish.control or ""
        names = [each.from_name for each in choices.controls]
        if control and control not in names:
            raise LabelConfigError(f"--control must be one of {some(names)}, got {short(control)}.")
        tasks = list(self._desk.open_tasks())
        said: dict[str, int] = {}
        ranked, lot = list[Ranked](), f"order {time.time_ns()}"
        for start in range(0, len(tasks), PAGE):
            self._told("Predicting open tasks", start, len(tasks))
            page = tasks[start : start + PAGE]
            for task, answer in zip(page, self._answers(page, about.config), strict=True):
                what, score = _said(answer, choices, control)
                if what:
                    ranked.append(
                        Ranked(task["id"], score, said.setdefault(json.dumps(what, sort_keys=True), len(said)))
                    )
                    self._same_model(answer)
        still = self._desk.open_numbers()  # what was labelled meanwhile was not labelled blind
        ranked, total = [one for one in ranked if one.task in still], sum(task["id"] in still for task in tasks)
        ranked.sort(key=lambda one: (-one.score, self._trial.drawn(self._number, one.task, lot)))
        audit = Audit(0, self._version, about.made, OPEN, error, confidence, of, control, total, tuple(ranked),
                      tuple(json.loads(each) for each in said), 0, 0)  # fmt: skip
        return _planned(replace(audit, looks=self._kept.looks(audit)), wish.size)

    def _drawn(self, audit: Audit, open_tasks: Collection[int]) -> Round:
        lot = f"audit {time.time_ns()}"
        return draw(audit, open_tasks, lambda task: self._trial.drawn(self._number, task, lot), time.time())

    def _same_model(self, answer: Mapping[str, Any]) -> None:
        if answer["model_version"] != self._version:
            raise ModelError(
                f"The live model of project {self._number} changed from {self._version} to {answer['model_version']}"
                " while its tasks were predicted. Run finish again."
            )

    def _unshown(self, audit: Audit, choices: ChoiceMap, fresh: Round) -> list[Unshown]:
        by_number = {one.task: one for one in audit.order}
        return [
            Unshown(task, audit.version, AUDITED, _regions(audit, by_number[task], choices), by_number[task].score,
                    fresh.at, audit.made)
            for task in fresh.tasks
        ]  # fmt: skip

    def _asked_for(self, about: About, choices: ChoiceMap, audit: Audit, state: str) -> Outcome:
        """See that people find the tasks, and nothing of what the model says of them."""
        if state == DRAWN:
            time.sleep(ASK_AGAIN_S + 0.5)  # until every process knows what it must hold back
        others = self._hide(audit)
        tab = self._desk.show_predicted(f"Audit {audit.number}", _audit_version(audit))
        labels = self._labels(audit, choices)
        return self._outcome(state, about, audit, labels=labels, others=others, tab=tab)

    def _hide(self, audit: Audit) -> int:
        """
        Put empty predictions in the place of ours on all audited tasks that nobody has labelled.

        Gives the number of those tasks on which predictions of other makers stand.
        """
        others, drawn = 0, set(audit.tasks)
        scores = {one.task: one.score for one in audit.order if one.task in drawn}
        for _ in range(TAKES):
            self._told("Hiding predictions", 0, len(drawn))
            found = {number: task for number, task in self._desk.chosen(drawn).items() if not task["annotations"]}
            told = {number: [each for each in task["predictions"] if each["result"]] for number, task in found.items()}
            others = sum(not all(_is_ours(each["version"]) for each in mine) for mine in told.values())
            ours = {
                number: [each["id"] for each in found[number]["predictions"] if _is_ours(each["version"])]
                for number, mine in told.items() if any(_is_ours(each["version"]) for each in mine)
            }  # fmt: skip
            self._desk.remove(ours, whole=[each for each in ours if len(ours[each]) == len(found[each]["predictions"])])
            version = _audit_version(audit)
            rows = {number: {"result": [], "score": scores[number], "model_version": version} for number in found}
            self._desk.predict(rows, version)
            if not ours:
                break
        return others

    def _give_up(self, audit: Audit) -> None:
        """End an audit, and take empty predictions away from its tasks, so that they are predicted again."""
        found = {number: task for number, task in self._desk.chosen(audit.tasks).items() if not task["annotations"]}
        self._kept.give_up(audit, found)
        empty = {
            number: [each["id"] for each in task["predictions"]
                     if not each["result"] and (_is_ours(each["version"]) or each["version"] == _audit_version(audit))]
            for number, task in found.items()
        }  # fmt: skip
        self._desk.remove(empty, whole=[each for each in empty if len(empty[each]) == len(found[each]["predictions"])])

    # The labels

    def _look(self, about: About, choices: ChoiceMap, audit: Audit, wish: Wish) -> Outcome:
        labels = self._labels(audit, choices)
        if labels.missing:
            if wish.more:
                raise SettingsError(
                    f"More can be drawn once all that was drawn is labelled, and {labels.missing} tasks are missing."
                )
            return self._asked_for(about, choices, audit, MISSING)
        open_tasks = self._free()
        verdict = judge(audit, labels.right, open_tasks)
        if verdict.certified:
            facts = {"accepted": [one.task for one in verdict.accepted], "at": time.time(), "how": []}
            audit = self._kept.turn(audit, ACCEPTING, facts)
            return self._accept(about, choices, audit, facts, wish)
        self._kept.turn(audit, OPEN, {"judged": True})
        if wish.more:
            return self._draw_more(about, choices, audit, open_tasks)
        return self._outcome(
            NOT_REACHED, about, audit, labels=labels, verdict=verdict, more=more(audit, verdict, open_tasks),
            reachable=reachable(audit, labels.right, open_tasks), left=len(open_tasks),
        )  # fmt: skip

    def _draw_more(self, about: About, choices: ChoiceMap, audit: Audit, open_tasks: Collection[int]) -> Outcome:
        fresh = self._drawn(audit, open_tasks)
        if not fresh.tasks:
            raise SettingsError("No task is left that could be drawn. Label those that are open.")
        audit = replace(audit, rounds=(*audit.rounds, fresh))
        self._kept.draw_more(audit, self._unshown(audit, choices, fresh), self._trial)
        return self._asked_for(about, choices, audit, DRAWN)

    def _labels(self, audit: Audit, choices: ChoiceMap) -> _Labels:
        self._told("Reading labels", 0, 0)
        drawn = set(audit.tasks)
        found = self._desk.chosen(drawn)
        said = {one.task: audit.said[one.said] for one in audit.order if one.task in drawn}
        people, moments, skipped, seen = dict[str, int](), list[str](), 0, 0
        right = dict.fromkeys(drawn - set(found), False)  # who deletes what is hard to tell deletes what is wrong
        for number, task in found.items():
            of_people = [each for each in task["annotations"] if not is_certified(each)]
            given = [each for each in of_people if _is_blind(each)]
            seen += bool(of_people and not given)
            if given:
                skipped += all(each.get("was_cancelled") for each in given)
                right[number] = _is_right(number, given, said[number], choices, audit.control)
                moments += [str(each.get("updated_at") or each.get("created_at") or "") for each in given]
                for person in {str(each.get("completed_by") or "") for each in given}:
                    people[person] = people.get(person, 0) + 1
        moments = sorted(moments, key=moment) or [""]
        return _Labels(right, len(drawn) - len(right) - seen, skipped, len(drawn) - len(found), seen, people,
                       moments[0], moments[-1])  # fmt: skip

    def _free(self) -> set[int]:
        """The tasks that may be accepted: nobody has labelled them, and they are none that stay blind by chance."""
        self._told("Reading open tasks", 0, 0)
        return {task for task in self._desk.open_numbers() if not self._trial.arm(self._number, task)}

    # What is accepted

    def _accept(
        self, about: About, choices: ChoiceMap, audit: Audit, facts: Mapping[str, Any], wish: Wish
    ) -> Outcome:  # fmt: skip
        """Write what was accepted, unless that is done; look again whether the labels still allow it."""
        how = ANNOTATIONS if wish.annotate else PREDICTIONS
        if wish.annotate and audit.control and len(choices.controls) > 1:
            raise SettingsError(
                f"Annotations would have no answer but to {short(audit.control)}, and the config asks for more. Leave"
                " --annotate away, and people find what was accepted as predictions."
            )
        accepted, done, written = set(facts["accepted"]), list(facts["how"]), 0
        labels = self._labels(audit, choices)
        verdict = judge(audit, labels.right, accepted)
        changed = len(verdict.accepted) < len(accepted) or bool(labels.missing)
        if changed and not done:
            self._kept.turn(audit, OPEN, {"judged": True})
            return self._look(about, choices, replace(audit, state=OPEN), replace(wish, more=False))
        if how not in done and not (done and how == PREDICTIONS):
            written = self._write(audit, accepted, choices, how)
            facts = {**facts, "how": [*done, how]}
            self._kept.turn(audit, DONE, facts)
        left = len(self._desk.open_numbers() - accepted)
        return self._outcome(
            CERTIFIED, about, audit, labels=labels, verdict=verdict, changed=changed, left=left,
            accepted=len(accepted), accepted_at=facts["at"], how=tuple(facts["how"]), written=written,
        )  # fmt: skip

    def _write(self, audit: Audit, accepted: Collection[int], choices: ChoiceMap, how: str) -> int:
        version, written = _certificate_version(audit), 0
        rows = [one for one in audit.order if one.task in accepted]
        step = PAGE if how == PREDICTIONS else 20
        for start in range(0, len(rows), step):
            self._told(f"Writing {how}", start, len(rows))
            page = {one.task: (one, _regions(audit, one, choices)) for one in rows[start : start + step]}
            if how == PREDICTIONS:
                made = {task: {"result": regions, "score": one.score, "model_version": version}
                        for task, (one, regions) in page.items()}  # fmt: skip
                written += self._desk.predict(made, version)
            else:
                marked = {task: {"result": [region | {"meta": {"text": [version]}} for region in regions],
                                 "unique_id": str(uuid.uuid5(NAMESPACE, f"{audit.made} {version} {task}"))}
                          for task, (_, regions) in page.items()}  # fmt: skip
                written += self._desk.annotate(marked)
        return written

    def _outcome(
        self, state: str, about: About, audit: Audit, *, labels: _Labels | None = None, verdict: Verdict | None = None,
        **more_facts: Any,
    ) -> Outcome:  # fmt: skip
        facts: dict[str, Any] = {}
        if labels is not None:
            known = self._desk.people()
            people = {known.get(person, f"person {person}" if person else "somebody who was deleted"): count
                      for person, count in sorted(labels.people.items())}  # fmt: skip
            facts |= {"labelled": len(labels.right) - labels.deleted, "skipped": labels.skipped,
                      "deleted": labels.deleted, "seen": labels.seen, "people": people, "first": labels.first,
                      "last": labels.last}  # fmt: skip
        if verdict is not None:
            accepted = {one.task for one in verdict.accepted}
            groups = [audit.members(group) for group in range(audit.groups)]
            facts |= {
                "looks": audit.looks + len(audit.rounds), "audited": verdict.audited, "faults": verdict.faults,
                "threshold": verdict.threshold,
                "groups": tuple(
                    (len(group), n, wrong, sum(one.task in accepted for one in group))
                    for group, (n, wrong) in zip(groups, verdict.counts, strict=True)
                ),
            }  # fmt: skip
        floor = least(audit.error, audit.confidence, audit.of, audit.total, len(audit.order), audit.looks)
        return Outcome(
            state, self._number, about.title, "", audit.number, audit.version, audit.error, audit.confidence,
            audit.of, audit.control, audit.total, len(audit.order), floor, len(audit.tasks),
            tuple(each.at for each in audit.rounds), **{**facts, **more_facts},
        )  # fmt: skip


def _planned(audit: Audit, wished: int | None) -> Audit:
    """An audit with groups and a size; without groups where labelling all is less."""
    claim = audit.error, audit.confidence, audit.of
    scores, look = [one.score for one in audit.order], audit.looks
    if wished is not None and wished >= len(scores) > 0:
        raise SettingsError(
            f"--audit must be less than the {len(scores)} open tasks that have a prediction, got {wished}."
        )
    floor = least(*claim, audit.total, len(scores), look)
    if wished is not None and floor is not None and wished < floor:
        raise SettingsError(
            f"An audit of {wished} tasks is too small: at least {floor} must be labelled without a fault before"
            f" {audit.error:.2%} can be promised. Give --audit {floor} or more, or leave it away."
        )
    planned = plan(scores, audit.total, *claim, size=wished, look=look)
    return replace(audit, groups=planned.groups, size=planned.size) if planned else audit


def _same(audit: Audit, wish: Wish) -> None:
    """See that an audit is what is wished for: who knows its labels must not choose another level."""
    for option, mine, wished in (
        ("--error", audit.error, wish.error),
        ("--confidence", audit.confidence, wish.confidence),
        ("--of", audit.of, wish.of),
        ("--control", audit.control, wish.control),
    ):
        if wished is not None and wished != mine:
            raise SettingsError(
                f"Audit {audit.number} was drawn for {option} {mine or 'all'}, and its labels count for nothing else,"
                f" got {wished}. Leave {option} away, or draw another audit with --new."
            )
    if wish.size is not None and wish.size != audit.size:
        raise SettingsError(
            f"Audit {audit.number} has {len(audit.tasks)} tasks already. --more draws more once they are labelled;"
            " --new draws another audit."
        )


def _see_choices(audit: Audit, choices: ChoiceMap) -> None:
    """See that what was said at the draw can still be said."""
    offered = {each.from_name: set(each.choices) for each in choices.controls}
    for said in audit.said:
        for control, chosen in said.items():
            if not set(chosen) <= offered.get(control, set()):
                raise LabelConfigError(
                    f"The label config has no {short(control)} with {some(chosen)} any more, which audit {audit.number}"
                    " is about. Put it back, or draw another audit with --new."
                )


def _said(answer: Any, choices: ChoiceMap, control: str) -> tuple[dict[str, list[str]], float]:
    """What an answer says that may be accepted, by control, and the lowest of its scores; nothing of the unknown."""
    if not answer:
        return {}, 0.0
    said = choices.choices_of(answer["result"])
    unknown = {each.from_name: each.unknown for each in choices.controls}
    if any(unknown[name] in chosen for name, chosen in said.items()):
        return {}, 0.0
    scores = [float(region.get("score", answer["score"])) for region in answer["result"]
              if region["from_name"] in said and control in ("", region["from_name"])]  # fmt: skip
    return {name: sorted(chosen) for name, chosen in said.items() if control in ("", name)}, min(scores, default=0.0)


def _regions(audit: Audit, one: Ranked, choices: ChoiceMap) -> list[dict[str, Any]]:
    by_name = {each.from_name: each for each in choices.controls}
    return [
        {"id": f"choice-{number}", **by_name[name].region(chosen), "score": one.score}
        for number, (name, chosen) in enumerate(audit.said[one.said].items(), 1)
        if name in by_name
    ]


def _is_right(
    number: int, given: Sequence[Mapping[str, Any]], said: Mapping[str, Sequence[str]], choices: ChoiceMap, control: str
) -> bool:
    """Whether people chose what the model says, in all controls or the one; a tie and a skipped task are none."""
    votes, _ = votes_of({"id": number, "annotations": given}, choices)
    for each in choices.controls:
        if control not in ("", each.from_name):
            continue
        mine, ballot = frozenset(said.get(each.from_name, ())), [v for v in votes if v.control == each.from_name]
        if not ballot and not mine:
            continue
        if not ballot or agree({"": ballot}, ())[""].choices != mine:
            return False
    return True


def _is_blind(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation did not begin with a pre-label: as the editor says, and as what was made in bulk."""
    began = origins(annotation)
    in_bulk = annotation.get("parent_prediction") is not None and annotation.get("lead_time") is None and not began
    return not in_bulk and not any(each.startswith("prediction") for each in began)


def _audit_version(audit: Audit) -> str:
    return f"audit {audit.number} of {audit.version}"


def _certificate_version(audit: Audit) -> str:
    return f"{CERTIFICATE}{audit.number} of {audit.version}"


def _is_ours(version: str) -> bool:
    return is_tag(version) or version.startswith(CERTIFICATE)
