"""The page at `/`: what runs here, what it serves to whom, how trainings go, and what to type into Label Studio."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any

from flask import Response, request

from celestial_backend import __version__
from celestial_backend.errors import CelestialError, StateError
from celestial_backend.jobs.ledger import RUNNING, WAITING
from celestial_backend.services import Services
from celestial_backend.settings import Settings
from celestial_backend.web import pages

PROJECTS_MAX, JOBS_MAX, CLASSES_MAX = 50, 10, 60  # that are shown
REFRESH_S = 10  # while a training waits or runs
PAGES = ("getting-started", "label-config", "pictures", "model", "settings", "operations", "deployment")  # in docs/


def wants_html() -> bool:
    """Whether a request comes from somebody who reads: programs, Label Studio too, do not ask for HTML."""
    accepted = request.accept_mimetypes
    return accepted.best_match(("application/json", "text/html")) == "text/html"


def page(services: Services) -> Response:
    """The page, as things are now; what cannot be read is said, and the rest shown."""
    settings, trouble = services.settings, ""
    jobs: dict[str, Any] = {}
    try:
        jobs = _jobs(services)
    except StateError as error:
        trouble = str(error)
    made = pages.respond(
        "home.html",
        version=__version__,
        model=_model(services),
        jobs=jobs,
        trouble=_hidden(trouble, settings),
        address=settings.address,
        guarded=settings.basic_auth_user is not None,
        studio=settings.studio_link or "",
        standing=services.access.standing(0.0),
        pages=PAGES,
        refresh=REFRESH_S if any(jobs.get("counts", {}).get(state) for state in (WAITING, RUNNING)) else 0,
    )
    made.headers["Vary"] = "Accept"
    return made


def _model(services: Services) -> dict[str, Any]:
    """The model of all projects without one of their own."""
    try:
        tag = services.store.live_tag()
        known = services.store.known(tag)
    except CelestialError as error:
        return {"trouble": _hidden(str(error), services.settings)}
    classes = known.classes if known else ()
    more = len(classes[CLASSES_MAX:])
    return {"tag": tag, "loaded": services.store.loaded(tag), "classes": classes[:CLASSES_MAX], "more": more}


def _jobs(services: Services) -> dict[str, Any]:
    """Projects and trainings, as the database has them now; no more is asked once it does not answer."""
    ledger, settings = services.jobs.ledger, services.settings
    counts, workers = ledger.counts(), ledger.workers()
    live, missing = services.store.pointers.projects(), {known.project: known.hindrance for known in ledger.hindered()}
    kept: dict[str, int] = {}
    for model in services.store.registry.models():
        if model.project:
            kept[model.project] = kept.get(model.project, 0) + 1
    known = sorted({*live, *ledger.looks(wanted=False)}, key=int)
    return {
        "counts": counts,
        "workers": workers,
        "projects": [(number, live.get(number, ""), kept.get(number, 0), _hidden(missing.get(number, ""), settings))
                     for number in known[:PROJECTS_MAX]],
        "more": len(known[PROJECTS_MAX:]),
        "last": [
            asdict(job) | {"reason": _hidden(job.reason, settings), "at": _moment(job.ended_at or job.requested_at)}
            for job in ledger.jobs(limit=JOBS_MAX)
        ],
    }  # fmt: skip


def _hidden(sentence: str, settings: Settings) -> str:
    """A sentence without the paths of this machine."""
    for path in sorted({str(settings.model_dir), str(settings.bentoml_home), str(settings.cache_folder)}, key=len):
        sentence = sentence.replace(path, "…")
    return sentence


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
