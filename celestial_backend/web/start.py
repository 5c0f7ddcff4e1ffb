"""What the log says once, when a server has started: where to connect it, how it stands with Label Studio, its lock."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

from celestial_backend.metrics import SHARED
from celestial_backend.settings import Settings
from celestial_backend.studio.access import ANSWER_S, Access, Standing

logger = logging.getLogger(__name__)
AGAIN_S, PATIENCE_S = 5.0, 900.0  # a Label Studio that starts beside the backend makes its tables first
LOCKED = "Every request must carry the user name and the password that are set (BASIC_AUTH_USER)."
OPEN = "No password is set: whoever reaches the port can use the backend. BASIC_AUTH_USER and BASIC_AUTH_PASS set one."


def tell_in_background(settings: Settings, access: Access) -> None:
    """Say it in a thread, in the first web server process alone."""
    if _is_first():
        threading.Thread(target=tell, args=(settings, access), daemon=True, name="start").start()


def tell(settings: Settings, access: Access, patience_s: float = PATIENCE_S) -> None:
    """Three lines; and one more when a Label Studio that was not there has come."""
    until = time.monotonic() + patience_s
    told = access.standing(ANSWER_S)
    logger.info("To connect: type %s into Connect Model in Label Studio.", settings.address)
    _say(told)
    logger.info("%s", OPEN if settings.basic_auth_user is None else LOCKED)
    while told.state in ("silent", "unknown") and time.monotonic() < until:
        time.sleep(min(AGAIN_S, patience_s))
        found = access.standing(ANSWER_S)
        if found.state not in ("silent", "unknown"):
            _say(found)
        told = found


def _say(standing: Standing) -> None:
    waits = " It is asked again." if standing.state in ("silent", "unknown") else ""
    level = logging.INFO if standing.state == "accepted" else logging.WARNING
    logger.log(level, "%s%s", standing.sentence, waits)


def _is_first() -> bool:
    """Whether no other process of this server has said it; one that shares nothing with others is the only one."""
    if SHARED not in os.environ:
        return True
    try:
        Path(os.environ[SHARED], f"told-{os.getppid()}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True
