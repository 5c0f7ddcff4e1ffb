"""
What `doctor` looks at in Label Studio: its address, clock and token, and one project with its model and webhook.

Each check gives findings; what it puts right in a project, it does where the caller asked for that.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from celestial_backend.doctor.machine import (
    ANSWER_S,
    Finding,
    asks_for_password,
    health,
    is_ours,
    model_of,
    not_checked,
)
from celestial_backend.errors import CelestialError, LabelConfigError, StateError, StudioError
from celestial_backend.services import Services
from celestial_backend.settings import MODEL_NAME, NEEDS_LABELS, NEVER, Settings, is_tag
from celestial_backend.studio.client import Studio
from celestial_backend.studio.project import LIVE, StudioProject
from celestial_backend.studio.setup import PRIVATE, with_password

if TYPE_CHECKING:
    from label_studio_sdk.types.ml_backend import MlBackend
    from label_studio_sdk.types.webhook import Webhook

CLOCK_S = 60.0  # an access token lives five minutes, and is not taken before it was made
EVENT_S = 5.0  # Label Studio sends an event within its answer, or through its queue
FIX = "python -m celestial_backend doctor --project {} --fix"
CONNECTED = ("CO", "TR", "PR")  # connected; it trains; it predicts
UNBLOCK = (
    "Start Label Studio with the two variables that `python -m celestial_backend private-addresses ADDRESS` prints for"
    " this one address; or connect the model by an address that is allowed."
)
NO_MODEL = "the model does not work here"


def answering(studio: Studio) -> tuple[bool, list[Finding]]:
    """Whether Label Studio answers, which one it is, and whether its clock and ours agree."""
    import httpx

    name = "Label Studio"
    if studio.url is None:
        mend = "Run `connect FOLDER` or `connect --new-token`, or set LABEL_STUDIO_URL to its address."
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


def token(api: StudioProject, settings: Settings) -> Finding:
    """Whether Label Studio accepts the token, which kind it is, and whose."""
    key, name = settings.label_studio_api_key, "Token"
    mend = (
        "Make a personal access token in Label Studio, Account & Settings. Then run `connect --new-token`, which asks"
        " for it, or set LABEL_STUDIO_API_KEY."
    )
    if not key:
        return Finding(name, "fail", "No token is known: LABEL_STUDIO_API_KEY is not set.", mend)
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


def connected(api: StudioProject, project: int | None) -> list[tuple[int, MlBackend]]:
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
        listed: list[Any] = api.ask("the projects", lambda client: list(client.projects.list(page_size=200)))
        numbers = [each.id for each in listed]
    found = []
    for number in numbers:
        records = _models(api, number)
        ours = [record for record in records if _is_ours(record)] or (records[:1] if project is not None else [])
        found += [(number, record) for record in ours[:1]]
    return found


def _models(api: StudioProject, project: Any) -> list[MlBackend]:
    return list(api.ask(f"the model of project {project}", lambda client: client.ml.list(project=project)))


def _is_ours(record: MlBackend) -> bool:
    told = f"{record.title} {record.model_version}"
    return MODEL_NAME in told or is_ours(health(record.url))


def not_connected(api: StudioProject, services: Services, project: int, *, model_works: bool) -> Iterator[Finding]:
    """
    What can be said of a project before it is connected, in the order that connecting it needs.

    Raises:
        StudioError: Label Studio does not show the project.
    """
    wanted = f"project {project}"
    text = api.ask(wanted, lambda client: client.projects.get(project)).label_config or ""
    yield replace(config(services, project, text, model_works=model_works), project=project)
    mend = (
        f"In the project's settings, Model, press Connect Model, and enter {services.settings.address}"
        " - this command then says whether Label Studio reaches it."
    )
    yield Finding("Connection", "fail", "The project has no model.", mend, project=project)


def config(services: Services, project: int, text: str, *, model_works: bool) -> Finding:
    """Whether the choices of a project's label config and the classes of its model go together."""
    name = "Label config"
    if not model_works:
        return not_checked(name, NO_MODEL)
    try:
        tag = services.store.live_tag(str(project))
        found, classes = model_of(services, tag, str(project))
        vocabulary = services.store.vocabulary(tag, 0)
    except CelestialError as error:
        return not_checked(name, f"its model cannot be known: {error}")
    if not classes or vocabulary is None:
        return found
    try:
        choices = vocabulary.choices(text)
    except LabelConfigError as error:
        mend = "Put Choices on an Image, in the project's settings, Labeling Interface."
        return Finding(name, "fail", str(error), mend)
    if not choices.controls:
        missing = services.jobs.missing(str(project))
        what = f"Nothing can be predicted yet, with version {NEEDS_LABELS}. {' '.join(choices.warnings)}"
        return Finding(name, "warn", what, missing or "Label pictures, and press Start Training.")
    if choices.warnings:
        mend = "Label pictures of these and train, or rename choices in the project's settings, Labeling Interface."
        return Finding(name, "warn", " ".join(choices.warnings), mend)
    return Finding(name, "ok", f"Each of the {len(classes)} classes of {tag} has a choice, and the reverse.")


class Hooked:
    """A project, its model and its webhook, as Label Studio has them at the moment of the look."""

    def __init__(self, services: Services, project: int, record: MlBackend) -> None:
        self._services, self._settings = services, services.settings
        self._api = StudioProject(services.studio, str(project), patience_s=0)
        self.number, self.record = project, record
        self._fix = FIX.format(project)
        self.load()

    def load(self) -> None:
        """Ask Label Studio again; it asks the backend for its version then."""
        wanted = f"project {self.number}"
        records = self._api.ask(wanted, lambda client: client.ml.list(project=self.number))
        self.record = next((record for record in records if record.id == self.record.id), self.record)
        self.project: Any = self._api.ask(wanted, lambda client: client.projects.get(self.number))
        hooks = self._api.ask(wanted, lambda client: client.webhooks.list(project=str(self.number)))
        self.url = self.record.url.rstrip("/")
        self.hook: Webhook | None = next((hook for hook in hooks if hook.url == f"{self.url}/webhook"), None)

    def webhook(self) -> Finding:
        """Whether Label Studio would send events, and to the right place."""
        name, mend, place = "Webhook", self._fix, f"{self.url}/webhook"
        if self.hook is None:
            if not _taken_as_webhook(self.url):
                what = f"The project has none, as Label Studio takes no webhook address with the host of {self.url}."
                mend = "Connect the model by a name with a dot, such as the alias ml-backend.internal, or by number."
                return Finding(name, "fail", what, mend)
            return Finding(name, "fail", f"The project has none to {place}: labels are not told to the backend.", mend)
        if not self.hook.is_active or self.hook.send_payload is False:
            fault = "switched off" if not self.hook.is_active else "without its payload"
            return Finding(name, "fail", f"The webhook to {place} is {fault}.", mend)
        if self.hook.send_for_all_actions is False:
            what = f"Only some events are sent: {', '.join(map(str, self.hook.actions or ['none']))}."
            return Finding(name, "warn", what, "Choose all events, in the project's settings, Webhooks.")
        return Finding(name, "ok", f"Events go to {place}.")

    def password(self) -> Finding:
        """Whether the webhook carries the password that the backend asks for; the model's own is not sent with it."""
        name, user, password = "Webhook password", self._settings.basic_auth_user, self._settings.basic_auth_pass
        if self.hook is None:
            return not_checked(name, "there is no webhook")
        headers = self.hook.headers or {}
        given = any(key.lower() == "authorization" for key in headers)
        if user is None and not asks_for_password(health(self.url)):
            return Finding(name, "ok", "The backend asks for none.")
        if user is None and not given:
            mend = f"Set BASIC_AUTH_USER and BASIC_AUTH_PASS here as for the backend, then: {self._fix}"
            return Finding(name, "fail", "The backend asks for a password, and the webhook carries none.", mend)
        if with_password(headers, user, password) != headers:
            fault = "another one" if given else "none"
            what = f"The backend asks for a password (BASIC_AUTH_USER), and the webhook carries {fault}."
            return Finding(name, "fail", what, self._fix)
        return Finding(name, "ok", "The webhook carries one.")

    def mend_webhook(self) -> str:
        """Make or set the webhook as it should be; what was changed."""
        if self.hook is None and not _taken_as_webhook(self.url):
            return ""
        known = (self.hook.headers if self.hook else None) or {}
        headers = with_password(known, self._settings.basic_auth_user, self._settings.basic_auth_pass)
        kept: dict[str, Any] = {"headers": headers, "is_active": True, "send_payload": True}
        place = f"{self.url}/webhook"
        if self.hook is None:
            more = {"project": self.number, "send_for_all_actions": True, **kept}
            self._api.ask("a webhook", lambda client: client.webhooks.create(url=place, **more))
            return f"A webhook to {place} was made."
        number = self.hook.id
        self._api.ask("the webhook", lambda client: client.webhooks.update(number, url=place, **kept))
        return f"The webhook to {place} was set to be sent, with its payload and the password if there is one."

    def events(self, *, send: bool) -> Finding:
        """Whether events really come; one is sent if it may be, by saving the project as it is."""
        name = "Webhook events"
        if "fail" in (self.webhook().state, self.password().state):
            return not_checked(name, "the webhook cannot work")
        if self.record.state == "ER":  # no event of a project is noted whose /setup was never accepted
            return not_checked(name, "the backend refuses the project")
        try:
            before = self._event_at()
        except StateError as error:
            return not_checked(name, f"the database cannot be used ({error})")
        if send:
            title = self.project.title
            self._api.ask("an event", lambda client: client.projects.update(self.number, title=title))
            deadline = time.monotonic() + EVENT_S
            while self._event_at() == before:
                if time.monotonic() > deadline:
                    what = f"An event was sent, and within {EVENT_S:g} seconds none was noted in the database."
                    mend = (
                        "See that the backend has the same MODEL_DIR or CELESTIAL_DATABASE_URL as this command;"
                        " Label Studio's log tells more."
                    )
                    return Finding(name, "fail", what, mend)
                time.sleep(0.1)
            return Finding(name, "ok", "An event came.", changed="The project was saved as it is, to send one.")
        made = self.hook.updated_at or self.hook.created_at if self.hook else None
        if before is None or (made is not None and before < made.timestamp()):
            mend = f"Label a task, or let one be sent: {self._fix}"
            return Finding(name, "warn", "None has come since the webhook was set up.", mend)
        moment = datetime.fromtimestamp(before).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        return Finding(name, "ok", f"The last one came at {moment}.")

    def _event_at(self) -> float | None:
        """When the last event of the project's webhook came, in seconds since 1970; None if none is known of."""
        known = self._services.jobs.ledger.known(str(self.number))
        return known.event_at if known else None

    def labels(self) -> Finding:
        """Whether a training begins by itself, or what labels are missing for it: a hint, and never a failure."""
        name = "Labels"
        try:
            known = self._services.jobs.ledger.known(str(self.number))
        except StateError as error:
            return not_checked(name, f"the database cannot be used ({error})")
        if known is None or known.missing is None:
            return Finding(name, "ok", "They are not counted yet; a worker does so within a minute.")
        enough = "There are enough to learn from."
        if self._settings.train_every == NEVER:
            enough += " Start Training alone trains, as CELESTIAL_TRAIN_EVERY is off."
        return Finding(name, "ok", known.hindrance or enough)


def _taken_as_webhook(url: str) -> bool:
    """Whether Label Studio takes the address of a webhook: a name with a dot, localhost, or a number."""
    host = urlsplit(url).hostname or ""
    try:
        ip_address(host)
    except ValueError:
        return "." in host or host == "localhost"
    return True


class Connection(Hooked):
    """A project, its model and its webhook, as Label Studio has them at the moment of the look."""

    model_works = True

    def findings(self, *, fix: bool) -> Iterator[Finding]:
        """What was found, in the order that a connection needs it; with `fix` after it was fixed where possible."""
        steps: list[tuple[str, Callable[[], Finding], Callable[[], str] | None]] = [
            ("Connection", self.connection, None),
            ("Webhook", self.webhook, self.mend_webhook),
            ("Webhook password", self.password, self.mend_webhook),
            ("Webhook events", lambda: self.events(send=fix), None),
            ("Label config", self.config, None),
            ("Labels", self.labels, None),
            ("Version", self.version, self._mend_version),
        ]
        for name, check, mend in steps:
            try:
                found = check()
                if fix and mend is not None and found.state == "fail":
                    changed = mend()
                    self.load()
                    found = replace(check(), changed=changed)
            except StudioError as error:
                found = Finding(name, "fail", str(error), "See that Label Studio is up, and run this again.")
            yield replace(found, project=self.number)

    def connection(self) -> Finding:
        """Whether Label Studio reaches the backend, as it says itself."""
        name = "Connection"
        if self.record.state in CONNECTED:
            return Finding(name, "ok", f"Label Studio reaches {self.url}, so its private addresses are no hindrance.")
        if self.record.state == "ER":
            reason, mend = self.record.error_message or "", "Look into the backend's log; it names the reason."
            if self.config().state == "fail":
                mend = "Correct the label config, as it is said there."
            return Finding(name, "fail", f"The backend at {self.url} refuses the project: {_short(reason)}", mend)
        reason = self._refusal()
        if PRIVATE in reason:
            what = f"Label Studio blocks {self.url}, which is a private address: {_short(reason)}"
            return Finding(name, "fail", what, UNBLOCK)
        mend = "Start the backend, or connect it by an address that Label Studio sees; localhost is its own container."
        if "401" in reason or asks_for_password(health(self.url)):
            mend = "Give the model BASIC_AUTH_USER and BASIC_AUTH_PASS in the project's settings, Model, and save it."
        return Finding(name, "fail", f"Label Studio does not reach {self.url}: {_short(reason)}", mend)

    def _refusal(self) -> str:
        """Why a call of Label Studio to the backend fails; asking for versions is one that changes nothing."""
        from label_studio_sdk.core.api_error import ApiError

        def ask(client: Any) -> str:
            try:
                client.ml.list_model_versions(self.record.id)
            except ApiError as error:
                return str(error.body.get("error") if isinstance(error.body, dict) else error.status_code)
            return "it is disconnected"

        return str(self._api.ask("the versions of the model", ask))

    def config(self) -> Finding:
        """See `config`."""
        return config(self._services, self.number, self.project.label_config or "", model_works=self.model_works)

    def version(self) -> Finding:
        """Whether title, version and the project's version agree; otherwise scores and sampling by them fail."""
        name = "Version"
        if self.record.state not in CONNECTED:
            return not_checked(name, "Label Studio gets no version from the backend")
        if not self.model_works:
            return not_checked(name, NO_MODEL)
        title, told = self.record.title or "", self.record.model_version or ""
        try:
            shown, tag = self.project.model_version or "", self._predicted()
        except CelestialError as error:
            return not_checked(name, f"the backend gives none: {error}")
        if told != tag:
            mend = (
                "Run this command with the MODEL_DIR and BENTOML_HOME of the backend, or its CELESTIAL_DATABASE_URL;"
                " if it does, start that anew."
            )
            return Finding(name, "fail", f"Label Studio was told version {told}, and {tag} is live here.", mend)
        if told == NEEDS_LABELS:
            return Finding(name, "ok", f"Label Studio was told {told}, as nothing can be predicted yet.")
        if title == told + LIVE and shown == told:
            return Finding(name, "ok", f"The project shows the stored predictions of {told}, which every task has.")
        if title != told and is_tag(title):
            return Finding(name, "fail", f"The model's title is {title}, and its version is {told}.", self._fix)
        if shown not in (title, told):
            state, mend = ("fail", self._fix) if is_tag(shown) else ("warn", "Choose it in its settings, Annotation.")
            what = f"The project shows predictions of {shown or 'no model'}, and not those of {told}."
            return Finding(name, "fail" if state == "fail" else "warn", what, mend)
        if title != told:
            what = f"The title {title!r} is not the version {told}, so the score column and sampling by it do not work."
            return Finding(name, "warn", what, f"In the project's settings, Model, give it the title {told}")
        return Finding(name, "ok", f"Title, version and project agree on {told}.")

    def _mend_version(self) -> str:
        return " ".join(self._api.show_version(self._predicted()))

    def _predicted(self) -> str:
        """The version that the backend says for the project's label config."""
        return self._services.predictor.version(self.project.label_config or "", str(self.number))


def _short(reason: str) -> str:
    return " ".join(reason.split())[:400]
