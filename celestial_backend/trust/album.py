"""
The pictures behind the figures: which ones tell most, which to look at again, and whether the input has changed.

Pictures are known by their vectors, which the feature cache remembers. One that cannot be read costs only itself.
"""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from celestial_backend.errors import CelestialError, FetchError, ModelError, NotEnoughDataError
from celestial_backend.features import Embedder, Familiar, FeatureCache, unit
from celestial_backend.features.familiar import FALSE_ALARMS
from celestial_backend.labels import Control, value_of
from celestial_backend.learning.dataset import Reader, Wanted
from celestial_backend.learning.project import Learner, Progress
from celestial_backend.learning.votes import Choices
from celestial_backend.models.embedders import open_embedder
from celestial_backend.models.headed import GENERAL
from celestial_backend.models.store import ModelStore
from celestial_backend.pictures.reader import ImageReader
from celestial_backend.settings import Settings
from celestial_backend.studio.client import moment
from celestial_backend.studio.labels import ProjectLabels
from celestial_backend.trust.charts import span
from celestial_backend.trust.evidence import SHOWN, UNPREDICTED, Evidence, Given, by_task, most_chosen
from celestial_backend.trust.figures import Figure, percent
from celestial_backend.trust.intervals import wilson
from celestial_backend.trust.suspects import Suspect
from celestial_backend.trust.suspects import look as doubted
from celestial_backend.trust.trial import AUDITED, PLANTED, WITHHELD

OVERRULED, UNKNOWN, DISPUTED = "The model said otherwise", "Unknown to the model", "Disputed"
TWINS, SUSPECT = "Alike, and labelled differently", "Perhaps labelled wrongly"
TELLING_MAX, AGAIN_MAX, STRANGE_MAX = 12, 100, 15  # of tasks, and of those that are unlike all others
LABELLED_MAX = 5000  # tasks with a label that are looked at, the newest
NEAR = 0.05  # cosine distance; a copy that was compressed or made smaller is as near, and no two other pictures of ours
SURE, SUSPECT_SURE = 0.9, 0.8  # the confidence from which on a model counts as sure, and contradicts a label
NEW_MAX = 500  # tasks without a label that are looked at, the newest
NEW_LEAST, PERIOD_LEAST, PERIODS = 20, 25, 8  # pictures whose input is judged, and of each part of the time
THUMBNAIL_PX, QUALITY = 168, 72
BLOCK = 1000  # rows whose distances are held at once

Vectors = NDArray[np.float32]
Place = tuple[int, str]  # a task and the data key of one of its pictures


@dataclass(frozen=True)
class Album:
    """
    Pictures that were read.

    Attributes:
        digests: By place, what the picture's file is known by; equal for the very same file.
        vectors: By digest, shape (D,), of length 1.
        data: Task -> its data, of tasks with a label and of new ones.
        new: Tasks without a label, the oldest first.
        unread: Task -> why its picture cannot be read.
        left_out: Tasks with a label that were not looked at, as there are too many.
    """

    digests: Mapping[Place, bytes] = field(default_factory=dict)
    vectors: Mapping[bytes, Vectors] = field(default_factory=dict)
    data: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    new: tuple[int, ...] = ()
    unread: Mapping[int, str] = field(default_factory=dict)
    left_out: int = 0

    def rows(self, tasks: Sequence[int], key: str) -> tuple[list[int], Vectors]:
        """Those of the tasks whose picture was read, and their vectors, shape (N, D)."""
        known = [task for task in tasks if (task, key) in self.digests]
        found = [self.vectors[self.digests[task, key]] for task in known]
        return known, np.stack(found) if found else np.zeros((0, 1), np.float32)


@dataclass(frozen=True)
class Twins:
    """A task, and another with a picture that is alike and another label; `exact` if both are the very same file."""

    control: str
    one: int
    other: int
    distance: float
    exact: bool


@dataclass(frozen=True)
class Drift:
    """
    Whether new pictures are like those that were labelled.

    Attributes:
        figure: The share that is unlike all of them.
        periods: The same over time: the oldest tasks first.
        strange: Tasks with such a picture, the strangest first.
    """

    figure: Figure
    periods: tuple[Figure, ...] = ()
    strange: tuple[int, ...] = ()


@dataclass(frozen=True)
class Telling:
    """One task, or two that are alike, and what they tell."""

    kind: str
    control: str
    tasks: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True)
class Piece:
    """
    The picture of a task as a page shows it.

    Attributes:
        picture: As a data: URI; "" where it cannot be read.
        problem: Why it cannot.
        said: What the model said, by version: choices and confidence.
        answers: What people chose, each with the name.
    """

    task: int
    picture: str
    problem: str
    said: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Sights:
    """
    What a report shows of the pictures.

    Attributes:
        telling: With the pictures of their tasks, as many.
        again: Task -> why to look at it again, the most urgent first.
        unread: As of the album.
        left_out: As there.
        trouble: What could not be looked at, and why; "" if all is well.
        outlooks: What more labels are expected to bring, in a sentence for each control of which that can be said.
    """

    drift: Drift
    telling: tuple[tuple[Telling, tuple[Piece, ...]], ...] = ()
    again: Mapping[int, list[str]] = field(default_factory=dict)
    unread: Mapping[int, str] = field(default_factory=dict)
    left_out: int = 0
    trouble: str = ""
    outlooks: tuple[str, ...] = ()


def look(
    evidence: Evidence, project: ProjectLabels, learner: Learner, images: ImageReader, store: ModelStore,
    settings: Settings, report: Progress,
) -> Sights:  # fmt: skip
    """
    Look at the pictures of a project; a minute for a thousand that nobody has looked at before.

    Args:
        evidence: Of its labels.
        project: In Label Studio.
        learner: Judges labels.
        images: Reads pictures.
        store: Has the features of those that were seen before.
        settings: Of this process.
        report: Told where it is.

    Raises:
        StudioError: Label Studio stayed away, or refused.
    """
    from threadpoolctl import threadpool_limits

    album, suspects, troubles, outlooks = Album(), tuple[Suspect, ...](), list[str](), tuple[str, ...]()

    def told(done: int, of: int | None) -> None:
        report("looking at pictures", pictures=done, of=of)

    new = project.unlabelled(NEW_MAX)
    try:
        album = read(evidence, new, images, store.features, open_embedder(settings), settings.fetch_threads, told)
    except ModelError as error:
        troubles.append(f"No picture was looked at: {error}")
    else:
        try:
            judged = doubted(learner, evidence.number, report)
            suspects = tuple(each for each in judged.found if each.sure >= SUSPECT_SURE)
            outlooks = tuple(each.sentence for each in judged.outlooks.values())
        except NotEnoughDataError:
            pass  # too few labels to doubt one
        except CelestialError as error:
            troubles.append(f"Labels were not judged: {error}")
    report("comparing pictures")
    with threadpool_limits(1):  # as heads are learned: several threads wait for each other on a busy machine
        found = replace(sights(evidence, album, images, suspects, " ".join(troubles)), outlooks=outlooks)
    store.features.close()
    return found


def read(
    evidence: Evidence, new: Mapping[int, Mapping[str, Any]], images: ImageReader, cache: FeatureCache,
    embedder: Embedder, threads: int, report: Callable[[int, int | None], None] | None = None,
) -> Album:  # fmt: skip
    """
    Read the pictures of a project.

    Args:
        evidence: With the tasks that have a label.
        new: Data of tasks without one, by id.
        images: Reads them.
        cache: Remembers vectors.
        embedder: Makes them.
        threads: How many pictures are read side by side.
        report: Told now and then how many pictures were read.

    Raises:
        ModelError: The embedder does not work.
    """
    keys = list(dict.fromkeys(control.data_key for control in evidence.controls))
    data = {task: evidence.data[task] for task in sorted(evidence.data)[-LABELLED_MAX:]} | dict(new)
    unread: dict[int, str] = {}
    wanted = [each for task in data for key in keys if (each := _wanted(task, key, data[task], unread)) is not None]
    reader = Reader(images, cache, {GENERAL: embedder}, threads)
    reader.read(wanted, 0, report)
    unread |= {each.task_id: each.problem for each in wanted if each.picture is None}
    digests = {(each.task_id, each.data_key): each.picture for each in wanted if each.picture is not None}
    vectors = {key: unit(each[None].astype(np.float32))[0] for key, each in reader.gallery.vectors[GENERAL].items()}
    return Album(digests, vectors, data, tuple(sorted(new)), unread, max(0, len(evidence.data) - LABELLED_MAX))


def sights(
    evidence: Evidence, album: Album, images: ImageReader, suspects: Sequence[Suspect] = (), trouble: str = ""
) -> Sights:
    """
    What there is to see.

    Args:
        evidence: Of the project.
        album: Its pictures; an empty one where none could be read.
        images: Reads those that are shown.
        suspects: The likeliest to be wrong first.
        trouble: What could not be looked at, and why.
    """
    pairs, moved = twins(evidence, album), drift(evidence, album)
    data, keys = {**evidence.data, **album.data}, {each.from_name: each.data_key for each in evidence.controls}
    told = [
        (each, tuple(_piece(evidence, images, task, each.control, data.get(task, {}), keys) for task in each.tasks))
        for each in telling(evidence, pairs, moved.strange, suspects)
    ]
    urgent = again(evidence, pairs, moved.strange, suspects)
    return Sights(moved, tuple(told), urgent, album.unread, album.left_out, trouble)


def agreed(evidence: Evidence, control: str) -> dict[int, Choices]:
    """What most people chose, by task; a ground truth before all, and nothing where two choices are even."""
    answers = by_task(given for given in evidence.given if given.control == control)
    found = {task: most_chosen([given for given in mine if given.truth] or mine) for task, mine in answers.items()}
    return {task: best for task, best in found.items() if best}


def twins(evidence: Evidence, album: Album) -> list[Twins]:
    """
    Tasks with a label that at most half of the pictures have which are alike, each with the nearest other one.

    The very same files come first, and then the nearest. Of two tasks that are each other's, one is in the list.
    """
    labels = {control: agreed(evidence, control.from_name) for control in evidence.controls}
    pairs = [pair for control, mine in labels.items() for pair in _pairs(control, mine, album)]
    found, used = [], set[tuple[str, int]]()
    for pair in sorted(pairs, key=lambda each: (not each.exact, each.distance, each.one)):
        if (pair.control, pair.one) not in used:
            used |= {(pair.control, pair.one), (pair.control, pair.other)}
            found.append(pair)
    return found


def drift(evidence: Evidence, album: Album) -> Drift:
    """
    Whether new pictures are as near to a labelled one as labelled ones are to each other, or more are farther away.

    New are the tasks without a label; where there are few of them, the later half of the labelled ones, against the
    earlier half.
    """
    sets = {control: agreed(evidence, control.from_name) for control in evidence.controls}
    if not sets:
        return Drift(Figure("The project has no control that is served, so no picture can be compared."))
    control = max(sets, key=lambda each: len(sets[each]))
    labels, when = sets[control], _when(evidence)
    first = dict[bytes | None, int]()  # a file that is there twice would say that all others are far from each other
    for task in sorted(labels, key=lambda task: (when[task], task)):
        first.setdefault(album.digests.get((task, control.data_key)), task)
    learned, vectors = album.rows(list(first.values()), control.data_key)
    new, others = album.rows(album.new, control.data_key)
    who = "tasks without a label"
    if len(new) < NEW_LEAST:
        half, who = len(learned) // 2, "pictures that were labelled last"
        learned, vectors, new, others = learned[:half], vectors[:half], learned[half:], vectors[half:]
    if min(len(new), len(learned)) < NEW_LEAST:
        return Drift(Figure(
            "It cannot be told yet whether new pictures are like those that were labelled: it needs"
            f" {NEW_LEAST} labelled pictures, and as many others.",
            n=len(new),
        ))  # fmt: skip
    known = Familiar.nearest(vectors, np.zeros(len(vectors), int))  # which no picture is too far away for
    return _drift(new, known.strangeness(others), who)


def again(
    evidence: Evidence, pairs: Sequence[Twins], strange: Sequence[int] = (), suspects: Sequence[Suspect] = ()
) -> dict[int, list[str]]:
    """
    The tasks to look at again, at most `AGAIN_MAX`, the most urgent first, and why.

    Tasks whose pre-label was not shown are there for other reasons only: whoever looked at them again because the
    model disagrees would not answer blind any more.
    """
    sure = (given for given in _overruled(evidence) if given.arm == SHOWN and (given.confidence or 0) >= SURE)
    blind = {given.task for given in evidence.given if given.arm in (WITHHELD, AUDITED, PLANTED)}
    kinds = {
        DISPUTED: list(_disputed(evidence)),
        TWINS: [task for pair in pairs for task in (pair.one, pair.other)],
        SUSPECT: [each.tasks[0] for each in suspects if not blind & set(each.tasks)],
        OVERRULED: [given.task for given in sure],
        UNKNOWN: [*strange[:STRANGE_MAX], *_unknown(evidence)],
    }
    of_kind = {kind: frozenset(tasks) for kind, tasks in kinds.items()}
    found: dict[int, list[str]] = {}
    turns = zip_longest(*kinds.values())
    for task in dict.fromkeys(task for turn in turns for task in turn if task is not None):
        found[task] = [kind for kind, tasks in of_kind.items() if task in tasks]
    urgent = sorted(found, key=lambda task: -len(found[task]))
    return {task: found[task] for task in urgent[:AGAIN_MAX]}


def telling(
    evidence: Evidence, pairs: Sequence[Twins], strange: Sequence[int] = (), suspects: Sequence[Suspect] = ()
) -> list[Telling]:
    """The pictures that tell most, at most `TELLING_MAX`, as many of each kind as there are; no task twice."""
    first = evidence.controls[0].from_name if evidence.controls else ""
    kinds = [
        [Telling(OVERRULED, given.control, (given.task,)) for given in _overruled(evidence)],
        [Telling(UNKNOWN, first, (task,)) for task in [*strange, *_unknown(evidence)]],
        [Telling(DISPUTED, control, (task,)) for task, control in _disputed(evidence).items()],
        [Telling(TWINS, pair.control, (pair.one, pair.other), _how_alike(pair)) for pair in pairs],
        [Telling(SUSPECT, each.control, each.tasks[:1], _how_else(each)) for each in suspects],
    ]
    found, used = list[Telling](), set[int]()
    for turn in zip_longest(*kinds):
        for each in turn:
            if each is not None and not used & set(each.tasks) and len(found) < TELLING_MAX:
                used |= set(each.tasks)
                found.append(each)
    order = (OVERRULED, UNKNOWN, DISPUTED, TWINS, SUSPECT)
    return sorted(found, key=lambda each: order.index(each.kind))


def thumbnail(images: ImageReader, task: int, data: Mapping[str, Any], key: str) -> tuple[str, str]:
    """A small picture as a data: URI, and "", or "" and why there is none."""
    try:
        picture = images.read(value_of(data, key), task)
    except CelestialError as error:
        return "", str(error)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}", ""


def _piece(
    evidence: Evidence, images: ImageReader, task: int, control: str, data: Mapping[str, Any], keys: Mapping[str, str]
) -> Piece:
    mine = [given for given in evidence.given if given.task == task and given.control == control]
    picture, problem = thumbnail(images, task, data, keys[control])
    said = [_said(given) for given in mine if given.said is not None and given.arm != PLANTED]
    answers = [
        f"{evidence.people.get(given.annotator, given.annotator)}: {named(given.chosen)}"
        + (", without seeing the pre-label" if given.said is not None and given.arm not in (SHOWN, PLANTED) else "")
        + (", who was shown a planted error" if given.arm == PLANTED else "")
        + (", ground truth" if given.truth else "")
        for given in mine
    ]
    return Piece(task, picture, problem, tuple(dict.fromkeys(said)), tuple(answers))


def _said(given: Given) -> str:
    return named(given.said or frozenset()) + (f", {given.confidence:.2f}" if given.confidence is not None else "")


def named(choices: Choices) -> str:
    """Choices for people."""
    return ", ".join(sorted(choices)) or "nothing"


def _wanted(task: int, key: str, data: Mapping[str, Any], unread: dict[int, str]) -> Wanted | None:
    try:
        return Wanted(task, key, value_of(data, key))
    except FetchError as error:
        unread[task] = str(error)
        return None


def _pairs(control: Control, labels: Mapping[int, Choices], album: Album) -> Iterator[Twins]:
    """Each task whose label is not that of most pictures which are alike, and the nearest with another label."""
    tasks, vectors = album.rows(sorted(labels), control.data_key)
    kinds = {choices: number for number, choices in enumerate(set(labels.values()))}
    classes = np.array([kinds[labels[task]] for task in tasks], int)
    for start in range(0, len(tasks), BLOCK):
        rows = slice(start, start + BLOCK)
        distances = 1 - vectors[rows] @ vectors.T
        differs = classes[rows][:, None] != classes
        alike = distances < NEAR
        others = (alike & differs).sum(axis=1)
        is_odd = others >= np.maximum(1, (alike & ~differs).sum(axis=1))
        distances[~differs] = np.inf
        nearest = distances.argmin(axis=1)
        for row in np.flatnonzero(is_odd):
            one, other = tasks[start + row], tasks[nearest[row]]
            exact = album.digests[one, control.data_key] == album.digests[other, control.data_key]
            yield Twins(control.from_name, one, other, max(0.0, float(distances[row].min())), exact)


def _how_else(suspect: Suspect) -> str:
    return f"a model that has not learned the label says {named(frozenset(suspect.said))}, {suspect.sure:.2f}"


def _how_alike(pair: Twins) -> str:
    return "the very same file" if pair.exact else f"cosine distance {pair.distance:.3f}"


def _when(evidence: Evidence) -> dict[int, Any]:
    """When each task was labelled first."""
    found: dict[int, Any] = {}
    for given in evidence.given:
        at = moment(given.at)
        found[given.task] = min(at, found.get(given.task, at))
    return found


def _drift(new: Sequence[int], strangeness: NDArray[np.float64], who: str) -> Drift:
    beyond = strangeness > 0
    whole = _share(beyond)
    many, less = whole.low or 0.0, whole.high or 0.0
    told = f"Of the {len(new)} {who}, {int(beyond.sum())} ({percent(whole.value or 0)}; {span(many, less)}) are"
    told += f" unlike all that was labelled before; about {percent(FALSE_ALARMS)} are if nothing has changed."
    if many > 2 * FALSE_ALARMS:
        told += " The input has changed: label some of these, so that the model learns them."
    else:
        told += " That is as before." if less < 4 * FALSE_ALARMS else " It is too early to say that it has changed."
    parts = np.array_split(np.arange(len(new)), max(1, min(PERIODS, len(new) // PERIOD_LEAST)))
    strange = [new[place] for place in np.argsort(-strangeness, kind="stable") if beyond[place]]
    figure = Figure(told, whole.value, whole.low, whole.high, whole.n)
    return Drift(figure, tuple(_share(beyond[part]) for part in parts), tuple(strange))


def _share(hits: NDArray[np.bool_]) -> Figure:
    share = float(hits.mean())
    return Figure("", share, *wilson(share, len(hits)), len(hits))


def _overruled(evidence: Evidence) -> list[Given]:
    """Answers that differ from what the model said, where it was most sure first; an answer marked true counts."""
    truths = {(each.task, each.control): each.chosen for each in evidence.given if each.truth}
    found = [
        given for given in evidence.given
        if given.said is not None and given.arm != PLANTED and given.chosen and given.chosen != given.said
        and truths.get((given.task, given.control), given.chosen) != given.said
    ]  # fmt: skip
    return sorted(found, key=lambda given: -(given.confidence or 0.0))


def _unknown(evidence: Evidence) -> list[int]:
    """Tasks for which a model had no answer."""
    return list(dict.fromkeys(each.task for each in evidence.given if each.arm == UNPREDICTED and each.version))


def _disputed(evidence: Evidence) -> dict[int, str]:
    """Tasks on which people differ, and the first control; those where most people answered first."""
    answers: dict[tuple[int, str], list[Choices]] = defaultdict(list)
    decided = {(given.task, given.control) for given in evidence.given if given.truth}
    for given in evidence.given:
        answers[given.task, given.control].append(given.chosen)
    open_ones = [place for place, mine in answers.items() if len(set(mine)) > 1 and place not in decided]
    found: dict[int, str] = {}
    for task, control in sorted(open_ones, key=lambda place: -len(answers[place])):
        found.setdefault(task, control)
    return found
