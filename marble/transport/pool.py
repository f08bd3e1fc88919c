"""Flight clients by endpoint, one each, made on first use. Thread-safe."""

from __future__ import annotations

import threading

import pyarrow.flight as fl

from marble.errors import UnavailableError
from marble.transport.wire import connect


class ClientPool:
    """A client keeps its connection, and mends it by itself; so one for each node is enough, for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[str, fl.FlightClient] = {}
        self._closed = False

    def get(self, endpoint: str) -> fl.FlightClient:
        """The client of the node at `endpoint`. Raises UnavailableError after `close`."""
        with self._lock:
            if self._closed:
                raise UnavailableError("the connections are closed")
            client = self._clients.get(endpoint)
            if client is None:
                client = self._clients[endpoint] = connect(endpoint)
            return client

    def close(self) -> None:
        """Close all. Idempotent."""
        with self._lock:
            self._closed = True
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()
