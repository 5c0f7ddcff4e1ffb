"""A certificate in words: on the command line, and as a page that says what was audited and what follows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from markupsafe import Markup

from celestial_backend.studio.client import moment
from celestial_backend.trust import pages
from celestial_backend.trust.audit import ACCEPTED
from celestial_backend.trust.finish import (
    ANNOTATIONS,
    CERTIFIED,
    DRAWN,
    LABEL_ALL,
    MISSING,
    NOT_REACHED,
    Outcome,
)
from celestial_backend.trust.report import MARK


def page(outcome: Outcome) -> str:
    """The page of a certificate, one file of HTML for a browser and for paper."""
    return pages.render(
        "certificate.html",
        mark=Markup(MARK),  # noqa: S704 - our own
        outcome=outcome,
        headline=headline(outcome),
        is_of_accepted=outcome.of == ACCEPTED,
        as_annotations=ANNOTATIONS in outcome.how,
        drawn_at=[day(at) for at in outcome.drawn_at],
        accepted_at=day(outcome.accepted_at or 0),
        first=day(moment(outcome.first).timestamp() if outcome.first else 0),
        last=day(moment(outcome.last).timestamp() if outcome.last else 0),
        share=share,
    )


def headline(outcome: Outcome) -> str:
    """What a certificate promises, in a sentence."""
    if outcome.changed:
        return "This certificate does not hold any more: labels of its audit were changed, or tasks of it deleted."
    all_of = f"the {outcome.open} tasks have a wrong label"
    wrong = "the accepted labels are wrong" if outcome.of == ACCEPTED else all_of
    return (
        f"With {share(outcome.confidence)} confidence, at most {share(outcome.error)} of {wrong}."
        f" {outcome.accepted} were accepted unseen."
    )


def sentences(outcome: Outcome) -> Iterator[str]:
    """What an outcome means, and what to do next."""
    tell = {LABEL_ALL: _label_all, DRAWN: _to_label, MISSING: _to_label, NOT_REACHED: _not_reached,
            CERTIFIED: _certified}  # fmt: skip
    yield from tell[outcome.state](outcome)
    if outcome.others:
        yield (
            f"{outcome.others} of the tasks have predictions of other makers than this backend, which people may see. "
            "Delete those predictions in Label Studio, so that the tasks are labelled blind."
        )


def share(value: float) -> str:
    """A share in percent, with as few digits as it takes."""
    return f"{round(100 * value, 4):g} %"


def day(at: float) -> str:
    """A moment, for people."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC") if at else ""


def _label_all(outcome: Outcome) -> Iterator[str]:
    yield f"{outcome.open} tasks are open, and {outcome.predicted} of them have a prediction."
    if not outcome.open:
        yield "There is nothing to finish."
        return
    if not outcome.predicted:
        yield "Label a few pictures of each choice, wait for the training, and run finish again."
        return
    yield (
        f"That is too few: to promise {share(outcome.error)}, more of them would have to be labelled for the audit than"
        " could be accepted afterwards. Label them all, or allow a larger --error."
    )


def _to_label(outcome: Outcome) -> Iterator[str]:
    missing = outcome.drawn - outcome.labelled - outcome.deleted - outcome.seen
    if outcome.state == DRAWN:
        yield f"{outcome.open} tasks are open, and {outcome.predicted} of them have a prediction of {outcome.version}."
        yield f"Audit {outcome.number} has drawn {outcome.drawn} of them at random." + (
            f" To promise {share(outcome.error)}, at least {outcome.least} without a fault are needed."
            if outcome.least else ""
        )  # fmt: skip
    else:
        yield f"Audit {outcome.number}: {outcome.labelled} of {outcome.drawn} tasks are labelled; {missing} to go."
        yield "What the labels say is told when all are there; an earlier look would make the certificate worthless."
    yield (
        f"Let people open the tab 'Audit {outcome.number}' and press 'Label Tasks As Displayed', beside 'Label All"
        f" Tasks': {tab_link(outcome)}"
    )
    yield "These first: the more other tasks are labelled meanwhile, the less can be accepted."
    yield f"Then run again: finish --project {outcome.project}"


def _not_reached(outcome: Outcome) -> Iterator[str]:
    of = f"of the {outcome.audited} predictions of audit {outcome.number}"
    most = f"with at most {share(outcome.error)} errors"
    yield (
        f"{outcome.faults} {of} are wrong. That is too many to accept anything {most}."
        if outcome.faults
        else f"None {of} is wrong, but they are too few to accept any of the {outcome.left} open tasks {most}."
    )
    yield from _doubtful(outcome)
    if outcome.reachable is not None:
        yield (
            f"These labels would have been enough for --error {outcome.reachable:g}. To promise that, a new audit is"
            " needed (--new): a level that is chosen after the labels are known promises nothing."
        )
    if outcome.more is not None:
        yield (
            f"About {outcome.more} more labels may be enough, if faults are found as often. To draw as many again:"
            f" finish --project {outcome.project} --more"
        )
    elif not outcome.faults:
        yield f"Label the {outcome.left} open tasks, or try --new once there are more of them."
    else:
        yield "More labels of the audit would hardly help. Label on, so that the next model is better, and try --new."


def _certified(outcome: Outcome) -> Iterator[str]:
    yield headline(outcome)
    yield (
        f"Audit {outcome.number}: {outcome.audited} tasks labelled blind; faults: {outcome.faults}."
        + (f" Accepted down to a score of {outcome.threshold:.4g}." if outcome.threshold is not None else "")
    )  # fmt: skip
    yield from _doubtful(outcome)
    yield (
        f"{outcome.written} {outcome.how[-1]} were written by this run." if outcome.written else "Nothing was written."
    )
    yield f"{outcome.left} open tasks stay for people."


def _doubtful(outcome: Outcome) -> Iterator[str]:
    if outcome.skipped:
        yield f"{outcome.skipped} tasks were skipped and count as wrong, until somebody labels them."
    if outcome.deleted:
        yield f"{outcome.deleted} tasks of the audit were deleted and count as wrong."
    if outcome.seen:
        yield f"{outcome.seen} tasks of the audit were not labelled blind but with a pre-label, and count for nothing."


def tab_link(outcome: Outcome) -> str:
    """Where people find the tasks that they are to label."""
    return outcome.link + (f"?tab={outcome.tab}" if outcome.tab else "")
