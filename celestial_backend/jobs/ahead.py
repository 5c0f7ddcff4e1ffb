"""
Predictions before they are asked for: where Label Studio sorts tasks by score, each needs one.

A command does it in a process of its own, one project at a time, after new tasks have come or a model became live.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress

from celestial_backend.jobs.processes import child_environ
from celestial_backend.settings import CONFIDENCE, NEEDS_LABELS, TYPICAL, Settings
from celestial_backend.studio.project import StudioProject

QUIET_S = 5.0  # without another request, before a project is predicted: pictures are uploaded a few at a time
TASKS_MAX = 5_000  # of one run; Label Studio asks for the others when they are opened
NICE = 10  # what people wait for goes first
logger = logging.getLogger(__name__)


class Ahead:
    """Predicts projects ahead, beside what a worker does; safe between threads."""

    def __init__(self, settings: Settings) -> None:
        self._is_wanted, self._has_places = settings.score != CONFIDENCE, settings.score == TYPICAL
        self._gate = threading.Lock()
        self._left: dict[str, tuple[str, int]] = {}  # project -> version and tasks for which it was asked for last
        self._asked: dict[str, float] = {}  # project -> when it was asked for last
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._stopping = threading.Event()

    def look(self, project: StudioProject) -> None:
        """
        Have the tasks of a project predicted soon, where some are to be labelled and the model has not said anything.

        Those that were left when they were predicted last cannot be predicted: they are not tried again and again.

        Raises:
            StudioError: Label Studio did not say.
        """
        if not self._is_wanted:
            return
        number, lacking = project.project_id, project.unpredicted()
        if lacking[0] == NEEDS_LABELS and not self._has_places:
            return
        if lacking[1] and lacking != self._left.get(number):
            self._left[number] = lacking
            self.predict(number)

    def predict(self, project: str) -> None:
        """Have the tasks of a project that nobody has labelled predicted soon, where they are sorted by our scores."""
        if not self._is_wanted:
            return
        with self._gate:
            self._asked[project] = time.monotonic()
            if self._thread is None:
                self._thread = threading.Thread(target=self._go_on, name="ahead", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """End what runs; another worker, or this one when it starts again, begins anew."""
        self._stopping.set()
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                process.terminate()

    def _go_on(self) -> None:
        while not self._stopping.is_set():
            with self._gate:
                if not self._asked:
                    self._thread = None
                    return
                project, at = min(self._asked.items(), key=lambda each: each[1])
                left = at + QUIET_S - time.monotonic()
                if left <= 0:
                    del self._asked[project]
            if left > 0:
                self._stopping.wait(left)
            else:
                self._run(project)

    def _run(self, project: str) -> None:
        command = [sys.executable, "-m", "celestial_backend", "prelabel", "--project", project, "--only-unlabelled",
                   "--limit", str(TASKS_MAX)]  # fmt: skip
        try:
            self._process = process = subprocess.Popen(  # noqa: S603 - our own module
                command, env=child_environ(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process.pid, NICE)
            said = process.communicate()[0].strip().splitlines()
        except OSError as error:
            logger.warning("Project %s is not predicted ahead: %s", project, error.strerror)
            return
        if not self._stopping.is_set():
            told = next((line for line in said if "Error:" in line or "got a prediction" in line), "")
            logger.info("Project %s is predicted ahead, as tasks are sorted by score: %s", project, told)
