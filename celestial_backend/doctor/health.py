"""
Whether this container does its work: `python -m celestial_backend.doctor.health` ends with code 0 if so.

A web server answers on its port. Where nothing listens, a worker may be alone here; it shows in the database that it
lives. The image asks this every half minute, so it imports little.
"""

from __future__ import annotations

import sys
from base64 import b64encode
from http.client import HTTPConnection, HTTPException

from celestial_backend.errors import CelestialError
from celestial_backend.settings import Settings

ANSWER_S = 4.0


def trouble(settings: Settings) -> str:
    """What is wrong, as a sentence; "" if nothing is."""
    try:
        status = _status(settings)
    except ConnectionRefusedError:
        return "" if _works_here(settings) else f"Nothing listens on port {settings.port}, and no worker lives here."
    except (OSError, HTTPException):
        return f"Port {settings.port} gives no answer."
    return "" if status == 200 else f"/health answers {status}."


def _status(settings: Settings) -> int:
    pair = f"{settings.basic_auth_user or ''}:{settings.basic_auth_pass or ''}"  # does no harm where no password is set
    link = HTTPConnection("127.0.0.1", settings.port, timeout=ANSWER_S)
    try:
        link.request("GET", "/health", headers={"Authorization": f"Basic {b64encode(pair.encode()).decode()}"})
        return link.getresponse().status
    finally:
        link.close()


def _works_here(settings: Settings) -> bool:
    from celestial_backend.database import Database
    from celestial_backend.jobs.ledger import Ledger

    return Ledger(Database(settings, look_only=True)).works_here()


if __name__ == "__main__":
    try:
        said = trouble(Settings.from_environ())
    except CelestialError as error:
        said = str(error)
    sys.exit(said or 0)
