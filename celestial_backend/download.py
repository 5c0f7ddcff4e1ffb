"""
Pictures over HTTP, within limits.

One deadline covers a whole download with its redirects, bytes are counted as they
come, every connection passes the guard, and Label Studio's token goes to where Label
Studio keeps pictures, and nowhere else. Nothing else of Label Studio is ever asked
for: an address that a stranger wrote must not make it work.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import ssl
import threading
import time
from functools import cache
from urllib.parse import SplitResult, parse_qs, quote, unquote, urljoin, urlsplit

import httpcore

from celestial_backend.errors import FetchError, ForbiddenError, ImageError, TooLargeError
from celestial_backend.folders import split_inside
from celestial_backend.guard import PORTS, Guard, SilentHosts, origin
from celestial_backend.settings import Settings
from celestial_backend.studio import Studio, localhost_hint

MAX_REDIRECTS = 5
MAX_IDLE_CONNECTIONS = 32
IDLE_S = 15.0
URL_SIGNS = "/%:@!$&'()*+,;=~-._?"  # left as they are; all else is percent-encoded
REDIRECTS = (301, 302, 303, 307, 308)
ADDRESS_MAX = 8_000  # letters; servers and browsers take no longer ones
HOST_MAX = 253  # letters of a host's name, and user name and port have room beside it
AUTHORITY = re.compile(r"[^/?#]*//(?P<text>[^/?#]*)")
BLANKS = dict.fromkeys(map(ord, "\t\r\n"))  # which an address is read without
# Where Label Studio keeps pictures, under whatever prefix.
UPLOAD = re.compile(r"(?:(?:.*?/)?data/|/?)upload/(?P<path>.+)", re.DOTALL)
LOCAL = re.compile(r"(?:.*?/)?data/local-files/?")
RESOLVE = re.compile(r"(?:.*?/)?(?P<path>(?:tasks|projects)/[0-9]+/(?:resolve|presign)/?)")


def split_address(text: str) -> SplitResult:
    """
    The parts of an address that a stranger wrote, in time that is linear in its length.

    Raises:
        ImageError: It is none, or longer than addresses are.
    """
    if len(text) > ADDRESS_MAX:
        raise ImageError(
            f"an address or a path may have {ADDRESS_MAX} letters, and this one has {len(text)}. Correct the task."
        )
    authority = AUTHORITY.match(text.translate(BLANKS))
    if authority and len(authority["text"]) > 2 * HOST_MAX:
        raise ImageError(
            f"the name of a host may have {HOST_MAX} letters, and this address has {len(authority['text'])} in its"
            " place. Correct the task."
        )
    try:
        text.encode()  # half a surrogate pair is fine JSON, and no name of anything
        return urlsplit(text)
    except ValueError as error:
        raise ImageError("its address must be a valid one, and is not. Correct the task.") from error


def studio_path(parts: SplitResult) -> str | None:
    """
    The path and query under which Label Studio serves a picture; None for all else that it serves.

    Raises:
        ForbiddenError: The path leaves its folder.
    """
    if upload := UPLOAD.fullmatch(parts.path):
        return "/data/upload/" + quote("/".join(split_inside(unquote(upload["path"]))))
    if LOCAL.fullmatch(parts.path):
        return "/data/local-files/?d=" + quote("/".join(split_inside(local_file(parts.query))))
    if resolve := RESOLVE.fullmatch(parts.path):
        return f"/{resolve['path']}?{parts.query}"
    return None


def local_file(query: str) -> str:
    """The file that the query of Label Studio's address of a local file names."""
    return parse_qs(query).get("d", [""])[0]


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
        self._pools: dict[bool, httpcore.ConnectionPool] = {}  # Label Studio's own, and all others'
        self._pid = 0
        self._silent = SilentHosts()

    def close(self) -> None:
        """Close every connection and forget who was silent; the next download opens new ones and asks everybody."""
        self._silent = SilentHosts()
        with self._lock:
            pools, self._pools = self._pools, {}
        if self._pid == os.getpid():
            for pool in pools.values():
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
            url = self._picture_of_studio(url)
            self._studio.authorization()  # renewed before the clock starts, it has its own
        deadline = time.monotonic() + self._settings.image_timeout_s
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._hop(url, own, deadline)
            if isinstance(answer, bytes):
                return answer
            if not self.is_studio(answer):
                url, own = answer, False
            elif own:
                url = self._picture_of_studio(answer)
            else:
                raise ForbiddenError("an address elsewhere must not redirect to Label Studio. Correct the task.")
        raise FetchError(f"an address may redirect {MAX_REDIRECTS} times, and this one does so more often.")

    def is_studio(self, url: str) -> bool:
        """Whether an address lies in Label Studio: same scheme, host and port, and under its sub-path."""
        base = self._studio.url
        place = origin(url)
        if base is None or place is None or place != origin(base):
            return False
        path = posixpath.normpath("/" + unquote(urlsplit(url).path).lstrip("/"))
        return f"{path}/".startswith(f"{urlsplit(base).path}/")

    def _picture_of_studio(self, url: str) -> str:
        """An address in Label Studio as it is asked for, if a picture may lie there."""
        path = studio_path(urlsplit(url))
        if path is None:
            raise ForbiddenError(
                "pictures of Label Studio are uploads (/data/upload/...), local files (/data/local-files/?d=...) and"
                " files of its storage (/tasks/.../resolve/), and nothing else there is asked for. Correct the task."
            )
        return f"{self._studio.url}{path}"

    def _hop(self, url: str, own: bool, deadline: float) -> bytes | str:
        """The file, or the address it redirects to. A broken connection and a stale token are tried twice."""
        target, place = _target(url), origin(url) or ("", "", 0)
        self._silent.check(place)
        timeouts = dict.fromkeys(("connect", "read", "write"), deadline)
        for last in (False, True):
            token = self._studio.authorization() if own else {}
            headers = {"Host": _host(url).split("://", 1)[1], "User-Agent": "celestial-backend", "Accept": "*/*"}
            left_s = deadline - time.monotonic()
            try:
                with self._connections(own).stream(
                    "GET", target, headers=list((headers | token).items()), extensions={"timeout": timeouts}
                ) as response:
                    self._silent.forget(place)
                    if response.status == 401 and not last and self._studio.forget(token):
                        continue
                    return self._answer(url, own, response)
            except httpcore.TimeoutException as error:
                late = FetchError(
                    f"{_host(url)} must give it within {self._settings.image_timeout_s:g} seconds, and did not."
                    " Raise CELESTIAL_IMAGE_TIMEOUT_S or look after that host."
                )
                # A host that others left no time for is not silent, nor is one that takes long to answer.
                silent = isinstance(error, httpcore.ConnectTimeout) and left_s > self._settings.image_timeout_s / 2
                raise (self._silent.note(place, late) if silent else late) from error
            except httpcore.ConnectError as error:
                raise self._silent.note(place, FetchError(_unreachable(url, *error.args))) from error
            except (httpcore.NetworkError, httpcore.RemoteProtocolError) as error:
                if last:
                    raise FetchError(f"{_host(url)} broke off before the whole file was there. Try again.") from error
            except (httpcore.LocalProtocolError, httpcore.UnsupportedProtocol) as error:
                raise FetchError("its address must be one that HTTP can carry, and is not. Check it.") from error
        raise FetchError("it could not be fetched.")

    def _connections(self, own: bool) -> httpcore.ConnectionPool:
        with self._lock:
            if self._pid != os.getpid():  # a child must not talk on its parent's connections
                self._pid, self._pools = os.getpid(), {}
            if own not in self._pools:
                self._pools[own] = httpcore.ConnectionPool(
                    ssl_context=_authorities(),
                    max_connections=None,
                    max_keepalive_connections=MAX_IDLE_CONNECTIONS,
                    keepalive_expiry=IDLE_S,
                    network_backend=Guard(self._settings, trusts_studio=own),
                )
            return self._pools[own]

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
    if len(place[1]) > HOST_MAX:
        raise FetchError(f"the name of a host may have {HOST_MAX} letters, and this one has more. Check the address.")
    if not place[1].isascii():
        raise FetchError("the host's name must be a valid one, and is not. Check the address.")
    path = quote(parts.path or "/", safe=URL_SIGNS)
    query = f"?{quote(parts.query, safe=URL_SIGNS)}" if parts.query else ""
    return httpcore.URL(scheme=place[0], host=place[1], port=place[2], target=(path + query).encode())


def _next(url: str, location: str) -> str:
    try:
        split_address(location)
        return urljoin(url, location.encode("latin-1").decode("utf-8", "replace"))
    except (ImageError, ValueError) as error:
        raise FetchError(f"{_host(url)} must redirect to a valid address, and does not. Check it.") from error


def _host(url: str) -> str:
    """Scheme, host and port of an address: what of it may be shown."""
    place = origin(url)
    if place is None:
        return f"{url.split(':', 1)[0][:20]!r}"
    scheme, host, port = place
    host = f"[{host}]" if ":" in host else host
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
    except (ValueError, AttributeError, RecursionError, httpcore.NetworkError, httpcore.ProtocolError):
        return ""
    return f" ({said[:200].rstrip('.')})" if isinstance(said, str) and said else ""
