"""How many made-up cases the tests try: some here and now, `TEST_CASES_TIMES` as many when there is time."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much,
         HealthCheck.data_too_large]  # fmt: skip
TIMES = int(os.environ.get("TEST_CASES_TIMES") or 1)
PHASES = [Phase.explicit, Phase.generate]  # a counterexample is shown as it was found: shrinking takes minutes


def cases(number: int) -> settings:
    """Settings of hypothesis for that many cases, or a multiple of them; the test's `seed` makes them the same ones."""
    return settings(
        max_examples=number * TIMES, deadline=None, database=None, suppress_health_check=QUIET, phases=PHASES
    )
