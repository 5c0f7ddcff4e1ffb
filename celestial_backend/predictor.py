"""The path from tasks to predictions: pictures side by side, one forward pass per chunk."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from celestial_backend.admission import Bench, FairPool, Share
from celestial_backend.classifier import Classifier
from celestial_backend.errors import CelestialError, RequestError
from celestial_backend.heap import Heap
from celestial_backend.images import ImageReader
from celestial_backend.labels import ChoiceMap
from celestial_backend.metrics import MODEL, PREPARE, Metrics
from celestial_backend.settings import Settings
from celestial_backend.store import ModelStore

logger = logging.getLogger(__name__)

TOLD_MAX = 1000  # label configs whose warnings are remembered as told
FAILURES_TOLD = 20  # of one request, each on a line of the log; the others are counted
CHECK_S = 1.5  # Label Studio gives /setup three seconds, and the machine may be busy with TensorFlow

OUT_OF_TIME, NOT_FINITE = "OutOfTime", "NotFinite"  # causes that are no error's class
LATE = object()  # in the place of a task whose pictures were not there in time
OnFailure = Callable[[Any, str], None]  # task id, and why it gets no prediction
Inputs = dict[str, NDArray[np.float32]]  # data key -> prepared picture, shape (1, *input_shape)


class Predictor:
    """Predicts tasks with the live model; lives as long as the process, safe between threads."""

    def __init__(self, settings: Settings, store: ModelStore, images: ImageReader, metrics: Metrics) -> None:
        self._store = store
        self._images = images
        self._metrics = metrics
        self._batch_size = settings.batch_size
        self._bench = Bench(settings)
        self._heap = Heap()
        # A picture that is here wants a core, and no thread but one; those that are fetched wait elsewhere.
        self._near = FairPool(max(2, os.cpu_count() or 2), "picture")
        self._far = FairPool(settings.fetch_threads, "fetched", spare=max(1, settings.fetch_threads // 4))
        # Somebody who labels waits for a single task; its picture never queues behind those of batches.
        self._single = FairPool(settings.fetch_threads, "single")
        self._told: set[int] = set()

    def check(self, label_config: str, project: str = "") -> None:
        """
        Refuse a label config that the project's live model cannot serve; log once what it serves only in part.

        A model whose classes are not known in time lets the config pass; `predict` checks again.

        Raises:
            LabelConfigError: No choice is a class of the model; the message holds both lists.
            ModelError: The model cannot be served.
        """
        started = time.monotonic()
        tag = self._store.live_tag(project)
        classes = self._store.classes(tag, max(0.0, started + CHECK_S - time.monotonic()))
        if classes is None:
            logger.info("The classes of %s are not known before it is loaded; the label config is not checked", tag)
            return
        choices = ChoiceMap.from_config(label_config, classes)
        told = hash((tag, label_config))
        if told not in self._told:
            if len(self._told) >= TOLD_MAX:
                self._told.clear()
            self._told.add(told)
            for warning in choices.warnings:
                logger.warning("%s", warning)

    def predict(
        self,
        tasks: Sequence[Any],
        label_config: str,
        deadline: float = math.inf,
        project: str = "",
        on_failure: OnFailure | None = None,
    ) -> list[Any]:
        """
        One answer per task, in order: a prediction, or ``[]`` for a task that failed.

        Label Studio drops the whole batch when the counts differ, stores nothing for ``[]``
        and asks for that task again. Each failure is logged with the task's id and its reason.

        Args:
            tasks: As Label Studio sends them.
            label_config: Of the tasks' project.
            deadline: On the monotonic clock; tasks whose pictures are not there by then get ``[]``.
            project: Label Studio's number of the project, whose live model predicts all of them.
            on_failure: Told each failure too, in the thread that calls; not those that were late.

        Raises:
            LabelConfigError: The label config and the model share no class.
            ModelError: There is no model to predict with.
        """
        started = time.monotonic()
        classifier = self._store.current(project)
        choices = ChoiceMap.from_config(label_config, classifier.classes)
        pool = self._single if len(tasks) == 1 else self._near
        failures = _Failures(self._metrics, on_failure)
        request = _Request(classifier, choices, deadline, failures, pool.share(), self._far.share())
        answers: list[Any] = []
        for chunk, inputs in self._prepared(tasks, request):
            answers += self._answers(chunk, inputs, request)
            self._heap.used(len(chunk))
        left = [LATE] * (len(tasks) - len(answers))
        late = sum(answer is LATE for answer in answers + left)
        failures.summarize()
        if late:
            self._metrics.failure("task", OUT_OF_TIME, late)
            logger.warning("%d tasks were not reached in time; retrieve predictions again, and they are next", late)
        answers = [[] if answer is LATE else answer for answer in answers + left]
        failed = answers.count([])
        self._metrics.tasks(len(tasks) - failed, failed)
        logger.info(
            "Predicted %d of %d tasks with %s in %.2f s, %d failed",
            len(tasks) - failed, len(tasks), classifier.tag, time.monotonic() - started, failed,
        )  # fmt: skip
        return answers

    def _prepared(self, tasks: Sequence[Any], request: _Request) -> Iterator[tuple[Sequence[Any], list[Future[Any]]]]:
        """Chunks of tasks with their pictures; the next chunk is read while one is predicted."""
        waiting: list[tuple[Sequence[Any], list[Future[Any]]]] = []
        work = self._inputs if len(tasks) == 1 else self._near_or_fetched
        for start in range(0, len(tasks), self._batch_size):
            if time.monotonic() >= request.deadline:
                break
            chunk = tasks[start : start + self._batch_size]
            waiting.append((chunk, [request.first.submit(work, task, request) for task in chunk]))
            if len(waiting) == 2:
                yield waiting.pop(0)
        yield from waiting

    def _near_or_fetched(self, task: Any, request: _Request) -> Inputs | Future[Inputs]:
        inputs: Inputs = {}
        for key, value in _values(task, request):
            with self._bench.room() as room:
                picture = self._images.read_near(value, room.take)
                if picture is None:
                    return request.far.submit(self._inputs, task, request, inputs)
                inputs[key] = self._input(picture, request.classifier)
        return inputs

    def _inputs(self, task: Any, request: _Request, ready: Inputs | None = None) -> Inputs:
        inputs = dict(ready or {})
        for key, value in _values(task, request):
            if key not in inputs:
                with self._bench.room() as room:
                    picture = self._images.read(value, _id(task), room.take)
                    inputs[key] = self._input(picture, request.classifier)
        return inputs

    def _input(self, picture: Image.Image, classifier: Classifier) -> NDArray[np.float32]:
        with self._metrics.stage(PREPARE):
            return classifier.prepare(picture)

    def _answers(self, chunk: Sequence[Any], inputs: list[Future[Any]], request: _Request) -> list[Any]:
        classifier = request.classifier
        ready = [_result_of(task, future, request) for task, future in zip(chunk, inputs, strict=True)]
        rows = [array for prepared in ready if isinstance(prepared, dict) for array in prepared.values()]
        probabilities: Iterator[Any] = iter(self._probabilities(classifier, rows) if rows else ())
        answers: list[Any] = []
        for task, prepared in zip(chunk, ready, strict=True):
            if not isinstance(prepared, dict):
                answers.append(prepared)
                continue
            row_of = {key: next(probabilities) for key in prepared}
            if not all(np.isfinite(row).all() for row in row_of.values()):
                request.failures.add(task, NOT_FINITE, f"the model {classifier.tag} gives no finite probabilities")
                answers.append([])
                continue
            result, score = request.choices.prediction(row_of)
            answers.append({"result": result, "score": score, "model_version": classifier.tag})
        return answers

    def _probabilities(self, classifier: Classifier, rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        with self._metrics.stage(MODEL):
            return classifier.probabilities(np.concatenate(rows))


@dataclass(frozen=True)
class _Request:
    """What belongs to one request from its first chunk to its last."""

    classifier: Classifier
    choices: ChoiceMap
    deadline: float
    failures: _Failures
    first: Share  # threads that look at each task
    far: Share  # those that fetch what is not here


class _Failures:
    """The tasks of one request that get no prediction: all are counted and told, the first ones stand in the log."""

    def __init__(self, metrics: Metrics, on_failure: OnFailure | None) -> None:
        self._metrics = metrics
        self._on_failure = on_failure
        self._causes: Counter[str] = Counter()
        self._told = 0

    def add(self, task: Any, cause: str, reason: str, error: Exception | None = None) -> None:
        """One more task; with the error itself where nobody foresaw it."""
        name = _name(task)
        self._metrics.failure("task", cause)
        if self._told < FAILURES_TOLD:
            self._told += 1
            if error is None:
                logger.warning("Task %s: %s", name, reason)
            else:
                logger.error("Task %s failed unexpectedly", name, exc_info=error)
        else:
            self._causes[cause] += 1
        if self._on_failure is not None:
            self._on_failure(name, reason)

    def summarize(self) -> None:
        """Say how many there were that the log does not name."""
        if self._causes:
            counts = ", ".join(f"{count} of {cause}" for cause, count in self._causes.most_common())
            logger.warning("%d more tasks of the request failed: %s", self._causes.total(), counts)


def _result_of(task: Any, future: Future[Any], request: _Request) -> Any:
    """A task's prepared pictures; ``[]``, and a failure, where they could not be had; or `LATE`."""
    prepared: Any = future
    try:
        while isinstance(prepared, Future):
            future = prepared
            left = None if request.deadline == math.inf else max(0.0, request.deadline - time.monotonic())
            prepared = future.result(left)
    except TimeoutError:
        future.cancel()
        return LATE
    except CelestialError as error:
        request.failures.add(task, type(error).__name__, str(error))
        _let_go(error)
    except Exception as error:  # noqa: BLE001 - a task costs no other its prediction, whatever it was
        request.failures.add(task, type(error).__name__, f"unexpected {type(error).__name__}; the log has more", error)
    else:
        return prepared
    finally:
        del future, prepared  # else an error and its frames keep each other alive, and the task's value
    return []


def _let_go(error: BaseException | None) -> None:
    """Drop the frames that an error came through: they and it hold each other, and the whole request."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__


def _values(task: Any, request: _Request) -> Iterator[tuple[str, object]]:
    """The values of a task that name pictures, by data key; none any more once the request is over."""
    data = task.get("data") if isinstance(task, Mapping) else None
    if isinstance(data, RequestError):
        raise data
    if not isinstance(data, Mapping):
        raise RequestError("A task must be an object with an object \"data\", as Label Studio sends it.")
    for key in request.choices.data_keys:
        if time.monotonic() >= request.deadline:
            raise TimeoutError
        yield key, request.choices.value_of(data, key)


def _id(task: Any) -> int | None:
    """A task's number; what else stands there goes into no address and into no log."""
    number = task.get("id") if isinstance(task, Mapping) else None
    return number if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63 else None


def _name(task: Any) -> int | str:
    """What a task is called in the log."""
    number = _id(task)
    return "without an id" if number is None else number

