"""What answers at an address: this backend, something else, or nothing; and when events came to it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

ANSWER_S = 5.0
OURS = "CelestialBodiesBackend"  # the model class that /health tells


def health(url: str, user: str | None = None, password: str | None = None) -> dict[str, Any] | None:
    """
    What an address answers to /health: None if nothing listens, an empty object if it makes no sense.

    Args:
        url: Of an ML backend.
        user: Credentials, only for an address that the operator has named.
        password: The same.
    """
    import httpx

    pair = (user, password or "") if user else None
    try:
        with httpx.Client(timeout=ANSWER_S, trust_env=False, auth=pair) as client:
            body = client.get(f"{url.rstrip('/')}/health").json()
    except httpx.ConnectError:
        return None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def is_ours(body: dict[str, Any] | None) -> bool:
    """Whether an answer to /health is this backend's, also one that asks for a password."""
    return (body or {}).get("model_class") == OURS or asks_for_password(body)


def asks_for_password(body: dict[str, Any] | None) -> bool:
    """Whether it is this backend's refusal of a request without the right password."""
    return "(BASIC_AUTH_USER)" in str((body or {}).get("detail"))


def is_free(port: int) -> bool:
    """Whether a server can be started on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def last_event(model_dir: Path, project: int) -> float | None:
    """When the last event of a project's webhook came, in seconds of the clock; None if none is known of."""
    try:
        return event_file(model_dir, str(project)).stat().st_mtime
    except OSError:
        return None


def event_file(model_dir: Path, project: str) -> Path:
    """The file that is touched when an event of a project's webhook comes."""
    return model_dir / "work" / f"webhook-{project}"
