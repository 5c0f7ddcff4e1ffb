"""The report as a page: what the figures and the pictures say, with what follows from it first."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from markupsafe import Markup

from celestial_backend.errors import SettingsError, StateError
from celestial_backend.features.familiar import FALSE_ALARMS
from celestial_backend.settings import Settings
from celestial_backend.state import reason, replace_text
from celestial_backend.trust import charts, pages
from celestial_backend.trust.album import Drift, Sights
from celestial_backend.trust.charts import Bar, Estimate
from celestial_backend.trust.figures import Confusion, Figure, Measured, Measures, percent

TRUSTED, MOSTLY, LITTLE = 0.95, 0.8, 0.6  # shares of pre-labels that are right
AGREED = 0.667  # Krippendorff: below this alpha, labels do not support even tentative conclusions
ROWS_MAX, CHOICES_MAX = 40, 20  # rows of a table, and choices of a confusion matrix; of more, the most frequent
MARK = '<meta name="generator" content="celestial-backend report">'  # tells a report from other files
OTHERS = "all others"


def page(measures: Measures, sights: Sights) -> str:
    """The page, one file of HTML for a browser and for paper."""
    controls = [(each, _drawn(each)) for each in measures.controls]
    return pages.render(
        "report.html",
        mark=Markup(MARK),  # noqa: S704 - our own
        measures=measures,
        sights=sights,
        controls=controls,
        verdicts=list(_verdicts(measures)),
        points=list(_points(measures)),
        steps=steps(measures, sights),
        drift=_drift(sights.drift),
        again=_by_reason(sights.again),
        task_link=lambda task: task_link(measures.link, task),
        rows_max=ROWS_MAX,
    )


def summary(measures: Measures) -> list[str]:
    """What the page begins with, sentence by sentence."""
    found = [": ".join(filter(None, each)) for each in _verdicts(measures)]
    return [*found, *_points(measures)]


def task_link(link: str, task: int) -> str:
    """Where a task is opened in Label Studio; "" where no address of it is known."""
    parts = urlsplit(link)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return ""
    host = parts.netloc.rpartition("@")[2]  # a password is nobody's business
    return parts._replace(netloc=host, query=f"task={task}", fragment="").geturl()


def verdict(measured: Measured) -> str:
    """How far the pre-labels of a control can be trusted, in a sentence."""
    right = measured.accuracy
    if right.value is None or right.low is None or right.high is None:
        return "How often the pre-labels are right is not known yet."
    told = f"about {percent(right.value)} are right (between {percent(right.low)} and {percent(right.high)})"
    if right.low >= TRUSTED:
        return f"The pre-labels can be trusted: {told}."
    if right.low >= MOSTLY:
        return f"Most pre-labels are right, and some may be wrong: {told}."
    if right.high < LITTLE:
        return f"The pre-labels are too often wrong to be trusted: {told}."
    return f"The pre-labels are a help and need to be looked at: {told}."


def steps(measures: Measures, sights: Sights) -> list[str]:
    """What to do next, the most urgent first."""
    if not measures.labelled:
        return ["Label some tasks, and make this report again."]
    found = [step for measured in measures.controls for step in _steps(measured, _named(measures, measured))]
    found += [f"Do more labels pay? {each}" for each in sights.outlooks]
    drifted = sights.drift.figure
    if (drifted.low or 0) > 2 * FALSE_ALARMS:
        found.append("Label some of the new pictures that are unlike all others, so that the model learns them.")
    if sights.again:
        tasks = f"{len(sights.again)} tasks" if len(sights.again) > 1 else "the task"
        found.append(
            f"Look again at {tasks} listed below. With --quality-tab, the command makes a tab of them in Label Studio."
        )
    return list(dict.fromkeys(found)) or ["Nothing needs to be done. Make this report again after the next labels."]


def _verdicts(measures: Measures) -> Iterator[tuple[str, str]]:
    for measured in measures.controls:
        yield _named(measures, measured), verdict(measured)
    if not measures.controls:
        yield "", "No control of this project is served, so there are no pre-labels."


def _points(measures: Measures) -> Iterator[str]:
    """The figures of the summary; what cannot be told yet comes after its question."""
    for measured in measures.controls:
        for question, figure in (
            ("Are pre-labels kept?", measured.kept),
            ("Do people accept too much?", measured.compared.difference),
        ):
            yield ": ".join(filter(None, (_named(measures, measured), _answered(question, figure))))
    yield _answered("Do pre-labels save time?", measures.seconds_saved)


def _answered(question: str, figure: Figure) -> str:
    return figure.sentence if figure.value is not None else f"{question} {figure.sentence}"


def _named(measures: Measures, measured: Measured) -> str:
    """The control's name, where there are several."""
    return measured.control if len(measures.controls) > 1 else ""


def _steps(measured: Measured, name: str) -> Iterator[str]:
    of = f" ({name})" if name else ""
    if measured.accuracy.value is None:
        if not any(measured.labels.get(arm) for arm in ("withheld", "audited")):
            yield (
                "Set CELESTIAL_CONTROL_SHARE=0.1, if it is not set yet: a tenth of the tasks is then labelled without"
                " the pre-label, and tells how often it is right."
            )
        elif measured.accuracy.missing:
            more = measured.accuracy.missing
            yield f"Go on labelling{of}: about {more} more labels without the pre-label are needed."
    elif (measured.accuracy.high or 1) < MOSTLY:
        yield f"Label more before you rely on the pre-labels{of}, and see whether the next training does better."
    if (measured.compared.difference.low or 0) > 0:
        yield (
            f"Tell those who label that pre-labels may be wrong{of}: people accept more of what they see than they"
            " would have chosen themselves. Let two people label the tasks that matter."
        )
    if (measured.calibration_error.low or 0) > 0.05:
        yield f"Do not go by the scores{of}: they do not say how often predictions are right."
    if measured.alpha.high is not None and measured.alpha.high < AGREED:
        yield f"Agree on what each choice means{of}: annotators differ too often."


def _drawn(measured: Measured) -> dict[str, Any]:
    """The charts of a control, and its matrices."""
    points = [Estimate(each.confidence, each.right, each.low, each.high, each.count) for each in measured.reliability]
    bars = [Bar(f"{place / 10:.1f}", count) for place, count in enumerate(measured.scores)]
    return {
        "reliability": charts.reliability(points) if points else "",
        "scores": charts.histogram(
            bars, "Scores: how many predictions have which confidence", "confidence from … on"
        ) if any(measured.scores) else "",
        "matrices": [
            (said, _matrix(measured.confusion, counts))
            for said, counts in (
                ("Without seeing the pre-label", measured.confusion.blind),
                ("With the pre-label in sight", measured.confusion.shown),
            )
            if any(map(any, counts))
        ],
    }  # fmt: skip


def _matrix(confusion: Confusion, counts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What was said and chosen, the most frequent choices and the rest in one; with the share of its row for shade."""
    sums = [sum(row) + sum(each[place] for each in counts) for place, row in enumerate(counts)]
    chosen = sorted(sorted(range(len(sums)), key=lambda place: -sums[place])[:CHOICES_MAX])
    rest = [place for place in range(len(sums)) if place not in set(chosen) and sums[place]]
    groups = [[place] for place in chosen if sums[place]] + ([rest] if rest else [])
    names = [confusion.choices[group[0]] if group != rest else OTHERS for group in groups]
    rows = [[sum(counts[i][j] for i in mine for j in theirs) for theirs in groups] for mine in groups]
    return {"names": names, "rows": [[(count, count / (sum(row) or 1)) for count in row] for row in rows]}


def _by_reason(again: Mapping[int, list[str]]) -> list[tuple[str, list[int]]]:
    """Tasks with the same reasons together."""
    found: dict[str, list[int]] = {}
    for task, reasons in again.items():
        found.setdefault("; ".join(reasons), []).append(task)
    return [(why, sorted(tasks)) for why, tasks in found.items()]


def _drift(drift: Drift) -> str | Markup:
    periods = [each for each in drift.periods if None not in (each.value, each.low, each.high)]
    if len(periods) < 2:
        return ""
    points = [
        Estimate(place / (len(periods) - 1), each.value or 0, each.low or 0, each.high or 0, each.n)
        for place, each in enumerate(periods)
    ]
    return charts.course(
        points, "New pictures that are unlike all that was labelled, over time", "by the order of import",
        FALSE_ALARMS, ("oldest", "newest"),
    )  # fmt: skip


def check(place: Path, settings: Settings) -> None:
    """
    Make sure that a page may be written to a place, before all the work.

    Raises:
        SettingsError: There is another file, or no folder, or it is read-only, or Label Studio shows what lies there.
    """
    served = {
        "CELESTIAL_LABEL_STUDIO_DATA": settings.label_studio_data,
        "LOCAL_FILES_DOCUMENT_ROOT": settings.local_files_root,
    }
    whole, state = place.resolve(), settings.model_dir.resolve()
    for variable, folder in served.items():
        if folder is not None and whole.is_relative_to(folder.resolve()) and not whole.is_relative_to(state):
            raise SettingsError(
                f"A report must not lie where Label Studio shows files, and {place} is below {variable}."
                " Give another --output."
            )
    if not (whole.parent.is_dir() or whole.parent == state):
        raise SettingsError(f"The folder of --output must be there, and {whole.parent} is not. Make it.")
    if whole.is_dir() or (whole.exists() and not _is_report(whole)):
        raise SettingsError(
            f"A report replaces an older report only, and {place} is something else. Give another --output."
        )
    if whole.parent.is_dir() and not os.access(whole.parent, os.W_OK):
        raise SettingsError(f"This user must be able to write into {whole.parent}, and cannot. Give another --output.")


def write(place: Path, text: str) -> None:
    """
    Write a page; whoever opens it meanwhile sees the old one or the new one.

    Raises:
        StateError: That cannot be done.
    """
    try:
        replace_text(place.resolve(), text)
    except OSError as error:
        raise StateError(
            f"The report cannot be written to {place} ({reason(error)}). Give another --output."
        ) from error


def _is_report(path: Path) -> bool:
    """Whether a file is a page of ours."""
    try:
        with path.open("rb") as file:
            return MARK.encode() in file.read(2000)
    except OSError:
        return False
