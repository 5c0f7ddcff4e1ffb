"""
The worker: `huey_consumer celestial_backend.worker.huey`, or what `label-studio-ml start .` starts beside itself.

It takes jobs from the queue, one at a time, and gives each to a process of its own: `training` runs a training,
`pages` predicts pages of tasks. What a job is, and what becomes of it, lies in `jobs`.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from typing import Any


@cache
def _queue() -> Any:
    """The queue by the settings of this process; it ends with a sentence where they are wrong."""
    from celestial_backend import logs
    from celestial_backend.errors import CelestialError
    from celestial_backend.services import build
    from celestial_backend.settings import Settings, state_note
    from celestial_backend.state import private

    try:
        settings = Settings.from_environ(os.environ)
        private(settings.model_dir)
        logs.configure(settings.log_level, settings.log_format)
        if note := state_note():
            logging.getLogger(__name__).warning("%s", note)
        return build(settings).jobs.huey
    except CelestialError as error:
        logs.refuse(error)
        sys.exit(error.exit_code)


def __getattr__(name: str) -> Any:
    """`huey`, made when it is asked for: the processes of this room are started without it."""
    if name == "huey":
        return _queue()
    raise AttributeError(name)
