"""Downloader and Guard: what may be fetched, from where, within which limits, and what is said when not."""

from __future__ import annotations

import gzip
import os
import socket
import ssl
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from celestial_backend.errors import FetchError, ForbiddenError, LockedError, TooLargeError
from celestial_backend.pictures import download
from celestial_backend.pictures.download import Downloader, Guard, origin
from celestial_backend.settings import Settings
from celestial_backend.studio.client import Studio
from tests.support.picture_host import PictureHost, picture_host, redirect

TOKEN = "f" * 40
UPLOAD = "/data/upload/1/a.jpg"  # where Label Studio keeps pictures
NO_TOKEN = "Authentication credentials were not provided."
LEGACY_OFF = (
    "Authentication token no longer valid: legacy token authentication has been disabled for this organization"
)


@pytest.fixture
def host() -> Iterator[PictureHost]:
    with picture_host() as server:
        yield server


@pytest.fixture
def other() -> Iterator[PictureHost]:
    with picture_host() as server:
        yield server


def downloader(**values: Any) -> Downloader:
    settings = Settings(**({"allowed_hosts": ("127.0.0.1",), "image_timeout_s": 5.0} | values))
    return Downloader(settings, Studio(settings))


def at_studio(studio: PictureHost, **values: Any) -> Downloader:
    return downloader(**({"label_studio_url": studio.url, "label_studio_api_key": TOKEN, "allowed_hosts": ()} | values))


def names(monkeypatch: pytest.MonkeyPatch, table: dict[str, list[str]]) -> None:
    """Make host names resolve to given addresses."""
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in table:
            return real(host, port, *rest, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in table[name]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def _refuse(*_: Any, **__: Any) -> Any:
    raise ConnectionRefusedError


def refused(error: type[Exception], what: Downloader, url: str) -> str:
    with pytest.raises(error) as raised:
        what.get(url)
    assert raised.type is error
    return str(raised.value)


class TestGuard:
    @pytest.mark.parametrize(
        "address",
        [
            "127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.5.4", "192.168.1.1", "169.254.169.254",  # noqa: S104
            "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "203.0.113.9", "224.0.0.1", "239.1.1.1", "240.0.0.1",
            "255.255.255.255", "192.88.99.1", "::1", "::", "fe80::1", "fc00::1", "fd12::1", "fec0::1", "ff02::1",
            "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1",
            "64:ff9b::808:808", "64:ff9b:1::1", "2001:db8::1", "2001::1", "2002:7f00:1::", "100::1", "3fff::1",
        ],
    )  # fmt: skip
    def test_private_addresses_are_refused(self, address: str) -> None:
        """Every address that is not public is refused, IPv6 disguises of IPv4 too; the message says the remedy."""
        url = f"http://[{address}]/x.jpg" if ":" in address else f"http://{address}/x.jpg"
        said = refused(ForbiddenError, downloader(allowed_hosts=()), url)
        assert "pictures come only from public addresses" in said
        assert "CELESTIAL_ALLOWED_HOSTS" in said

    @pytest.mark.parametrize("address", ["8.8.8.8", "151.101.1.1", "2606:4700::1111", "2a00:1450:4001::1"])
    def test_public_addresses_pass(self, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A public address is connected to, and by its address rather than its name."""
        asked: list[tuple[str, int]] = []

        def create_connection(address: tuple[str, int], *_: Any, **__: Any) -> Any:
            asked.append(address)
            raise ConnectionRefusedError

        monkeypatch.setattr(socket, "create_connection", create_connection)
        names(monkeypatch, {"pictures.example": [address]})
        refused(FetchError, downloader(), "http://pictures.example/x.jpg")
        assert asked == [(address, 80)]

    @pytest.mark.parametrize("spelling", ["2130706433", "0x7f.1", "127.1", "0177.0.0.1"])
    def test_spellings_of_loopback(self, spelling: str) -> None:
        """Numbers that the resolver takes for 127.0.0.1 are judged as 127.0.0.1."""
        refused(ForbiddenError, downloader(allowed_hosts=()), f"http://{spelling}/x.jpg")

    @pytest.mark.parametrize(
        "place",
        [
            "0", "0x7f000001", "017700000001", "0x7f.0.0x0.1", "127.0.0.1.", "127。0。0。1", "①②⑦.0.0.1",
            "１２７.0.0.1", "localhost", "LOCALHOST", "localhost.", "[::]", "[::1]", "[0:0:0:0:0:0:0:1]",
            "[::ffff:7f00:1]", "[::ffff:a9fe:a9fe]", "[::7f00:1]", "169.254.169.254", "2852039166", "0xa9fea9fe",
            "[fd00:ec2::254]", "[fe80::1%25lo]", "127.0.0.1:22", "127.0.0.1:65535",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("redirected", [False, True])
    def test_no_spelling_leads_inside(
        self, host: PictureHost, place: str, redirected: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However this machine or a cloud's metadata service is written, asked or redirected to: no connection."""
        url = f"http://{place}/latest/meta-data/"
        host.answers[UPLOAD] = redirect(url.encode().decode("latin-1"))
        what = at_studio(host) if redirected else downloader(allowed_hosts=())
        asked: list[Any] = []
        connect = socket.create_connection

        def create_connection(address: Any, *rest: Any, **options: Any) -> Any:
            asked.append(address)
            return connect(address, *rest, **options)

        monkeypatch.setattr(socket, "create_connection", create_connection)
        with pytest.raises((ForbiddenError, FetchError)):
            what.get(f"{host.url}{UPLOAD}" if redirected else url)
        assert asked == [("127.0.0.1", host.port)] * redirected

    @pytest.mark.parametrize(
        "url",
        [
            "http://pictures.example@127.0.0.1/x", "http://pictures.example:80@127.0.0.1/x", "http://@127.0.0.1/x",
            "http://pictures.example\\@127.0.0.1/x", "http://127.0.0.1\\@pictures.example/x",
            "http://pictures.example#@127.0.0.1/x", "http://pictures.example?@127.0.0.1/x",
            "http://127.0.0.1:80:pictures.example/x", "http://pictures.example\r\nHost:127.0.0.1/x",
            "http://pictures.example%0d%0aHost:127.0.0.1/x", "http:///127.0.0.1/x", "http:127.0.0.1/x", "//127.0.0.1/x",
        ],
    )  # fmt: skip
    def test_no_trick_hides_the_host(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """User names, back-strokes, line breaks and the like: the only host that is ever asked is the judged one."""
        names(monkeypatch, {"pictures.example": ["8.8.8.8"]})
        asked: list[Any] = []

        def create_connection(address: Any, *_: Any, **__: Any) -> Any:
            asked.append(address)
            raise ConnectionRefusedError

        monkeypatch.setattr(socket, "create_connection", create_connection)
        with pytest.raises((ForbiddenError, FetchError)):
            downloader(allowed_hosts=()).get(url)
        assert asked in ([], [("8.8.8.8", 80)])

    def test_a_line_break_never_becomes_a_header(self, host: PictureHost) -> None:
        """In path or query it is taken out or percent-encoded; one request is one request."""
        for url in ("/a\r\nX-Evil: 1\r\n\r\n.jpg", "/a.jpg?x=\r\nX-Evil: 1", "/a\x0b\u2028.jpg", "/%0d%0aX-Evil:1"):
            with pytest.raises(FetchError):
                downloader().get(host.url + url)
        assert len(host.requests) == 4
        assert not any("X-Evil" in headers for _, headers in host.requests)

    def test_one_private_address_is_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A name with a public and a private address is refused: either might be taken."""
        names(monkeypatch, {"two.example": ["8.8.8.8", "10.0.0.1"]})
        refused(ForbiddenError, downloader(), "http://two.example/x.jpg")

    def test_a_name_cannot_change_its_meaning(self, host: PictureHost, monkeypatch: pytest.MonkeyPatch) -> None:
        """The address that was judged is the one connected to; the name is looked up once."""
        answers = iter([["8.8.8.8"], ["127.0.0.1"]])
        asked: list[Any] = []
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda _, port, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers)[0], port))],
        )

        def create_connection(address: Any, *_: Any, **__: Any) -> Any:
            asked.append(address)
            raise ConnectionRefusedError

        monkeypatch.setattr(socket, "create_connection", create_connection)
        refused(FetchError, downloader(allowed_hosts=()), f"http://rebound.example:{host.port}/x.jpg")
        assert asked == [("8.8.8.8", host.port)]
        assert host.requests == []

    @pytest.mark.parametrize("allowed", ["pictures.example", "PICTURES.example", "127.0.0.1", "127.0.0.0/8"])
    def test_allowed_hosts(self, host: PictureHost, allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """CELESTIAL_ALLOWED_HOSTS opens a private host by name, address or network; without it, it stays shut."""
        names(monkeypatch, {"pictures.example": ["127.0.0.1"]})
        host.answers["/x.jpg"] = b"here"
        url = f"http://pictures.example:{host.port}/x.jpg"
        environ = {"CELESTIAL_ALLOWED_HOSTS": allowed}
        assert downloader(allowed_hosts=Settings.from_environ(environ).allowed_hosts).get(url) == b"here"
        refused(ForbiddenError, downloader(allowed_hosts=("elsewhere.example", "10.0.0.0/8")), url)

    def test_label_studio_is_allowed_with_its_port(self, host: PictureHost, other: PictureHost) -> None:
        """Label Studio's own host and port need no permission; another port of the same host does."""
        host.answers[UPLOAD] = b"here"
        assert at_studio(host).get(f"{host.url}{UPLOAD}") == b"here"
        refused(ForbiddenError, at_studio(host), f"{other.url}{UPLOAD}")
        assert other.requests == []

    def test_redirects_are_judged(self, host: PictureHost, other: PictureHost) -> None:
        """A redirect into the private network is refused, and nothing is asked there."""
        host.answers[UPLOAD] = redirect(f"{other.url}/secret")
        refused(ForbiddenError, at_studio(host), f"{host.url}{UPLOAD}")
        assert other.requests == []

    def test_the_next_address_is_tried(self, host: PictureHost, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where a host's first address does not answer, its second is asked."""
        names(monkeypatch, {"pictures.example": ["127.0.0.2", "127.0.0.1"]})
        host.answers["/x.jpg"] = b"here"
        found = downloader(allowed_hosts=("pictures.example",)).get(f"http://pictures.example:{host.port}/x.jpg")
        assert found == b"here"

    def test_a_resolver_that_hangs_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A name service that does not answer costs the picture's time and no more."""
        stop = threading.Event()
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: stop.wait(10) and [])
        start = time.monotonic()
        said = refused(FetchError, downloader(image_timeout_s=0.2), "http://slow.example/x.jpg")
        assert time.monotonic() - start < 8  # the resolver would take ten
        assert "within 0.2 seconds" in said
        stop.set()

    def test_is_a_network_backend_of_httpcore(self) -> None:
        """The guard stands in the way of every connection: it opens no unix sockets either."""
        with pytest.raises(NotImplementedError):
            Guard(Settings()).connect_unix_socket("/run/x.sock")

    @pytest.mark.parametrize(
        ("url", "wanted"),
        [
            ("http://Host/x", ("http", "host", 80)),
            ("https://host.:444/x", ("https", "host", 444)),
            ("http://[::1]:0/", ("http", "::1", 0)),
            ("ftp://host/x", None),
            ("http://host:99999/", None),
            ("http://[::1", None),
            ("/path", None),
        ],
    )
    def test_origin(self, url: str, wanted: object) -> None:
        """Scheme, host and port, spelt one way; None where there is none."""
        assert origin(url) == wanted


class TestToken:
    def test_goes_to_label_studio(self, host: PictureHost) -> None:
        """Label Studio gets the token; without a token nothing is sent."""
        host.answers[UPLOAD] = b"here"
        at_studio(host).get(f"{host.url}{UPLOAD}")
        at_studio(host, label_studio_api_key=None).get(f"{host.url}{UPLOAD}")
        assert host.authorizations() == [f"Token {TOKEN}", None]

    def test_goes_nowhere_else(self, host: PictureHost, other: PictureHost) -> None:
        """Another port is another place: no token, not when asked directly and not after a redirect."""
        host.answers[UPLOAD] = redirect(f"{other.url}/b.jpg?sig=1", 303)
        other.answers |= {"/b.jpg?sig=1": b"here", "/c.jpg": b"there"}
        studio = at_studio(host, allowed_hosts=("127.0.0.1",))
        assert studio.get(f"{host.url}{UPLOAD}") == b"here"
        assert studio.get(f"{other.url}/c.jpg") == b"there"
        assert host.authorizations() == [f"Token {TOKEN}"]
        assert other.authorizations() == [None, None]

    def test_a_storage_beside_label_studio_is_none_of_its_names(self, host: PictureHost, other: PictureHost) -> None:
        """It has the same host, and a bucket may have any name; only what was asked for, elsewhere, is Label Studio."""
        asked, bucket = "/tasks/1/resolve/?fileuri=x", "/upload/a.jpg?signature=1"
        host.answers |= {asked: redirect(f"{other.url}{bucket}", 303), UPLOAD: redirect(f"{other.url}{UPLOAD}", 301)}
        other.answers[bucket] = b"here"
        studio = at_studio(host, allowed_hosts=("127.0.0.1",))
        assert studio.get(f"{host.url}{asked}") == b"here"
        assert "has moved to" in refused(FetchError, studio, f"{host.url}{UPLOAD}")
        assert other.authorizations() == [None]

    @pytest.mark.parametrize("path", [UPLOAD, "/api/tasks/1/", "/b.jpg"])
    def test_a_stranger_cannot_spend_it(self, host: PictureHost, other: PictureHost, path: str) -> None:
        """An address elsewhere that redirects to Label Studio leads nowhere: nothing is asked there."""
        other.answers["/a.jpg"] = redirect(f"{host.url}{path}")
        host.other = b"here"
        refused(ForbiddenError, at_studio(host, allowed_hosts=("127.0.0.1",)), f"{other.url}/a.jpg")
        assert host.requests == []

    def test_follows_inside_label_studio(self, host: PictureHost) -> None:
        """A redirect within Label Studio, relative here, keeps the token where it leads to a picture."""
        host.answers |= {"/tasks/1/resolve?fileuri=x": redirect("../../data/upload/1/a.jpg", 301), UPLOAD: b"here"}
        assert at_studio(host).get(f"{host.url}/tasks/1/resolve?fileuri=x") == b"here"
        assert host.authorizations() == [f"Token {TOKEN}"] * 2

    @pytest.mark.parametrize("base", ["", "/ls"])
    @pytest.mark.parametrize("allowed", [(), ("127.0.0.1",)])
    @pytest.mark.parametrize("redirected", [False, True])
    @pytest.mark.parametrize(
        "path",
        [
            "/api/tasks/7/", "/api/projects/26/export?exportType=JSON&download_all_tasks=true",
            "/api/tasks/7/?/data/upload/x", "/api/tasks/7/#/data/upload/1/x",
            "//api/tasks/7/", "/./api/tasks/7/", "/%61pi/tasks/7/", "/API/tasks/7/",
            "/data/upload/../../api/tasks/7/", "/data/upload/%2e%2e/%2e%2e/api/tasks/7/", "/data/upload/",
            "/x/../api/tasks/7/", "/tasks/7/resolve/x", "/tasks/x/resolve/", "/user/login/?next=/data/upload/1/a.jpg",
            "/data/export/1.json", "/export/1", "/storage-data/uploaded/?filepath=upload/1/a.jpg", "/", "",
        ],
    )  # fmt: skip
    def test_nothing_but_pictures_is_asked_of_label_studio(
        self, host: PictureHost, base: str, allowed: tuple[str, ...], redirected: bool, path: str
    ) -> None:
        """Whatever else an address names there, itself or by a redirect, is refused before anything is sent."""
        host.other = b"here"
        start = f"{host.url}{base}{UPLOAD}"
        host.answers[f"{base}{UPLOAD}"] = redirect(f"{host.url}{base}{path}")
        what = at_studio(host, label_studio_url=host.url + base, allowed_hosts=allowed)
        said = refused(ForbiddenError, what, start if redirected else f"{host.url}{base}{path}")
        assert said.endswith("Correct the task.")
        assert [asked for asked, _ in host.requests] == [f"{base}{UPLOAD}"] * redirected

    def test_beside_its_sub_path_its_host_is_like_any_other(self, host: PictureHost) -> None:
        """What lies beside /ls is no part of Label Studio: no token goes there, and only if the host is allowed."""
        host.answers["/a.jpg"] = b"here"
        within = {"label_studio_url": f"{host.url}/ls"}
        refused(ForbiddenError, at_studio(host, **within), f"{host.url}/a.jpg")
        assert at_studio(host, allowed_hosts=("127.0.0.1",), **within).get(f"{host.url}/a.jpg") == b"here"
        assert host.authorizations() == [None]

    @pytest.mark.parametrize(
        ("path", "inside"),
        [("/ls/a", True), ("/a", False), ("/lsx/a", False), ("/ls/../a", False), ("/ls/%2e%2e/a", False),
            ("/x/../ls/a", True), ("//ls/a", True), ("/%6cs/a", True)],
    )
    def test_a_sub_path_is_a_border(self, path: str, inside: bool) -> None:
        """Behind http://host/ls only what lies under /ls/ is Label Studio."""
        assert downloader(label_studio_url="http://host/ls").is_studio(f"http://host{path}") is inside

    @pytest.mark.parametrize("host", [
        "ls.example。com", "ｌs.example.com", "LS.exa\u00admple.com.", "ls.example.com:80",
    ])
    def test_however_its_host_is_spelt(self, host: str) -> None:
        """What leads to Label Studio is Label Studio's, and so nothing but its pictures is asked for."""
        what = downloader(label_studio_url="http://ls.example.com")
        assert what.is_studio(f"http://{host}/api/tasks/5/")
        assert "nothing else there is asked for" in refused(ForbiddenError, what, f"http://{host}/api/tasks/5/")

    @pytest.mark.parametrize("url", ["https://host:80/a", "http://host:81/a", "http://host.evil/a", "http://evil/a"])
    def test_scheme_host_and_port_must_equal(self, url: str) -> None:
        """One of the three that differs makes it another place."""
        assert downloader(label_studio_url="http://host").is_studio("http://HOST:80/a")
        assert not downloader(label_studio_url="http://host").is_studio(url)


class TestLimits:
    def test_bytes_by_announcement(self, host: PictureHost) -> None:
        """An announced size above CELESTIAL_IMAGE_MAX_MB ends the download before its body."""
        host.answers["/a.jpg"] = (200, {"Content-Length": "2000001"}, b"")
        said = refused(TooLargeError, downloader(image_max_mb=2.0), f"{host.url}/a.jpg")
        assert said.startswith("a picture file may have 2 MB, and this one has more. Raise CELESTIAL_IMAGE_MAX_MB")

    def test_bytes_as_they_come(self, host: PictureHost) -> None:
        """Without an announcement the bytes are counted; exactly the limit passes, endless bodies end."""

        def send(count: int) -> Any:
            def answer(handler: BaseHTTPRequestHandler) -> None:
                handler.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * count)

            return answer

        host.answers |= {"/a": send(10_000), "/b": send(10_001), "/c": send(30_000_000)}
        small = downloader(image_max_mb=0.01)
        assert len(small.get(f"{host.url}/a")) == 10_000
        refused(TooLargeError, small, f"{host.url}/b")
        refused(TooLargeError, small, f"{host.url}/c")
        assert len(downloader(image_max_mb=0.02).get(f"{host.url}/b")) == 10_001

    @pytest.mark.parametrize("part", ["head", "body", "silence"])
    def test_time(self, host: PictureHost, part: str) -> None:
        """A server that drips a byte now and then, or says nothing, is left when the time is over."""
        stop = threading.Event()

        def drip(handler: BaseHTTPRequestHandler) -> None:
            if part == "body":
                handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            elif part == "head":
                handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            for _ in range(60):  # three seconds, then the test has failed
                if stop.wait(0.05):
                    break
                if part != "silence":
                    handler.wfile.write(b"x")

        host.answers["/a.jpg?sig=s3cret"] = drip
        start = time.monotonic()
        said = refused(FetchError, downloader(image_timeout_s=0.4), f"{host.url}/a.jpg?sig=s3cret")
        stop.set()
        assert 0.35 < time.monotonic() - start < 2.9
        assert said.startswith(f"{host.url} must give it within 0.4 seconds, and did not.")
        assert "CELESTIAL_IMAGE_TIMEOUT_S" in said
        assert "s3cret" not in said

    def test_a_host_that_is_down_is_tried_once(self, host: PictureHost, monkeypatch: pytest.MonkeyPatch) -> None:
        """The second picture of a host that let nobody in fails at once; half a minute later it is asked again."""
        unplugged = [True]
        connect = socket.create_connection

        def create_connection(address: Any, *rest: Any, **options: Any) -> Any:
            if unplugged:
                raise TimeoutError
            return connect(address, *rest, **options)

        monkeypatch.setattr(socket, "create_connection", create_connection)
        host.answers["/b"] = b"here"
        patient = downloader()
        assert "within 5 seconds" in refused(FetchError, patient, f"{host.url}/a")
        unplugged.clear()
        assert refused(FetchError, patient, f"{host.url}/b").endswith("(It was tried a moment ago.)")
        monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + download.SILENT_S)
        assert patient.get(f"{host.url}/b") == b"here"

    def test_close_forgets_who_was_silent(self, host: PictureHost, monkeypatch: pytest.MonkeyPatch) -> None:
        """A host that is known to answer again need not be waited for."""
        host.answers["/b"] = b"here"
        patient = downloader()
        with monkeypatch.context() as unplugged:
            unplugged.setattr(socket, "create_connection", _refuse)
            refused(FetchError, patient, f"{host.url}/a")
        patient.close()
        assert patient.get(f"{host.url}/b") == b"here"

    @pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\n\r\nx"])
    @pytest.mark.parametrize("own", [False, True])
    def test_a_late_picture_silences_no_host(self, host: PictureHost, start: bytes, own: bool) -> None:
        """A host that was connected to is asked for the next picture, whatever it said or did not; Label Studio too."""
        stop = threading.Event()

        def drip(handler: BaseHTTPRequestHandler) -> None:
            handler.wfile.write(start)
            stop.wait(20)

        host.answers |= {UPLOAD: drip, "/data/upload/1/b.jpg": b"here"}
        patient = (at_studio if own else downloader)(*[host] * own, image_timeout_s=2)
        refused(FetchError, patient, f"{host.url}{UPLOAD}")
        stop.set()
        assert patient.get(f"{host.url}/data/upload/1/b.jpg") == b"here"

    def test_a_redirect_that_leaves_no_time_silences_no_host(
        self, host: PictureHost, other: PictureHost, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A host that another one left next to no time for was not tried."""

        def late(handler: BaseHTTPRequestHandler) -> None:
            time.sleep(1.2)
            head = f"HTTP/1.1 302 Found\r\nLocation: {other.url}/a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            handler.wfile.write(head.encode())

        host.answers["/a"] = late
        other.answers["/b"] = b"here"
        patient = downloader(image_timeout_s=2)
        connect = socket.create_connection

        def create_connection(address: Any, *rest: Any, **options: Any) -> Any:
            if address[1] == other.port and len(other.requests) == 0 and not tried:
                tried.append(address)
                raise TimeoutError
            return connect(address, *rest, **options)

        tried: list[Any] = []
        monkeypatch.setattr(socket, "create_connection", create_connection)
        refused(FetchError, patient, f"{host.url}/a")
        assert tried
        assert patient.get(f"{other.url}/b") == b"here"

    def test_time_covers_all_hops(self, host: PictureHost) -> None:
        """Redirects share one deadline."""

        def slow(handler: BaseHTTPRequestHandler) -> None:
            time.sleep(0.25)
            handler.wfile.write(b"HTTP/1.1 302 Found\r\nLocation: /a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        host.answers["/a"] = slow
        assert "within 0.5 seconds" in refused(FetchError, downloader(image_timeout_s=0.5), f"{host.url}/a")

    def test_redirects(self, host: PictureHost) -> None:
        """Five redirects are followed, six are not."""
        host.answers |= {f"/{n}": redirect(f"/{n + 1}") for n in range(6)}
        host.answers["/6"] = b"here"
        assert downloader().get(f"{host.url}/1") == b"here"
        assert refused(FetchError, downloader(), f"{host.url}/0").startswith("an address may redirect 5 times")

    @pytest.mark.parametrize("target", ["ftp://host/x?k=s3cret", "file:///etc/passwd", "gopher://127.0.0.1/"])
    def test_redirects_stay_with_http(self, host: PictureHost, target: str) -> None:
        """A redirect to another scheme is refused."""
        host.answers["/a"] = redirect(target)
        said = refused(ForbiddenError, downloader(), f"{host.url}/a")
        assert said.startswith("pictures come over http or https, and this leads to '")
        assert "s3cret" not in said

    def test_a_redirect_to_nonsense(self, host: PictureHost) -> None:
        """A redirect that is no address is said so."""
        host.answers["/a"] = redirect("http://[::1")
        assert "must redirect to a valid address" in refused(FetchError, downloader(), f"{host.url}/a")

    def test_cut_downloads(self, host: PictureHost) -> None:
        """Fewer bytes than announced are an error; it is tried once more before."""

        def cut(handler: BaseHTTPRequestHandler) -> None:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")

        host.answers["/a"] = cut
        assert "broke off before the whole file was there" in refused(FetchError, downloader(), f"{host.url}/a")
        assert len(host.requests) == 2

    def test_no_passwords_in_addresses(self, host: PictureHost) -> None:
        """An address with a user name or password is refused, and the message does not repeat it."""
        said = refused(ForbiddenError, downloader(), f"http://user:s3cret@127.0.0.1:{host.port}/a")
        assert "must not hold a user name or password" in said
        assert "s3cret" not in said


class TestConnections:
    def test_are_used_again(self, host: PictureHost) -> None:
        """Pictures of one host come over one connection, and no compression is asked for."""
        host.answers["/a.jpg"] = b"here"
        reader = downloader()
        assert [reader.get(f"{host.url}/a.jpg") for _ in range(5)] == [b"here"] * 5
        assert host.connections == 1
        assert {headers["Accept-Encoding"] for _, headers in host.requests} == {"identity"}
        assert host.requests[0][1]["Host"] == f"127.0.0.1:{host.port}"

    def test_one_that_went_stale_is_replaced(self, host: PictureHost) -> None:
        """A server that closes an idle connection costs nobody a picture."""

        def hang_up(handler: BaseHTTPRequestHandler) -> None:
            if len(host.requests) > 1:
                handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhere")

        host.answers["/a.jpg"] = hang_up
        assert downloader().get(f"{host.url}/a.jpg") == b"here"

    def test_all_that_went_stale_are_replaced(self, host: PictureHost) -> None:
        """A server that closes all idle connections at once, as one that is started again, costs nobody a picture."""
        together = threading.Barrier(4)

        def once_a_connection(handler: BaseHTTPRequestHandler) -> None:
            if not hasattr(handler, "asked"):
                handler.asked, handler.close_connection = True, False  # type: ignore[attr-defined]
                if len(host.requests) <= 4:
                    together.wait(10)
                handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhere")

        host.answers["/a.jpg"] = once_a_connection
        reader = downloader()
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(lambda _: reader.get(f"{host.url}/a.jpg"), range(4))) == [b"here"] * 4
        assert reader.get(f"{host.url}/a.jpg") == b"here"
        assert host.connections == 5

    def test_many_threads(self, host: PictureHost) -> None:
        """Threads side by side each get their own picture."""
        host.answers |= {f"/{n}": str(n).encode() * 1000 for n in range(100)}
        reader = downloader()
        with ThreadPoolExecutor(16) as threads:
            found = list(threads.map(lambda n: reader.get(f"{host.url}/{n}"), range(100)))
        assert found == [str(n).encode() * 1000 for n in range(100)]
        assert host.connections <= 16

    def test_open_again_after_close_and_fork(self, host: PictureHost, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is opened before the first picture; close and a fork both lead to new connections."""
        host.answers["/a.jpg"] = b"here"
        reader = downloader()
        assert host.connections == 0
        reader.get(f"{host.url}/a.jpg")
        reader.close()
        reader.get(f"{host.url}/a.jpg")
        monkeypatch.setattr(os, "getpid", lambda: -1)
        reader.get(f"{host.url}/a.jpg")
        assert host.connections == 3

    @pytest.mark.parametrize(
        ("written", "sent"),
        [
            ("/a b é.jpg?x=ü y", "/a%20b%20%C3%A9.jpg?x=%C3%BC%20y"),
            ("/a%20b.jpg?x=%2F", "/a%20b.jpg?x=%2F"),
            ("?x=1", "/?x=1"),
            ("/a.jpg#part", "/a.jpg"),
        ],
    )
    def test_addresses_are_encoded_once(self, host: PictureHost, written: str, sent: str) -> None:
        """Letters that HTTP cannot carry are encoded; what is encoded already stays as it is."""
        host.answers[sent] = b"here"
        assert downloader().get(host.url + written) == b"here"


class TestSentences:
    @pytest.mark.parametrize(
        ("status", "wanted"),
        [
            (401, "answered 401, so it wants a login. Pictures must be readable without one."),
            (403, "answered 403, so it may not be read; a signed link may have run out. Make a new one."),
            (404, "answered 404, so the picture is not there. Check the task's address."),
            (503, "answered 503, not with a picture. Check the address in a browser."),
            (304, "answered 304, not with a picture. Check the address in a browser."),
        ],
    )
    def test_other_hosts(self, host: PictureHost, status: int, wanted: str) -> None:
        """A status of a foreign host becomes a sentence with its meaning."""
        host.answers["/a"] = status
        assert refused(FetchError, downloader(), f"{host.url}/a") == f"{host.url} {wanted}"

    @pytest.mark.parametrize(
        ("status", "detail", "key", "wanted"),
        [
            (401, NO_TOKEN, None, "it wants a token, and none is set. Set LABEL_STUDIO_API_KEY."),
            (401, "Invalid token.", TOKEN, "the token is wrong or was withdrawn. Set LABEL_STUDIO_API_KEY to a valid"),
            (401, LEGACY_OFF, TOKEN, "set LABEL_STUDIO_API_KEY to a personal access token, or allow legacy tokens"),
            (403, "", TOKEN, "the token's user may not read it, or local files are not served. Check both in Label"),
            (404, "", TOKEN, "is not there (an upload that was deleted: 500). Check that the picture shows in Label"),
            (500, "'NoneType' object has no attribute 'has_permission'", TOKEN, "(an upload that was deleted: 500)."),
            (502, "", TOKEN, "Check LABEL_STUDIO_URL, sub-path included."),
        ],
    )
    def test_label_studio(self, host: PictureHost, status: int, detail: str, key: str | None, wanted: str) -> None:
        """What Label Studio 1.23.2 answers becomes its meaning and the setting to change; its own words are quoted."""
        body = f'{{"status_code": {status}, "detail": "{detail}"}}'.encode()
        host.answers[UPLOAD] = (status, {"Content-Type": "application/json"}, body)
        kind = LockedError if status == 401 else FetchError
        said = refused(kind, at_studio(host, label_studio_api_key=key), f"{host.url}{UPLOAD}")
        assert said.startswith(f"Label Studio answered {status}")
        assert wanted in said
        assert (detail.rstrip(".") in said) == (status != 500)
        assert TOKEN not in said

    def test_refused_on_localhost(self) -> None:
        """Nothing listens on localhost: the sentence thinks of containers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
        said = refused(FetchError, downloader(label_studio_url=url), f"{url}{UPLOAD}")
        assert said.startswith(f"{url} refused the connection: nothing listens there. Inside a container localhost is")
        assert "host.docker.internal" in said

    def test_unknown_host(self) -> None:
        """A name that nobody knows is said so."""
        said = refused(FetchError, downloader(), "http://nowhere.example/a")
        assert said.startswith("the host name nowhere.example must be known here, and is not.")

    @pytest.mark.parametrize("name", ["a" * 70 + ".example", "ü" * 70 + ".example", "x..example"])
    def test_impossible_host(self, name: str) -> None:
        """A name that cannot be one is an error like any other."""
        refused(FetchError, downloader(), f"http://{name}/a")

    def test_tls(self, host: PictureHost) -> None:
        """A server without TLS behind https:// is recognised."""
        said = refused(FetchError, downloader(), host.url.replace("http", "https") + "/a")
        assert "does not speak TLS" in said

    def test_certificates(self) -> None:
        """A certificate that nobody vouches for is refused, and the sentence names the way out."""
        cause = ssl.SSLCertVerificationError("x")
        cause.verify_message = "self-signed certificate"
        said = download._unreachable("https://h/a?sig=s3cret", cause)
        assert said.startswith("https://h must show a certificate that can be trusted, and does not (self-signed")
        assert "SSL_CERT_FILE" in said
        assert "s3cret" not in said

    def test_no_http_at_all(self) -> None:
        """A port where something else talks is a broken-off download."""
        with socket.create_server(("127.0.0.1", 0)) as server:

            def talk() -> None:
                for _ in range(2):
                    connection, _ = server.accept()
                    connection.sendall(b"220 mail ready\r\n")
                    connection.close()

            thread = threading.Thread(target=talk)
            thread.start()
            refused(FetchError, downloader(), f"http://127.0.0.1:{server.getsockname()[1]}/a")
            thread.join()


def packed_raw(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(3_000_000)  # packs so well that a piece comes from no input


class TestPacked:
    @pytest.mark.parametrize(
        ("encoding", "body"),
        [
            pytest.param("gzip", gzip.compress(PICTURE), id="gzip"),
            pytest.param("GZIP", gzip.compress(PICTURE), id="upper case"),
            pytest.param("x-gzip", gzip.compress(PICTURE), id="its old name"),
            pytest.param("gzip", gzip.compress(PICTURE[:50]) + gzip.compress(PICTURE[50:]), id="two in a row"),
            pytest.param("gzip", gzip.compress(PICTURE[:-900]) + gzip.compress(b"\0") * 900, id="hundreds in a row"),
            pytest.param("gzip", gzip.compress(PICTURE) + bytes(9), id="filled up"),
            pytest.param("deflate", zlib.compress(PICTURE), id="deflate"),
            pytest.param("deflate", packed_raw(PICTURE), id="deflate without a head"),
            pytest.param("deflate, gzip", gzip.compress(zlib.compress(PICTURE)), id="one in the other"),
            pytest.param("gzip,gzip", gzip.compress(gzip.compress(PICTURE)), id="twice"),
            pytest.param("identity", PICTURE, id="as it is"),
            pytest.param("gzip", PICTURE, id="not packed at all"),
            pytest.param("br", PICTURE, id="not packed, and unknown"),
            pytest.param("aws-chunked", PICTURE, id="no packing"),
            pytest.param("gzip, gzip", gzip.compress(PICTURE), id="packed once"),
            pytest.param("gzip", b"", id="empty"),
        ],
    )
    def test_is_unpacked(self, host: PictureHost, encoding: str, body: bytes) -> None:
        """Whatever a server says of it; it is asked to send it as it is."""
        host.answers["/a.png"] = (200, {"Content-Encoding": encoding}, body)
        assert downloader().get(f"{host.url}/a.png") == (PICTURE if body else b"")
        assert host.requests[0][1]["Accept-Encoding"] == "identity"

    @pytest.mark.parametrize(
        ("encoding", "body", "cause"),
        [
            pytest.param("br", b"\x0b\x02\x80\xff\xfe", "it comes packed as 'br'", id="brotli"),
            pytest.param("zstd", b"\x28\xb5\x2f\xfd\0\1", "it comes packed as 'zstd'", id="zstandard"),
            pytest.param("br, gzip", gzip.compress(b"\x0b\x02\x80\xff"), "packed as 'br, gzip'", id="inside"),
            pytest.param("gzip", gzip.compress(PICTURE)[:-20], "packed with gzip, and is cut off", id="cut off"),
            pytest.param("deflate", b"\x78\x9c\xff\xff", "packed with deflate, and is damaged", id="damaged"),
            pytest.param("gzip", gzip.compress(b"") * 1_000_000, "in more than 10000 parts", id="a million in a row"),
            pytest.param("gzip, " * 5, gzip.compress(b"\xff\0" * 9), "packed as 'gzip, gzip", id="too often"),
        ],
    )
    def test_is_refused_with_the_cause(self, host: PictureHost, encoding: str, body: bytes, cause: str) -> None:
        if "often" in cause or encoding.count("gzip") > 2:
            for _ in range(4):
                body = gzip.compress(body)
        host.answers["/a.png"] = (200, {"Content-Encoding": encoding}, body)
        assert cause in refused(FetchError, downloader(), f"{host.url}/a.png")

    @pytest.mark.parametrize("times", [1, 2])
    def test_a_bomb_hits_the_limit(self, host: PictureHost, times: int) -> None:
        """While it is unpacked, so that it is never whole in memory; the inner one of two as well."""
        body = gzip.compress(bytes(100_000_000), 1)
        for _ in range(times - 1):
            body = gzip.compress(body)
        host.answers["/a.png"] = (200, {"Content-Encoding": ", ".join(["gzip"] * times)}, body)
        tracemalloc.start()
        assert "may have 2 MB" in refused(TooLargeError, downloader(image_max_mb=2), f"{host.url}/a.png")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
        tracemalloc.stop()
