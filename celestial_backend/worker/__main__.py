"""A worker that ends with the process that started it: `python -m celestial_backend.worker PARENT`."""

from __future__ import annotations

import sys

from celestial_backend import worker
from celestial_backend.jobs.processes import end_with_parent

POLL_S = 1.0  # the longest that a job waits for a worker that has nothing to do

if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    worker.huey.create_consumer(max_delay=POLL_S).run()
