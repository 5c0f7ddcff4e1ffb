"""
Pictures over HTTP, within limits.

One deadline covers a whole download with its redirects, bytes are counted as they
come, every connection passes the guard, and Label Studio's token goes to Label
Studio alone.
"""

from __future__ import annotations

import json
import os
import ssl
import threading
import time
from functools import cache
from urllib.parse import quote, unquote, urljoin, urlsplit

import httpcore

from celestial_backend.errors import FetchError, ForbiddenError, TooLargeError
from celestial_backend.guard import PORTS, Guard, SilentHosts, origin
from celestial_backend.settings import Settings
from celestial_backend.studio import Studio, localhost_hint

MAX_REDIRECTS = 5
MAX_IDLE_CONNECTIONS = 32
IDLE_S = 15.0
URL_SIGNS = "/%:@!$&'()*+,;=~-._?"  # left as they are; all else is percent-encoded
REDIRECTS = (301, 302, 303, 307, 308)


class Downloader:
    """
    Fetches pictures; one per process, safe to share between threads and to make before a fork.

    Connections are kept open and used again, per origin; each was judged when made.
    """

    def __init__(self, settings: Settings, studio: Studio) -> None:
        self._settings = settings
        self._studio = studio
        self._max_bytes = int(settings.image_max_mb * 1_000_000)
        self._lock = threading.Lock()
        self._pool: httpcore.ConnectionPool | None = None
        self._pid = 0
        self._silent = SilentHosts()

    def close(self) -> None:
        """Close every connection and forget who was silent; the next download opens new ones and asks everybody."""
        self._silent = SilentHosts()
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.close()

    def get(self, url: str) -> bytes:
        """
        What an http or https address gives, redirects followed.

        Raises:
            ForbiddenError: The address, or one it redirects to, is not allowed.
            FetchError: It did not answer, or not with a file.
            TooLargeError: The file has more bytes than the settings allow.
            StudioError: Label Studio's token cannot be renewed.
        """
        own = self.is_studio(url)
        if own:
            self._studio.authorization()  # renewed before the clock starts, it has its own
        deadline = time.monotonic() + self._settings.image_timeout_s
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._hop(url, own, deadline)
            if isinstance(answer, bytes):
                return answer
            url, own = answer, own and self.is_studio(answer)
        raise FetchError(f"an address may redirect {MAX_REDIRECTS} times, and this one does so more often.")

    def is_studio(self, url: str) -> bool:
        """Whether an address lies in Label Studio: same scheme, host and port, and under its sub-path."""
        base = self._studio.url
        if base is None or origin(url) is None or origin(url) != origin(base):
            return False
        path = urlsplit(url).path
        return path.startswith(f"{urlsplit(base).path}/") and ".." not in unquote(path).split("/")

    def _hop(self, url: str, own: bool, deadline: float) -> bytes | str:
        """The file, or the address it redirects to. A broken connection and a stale token are tried twice."""
        target, place = _target(url), origin(url) or ("", "", 0)
        self._silent.check(place)
        answered = False
        timeouts = dict.fromkeys(("connect", "read", "write"), deadline)
        for last in (False, True):
            token = self._studio.authorization() if own else {}
            headers = {"Host": _host(url).split("://", 1)[1], "User-Agent": "celestial-backend", "Accept": "*/*"}
            try:
                with self._connections().stream(
                    "GET", target, headers=list((headers | token).items()), extensions={"timeout": timeouts}
                ) as response:
                    answered = True
                    self._silent.forget(place)
                    if response.status == 401 and not last and self._studio.forget(token):
                        continue
                    return self._answer(url, own, response)
            except httpcore.TimeoutException as error:
                late = FetchError(
                    f"{_host(url)} must give it within {self._settings.image_timeout_s:g} seconds, and did not."
                    " Raise CELESTIAL_IMAGE_TIMEOUT_S or look after that host."
                )
                raise (late if answered else self._silent.note(place, late)) from error
            except httpcore.ConnectError as error:
                raise self._silent.note(place, FetchError(_unreachable(url, *error.args))) from error
            except (httpcore.NetworkError, httpcore.RemoteProtocolError) as error:
                if last:
                    raise FetchError(f"{_host(url)} broke off before the whole file was there. Try again.") from error
            except (httpcore.LocalProtocolError, httpcore.UnsupportedProtocol) as error:
                raise FetchError("its address must be one that HTTP can carry, and is not. Check it.") from error
        raise FetchError("it could not be fetched.")

    def _connections(self) -> httpcore.ConnectionPool:
        with self._lock:
            if self._pool is None or self._pid != os.getpid():  # a child must not talk on its parent's connections
                self._pid = os.getpid()
                self._pool = httpcore.ConnectionPool(
                    ssl_context=_authorities(),
                    max_connections=None,
                    max_keepalive_connections=MAX_IDLE_CONNECTIONS,
                    keepalive_expiry=IDLE_S,
                    network_backend=Guard(self._settings),
                )
            return self._pool

    def _answer(self, url: str, own: bool, response: httpcore.Response) -> bytes | str:
        headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
        if response.status in REDIRECTS and b"location" in headers:
            return _next(url, headers[b"location"])
        if response.status != 200:
            raise FetchError(self._refusal(url, own, response))
        length = headers.get(b"content-length", "")
        if length.isdecimal():
            self._check_size(int(length))
        chunks, size = [], 0
        for chunk in response.iter_stream():
            size += len(chunk)
            self._check_size(size)
            chunks.append(chunk)
        return b"".join(chunks)

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise TooLargeError(
                f"a picture file may have {self._settings.image_max_mb:g} MB, and this one has more."
                " Raise CELESTIAL_IMAGE_MAX_MB or shrink the picture."
            )

    def _refusal(self, url: str, own: bool, response: httpcore.Response) -> str:
        status, host = response.status, _host(url)
        if not own:
            more = {
                401: "so it wants a login. Pictures must be readable without one",
                403: "so it may not be read; a signed link may have run out. Make a new one",
                404: "so the picture is not there. Check the task's address",
            }
            other = "not with a picture. Check the address in a browser"
            return f"{host} answered {status}, {more.get(status, other)}."
        said = _detail(response)
        if status in (401, 403):
            return f"Label Studio answered {status}{said}: {self._token_remedy(status, said)}."
        if status in (404, 500):
            return (
                f"Label Studio answered {status}, as it does when the picture, its task or the storage behind it"
                " is not there (an upload that was deleted: 500). Check that the picture shows in Label Studio."
            )
        return f"Label Studio answered {status}{said}, not with a picture. Check LABEL_STUDIO_URL, sub-path included."

    def _token_remedy(self, status: int, said: str) -> str:
        if not self._settings.label_studio_api_key:
            return "it wants a token, and none is set. Set LABEL_STUDIO_API_KEY"
        if "legacy token" in said:
            return "set LABEL_STUDIO_API_KEY to a personal access token, or allow legacy tokens in the organization"
        if status == 401:
            return "the token is wrong or was withdrawn. Set LABEL_STUDIO_API_KEY to a valid one"
        return "the token's user may not read it, or local files are not served. Check both in Label Studio"


@cache
def _authorities() -> ssl.SSLContext:
    """Whom to trust over TLS: Mozilla's list, this machine's own, and SSL_CERT_FILE; slow to load, so once."""
    context = httpcore.default_ssl_context()
    context.load_default_certs()
    return context


def _target(url: str) -> httpcore.URL:
    place = origin(url)
    if place is None:
        raise ForbiddenError(f"pictures come over http or https, and this leads to {_host(url)}. Change the address.")
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ForbiddenError("an address must not hold a user name or password, and this one does. Take them out.")
    try:
        host = place[1].encode("idna") if not place[1].isascii() else place[1].encode()
    except UnicodeError as error:
        raise FetchError("the host's name must be a valid one, and is not. Check the address.") from error
    path = quote(parts.path or "/", safe=URL_SIGNS)
    query = f"?{quote(parts.query, safe=URL_SIGNS)}" if parts.query else ""
    return httpcore.URL(scheme=place[0], host=host, port=place[2], target=(path + query).encode())


def _next(url: str, location: str) -> str:
    try:
        return urljoin(url, location.encode("latin-1").decode("utf-8", "replace"))
    except ValueError as error:
        raise FetchError(f"{_host(url)} must redirect to a valid address, and does not. Check it.") from error


def _host(url: str) -> str:
    """Scheme, host and port of an address: what of it may be shown."""
    place = origin(url)
    if place is None:
        return f"{url.split(':', 1)[0][:20]!r}"
    scheme, host, port = place
    host = f"[{host}]" if ":" in host else host.encode("idna").decode() if not host.isascii() else host
    return f"{scheme}://{host}" if port == PORTS[scheme] else f"{scheme}://{host}:{port}"


def _unreachable(url: str, cause: object = None) -> str:
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"{_host(url)} must show a certificate that can be trusted, and does not ({cause.verify_message})."
            " Mend the certificate, or set SSL_CERT_FILE to the authority that signed it."
        )
    if isinstance(cause, ssl.SSLError):
        return f"{_host(url)} does not speak TLS. Check whether its address starts with http:// instead of https://."
    if isinstance(cause, ConnectionRefusedError):
        return f"{_host(url)} refused the connection: nothing listens there.{localhost_hint(url)}"
    return f"{_host(url)} cannot be reached from here.{localhost_hint(url)} Check the address and the network."


def _detail(response: httpcore.Response) -> str:
    """What Label Studio says about a refusal, as ` (text)`; empty when it says nothing."""
    start = b""
    try:
        for chunk in response.iter_stream():
            start += chunk
            if len(start) > 8192:
                break
        said = json.loads(start).get("detail")
    except (ValueError, AttributeError, httpcore.NetworkError, httpcore.ProtocolError):
        return ""
    return f" ({said[:200].rstrip('.')})" if isinstance(said, str) and said else ""
