"""
Trainings, from the request to the end: written down, queued, run one at a time for each project.

The ledger is the truth, and the queue (Huey) only wakes a worker. Each training runs
in a process of its own, so that its memory goes with it, its time can be bounded, and
nothing that has loaded TensorFlow is ever forked. A lease, which the worker renews as
long as it lives, tells a training that runs from one whose worker was killed.

A person asks for a training, or a look at the labels does. An event only counts labels,
in milliseconds; the worker then asks Label Studio itself, and does so every minute too,
as events may be lost or never sent. It looks in a thread of its own, so that a Label
Studio that is silent holds up no training.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from huey import Huey, crontab
from huey.signals import SIGNAL_INTERRUPTED

from celestial_backend.database import Database, why
from celestial_backend.errors import CelestialError, ProjectGoneError, RequestError, StateError
from celestial_backend.jobs import counting
from celestial_backend.jobs.ahead import Ahead
from celestial_backend.jobs.ledger import (
    FAILED,
    KNOWN_MAX,
    LEASE_S,
    PUBLISHED,
    WAITING,
    WAITING_MAX,
    Ending,
    Job,
    Known,
    Ledger,
)
from celestial_backend.jobs.looker import NOT_CONNECTED, STUDIO_S, Looker
from celestial_backend.jobs.pages import Pages
from celestial_backend.jobs.processes import AGAIN, child_environ, death, this_process
from celestial_backend.jobs.queue import make_queue
from celestial_backend.models.store import ModelStore
from celestial_backend.settings import NEVER, Settings, is_project, no_project, project_parts
from celestial_backend.studio.client import Studio
from celestial_backend.studio.project import StudioProject

logger = logging.getLogger(__name__)

WAKE_S = 0.2  # how long a request waits for the queue: Label Studio gives /webhook one second, the ledger 0.7
SIGN_S = 5.0  # between two signs of life; a lease lasts four of them
ATTEMPTS_MAX = 3  # begun and died: the fourth would die too
LOOK_S = 30.0  # while a worker trains, the looks of every minute pile up
LOOKS_S = 10.0  # in which a worker begins to look at labels, at a message and in a minute; the others have their turn
SLOW_S, REST, REST_MAX_S = 2.0, 2, 10.0  # a look that took longer is not repeated before so many times as long
TIDY_S = 20.0  # for which old predictions are removed, and for which Label Studio is left alone then
KNOW_S = 60.0  # a project is written down as known no more often than this
KNOW_WAIT_S = 0.1  # for the list of jobs, where /setup and /webhook look a project up in it
IMPORTED = "TASKS_CREATED"  # an event of Label Studio
TRAIN = "train"  # the name of the queue's task
MESSAGES = 4  # of that task in the queue; whoever takes one puts in the next
NOBODY_TO_ASK = (
    "Labels are read from Label Studio, which needs LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY. Set both, or run"
    " `connect --new-token`."
)
HOW_TO_START = (
    "Start the backend, or a worker: huey_consumer celestial_backend.worker.huey. Mind the same MODEL_DIR, or the same"
    " CELESTIAL_DATABASE_URL."
)


class Jobs:
    """The trainings of all projects; safe between threads, and nothing is opened before it is asked for."""

    def __init__(self, settings: Settings, database: Database, store: ModelStore, studio: Studio) -> None:
        self.ledger = Ledger(database)
        self.name = ""  # of this worker, from its first sign of life on
        self.beside: list[Callable[[], None]] = []  # what else a worker does every minute; nothing is raised
        self._looker = Looker(settings, store, studio)
        self._ahead = Ahead(settings)
        self._settings = settings
        self._database, self._studio, self._store = database, studio, store
        self._hasty = Ledger(database, KNOW_WAIT_S)
        self._known: dict[str, float] = {}  # projects, and when they were written down
        self._too_many_known = self._looking = False
        self._opening, self._gate = threading.Lock(), threading.Lock()
        self._huey: Huey | None = None
        self._running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
        self._stopping = threading.Event()
        self._looked = -math.inf
        self._patient_until = -math.inf  # with workers that show no life, as the database was away
        self._rounds: set[bool] = set()  # of looks that are asked for: at labels that want one, and at all
        self._enough = 0  # messages that are asked for
        self._ringing: threading.Thread | None = None
        self._resting: dict[str, float] = {}  # projects whose labels took long to read, and until when they rest
        self._timer: threading.Timer | None = None
        self._asked: set[str] = set()  # projects whose new tasks were looked for since this process began
        self._troubles: dict[str, str] = {}  # of projects: labels not read, or what is shown not changed

    def request(self, project: str) -> dict[str, Any]:
        """
        Accept a training that a person asks for; from now on it is run, or shown as failed with its reason.

        Raises:
            RequestError: The project has no number.
            BusyError: Too many projects wait; nothing was accepted.
            StateError: It could not be written down; nothing was accepted.
        """
        if not is_project(project):
            raise RequestError(no_project(project))
        return self._accepted(self.ledger.request(project, pressed=True))

    def note_labels(self, project: str, count: int) -> dict[str, Any]:
        """Count new or changed labels of a project, and wake a worker where they may be enough for a training."""
        if self.ledger.note_labels(project, count, self._wants_look):
            self._wake(1, wait_s=0)
        return {"state": "counted"}

    def missing(self, project: str) -> str:
        """What labels a project lacks before anything can be learned, as a sentence; "" if none. Never raises."""
        if not self._looker.can_ask:
            return NOBODY_TO_ASK
        known = None
        with suppress(StateError):
            known = self._hasty.known(project) if is_project(project) else None
        if known is None or known.missing is None:
            return f"{counting.LEAST.capitalize()}."
        return known.missing

    def knows(self, project: str) -> bool:
        """Whether a project's /setup was accepted before, as far as can be said. Never raises."""
        number, made = project_parts(project)
        try:
            known = self._hasty.known(number) if number else None
        except StateError:
            return True
        return known is not None and (not made or known.made in ("", made))

    def know(self, project: str) -> None:
        """
        Remember a project whose /setup was accepted: its labels are looked at when no event comes. Never raises.

        One that was forgotten is remembered again a minute later, as Label Studio repeats its /setup.

        Args:
            project: As Label Studio sends it. Where it was not made when the known one was, Label Studio is asked.
        """
        now, (number, made) = time.monotonic(), project_parts(project)
        if not number or now < self._known.get(project, -math.inf) + KNOW_S:
            return
        with suppress(StateError):
            before = self._hasty.known(number)
            if self._hasty.know(number):
                strange = made and self._looker.can_ask and made != (before.made if before else "")
                if strange:
                    self._hasty.doubt(number)
                if strange or before is None:
                    self._wake(1, wait_s=0)
            elif not self._too_many_known:
                self._too_many_known = True
                logger.warning("%d projects are remembered, and no more are. Any other trains at its button alone.",
                               KNOWN_MAX)  # fmt: skip
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            self._known[project] = now

    def note_event(self, project: str, action: str) -> None:
        """
        Remember for `doctor` that an event of a project's webhook came just now. Never raises.

        Only for a project that is known: strangers leave nothing behind.
        """
        if action == "START_TRAINING" or not is_project(project):  # which Label Studio sends past the webhook
            return
        with suppress(StateError):
            if self._hasty.note_event(project, look=action == IMPORTED) and action == IMPORTED:
                self._wake(1, wait_s=0)  # tasks may be imported with labels, of which no other event tells

    @property
    def huey(self) -> Huey:
        """The queue, with its tasks; made once, whichever thread asks first."""
        with self._opening:
            if self._huey is None:
                self._huey = self._opened()
            return self._huey

    def _opened(self) -> Huey:
        queue = make_queue(self._settings)
        self._train_task = queue.task(name=TRAIN)(self.run_next)
        queue.periodic_task(crontab(), name="look_after")(self.look_after)
        queue.on_startup(name="begin")(self.begin)
        queue.signal(SIGNAL_INTERRUPTED)(lambda *_: self.stop())
        self._pages = Pages(queue, self._database)
        return queue

    @property
    def pages(self) -> Pages:
        """The pages of tasks that workers predict."""
        self.huey  # noqa: B018 - makes them
        return self._pages

    def begin(self) -> None:
        """Begin to be a worker: show life from now on, and look after what others have left, beside what it does."""
        with self._gate:
            if self.name:
                return
            self.name = this_process()
            try:
                threading.Thread(target=self._live, name="life", daemon=True).start()
            except RuntimeError:  # this machine allows no more threads now
                self.name = ""
                raise

    def run_next(self, *_: object) -> None:
        """
        Run the job that has waited longest, of those that can be run; where none can, have labels looked at.

        Whatever the message says that brought the worker here; those of older releases name a project.
        """
        with _apart("No training can be begun"):
            if not self.run():
                self._look_beside(wanted=True)

    def run(self, project: str | None = None) -> bool:
        """Run the job that has waited longest, or that of a project, to its end, and say whether there was one."""
        self.begin()
        job = None if self._stopping.is_set() else self.ledger.start(self.name, project)
        if job is None:
            return False
        self._pass_on()
        self._train(job)
        ended = self.ledger.job(job.id)
        if ended is not None and ended.gone:
            self._forget(job.project)
        if ended is not None and ended.state == PUBLISHED:
            self._ahead.predict(job.project)
        if ended is not None and ended.state == PUBLISHED and not self._settings.keep_predictions:
            threading.Thread(target=self._tidy, args=(job.project,), name="tidy", daemon=True).start()
        self._pass_on()
        return True

    def confirm(self, project: StudioProject, by: str = "") -> None:
        """
        Ask Label Studio when a project was made: another one of the same number begins without a model of its own.

        Args:
            project: Of Label Studio.
            by: The job for which that is asked, which has read no labels yet.

        Raises:
            ProjectGoneError: It has no such project.
            CelestialError: It did not say, or that cannot be written down.
        """
        number, made = project.project_id, project.made()
        known = self.ledger.known(number)
        if not made or (known is not None and known.made == made and not known.doubted):
            return
        if self.ledger.confirm(number, made, by):
            logger.warning("Project %s is not the one that had this number before: Label Studio was set up again, or is"
                           " another one. That one's model is not live any more.", number)  # fmt: skip

    def tell(self, job: Job, tag: str, patience_s: float | None = None) -> None:
        """Bring Label Studio in step with the model that a job has published; the model is live even if that fails."""
        project = StudioProject(self._studio, job.project, *(() if patience_s is None else (patience_s,)))
        try:
            said = " ".join(project.in_step(tag, keep_predictions=self._settings.keep_predictions))
        except CelestialError as error:
            said = f"Label Studio could not be told: {error}"
        self.ledger.told(job, said)

    def look(self, project: str) -> None:
        """
        Ask Label Studio for a project's labels, and for a training if they are enough; write down what is missing.

        Not while a training waits or runs, which reads all labels itself, nor while another worker looks.

        Raises:
            CelestialError: Label Studio did not say, or there is no model; all is as before.
        """
        begun = time.monotonic()
        rest = self._resting.get(project, -math.inf) - begun
        if rest > 0:
            self._wake_later(rest)
            return
        try:
            self._look(project)
        except ProjectGoneError:
            self._forget(project)
        spent = time.monotonic() - begun
        if spent > SLOW_S:
            self._resting[project] = begun + spent + min(REST * spent, REST_MAX_S)

    def look_after(self) -> None:
        """
        Bring everything that was accepted to its end; run at the start of a worker and every minute.

        What waits is queued again, and Label Studio is asked, beside all that, for the labels whose events were lost,
        and told of the models of which it does not know.
        """
        if time.monotonic() < self._looked + LOOK_S:
            return
        with _apart("What others have left cannot be looked after"):
            self._recover()
            self._pass_on()
            self._look_beside(wanted=False)
            self._looked = time.monotonic()

    def stop(self) -> None:
        """End the trainings of this worker, as at a SIGTERM; they wait again, as if they had not been begun."""
        self._stopping.set()
        self._ahead.stop()
        for job, process in list(self._running.values()):
            self._break_off(job, process)
        with suppress(StateError):
            self.ledger.leave(self.name)

    def _break_off(self, job: Job, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        with _apart(f"The training of project {job.project} begins again when its lease has run out"):
            self._settle(job, "", begun=False)

    def _live(self) -> None:
        """Show life, and see to the jobs of workers that show none, until this worker ends."""
        trouble = None
        while not self._stopping.is_set():
            with _apart("This worker cannot show that it lives", trouble) as caught:
                for job in self.ledger.show_life(self.name, [job for job, _ in list(self._running.values())]):
                    self._drop(job)
                self._recover()
                if self._looked < 0:
                    self.look_after()
            trouble = caught.said or None
            if trouble:  # the others could show no life either
                self._patient_until = time.monotonic() + LEASE_S
            self._stopping.wait(SIGN_S)

    def _drop(self, job: Job) -> None:
        """End the process of a job that is another worker's by now, or has ended."""
        _, process = self._running.get(job.id, (job, None))
        found = self.ledger.job(job.id)
        if process is not None and (found is None or not found.ended):
            logger.warning("Job %s is another worker's by now, and ends here.", job.id)
            process.kill()

    def _recover(self) -> None:
        """See to the jobs that are said to run, and whose workers show no life."""
        if time.monotonic() < self._patient_until:
            return
        for job in self.ledger.lost():
            with _apart(f"The training of project {job.project} cannot be looked after"):
                self._settle(job, "Its worker was ended while it ran.", lost=True)
                self._pass_on()

    def _settle(self, job: Job, why: str, *, begun: bool = True, again: bool = True, lost: bool = False) -> None:
        """
        Bring a job whose process is gone to where it belongs; one that ended by itself stays as it is.

        Args:
            job: As it was started.
            why: A sentence: what its process died of.
            begun: Whether this attempt counts.
            again: Whether another attempt may do better.
            lost: As for `Ledger.end`.
        """
        shutil.rmtree(self._settings.state.job(job.id), ignore_errors=True)
        if begun and (job.attempts >= ATTEMPTS_MAX or not again):
            times = f"It was begun {job.attempts} times. " if job.attempts > 1 else ""
            said = f"{why} {times}The worker's log tells more."
            if self.ledger.end(job, Ending(FAILED, said), lost=lost):
                logger.error("Job %s failed: %s", job.id, said)
        elif self.ledger.give_back(job, begun=begun, lost=lost):
            logger.warning("Job %s waits again. %s", job.id, why)

    def _accepted(self, job: Job) -> dict[str, Any]:
        if job.requests == 1:  # what was merged into a job waits with it
            self._wake(MESSAGES)
        return {"job": job.id, "state": job.state, "requests": job.requests}

    def _pass_on(self) -> None:
        """Wake another worker where more jobs wait, or labels want a look."""
        with suppress(StateError):  # the next look makes up for it
            waiting = len(self.ledger.jobs(states=(WAITING,), limit=MESSAGES)) or bool(self.ledger.looks(wanted=True))
            if waiting:
                self._wake(waiting)

    def _wake(self, enough: int, wait_s: float = WAKE_S) -> None:
        """Wake a worker, in the background if it takes long; where that fails, he finds in the ledger what waits."""
        with self._gate:
            self._enough = max(self._enough, enough)
            if self._ringing is None:  # one at a time, as a queue that hangs would keep them all
                thread = threading.Thread(target=self._ring, name="wake", daemon=True)
                with suppress(RuntimeError):  # this machine allows no more threads now
                    thread.start()
                    self._ringing = thread
            ringing = self._ringing
        if ringing is not None:
            ringing.join(wait_s)

    def _ring(self) -> None:
        """Put messages into the queue as long as any are asked for."""
        while True:
            with self._gate:
                enough, self._enough = self._enough, 0
                if not enough:
                    self._ringing = None
                    return
            self._enqueue(enough)

    def _wake_later(self, seconds: float) -> None:
        """Wake a worker once a project has rested; one timer at a time, as it looks at all that want it."""
        if self._timer is None or not self._timer.is_alive():
            self._timer = threading.Timer(seconds, self._wake, (1,))
            self._timer.daemon = True
            self._timer.start()

    def _enqueue(self, enough: int) -> None:
        """Put a message into the queue, unless enough are there."""
        try:
            there = sum(f'.{TRAIN}"'.encode() in bytes(message) for message in self.huey.storage.enqueued_items())
            if there < enough:
                self.huey.enqueue(self._train_task.s())
        except Exception as error:  # noqa: BLE001 - whatever the queue's client raises, the request is written down
            logger.warning("The queue cannot be reached (%s); the worker looks at the list of jobs every minute.",
                           why(error))  # fmt: skip

    def _train(self, job: Job) -> None:
        logger.info("Job %s trains project %s, attempt %d", job.id, job.project, job.attempts)
        command = [sys.executable, "-m", "celestial_backend.worker.training", job.id, job.token, str(os.getpid())]
        process = subprocess.Popen(  # noqa: S603 - our own module
            command, env=child_environ(), stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._running[job.id] = job, process
        if self._stopping.is_set():  # by now, and who stops may not have seen it
            self._break_off(job, process)
        limit, in_time = self._settings.train_max_s, True
        deadline = time.monotonic() + limit
        try:
            self._mark(job.project)
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                in_time = False
            late = f"It took longer than the {limit:g} seconds of CELESTIAL_TRAIN_MAX_S."
            self._see_to_end(job, death(process.returncode) if in_time else late, process.returncode, again=in_time)
        finally:
            del self._running[job.id]

    def _see_to_end(self, job: Job, why: str, code: int, *, again: bool) -> None:
        """Settle a job whose process has ended, as soon as the database is there."""
        begun = code != AGAIN
        while not self._stopping.is_set():
            try:
                self._settle(job, why if begun else "The database was away.", begun=begun, again=again)
            except StateError as error:
                logger.warning("%s", error)
                self._stopping.wait(SIGN_S)
            else:
                return

    def _mark(self, project: str) -> None:
        """Remember which labels there are as a training begins."""
        with _apart(f"The labels of project {project} cannot be counted"):
            self.ledger.trained(project, *StudioProject(self._studio, project, patience_s=0).labels_now())

    def _wants_look(self, known: Known) -> bool:
        """Whether labels that came may bring a training about, or change what is missing; Label Studio knows."""
        if known.missing != "":
            return True
        every = self._settings.train_every
        enough = counting.enough_new(known.trained_labels or 0, every)
        return every != NEVER and not known.brought and known.labels >= enough

    def _look_beside(self, *, wanted: bool) -> None:
        """Have labels looked at in a thread of its own, one round after the other; who asks does not wait for it."""
        with self._gate:
            self._rounds.add(wanted)
            if not self._looking:
                threading.Thread(target=self._look_on, name="look", daemon=True).start()
                self._looking = True

    def _look_on(self) -> None:
        """Look as long as rounds are asked for; what they find wakes a worker."""
        while True:
            with self._gate:
                if not self._rounds:
                    self._looking = False
                    return
                wanted = self._rounds.pop()
            with _apart("Labels cannot be looked at"):
                if not wanted:
                    self._tell_untold()
                    for work in self.beside:
                        work()
                self._look_round(wanted=wanted)
            if not wanted:
                self._pass_on()

    def _tell_untold(self) -> None:
        """Tell Label Studio of the models whose trainings ended before they could."""
        for job in self.ledger.untold():
            with _apart(f"Label Studio cannot be told of the model of project {job.project}"):
                self.tell(job, job.manifest.tag or "", STUDIO_S)

    def _look_round(self, *, wanted: bool) -> None:
        """Look at the labels of all projects, or of those that want it, while there is time and somebody to ask."""
        deadline = time.monotonic() + LOOKS_S
        for project in self.ledger.looks(wanted=wanted) if self._looker.can_ask else ():
            full = len(self.ledger.jobs(states=(WAITING,))) >= WAITING_MAX
            if full or time.monotonic() > deadline or self._stopping.is_set():
                return
            known = self._troubles.pop(project, None)
            with _apart(f"The labels of project {project} cannot be counted", known) as trouble:
                self.look(project)
            if trouble.said:
                self._troubles[project] = trouble.said

    def _look(self, project: str) -> None:
        """Look at a project's labels; what was found is dropped where a training was asked for meanwhile."""
        known = self.ledger.known(project)
        if known is not None and (known.doubted or not known.made):
            self.confirm(self._looker.project(project))
        if known is not None and (known.look or project not in self._asked):
            self._ask_for_new_tasks(project)
        last = self._last_job(project)
        known = None if last is not None and not last.ended else self.ledger.look(project)
        if known is None:
            return
        try:
            found = self._looker.look(known, last)
        finally:
            self.ledger.let_look(project)
        if found is None or self._last_job(project) != last:
            return
        if found.brought == NOT_CONNECTED and known.brought != NOT_CONNECTED:
            logger.warning("Project %s: %s", project, NOT_CONNECTED)
        self.ledger.looked(project, labels=found.labels, missing=found.missing, brought=found.brought)
        if found.enough:
            logger.info("Project %s has enough labels for a training", project)
            self._accepted(self.ledger.request(project))
        if found.brought != NOT_CONNECTED:  # which nobody tells of when it changes
            self._looker.remember(project, found)

    def _ask_for_new_tasks(self, project: str) -> None:
        """Have the live model predict tasks that have come; whatever comes of it, labels are looked at."""
        shown = f"{project} shown"
        with _apart(f"What project {project} shows cannot be changed", self._troubles.pop(shown, None)) as trouble:
            self._looker.project(project).ask_for_new_tasks()
            self._ahead.look(self._looker.project(project))
            self._asked.add(project)
        if trouble.said:
            self._troubles[shown] = trouble.said

    def _last_job(self, project: str) -> Job | None:
        return next(iter(self.ledger.jobs(project, limit=1)), None)

    def _tidy(self, project: str) -> None:
        """Go on removing the predictions that a published training has replaced, as long as there are some."""
        with _apart(f"Old predictions of project {project} are not removed now"):
            studio = StudioProject(self._studio, project, STUDIO_S)
            while studio.remove_replaced(self._store.live_tag(project), TIDY_S).some_left:
                if self._stopping.wait(TIDY_S):
                    return

    def _forget(self, project: str) -> None:
        """Forget a project that Label Studio does not have; its jobs and its model stay."""
        logger.warning("Label Studio has no project %s for us, so it is forgotten until its next /setup", project)
        self.ledger.forget(project)
        self._known.pop(project, None)


class _Trouble:
    """What went wrong apart; "" if nothing did."""

    said = ""


@contextmanager
def _apart(trouble: str, known: str | None = None) -> Iterator[_Trouble]:
    """Keep whatever goes wrong with one project from all others; the log tells it, unless it is known already."""
    caught = _Trouble()
    try:
        yield caught
    except CelestialError as error:
        caught.said = str(error)
        if caught.said != known:
            logger.warning("%s: %s", trouble, error)
    except Exception:  # whatever it is, the others go on
        logger.exception("%s", trouble)
