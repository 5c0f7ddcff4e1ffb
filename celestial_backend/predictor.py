"""The path from tasks to predictions: pictures side by side, one forward pass per chunk."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celestial_backend.errors import CelestialError, LockedError, RequestError
from celestial_backend.labels import ChoiceMap, Vocabulary, short, value_of
from celestial_backend.metrics import MODEL, PREPARE, Metrics
from celestial_backend.models.classifier import Model
from celestial_backend.models.store import ModelStore
from celestial_backend.pictures.reader import ImageReader
from celestial_backend.settings import CONFIDENCE, NEEDS_LABELS, WITHHOLD, Settings, project_parts

_Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]
logger = logging.getLogger(__name__)
TOLD_MAX = 1000  # label configs whose warnings are remembered as told
FAILURES_TOLD = 20  # of one request, each on a line of the log; the others are counted
CHECK_S = 1.5  # Label Studio gives /setup three seconds, and the machine may be busy with TensorFlow
OUT_OF_TIME, NOT_FINITE = "OutOfTime", "NotFinite"  # causes that are no error's class
LOCKED_S = 300.0  # for which a project is held to be locked, where only locked pictures were asked for
LATE = object()  # in the place of a task whose pictures were not there in time
OnFailure = Callable[[Any, str], None]  # task id, and why it gets no prediction
Inputs = dict[str, NDArray[np.float32] | Exception]  # data key -> prepared picture, batch axis 1, or why there is none


class Predictor:
    """Predicts tasks with the live model; lives as long as the process, safe between threads."""

    def __init__(
        self,
        settings: Settings,
        store: ModelStore,
        images: ImageReader,
        metrics: Metrics,
        missing: Callable[[str], str] = lambda _: "",
    ) -> None:
        """
        Args:
            settings: Of the process.
            store: Whose live models predict.
            images: Reads the pictures.
            metrics: Of the process.
            missing: The labels that a project lacks before it can be predicted, as sentences for the log.
        """
        self._store = store
        self._missing = missing
        self._images = images
        self._metrics = metrics
        self._batch_size = settings.batch_size
        self._withholds = settings.unknown == WITHHOLD
        self._by_lead = settings.score != CONFIDENCE
        self._bench = Workbench(settings)
        # A picture that is here wants a core, and no thread but one; those that are fetched wait elsewhere.
        self._near = FairPool(max(2, os.cpu_count() or 2), "picture")
        self._far = FairPool(settings.fetch_threads, "fetched", spare=max(1, settings.fetch_threads // 4))
        # Somebody who labels waits for a single task; its picture never queues behind those of batches.
        self._single = FairPool(settings.fetch_threads, "single")
        self._told: set[int] = set()
        self._locked: dict[str, float] = {}  # projects whose pictures want a token, and since when

    def check(self, label_config: str, project: str = "") -> None:
        """
        Refuse a label config that no model can serve; log once what the live one serves in part, or not at all.

        Raises:
            LabelConfigError: It cannot be read, or has controls and none of them can be served.
            ModelError: The live model cannot be served.
        """
        started = time.monotonic()
        tag = self._store.live_tag(project)
        vocabulary = self._store.vocabulary(tag, max(0.0, started + CHECK_S - time.monotonic()))
        choices = (vocabulary or Vocabulary()).choices(label_config)
        if vocabulary is None:
            logger.info("What %s can say is not known before it is loaded; the choices are not checked", tag)
            return
        if self._is_new(tag, label_config):
            for warning in choices.warnings:
                logger.warning("%s", warning)
        number = project_parts(project)[0]
        missing = "" if choices.controls else self._missing(number)
        if not choices.controls and self._is_new(project, label_config, missing):
            missing = missing or "It has labels enough; `python -m celestial_backend jobs` tells where its training is."
            logger.warning("Nothing can be predicted in project %s yet. %s", number or "without a number", missing)

    def _is_new(self, *what: str) -> bool:
        """Whether something is to be told for the first time."""
        told = hash(what)
        if told in self._told:
            return False
        if len(self._told) >= TOLD_MAX:
            self._told.clear()
        self._told.add(told)
        return True

    def version(self, label_config: str, project: str = "") -> str:
        """
        The live model's tag, or `NEEDS_LABELS` where it can predict no control of a label config.

        A model of which nobody knows yet what it can say has its tag. Takes some 100 µs.

        Raises:
            LabelConfigError, ModelError: As for `check`.
        """
        tag = self._store.live_tag(project)
        known = self._store.known(tag)
        return tag if known is None or known.choices(label_config).controls else NEEDS_LABELS

    def predict(
        self,
        tasks: Sequence[Any],
        label_config: str,
        deadline: float = math.inf,
        project: str = "",
        on_failure: OnFailure | None = None,
        barred: Mapping[str, Collection[str]] | None = None,
    ) -> list[Any]:
        """
        One answer per task, in order: a prediction, or ``[]`` for a task that failed.

        A task with several pictures fails where none of them can be had; else what is about the
        others is predicted, and the log tells of each that is missing.

        Label Studio drops the whole batch when the counts differ, stores nothing for ``[]``
        and asks for that task again. Each failure is logged with the task's id and its reason.
        Where the live model can predict nothing of the label config, all are ``[]``, and no
        picture is read.

        Args:
            tasks: As Label Studio sends them.
            label_config: Of the tasks' project.
            deadline: On the monotonic clock; tasks whose pictures are not there by then get ``[]``.
            project: Label Studio's number of the project, whose live model predicts all of them.
            on_failure: Told each failure too, in the thread that calls; not those that were late.
            barred: As `ChoiceMap.barred`. What is asked so in addition is not counted.

        Raises:
            LabelConfigError: As for `check`.
            ModelError: There is no model to predict with.
        """
        started = time.monotonic()
        tag = self._store.live_tag(project)
        served = self._served(tag, label_config)
        if served is None:
            logger.info("Predicted none of %d tasks of project %s: %s knows no choice of it", len(tasks),
                        project_parts(project)[0], tag)  # fmt: skip
            return [[] for _ in tasks]
        model, choices = served
        if barred:
            choices = replace(choices, barred=barred)
        far = self._single if len(tasks) == 1 else self._far
        failures = _Failures(self._metrics, on_failure)
        request = _Request(model, choices, deadline, failures, self._near.share(), far.share())
        answers: list[Any] = []
        for chunk, inputs in self._prepared(tasks, request):
            answers += self._answers(chunk, inputs, request)
        left = [LATE] * (len(tasks) - len(answers))
        late = sum(answer is LATE for answer in answers + left)
        failures.summarize()
        self._note_locked(project, failures.locked, answers)
        if late:
            self._metrics.failure("task", OUT_OF_TIME, late)
            logger.warning("%d tasks were not reached in time; retrieve predictions again, and they are next", late)
        answers = [[] if answer is LATE else answer for answer in answers + left]
        failed = answers.count([])
        if not barred:
            self._metrics.tasks(len(tasks) - failed, failed)
        logger.debug(  # at INFO each request has a line already, and each run of a command
            "Predicted %d of %d tasks with %s in %.2f s, %d failed",
            len(tasks) - failed, len(tasks), tag, time.monotonic() - started, failed,
        )  # fmt: skip
        return answers

    def locked(self, project: str) -> bool:
        """Whether each picture of a project that was asked for in the last minutes wants a token that is not there."""
        return time.monotonic() < self._locked.get(project, -math.inf) + LOCKED_S

    def _note_locked(self, project: str, locked: int, answers: Sequence[Any]) -> None:
        if len(self._locked) >= TOLD_MAX:
            self._locked.clear()
        if any(answer is not LATE and answer for answer in answers):
            self._locked[project] = -math.inf  # from now on, as some of its pictures need none
        elif answers and locked == len(answers) and self._locked.get(project) != -math.inf:
            self._locked[project] = time.monotonic()

    def _served(self, tag: str, label_config: str) -> tuple[Model, ChoiceMap] | None:
        """A loaded model and its choices; None, if possible without loading it, where it can predict nothing."""
        known = self._store.known(tag)
        if known is not None and not known.choices(label_config).controls:
            return None
        model = self._store.model(tag)
        choices = model.vocabulary.choices(label_config)
        return (model, choices) if choices.controls else None

    def _prepared(self, tasks: Sequence[Any], request: _Request) -> Iterator[tuple[Sequence[Any], list[Future[Any]]]]:
        """Chunks of tasks with their pictures; the next chunk is read while one is predicted."""
        if len(tasks) == 1:
            yield tasks, [self._at_once(tasks[0], request)]
            return
        waiting: list[tuple[Sequence[Any], list[Future[Any]]]] = []
        for start in range(0, len(tasks), self._batch_size):
            if time.monotonic() >= request.deadline:
                break
            chunk = tasks[start : start + self._batch_size]
            waiting.append((chunk, [request.near.submit(self._near_or_fetched, task, request) for task in chunk]))
            if len(waiting) == 2:
                yield waiting.pop(0)
        yield from waiting

    def _at_once(self, task: Any, request: _Request) -> Future[Any]:
        """A task's pictures, where they are here without another thread: to wake one takes as long as to decode."""
        found: Future[Any] = Future()
        _do(found, self._near_or_fetched, (task, request))
        return found

    def _near_or_fetched(self, task: Any, request: _Request) -> Inputs | Future[Inputs]:
        inputs: Inputs = {}
        for key, data in _pictures(task, request):
            found = self._input_or_error(key, data, self._images.near_file, request)
            if found is None:
                return request.far.submit(self._inputs, task, request, inputs)
            inputs[key] = found
        return inputs

    def _inputs(self, task: Any, request: _Request, ready: Inputs | None = None) -> Inputs:
        inputs, read = dict(ready or {}), partial(self._images.file, task_id=_id(task))
        for key, data in _pictures(task, request):
            if key not in inputs:
                found = self._input_or_error(key, data, read, request)
                if found is not None:
                    inputs[key] = found
        return inputs

    def _input_or_error(
        self, key: str, data: Mapping[str, Any], read: Callable[[object], bytes | None], request: _Request
    ) -> NDArray[np.float32] | Exception | None:
        """A picture of a task as `_input` gives it; an error costs the task's other pictures nothing."""
        try:
            with self._bench.room(request.deadline) as room:
                return self._input(value_of(data, key), read, room, request.model)
        except TimeoutError:
            raise
        except Exception as error:  # noqa: BLE001 - `_pictures_of` tells them apart
            return error

    def _input(
        self, value: object, read: Callable[[object], bytes | None], room: Room, model: Model
    ) -> NDArray[np.float32] | None:
        """A picture as the model takes it; decoded only where it is not remembered; None where `read` gives none."""
        data = read(value)
        if data is None:
            return None
        known = model.key(data)
        found = None if known is None else model.remembered(known)
        if found is None:
            picture = self._images.decoded(value, data, room.take)
            del data
            with self._metrics.stage(PREPARE):
                found = model.prepare(picture, known)
        return found

    def _answers(self, chunk: Sequence[Any], inputs: list[Future[Any]], request: _Request) -> list[Any]:
        model = request.model
        ready = [_pictures_of(task, future, request) for task, future in zip(chunk, inputs, strict=True)]
        rows = [array for prepared in ready if isinstance(prepared, dict) for array in prepared.values()]
        said: Iterator[Any] = iter(self._said(model, rows) if rows else ())
        answers: list[Any] = []
        for task, prepared in zip(chunk, ready, strict=True):
            if not isinstance(prepared, dict):
                answers.append(prepared)
                continue
            said_of = {key: next(said) for key in prepared}
            row_of, strange_of = ({key: each[part] for key, each in said_of.items()} for part in (0, 1))
            if not all(np.isfinite(row).all() for row in row_of.values()):
                request.failures.add(task, NOT_FINITE, f"the model {model.tag} gives no finite probabilities")
                answers.append([])
                continue
            result, score = request.choices.prediction(row_of, strange_of, by_lead=self._by_lead)
            answers.append({"result": result, "score": score, "model_version": model.tag})
        return answers

    def _said(self, model: Model, rows: Sequence[NDArray[np.float32]]) -> Iterator[tuple[Any, Any]]:
        """Of each picture, the probabilities, and how unlike it is to what each head learned."""
        with self._metrics.stage(MODEL):
            probabilities, strange = model.answers(np.concatenate(rows))
        return zip(probabilities, strange if self._withholds else np.zeros_like(strange), strict=True)


@dataclass(frozen=True)
class _Request:
    """What belongs to one request from its first chunk to its last."""

    model: Model
    choices: ChoiceMap
    deadline: float
    failures: _Failures
    near: Share  # threads that read what is here
    far: Share  # those that fetch what is not


class _Failures:
    """What one request could not predict: all is counted, the first of it stands in the log."""

    def __init__(self, metrics: Metrics, on_failure: OnFailure | None) -> None:
        self._metrics = metrics
        self._on_failure = on_failure
        self._causes: Counter[tuple[str, str]] = Counter()
        self._told = 0
        self.locked = 0

    def add(self, task: Any, cause: str, reason: str) -> None:
        """One more task without a prediction."""
        self._count("task", cause, f"Task {_name(task)}: {reason}")
        if self._on_failure is not None:
            self._on_failure(_name(task), reason)

    def of_error(self, task: Any, error: Exception, key: str = "") -> None:
        """An error that cost a task its prediction; with a data key, what would have been said of that picture."""
        foreseen, cause = isinstance(error, CelestialError), type(error).__name__
        reason = str(error) if foreseen else f"unexpected {cause}; the log has more"
        if not foreseen and self._told < FAILURES_TOLD:
            logger.error("Task %s failed unexpectedly", _name(task), exc_info=error)
        if key:
            self._count("picture", cause, f"Task {_name(task)}: nothing is said of its picture {short(key)}: {reason}")
        else:
            self.locked += isinstance(error, LockedError)
            self.add(task, cause, reason)

    def summarize(self) -> None:
        """Say how many there were that the log does not name."""
        for of in ("task", "picture"):
            counts = [(cause, count) for (what, cause), count in self._causes.most_common() if what == of]
            if counts:
                told = ", ".join(f"{count} of {cause}" for cause, count in counts)
                logger.warning("%d more %ss of the request failed: %s", sum(count for _, count in counts), of, told)

    def _count(self, of: str, cause: str, sentence: str) -> None:
        self._metrics.failure(of, cause)
        if self._told < FAILURES_TOLD:
            self._told += 1
            logger.warning("%s", sentence)
        else:
            self._causes[of, cause] += 1


def _pictures_of(task: Any, future: Future[Any], request: _Request) -> Any:
    """A task's prepared pictures, without those that could not be had; ``[]``, and a failure, for none; or `LATE`."""
    prepared = _result_of(task, future, request)
    if not isinstance(prepared, dict):
        return prepared
    errors = {key: each for key, each in prepared.items() if isinstance(each, Exception)}
    if not errors:
        return prepared
    found = {key: each for key, each in prepared.items() if key not in errors}
    for key, error in errors.items() if found else [next(iter(errors.items()))]:
        request.failures.of_error(task, error, key if found else "")
    for error in errors.values():
        _let_go(error)
    return found or []


def _result_of(task: Any, future: Future[Any], request: _Request) -> Any:
    """What the threads found of a task's pictures; ``[]``, and a failure, where it is none; or `LATE`."""
    prepared: Any = future
    try:
        while isinstance(prepared, Future):
            future = prepared
            left = None if request.deadline == math.inf else max(0.0, request.deadline - time.monotonic())
            prepared = future.result(left)
    except TimeoutError:
        future.cancel()
        return LATE
    except Exception as error:  # noqa: BLE001 - a task costs no other its prediction, whatever it was
        request.failures.of_error(task, error)
        _let_go(error)
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


def _pictures(task: Any, request: _Request) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The data keys of a task's pictures, each with the task's data; none any more once the request is over."""
    data = task.get("data") if isinstance(task, Mapping) else None
    if isinstance(data, RequestError):
        raise data
    if not isinstance(data, Mapping):
        raise RequestError("A task must be an object with an object \"data\", as Label Studio sends it.")
    for key in request.choices.data_keys:
        if time.monotonic() >= request.deadline:
            raise TimeoutError
        yield key, data


def _id(task: Any) -> int | None:
    """A task's number; what else stands there goes into no address and into no log."""
    number = task.get("id") if isinstance(task, Mapping) else None
    return number if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63 else None


def _name(task: Any) -> int | str:
    """What a task is called in the log."""
    number = _id(task)
    return "without an id" if number is None else number


class Workbench:
    """
    Bounds the pictures that are decoded and prepared at one moment; safe between threads.

    As many as there are cores: more would only take turns, at a cost. And of the largest that
    the settings allow, two; a picture is let in whatever its size where there is no other.
    """

    def __init__(self, settings: Settings, pictures: int | None = None) -> None:
        self._free = threading.Condition()
        self._pictures, self._pixels = 0, 0
        self._max_pictures = pictures or max(2, os.cpu_count() or 2)
        self._max_pixels = 2e6 * settings.image_max_megapixels

    @contextmanager
    def room(self, deadline: float = math.inf) -> Iterator[Room]:
        """Room for one picture, given back at the end; waited for until a deadline on the monotonic clock."""
        room = Room(self, deadline)
        try:
            yield room
        finally:
            if room.pixels is not None:
                self._leave(room.pixels)

    def _enter(self, pixels: int, deadline: float) -> None:
        with self._free:
            while self._pictures and (
                self._pictures >= self._max_pictures or self._pixels + pixels > self._max_pixels
            ):
                if not self._free.wait(None if deadline == math.inf else max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
            self._pictures += 1
            self._pixels += pixels

    def _leave(self, pixels: int) -> None:
        with self._free:
            self._pictures -= 1
            self._pixels -= pixels
            self._free.notify_all()  # the next in line may not fit, and one behind it may


class Room:
    """What one picture holds of the bench."""

    def __init__(self, bench: Workbench, deadline: float) -> None:
        self._bench = bench
        self._deadline = deadline
        self.pixels: int | None = None

    def take(self, pixels: int) -> None:
        """
        Wait until there is room for so many pixels, and hold it; called once, before decoding.

        Raises:
            TimeoutError: There was none in time.
        """
        self._bench._enter(pixels, self._deadline)
        self.pixels = pixels


class FairPool:
    """
    Threads that requests share fairly; lives as long as the process, safe between threads.

    A thread that is free goes to the request that has the fewest. No request has more than `most`, so
    where there are more threads than that, one that comes later need not wait for an earlier one.
    """

    def __init__(self, most: int, name: str, spare: int = 0) -> None:
        self._most = most
        self._pool = ThreadPoolExecutor(most + spare, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting: list[Share] = []  # those that have work to do
        self._owed = 0  # threads that came free where nobody might have one more

    def share(self) -> Share:
        """What one request has of the threads; lives as long as the request."""
        return Share(self)

    def _add(self, share: Share, call: _Call) -> None:
        with self._lock:
            if not share.calls:
                self._waiting.append(share)
            share.calls.append(call)
        self._pool.submit(self._work)

    def _work(self) -> None:
        with self._lock:
            share = min((one for one in self._waiting if one.running < self._most), key=_running, default=None)
            if share is None:
                self._owed += 1
                return
            call = share.calls.popleft()
            self._waiting.remove(share)
            if share.calls:
                self._waiting.append(share)  # behind those that have as few
            share.running += 1
        _do(*call)
        del call  # else what it gave, and the task's value, live on until the thread has more to do
        with self._lock:
            share.running -= 1
            again, self._owed = self._owed > 0, max(0, self._owed - 1)
        if again:
            self._pool.submit(self._work)


class Share:
    """The calls of one request, done by threads that others use too."""

    def __init__(self, pool: FairPool) -> None:
        self._pool = pool
        self.calls: deque[_Call] = deque()
        self.running = 0

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Let a thread do it; as `Executor.submit`."""
        future: Future[Any] = Future()
        self._pool._add(self, (future, work, args))
        return future


def _running(share: Share) -> int:
    return share.running


def _do(future: Future[Any], work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(work(*args))
        except BaseException as error:  # noqa: BLE001 - whoever waits for it gets it
            future.set_exception(error)
            del future, work, args  # else the error and its frames keep each other alive
