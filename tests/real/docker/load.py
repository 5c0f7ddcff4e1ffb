"""
Runs in a container of the tests: asks for predictions, one batch after the other, until the file /tmp/stop is there.

It prints one line of JSON: how many pictures were asked for, and each failure with its time.
"""

import base64
import http.client
import io
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from celestial_backend.planets.renderer import render

SIZE, STOP = 20, Path("/tmp/stop")  # noqa: S108 - of the container
CONFIG = sys.argv[1]


def picture(seed: int) -> str:
    file = io.BytesIO()
    render("Saturn", seed=seed, size_px=72).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


TASKS = [{"id": seed, "data": {"image": picture(seed)}} for seed in range(SIZE)]
BODY = json.dumps({"tasks": TASKS, "label_config": CONFIG, "project": "900.1"})


def ask() -> str:
    """What went wrong with a batch; "" if nothing did."""
    link = http.client.HTTPConnection("ml-backend.internal", 9090, timeout=100)
    try:
        link.request("POST", "/predict", BODY, {"Content-Type": "application/json"})
        answer = link.getresponse()
        text = answer.read()
        if answer.status != 200:
            return f"{answer.status} {answer.reason}"
        given = [each for each in json.loads(text)["results"] if each and each["result"]]
        return "" if len(given) == SIZE else f"{len(given)} of {SIZE}"
    except (OSError, http.client.HTTPException) as error:
        return repr(error)
    finally:
        link.close()


def go_on() -> tuple[int, list[str]]:
    asked, failures = 0, []
    while not STOP.exists():
        if failure := ask():
            failures.append(f"{time.strftime('%H:%M:%S')} {failure}")
            time.sleep(0.2)
        asked += SIZE
    return asked, failures


if __name__ == "__main__":
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: go_on(), range(3)))
    told = {"asked": sum(asked for asked, _ in done), "lost": [failure for _, lost in done for failure in lost]}
    sys.stdout.write(json.dumps(told))
