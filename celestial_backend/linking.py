"""
From nothing to a labelling project, through label-studio-sdk: its label config, its pictures, its model.

Everything here can be done again: what is there already is found, and left as it is.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from xml.sax.saxutils import quoteattr

from celestial_backend.errors import RequestError, StudioError
from celestial_backend.project import update_record
from celestial_backend.studio import Studio

if TYPE_CHECKING:
    from label_studio_sdk import LabelStudio
    from label_studio_sdk.types.ml_backend import MlBackend

Answer = TypeVar("Answer")

TITLE_LENGTHS = (3, 50)  # Label Studio's own limits, in letters
CONNECTED = "CO"
PRIVATE = "reserved network address"


@dataclass(frozen=True)
class Registered:
    """
    A model of a project as Label Studio shows it.

    Attributes:
        version: What the backend said its model is; title and version are the same.
        new: Whether it was not there before.
        notes: Sentences about what a person should know.
    """

    id: int
    version: str
    new: bool
    notes: tuple[str, ...] = ()


def config_for(classes: Sequence[str]) -> str:
    """A label config with one choice for each class."""
    choices = "".join(f"    <Choice value={quoteattr(name)}/>\n" for name in classes)
    return (
        '<View>\n  <Image name="image" value="$image"/>\n'
        f'  <Choices name="choice" toName="image">\n{choices}  </Choices>\n</View>'
    )


def find_project(studio: Studio, title: str) -> int | None:
    """
    The number of the project with exactly this title, or None.

    Raises:
        StudioError: There are two of them, or Label Studio did not answer as it should.
    """
    listed: Any = ask(studio, "the list of projects", lambda client: list(client.projects.list(title=title)))
    numbers = sorted(int(project.id) for project in listed if project.title == title)
    if len(numbers) > 1:
        raise StudioError(
            f"The title must name one project, and {title!r} names {' and '.join(map(str, numbers))}."
            " Rename all but one in Label Studio, or give another title."
        )
    return numbers[0] if numbers else None


def create_project(studio: Studio, title: str, config: str) -> int:
    """
    The number of a new project.

    Raises:
        RequestError: Label Studio takes no such title.
        StudioError: It did not answer as it should.
    """
    least, most = TITLE_LENGTHS
    if not least <= len(title) <= most:
        raise RequestError(f"A project's title must have {least} to {most} letters, got {len(title)}: {title[:60]!r}.")
    return int(
        ask(studio, "a new project", lambda client: client.projects.create(title=title, label_config=config)).id or 0
    )


def register(
    studio: Studio, project: int, url: str, title: str, user: str | None = None, password: str | None = None
) -> Registered:
    """
    Connect the backend at `url` with a project, or see that it is connected.

    Label Studio asks the backend for its version. The title is made the same, because the column
    of scores and uncertainty sampling work only then, and the project is set to show it.

    Raises:
        StudioError: Label Studio refuses the address, or cannot use what answers there.
    """
    auth: dict[str, Any] = {}
    if user and password:
        auth = {"auth_method": "BASIC_AUTH", "basic_auth_user": user, "basic_auth_pass": password}
    before = _records(studio, project)
    known = next((record for record in before if _same(record.url, url)), None)
    if known is None:
        _connect(studio, url, lambda client: client.ml.create(project=project, url=url, title=title, **auth))
    elif known.state != CONNECTED or (auth and known.basic_auth_user != user):
        _update(studio, known, url, known.title or title, auth)
    record = next((each for each in _records(studio, project) if _same(each.url, url)), None)
    if record is None or record.state != CONNECTED or not record.model_version:
        said = f": {_plain(record.error_message)}" if record is not None and record.error_message else "."
        raise StudioError(f"Label Studio took the address {url} and cannot use what answers there{said}")
    version = record.model_version
    if record.title != version:
        _update(studio, record, url, version, auth)
    notes = [_shown(studio, project, version), _webhook(studio, project, url, user, password)]
    if before and not _same(before[0].url, url):
        notes.append(
            f"Label Studio asks only the first model of a project for predictions, which is {before[0].title!r} at"
            f" {before[0].url}. Remove that one under Settings > Model, to have those of {version}."
        )
    return Registered(int(record.id or 0), version, known is None, tuple(filter(None, notes)))


def ask(studio: Studio, wanted: str, call: Callable[[LabelStudio], Answer]) -> Answer:
    """
    What one call of Label Studio's API gives.

    Raises:
        StudioError: It gave none; of what it holds against the request, its own words.
    """
    try:
        return call(studio.client())
    except studio.failures() as error:
        said = refusal(error)
        if said:
            raise StudioError(f"Label Studio refuses {wanted}: {said}") from None
        raise StudioError(studio.problem(error, wanted)[0]) from None  # the SDK's own text holds cookies


def refusal(error: Exception) -> str:
    """What Label Studio holds against a request, in its own words; empty where it was something else."""
    body = getattr(error, "body", None)
    if getattr(error, "status_code", None) not in (400, 403, 413, 422) or not isinstance(body, dict):
        return ""
    found = body.get("validation_errors")
    parts = [text for texts in found.values() for text in texts] if isinstance(found, dict) else found or []
    return _plain(" ".join(map(str, parts)) or str(body.get("detail", "")))


def with_password(headers: Mapping[str, Any], user: str | None, password: str | None) -> dict[str, Any]:
    """A webhook's headers with the backend's password, if it has one; as they are, if they carry it already."""
    pair = f"{user}:{password}"
    texts = pair.encode(), pair.encode("latin-1", "backslashreplace")  # the backend takes both
    right = [f"Basic {base64.b64encode(text).decode()}" for text in texts]
    given = {key: value for key, value in headers.items() if key.lower() == "authorization"}
    if not (user and password) or any(value in right for value in given.values()):
        return dict(headers)
    return {key: value for key, value in headers.items() if key not in given} | {"Authorization": right[0]}


def _records(studio: Studio, project: int) -> list[MlBackend]:
    return ask(studio, f"the models of project {project}", lambda client: client.ml.list(project=project))


def _same(one: str, other: str) -> bool:
    return one.rstrip("/") == other.rstrip("/")


def _update(studio: Studio, record: MlBackend, url: str, title: str, auth: dict[str, Any]) -> None:
    _connect(studio, url, lambda client: update_record(client, record, url=url, title=title, **auth))


def _connect(studio: Studio, url: str, call: Callable[[LabelStudio], object]) -> None:
    try:
        ask(studio, f"the model at {url}", call)
    except StudioError as error:
        if PRIVATE not in str(error):
            raise
        raise StudioError(
            f"Label Studio refuses {url}, because it is a private address. Start Label Studio with"
            " USE_DEFAULT_BANNED_SUBNETS=false and USER_ADDITIONAL_BANNED_SUBNETS=… as the README says under"
            " \"Private addresses\", and do this again."
        ) from None


def _shown(studio: Studio, project: int, version: str) -> str:
    """Have the project show the model's predictions, unless a person chose others; a sentence in that case."""
    number = project
    shown = ask(studio, f"project {project}", lambda client: client.projects.get(number)).model_version or ""
    if not shown:
        wanted = "live predictions"
        ask(studio, wanted, lambda client: client.projects.update(number, model_version=version))
    elif shown != version:
        return f"The project shows predictions of {shown!r}; choose {version} under Settings > Annotation to change it."
    return ""


def _webhook(studio: Studio, project: int, url: str, user: str | None, password: str | None) -> str:
    """See that labels are told to the backend, with its password; a sentence where they cannot be."""
    target = f"{url.rstrip('/')}/webhook"
    hooks: Any = ask(studio, "the webhooks", lambda client: client.webhooks.list(project=str(project)))
    hook = next((each for each in hooks if each.url == target), None)
    known = (hook and hook.headers) or {}
    headers = with_password(known, user, password)
    wanted = "the webhook that tells the backend of labels"
    try:
        if hook is None:
            ask(studio, wanted, lambda client: client.webhooks.create(url=target, project=project, headers=headers))
        elif headers != known:
            number = int(hook.id)
            ask(studio, wanted, lambda client: client.webhooks.update(number, headers=headers))
    except StudioError as error:
        return str(error)
    return ""


def _plain(text: str) -> str:
    """A text of Label Studio's without its HTML, on one line."""
    return " ".join(re.sub(r"<[^>]*>", "", text).split())[:600]
