"""
Whether Label Studio is there and accepts the token: asked in the background, and remembered for a while.

A backend that cannot read pictures or labels answers like any other, so this is what its log, its /setup and `doctor`
say of it.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, replace
from typing import Literal

from celestial_backend.errors import StudioError, TokenError
from celestial_backend.settings import Settings
from celestial_backend.studio.client import Studio

State = Literal["unknown", "accepted", "refused", "no token", "silent", "no address"]
GOOD_S, BAD_S = 60.0, 5.0  # how long what was found is taken as true
ANSWER_S = 5.0
LOOK_S = 0.8  # for a project's first tasks
FIRST = 20  # tasks
HOW_TO_GIVE_IT = (
    "Run `python -m celestial_backend connect --new-token`, which asks for it; or set LABEL_STUDIO_URL and"
    " LABEL_STUDIO_API_KEY, and start the backend again."
)
KEYLESS = (
    "The backend has no token of Label Studio (LABEL_STUDIO_API_KEY), so it can read neither labels nor pictures there."
    f" {HOW_TO_GIVE_IT}"
)
NOWHERE = (
    "The backend is not told where Label Studio is, so it can read neither labels nor pictures there."
    f" {HOW_TO_GIVE_IT}"
)
UNKNOWN_YET = "Label Studio has not answered yet."


@dataclass(frozen=True)
class Standing:
    """How the backend stands with Label Studio, and the sentence for people, with a remedy where one is needed."""

    state: State
    sentence: str

    @property
    def needs_token(self) -> bool:
        """Whether the token is what is wrong."""
        return self.state in ("refused", "no token", "no address")


class Access:
    """Asks how the backend stands with Label Studio; one per process, safe between threads, a fork may follow."""

    def __init__(self, settings: Settings, studio: Studio) -> None:
        self._settings, self._studio = settings, studio
        self._lock = threading.Lock()
        self._found = Standing("unknown", UNKNOWN_YET)
        self._found_at = -math.inf
        self._asking: threading.Event | None = None

    def standing(self, wait_s: float) -> Standing:
        """What was found last; where that is old it is asked anew, and waited for at most so long."""
        if not self._settings.label_studio_url:
            return Standing("no address", NOWHERE)
        with self._lock:
            good = self._found.state == "accepted"
            if self._asking is None and self._found_at + (GOOD_S if good else BAD_S) < time.monotonic():
                self._asking = threading.Event()
                threading.Thread(target=self._ask, args=(self._asking,), daemon=True, name="access").start()
            asking = self._asking
        if asking is not None and not good:  # a good token is not doubted while it is asked about
            asking.wait(wait_s)
        return self._found

    def first_tasks(self, project: str, token: str) -> list[dict[str, object]] | None:
        """
        The data of a project's first tasks, read with a token that Label Studio has lent; None where it gives none.

        The token goes to LABEL_STUDIO_URL, as ours does, whoever has sent it.
        """
        try:
            lent = Studio(replace(self._settings, label_studio_api_key=token))
            path = f"api/tasks?project={int(project)}&page_size={FIRST}&fields=task_only"
            return [dict(task["data"]) for task in lent.get(path, "the first tasks", LOOK_S)["tasks"]]
        except (StudioError, ValueError, TypeError, KeyError):
            return None

    def _ask(self, done: threading.Event) -> None:
        try:
            found = self._look()
        except Exception as error:  # noqa: BLE001 - the border of a thread; what is said must not stay unknown for ever
            found = Standing("silent", f"Label Studio could not be asked ({type(error).__name__}).")
        with self._lock:
            self._found, self._found_at, self._asking = found, time.monotonic(), None
        done.set()

    def _look(self) -> Standing:
        try:
            self._studio.check(ANSWER_S)
        except TokenError as error:
            return Standing("refused", str(error))
        except StudioError as error:
            return Standing("silent", str(error))
        if self._settings.label_studio_api_key:
            return Standing("accepted", f"Label Studio at {self._studio.place} answers, and accepts the token.")
        return Standing("no token", KEYLESS)
