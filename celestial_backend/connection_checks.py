"""What `doctor` looks at in one project of Label Studio that is connected to this backend, and what it mends there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from celestial_backend.checks import Finding, model_of, not_checked
from celestial_backend.errors import CelestialError, LabelConfigError, StudioError
from celestial_backend.labels import ChoiceMap
from celestial_backend.linking import PRIVATE
from celestial_backend.reach import asks_for_password, health
from celestial_backend.tags import is_tag
from celestial_backend.webhook_checks import Hooked

CONNECTED = ("CO", "TR", "PR")  # connected; it trains; it predicts
UNBLOCK = (
    "On Label Studio set USE_DEFAULT_BANNED_SUBNETS=false and USER_ADDITIONAL_BANNED_SUBNETS to a list with a hole for"
    " this one address, as the README gives it, and start it anew; or connect the model by an address that is allowed."
)
NO_MODEL = "the model does not work here"


class Connection(Hooked):
    """A project, its model and its webhook, as Label Studio has them at the moment of the look."""

    model_works = True

    def findings(self, *, fix: bool) -> Iterator[Finding]:
        """What was found, in the order that a connection needs it; with `fix` after it was mended where possible."""
        steps: list[tuple[str, Callable[[], Finding], Callable[[], str] | None]] = [
            ("Connection", self.connection, None),
            ("Webhook", self.webhook, self.mend_webhook),
            ("Webhook password", self.password, self.mend_webhook),
            ("Webhook events", lambda: self.events(send=fix), None),
            ("Label config", self.config, None),
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
                mend = "Mend the label config, as it is said there."
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
        """Whether the choices of the project and the classes of its model go together."""
        name = "Label config"
        if not self.model_works:
            return not_checked(name, NO_MODEL)
        try:
            tag = self._services.store.live_tag(str(self.number))
            found, classes = model_of(self._services, tag, str(self.number))
        except CelestialError as error:
            return not_checked(name, f"the project has no model: {error}")
        if not classes:
            return found
        try:
            warnings = ChoiceMap.from_config(self.project.label_config or "", classes).warnings
        except LabelConfigError as error:
            mend = "Name the choices as the classes, in the project's settings, Labeling Interface."
            return Finding(name, "fail", str(error), mend)
        if warnings:
            mend = "Rename choices or give them predicted_values, in the project's settings, Labeling Interface."
            return Finding(name, "warn", " ".join(warnings), mend)
        return Finding(name, "ok", f"Each of the {len(classes)} classes of {tag} has a choice, and the reverse.")

    def version(self) -> Finding:
        """Whether title, version and the project's version agree; otherwise scores and sampling by them fail."""
        name = "Version"
        if self.record.state not in CONNECTED:
            return not_checked(name, "Label Studio gets no version from the backend")
        if not self.model_works:
            return not_checked(name, NO_MODEL)
        title, told = self.record.title or "", self.record.model_version or ""
        shown, tag = self.project.model_version or "", self._services.store.live_tag(str(self.number))
        if told != tag:
            mend = "Run this command with the BENTOML_HOME and MODEL_DIR of the backend; if it does, start that anew."
            return Finding(name, "fail", f"Label Studio was told version {told}, and {tag} is live here.", mend)
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
        return " ".join(self._api.show_version(self._services.store.live_tag(str(self.number))))


def _short(reason: str) -> str:
    return " ".join(reason.split())[:400]
