"""
Pictures over HTTP, within limits.

The address of a picture was written by a stranger. Connections go only to addresses that were resolved and judged
here: public ones, Label Studio's own, and those that the operator allows. One deadline covers a whole download with
its redirects, bytes are counted as they come, and Label Studio's token goes to where Label Studio keeps pictures,
and nowhere else. Nothing else of Label Studio is ever asked for: an address that a stranger wrote must not make it
work.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import ssl
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import SplitResult, parse_qs, quote, unquote, urljoin, urlsplit

import httpcore

from celestial_backend.errors import FetchError, ForbiddenError, ImageError, LockedError, file_too_large
from celestial_backend.labels import short
from celestial_backend.pictures.decode import NOTHING_KNOWN, PACKED_WITH_GZIP, looks_like
from celestial_backend.pictures.folders import split_inside
from celestial_backend.settings import Settings
from celestial_backend.studio.client import Studio, TimedBackend, localhost_hint

PORTS = {"http": 80, "https": 443}
SILENT_S = 30.0
SILENT_MAX = 1000
# Networks that lead to private addresses by another name, or that Python 3.11 calls global and nobody serves from.
DISGUISED = tuple(
    ip_network(text)
    for text in (
        "::ffff:0:0/96",  # IPv4 written as IPv6
        "::ffff:0:0:0/96",
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",
        "2001::/32",  # Teredo
        "2002::/16",  # 6to4
        "192.88.99.0/24",
        "fec0::/10",
        "3fff::/20",
        "5f00::/16",
    )
)

Origin = tuple[str, str, int]
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
ASKED = {"User-Agent": "celestial-backend", "Accept": "*/*", "Accept-Encoding": "identity"}  # some pack all the same
GZIP, DEFLATE = ("gzip", "x-gzip"), "deflate"
GZIP_START = b"\x1f\x8b"
PACKINGS_MAX = 4  # of one file, each in the other
MEMBERS_MAX = 10_000  # of one gzip file, one behind the other; programs write one for 64 kilobytes
PART = 1 << 16  # bytes that are given to zlib at once
PIECE = 1 << 20  # bytes that are unpacked at once
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


def origin(url: str) -> Origin | None:
    """Scheme, host and port of an http or https address, an impossible host as it is; None for any other text."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in PORTS or not parts.hostname:
        return None
    host = parts.hostname
    if not host.isascii():  # however it is spelt, it is the place that is connected to
        with suppress(UnicodeError):
            host = host.encode("idna").decode()
    return parts.scheme, host.rstrip("."), PORTS[parts.scheme] if port is None else port


class SilentHosts:
    """
    Hosts that could not be connected to a moment ago; safe to share between threads.

    A batch may name a thousand pictures of a host that is down: it is waited for once,
    not a thousand times, so the other pictures of the batch are still in time.
    """

    def __init__(self) -> None:
        self._silent: dict[Origin, tuple[float, str]] = {}

    def check(self, place: Origin) -> None:
        """
        Refuse a host that was silent less than half a minute ago.

        Raises:
            FetchError: With what was said of it then.
        """
        until, sentence = self._silent.get(place, (0.0, ""))
        if time.monotonic() < until:
            raise FetchError(f"{sentence} (It was tried a moment ago.)")

    def note(self, place: Origin, error: FetchError) -> FetchError:
        """Remember that a host was silent; gives the error back, to be raised."""
        if len(self._silent) >= SILENT_MAX:
            self._silent.clear()
        self._silent[place] = (time.monotonic() + SILENT_S, str(error))
        return error

    def forget(self, place: Origin) -> None:
        """It has answered."""
        self._silent.pop(place, None)


class Guard(TimedBackend):
    """
    Opens connections to judged addresses only; safe to share between threads.

    It resolves names itself and connects to the very address it judged, so a name
    cannot mean one host when checked and another when used. The timeouts it gets
    are points in time (see `deadlines`).

    Args:
        settings: Those of the process.
        trusts_studio: Whether Label Studio's own host may be a private one.
    """

    def __init__(self, settings: Settings, *, trusts_studio: bool = False) -> None:
        super().__init__()
        own = origin(settings.label_studio_url or "") if trusts_studio else None
        self._own = own[1:] if own else None
        self._names = set(settings.allowed_hosts)
        self._networks = []
        for entry in settings.allowed_hosts:
            try:
                self._networks.append(ip_network(entry.strip("[]"), strict=False))
            except ValueError:
                continue  # a name

    def resolve(self, host: str, port: int, deadline: float | None) -> list[str]:
        """Every address of the host, if every one of them is allowed."""
        try:
            addresses = super().resolve(host, port, deadline)
        except httpcore.ConnectError as error:
            raise FetchError(
                f"the host name {host} must be known here, and is not. Check the address, or the name service of this"
                " machine."
            ) from error
        if not self._trusts(host, port):
            for address in addresses:
                self._judge(host, ip_address(address))
        return addresses

    def _trusts(self, host: str, port: int) -> bool:
        host = host.lower().rstrip(".")
        return (host, port) == self._own or host in self._names or f"{host}:{port}" in self._names

    def _judge(self, host: str, address: IPv4Address | IPv6Address) -> None:
        if any(address in network for network in self._networks):
            return
        hidden = any(address in network for network in DISGUISED)
        if hidden or not address.is_global or address.is_multicast or address.is_reserved:
            raise ForbiddenError(
                f"pictures come only from public addresses, and {host} is not one. If it may serve pictures,"
                " add it to CELESTIAL_ALLOWED_HOSTS."
            )


def _machine(place: Origin) -> str:
    """The host of an origin; one name for this machine."""
    return THIS_MACHINE[0] if place[1] in THIS_MACHINE else place[1]


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
            if own and not self.is_studio(answer) and self._is_same_picture(url, answer):
                raise FetchError(
                    f"Label Studio answers that it has moved to {shown_host(answer)}, and the token is not sent there."
                    " If Label Studio is there, set LABEL_STUDIO_URL to it."
                )
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

    def is_picture_of_studio(self, url: str) -> bool:
        """
        Whether an address is a picture of Label Studio under any of its names; it is asked for under LABEL_STUDIO_URL.

        The host is that of LABEL_STUDIO_URL or LABEL_STUDIO_HOST. Scheme and port may be others, as behind a proxy,
        and this machine's names are one.
        """
        place = origin(url)
        for base in filter(None, (self._settings.label_studio_url, self._settings.label_studio_host)):
            known, path = origin(base), f"{urlsplit(base).path}/"
            if place and known and _machine(place) == _machine(known) and urlsplit(url).path.startswith(path):
                return studio_path(urlsplit(url)) is not None
        return False

    def _is_same_picture(self, url: str, answer: str) -> bool:
        """Whether Label Studio sends to itself under another name, and not to a storage beside it."""
        return self.is_picture_of_studio(answer) and studio_path(urlsplit(answer)) == studio_path(urlsplit(url))

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
        """
        The file, or the address it redirects to.

        A broken connection and a stale token are tried twice, and the second time on a new connection: of
        those that are kept open, a server may have closed all.
        """
        target, place = _target(url), origin(url) or ("", "", 0)
        self._silent.check(place)
        timeouts = dict.fromkeys(("connect", "read", "write"), deadline)
        for last in (False, True):
            token = self._studio.authorization() if own else {}
            headers = {"Host": shown_host(url).split("://", 1)[1], **ASKED}
            left_s = deadline - time.monotonic()
            try:
                with (
                    self._new_connections(own) if last else nullcontext(self._connections(own)) as connections,
                    connections.stream(
                        "GET", target, headers=list((headers | token).items()), extensions={"timeout": timeouts}
                    ) as response,
                ):
                    self._silent.forget(place)
                    if response.status == 401 and not last and self._studio.forget(token):
                        continue
                    return self._answer(url, own, response)
            except httpcore.TimeoutException as error:
                late = FetchError(
                    f"{shown_host(url)} must give it within {self._settings.image_timeout_s:g} seconds, and did not."
                    " Raise CELESTIAL_IMAGE_TIMEOUT_S or look after that host."
                )
                # A host that others left no time for is not silent, nor is one that takes long to answer.
                silent = isinstance(error, httpcore.ConnectTimeout) and left_s > self._settings.image_timeout_s / 2
                raise (self._silent.note(place, late) if silent else late) from error
            except httpcore.ConnectError as error:
                raise self._silent.note(place, FetchError(_unreachable(url, *error.args))) from error
            except (httpcore.NetworkError, httpcore.RemoteProtocolError) as error:
                if last:
                    broken = f"{shown_host(url)} broke off before the whole file was there. Try again."
                    raise FetchError(broken) from error
            except (httpcore.LocalProtocolError, httpcore.UnsupportedProtocol) as error:
                raise FetchError("its address must be one that HTTP can carry, and is not. Check it.") from error
        raise FetchError("it could not be fetched.")

    def _connections(self, own: bool) -> httpcore.ConnectionPool:
        with self._lock:
            if self._pid != os.getpid():  # a child must not talk on its parent's connections
                self._pid, self._pools = os.getpid(), {}
            if own not in self._pools:
                self._pools[own] = self._new_connections(own)
            return self._pools[own]

    def _new_connections(self, own: bool) -> httpcore.ConnectionPool:
        return httpcore.ConnectionPool(
            ssl_context=_authorities(),
            max_connections=None,
            max_keepalive_connections=MAX_IDLE_CONNECTIONS,
            keepalive_expiry=IDLE_S,
            network_backend=Guard(self._settings, trusts_studio=own),
        )

    def _answer(self, url: str, own: bool, response: httpcore.Response) -> bytes | str:
        headers: dict[bytes, str] = {}
        for name, value in response.headers:
            headers[name.lower()] = ", ".join(filter(None, [headers.get(name.lower()), value.decode("latin-1")]))
        if response.status in REDIRECTS and b"location" in headers:
            return _next(url, headers[b"location"])
        if response.status != 200:
            kind = LockedError if own and response.status == 401 else FetchError
            raise kind(self._refusal(url, own, response))
        length = headers.get(b"content-length", "")
        if length.isdecimal():
            self._check_size(int(length))
        chunks, size = [], 0
        for chunk in response.iter_stream():
            size += len(chunk)
            self._check_size(size)
            chunks.append(chunk)
        return unpacked(b"".join(chunks), headers.get(b"content-encoding", ""), self._check_size)

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise file_too_large(self._settings.image_max_mb)

    def _refusal(self, url: str, own: bool, response: httpcore.Response) -> str:
        status, host = response.status, shown_host(url)
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


def unpacked(data: bytes, encoding: str, check_size: Callable[[int], None]) -> bytes:
    """
    A file as it was before a server packed it.

    What is said to be packed and is not stays as it is.

    Args:
        data: As it came.
        encoding: The Content-Encoding that came with it.
        check_size: Told how many bytes there are while they are unpacked; raises where they are too many.

    Raises:
        FetchError: It is packed in a way that is not known here, or is damaged.
        TooLargeError: From `check_size`.
    """
    names = [name for name in encoding.lower().replace(",", " ").split() if name != "identity"]
    for number, name in enumerate(reversed(names)):
        if looks_like(data) not in (NOTHING_KNOWN, PACKED_WITH_GZIP):
            break
        if name not in (*GZIP, DEFLATE) or number == PACKINGS_MAX:
            raise FetchError(
                f"it comes packed as {short(encoding)}, and what is packed with gzip or deflate, {PACKINGS_MAX} times"
                " at most, can be unpacked. Have its host send it as it is."
            )
        data = _inflated(data, name, check_size)
    return data


def _inflated(data: bytes, name: str, check_size: Callable[[int], None]) -> bytes:
    gzip, found = name in GZIP, bytearray()
    has_head = gzip or (data[0] & 15 == zlib.DEFLATED and int.from_bytes(data[:2]) % 31 == 0)  # some leave it out
    window, at = (zlib.MAX_WBITS if has_head else -zlib.MAX_WBITS) + 16 * gzip, 0
    try:
        for _ in range(MEMBERS_MAX):
            packed = zlib.decompressobj(window)
            while not packed.eof:
                part = data[at : at + PART]  # zlib copies what it leaves over
                piece = packed.decompress(part, PIECE)
                at += len(part) - len(packed.unused_data if packed.eof else packed.unconsumed_tail)
                found += piece
                check_size(len(found))
                if not (piece or part or packed.eof):
                    raise FetchError(f"it comes packed with {name}, and is cut off. Upload it again.")
            if not (gzip and data.startswith(GZIP_START, at)):  # several in a row are one file
                return bytes(found)
    except zlib.error as error:
        raise FetchError(f"it comes packed with {name}, and is damaged. Upload it again.") from error
    raise FetchError(f"it comes packed with {name}, in more than {MEMBERS_MAX} parts. Have its host send it as it is.")


@cache
def _authorities() -> ssl.SSLContext:
    """Whom to trust over TLS: Mozilla's list, this machine's own, and SSL_CERT_FILE; slow to load, so once."""
    context = httpcore.default_ssl_context()
    context.load_default_certs()
    return context


def _target(url: str) -> httpcore.URL:
    place = origin(url)
    if place is None:
        scheme = shown_host(url)
        raise ForbiddenError(f"pictures come over http or https, and this leads to {scheme}. Change the address.")
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
        raise FetchError(f"{shown_host(url)} must redirect to a valid address, and does not. Check it.") from error


def shown_host(url: str) -> str:
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
            f"{shown_host(url)} must show a certificate that can be trusted, and does not ({cause.verify_message})."
            " Mend the certificate, or set SSL_CERT_FILE to the authority that signed it."
        )
    if isinstance(cause, ssl.SSLError):
        return f"{shown_host(url)} does not speak TLS. Check whether its address starts with http:// instead of https://."
    if isinstance(cause, ConnectionRefusedError):
        return f"{shown_host(url)} refused the connection: nothing listens there.{localhost_hint(url)}"
    return f"{shown_host(url)} cannot be reached from here.{localhost_hint(url)} Check the address and the network."


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
