"""Clients that are slow, silent or many, against the real server."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from celestial_backend.planets.renderer import render
from celestial_backend.web.admission import LINE
from celestial_backend.web.server import SPARE
from tests.support.backend_server import REPOSITORY, Backends, ServerProcess, free_port, label_config, plain_environ

HEALTH_S, SETUP_S = 5, 10  # Label Studio gives 1 and 3; other tests want the processor too
SHORT = (
    "import sys; from celestial_backend.web import admission, connections; admission.LINE = 4; "
    "connections.REQUEST_S = connections.SEND_S = 2.0; "
    "from celestial_backend.web import server; sys.exit(server.serve())"
)
ENDED = 15  # seconds in which what lasts 2 must have ended, on a busy machine
DATA_SEGMENTS = 152  # the place of tcpi_data_segs_in in Linux's struct tcp_info
TASKS = {"tasks": [], "label_config": label_config(), "project": "1.1"}
SETUP = {"project": "1.1", "schema": label_config()}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that gives a request two seconds to come whole, with 1 + 4 + 8 threads."""
    folder, port, bin_folder = tmp_path_factory.mktemp("slow"), free_port(), Path(sys.executable).parent
    own = {"MODEL_DIR": str(folder / "state"), "BENTOML_HOME": str(folder / "bentoml"), "THREADS": "1"}
    own |= {"CELESTIAL_REQUEST_MAX_MB": "1"}
    server = ServerProcess(
        [sys.executable, "-c", SHORT, "-p", str(port), "--host", "127.0.0.1"],
        cwd=REPOSITORY, environ=plain_environ(bin_folder) | own, log=folder / "log",
    )  # fmt: skip
    try:
        server.wait_for_answer(f"http://127.0.0.1:{port}/health", 60)
        server.wait_for_log("Loaded", seconds=60)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()
    assert "Traceback" not in server.log_text()


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), ENDED)


def trickle(link: socket.socket, text: bytes, stop: threading.Event) -> None:
    """Send a byte every fifth of a second, until the server hangs up."""
    with contextlib.suppress(OSError):
        for sign in text:
            link.sendall(bytes([sign]))
            if stop.wait(0.2):
                return


def answer(link: socket.socket) -> bytes:
    """All that the server says before it hangs up."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while part := link.recv(4096):
            said += part
    return said


@pytest.mark.parametrize("path", ["predict", "setup", "webhook"])
def test_a_body_that_trickles_is_cut_off(url: str, path: str) -> None:
    """A byte now and then for ever: answered 408 with a sentence once its time is up, and the thread is free."""
    head = f"POST /{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n"
    stop = threading.Event()
    with connect(url) as link:
        link.sendall(head.encode())
        sender = threading.Thread(target=trickle, args=(link, b" " * 5000, stop))
        sender.start()
        said = answer(link)
        stop.set()
        sender.join()
    assert said.startswith(b"HTTP/1.1 408 The body of the request did not come whole and in time")


def test_a_head_that_trickles_is_cut_off(url: str) -> None:
    """The same before the body: there is nobody to answer yet, so the connection ends."""
    stop = threading.Event()
    with connect(url) as link:
        sender = threading.Thread(target=trickle, args=(link, b"GET /health HTTP/1.1\r\nX: " + b"y" * 5000, stop))
        sender.start()
        assert answer(link) == b""
        stop.set()
        sender.join()


def test_slow_clients_keep_nobody_else_waiting(url: str) -> None:
    """While ten bodies, and fifty silent connections, are waited for, /health and /setup keep Label Studio's limits."""
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n "
    with contextlib.ExitStack() as links:
        for _ in range(50):
            links.enter_context(connect(url))
        for _ in range(10):
            links.enter_context(connect(url)).sendall(head)
        for _ in range(5):
            assert requests.get(f"{url}/health", timeout=HEALTH_S).status_code == 200
            assert requests.post(f"{url}/setup", json=SETUP, timeout=SETUP_S).status_code == 200


@pytest.mark.parametrize("last", ["Connection: close", "Content-Length: 9"])
def test_clients_that_do_not_hang_up_keep_nobody_waiting(backends: Backends, last: str) -> None:
    """As many as there are threads want no more, or never send the body of a GET: the next does not wait 30 s."""
    server, head = backends(THREADS="1"), f"GET /health HTTP/1.1\r\nHost: x\r\n{last}\r\n\r\n"
    with contextlib.ExitStack() as links:
        for _ in range(1 + LINE + SPARE):
            links.enter_context(connect(server.url)).sendall(head.encode())
        assert requests.get(f"{server.url}/health", timeout=ENDED).status_code == 200


@pytest.mark.parametrize(("path", "most"), [("predict", "1"), ("setup", "0.1"), ("webhook", "0.1")])
def test_a_body_without_a_length_is_bounded_too(url: str, path: str, most: str) -> None:
    """What comes in chunks is refused once it is more than CELESTIAL_REQUEST_MAX_MB, or a tenth of it."""
    refused = requests.post(f"{url}/{path}", data=(b" " * 100_000 for _ in range(11)), timeout=ENDED,
        headers={"Content-Type": "application/json"},
    )
    assert refused.status_code == 413
    assert refused.reason.startswith(f"A request to /{path} may have {most} MB, and this one has more.")


@pytest.mark.parametrize("path", ["predict", "setup", "webhook"])
@pytest.mark.parametrize(
    ("chunks", "fault"),
    [
        (b"zz\r\n", "InvalidChunkSize"),
        (b"2\r\n{}!!", "ChunkMissingTerminator"),
        (b"2\r\n{}\r\n0\r\nno trailer\r\n\r\n", "InvalidHeader"),
    ],
)
def test_chunks_that_are_none_get_a_sentence(url: str, path: str, chunks: bytes, fault: str) -> None:
    """A body that breaks the rules of HTTP is the client's fault: 400, and no traceback in the log."""
    with connect(url) as link:
        kind = "Content-Type: application/json\r\nTransfer-Encoding: chunked"
        head = f"POST /{path} HTTP/1.1\r\nHost: x\r\n{kind}\r\n\r\n"
        link.sendall(head.encode() + chunks)
        said = answer(link)
    assert said.startswith(f"HTTP/1.1 400 The chunks of the body of /{path} must be as HTTP has them".encode())
    assert f"({fault})".encode() in said


@pytest.mark.parametrize("length", ["Transfer-Encoding: chunked", "Content-Length: 1000000"])
def test_bytes_that_have_not_come_keep_nobody_out(url: str, length: str) -> None:
    """Who sends a byte of the most that a body may have, or tells no length, leaves room for the next."""
    with contextlib.ExitStack() as links:
        for _ in range(2):
            link = links.enter_context(connect(url))
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n1"
            link.sendall(head.encode())
        assert requests.post(f"{url}/predict", json=TASKS, timeout=ENDED).status_code == 200


def test_more_than_the_line_holds_are_refused_at_once(url: str) -> None:
    """One at work and four in line, whose bodies have not come yet: the sixth gets 503, Retry-After and a sentence."""
    assert requests.post(f"{url}/predict", json=TASKS, timeout=60).status_code == 200, "the model is loaded"
    deadline = time.monotonic() + ENDED
    while True:  # the five hold their places for two seconds, and a busy machine may be slower
        assert time.monotonic() < deadline
        with contextlib.ExitStack() as links:
            refused = sixth(url, links)
            if refused.status_code == 503:
                event = {"action": "ANNOTATION_CREATED", "project": {"id": 1}, "annotation": {}}
                assert requests.post(f"{url}/webhook", json=event, timeout=ENDED).status_code in (200, 201)
                break
    assert refused.reason.startswith("Too many predictions are asked for at once: 5 ")
    assert int(refused.headers["Retry-After"]) > 0
    deadline = time.monotonic() + ENDED
    while requests.post(f"{url}/predict", json=TASKS, timeout=ENDED).status_code != 200:
        assert time.monotonic() < deadline, "the places of those who hung up must be free again"


def sixth(url: str, links: contextlib.ExitStack) -> requests.Response:
    """What a prediction is answered behind five others; asked again where it was faster than these."""
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n "
    for _ in range(5):
        links.enter_context(connect(url)).sendall(head)
    for _ in range(20):
        answered = requests.post(f"{url}/predict", json=TASKS, timeout=ENDED)
        if answered.status_code == 503:
            break
    return answered


@pytest.mark.parametrize("path", ["/health", "/openapi.json", "/nowhere", "/predict"])
def test_an_answer_comes_in_one_piece(url: str, path: str) -> None:
    """Head and body, so that a process that is killed has sent nothing and nginx may ask another: one TCP segment."""
    with connect(url) as link:
        link.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        said = answer(link)
        (segments,) = struct.unpack_from("=I", link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), DATA_SEGMENTS)
    head, body = said.split(b"\r\n\r\n", 1)
    assert f"Content-Length: {len(body)}".encode() in head
    assert body
    assert segments == 1


def test_many_connections_are_all_answered(url: str) -> None:
    """Two hundred at once: each gets an answer."""
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(requests.get(f"{url}/health", timeout=60).status_code))
        for _ in range(200)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200] * 200


def test_health_and_setup_keep_their_limits_under_load(backends: Backends, tmp_path: Path) -> None:
    """
    While 12 large batches and 32 single tasks at a time are predicted, and all of them are answered.

    The single tasks come first, so a batch may run out of its time on a slow machine and be answered with what is done.
    """
    (tmp_path / "originals").mkdir()
    render("Mars", 1, size_px=250).save(tmp_path / "originals" / "mars.png")
    server = backends(CELESTIAL_DATA_FOLDER=tmp_path / "originals")
    value = "/data/upload/1/01234567-mars.png"
    assert server.predict([value])[0]["result"]
    over = threading.Event()
    failed: list[str] = []

    large_body = TASKS | {"tasks": [{"id": number, "data": {"image": value}} for number in range(80)]}

    def batch() -> None:
        while (answer := server.post("/predict", large_body)).status_code == 503:
            time.sleep(int(answer.headers["Retry-After"]))  # a busy machine has no turn for it yet
        if answer.status_code != 200 or len(answer.json()["results"]) != 80:
            failed.append("batch")

    def singles() -> None:
        while not over.is_set():
            if not server.predict([value])[0]["result"]:
                failed.append("single")

    large = [threading.Thread(target=batch) for _ in range(12)]
    small = [threading.Thread(target=singles) for _ in range(32)]
    for thread in large + small:
        thread.start()
    slowest = {"/health": 0.0, "/setup": 0.0}
    while any(thread.is_alive() for thread in large):
        started = time.monotonic()
        assert requests.get(f"{server.url}/health", timeout=60).status_code == 200
        middle = time.monotonic()
        assert server.post("/setup", SETUP, timeout=60).status_code == 200
        slowest["/health"] = max(slowest["/health"], middle - started)
        slowest["/setup"] = max(slowest["/setup"], time.monotonic() - middle)
        time.sleep(0.05)
    over.set()
    for thread in large + small:
        thread.join()
    assert not failed
    assert slowest["/health"] < HEALTH_S
    assert slowest["/setup"] < SETUP_S
