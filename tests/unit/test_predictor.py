"""How many pictures are worked on at one moment, and whose."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO

import pytest
from PIL import Image

from celestial_backend.pictures.decode import decode
from celestial_backend.predictor import FairPool, Workbench
from celestial_backend.settings import Settings
from tests.support.bounds import MB, WAIT_S, wait_for


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
    bench = Workbench(Settings(image_max_megapixels=10), pictures=4)
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
    bench = Workbench(Settings(image_max_megapixels=10), pictures=4)
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


def test_room_is_waited_for_until_the_deadline() -> None:
    """A picture whose time is up takes no room, and the next one finds as much as there was."""
    bench = Workbench(Settings(), pictures=1)
    picture = BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with bench.room() as stays:
        stays.take(MB)
        with pytest.raises(TimeoutError), bench.room(time.monotonic() + 0.05) as late:
            decode(picture.getvalue(), MB, late.take)
    with bench.room(time.monotonic()) as room:
        room.take(MB)
