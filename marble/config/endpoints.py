"""Where nodes are: ``host:port``, and a cluster's address with several of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from marble.config.values import shown
from marble.errors import UsageError

DEFAULT_PORT: Final = 5001

ADDRESSES_MAX: Final = 4
"""Ways to one node: each costs a few connections to every other node."""

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9_.-]{1,15})?")
_SCHEMES = {"grpc://": False, "grpc+tcp://": False, "grpc+tls://": True, "grpcs://": True}
"""Beginning of a cluster's address, and whether connections are encrypted."""


def parse_endpoint(text: object, *, what: str = "endpoint", free_port: bool = False) -> tuple[str, int]:
    """Split ``host:port`` (IPv6: ``[host]:port``) and check both halves.

    Parameters
    ----------
    text
        What the user gave.
    what
        How the message calls it, e.g. ``"[cluster] node_endpoints[2]"``.
    free_port
        Whether port 0 ("any free one") is allowed: it is where a server listens, never where others find it.

    Returns
    -------
    tuple of str and int
        The host in lower case, without brackets, and the port.

    Raises
    ------
    UsageError
        If it is anything else.
    """
    if not isinstance(text, str):
        raise UsageError(f'{what} must be a string "host:port", not {shown(text)}')
    if "://" in text:
        raise UsageError(f'{what} {text!r} must be "host:port", without a scheme')
    host, colon, port = text.rpartition(":")
    if not colon:
        raise UsageError(
            f'{what} {text!r} has no port: write "host:port", e.g. "{_plain(text) or "127.0.0.1"}:{DEFAULT_PORT}"'
        )
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        good = ":" in host and _IPV6.fullmatch(host) is not None
    elif ":" in host:
        raise UsageError(
            f'{what} {text!r} looks like an IPv6 address: write it in brackets, "[{_plain(host)}]:{_plain(port)}"'
        )
    else:
        good = _HOST.fullmatch(host) is not None
    if not good:
        raise UsageError(f"{what} {text!r} has no valid host before the port")
    lowest = 0 if free_port else 1
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and lowest <= int(port) <= 65535):
        raise UsageError(f"{what} {text!r} has port {port!r}, which is not a number from {lowest} to 65535")
    return host.lower(), int(port)


def _plain(text: str) -> str:
    """`text` without what a terminal would act on: it may be a stranger's."""
    return text.encode("unicode_escape").decode("ascii")


def format_endpoint(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address: the inverse of `parse_endpoint`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def canonical_endpoint(text: object, *, what: str = "endpoint") -> str:
    """Where a node is found, in canonical form: ``host:port``, or several with commas between, those first that are preferred.

    Raises
    ------
    UsageError
        If an address is malformed or named twice, or there are more than `ADDRESSES_MAX`.
    """
    if not isinstance(text, str) or "," not in text:
        return format_endpoint(*parse_endpoint(text, what=what))
    addresses = [format_endpoint(*parse_endpoint(part.strip(), what=what)) for part in text.split(",")]
    if len(addresses) > ADDRESSES_MAX:
        raise UsageError(f"{what} {text!r} has {len(addresses)} addresses: a node has at most {ADDRESSES_MAX}")
    if len(set(addresses)) < len(addresses):
        raise UsageError(f"{what} {text!r} names an address twice")
    return ",".join(addresses)


def addresses_of(endpoint: str) -> tuple[str, ...]:
    """Each ``host:port`` in what `canonical_endpoint` gave."""
    return tuple(endpoint.split(","))


def parse_url(url: object) -> tuple[str, ...]:
    """Endpoints of a cluster from ``grpc://h1:5001,h2:5002`` or ``grpc+tls://…``, in the order given, each once.

    Raises
    ------
    UsageError
        If the scheme is another one, an endpoint is malformed or named twice, or there is none.
    """
    if not isinstance(url, str):
        raise UsageError(f'a cluster\'s address must be a string such as "grpc://127.0.0.1:5001", not {shown(url)}')
    for scheme in _SCHEMES:
        if url.startswith(scheme):
            rest = url[len(scheme) :]
            break
    else:
        raise UsageError(
            f'{url!r} is not the address of a cluster: write "grpc://host:port,host:port", or grpc+tls:// if its nodes encrypt'
        )
    return endpoints_of(rest.rstrip("/").split(","), f"address {url!r}: endpoint")


def is_tls(url: str) -> bool:
    """Whether connections to the cluster at `url`, which `parse_url` takes, are encrypted."""
    return any(tls and url.startswith(scheme) for scheme, tls in _SCHEMES.items())


def endpoints_of(given: Iterable[object], what: str) -> tuple[str, ...]:
    """The endpoints `given`, in canonical form and order, no address twice; `what` says in errors where they were given."""
    seen: dict[str, int] = {}
    endpoints = []
    for position, text in enumerate(given, start=1):
        endpoint = canonical_endpoint(text, what=f"{what} {position}")
        for address in addresses_of(endpoint):
            if address in seen:
                raise UsageError(f"{what} {position} is {address!r}, which number {seen[address]} has already")
            seen[address] = position
        endpoints.append(endpoint)
    return tuple(endpoints)
