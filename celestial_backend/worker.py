"""The worker: `huey_consumer celestial_backend.worker.huey`, or what `label-studio-ml start .` starts beside itself."""

from __future__ import annotations

import sys

from celestial_backend import logs
from celestial_backend.errors import CelestialError
from celestial_backend.files import private
from celestial_backend.processes import end_with_parent
from celestial_backend.settings import Settings
from celestial_backend.wiring import build

POLL_S = 1.0  # the longest that a job waits for a worker that has nothing to do

try:
    settings = Settings.from_environ()
    private(settings.model_dir)
    logs.configure(settings.log_level)
    huey = build(settings).jobs.huey
except CelestialError as error:
    sys.stderr.write(f"{error}\n")
    sys.exit(error.exit_code)

if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    huey.create_consumer(max_delay=POLL_S).run()
