"""
A project's labels and pictures, made into rows to learn from.

Each picture is read once and becomes a vector; nothing is kept on disk but vectors, by the picture's content. The
same labels give the same rows in the same order, however fast each picture came and in whatever order the tasks did.
Few labels are joined by changed copies of their pictures, as other cameras, hands and hours would have taken them: a
head that has seen only clean pictures is unsure of dark, blurred or noisy ones, whose vectors lie elsewhere.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from celestial_backend.errors import DecodeError, FetchError, ImageError, NotEnoughDataError, StudioError, TrainingError
from celestial_backend.features import Embedder, FeatureCache, digest, rounded, unit
from celestial_backend.labels import ChoiceMap, Control, value_of
from celestial_backend.learning.votes import ACCEPTED, TIE, Choices, Consensus, Vote, agree, contested, votes_of
from celestial_backend.models.headed import SAID
from celestial_backend.models.manifest import Counts, Unreadable
from celestial_backend.studio.client import moment

SHORT_PX = 256  # of the shorter side, before anything else: an embedder sees no more
AREA_PX = 4 * SHORT_PX**2  # of a long strip

Values = NDArray[np.float32]
PICTURES_MAX = 20_000  # labelled, of one training; of more, those with the lowest hashes
POOL_MAX = 3_000  # pictures without a label
COPIES_MAX, COPIES_EACH = 1_000, 2  # changed copies in all, and of one picture
FAILED_SHARE_MAX = 0.1  # of the labelled pictures; a training on a random rest would be silently worse
LEAST_CHOICES, LEAST_LABELS = 2, 2  # of a control that is learned, and of a choice that is
RETRY_PAUSE_S = 6.0  # longer than Studio remembers a failure
REPORT_EVERY = 50  # pictures
SHOWN_FAILURES, FAILURES_IN_MESSAGE, CHOICES_IN_MESSAGE = 20, 3, 10
FAILED = "that cannot be had"
BEYOND = "beyond those that one training reads"
TIED = "on which the annotators disagree"
WEIGHTLESS = "accepted as pre-labelled, which CELESTIAL_ACCEPTED_WEIGHT lets count nothing"
Report = Callable[[int, int | None], None]
Vectors = NDArray[np.float32]
Say = Callable[[Control, list[bytes]], tuple[tuple[str, ...], NDArray[np.floating]] | None]


def changed(picture: Image.Image, key: bytes, number: int) -> Image.Image:
    """
    A copy that shows the same.

    Args:
        picture: RGB, any size; it stays as it is.
        key: Decides with the number how it is changed: in light, sharpness, grain, compression and turn.
        number: From 0.

    Returns:
        RGB, the shorter side 256 pixels or less, and of no more pixels than four such squares have.
    """
    rng = np.random.default_rng([*key, number])
    picture = _small(picture)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        picture = _turned(picture, float(rng.uniform(-25, 25)))
    values = _light(np.asarray(picture, np.float32) / np.float32(255), rng)
    worse = rng.random(3) < (0.4, 0.4, 0.35)
    if worse[1]:
        strength = math.exp(rng.uniform(math.log(0.02), math.log(0.15)))
        values = values + rng.standard_normal(values.shape, np.float32) * np.float32(strength)
    picture = Image.fromarray((np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8))
    if worse[0]:
        picture = picture.filter(ImageFilter.GaussianBlur(math.exp(rng.uniform(math.log(0.6), math.log(4.0)))))
    return _sent(picture, rng) if worse[2] else picture


def _small(picture: Image.Image) -> Image.Image:
    factor = min(SHORT_PX / min(picture.size), math.sqrt(AREA_PX / (picture.width * picture.height)))
    if factor >= 1:
        return picture
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


def _turned(picture: Image.Image, degrees: float) -> Image.Image:
    """Turned, in the same size; the corners get the mean colour of the border."""
    values = np.asarray(picture)
    border = np.concatenate((values[0], values[-1], values[:, 0], values[:, -1])).mean(axis=0)
    red, green, blue = (int(value) for value in border)
    return picture.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(red, green, blue))


def _light(values: Values, rng: np.random.Generator) -> Values:
    """Exposure, colour of the light, contrast and haze, each or none."""
    if rng.random() < 0.5:
        values = values * np.float32(math.exp(rng.uniform(math.log(0.25), math.log(1.6))))
    if rng.random() < 0.5:
        warm = rng.uniform(-0.2, 0.2)
        values = values * np.array([1 + warm, 1, 1 - warm], np.float32)
    if rng.random() < 0.3:
        keep, haze = np.float32(rng.uniform(0.4, 1)), np.float32(rng.uniform(0, 1))
        values = values * keep + haze * (1 - keep)
    return values


def _sent(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Shrunk and blown up, and compressed."""
    size, shrink = picture.size, rng.uniform(0.3, 1)
    picture = picture.resize((max(8, round(size[0] * shrink)), max(8, round(size[1] * shrink))))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=int(rng.integers(8, 50)))
    with Image.open(stream) as sent:
        return sent.convert("RGB").resize(size, Image.Resampling.BILINEAR)


class Example(NamedTuple):
    """
    What people agree on about one picture and one control.

    Attributes:
        picture: The digest of its file.
        source: "unaided", "accepted" or "corrected".
    """

    picture: bytes
    choices: Choices
    weight: float
    task_ids: tuple[int, ...]
    annotation_ids: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class Gallery:
    """
    Pictures as vectors; filled by `Reader`.

    Attributes:
        vectors: By space, by picture, shape (D,); as the embedder gives them.
        copies: The same for the changed copies of a picture, shape (C, D).
    """

    vectors: dict[str, dict[bytes, Vectors]]
    copies: dict[str, dict[bytes, Vectors]]

    def given(self, pictures: Sequence[bytes]) -> dict[str, Vectors]:
        """By space, shape (N, D), as a model takes it: vectors of length 1, and what a network says as it says it."""
        stacked = {space: np.stack([known[picture] for picture in pictures]) for space, known in self.vectors.items()}
        return {space: each if space == SAID else unit(each.astype(np.float32)) for space, each in stacked.items()}

    def rows(self, pictures: Sequence[bytes], spaces: Sequence[str]) -> Vectors:
        """Shape (N, D): of each space a vector of length 1, side by side."""
        parts = [np.stack([self.vectors[space][picture] for picture in pictures]) for space in spaces]
        return np.concatenate([unit(part.astype(np.float32)) for part in parts], axis=1)

    def copied(self, pictures: Sequence[bytes], spaces: Sequence[str]) -> tuple[Vectors, NDArray[np.integer]]:
        """The copies of pictures, shape (M, D), and the place of each one's picture."""
        known = [(place, picture) for place, picture in enumerate(pictures) if picture in self.copies[spaces[0]]]
        places = np.concatenate(
            [np.zeros(0, int), *(np.full(len(self.copies[spaces[0]][picture]), place) for place, picture in known)]
        )
        if not known:
            width = sum(next(iter(self.vectors[space].values())).shape[0] for space in spaces)
            return np.zeros((0, width), np.float32), places
        parts = [np.concatenate([self.copies[space][picture] for _, picture in known]) for space in spaces]
        return np.concatenate([unit(part.astype(np.float32)) for part in parts], axis=1), places


@dataclass(frozen=True)
class Dataset:
    """
    What a project's labels give to one training.

    Attributes:
        examples: By control, in the order of their smallest task ids.
        pool: Pictures without a label, by data key.
        counts: For people and manifests.
        newest: The largest ``updated_at`` of an annotation that was read, None without any.
        digest: Changes when a label or a picture that is used does.
    """

    examples: dict[str, list[Example]]
    gallery: Gallery
    pool: dict[str, list[bytes]]
    counts: Counts
    newest: str | None
    digest: str


@dataclass
class Wanted:
    """
    A picture of a task, on its way.

    Attributes:
        value: What the task names it by; None once that is not needed any more.
        picture: Its digest, None until it was read.
        problem: Why it was not, "" if it was or nobody tried.
        again: Whether another try may help.
    """

    task_id: int
    data_key: str
    value: object
    votes: list[Vote] = field(default_factory=list)
    picture: bytes | None = None
    problem: str = ""
    again: bool = False


class Pictures(Protocol):
    """Where pictures come from; asked by many threads. `ImageReader` is the one for tasks."""

    def file(self, value: object, task_id: int | None = None) -> bytes:
        """The bytes of a picture's file."""

    def decoded(self, value: object, data: bytes) -> Image.Image:
        """The picture in them, in mode RGB."""

    def close(self) -> None:
        """Close connections; reading again opens new ones."""


class Reader:
    """Reads pictures side by side and remembers their vectors; used by one thread."""

    def __init__(
        self, images: Pictures, cache: FeatureCache, spaces: Mapping[str, Embedder], threads: int
    ) -> None:
        self.gallery = Gallery({name: {} for name in spaces}, {name: {} for name in spaces})
        self._images = images
        self._cache = cache
        self._spaces = spaces
        self._threads = threads

    def read(
        self, wanted: Iterable[Wanted], copies: int = 0, report: Report | None = None, until: float = float("inf")
    ) -> None:
        """
        Read pictures, a bounded number at once; each says afterwards what became of it.

        Args:
            wanted: Taken one by one as there is room.
            copies: How many changed copies are made of each.
            report: Told now and then how many pictures were read, of how many (None: nobody knows).
            until: On the monotonic clock; no picture is begun afterwards.
        """
        waiting: deque[tuple[Wanted, Future[bytes]]] = deque()
        done = 0
        with ThreadPoolExecutor(self._threads) as pool:
            for each in wanted:
                if time.monotonic() > until:
                    break
                waiting.append((each, pool.submit(self._look, each, copies)))
                if len(waiting) < 4 * self._threads:
                    continue
                _settle(*waiting.popleft())
                done += 1
                if report is not None and done % REPORT_EVERY == 0:
                    report(done, None)
            for each, future in waiting:
                _settle(each, future)
        if report is not None:
            report(done + len(waiting), done + len(waiting))

    def try_again(self, wanted: Iterable[Wanted], copies: int, wait: Callable[[], object]) -> None:
        """Read once more what failed and may be had now; `wait` returns when Label Studio answers."""
        failed = [each for each in wanted if each.again]
        if failed:
            time.sleep(RETRY_PAUSE_S)
            wait()
            self._images.close()
            self.read(failed, copies)

    def _look(self, wanted: Wanted, copies: int) -> bytes:
        data = self._images.file(wanted.value, wanted.task_id)
        picture, key = None, digest(data)
        for name, embedder in self._spaces.items():
            if key in self.gallery.vectors[name] and (not copies or key in self.gallery.copies[name]):
                continue
            labels = [embedder.name, *(f"{embedder.name} copy {number}" for number in range(copies))]
            known = [self._cache.get(label, [key]).get(key) for label in labels]
            for place, label in enumerate(labels):
                if known[place] is None or known[place].shape != (embedder.width,):  # type: ignore[union-attr]
                    if picture is None:
                        picture = self._images.decoded(wanted.value, data)
                    shown = changed(picture, key, place - 1) if place else picture
                    known[place] = _vector(embedder, shown)
                    self._cache.put(label, {key: known[place]})  # type: ignore[dict-item]
            self.gallery.vectors[name][key] = known[0]  # type: ignore[assignment]
            if copies:
                self.gallery.copies[name][key] = np.stack(known[1:])  # type: ignore[arg-type]
        return key


def _vector(embedder: Embedder, picture: Image.Image) -> Vectors:
    return rounded(embedder.vectors(embedder.prepare(picture))[0])


def _settle(wanted: Wanted, future: Future[bytes]) -> None:
    try:
        wanted.picture, wanted.problem, wanted.again = future.result(), "", False
    except (ImageError, StudioError) as error:
        wanted.problem = str(error)
        # A download that was cut off looks like a damaged file. What stands in the task itself does not change.
        inline = isinstance(wanted.value, str) and wanted.value[:5].lower() == "data:"
        wanted.again = isinstance(error, (FetchError, DecodeError, StudioError)) and not inline
    if not wanted.again:
        wanted.value = None  # it may be a whole picture


class Labels:
    """The votes of a project's tasks, before any picture is read; tells at once what cannot be learned."""

    def __init__(self, choices: ChoiceMap, project: str, misled: Collection[int] = ()) -> None:
        """
        Args:
            choices: For learning.
            project: Its number.
            misled: Tasks with which people were shown a wrong pre-label on purpose; see `votes_of`.
        """
        self.choices = choices
        self._misled = misled
        self.wanted: dict[tuple[int, str], Wanted] = {}
        self.newest: str | None = None
        self.tasks = self.given = 0
        self.left_out: Counter[str] = Counter()
        self.beyond = 0
        self._project = project
        self._chosen: list[tuple[int, tuple[int, str]]] = []

    def add(self, task: Mapping[str, Any]) -> None:
        """Take a labelled task, as `StudioProject.labelled_tasks` gives it."""
        annotations = task.get("annotations") or ()
        moments = [self.newest, *(each.get("updated_at") for each in annotations)]
        self.newest = max(filter(None, moments), key=moment, default=None)
        self.tasks += 1
        self.given += len(annotations)
        votes, left_out = votes_of(task, self.choices, misled=int(task["id"]) in self._misled)
        self.left_out += left_out
        votes.sort(key=lambda vote: vote.data_key)
        for data_key, mine in groupby(votes, key=lambda vote: vote.data_key):
            self._want(task, data_key, list(mine))

    def _want(self, task: Mapping[str, Any], data_key: str, votes: list[Vote]) -> None:
        """Of too many pictures, those with the lowest hashes stay."""
        place = (int(task["id"]), data_key)
        self.wanted[place] = one = Wanted(place[0], data_key, None, votes)
        heapq.heappush(self._chosen, (-rank("chosen", self._project, *place), place))
        if len(self._chosen) > PICTURES_MAX:
            _, dropped = heapq.heappop(self._chosen)
            del self.wanted[dropped]
            self.beyond += 1
        try:
            one.value = value_of(task["data"], data_key)
        except FetchError as error:
            one.problem = str(error)

    def check(self, known: Mapping[str, Sequence[str]]) -> None:
        """
        Make sure that some control can be learned, as far as counts can tell.

        Args:
            known: By control, the choices that the live model says already; they need no label.

        Raises:
            NotEnoughDataError: The message gives the counts, and what is missing.
        """
        told = []
        for control in self.choices.controls:
            counts = self._counts(control)
            enough = {choice for choice, count in counts.items() if count >= LEAST_LABELS}
            if enough and len(enough | set(known.get(control.from_name, ()))) >= LEAST_CHOICES:
                return
            most = sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:CHOICES_IN_MESSAGE]
            said = ", ".join(f"{choice}: {count}" for choice, count in most) or "no label"
            told.append(f"{control.from_name!r} has {said}")
        out = [f"{count} annotations {why}" for why, count in sorted(self.left_out.items())]
        raise NotEnoughDataError(
            f"Training needs at least {LEAST_CHOICES} choices of a control with {LEAST_LABELS} labelled pictures each;"
            f" {'; '.join(told)}." + (f" Left out: {'; '.join(out)}." if out else "") + " Label more pictures."
        )

    def _counts(self, control: Control) -> Counter[str]:
        """How many pictures somebody gave each choice; of a control that takes several, also how many have it not."""
        mine = [vote for one in self.wanted.values() for vote in one.votes if vote.control == control.from_name]
        counts = Counter(choice for vote in mine for choice in vote.choices)
        if control.multiple and mine and len(counts) == 1:
            (choice,) = counts
            counts[f"not {choice}"] = len(mine) - counts[choice]
        return counts

    def check_read(self) -> list[tuple[int, str]]:
        """
        Make sure that nearly all pictures were read; the task ids of the others, and why.

        Raises:
            TrainingError: More than a tenth were not; the message gives the number and the first reasons.
        """
        failed = [each for each in self.wanted.values() if each.picture is None]
        if len(failed) > FAILED_SHARE_MAX * len(self.wanted):
            reasons = " ".join(f"Task {each.task_id}: {each.problem}" for each in failed[:FAILURES_IN_MESSAGE])
            raise TrainingError(
                f"A training needs {1 - FAILED_SHARE_MAX:.0%} of the labelled pictures, and {len(failed)} of"
                f" {len(self.wanted)} cannot be had. Mend them, or delete their labels. {reasons}"
            )
        return [(each.task_id, each.problem) for each in failed]


def dataset(
    labels: Labels, reader: Reader, pool: Sequence[Wanted], *, accepted_weight: float = 1.0, say: Say | None = None
) -> Dataset:
    """
    The examples of labels whose pictures were read.

    Args:
        labels: Read by the reader.
        reader: Has read the pool too.
        pool: Pictures without a label.
        accepted_weight: What a label counts that was submitted as it was pre-labelled.
        say: What the live model says of pictures: K choices and shape (N, K); weighs annotators who disagree.
    """
    failed = labels.check_read()
    examples, consensus, left = {}, Counter[str](), Counter({BEYOND: labels.beyond, FAILED: len(failed)})
    merged = 0
    for control in labels.choices.controls:
        ballots: dict[bytes, list[Vote]] = {}
        for one in labels.wanted.values():
            if one.picture is not None and (mine := [vote for vote in one.votes if vote.control == control.from_name]):
                merged += one.picture in ballots
                ballots.setdefault(one.picture, []).extend(mine)
        agreed = _agreed(control, ballots, say)
        consensus += Counter(each.how for each in agreed.values())
        made = [_example(picture, ballots[picture], each, accepted_weight) for picture, each in agreed.items()
                if each.how != TIE]  # fmt: skip
        left[TIED] += len(agreed) - len(made)
        left[WEIGHTLESS] += sum(each.weight == 0 for each in made)
        examples[control.from_name] = sorted(
            (each for each in made if each.weight > 0), key=lambda each: (each.task_ids, each.picture)
        )
    labelled = {one.picture for one in labels.wanted.values()}
    shown: dict[str, dict[bytes, None]] = {}
    for each in pool:
        if each.picture is not None and each.picture not in labelled:
            shown.setdefault(each.data_key, {})[each.picture] = None
    counts = Counts(
        tasks=labels.tasks,
        annotations=labels.given,
        labels={name: _sorted(Counter(c for each in mine for c in each.choices)) for name, mine in examples.items()},
        sources=_sorted(Counter(each.source for mine in examples.values() for each in mine)),
        consensus=_sorted(consensus),
        duplicates=merged,
        unlabelled=sum(map(len, shown.values())),
        annotations_left_out=_sorted(labels.left_out),
        pictures_left_out=_sorted(left),
        unreadable=[Unreadable(task, reason) for task, reason in sorted(failed)[:SHOWN_FAILURES]],
    )
    return Dataset(
        examples, reader.gallery, {key: sorted(mine) for key, mine in shown.items()}, counts, labels.newest,
        _digest(examples, [control.from_name for control in labels.choices.controls if control.multiple]),
    )  # fmt: skip


def copies_for(pictures: int) -> int:
    """How many changed copies are made of each labelled picture."""
    return min(COPIES_EACH, COPIES_MAX // max(1, pictures))


def rank(purpose: str, *what: object) -> int:
    """A number from 0 to 2**64 - 1 that depends on nothing but the arguments."""
    text = "\n".join(map(str, (purpose, *what)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def pool_of(tasks: Iterable[Mapping[str, Any]], labels: Labels, project: str) -> Iterator[Wanted]:
    """
    Pictures of tasks without a label, at most `POOL_MAX`; those with the lowest hashes.

    Args:
        tasks: ``id`` and ``data`` of all tasks of the project.
        labels: Their pictures are left out.
        project: Decides with the tasks' ids which are taken.
    """
    found: list[tuple[int, int, Mapping[str, Any]]] = []
    labelled = {task for task, _ in labels.wanted}
    for task in tasks:
        if task["id"] not in labelled:
            heapq.heappush(found, (-rank("pool", project, task["id"]), task["id"], task["data"]))
            if len(found) > POOL_MAX:
                heapq.heappop(found)
    for _, task_id, data in sorted(found, key=lambda each: -each[0]):
        for data_key in labels.choices.data_keys:
            try:
                yield Wanted(task_id, data_key, value_of(data, data_key))
            except FetchError:
                continue


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as text: "1-40,43"."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in parts)


@lru_cache(maxsize=16)
def within(text: str) -> Callable[[int], bool]:
    """Whether a number is in what `ranges` wrote."""
    bounds = sorted((int(first), int(last or first)) for first, _, last in (part.partition("-") for part in
                                                                           text.split(",") if part))  # fmt: skip
    starts = np.array([first for first, _ in bounds] or [0])
    ends = np.array([last for _, last in bounds] or [-1])
    return lambda number: bool(ends[max(0, int(np.searchsorted(starts, number, "right")) - 1)] >= number >= starts[0])


def _agreed(control: Control, ballots: dict[bytes, list[Vote]], say: Say | None) -> dict[bytes, Consensus]:
    named = {picture.hex(): votes for picture, votes in ballots.items()}
    asked = contested(named) if say is not None and not control.multiple else []
    said = say(control, [bytes.fromhex(name) for name in asked]) if asked and say is not None else None
    classes, probabilities = ((), {}) if said is None else (said[0], dict(zip(asked, said[1], strict=True)))
    return {bytes.fromhex(name): each for name, each in agree(named, classes, probabilities).items()}


def _example(picture: bytes, votes: Sequence[Vote], consensus: Consensus, accepted_weight: float) -> Example:
    return Example(
        picture,
        consensus.choices or frozenset(),
        accepted_weight if consensus.source == ACCEPTED else 1.0,
        tuple(sorted({vote.task_id for vote in votes})),
        tuple(sorted({vote.annotation_id for vote in votes})),
        consensus.source,
    )


def _sorted(counter: Mapping[str, int]) -> dict[str, int]:
    return {name: counter[name] for name in sorted(counter) if counter[name]}


def _digest(examples: Mapping[str, Sequence[Example]], multiple: Sequence[str]) -> str:
    lines = [*multiple] + [
        "\t".join((control, each.picture.hex(), *sorted(each.choices), str(each.weight)))
        for control, mine in examples.items()
        for each in mine
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:32]
