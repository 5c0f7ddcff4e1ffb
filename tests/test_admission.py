"""How many predictions a process takes on: places, turns, and pixels."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from backend_server import label_config
from flask import Flask
from flask.testing import FlaskClient
from picture_host import PictureHost, picture_host

from celestial_backend.admission import LINE, Admission, Bench, FairPool
from celestial_backend.app import create_app
from celestial_backend.errors import BusyError
from celestial_backend.renderer import render
from celestial_backend.settings import Settings
from celestial_backend.wiring import Services, build

MB = 1_000_000
WAIT_S = 10
SETUP = {"project": "7.1", "schema": label_config()}
EVENT = {"action": "ANNOTATION_CREATED", "project": {"id": 7}, "annotation": {}}
TASKS = {"tasks": [], "label_config": label_config(), "project": "7.1"}


def soon(seconds: float = WAIT_S) -> float:
    return time.monotonic() + seconds


def test_places_are_bounded_and_given_back() -> None:
    """THREADS at work and a line behind them; one who leaves makes room for one more."""
    admission = Admission(Settings(threads=2))
    with ExitStack() as held:
        for _ in range(2 + LINE):
            held.enter_context(admission.predictions.place())
        with pytest.raises(BusyError, match=r"Too many predictions are asked for at once: 130 .* raise WORKERS"):
            held.enter_context(admission.predictions.place())
    with admission.predictions.place():
        pass


def test_bytes_are_bounded_as_they_come_and_one_large_request_is_always_let_in() -> None:
    """While the others hold less than the bound even the largest is served; what comes then is refused, halfway too."""
    places = Admission(Settings(request_max_mb=10)).predictions
    with places.place() as small, places.place() as large, places.place() as halfway:
        small.take(9 * MB)
        large.take(10 * MB)
        with pytest.raises(BusyError, match=r"3 with 19\.0 MB are here"):
            halfway.take(1)
        with pytest.raises(BusyError):
            places.place().__enter__()
    with places.place() as large:
        large.take(9 * MB)
        large.take(1 * MB)


def test_a_turn_is_waited_for_and_not_for_ever() -> None:
    """With one of THREADS the second waits: in vain until its time is up, and no longer than the first works."""
    admission = Admission(Settings(threads=1))
    got = threading.Event()

    def second() -> None:
        with admission.turn(1, soon()):
            got.set()

    with admission.turn(1, soon()):
        with pytest.raises(BusyError, match="turn did not come in time"), admission.turn(1, soon(0.05)):
            pass
        waiting = threading.Thread(target=second)
        waiting.start()
        assert not got.wait(0.1)
    assert got.wait(WAIT_S)
    waiting.join()


def test_large_requests_leave_turns_for_single_tasks() -> None:
    """However many large ones wait, half of the turns are for small ones."""
    admission = Admission(Settings(threads=4, batch_size=64))
    with admission.turn(65, soon()), admission.turn(1000, soon()):
        with pytest.raises(BusyError), admission.turn(65, soon(0.05)):
            pass
        with admission.turn(64, soon(0)), admission.turn(1, soon(0)):
            pass


def test_a_turn_that_failed_is_given_back() -> None:
    """An error in the middle costs no turn, nor does giving up in line."""
    admission = Admission(Settings(threads=1))
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), admission.turn(1000, soon(0)):
            raise ZeroDivisionError


@pytest.mark.parametrize(
    ("pixels", "side_by_side"),
    [
        pytest.param([10 * MB] * 5, 2, id="the largest"),
        pytest.param([MB] * 9, 4, id="small ones"),
        pytest.param([50 * MB] * 3, 1, id="larger than all"),
    ],
)
def test_pictures_in_flight_are_bounded(pixels: list[int], side_by_side: int) -> None:
    """By cores and by pixels; all of them come through, and one that fails gives its room back."""
    bench = Bench(Settings(image_max_megapixels=10), pictures=4)
    together, lock, most, running = threading.Barrier(side_by_side), threading.Lock(), 0, 0

    def work(size: int) -> None:
        nonlocal most, running
        with suppress(ZeroDivisionError), bench.room() as room:
            room.take(size)
            with lock:
                running += 1
                most = max(most, running)
            with suppress(threading.BrokenBarrierError):
                together.wait(0.3)
            with lock:
                running -= 1
            raise ZeroDivisionError

    with ThreadPoolExecutor(len(pixels)) as threads:
        for done in [threads.submit(work, size) for size in pixels]:
            done.result(WAIT_S)
    assert most == side_by_side


def test_a_picture_that_fits_does_not_wait_for_one_that_does_not() -> None:
    """One leaves: the next in line is too large for its room, and the one behind that is let in."""
    bench = Bench(Settings(image_max_megapixels=10), pictures=4)
    let_in = {size: threading.Event() for size in (15 * MB, 10 * MB)}

    def work(size: int) -> None:
        with bench.room() as room:
            room.take(size)
            let_in[size].set()

    with bench.room() as stays:
        stays.take(10 * MB)
        with bench.room() as leaves:
            leaves.take(10 * MB)
            line = [threading.Thread(target=work, args=(size,)) for size in let_in]
            for thread in line:
                thread.start()
                time.sleep(0.1)  # it waits now, in this order
        fitted = let_in[10 * MB].wait(WAIT_S)
        assert not let_in[15 * MB].is_set()
    for thread in line:
        thread.join()
    assert fitted


@pytest.fixture
def host() -> PictureHost:
    with picture_host() as host:
        yield host


@pytest.fixture
def services(tmp_path: Path) -> Services:
    settings = Settings(
        bentoml_home=tmp_path / "bentoml", model_dir=tmp_path, threads=1, predict_max_s=2 * WAIT_S,
        request_max_mb=0.01, allowed_hosts=("127.0.0.1",),
    )  # fmt: skip
    return build(settings)


@pytest.fixture
def app(services: Services) -> Flask:
    return create_app(services)


@pytest.mark.parametrize(("path", "most"), [("/predict", 10_000), ("/setup", 1_000), ("/webhook", 1_000)])
def test_a_body_may_have_so_many_megabytes(app: Flask, path: str, most: int) -> None:
    """CELESTIAL_REQUEST_MAX_MB, and a tenth of it: more is refused with a sentence in the status line."""
    client = app.test_client()
    refused = client.post(path, data=b"x" * (most + 1), content_type="application/json")
    sentence = f"413 A request to {path} may have {most / MB:g} MB, and this one has more. Send less at once, or raise"
    assert refused.status.startswith(sentence)
    assert client.post(path, data=b"x" * most, content_type="application/json").status_code == 400
    assert client.post("/predict", json=TASKS | {"more": "x" * 9000}).status_code == 200


def test_past_the_bounds_predictions_are_refused_and_all_else_is_answered(app: Flask, services: Services) -> None:
    """503 with Retry-After and a sentence in the status line; /health, /setup and webhooks never see it."""
    client = app.test_client()
    with services.admission.predictions.place() as place:
        place.take(MB)
        refused = client.post("/predict", json=TASKS)
        assert refused.status_code == 503
        assert refused.status.startswith("503 Too many predictions are asked for at once: 1 with 1.0 MB are here")
        assert int(refused.headers["Retry-After"]) > 0
        assert client.get("/health").status_code == 200
        assert client.post("/setup", json=SETUP).status_code == 200
        assert client.post("/webhook", json=EVENT).status_code in (200, 201)
    assert client.post("/predict", json=TASKS).status_code == 200


@pytest.mark.parametrize(("path", "body"), [("/setup", SETUP), ("/webhook", EVENT)])
def test_setups_and_events_are_bounded_apart_from_predictions(
    app: Flask, services: Services, path: str, body: dict[str, object]
) -> None:
    """They hold places of their own, which are given back; past them it is 503, and predictions never see it."""
    client = app.test_client()
    with services.admission.others.place() as place:
        place.take(MB)
        refused = client.post(path, json=body)
        assert refused.status.startswith("503 Too many answers of /setup and /webhook are asked for at once: 1 with 1")
        assert client.post("/predict", json=TASKS).status_code == 200
    assert client.post(path, json=body).status_code in (200, 201)
    assert services.admission.others.requests == services.admission.others.bytes == 0


def test_a_refused_request_holds_nothing(app: Flask, services: Services) -> None:
    """Whatever comes of requests, bad ones included, all places are free again."""
    client = app.test_client()
    for body in (b"{", b"x" * 20_000, b"[]", b'{"tasks": 1}'):
        for _ in range(LINE + 10):
            assert client.post("/predict", data=body, content_type="application/json").status_code in (400, 413)
    assert client.post("/predict", json=TASKS).status_code == 200
    assert services.admission.predictions.requests == services.admission.predictions.bytes == 0


def test_predictions_wait_for_their_turn(app: Flask, host: PictureHost, tmp_path: Path) -> None:
    """With one of THREADS the second prediction is not begun before the first has ended, and /health is answered."""
    begun, go_on = threading.Event(), threading.Event()
    render("Mars", 1).save(tmp_path / "mars.png")
    picture = (tmp_path / "mars.png").read_bytes()

    def slow(handler: object) -> None:
        begun.set()
        assert go_on.wait(WAIT_S)
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(picture)

    host.answers = {"/slow": slow, "/fast": picture}

    def ask(client: FlaskClient, path: str) -> list[object]:
        task = {"id": 1, "data": {"image": host.url + path}}
        return client.post("/predict", json=TASKS | {"tasks": [task]}).json["results"]

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ask, app.test_client(), "/slow")
        assert begun.wait(60)
        second = threads.submit(ask, app.test_client(), "/fast")
        time.sleep(0.2)
        assert [path for path, _ in host.requests] == ["/slow"]
        assert app.test_client().get("/health").status_code == 200
        go_on.set()
        assert first.result(WAIT_S)[0]["result"] == second.result(WAIT_S)[0]["result"] != []


def test_threads_are_shared_between_requests() -> None:
    """A request with much to do has as many as it may, one that comes later its own; each call gives its result."""
    pool, go_on = FairPool(4, "test", spare=1), threading.Event()
    running: Counter[str] = Counter()

    def work(name: str) -> str:
        running[name] += 1
        assert go_on.wait(WAIT_S)
        return name

    first, second = pool.share(), pool.share()
    calls = [first.submit(work, "first") for _ in range(64)]
    wait_for(lambda: running["first"] == 4)
    late = [second.submit(work, "second") for _ in range(2)]
    wait_for(lambda: running["second"] == 1)
    assert running["first"] == 4
    go_on.set()
    assert [call.result(WAIT_S) for call in calls + late] == ["first"] * 64 + ["second"] * 2


def test_a_thread_that_is_free_goes_to_the_request_that_has_the_fewest() -> None:
    """However much the first has lined up, the second is served by turns from the moment that it is there."""
    pool, done = FairPool(1, "test"), list[str]()
    started, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        assert go_on.wait(WAIT_S)

    first, second = pool.share(), pool.share()
    first.submit(wait)
    assert started.wait(WAIT_S)
    calls = [share.submit(done.append, name) for share, name in [(first, "first")] * 20 + [(second, "second")] * 3]
    go_on.set()
    for call in calls:
        call.result(WAIT_S)
    assert done.index("second") <= 1
    assert sorted(done) == ["first"] * 20 + ["second"] * 3


def test_what_was_given_up_is_not_done_and_what_fails_fails_alone() -> None:
    """A call that is cancelled in line costs nothing; an error reaches whoever waits for it, and no other."""
    pool, go_on, done = FairPool(1, "test"), threading.Event(), list[int]()
    share = pool.share()
    first = share.submit(go_on.wait, WAIT_S)
    given_up, failing, last = share.submit(done.append, 1), share.submit(int, "x"), share.submit(done.append, 2)
    assert given_up.cancel()
    go_on.set()
    assert first.result(WAIT_S)
    with pytest.raises(ValueError, match="invalid literal"):
        failing.result(WAIT_S)
    last.result(WAIT_S)
    assert done == [2]


def test_pictures_that_drip_keep_no_other_request_waiting(host: PictureHost, tmp_path: Path) -> None:
    """64 tasks of one request that take all the time there is: a request beside it is predicted meanwhile."""
    settings = Settings(
        bentoml_home=tmp_path / "bentoml", model_dir=tmp_path, threads=2, image_timeout_s=WAIT_S,
        predict_max_s=WAIT_S, allowed_hosts=("127.0.0.1",), fetch_threads=4,
    )  # fmt: skip
    services = build(settings)
    app, stop = create_app(services), threading.Event()
    render("Mars", 1).save(tmp_path / "mars.png")
    host.answers = {"/slow": lambda _: stop.wait(WAIT_S), "/fast": (tmp_path / "mars.png").read_bytes()}

    def ask(path: str, number: int) -> list[object]:
        tasks = [{"id": n, "data": {"image": host.url + path}} for n in range(number)]
        return list(app.test_client().post("/predict", json=TASKS | {"tasks": tasks}).json["results"])

    assert all(ask("/fast", 2))
    with ThreadPoolExecutor(1) as threads:
        dripping = threads.submit(ask, "/slow", 64)
        wait_for(lambda: sum(path == "/slow" for path, _ in host.requests) == 4)
        assert all(ask("/fast", 2))
        assert not dripping.done()
        stop.set()
        assert dripping.result(2 * WAIT_S) == [[]] * 64


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
