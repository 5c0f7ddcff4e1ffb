"""
A project's labels, made into examples: to learn from, and held out for comparing models.

The same labels give the same examples in the same order, however fast each picture
came and in whatever order the tasks did.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from celestial_backend.album import Album, Report, Wanted, check
from celestial_backend.consensus import Consensus, agree, contested
from celestial_backend.errors import FetchError
from celestial_backend.images import ImageReader
from celestial_backend.labels import ChoiceMap
from celestial_backend.tally import (
    BEYOND,
    BOTH_SIDES,
    LEAST_PER_NEW_CLASS,
    TIED,
    WEIGHTLESS,
    ProjectExample,
    Tally,
    check_enough,
    ranges,
)
from celestial_backend.votes import ACCEPTED, Vote, votes_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Collection", "ProjectExample", "collect", "held_out"]

HELD_OUT_SHARE = 0.2  # of the tasks; neither this nor the hash may ever change: older models learned the others
MOST_EXAMPLES = 20_000
BATCH = 64  # pictures whose probabilities are asked for at once


@dataclass(frozen=True)
class Collection:
    """
    What a project's labels give to one training.

    Attributes:
        learn: By smallest task id, as is `held_out`; no picture is in both.
        classes: The model's, in their order, then the new ones that have enough examples.
        counts: For people and manifests, ready for JSON: examples per class, what was left out and why.
        newest: The largest ``updated_at`` of an annotation that was read, None without any.
        digest: Changes when a label or a picture that is used does.
        annotation_ids: Those that are used, as ranges: "1-40,43".
    """

    learn: tuple[ProjectExample, ...]
    held_out: tuple[ProjectExample, ...]
    classes: tuple[str, ...]
    counts: dict[str, Any]
    newest: str | None
    digest: str
    annotation_ids: str


@dataclass
class _Labelled(Wanted):
    votes: list[Vote] = field(default_factory=list)


def held_out(project_id: str, task_id: int) -> bool:
    """Whether a task's pictures are for comparing models, and for no model to learn; fixed for ever."""
    return _rank("held out", project_id, task_id) < HELD_OUT_SHARE * 2**64


def collect(
    tasks: Iterable[Mapping[str, Any]],
    choices: ChoiceMap,
    images: ImageReader,
    folder: Path,
    *,
    project_id: str,
    known: Sequence[str],
    accepted_weight: float = 1.0,
    threads: int = 8,
    probabilities: Callable[[list[Image.Image]], NDArray[Any]] | None = None,
    wait: Callable[[], object] | None = None,
    report: Report | None = None,
) -> Collection:
    """
    The examples that a project's labels give.

    Args:
        tasks: Labelled tasks, as `StudioProject.labelled_tasks` gives them, in any order.
        choices: The map of `ChoiceMap.for_learning`.
        images: Reads the pictures.
        folder: An empty one, for the pictures; the examples read them from there.
        project_id: Decides with a task's id whether it is held out.
        known: The model's classes, with which those of ``choices`` begin.
        accepted_weight: The weight of examples that were accepted as they were pre-labelled.
        threads: Pictures that are read side by side.
        probabilities: Pictures -> shape (N, K) in the order of ``known``, to weigh annotators by.
        wait: Returns when Label Studio answers; called before failed pictures are tried again.
        report: Told now and then how many pictures were read, of how many (None: nobody knows).

    Raises:
        NotEnoughDataError: Too few examples; the message gives the counts.
        TrainingError: More than a tenth of the labelled pictures cannot be had.
        StudioError: The tasks cannot be had.
        StateError: The folder cannot hold the pictures.
    """
    tally = Tally()
    labelled: dict[tuple[int, str], _Labelled] = {}
    album = Album(images, folder, threads)
    album.fill(_wanted(tasks, choices, project_id, labelled, tally), report)
    album.try_again(labelled.values(), wait)
    tally.failed = check(list(labelled.values()))
    ballots = _ballots(labelled.values(), project_id, tally)
    looked = _look(contested(ballots), album, probabilities)
    agreed = agree(ballots, known, looked)
    to_learn = {picture for picture, votes in ballots.items() if not held_out(project_id, votes[0].task_id)}
    classes = _classes(known, choices, agreed, to_learn)
    learn, held = [], []
    for picture, votes in sorted(ballots.items(), key=lambda each: (min(vote.task_id for vote in each[1]), each[0])):
        consensus = agreed[picture]
        tally.how[consensus.how] += 1
        if consensus.class_name is None:
            tally.pictures[TIED] += 1
            continue
        if consensus.class_name not in classes:
            tally.rare[consensus.class_name] += 1
            continue
        example = _example(picture, votes, consensus, album, accepted_weight)
        if picture not in to_learn:
            held.append(example)
        elif example.weight > 0:
            learn.append(example)
        else:
            tally.pictures[WEIGHTLESS] += 1
    counts = tally.counts(learn, held)
    check_enough(counts, project_id)
    used = sorted(
        (vote.annotation_id, vote.class_name, vote.updated_at, example.name)
        for example in (*learn, *held)
        for vote in ballots[example.name]
    )
    return Collection(
        learn=tuple(learn),
        held_out=tuple(held),
        classes=classes,
        counts=counts,
        newest=tally.newest,
        digest=hashlib.sha256("\n".join(" ".join(map(str, line)) for line in used).encode()).hexdigest(),
        annotation_ids=ranges({line[0] for line in used}),
    )


def _wanted(
    tasks: Iterable[Mapping[str, Any]],
    choices: ChoiceMap,
    project_id: str,
    labelled: dict[tuple[int, str], _Labelled],
    tally: Tally,
) -> Iterator[_Labelled]:
    """The pictures to read; of too many, those with the lowest hashes stay in ``labelled``."""
    chosen: list[tuple[int, tuple[int, str]]] = []
    for task in tasks:
        tally.add(task)
        votes, left_out = votes_of(task, choices)
        tally.annotations += left_out
        votes.sort(key=lambda vote: vote.data_key)
        for data_key, mine in groupby(votes, key=lambda vote: vote.data_key):
            place = (int(task["id"]), data_key)
            labelled[place] = one = _Labelled(place[0], None, votes=list(mine))
            heapq.heappush(chosen, (-_rank("chosen", project_id, *place), place))
            if len(chosen) > MOST_EXAMPLES:
                _, dropped = heapq.heappop(chosen)
                del labelled[dropped]
                tally.pictures[BEYOND] += 1
                if dropped == place:
                    continue
            try:
                one.value = choices.value_of(task["data"], data_key)
            except FetchError as error:
                one.problem = str(error)
            else:
                yield one


def _ballots(labelled: Iterable[_Labelled], project_id: str, tally: Tally) -> dict[str, list[Vote]]:
    """
    Picture -> the votes of all tasks that show it, by annotation.

    A picture of which one task is held out and another is not is used for neither: an
    older model may have learned it.
    """
    shown: dict[str, list[Vote]] = {}
    for one in labelled:
        if one.digest:
            shown.setdefault(one.digest, []).extend(one.votes)
    ballots = {}
    for picture, votes in shown.items():
        tasks = {vote.task_id for vote in votes}
        if len({held_out(project_id, task) for task in tasks}) > 1:
            tally.pictures[BOTH_SIDES] += 1
            continue
        tally.merged += len(tasks) - 1
        ballots[picture] = sorted(votes, key=lambda vote: (vote.annotation_id, vote.data_key))
    return ballots


def _look(
    pictures: Sequence[str], album: Album, probabilities: Callable[[list[Image.Image]], NDArray[Any]] | None
) -> dict[str, NDArray[Any]]:
    """Picture -> the model's probabilities."""
    if probabilities is None:
        return {}
    looked: dict[str, NDArray[Any]] = {}
    for start in range(0, len(pictures), BATCH):
        batch = pictures[start : start + BATCH]
        looked |= zip(batch, probabilities([album.open(picture) for picture in batch]), strict=True)
    return looked


def _classes(
    known: Sequence[str], choices: ChoiceMap, agreed: Mapping[str, Consensus], to_learn: set[str]
) -> tuple[str, ...]:
    """The model's classes, and the new ones with enough examples, of which not all are held out."""
    counts = Counter(consensus.class_name for consensus in agreed.values())
    learned = {agreed[picture].class_name for picture in to_learn}
    new = (name for name in choices.classes if name not in known and counts[name] >= LEAST_PER_NEW_CLASS)
    return (*known, *(name for name in new if name in learned))


def _example(
    picture: str, votes: Sequence[Vote], consensus: Consensus, album: Album, accepted_weight: float
) -> ProjectExample:
    return ProjectExample(
        load=partial(album.open, picture),
        class_name=consensus.class_name or "",
        name=picture,
        weight=accepted_weight if consensus.source == ACCEPTED else 1.0,
        task_ids=tuple(sorted({vote.task_id for vote in votes})),
        annotation_ids=tuple(sorted({vote.annotation_id for vote in votes})),
        source=consensus.source,
    )


def _rank(purpose: str, *what: object) -> int:
    """A number from 0 to 2**64 - 1 that depends on nothing but the arguments."""
    text = "\n".join(map(str, (purpose, *what)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
