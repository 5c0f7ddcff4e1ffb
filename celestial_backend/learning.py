"""
One training of one project, from its labels to the live model, or to the reason why there is none.

Nothing that is served changes before the last step, and that step is one: the new
model is whole in the store, compared with the live one, and then one small file is
replaced.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celestial_backend import contest, finetune
from celestial_backend.classifier import Classifier, Parts, load, read_parts
from celestial_backend.collect import Collection, ProjectExample, collect
from celestial_backend.errors import CelestialError, ModelLoadError, StateError
from celestial_backend.examples import Example, rendered
from celestial_backend.images import ImageReader
from celestial_backend.labels import ChoiceMap
from celestial_backend.ledger import KEPT, PUBLISHED, Job, Ledger
from celestial_backend.project import StudioProject
from celestial_backend.registry import Described
from celestial_backend.settings import Settings
from celestial_backend.store import ModelStore
from celestial_backend.studio import Studio
from celestial_backend.tags import project_of, project_tag
from celestial_backend.teaching import Progress

logger = logging.getLogger(__name__)

JUDGED_PER_CLASS = 20  # freshly drawn pictures of each old class that the renderer knows
JUDGE_SEED = 977_001  # no training draws with it
TIME_FOR_LEARNING = 0.8  # of CELESTIAL_TRAIN_MAX_S; the rest is for comparing and saving
REPORT_S = 1.0
BATCH = 64  # pictures in memory while comparing
SAVED_APART = 1e-4
PASSED = "passed"


@dataclass(frozen=True)
class Outcome:
    """How a job ends: its state, the reason for people, and the tag and scores if there are any."""

    state: str
    reason: str
    facts: dict[str, Any] = field(default_factory=dict)


class Learner:
    """Trains projects; one per process, used by one thread."""

    def __init__(
        self, settings: Settings, store: ModelStore, studio: Studio, images: ImageReader, ledger: Ledger
    ) -> None:
        self._settings = settings
        self._store = store
        self._studio = studio
        self._images = images
        self._ledger = ledger
        self._reported = ("", 0.0)
        self._began = time.monotonic()

    def learn(self, job: Job, folder: Path) -> Outcome:
        """
        Train the project's live model on the project's labels, and publish what comes of it if it is not worse.

        Args:
            job: It runs; where it is stands in the ledger from now on.
            folder: An empty one for the pictures; whoever made it removes it.

        Raises:
            CelestialError: There is no new model, and the message says why.
        """
        deadline = time.monotonic() + TIME_FOR_LEARNING * self._settings.train_max_s
        self._report(job, "reading the live model")
        parent = read_parts(self._store.live_tag(job.project))
        champion = Classifier(parent)
        project = StudioProject(self._studio, job.project)
        collection = self._collect(job, project, champion, folder)
        tried = self._tried(job, parent.tag, collection)
        if tried is not None:
            return Outcome(KEPT, _nothing_new(tried, parent.tag), {"labels": collection.counts})
        candidate = self._train(job, parent, champion, collection, deadline)
        self._report(job, "comparing")
        tag = project_tag(job.project, job.id)
        challenger = Classifier(candidate.parts(tag))
        verdict = _judge(champion, challenger, collection)
        facts = self._manifest(job, parent.tag, collection, candidate, verdict)
        self._report(job, "saving")
        candidate.network.save(folder / "network", zipped=False, include_optimizer=False)
        self._store.registry.remove(tag)  # left by an attempt that was killed
        self._store.registry.add(tag, folder / "network", candidate.preprocess, candidate.postprocess, facts)
        _check_saved(challenger, collection.held_out[:BATCH])
        outcome = Outcome(PUBLISHED if verdict.publish else KEPT, verdict.reason, {"tag": tag} | facts)
        if verdict.publish:
            outcome = self._publish(job, project, parent.tag, outcome)
        self._store.prune(job.project)
        return outcome

    def _collect(self, job: Job, project: StudioProject, champion: Classifier, folder: Path) -> Collection:
        """The project's labels as examples; what was read is remembered, however the training ends."""
        self._report(job, "reading labels")
        pictures = folder / "pictures"
        pictures.mkdir(parents=True)
        collection = collect(
            project.labelled_tasks(),
            ChoiceMap.for_learning(project.label_config(), champion.classes),
            self._images,
            pictures,
            project_id=job.project,
            known=champion.classes,
            accepted_weight=self._settings.accepted_weight,
            threads=self._settings.fetch_threads,
            probabilities=lambda some: champion.probabilities(np.concatenate([champion.prepare(one) for one in some])),
            wait=project.label_config,
            report=lambda done, total: self._report(job, "reading pictures", pictures=done, of=total),
        )
        if collection.newest:
            self._ledger.read_until(job.project, collection.newest)
        return collection

    def _tried(self, job: Job, parent: str, collection: Collection) -> Described | None:
        """The live model, or a refused one that was taught by it, if it comes of the very same labels."""
        for model in self._store.registry.models():
            if project_of(model.tag) != job.project or parent not in (model.tag, model.parent):
                continue
            told = model.metadata
            if (told.get("digest"), told.get("from_scratch"), told.get("accepted_weight")) == (
                collection.digest, job.from_scratch, self._settings.accepted_weight
            ):  # fmt: skip
                return model
        return None

    def _train(
        self, job: Job, parent: Parts, champion: Classifier, collection: Collection, deadline: float
    ) -> finetune.Candidate:
        def show(at: Progress) -> None:
            where = {name: value for name, value in asdict(at).items() if name != "seconds" and value is not None}
            self._report(job, "learning", **where)

        if job.from_scratch:
            named = {example.class_name for example in (*collection.learn, *collection.held_out)}
            classes = [name for name in collection.classes if name in named]
            return finetune.from_scratch(classes, collection.learn, deadline=deadline, progress=show)
        return finetune.finetune(
            parent, champion.classes, collection.classes, collection.learn, deadline=deadline, progress=show
        )

    def _manifest(
        self, job: Job, parent: str, collection: Collection, candidate: finetune.Candidate, verdict: contest.Verdict
    ) -> dict[str, Any]:
        """Everything that went into a model and was found of it; with the same labels it can be made again."""
        return {
            "classes": list(candidate.classes),
            "project": job.project,
            "job": job.id,
            "parent": parent,
            "from_scratch": job.from_scratch,
            "decision": PASSED if verdict.publish else "refused",
            "reason": verdict.reason,
            "scores": verdict.scores,
            "labels": collection.counts,
            "digest": collection.digest,
            "annotations": collection.annotation_ids,
            "accepted_weight": self._settings.accepted_weight,
            "training": candidate.facts,
        }

    def _publish(self, job: Job, project: StudioProject, parent: str, outcome: Outcome) -> Outcome:
        """Replace the pointer, and bring Label Studio in step; the model is live even if that fails."""
        self._report(job, "publishing")
        tag = outcome.facts["tag"]
        if not self._store.publish(job.project, tag, job=job.id, instead_of=parent):
            said = f"Kept out: {parent} was live when the training began, and another model is now. Train again."
            return replace(outcome, state=KEPT, reason=said)
        self._report(job, "telling Label Studio")
        try:
            said = " ".join(project.show_version(tag))
        except CelestialError as error:
            said = f"Label Studio could not be told: {error}"
        return replace(outcome, reason=f"{outcome.reason} {said}")

    def _report(self, job: Job, stage: str, **where: Any) -> None:
        """Write down where the job is: every new stage, and within one at most once a second."""
        before, at = self._reported
        if stage != before or time.monotonic() > at + REPORT_S:
            self._reported = (stage, time.monotonic())
            try:
                self._ledger.progress(job.id, stage=stage, seconds=round(time.monotonic() - self._began), **where)
            except StateError as error:
                logger.warning("%s", error)


def _nothing_new(tried: Described, parent: str) -> str:
    if tried.tag == parent:
        return f"Nothing to learn: the live model {parent} has learned from these very labels. Label more pictures."
    said = f"Nothing to learn: {tried.tag} was taught these very labels already"
    if tried.metadata.get("decision") == PASSED:
        use = f"python -m celestial_backend models use {tried.tag} --project {tried.project}"
        return f"{said}, and is not live. Make it live with: {use}"
    return f"{said}, and was refused. Label more pictures. ({tried.metadata.get('reason', '')})"


def _check_saved(challenger: Classifier, examples: Sequence[Example]) -> None:
    """Read the new model from the store as a web process will, and see that it says the same."""
    bench = _bench(challenger, load(challenger.tag), examples)
    apart = float(np.abs(bench.champion - bench.challenger).max())
    if apart > SAVED_APART:
        raise ModelLoadError(
            f"{challenger.tag} must say from the store what it said before it was saved, and its probabilities are "
            f"up to {apart:.2g} apart. It was not published."
        )


def _judge(champion: Classifier, challenger: Classifier, collection: Collection) -> contest.Verdict:
    """Show both models the same pictures: held-out ones, learned ones, and freshly drawn old bodies."""
    drawn = rendered(champion.classes, JUDGED_PER_CLASS, JUDGE_SEED)
    known = [example for example in drawn if example.class_name in challenger.classes]
    held_out, learned = (_bench(champion, challenger, some) for some in (collection.held_out, collection.learn))
    return contest.judge(
        champion.classes, challenger.classes, held_out, _bench(champion, challenger, known) if known else None, learned
    )


def _bench(champion: Classifier, challenger: Classifier, examples: Sequence[Example]) -> contest.Bench:
    """What both say of the same pictures; some are in memory at a time."""
    said: tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]] = ([], [])
    for start in range(0, len(examples), BATCH):
        pictures = [example.load() for example in examples[start : start + BATCH]]
        for model, rows in zip((champion, challenger), said, strict=True):
            rows.append(model.probabilities(np.concatenate([model.prepare(picture) for picture in pictures])))
    tasks = [example.task_ids[0] for example in examples if isinstance(example, ProjectExample)]
    truths = [example.class_name for example in examples]
    return contest.Bench(truths, np.concatenate(said[0]), np.concatenate(said[1]), tasks)
