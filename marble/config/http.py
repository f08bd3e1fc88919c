"""Where a node is looked at: the table ``[node.http]``."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from marble.config.endpoints import format_endpoint, parse_endpoint
from marble.config.values import check_int, shown
from marble.errors import UsageError
from marble.types import NODE_ID_MAX

PAGES_MAX: Final = 64
_URL = re.compile(r"https?://[A-Za-z0-9_.:\[\]-]{1,260}(/[A-Za-z0-9_./~%-]{0,200})?")


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """Health, metrics and a page over HTTP: the table ``[node.http]``. Without it there is no such port.

    Parameters
    ----------
    endpoint
        ``host:port`` to listen on; port 0 takes any free one. There is no encryption on this port: an address that is not of
        the loopback interface belongs behind a proxy, or into a trusted network.
    pages
        Where the other nodes' pages are found, for links: node id to URL.

    Raises
    ------
    UsageError
        If a value is malformed.
    """

    endpoint: str
    pages: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        endpoint = format_endpoint(*parse_endpoint(self.endpoint, what="[node.http] endpoint", free_port=True))
        object.__setattr__(self, "endpoint", endpoint)
        object.__setattr__(self, "pages", types.MappingProxyType(_check_pages(self.pages)))


def _check_pages(given: object) -> dict[int, str]:
    if not isinstance(given, Mapping) or len(given) > PAGES_MAX:
        raise UsageError(f"[node.http.pages] must be a table of at most {PAGES_MAX} URLs, not {shown(given)}")
    pages = {}
    for key, url in given.items():
        # Keys of a TOML table are strings.
        node = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10 else key
        check_int("node id in [node.http.pages]", node, 1, NODE_ID_MAX)
        if not isinstance(url, str) or _URL.fullmatch(url) is None:
            raise UsageError(
                f'[node.http.pages] {node} must be a URL such as "http://10.0.0.2:9001/", not {shown(url)}'
            )
        pages[node] = url
    return pages
