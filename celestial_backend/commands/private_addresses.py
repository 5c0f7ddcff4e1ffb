"""What Label Studio is started with so that it talks to a backend on a private address, and to no other."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network

from celestial_backend.errors import RequestError

Network = IPv4Network | IPv6Network

# Label Studio's own list of reserved networks (core/utils/io.py in 1.23.2). It has no list of exceptions, so the
# addresses of backends are left out of a copy of the list, and all other protection stays on.
RESERVED_NETWORKS = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "233.252.0.0/24", "240.0.0.0/4", "255.255.255.255/32", "::/128", "::1/128", "::ffff:0:0/96",
    "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/32", "2001:20::/28", "2001:db8::/32",
    "2002::/16", "fc00::/7", "fe80::/10", "ff00::/8",
)  # fmt: skip


def studio_variables(addresses: Sequence[str]) -> dict[str, str]:
    """
    The environment variables that Label Studio is started with, with their values.

    Args:
        addresses: Of the backends; each is an IP address, or a network such as 172.30.55.0/28.

    Raises:
        RequestError: One is no address, or Label Studio does not refuse it anyway.
    """
    refused: list[Network] = list(map(ip_network, RESERVED_NETWORKS))
    for address in addresses:
        refused = _without(_hole(address), refused)
    return {
        "USE_DEFAULT_BANNED_SUBNETS": "false",
        "USER_ADDITIONAL_BANNED_SUBNETS": ",".join(map(str, refused)),  # it takes no blanks
    }


def _hole(address: str) -> Network:
    try:
        hole = ip_network(address.replace("%", "/"))  # an address with a zone is one of this machine alone
    except ValueError:
        raise RequestError(
            "An address must be like 127.0.0.1, ::1 or 172.30.55.0/28, without http:// and port, and a network must"
            f" begin with its first address; got {address!r}. For a name give the address that it stands for."
        ) from None
    if not any(_holds(ip_network(reserved), hole) for reserved in RESERVED_NETWORKS):
        raise RequestError(
            f"An address must lie in one of the networks that Label Studio refuses, got {address}. A public address"
            " needs no variables; of a larger network give the parts one by one."
        )
    return hole


def _without(hole: Network, networks: Sequence[Network]) -> list[Network]:
    parts: list[Network] = []
    for network in networks:
        if _holds(hole, network):
            continue
        parts += network.address_exclude(hole) if _holds(network, hole) else [network]  # type: ignore[arg-type]
    return parts


def _holds(network: Network, other: Network) -> bool:
    return network.version == other.version and other.subnet_of(network)  # type: ignore[arg-type]
