"""The path from tasks to predictions: pictures side by side, one forward pass per chunk."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from celestial_backend.admission import Bench
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
        self._near = ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="picture")
        self._far = ThreadPoolExecutor(settings.fetch_threads, thread_name_prefix="fetched")
        # Somebody who labels waits for a single task; its picture never queues behind those of batches.
        self._single = ThreadPoolExecutor(settings.fetch_threads, thread_name_prefix="single")
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
        answers: list[Any] = []
        for chunk, inputs in self._prepared(tasks, classifier, choices, deadline):
            answers += self._answers(chunk, inputs, classifier, choices, deadline, on_failure)
            self._heap.used(len(chunk))
        left = [LATE] * (len(tasks) - len(answers))
        late = sum(answer is LATE for answer in answers + left)
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

    def _prepared(
        self, tasks: Sequence[Any], classifier: Classifier, choices: ChoiceMap, deadline: float
    ) -> Iterator[tuple[Sequence[Any], list[Future[Any]]]]:
        """Chunks of tasks with their pictures; the next chunk is read while one is predicted."""
        chunks = [tasks[i : i + self._batch_size] for i in range(0, len(tasks), self._batch_size)]
        waiting: list[tuple[Sequence[Any], list[Future[Any]]]] = []
        single = len(tasks) == 1
        pool, work = (self._single, self._inputs) if single else (self._near, self._near_or_fetched)
        for chunk in chunks:
            if time.monotonic() >= deadline:
                break
            waiting.append((chunk, [pool.submit(work, task, classifier, choices) for task in chunk]))
            if len(waiting) == 2:
                yield waiting.pop(0)
        yield from waiting

    def _near_or_fetched(self, task: Any, classifier: Classifier, choices: ChoiceMap) -> Inputs | Future[Inputs]:
        inputs: Inputs = {}
        for key, value in _values(task, choices):
            with self._bench.room() as room:
                picture = self._images.read_near(value, room.take)
                if picture is None:
                    return self._far.submit(self._inputs, task, classifier, choices, inputs)
                inputs[key] = self._input(picture, classifier)
        return inputs

    def _inputs(self, task: Any, classifier: Classifier, choices: ChoiceMap, ready: Inputs | None = None) -> Inputs:
        inputs = dict(ready or {})
        for key, value in _values(task, choices):
            if key not in inputs:
                with self._bench.room() as room:
                    inputs[key] = self._input(self._images.read(value, _id(task), room.take), classifier)
        return inputs

    def _input(self, picture: Image.Image, classifier: Classifier) -> NDArray[np.float32]:
        with self._metrics.stage(PREPARE):
            return classifier.prepare(picture)

    def _answers(
        self,
        chunk: Sequence[Any],
        inputs: list[Future[Any]],
        classifier: Classifier,
        choices: ChoiceMap,
        deadline: float,
        on_failure: OnFailure | None,
    ) -> list[Any]:
        pairs = zip(chunk, inputs, strict=True)
        ready = [self._result_of(task, future, deadline, on_failure) for task, future in pairs]
        rows = [array for prepared in ready if isinstance(prepared, dict) for array in prepared.values()]
        probabilities: Iterator[Any] = iter(self._probabilities(classifier, rows) if rows else ())
        answers: list[Any] = []
        for task, prepared in zip(chunk, ready, strict=True):
            if not isinstance(prepared, dict):
                answers.append(prepared)
                continue
            row_of = {key: next(probabilities) for key in prepared}
            if not all(np.isfinite(row).all() for row in row_of.values()):
                self._metrics.failure("task", NOT_FINITE)
                _failed(_name(task), f"the model {classifier.tag} gives no finite probabilities", on_failure)
                answers.append([])
                continue
            result, score = choices.prediction(row_of)
            answers.append({"result": result, "score": score, "model_version": classifier.tag})
        return answers

    def _probabilities(self, classifier: Classifier, rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        with self._metrics.stage(MODEL):
            return classifier.probabilities(np.concatenate(rows))

    def _result_of(self, task: Any, future: Future[Any], deadline: float, on_failure: OnFailure | None) -> Any:
        """A task's prepared pictures; ``[]``, and a line in the log, where they could not be had; or `LATE`."""
        name, prepared = _name(task), future
        try:
            while isinstance(prepared, Future):
                future = prepared
                prepared = future.result(None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            future.cancel()
            return LATE
        except CelestialError as error:
            _failed(name, str(error), on_failure)
            self._metrics.failure("task", type(error).__name__)
        except Exception as error:
            logger.exception("Task %s failed unexpectedly", name)
            self._metrics.failure("task", type(error).__name__)
            if on_failure is not None:
                on_failure(name, f"unexpected {type(error).__name__}; the log has more")
        else:
            return prepared
        return []


def _values(task: Any, choices: ChoiceMap) -> Iterator[tuple[str, object]]:
    """The values of a task that name pictures, by data key."""
    data = task.get("data") if isinstance(task, Mapping) else None
    if not isinstance(data, Mapping):
        raise RequestError("A task must be an object with an object \"data\", as Label Studio sends it.")
    return ((key, choices.value_of(data, key)) for key in choices.data_keys)


def _id(task: Any) -> int | None:
    """A task's number; what else stands there goes into no address and into no log."""
    number = task.get("id") if isinstance(task, Mapping) else None
    return number if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63 else None


def _name(task: Any) -> int | str:
    """What a task is called in the log."""
    number = _id(task)
    return "without an id" if number is None else number


def _failed(name: Any, reason: str, on_failure: OnFailure | None) -> None:
    logger.warning("Task %s: %s", name, reason)
    if on_failure is not None:
        on_failure(name, reason)
