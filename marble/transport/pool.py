"""Flight clients by endpoint, one each, made on first use. Thread-safe.

A node that is found at several addresses is called at the first that takes connections; while it is called, it is seen every
now and then whether it still does.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Final

import pyarrow.flight as fl

from marble.config import parse_endpoint
from marble.errors import UnavailableError
from marble.transport.security import PLAIN, Credentials
from marble.transport.wire import connect

LOOK_S: Final = 1.0
"""How old the knowledge may be that one of several addresses takes connections."""

ANSWER_S: Final = 0.5
"""How long an address may take to accept a connection before the next one is tried."""


class ClientPool:
    """A client keeps its connection, and mends it by itself; so one for each node is enough, for all threads.

    Parameters
    ----------
    credentials
        Gives what to bring. When that is something else than before, new clients are made; streams of the old ones go on.
    """

    def __init__(self, credentials: Callable[[], Credentials] = lambda: PLAIN) -> None:
        self._credentials = credentials
        self._used = credentials()
        self._lock = threading.Lock()
        self._clients: dict[str, fl.FlightClient] = {}
        self._chosen: dict[str, tuple[str, float]] = {}
        self._closed = False

    def get(self, endpoint: str) -> fl.FlightClient:
        """The client of the node at `endpoint`, which may be several addresses. Raises UnavailableError after `close`.

        With several addresses it may take `ANSWER_S` for each that does not answer.
        """
        endpoint = self._choose(endpoint) if "," in endpoint else endpoint
        with self._lock:
            if self._closed:
                raise UnavailableError("the connections are closed")
            if (now := self._credentials()) != self._used:
                self._used, self._clients = now, {}
            client = self._clients.get(endpoint)
            if client is None:
                client = self._clients[endpoint] = connect(endpoint, self._used)
            return client

    def _choose(self, endpoint: str) -> str:
        addresses = endpoint.split(",")
        now = time.monotonic()
        chosen, seen = self._chosen.get(endpoint, (addresses[0], -LOOK_S))
        if now - seen < LOOK_S:
            return chosen
        # The one in use first: what is under way there goes on.
        for address in sorted(addresses, key=lambda address: address != chosen):
            if _takes_connections(address):
                self._chosen[endpoint] = (address, now)
                return address
        return chosen

    def renew(self, endpoint: str) -> None:
        """Connect anew with the next call: the connection that there is may stand still. Streams on it go on."""
        with self._lock:
            for address in {endpoint, *endpoint.split(",")}:
                self._clients.pop(address, None)

    def forget(self, client: fl.FlightClient) -> str | None:
        """As `renew`, of the node that `client` calls: its endpoint, or None if others have taken its place already."""
        with self._lock:
            for endpoint, each in self._clients.items():
                if each is client:
                    del self._clients[endpoint]
                    return endpoint
        return None

    def close(self) -> None:
        """Close all. Idempotent."""
        with self._lock:
            self._closed = True
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()


def _takes_connections(address: str) -> bool:
    try:
        socket.create_connection(parse_endpoint(address), ANSWER_S).close()
    except OSError:
        return False
    return True
