"""What `doctor` looks at in the webhook of a project: by it Label Studio tells of labels."""

from __future__ import annotations

import time
from datetime import datetime
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from celestial_backend.checks import Finding, not_checked
from celestial_backend.linking import with_password
from celestial_backend.reach import asks_for_password, health, last_event
from celestial_backend.studio_checks import Api
from celestial_backend.wiring import Services

if TYPE_CHECKING:
    from label_studio_sdk.types.ml_backend import MlBackend
    from label_studio_sdk.types.webhook import Webhook

EVENT_S = 5.0  # Label Studio sends an event within its answer, or through its queue
FIX = "python -m celestial_backend doctor --project {} --fix"


class Hooked:
    """A project, its model and its webhook, as Label Studio has them at the moment of the look."""

    def __init__(self, services: Services, project: int, record: MlBackend) -> None:
        self._services, self._settings = services, services.settings
        self._api = Api(services.studio, project)
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
        name, folder = "Webhook events", self._settings.model_dir
        if "fail" in (self.webhook().state, self.password().state):
            return not_checked(name, "the webhook cannot work")
        if self.record.state == "ER":  # no event of a project is noted whose /setup was never accepted
            return not_checked(name, "the backend refuses the project")
        before = last_event(folder, self.number)
        if send:
            title = self.project.title
            self._api.ask("an event", lambda client: client.projects.update(self.number, title=title))
            deadline = time.monotonic() + EVENT_S
            while last_event(folder, self.number) == before:
                if time.monotonic() > deadline:
                    what = f"An event was sent, and none came within {EVENT_S:g} seconds to the state folder {folder}."
                    mend = "See that the backend has the same MODEL_DIR as this command; Label Studio's log tells more."
                    return Finding(name, "fail", what, mend)
                time.sleep(0.1)
            return Finding(name, "ok", "An event came.", changed="The project was saved as it is, to send one.")
        made = self.hook.updated_at or self.hook.created_at if self.hook else None
        if before is None or (made is not None and before < made.timestamp()):
            mend = f"Label a task, or let one be sent: {self._fix}"
            return Finding(name, "warn", "None has come since the webhook was set up.", mend)
        moment = datetime.fromtimestamp(before).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        return Finding(name, "ok", f"The last one came at {moment}.")


def _taken_as_webhook(url: str) -> bool:
    """Whether Label Studio takes the address of a webhook: a name with a dot, localhost, or a number."""
    host = urlsplit(url).hostname or ""
    try:
        ip_address(host)
    except ValueError:
        return "." in host or host == "localhost"
    return True
