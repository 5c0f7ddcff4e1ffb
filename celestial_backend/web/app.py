"""
The WSGI app: the SDK's routes, with our checks before them and our error shape after them.

A request passes, in this order: whom it comes from, name and password, its body, its
label config or event. The SDK's views see what was read, and never the body.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import secrets
import socket
import time
import uuid
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from typing import IO, Any
from urllib.parse import urlsplit

import msgspec
from flask import Flask, Request, Response, g, jsonify, request
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import ClientDisconnected, HTTPException, NotFound, RequestEntityTooLarge, UnsupportedMediaType

from celestial_backend import __version__, logs, metrics
from celestial_backend.errors import (
    PASSWORD,
    BodyTooLargeError,
    BodyTooLateError,
    BusyError,
    CelestialError,
    ForeignRequestError,
    RequestError,
    TokenError,
    code_of,
)
from celestial_backend.services import Services
from celestial_backend.settings import Settings, no_project, project_parts
from celestial_backend.studio.access import LOOK_S
from celestial_backend.studio.client import credentials
from celestial_backend.web import home, openapi, protocol
from celestial_backend.web.admission import RETRY_S, Admission, Place
from celestial_backend.web.backend import CelestialBodiesBackend, make_app, project_id
from celestial_backend.web.connections import MalformedBody
from celestial_backend.web.protocol import TRAIN_EVENTS, OtherEvent, PredictRequest, SetupRequest, Tasks

logger = logging.getLogger(__name__)

# One generation of the SDK has more.
PATHS = {"/", "/health", "/setup", "/predict", "/webhook", "/versions", "/metrics", "/docs", "/openapi.json", "/doctor"}
SETUP_S, TOKEN_S = 2.0, 0.5  # of the three seconds that Label Studio gives /setup; for what stands with the token
REASON_LENGTH = 400  # characters of a status line's reason phrase
PATH_LENGTH = 100  # characters of an unknown path in the log
PASSED_ON = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "X-Request-Start", "Via")
READ = ("/setup", "/predict", "/webhook")  # those that take a body
# Endings of names that no public name server gives away, so that no page of the web can have one.
PRIVATE_NAMES = (".internal", ".local", ".localhost", ".localdomain", ".lan", ".home.arpa", ".test", ".svc")


def create_app(services: Services, admission: Admission | None = None) -> Flask:
    """The WSGI app for these services; each call gives an app of its own, which takes on what `admission` says."""
    admission = admission or Admission(services.settings)
    app = make_app(CelestialBodiesBackend.bound_to(services, admission), TRAIN_EVENTS)
    app.request_class = _Request
    app.json = _Json(app)
    app.view_functions["health"] = lambda: _health(services)
    app.view_functions["metrics"] = lambda: _metrics(services)
    app.add_url_rule("/doctor", "doctor", lambda: _seen(services))
    document = openapi.document(guarded=services.settings.basic_auth_user is not None)
    app.add_url_rule("/openapi.json", "openapi", lambda: document)
    app.add_url_rule("/docs", "docs", lambda: openapi.page(document))
    app.add_url_rule("/versions", "versions of a project", lambda: _versions(services))
    app.before_request(_open)
    app.before_request(lambda: _check_sender(services.settings))
    app.before_request(lambda: _authorize(services.settings))
    app.before_request(lambda: _check(services, admission))
    app.after_request(lambda response: _close(response, services.metrics))
    app.teardown_request(lambda _: g.held.close())
    app.register_error_handler(CelestialError, _refused)
    app.register_error_handler(HTTPException, _not_served)
    app.register_error_handler(Exception, _failed)
    return app


class _Request(Request):
    """Gives the SDK's views what was read and checked, in the place of the body."""

    def get_json(self, *_: Any, **__: Any) -> Any:
        return g.found


class _Json(DefaultJSONProvider):
    """Answers of a hundred thousand tasks in a tenth of the time, in which no other thread gets a turn."""

    def response(self, *args: Any, **kwargs: Any) -> Response:
        answer = self._prepare_response_obj(args, kwargs)
        if isinstance(answer, dict) and "results" in answer:
            g.facts["failed"] = answer["results"].count([])
        return Response(msgspec.json.encode(answer), mimetype="application/json")


def _health(services: Services) -> Any:
    """That of the SDK, and at / a page for those who read."""
    if request.path == "/" and home.wants_html():
        return home.page(services)
    return {"status": "UP", "model_class": CelestialBodiesBackend.__name__, "version": __version__}


def _seen(services: Services) -> dict[str, Any]:
    """
    What `doctor` asks a running backend: how it stands with Label Studio, and whether its settings are the same.

    Raises:
        ForeignRequestError: No password is set, and who asks is on another machine.
    """
    settings = services.settings
    if settings.basic_auth_user is None and not _is_from_here():
        raise ForeignRequestError("Without a password, /doctor answers this machine alone. Set BASIC_AUTH_USER and"
                                  " BASIC_AUTH_PASS to ask it from another one.")  # fmt: skip
    standing, salt = services.access.standing(SETUP_S), secrets.token_hex(8)
    return {
        "version": __version__,
        "label_studio": {"state": standing.state, "detail": standing.sentence},
        "salt": salt,
        "settings": settings.digests(salt),
    }


def _is_from_here() -> bool:
    """Whether a program of this machine asks, and no proxy passes on what another machine wants."""
    if any(name in request.headers for name in PASSED_ON):
        return False
    try:
        with socket.socket(socket.AF_INET6 if ":" in (request.remote_addr or "") else socket.AF_INET) as probe:
            probe.bind((request.remote_addr or "", 0))  # an address can be bound where it belongs
    except OSError:
        return False
    return bool(request.remote_addr)


def _versions(services: Services) -> dict[str, list[str]]:
    """As Label Studio asks for them, which does not say of which project."""
    asked = request.args.get("project")
    project = "" if asked is None else project_id(asked)
    if asked is not None and not project:
        raise RequestError(no_project(asked))
    return {"versions": services.store.versions(project)}


def _metrics(services: Services) -> Response:
    store, live, jobs = services.store, {}, None
    with suppress(CelestialError):  # what cannot be read now is left out
        live["default"] = store.live_tag()
    with suppress(CelestialError):
        live |= store.pointers.projects()
    with suppress(CelestialError):
        jobs = services.jobs.ledger.counts()
    return Response(services.metrics.page(live, jobs), content_type=metrics.CONTENT_TYPE)


def _open() -> None:
    g.started = time.monotonic()
    g.cause = None
    g.held = ExitStack()
    g.facts = {}  # what the request's line of the log tells beside the path
    g.request_id = uuid.uuid4().hex[:12]


def _check_sender(settings: Settings) -> None:
    """
    Refuse what a browser sends for a page of another site: every page of the web can reach this machine's ports.

    A browser says whose page it is in ``Origin`` and ``Sec-Fetch-Site``. Where a site gives its own name to this
    machine's address, its page is one of ours to the browser; then the name that is asked for gives it away. A link
    to one of our pages may be followed from anywhere, as nobody but the person sees what comes.
    """
    asked, headers = request.headers.get("Host", ""), request.headers
    site, page = headers.get("Sec-Fetch-Site", "none"), headers.get("Origin")
    followed = request.method == "GET" and headers.get("Sec-Fetch-Dest") == "document" and page is None
    foreign = page is not None and page.lower().partition("://")[2] != asked.lower()
    if foreign or (site not in ("same-origin", "none") and not followed):
        logger.warning("Refused a page of %.100s [%s]", page or site, g.request_id)
        raise ForeignRequestError("A page of another site must not use this backend; only its own pages may.")
    if settings.basic_auth_user is None and not _is_known(asked, settings.hosts):
        logger.warning("Refused a request to %.100s [%s]", asked, g.request_id)
        raise ForeignRequestError(
            "The name under which the backend was asked is not known to it. Use its address instead, add the name to"
            " CELESTIAL_HOSTS, or set BASIC_AUTH_USER and BASIC_AUTH_PASS."
        )


def _is_known(asked: str, hosts: tuple[str, ...]) -> bool:
    """Whether a request's ``Host`` is an address, or a name that only this machine or its own network can have."""
    try:
        name = (urlsplit(f"//{asked}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if "." not in name or name in hosts or name.endswith(PRIVATE_NAMES) or name == socket.gethostname().lower():
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _authorize(settings: Settings) -> Response | None:
    """Every route asks for the credentials, /webhook too: they can be set as a header of the webhook."""
    if settings.basic_auth_user is None or settings.basic_auth_pass is None:
        return None
    utf_8, latin_1 = credentials(settings.basic_auth_user, settings.basic_auth_pass)
    given = _credentials()
    if hmac.compare_digest(given, utf_8) | hmac.compare_digest(given, latin_1):
        return None
    g.cause = "Unauthorized"
    answer = _answer(401, "User name or password of the ML backend is missing or wrong (BASIC_AUTH_USER).", PASSWORD)
    answer.headers["WWW-Authenticate"] = 'Basic realm="Login required"'
    return answer


def _credentials() -> bytes:
    """The ``user:password`` of the request as it came; empty without."""
    scheme, _, packed = request.headers.get("Authorization", "").partition(" ")
    try:
        return base64.b64decode(packed.encode(), validate=True) if scheme.lower() == "basic" else b""
    except binascii.Error:
        return b""


def _check(services: Services, admission: Admission) -> Any:
    """Refuse what Label Studio does not send, before the SDK's views trip over it."""
    if request.path not in PATHS:
        raise NotFound
    if request.path not in READ or request.method != "POST":
        return None
    if request.mimetype != "application/json":
        kind = repr(request.mimetype[:PATH_LENGTH]) if request.mimetype else "of no type"
        raise UnsupportedMediaType(f"A request to {request.path} must be application/json, and this one is {kind}.")
    places = admission.predictions if request.path == "/predict" else admission.others
    body = _body(g.held.enter_context(places.place()), places.max_bytes)
    found = protocol.read(request.path, body)
    if isinstance(found, OtherEvent):
        g.facts |= {"event": found.action[:PATH_LENGTH]}
        services.jobs.note_event(protocol.event_project(body), found.action)
        return {"status": "Unknown event"}
    if isinstance(found, PredictRequest):
        _note(found.project)
        g.facts["tasks"] = len(found.tasks)
        asked_at = min(g.started, time.monotonic() - _waited(services.settings.predict_max_s))
        g.found = {
            "tasks": Tasks(found.tasks),
            "label_config": found.label_config,
            "project": project_id(found.project),
            "params": {"context": None, "asked_at": asked_at},
        }
    elif isinstance(found, SetupRequest):
        project = project_id(found.project)
        _note(found.project)
        services.predictor.check(found.label_config, project)
        _check_token(services, project, found.access_token)
        services.jobs.know(project)
        g.found = {"project": project, "schema": found.label_config}
    else:
        project = str(found.project.id)
        g.facts |= {"project": project, "event": found.action}
        made = found.annotation if isinstance(found.annotation, list) else [found.annotation]
        labels = sum(label is not None and not label.was_cancelled for label in made)
        g.found = {"action": found.action, "project": {"id": project, "label_config": ""}, "labels": labels}
    return None


def _check_token(services: Services, project: str, lent: str | None) -> None:
    """
    Refuse a project of whose pictures none can be read, because the token for Label Studio is missing or refused.

    Its first tasks decide, if Label Studio shows them for the token that it has lent with the request; else what came
    of its last predictions, and for a new project whether pictures are on a disk here. Where it is not known, the
    project is taken: no prediction that would work must be lost.
    """
    until = g.started + SETUP_S
    standing = services.access.standing(min(TOKEN_S, until - time.monotonic()))
    number = project_parts(project)[0]
    if not standing.needs_token or not number:
        return
    addressed = standing.state != "no address"
    tasks = None
    if addressed and lent:
        if until - time.monotonic() < LOOK_S:
            return
        tasks = services.access.first_tasks(number, lent)
    if tasks is not None:
        locked = bool(tasks) and all(any(map(services.images.needs_token, task.values())) for task in tasks)
    else:
        settings = services.settings
        on_disk = settings.label_studio_data or settings.local_files_root or settings.data_folder
        locked = services.predictor.locked(project)
        locked = locked or (addressed and not on_disk and not services.jobs.knows(project))
    if locked:
        raise TokenError(standing.sentence)


def _note(project: object) -> None:
    """Let the request's line of the log tell the project, if it has a number."""
    if number := project_parts(str(project))[0]:
        g.facts["project"] = number


def _waited(most_s: float) -> float:
    """
    Seconds since a proxy got the request, as its ``X-Request-Start`` says; 0 without one.

    What another backend broke off and this one repeats still has to be answered while Label Studio waits.
    More than `most_s` or less than 0 is a clock that is wrong, and tells nothing.
    """
    try:
        seconds = time.time() - float(request.headers.get("X-Request-Start", "").removeprefix("t="))
    except ValueError:
        return 0.0
    return seconds if 0 <= seconds <= most_s else 0.0


class _Counted:
    """A request's bytes, counted as they come."""

    def __init__(self, stream: IO[bytes], place: Place) -> None:
        self._stream = stream
        self._place = place

    def read(self, size: int = -1) -> bytes:
        part = self._stream.read(size)
        self._place.take(len(part))
        return part


def _body(place: Place, max_bytes: int) -> bytes:
    request.environ["wsgi.input"] = _Counted(request.environ["wsgi.input"], place)
    request.max_content_length = max_bytes
    try:
        body = request.get_data(cache=False)
    except ClientDisconnected as error:
        raise BodyTooLateError("The body of the request did not come whole and in time. Send it again.") from error
    except MalformedBody as error:
        raise RequestError(
            f"The chunks of the body of {request.path} must be as HTTP has them, and are not ({type(error).__name__}). "
            "Send it with a Content-Length."
        ) from error
    except RequestEntityTooLarge:
        body = None
    # Werkzeug refuses an announced length, and cuts what comes in chunks without a word.
    if body is None or (request.content_length is None and len(body) >= max_bytes):
        raise BodyTooLargeError(
            f"A request to {request.path} may have {max_bytes / 1e6:g} MB, and this one has more. Send less at once, or"
            " raise CELESTIAL_REQUEST_MAX_MB."
        )
    return body


def _close(response: Response, counts: metrics.Metrics) -> Response:
    response.headers["X-Request-ID"] = g.request_id
    level = logging.DEBUG if request.path in ("/", "/health") else logging.INFO
    seconds = time.monotonic() - g.started
    path = request.path if request.path in PATHS else repr(request.path[:PATH_LENGTH])  # on one line, whatever it is
    facts = {"method": request.method, "path": path, "status": response.status_code, "seconds": round(seconds, 3)}
    more = "".join(f" {name}={value}" for name, value in g.facts.items())
    logger.log(level, "%s %s %d %.3f s%s [%s]", *facts.values(), more, g.request_id,
               extra={logs.FACTS: facts | g.facts | {"request": g.request_id}})  # fmt: skip
    counts.request(request.path if request.path in PATHS else "other", response.status_code, seconds)
    if g.cause:
        counts.failure("request", g.cause)
    return response


def _refused(error: CelestialError) -> Response:
    g.cause = type(error).__name__
    logger.warning("%s [%s]", error, g.request_id)
    answer = _answer(error.status, str(error), error.code)
    if isinstance(error, BusyError):
        answer.headers["Retry-After"] = str(RETRY_S)
    return answer


def _not_served(error: HTTPException) -> Response:
    g.cause = type(error).__name__
    answer = _answer(error.code or 500, error.description or error.name, code_of(type(error).__name__))
    answer.headers.extend((name, value) for name, value in error.get_headers() if name == "Allow")
    return answer


def _failed(error: Exception) -> Response:
    g.cause = type(error).__name__
    logger.error("Request %s failed unexpectedly", g.request_id, exc_info=error)
    return _answer(500, f"Internal error. The backend's log tells more under request {g.request_id}.", "internal")


def _answer(status: int, sentence: str, code: str) -> Response:
    """
    An error as JSON, with its sentence in the status line as well, and its cause as a code for programs.

    Label Studio drops the body of an error and shows the reason phrase to the
    person who connects the model. A status line holds one line of Latin-1.
    """
    response = jsonify({"status": status, "code": code, "detail": sentence, "request_id": g.request_id})
    reason = " ".join(sentence.split()).encode("ascii", "replace").decode()
    response.status = f"{status} {reason[:REASON_LENGTH]}"
    return response
