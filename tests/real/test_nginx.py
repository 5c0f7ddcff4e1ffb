"""nginx with the project's configuration, before backends that do what real ones do when something is wrong."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from tests.support.backend_server import free_port
from tests.support.nginx_server import CONFIGURATION, HOW_TO_GET_ONE, Names, NginxServer, find_nginx, release
from tests.support.picture_host import Answer, PictureHost, picture_host

CONNECT_S, HEALTH_S, SETUP_S, PREDICT_S, EVENT_S = 1, 1, 3, 100, 1  # what Label Studio gives
JSON = {"Content-Type": "application/json"}
PATHS = ("/health", "/setup", "/predict", "/webhook")
FINE: Answer = (200, {"Content-Type": "application/json"}, b'{"results": []}')


class Hosts(list[PictureHost]):
    """Three backends; `asked` tells how often each was."""

    def answer(self, answer: Answer) -> None:
        for host in self:
            host.answers |= dict.fromkeys(PATHS, answer)

    @property
    def asked(self) -> list[int]:
        return [len(host.requests) for host in self]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with ExitStack() as stack:
        found = Hosts(stack.enter_context(picture_host()) for _ in range(3))
        found.answer(FINE)
        yield found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., NginxServer]]:
    """Start nginx before these ports."""
    started: list[NginxServer] = []
    program = find_nginx()
    if program is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(HOW_TO_GET_ONE)

    def starter(*ports: int, names: Names | None = None) -> NginxServer:
        if names and release(program) < (1, 27, 3):
            pytest.skip("This nginx looks up the addresses of a name only once.")
        folder = tmp_path / f"nginx-{len(started)}"
        folder.mkdir()
        started.append(NginxServer(program, folder, names or ports))
        return started[-1]

    yield starter
    for server in started:
        server.stop()


@pytest.fixture
def nginx(start: Callable[..., NginxServer], hosts: Hosts) -> NginxServer:
    return start(*(host.port for host in hosts))


def ask(nginx: NginxServer, path: str, body: bytes = b"{}", timeout: float = 20) -> requests.Response:
    method = "GET" if path == "/health" else "POST"
    return requests.request(method, f"{nginx.url}{path}", data=body, timeout=timeout, headers=JSON)


def break_off(handler: BaseHTTPRequestHandler) -> None:
    """What a client sees of a process that is killed while it works."""
    handler.connection.shutdown(socket.SHUT_RDWR)


def test_the_reason_of_a_refusal_comes_through(nginx: NginxServer, hosts: Hosts) -> None:
    """Label Studio shows a person nothing but the reason phrase, and it stays a backend's own sentence."""
    sentence = "None of the choices cat and dog is a class of the model. " + "Rename a choice, " * 18

    def refuse(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(422, sentence)
        handler.send_header("Content-Length", "0")
        handler.send_header("Retry-After", "7")
        handler.end_headers()

    hosts.answer(refuse)
    answer = ask(nginx, "/setup")
    assert (answer.status_code, answer.reason) == (422, sentence.strip())
    assert answer.headers["Retry-After"] == "7"
    assert hosts.asked == [1, 0, 0], "an answer is an answer, whatever it says"


@pytest.mark.parametrize("path", PATHS)
def test_a_backend_that_breaks_off_costs_nothing(nginx: NginxServer, hosts: Hosts, path: str) -> None:
    """Another one is asked the same, POST or not."""
    hosts[0].answers[path] = break_off
    for _ in range(6):
        assert ask(nginx, path).status_code == 200
    assert hosts.asked[0] == 1, "it is left alone after a failure"
    assert sum(hosts.asked) == 7


def test_who_is_asked_second_knows_when_the_first_was(nginx: NginxServer, hosts: Hosts) -> None:
    """Label Studio waits from then on."""

    def break_off_late(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.5)
        break_off(handler)

    hosts[0].answers["/predict"] = break_off_late
    before = time.time()
    assert ask(nginx, "/predict").status_code == 200
    after = time.time()
    ((_, first),), ((_, second),) = (host.requests for host in hosts if host.requests)
    assert first["X-Request-Start"] == second["X-Request-Start"]
    assert before - 0.01 <= float(first["X-Request-Start"].removeprefix("t=")) <= after - 0.5


def test_a_backend_that_is_gone_costs_nothing(start: Callable[..., NginxServer], hosts: Hosts) -> None:
    """Where nobody listens, and where nothing answers a connection as on a machine without power."""
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for client in (first, second):  # now its queue is full, and Linux lets further ones wait
            client.setblocking(False)
            client.connect_ex(deaf.getsockname())
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            gone = nobody.getsockname()[1]
        for port in (gone, deaf.getsockname()[1]):
            nginx = start(port, hosts[0].port)
            for path in PATHS:
                assert ask(nginx, path, timeout=EVENT_S).status_code == 200
            assert f"127.0.0.1:{port}, 127.0.0.1:{hosts[0].port}: " in nginx.log_text()


def nobody_listens(count: int) -> list[int]:
    return [free_port() for _ in range(count)]


@pytest.mark.parametrize("path", PATHS)
def test_new_backends_that_do_not_listen_yet_cost_nothing(
    start: Callable[..., NginxServer], hosts: Hosts, path: str
) -> None:
    """However many there are, the one that does is found."""
    nginx = start(*nobody_listens(5), hosts[0].port)
    for _ in range(3):
        assert ask(nginx, path).status_code == 200
    assert hosts.asked[0] == 3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [1, 3, 12])
def test_where_no_backend_listens_the_gateway_is_bad(
    start: Callable[..., NginxServer], count: int, path: str
) -> None:
    """That is 502; with 500 a server would say that it is wrong itself."""
    nginx = start(*nobody_listens(count))
    assert [ask(nginx, path).status_code for _ in range(2)] == [502, 502]


def test_a_backend_that_refuses_has_not_had_the_request(start: Callable[..., NginxServer], hosts: Hosts) -> None:
    """One that breaks off and one that does not listen are not two that it has killed; two that break off are."""
    hosts[0].answers["/predict"] = hosts[1].answers["/predict"] = break_off
    one = start(nobody_listens(1)[0], hosts[0].port, hosts[2].port)
    assert [ask(one, "/predict").status_code for _ in range(3)] == [200] * 3
    assert hosts.asked == [1, 0, 3]
    two = start(*nobody_listens(2), hosts[0].port, hosts[1].port)
    assert ask(two, "/predict").status_code == 502
    assert hosts.asked == [2, 1, 3]


def test_addresses_that_change_while_a_request_is_on_its_way_cost_nothing(
    start: Callable[..., NginxServer],
) -> None:
    """As a name's do where backends come and go: the one that has it stops, and all others are new."""
    with ExitStack() as stack:
        old = stack.enter_context(picture_host())
        new = stack.enter_context(picture_host("127.0.0.2", old.port))
        names = stack.enter_context(closing(Names(old.port)))
        names.addresses = ["127.0.0.1"]

        def stop(handler: BaseHTTPRequestHandler) -> None:
            names.addresses = ["127.0.0.2"]
            before = names.asked
            while names.asked < before + 2:  # the first may have been under way
                time.sleep(0.02)
            break_off(handler)

        old.answers["/predict"], new.answers["/predict"] = stop, FINE
        nginx = start(names=names)
        while not names.asked:
            time.sleep(0.02)
        assert ask(nginx, "/predict").status_code == 200
        assert (len(old.requests), len(new.requests)) == (1, 1)


def test_what_kills_two_backends_does_not_kill_the_third(nginx: NginxServer, hosts: Hosts) -> None:
    """A request that nobody survives is given up after the second."""
    hosts.answer(break_off)
    answer = ask(nginx, "/predict")
    assert (answer.status_code, answer.reason) == (502, "Bad Gateway")
    assert sorted(hosts.asked) == [0, 1, 1]


def test_a_backend_that_hangs_gets_no_more(nginx: NginxServer, hosts: Hosts) -> None:
    """Label Studio's first question waits for a second, its next one goes to another backend, and so does all else."""
    goes_on = threading.Event()
    hosts[0].answers |= dict.fromkeys(PATHS, lambda _: goes_on.wait(30))  # type: ignore[dict-item]
    session = requests.Session()
    session.mount("http://", HTTPAdapter(max_retries=Retry(3)))  # as Label Studio has it
    try:
        for path in ("/health", *PATHS, *PATHS):
            method = "GET" if path == "/health" else "POST"
            assert session.request(method, f"{nginx.url}{path}", json={}, timeout=EVENT_S).status_code == 200
        assert hosts.asked[0] == 1
        assert min(hosts.asked[1:]) > 2
    finally:
        goes_on.set()


def test_an_event_arrives_though_label_studio_has_stopped_waiting(nginx: NginxServer, hosts: Hosts) -> None:
    """It waits for a second and never sends it again, so nginx goes on alone."""
    came = threading.Event()

    def slow(handler: BaseHTTPRequestHandler) -> None:
        came.set()
        time.sleep(0.6)
        break_off(handler)

    hosts[0].answers["/webhook"] = slow
    with pytest.raises(requests.ReadTimeout):
        ask(nginx, "/webhook", timeout=0.3)
    assert came.wait(10)
    deadline = time.monotonic() + 10
    while sum(hosts.asked) < 2:
        assert time.monotonic() < deadline, nginx.log_tail()
        time.sleep(0.02)
    assert hosts[0].requests[0][0] == "/webhook"


def test_bodies_of_batches_pass_and_others_do_not(nginx: NginxServer, hosts: Hosts) -> None:
    """Thirty megabytes pass, and are sent again where a backend breaks off; beyond 256 nothing is read."""
    hosts[0].answers["/predict"] = break_off
    assert ask(nginx, "/predict", b"x" * 30_000_000).status_code == 200
    # Another test may ask a port that was its own a moment ago.
    asked = [headers for host in hosts for path, headers in host.requests if path == "/predict"]
    assert [headers["Content-Length"] for headers in asked] == ["30000000"] * 2
    with socket.create_connection(("127.0.0.1", nginx.port)) as client:
        head = f"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Length: {256 * 2**20 + 1}\r\n\r\n"
        client.sendall(head.encode())
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


def test_the_load_is_spread_by_what_is_in_progress(nginx: NginxServer, hosts: Hosts) -> None:
    """While a backend works at one thing, what comes goes to those that are idle."""
    goes_on = threading.Event()
    hosts[0].answers["/predict"] = lambda handler: (goes_on.wait(30), break_off(handler))
    thread = threading.Thread(target=ask, args=(nginx, "/predict"))
    thread.start()
    try:
        while not sum(hosts.asked):
            time.sleep(0.01)
        for _ in range(9):
            ask(nginx, "/predict")
    finally:
        goes_on.set()
        thread.join()
    assert hosts.asked[0] == 1


def test_credentials_pass_and_stand_in_no_log(nginx: NginxServer, hosts: Hosts) -> None:
    """The backends look at them; nginx keeps neither them nor what was asked, not even of a failure."""
    hosts.answer(break_off)
    requests.post(f"{nginx.url}/setup", json={"access_token": "secret"}, auth=("u", "secret"), timeout=9)
    assert {host.authorizations()[0] for host in hosts if host.requests} == {"Basic dTpzZWNyZXQ="}
    nginx.wait_for_log("POST /setup 502 ")
    for secret in ("secret", "dTpzZWNyZXQ="):
        assert secret not in nginx.log_text()


def setting(name: str) -> list[Any]:
    """The values that a directive has in the configuration, times in seconds."""
    found = re.findall(rf"^ *{name} ([^;]+);", CONFIGURATION.read_text(), re.MULTILINE)
    units = {"ms": 0.001, "s": 1.0}
    return [float(text.rstrip("ms")) * units[text.lstrip("0123456789")] for text in found]


def test_the_time_outs_fit_those_of_label_studio() -> None:
    """Two connections fit into one that it waits for; what it waits for is not cut; a repeat comes to its end."""
    (connect,) = setting("proxy_connect_timeout")
    assert 2 * connect < min(CONNECT_S, EVENT_S, HEALTH_S)
    everything, predict, again = setting("proxy_read_timeout")
    assert everything > SETUP_S
    assert predict == again >= PREDICT_S > setting("proxy_next_upstream_timeout")[0]
