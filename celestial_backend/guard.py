"""
Which network addresses a picture may come from.

The address of a picture was written by a stranger. Connections go only to
addresses that were resolved and judged here: public ones, Label Studio's own, and
those that the operator allows.
"""

from __future__ import annotations

import time
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

import httpcore

from celestial_backend.deadlines import TimedBackend
from celestial_backend.errors import FetchError, ForbiddenError
from celestial_backend.settings import Settings

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
                " add it to CELESTIAL_ALLOWED_HOSTS; if it is Label Studio, set LABEL_STUDIO_URL to it."
            )
