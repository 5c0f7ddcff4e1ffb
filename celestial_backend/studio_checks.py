"""What `doctor` looks at in Label Studio as a whole: that it answers, the clock, the token, the projects."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from celestial_backend.checks import Finding, not_checked
from celestial_backend.errors import StudioError
from celestial_backend.project import StudioProject
from celestial_backend.reach import ANSWER_S, health, is_ours
from celestial_backend.settings import MODEL_NAME, Settings
from celestial_backend.studio import Studio

if TYPE_CHECKING:
    from label_studio_sdk import LabelStudio
    from label_studio_sdk.types.ml_backend import MlBackend

CLOCK_S = 60.0  # an access token lives five minutes, and is not taken before it was made


class Api:
    """Label Studio's API for one look: nothing is tried twice."""

    def __init__(self, studio: Studio, project: int = 0) -> None:
        self._project = StudioProject(studio, str(project), patience_s=0)

    def ask(self, wanted: str, call: Callable[[LabelStudio], Any]) -> Any:
        """
        What a call gives.

        Raises:
            StudioError: It gave nothing; the message says why.
        """
        return self._project._ask(wanted, call)

    def show_version(self, tag: str) -> list[str]:
        """Bring Label Studio in step with a live model, as after a training; the sentences that say how."""
        return self._project.show_version(tag)


def answering(studio: Studio) -> tuple[bool, list[Finding]]:
    """Whether Label Studio answers, which one it is, and whether its clock and ours agree."""
    import httpx

    name = "Label Studio"
    if studio.url is None:
        mend = "Set LABEL_STUDIO_URL to its address as this machine sees it."
        return False, [Finding(name, "fail", "LABEL_STUDIO_URL is not set.", mend)]
    try:  # a wrong token would be refused here too, so none is sent, which a client of the SDK cannot do
        answer = httpx.get(f"{studio.url}/api/version", timeout=ANSWER_S, follow_redirects=True)
        version = answer.json()["release"] if answer.status_code == httpx.codes.OK else None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return False, _silent(studio.problem(error, "its version")[0])
    except (ValueError, KeyError, TypeError):
        version = None
    if version is None:
        return False, _silent(studio.problem(ValueError(), "its version")[0])
    return True, [Finding(name, "ok", f"It answers, and is version {version}."), _clock(answer.headers.get("Date"))]


def _silent(problem: str) -> list[Finding]:
    mend = "Start Label Studio, or set LABEL_STUDIO_URL to its address as this machine sees it."
    return [Finding("Label Studio", "fail", problem, mend), not_checked("Clock", "Label Studio does not answer")]


def _clock(date: str | None) -> Finding:
    try:
        ahead = time.time() - parsedate_to_datetime(date or "").timestamp()
    except (TypeError, ValueError):
        return not_checked("Clock", "Label Studio does not tell the time")
    if abs(ahead) <= CLOCK_S:
        return Finding("Clock", "ok", "It agrees with Label Studio's.")
    what = f"This machine's clock is {abs(ahead):.0f} seconds {'ahead of' if ahead > 0 else 'behind'} Label Studio's."
    mend = "Set both by a time server (timedatectl set-ntp true); personal access tokens depend on it."
    return Finding("Clock", "warn", what, mend)


def token(api: Api, settings: Settings) -> Finding:
    """Whether Label Studio accepts the token, which kind it is, and whose."""
    key, name = settings.label_studio_api_key, "Token"
    mend = "Make a personal access token in Label Studio, Account & Settings, and set LABEL_STUDIO_API_KEY to it."
    if not key:
        return Finding(name, "fail", "LABEL_STUDIO_API_KEY is not set.", mend)
    personal = key.count(".") == 2
    ended = _expiry(key) if personal else None
    if ended is not None and ended < time.time():
        moment = datetime.fromtimestamp(ended, UTC).strftime("%Y-%m-%d %H:%M")
        return Finding(name, "fail", f"The personal access token has run out on {moment} UTC.", mend)
    kind = "personal access token" if personal else "legacy token"
    try:
        user = api.ask("the token's user", lambda client: client.users.whoami())
    except StudioError as error:
        if "legacy token authentication has been disabled" in str(error):
            mend += " Or let an owner switch legacy tokens on: Organization, API Tokens Settings."
        return Finding(name, "fail", f"The {kind} is refused: {error}", mend)
    return Finding(name, "ok", f"The {kind} is accepted; it belongs to {user.email or user.username}.")


def _expiry(key: str) -> float | None:
    """When a personal access token ends, as it says itself; None if it does not."""
    part = key.split(".")[1]
    try:
        return float(json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))["exp"])
    except (ValueError, KeyError, TypeError):
        return None


def connected(api: Api, project: int | None) -> list[tuple[int, MlBackend]]:
    """
    The projects that this backend is connected to, each with the model's record as Label Studio sees it now.

    Args:
        api: Of Label Studio.
        project: Only this one; its first model is taken, whatever answers there.

    Raises:
        StudioError: Label Studio did not say.
    """
    numbers: list[int] = [] if project is None else [project]
    if project is None:
        listed = api.ask("the projects", lambda client: list(client.projects.list(page_size=200)))
        numbers = [each.id for each in listed]
    found = []
    for number in numbers:
        records = _models(api, number)
        ours = [record for record in records if _is_ours(record)] or (records[:1] if project is not None else [])
        found += [(number, record) for record in ours[:1]]
    return found


def _models(api: Api, project: Any) -> list[MlBackend]:
    return list(api.ask(f"the model of project {project}", lambda client: client.ml.list(project=project)))


def _is_ours(record: MlBackend) -> bool:
    told = f"{record.title} {record.model_version}"
    return MODEL_NAME in told or is_ours(health(record.url))
