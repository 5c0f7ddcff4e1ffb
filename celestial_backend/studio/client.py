"""
Label Studio, as the backend reaches it: its address, its token, and what its refusals mean.

A legacy token is sent as it is. A personal access token is not: it buys access tokens that live five minutes, and
label-studio-sdk knows how. That library takes two seconds to import, so only a personal access token loads it, on
first use.

Timeouts here, and where pictures are fetched, are points in time, not spans. HTTP libraries bound each read, so a
server that sends a byte every few seconds may keep a thread for ever; what is given as a timeout is the moment, on
the monotonic clock, by which everything must be over.
"""

from __future__ import annotations

import html
import queue
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import httpcore

from celestial_backend.errors import StudioError, TokenError
from celestial_backend.settings import Settings

if TYPE_CHECKING:
    import httpx
    from label_studio_sdk import LabelStudio
    from label_studio_sdk.core.api_error import ApiError

Answer = TypeVar("Answer")
CERTIFICATE = "certificate "  # begins what stands in the regions of annotations that `finish` has accepted
PART = 4096  # bytes that a socket takes at once, if it takes any: httpcore gives each time the whole span
REFRESH_TIMEOUT_S = 10.0
PASSING = (408, 425, 429, *range(500, 600))  # statuses that a second try may get past
ANSWER_TIMEOUT_S = 60.0  # a page of 200 tasks takes Label Studio about two seconds
MADE_NO_SENSE = (ValueError, TypeError, AttributeError)  # what label-studio-sdk trips with over another JSON
FAILURE_KEPT_S = 5.0  # so that a thousand pictures do not wait a thousand times for a Label Studio that is down


def rewritten(name: str) -> str:
    """
    What Label Studio 1.23 makes of a file's name when it is uploaded, without the `<hash>-` before it.

    Spaces become underscores; all that is no letter, digit, dash, underscore or
    dot is dropped, combining marks too (Django's `sanitize_file_name` and
    `get_valid_filename`, behind what browsers do to quotes).
    """
    name = html.unescape(name.replace('"', "%22"))
    name = name.rsplit("/")[-1].rsplit("\\")[-1]
    name = "".join(sign for sign in name if sign.isprintable()).rstrip().replace(" ", "_")
    return re.sub(r"[^-\w.]", "", name)


def credentials(user: str, password: str) -> tuple[bytes, bytes]:
    """The two ways in which clients write a name and a password for basic authentication, before they pack them."""
    pair = f"{user}:{password}"
    return pair.encode(), pair.encode("latin-1", "backslashreplace")  # Label Studio sends the second


def left(deadline: float | None, late: type[Exception]) -> float:
    """
    Seconds until a moment.

    Raises:
        late: It is past, or there is none.
    """
    seconds = 0.0 if deadline is None else deadline - time.monotonic()
    if seconds <= 0:
        raise late
    return seconds


class _TimedStream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), PART):
            self._stream.write(buffer[start : start + PART], left(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        seconds = left(timeout, httpcore.ConnectTimeout)
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, seconds))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class TimedBackend(httpcore.NetworkBackend):
    """Opens connections whose timeouts are points in time; safe to share between threads."""

    def __init__(self) -> None:
        self._plain = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """A connection to the first of the host's addresses that answers."""
        addresses = self.resolve(host, port, timeout)
        for others, address in zip(range(len(addresses) - 1, -1, -1), addresses, strict=True):
            share = left(timeout, httpcore.ConnectTimeout) / (others + 1)  # one dead address must not eat it all
            try:
                return _TimedStream(self._plain.connect_tcp(address, port, share, local_address, socket_options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if not others:
                    raise
        raise httpcore.ConnectError(f"{host} has no address")

    def resolve(self, host: str, port: int, deadline: float | None) -> list[str]:
        """
        Every address of a host; asked for in a thread of its own, because the resolver knows no deadline.

        Raises:
            httpcore.ConnectError: The name is not known.
            httpcore.ConnectTimeout: The resolver did not answer in time.
        """
        answers: queue.SimpleQueue[list[str] | OSError | UnicodeError] = queue.SimpleQueue()

        def ask() -> None:
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                answers.put(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
            except (OSError, UnicodeError) as error:
                answers.put(error)

        threading.Thread(target=ask, daemon=True, name="resolve").start()
        try:
            answer = answers.get(timeout=left(deadline, httpcore.ConnectTimeout))
        except queue.Empty as error:
            raise httpcore.ConnectTimeout from error
        if isinstance(answer, list):
            return answer
        raise httpcore.ConnectError(str(answer)) from answer


def punctual_client(timeout_s: float) -> httpx.Client:
    """A client, with the proxies of the environment, each of whose requests is over in time, redirects included."""
    import httpx

    client = httpx.Client(timeout=timeout_s, follow_redirects=True, event_hooks={"request": [_bound]})
    for transport in (client._transport, *client._mounts.values()):
        if isinstance(transport, httpx.HTTPTransport):
            transport._pool._network_backend = TimedBackend()  # httpx has no public way to choose it
    return client


def _bound(request: httpx.Request) -> None:
    spans = request.extensions["timeout"]
    until = request.extensions.setdefault("deadline", time.monotonic() + spans["read"])
    request.extensions["timeout"] = {**dict.fromkeys(("connect", "read", "write"), until), "pool": spans["pool"]}


def moment(text: object) -> datetime:
    """A moment as Label Studio writes it, for comparison: whole seconds come without a fraction."""
    try:
        read = datetime.fromisoformat(str(text))
    except ValueError:
        return datetime.min.replace(tzinfo=UTC)
    return read if read.tzinfo else read.replace(tzinfo=UTC)


def is_certified(annotation: Mapping[str, Any]) -> bool:
    """
    Whether `finish` accepted an annotation without anybody's look, and nobody has looked since.

    Its regions say so, and the editor has measured no time: both are in exports too.
    """
    result = annotation.get("result")
    metas = [each.get("meta") for each in result if isinstance(each, Mapping)] if isinstance(result, list) else []
    texts = [str(meta.get("text") or "") for meta in metas if isinstance(meta, Mapping)]
    return annotation.get("lead_time") is None and any(CERTIFICATE in text for text in texts)


def localhost_hint(url: str) -> str:
    """What to look at when an address on this machine does not answer; empty for any other address."""
    if urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1"):
        return ""
    return (
        " Inside a container localhost is the container itself: set LABEL_STUDIO_URL to"
        " Label Studio's service name or to host.docker.internal."
    )


class Studio:
    """
    Label Studio's address and token; one per process, safe to share between threads.

    Attributes:
        url: Its address; None where nobody said it.
        link: Where people open it.
        place: The same for messages, without a password.
    """

    def __init__(
        self, settings: Settings, *, answer_s: float = ANSWER_TIMEOUT_S, refresh_s: float = REFRESH_TIMEOUT_S,
        failure_kept_s: float = FAILURE_KEPT_S,
    ) -> None:  # fmt: skip
        self.url, self.link = settings.label_studio_url, (settings.studio_link or "").rstrip("/")
        self._answer_s, self._refresh_s, self._failure_kept_s = answer_s, refresh_s, failure_kept_s
        self.place = re.sub(r"//[^/]*@", "//", self.url or "")
        self._key = settings.label_studio_api_key
        self._lock = threading.Lock()
        self._client: LabelStudio | None = None
        self._sent: dict[str, str] = {}
        self._failure: StudioError | None = None
        self._failed_at = 0.0

    def authorization(self) -> dict[str, str]:
        """
        The header that opens Label Studio's doors; empty without a token.

        A personal access token is exchanged only when the last access token has
        run out; while one thread does so, the others wait for its result.

        Raises:
            StudioError: The token cannot be used, or Label Studio did not renew it.
        """
        if not self._key:
            return {}
        _check_key(self._key)
        if not _is_personal(self._key):
            return {"Authorization": f"Token {self._key}"}
        with self._lock:
            if self._failure and time.monotonic() - self._failed_at < self._failure_kept_s:
                raise type(self._failure)(str(self._failure))
            try:
                self._sent = self._bearer(self._key)
            except StudioError as error:
                self._failure, self._failed_at, self._client = type(error)(str(error)), time.monotonic(), None
                raise
            self._failure = None
            return dict(self._sent)

    def client(self) -> LabelStudio:
        """
        A client of Label Studio's whole API, for one thread; it renews its access token by itself.

        It tries nothing twice; its errors are made into sentences by `problem`. Its connections are closed when
        nobody has it any more.

        Raises:
            StudioError: LABEL_STUDIO_URL or LABEL_STUDIO_API_KEY is missing, or the token cannot be one.
        """
        if not self.url or not self._key:
            raise StudioError(
                "Label Studio has to be asked, which needs LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY. Set both, or run"
                " `connect --new-token`."
            )
        _check_key(self._key)
        from label_studio_sdk import LabelStudio
        from label_studio_sdk.core.api_error import ApiError

        http = self._http(self._answer_s)
        try:
            client = LabelStudio(  # type: ignore[no-untyped-call]
                base_url=f"{self.url}/", api_key=self._key, timeout=self._answer_s, max_retries=0, httpx_client=http
            )
            return _closing(client, http)
        except ApiError as error:  # a personal access token that has run out is known without asking
            raise self._refusal(error) from error

    def problem(self, error: Exception, wanted: str) -> tuple[str, bool]:
        """
        What went wrong in a call of Label Studio's API.

        Args:
            error: What a client's call raised, one of `failures`. Never shown whole: it holds cookies.
            wanted: What was asked for, such as "the tasks of project 3".

        Returns:
            A sentence for people, and whether it may pass by itself.
        """
        import httpx
        from label_studio_sdk.core.api_error import ApiError

        if isinstance(error, httpx.TimeoutException):
            return (
                f"Label Studio at {self.place} must answer within {self._answer_s:g} seconds and did not, when asked"
                f" for {wanted}. Check that it runs and is not overloaded.{localhost_hint(self.url or '')}"
            ), True
        if isinstance(error, ApiError) and error.status_code != 200:
            return self._denial(error.status_code or 0, error.body, wanted), error.status_code in PASSING
        if isinstance(error, (httpx.HTTPError, httpx.InvalidURL)):
            return self._unreachable(error), isinstance(error, httpx.TransportError)
        # A proxy in front of Label Studio says with a page that it is away, also when a token is to be renewed.
        return (
            f"What answers at {self.place} is not Label Studio: it did not give {wanted}. Check LABEL_STUDIO_URL."
        ), isinstance(error, MADE_NO_SENSE)

    def ask(self, wanted: str, call: Callable[[LabelStudio], Answer]) -> Answer:
        """
        What one call of Label Studio's API gives.

        Raises:
            StudioError: It gave none; of what it holds against the request, its own words.
        """
        try:
            return call(self.client())
        except self.failures() as error:
            said = _held_against(error)
            if said:
                raise StudioError(f"Label Studio refuses {wanted}: {said}") from None
            raise StudioError(self.problem(error, wanted)[0]) from None  # the SDK's own text holds cookies

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        """What the calls of a client raise, all that `problem` can explain."""
        import httpx
        from label_studio_sdk.core.api_error import ApiError
        from label_studio_sdk.core.parse_error import ParsingError

        return (ApiError, ParsingError, httpx.HTTPError, httpx.InvalidURL, *MADE_NO_SENSE)

    def check(self, seconds: float) -> None:
        """
        See whether Label Studio is there and accepts the token, if there is one; without label-studio-sdk.

        Raises:
            TokenError: It refuses the token.
            StudioError: It did not answer in time, or not as Label Studio does.
        """
        if self._key:
            _check_key(self._key)
        if self._key and _is_personal(self._key):
            self.get("api/token/refresh/", "an access token", seconds, {"refresh": self._key})
        elif self._key:
            self.get("api/current-user/whoami", "the token's user", seconds)
        else:
            self.get("api/version", "its version", seconds)

    def get(self, path: str, wanted: str, seconds: float, body: dict[str, str] | None = None) -> Any:
        """
        The JSON object under a path of Label Studio, asked for with a legacy token if there is one.

        Args:
            path: Without a slash in front.
            wanted: What is asked for, such as "the first tasks".
            seconds: In which it must be there.
            body: Sent along, if any.

        Raises:
            TokenError: The token is refused.
            StudioError: It was not answered in time, or not so.
        """
        import httpx

        header = {"Authorization": f"Token {self._key}"} if self._key and not _is_personal(self._key) else {}
        try:
            with self._http(seconds) as http:
                answer = http.request("POST" if body else "GET", f"{self.url}/{path}", headers=header, json=body)
            told = answer.json()
        except httpx.TimeoutException as error:
            raise StudioError(self._late(seconds)) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise StudioError(self._unreachable(error)) from error
        except ValueError:
            told = None
        if isinstance(told, dict) and answer.is_success:
            return told
        if isinstance(told, dict) and told and answer.status_code != 404:  # a path that Label Studio has
            denial = self._denial(answer.status_code, told, wanted)
            raise (TokenError if answer.status_code in (401, 403) else StudioError)(denial)
        strange = f"What answers at {self.place} is not Label Studio."
        raise StudioError(f"{strange} Check LABEL_STUDIO_URL, sub-path included.")

    def _denial(self, status: int, body: object, wanted: str) -> str:
        detail = body.get("detail") if isinstance(body, dict) else None
        said = f" ({str(detail)[:200].rstrip('.')})" if detail else ""
        start = f"Label Studio at {self.place} answered {status}{said} when asked for {wanted}."
        if status == 401:
            return f"{start} Set LABEL_STUDIO_API_KEY to a valid token, from Account & Settings."
        if status == 403:
            return f"{start} Give the token's user access to the project."
        if status == 404:
            return f"{start} The project was deleted, or the token's user may not see it. Check both in Label Studio."
        if status in PASSING:
            return f"{start} Look into Label Studio's own log."
        return f"{start} Check LABEL_STUDIO_URL, sub-path included."

    def forget(self, refused: dict[str, str]) -> bool:
        """
        Drop the access token that Label Studio has just refused.

        Returns:
            Whether `authorization` may give another one: no for a legacy token.
        """
        if not refused.get("Authorization", "").startswith("Bearer "):
            return False
        with self._lock:
            if refused == self._sent:
                self._client = None
        return True

    def _http(self, timeout_s: float) -> httpx.Client:
        client = punctual_client(timeout_s)
        client.event_hooks["response"].append(self._stay)
        return client

    def _stay(self, response: httpx.Response) -> None:
        """Follow no redirect to another place: a personal access token lies in the body, which 307 and 308 repeat."""
        if not response.has_redirect_location:
            return
        asked = response.request.url
        told = asked.join(response.headers["location"])
        if (told.scheme, told.host, told.port) == (asked.scheme, asked.host, asked.port):
            return
        rest = asked.path.removeprefix(urlsplit(self.url or "").path)
        place = str(told.copy_with(userinfo=b"", path=told.path.removesuffix(rest) or "/", query=None, fragment=None))
        raise StudioError(
            f"Label Studio at {self.place} answers that it has moved elsewhere, and the token is not sent there."
            f" If Label Studio is at {place.rstrip('/')}, set LABEL_STUDIO_URL to that."
        )

    def _bearer(self, key: str, *, last: bool = False) -> dict[str, str]:
        import httpx
        from label_studio_sdk import LabelStudio
        from label_studio_sdk.core.api_error import ApiError

        if not self.url:
            raise StudioError("A personal access token needs Label Studio's address. Set LABEL_STUDIO_URL.")
        try:
            if self._client is None:
                # The slash keeps the sub-path of http://host/label-studio in the SDK's refresh address.
                http = self._http(self._refresh_s)
                client = LabelStudio(base_url=f"{self.url}/", api_key=key, httpx_client=http)  # type: ignore[no-untyped-call]
                self._client = _closing(client, http)
                del client  # else an error, which holds this frame, would keep it open
            # The SDK renews the token here, for its own calls; it has no public name for that.
            header = self._client._client_wrapper.get_headers()["Authorization"]
        except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
            self._client = None
            if not last:  # the connection may just have been closed for idleness
                return self._bearer(key, last=True)
            raise StudioError(self._unreachable(error)) from error
        except ApiError as error:
            raise self._refusal(error) from error
        except httpx.TimeoutException as error:
            raise StudioError(self._late(self._refresh_s)) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise StudioError(self._unreachable(error)) from error
        except MADE_NO_SENSE as error:
            raise StudioError(
                f"What answers at {self.place} is not Label Studio: it gave no access token. Check LABEL_STUDIO_URL."
            ) from error
        return {"Authorization": header}

    def _late(self, seconds: float) -> str:
        return (
            f"Label Studio at {self.place} must answer within {seconds:g} seconds and did not."
            f" Check that it runs and that LABEL_STUDIO_URL is right.{localhost_hint(self.url or '')}"
        )

    def _unreachable(self, error: Exception) -> str:
        return (
            f"Label Studio cannot be reached at {self.place} ({type(error).__name__})."
            f" Check that it runs and that LABEL_STUDIO_URL is right.{localhost_hint(self.url or '')}"
        )

    def _refusal(self, error: ApiError) -> StudioError:
        if error.status_code in (400, 401, 403):
            detail = error.body.get("detail") if isinstance(error.body, dict) else None
            said = f" ({str(detail).rstrip('.')})" if detail else ""
            return TokenError(
                f"Label Studio at {self.place} refused the personal access token{said}."
                " Make a new one under Account & Settings and set LABEL_STUDIO_API_KEY to it."
            )
        return StudioError(
            f"Label Studio at {self.place} answered {error.status_code} when asked for an access token."
            " Check LABEL_STUDIO_URL, sub-path included."
        )


def _closing(client: LabelStudio, http: httpx.Client) -> LabelStudio:
    """
    A client that closes its connections when nobody has it any more.

    label-studio-sdk has no way to close them, and its parts hold each other in a circle, so they would stay open.
    """
    weakref.finalize(client, http.close)
    return client


def _is_personal(key: str) -> bool:
    """Whether it is a personal access token, which has three parts; all else is a legacy token."""
    return key.count(".") == 2


def _check_key(key: str) -> None:
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise TokenError(
            "LABEL_STUDIO_API_KEY must be the token alone, without blanks or signs that no token has."
            " Copy it again from Label Studio, Account & Settings."
        )


def _held_against(error: Exception) -> str:
    """What Label Studio holds against a request, in its own words; empty where it was something else."""
    body = getattr(error, "body", None)
    if getattr(error, "status_code", None) not in (400, 403, 413, 422) or not isinstance(body, dict):
        return ""
    found = body.get("validation_errors")
    parts = [text for texts in found.values() for text in texts] if isinstance(found, dict) else found or []
    return plain(" ".join(map(str, parts)) or str(body.get("detail", "")))


def plain(text: str) -> str:
    """A text of Label Studio's without its HTML, on one line."""
    return " ".join(re.sub(r"<[^>]*>", "", text).split())[:600]
