"""
The order in which tasks are labelled, where Label Studio sorts by score: first what teaches most.

First come typical pictures: the most typical one of each cluster in which nothing is labelled, the largest cluster
first (TypiClust: Hacohen et al., 2022). They need no label, so a new project has an order before it has a model. Then
come pictures of which the live model is least sure, by its lead of one choice over the next, those first that are
unlike each other. A share of the tasks, drawn at random, stands among them wherever chance put it: what is measured on
those holds for all.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from celestial_backend.database import Database
from celestial_backend.errors import StateError
from celestial_backend.labels import UNKNOWN_SCORE
from celestial_backend.settings import NEEDS_LABELS, TYPICAL, Settings, project_parts
from celestial_backend.trust.trial import Trial, number_of

if TYPE_CHECKING:
    from celestial_backend.trust.seen import Seen

EXPLORED = 0.1  # share of the tasks that chance puts into the order
FIRST_EACH, FIRST_LEAST, FIRST_MOST = 6, 30, 150  # labels up to which typical pictures come first: so many a choice
STEP = 20  # clusters: so many at first, and so many more each time that all have a label
AXES = 64  # of the features, by which pictures are clustered
NEAREST = 20  # pictures of a cluster whose distance says how typical one is
LEAST_NEXT, MOST_NEXT, NEXT_IN = 10, 50, 5  # labels until the next training, and of those that there are
AMONG = 4  # times as many of the smallest leads, from which they are chosen so that they differ
AT_ONCE = 500  # places that are written in one transaction: others wait for it
TASKS_MAX = 5_000  # that are put in order; of more, the first
SEED, TURNS = 20, 50
logger = logging.getLogger(__name__)
Vectors = NDArray[np.float32]
Floats = NDArray[np.float64]


class Order:
    """The places of tasks in the order; lives as long as the process, safe between threads."""

    def __init__(self, settings: Settings, database: Database, trial: Trial) -> None:
        self.is_kept = settings.score == TYPICAL
        self._database = database
        self._trial = trial

    def placed(self, tasks: Sequence[Any], answers: Sequence[Any], project: str, *, needs_labels: bool) -> list[Any]:
        """
        Answers with the places of their tasks as their scores; those of tasks without a place stay as they are.

        A picture unlike all that was learned keeps its score, which brings it to the front, unless chance has put it
        into the order.

        Args:
            tasks: As Label Studio sends them.
            answers: As many, of `Predictor.predict`.
            project: As Label Studio sends it.
            needs_labels: Nothing can be predicted yet: the answers are empty predictions that have a place.
        """
        number, made = project_parts(project)
        if not (self.is_kept and number):
            return list(answers)
        ids = [number_of(task) for task in tasks]
        try:
            place_of = self.places(number, [each for each in ids if each is not None], made)
        except StateError as error:  # people can label in any order meanwhile
            logger.warning("Project %s: %d tasks get no place in the order: %s", number, len(tasks), error)
            return list(answers)
        found = list(answers)
        for at, (task, answer) in enumerate(zip(ids, answers, strict=True)):
            if task is None or task not in place_of:
                continue
            if needs_labels:
                found[at] = {"result": [], "score": place_of[task], "model_version": NEEDS_LABELS}
            elif answer and (answer["score"] > UNKNOWN_SCORE or self.explored(number, task)):
                found[at] = {**answer, "score": place_of[task]}
        return found

    def places(self, number: str, tasks: Collection[int], made: str = "") -> dict[int, float]:
        """
        The places of those tasks that have one, above 0 and below 1, the first lowest.

        Raises:
            StateError: They cannot be read.
        """
        if not tasks:
            return {}
        wanted = """SELECT task, place, made FROM places
            WHERE project = :project AND task BETWEEN :first AND :last"""
        rows = self._database.rows(wanted, project=number, first=min(tasks), last=max(tasks))
        asked = set(tasks)
        return {
            int(row["task"]): row["place"]
            for row in rows
            if int(row["task"]) in asked and (not made or row["made"] in ("", made))
        }

    def keep(self, number: str, made: str, place_of: Mapping[int, float]) -> None:
        """
        Write down the places of a project's tasks, instead of those it had.

        Raises:
            StateError: They cannot be written.
        """
        put = """INSERT INTO places (project, task, made, place) VALUES (:project, :task, :made, :place)
            ON CONFLICT (project, task) DO UPDATE SET made = excluded.made, place = excluded.place"""
        with self._database.writing(f"places {number}") as work:
            work.run("DELETE FROM places WHERE project = :project", project=number)
        rows = list(place_of.items())
        for start in range(0, len(rows), AT_ONCE):
            with self._database.writing(f"places {number}") as work:
                for task, place in rows[start : start + AT_ONCE]:
                    work.run(put, project=number, task=task, made=made, place=place)

    def arrange(self, project: str, seen: Seen) -> int:
        """
        Put the tasks of a project that nobody has labelled in order, and say how many have a place now.

        Args:
            project: Label Studio's number of the project.
            seen: Its pictures.

        Raises:
            StateError: The order cannot be written down.
        """
        tasks = list(seen.vectors)
        drawn = np.array([[self._trial.drawn(project, task, purpose) for purpose in ("explore", "place")]
                          for task in tasks]).reshape(-1, 2)  # fmt: skip
        labelled = np.array([task in seen.labelled for task in tasks], bool)
        chance = np.where(drawn[:, 0] < EXPLORED, drawn[:, 1], np.nan)
        leads = np.array([seen.leads.get(task, np.nan) for task in tasks])
        first = min(FIRST_MOST, max(FIRST_LEAST, FIRST_EACH * seen.choices))
        place_of = places(np.stack(list(seen.vectors.values())), labelled, leads, chance, first) if tasks else {}
        self.keep(project, seen.made, {tasks[row]: place for row, place in place_of.items()})
        return len(place_of)

    def explored(self, number: str, task: int) -> bool:
        """Whether chance has put a task into the order: what is measured on such tasks holds for all."""
        return self._trial.drawn(number, task, "explore") < EXPLORED


def places(
    vectors: Vectors, labelled: NDArray[np.bool_], leads: Floats, chance: Floats, first: int
) -> dict[int, float]:
    """
    The places of pictures without a label, by their rows: above 0 and below 1, the first lowest.

    A place is the share of the pictures that are labelled when its turn comes. So a picture that chance has put
    somewhere keeps its place, whatever comes before and after it.

    Args:
        vectors: Shape (N, D); pictures with and without a label.
        labelled: Shape (N,).
        leads: Shape (N,); how far the live model prefers one choice, NaN where it says nothing.
        chance: Shape (N,); from 0 to 1 where chance puts a picture, NaN where it does not.
        first: Labels up to which typical pictures come first.
    """
    from threadpoolctl import threadpool_limits

    free, before = np.flatnonzero(~labelled), np.flatnonzero(labelled)
    if not len(free):
        return {}
    with threadpool_limits(1):  # on a busy machine several threads of one product wait for each other
        ranked = _ranked(_reduced(vectors), free, before, leads, first)
    chosen = [row for row in ranked if np.isnan(chance[row])]
    done = 1 - len(free) / len(vectors)
    found = {int(row): done + (1 - done) * (at + 0.5) / len(chosen) for at, row in enumerate(chosen)}
    return found | {int(row): float(np.clip(chance[row], 1e-6, 1 - 1e-6)) for row in free if not np.isnan(chance[row])}


def _ranked(
    points: Floats, free: NDArray[np.integer], before: NDArray[np.integer], leads: Floats, first: int
) -> Iterable[int]:
    """The rows without a label: those that teach most first."""
    typical = list(_typical(points, before, first))
    rest = np.setdiff1d(free, typical)
    rng = np.random.default_rng(SEED)
    rest = rest[np.lexsort((rng.random(len(rest)), leads[rest]))]  # NaN comes last, in any order
    count = min(MOST_NEXT, max(LEAST_NEXT, len(before) // NEXT_IN))
    apart = _apart(points, rest[~np.isnan(leads[rest])], count)
    return dict.fromkeys([*typical, *apart.tolist(), *rest.tolist()])


def _typical(points: Floats, labelled: Sequence[int] | NDArray[np.integer], first: int) -> Iterator[int]:
    """
    The rows of typical pictures without a label, until so many are chosen or labelled.

    A cluster that is much larger than the others gets another one before the smallest gets its first: a kind whose
    pictures are all alike is one cluster, however many there are.
    """
    chosen, count = [int(row) for row in labelled], 0
    wanted = min(first, len(points))
    while len(chosen) < wanted:
        count = min(count + STEP, len(points))
        cluster = _clusters(points, count)
        sizes, covered = np.bincount(cluster, minlength=count), np.bincount(cluster[chosen], minlength=count)
        for _ in range(min(STEP, wanted - len(chosen))):
            one = int(np.where(covered < sizes, sizes / (1 + 2 * covered), -1).argmax())  # Sainte-Laguë's quotients
            members = np.flatnonzero(cluster == one)
            chosen.append(_next_of(points, members[~np.isin(members, chosen)], members[np.isin(members, chosen)]))
            covered[one] += 1
            yield chosen[-1]


def _next_of(points: Floats, members: NDArray[np.integer], chosen: NDArray[np.integer]) -> int:
    """The most typical of a cluster's members; where some were chosen, of the half that is farther from them."""
    if len(chosen):
        alike = (points[members] @ points[chosen].T).max(axis=1)
        members = members[alike <= np.median(alike)]
    return int(members[_spread(points[members]).argmin()])


def _apart(points: Floats, rows: NDArray[np.integer], count: int) -> NDArray[np.integer]:
    """Of the first rows, so many that are unlike each other, in their order: near-duplicates teach little."""
    few = rows[: AMONG * count]
    if len(few) <= count:
        return few
    cluster = _clusters(points[few], count)
    middle = np.stack([points[few][cluster == one].mean(axis=0) for one in np.unique(cluster)])
    nearest = ((points[few][:, None] - middle) ** 2).sum(axis=2).argmin(axis=0)
    return np.asarray(few[np.unique(nearest)])


def _clusters(points: Floats, count: int) -> NDArray[np.integer]:
    """The cluster of each point, by k-means; some may have none."""
    from scipy.cluster.vq import kmeans2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of clusters without a point
        return np.asarray(kmeans2(points, count, iter=TURNS, minit="++", seed=SEED)[1])


def _spread(points: Floats) -> Floats:
    """How far each point of a cluster is from its nearest ones on average."""
    count = min(NEAREST, len(points) - 1)
    if count < 1:
        return np.zeros(len(points))
    apart = np.sqrt(np.maximum(0.0, 2 - 2 * points @ points.T))
    np.fill_diagonal(apart, np.inf)
    return np.asarray(np.sort(apart, axis=1)[:, :count].mean(axis=1))


def _reduced(vectors: Vectors) -> Floats:
    """The vectors on their principal axes, of length 1."""
    points = vectors.astype(np.float64) - vectors.mean(axis=0)
    _, axes = np.linalg.eigh(points.T @ points) if len(points) >= points.shape[1] else (None, None)
    if axes is None:
        values, sides = np.linalg.eigh(points @ points.T)
        points = sides[:, -AXES:] * np.sqrt(np.maximum(values[-AXES:], 0))
    else:
        points = points @ axes[:, -AXES:]
    return np.asarray(points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12))
