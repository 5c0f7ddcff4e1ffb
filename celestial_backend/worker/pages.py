"""Predictions in a process of its own: `python -m celestial_backend.worker.pages WORKER`, started by a worker."""

from __future__ import annotations

import json
import os
import select
import sys
from typing import Any

from celestial_backend import logs
from celestial_backend.errors import CelestialError
from celestial_backend.jobs.processes import end_with_parent
from celestial_backend.services import Services, build
from celestial_backend.settings import Settings

IDLE_S = 60.0  # a model in memory is kept so long for the next page


def main(worker: int) -> None:
    """Answer each page, a line of JSON, with a line; end when none comes for a while, or the worker has ended."""
    end_with_parent(worker)
    settings = Settings.from_environ()
    logs.configure(settings.log_level, settings.log_format)
    services = build(settings)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    while select.select([sys.stdin], [], [], IDLE_S)[0]:
        line = sys.stdin.readline()
        if not line:
            return
        answers.write(json.dumps(_answer(services, json.loads(line))) + "\n")
        answers.flush()


def _answer(services: Services, page: dict[str, Any]) -> dict[str, Any]:
    project, failures = page["project"], []
    try:
        live = services.store.live_tag(project)
        if live != page["version"]:
            return {"error": f"Its live model of project {project} is {live}, and {page['version']} was asked for. See"
                    " that all workers have the CELESTIAL_DATABASE_URL and BENTOML_HOME of the command."}  # fmt: skip
        answers = services.predictor.predict(
            page["tasks"], page["config"], project=project, on_failure=lambda *failure: failures.append(failure)
        )
    except CelestialError as error:
        return {"error": str(error)}
    return {"answers": answers, "failures": failures}


if __name__ == "__main__":
    main(int(sys.argv[1]))
