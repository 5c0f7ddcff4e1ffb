"""
One training of one project, from its labels to a model that may take the live one's place, or to why there is none.

Nothing that is served changes: the new model is whole in the store, and compared with the live one. Who asked for it
publishes it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from celestial_backend.errors import ModelError, ModelLoadError, NotEnoughDataError
from celestial_backend.features import Embedder, unit
from celestial_backend.labels import ChoiceMap, Control, Vocabulary
from celestial_backend.learning.control import Champion, Kept, Lesson, Vectors, teach
from celestial_backend.learning.dataset import (
    Dataset,
    Example,
    Labels,
    Reader,
    copies_for,
    dataset,
    pool_of,
    ranges,
    within,
)
from celestial_backend.models import headed
from celestial_backend.models.classifier import Classifier, NetworkFeatures, Said
from celestial_backend.models.embedders import open_embedder
from celestial_backend.models.headed import GENERAL, OWN, SAID, Head, HeadsModel, Space
from celestial_backend.models.manifest import PASSED, REFUSED, Counts, Manifest, Taught
from celestial_backend.models.registry import Described
from celestial_backend.models.store import ModelStore
from celestial_backend.pictures.reader import ImageReader
from celestial_backend.planets import replay
from celestial_backend.settings import Settings, project_of, project_tag
from celestial_backend.studio.client import Studio
from celestial_backend.studio.project import StudioProject

logger = logging.getLogger(__name__)

POOL_S = 6.0  # for pictures without a label whose features are not known yet
LIVE_S = 120.0  # for a live model to be loaded
SAVED_APART = 1e-4
NAMED_MAX = 10  # tasks, or choices, in a sentence


@dataclass(frozen=True)
class Request:
    """
    What is to be learned.

    Attributes:
        project: Label Studio's number of the project.
        job: Stands for this training; the new model is named after it.
        attempt: How often it was begun, this time included; no two attempts make the same model.
        folder: An empty one for the new model; whoever made it removes it.
    """

    project: str
    job: str
    attempt: int
    folder: Path


class Progress(Protocol):
    """Whom a training tells again and again where it is."""

    def __call__(self, stage: str, **where: int | None) -> None:
        """Its stage, and how many `pictures` were read, `of` how many."""


@dataclass(frozen=True)
class Outcome:
    """
    What a training has brought.

    Attributes:
        reason: For people.
        manifest: What is told of the new model, if there is one, and its tag.
        better: Whether the new model is to be published.
        instead_of: The tag of the model that it was compared with, which must be live until then.
    """

    reason: str
    manifest: Manifest = field(default_factory=Manifest)
    better: bool = False
    instead_of: str = ""


class Material(NamedTuple):
    """What a project can be learned from: how its labels are read, the live model, and labels and pictures."""

    choices: ChoiceMap
    champion: Live
    data: Dataset


class Learner:
    """Trains projects; one per process, used by one thread."""

    def __init__(
        self,
        settings: Settings,
        store: ModelStore,
        studio: Studio,
        images: ImageReader,
        misled: Callable[[str], Collection[int]] = lambda _: (),
    ) -> None:
        """
        Args:
            settings: Of the process.
            store: With the live model, and for the new one.
            studio: Whose labels are learned.
            images: Reads the pictures.
            misled: The tasks of a project with which people were shown a wrong pre-label on purpose.
        """
        self._settings = settings
        self._store = store
        self._studio = studio
        self._images = images
        self._misled = misled

    def learn(self, request: Request, report: Progress, read_until: Callable[[str], None]) -> Outcome:
        """
        Learn a project's labels, and compare what comes of it with the live model; it is in the store then.

        Args:
            request: Of one project.
            report: Told where the training is.
            read_until: Told when the newest label was changed that was read, as soon as all are.

        Raises:
            CelestialError: There is no new model, and the message says why.
        """
        choices, champion, data = self.read(request.project, report, read_until)
        tried = self._tried(request.project, champion.live, data)
        if tried is not None:
            return Outcome(_nothing_new(tried, champion.live), Manifest(labels=data.counts))
        report("learning")
        lessons = {
            control.from_name: lesson
            for control in choices.controls
            if (lesson := teach(control, data, champion, champion.features)) is not None
        }
        if not lessons:
            raise NotEnoughDataError(_few(data.counts))
        return self._end(request, champion, choices, data, lessons, report)

    def read(self, project_id: str, report: Progress, read_until: Callable[[str], None] = lambda _: None) -> Material:
        """
        What a training of a project learns from now.

        Args:
            project_id: Label Studio's number of the project.
            report: Told where the reading is.
            read_until: As for `learn`.

        Raises:
            NotEnoughDataError: The labels are too few, and the message says what is missing.
            CelestialError: Labels or pictures cannot be read.
        """
        report("reading labels")
        project = StudioProject(self._studio, project_id)
        config = project.label_config()
        choices = ChoiceMap.for_learning(config)
        champion = self._champion(project_id, config)
        labels = Labels(choices, project_id, self._misled(project_id))
        for task in project.labelled_tasks():
            labels.add(task)
        if labels.newest:
            read_until(labels.newest)
        labels.check({control.from_name: champion.known(control.from_name) for control in choices.controls})
        return Material(choices, champion, self._read(project_id, project, labels, champion, report))

    def _champion(self, project: str, config: str) -> Live:
        """The live model; in place of one of the project that is damaged, what projects begin with."""
        live = self._store.live_tag(project)
        if project_of(live) is None or self._loads(live):
            return Live(self._settings, self._store, live, config)
        return Live(self._settings, self._store, self._store.live_tag(), config, instead_of=live)

    def _loads(self, tag: str) -> bool:
        """Whether a model of heads is whole; one of another embedder counts as whole, and so does a network."""
        folder = self._store.registry.path(tag)
        if not headed.is_headed(folder):
            return True
        try:
            headed.read_about(tag, folder)
            if self._store.registry.describe(tag).manifest.embedder == open_embedder(self._settings).name:
                self._store.model(tag)
        except ModelLoadError as error:
            logger.warning("%s", error)
            return False
        return True

    def _read(
        self, project_id: str, project: StudioProject, labels: Labels, champion: Live, report: Progress
    ) -> Dataset:
        """The labelled pictures and some of the others as vectors."""
        report("reading pictures", of=len(labels.wanted))
        spaces = champion.spaces()
        reader = Reader(self._images, self._store.features, spaces, self._settings.fetch_threads)
        wanted = [each for each in labels.wanted.values() if not each.problem]
        copies = copies_for(len(wanted))
        reader.read(wanted, copies, lambda done, total: report("reading pictures", pictures=done, of=total))
        reader.try_again(wanted, copies, project.label_config)
        until = time.monotonic() + POOL_S
        report("looking at pictures without a label")
        pool = list(pool_of(_while(project.tasks(), until), labels, project_id))
        reader.read(pool, 0, None, until)
        return dataset(labels, reader, pool, accepted_weight=self._settings.accepted_weight, say=champion.say(reader))

    def _tried(self, project: str, live: str, data: Dataset) -> Described | None:
        """The live model, or one that was compared with it, if it comes of the very same labels."""
        for model in self._store.registry.models():
            if project_of(model.tag) != project or live not in (model.tag, model.parent):
                continue
            if model.tag != live and not self._store.registry.keeps(model.tag):
                continue  # the training that made it was ended before it said so
            told = model.manifest
            if (told.digest, told.accepted_weight, told.embedder) == (
                data.digest, self._settings.accepted_weight, open_embedder(self._settings).name
            ) and self._loads(model.tag):  # fmt: skip
                return model
        return None

    def _end(
        self,
        request: Request,
        champion: Live,
        choices: ChoiceMap,
        data: Dataset,
        lessons: Mapping[str, Lesson],
        report: Progress,
    ) -> Outcome:
        """Save what was learned; it is better if any control is answered better by it."""
        report("saving")
        passed = {name: lesson for name, lesson in lessons.items() if lesson.verdict.publish}
        heads: list[Head] = []
        taught: dict[str, Taught] = {}
        for control in choices.controls:
            name = control.from_name
            lesson = (passed or lessons).get(name)
            head = lesson.head if lesson else champion.head(name)
            if head is not None:
                heads.append(head)
                taught[name] = _taught(lesson, data.examples[name]) if lesson else champion.taught(name)
        tag, reason = project_tag(request.project, request.job, request.attempt), _reason(lessons, champion)
        manifest = structs.replace(
            _manifest(champion, data, lessons, taught),
            project=request.project,
            job=request.job,
            decision=PASSED if passed else REFUSED,
            reason=reason,
            accepted_weight=self._settings.accepted_weight,
        )
        manifest = self._save(tag, request.folder / "model", heads, champion, manifest, data)
        return Outcome(reason, structs.replace(manifest, tag=tag), better=bool(passed), instead_of=champion.live)

    def _save(
        self, tag: str, place: Path, heads: Sequence[Head], champion: Live, manifest: Manifest, data: Dataset
    ) -> Manifest:
        """Put the new model into the store, and see that it says from there what it said before; what is told of it."""
        place.mkdir(parents=True)
        needs_base = any(head.needs != (GENERAL,) for head in heads)
        base = champion.base if needs_base else None
        manifest = headed.save(place, heads, champion.embedder.name, base, manifest)
        self._store.registry.remove(tag)  # left by an attempt that was killed
        self._store.registry.add_heads(tag, place, manifest)
        model = cast("HeadsModel", self._store.model(tag))
        pictures = sorted({example.picture for mine in data.examples.values() for example in mine})[:20]
        kept = data.gallery.given(pictures)
        saved = model.probabilities(_row_of(model, kept))
        said = np.concatenate(
            [head.probabilities(np.concatenate([kept[name] for name in head.needs], axis=1)) for head in heads], axis=1
        )
        apart = float(np.abs(saved - said).max(initial=0.0))
        if apart > SAVED_APART:
            raise ModelLoadError(
                f"{tag} must say from the store what it said before it was saved, and its probabilities are "
                f"up to {apart:.2g} apart. It was not published."
            )
        return manifest


class Live(Champion):
    """The live model of a project as the new one's champion; what is slow is loaded when it is asked."""

    def __init__(
        self, settings: Settings, store: ModelStore, tag: str, config: str, *, instead_of: str | None = None
    ) -> None:
        self.tag = tag
        self.live = instead_of or tag
        self.embedder = open_embedder(settings)
        self._store = store
        self._config = config
        self._told = store.registry.describe(tag).manifest
        self._controls: dict[str, Control] = {}
        self._mute: dict[str, Control] = {}
        self.base = self._base(store)
        self._network = not headed.is_headed(store.registry.path(tag))
        vocabulary = store.vocabulary(tag, LIVE_S)
        if vocabulary is None:
            raise ModelError(f"The live model {tag} must load within {LIVE_S:g} seconds and did not. Train again.")
        controls = {control.from_name: control for control in vocabulary.choices(config).controls}
        if not self._network and self._told.embedder != self.embedder.name:
            self._mute = controls  # it cannot be asked any more, as its features are not those of this backend
            return
        self._controls = controls
        if self._network and self._controls:
            self.base = tag

    def _base(self, store: ModelStore) -> str | None:
        """The network that its heads need, or whose features they might have taken."""
        if self._told.base:
            return self._told.base
        return self._told.tried if self._told.tried and store.registry.holds(self._told.tried) else None

    @property
    def features(self) -> tuple[Space, ...]:
        """The spaces that a head may be learned on."""
        return (GENERAL, OWN) if OWN in self.spaces() else (GENERAL,)

    def spaces(self) -> dict[str, Embedder]:
        """What makes the vectors of pictures: the general features, and what the network has for them, if it helps."""
        if not hasattr(self, "_spaces"):
            self._spaces: dict[str, Embedder] = {GENERAL: self.embedder}
            if self.base is not None and self._controls:
                network = cast("Classifier", self._store.model(self.base))
                self._spaces[SAID] = Said(network)
                try:
                    self._spaces[OWN] = NetworkFeatures(network)
                except ModelLoadError as error:
                    logger.info("%s The general features are used alone.", error)
        return self._spaces

    def known(self, control: str) -> tuple[str, ...]:
        """The choices of a control that it knows, none if it does not answer it."""
        found = self._controls.get(control)
        return tuple(dict.fromkeys(found.choice_of.values())) if found else ()

    def says(self, control: str, vectors: Mapping[str, Vectors]) -> NDArray[np.float64]:
        """The probabilities of these choices, shape (N, K), for pictures as vectors of each space."""
        found, known = self._controls[control], self.known(control)
        if self._network:
            rows = np.asarray(vectors[SAID], np.float64)
        else:
            model = cast("HeadsModel", self._store.model(self.tag))
            rows = model.probabilities(_row_of(model, vectors))
        said = np.zeros((len(rows), len(known)))
        for column, name in enumerate(found.columns.classes, found.columns.start):
            if name in found.choice_of:
                place = known.index(found.choice_of[name])
                joined = np.maximum if found.columns.multiple else np.add  # as `Control.choose` does
                said[:, place] = joined(said[:, place], rows[:, column])
        return said

    def say(self, reader: Reader) -> Any:
        """What the live model says of pictures that a reader has read, for `dataset`."""

        def say(control: Control, pictures: list[bytes]) -> tuple[tuple[str, ...], NDArray[np.floating]] | None:
            known = self.known(control.from_name)
            if not known:
                return None
            return known, self.says(control.from_name, reader.gallery.given(pictures))

        return say

    def taught(self, control: str) -> Taught:
        """What is told of the head that answers a control; nothing of a network."""
        found = self._controls.get(control)
        return (self._told.taught or {}).get(found.columns.control, Taught()) if found else Taught()

    def learned(self, control: str, example: Example) -> bool:
        """Whether what answers a control has learned from an example."""
        return any(map(within(self.taught(control).annotations or ""), example.annotation_ids))

    def once_right(self, control: str, example: Example) -> bool | None:
        """Whether its own cross-validation said rightly what it has learned; None where that is not known."""
        told = self.taught(control).said
        if told is None or not self.learned(control, example):
            return None
        return any(map(within(told), example.annotation_ids))

    def lost(self, lesson: Lesson) -> tuple[str, ...]:
        """The choices that it knows, or knew before the embedder was another one, and that a new head does not."""
        found = self._mute.get(lesson.head.control)
        knew = tuple(dict.fromkeys(found.choice_of.values())) if found else self.known(lesson.head.control)
        return tuple(choice for choice in knew if choice not in lesson.head.classes)

    def is_network(self, control: str) -> bool:
        """Whether what answers a control is no head of ours."""
        return self.taught(control) == Taught()

    def kept(self, control: str) -> Kept:
        """The sample of the default model's training pictures, as far as what it knows of them comes from there."""
        wanted = self.sampled(control)
        sample = replay.load({name: each.name for name, each in self.spaces().items()}) if wanted else None
        if sample is None:
            return Kept()
        controls = Vocabulary(tuple(dict.fromkeys(sample.classes))).choices(self._config).controls
        choice_of = next((each.choice_of for each in controls if each.from_name == control), {})
        rows = [row for row, name in enumerate(sample.classes) if choice_of.get(name) in wanted]
        copies = [row * replay.COPIES + number for row in rows for number in range(replay.COPIES)]
        return Kept(
            tuple(choice_of[sample.classes[row]] for row in rows),
            {name: each[rows] if name == SAID else unit(each[rows]) for name, each in sample.vectors.items()},
            {name: each[copies] if name == SAID else unit(each[copies]) for name, each in sample.copies.items()},
            np.repeat(np.arange(len(rows)), replay.COPIES),
        )

    def sampled(self, control: str) -> tuple[str, ...]:
        """The choices of a control that mean to it what the default model's training pictures show."""
        if self.is_network(control):
            return self.known(control) if (self.base or "").partition(":")[2].startswith("default-") else ()
        return tuple(self.taught(control).sampled or ())

    def head(self, control: str) -> Head | None:
        """What answers a control now, to be kept as it is; None if nothing does."""
        found = self._controls.get(control)
        if found is None:
            return None
        if self._network:
            return Head.of_network(control, found.columns.classes)
        model = cast("HeadsModel", self._store.model(self.tag))
        kept = next((head for head in model.heads if head.control == found.columns.control), None)
        return None if kept is None else replace(kept, control=control)

    def before(self, control: str) -> tuple[int, int] | None:
        """Right answers and labels of its own cross-validation."""
        told = self.taught(control)
        return None if told.right is None or told.labels is None else (told.right, told.labels)


def _row_of(model: HeadsModel, vectors: Mapping[str, Vectors]) -> Vectors:
    """Pictures as a model of heads takes them, shape (N, D)."""
    return np.concatenate([np.asarray(vectors[name], np.float32) for name in model.sources], axis=1)


def _while(tasks: Any, until: float) -> Any:
    """Tasks, for as long as there is time: a project may have a hundred thousand."""
    for task in tasks:
        if time.monotonic() > until:
            return
        yield task


def _manifest(
    champion: Live, data: Dataset, lessons: Mapping[str, Lesson], taught: dict[str, Taught]
) -> Manifest:
    """What went into a model, and what was found of it."""
    used = [number for mine in data.examples.values() for example in mine for number in example.annotation_ids]
    return Manifest(
        parent=champion.tag,
        scores={name: lesson.verdict.scores for name, lesson in lessons.items()},
        training={name: lesson.fit for name, lesson in lessons.items()},
        suspects={name: list(lesson.suspects) for name, lesson in lessons.items() if lesson.suspects},
        labels=data.counts,
        digest=data.digest,
        annotations=ranges(used),
        taught=taught,
        tried=champion.base,
    )


def _taught(lesson: Lesson, examples: Sequence[Example]) -> Taught:
    return Taught(
        annotations=ranges(number for example in examples for number in example.annotation_ids),
        right=lesson.verdict.scores.right,
        labels=lesson.verdict.scores.labels,
        sampled=list(lesson.fit.kept),
        said=ranges(lesson.right),
    )


def _reason(lessons: Mapping[str, Lesson], champion: Live) -> str:
    """What became of each control, for people."""
    told = []
    for name, lesson in lessons.items():
        which = f"{name!r}: " if len(lessons) > 1 else ""
        start = "Published" if lesson.verdict.publish else "Kept the old answers"
        told.append(f"{start}: {which}{lesson.verdict.reason}.")
        lost = champion.lost(lesson)
        if lost and lesson.verdict.publish:
            more = f" and {len(lost) - NAMED_MAX} more" * (len(lost) > NAMED_MAX)
            named = ", ".join(map(repr, lost[:NAMED_MAX])) + more
            told.append(f"Not known any more, as no picture of it could be had: {named}. Label some to teach it again.")
        few = lesson.fit.too_few
        if few:
            named = ", ".join(f"{choice!r} ({count})" for choice, count in list(few.items())[:NAMED_MAX])
            told.append(f"Too few labels to learn: {named}.")
        if lesson.suspects:
            told.append(f"Labels to look at again: tasks {', '.join(map(str, lesson.suspects))}.")
    return " ".join(told)


def _few(counts: Counts) -> str:
    told = "; ".join(
        f"{name!r} has {', '.join(f'{choice}: {count}' for choice, count in mine.items()) or 'no label'}"
        for name, mine in (counts.labels or {}).items()
    )
    out = "; ".join(f"{count} pictures {why}" for why, count in (counts.pictures_left_out or {}).items())
    return (
        f"Training needs at least two choices of a control with two labelled pictures each; {told}."
        + (f" Left out: {out}." if out else "") + " Label more pictures."
    )  # fmt: skip


def _nothing_new(tried: Described, live: str) -> str:
    if tried.tag == live:
        return f"Nothing to learn: the live model {live} has learned from these very labels. Label more pictures."
    said = f"Nothing to learn: {tried.tag} was taught these very labels already"
    if tried.manifest.decision == PASSED:
        use = f"python -m celestial_backend models use {tried.tag} --project {tried.project}"
        return f"{said}, and is not live. Make it live with: {use}"
    return f"{said}, and was refused. Label more pictures. ({tried.manifest.reason or ''})"
