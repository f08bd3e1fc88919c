"""The servers at a node's port: one, and while certificates change more, of which only the newest takes new connections.

Rule 1: calls and streams that are open stay where they are until they end. A server that was replaced listens no more; it goes when
the last of its calls has ended, or after `DRAIN_S`, or with `Listening.stop`.
Rule 2: the new server listens before the old one stops to: both have SO_REUSEPORT then (`marble.transport.limits`), and the
kernel hands all connections to the newer one. At other times no second server can listen there. Where Arrow's server cannot be
told so, the old one gives the port up first, and connections of these milliseconds are refused: clients and peers try again.
Rule 3: what cannot be opened changes nothing: the old server goes on.
Rule 4: `Listening.stop` returns within its deadline, whoever keeps a stream open.

Threads: "marble-drain-…", one for each server that was replaced, until it has gone; "marble-port-…" from `watch` to `stop`, drops those
who do not read.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

import pyarrow as pa
import pyarrow.flight as fl

from marble.env import Clock
from marble.errors import UnavailableError
from marble.metrics import Metrics
from marble.transport import _shutdown
from marble.transport.admission import AdmissionFactory, Door
from marble.transport.limits import Gate, address_of, count_listeners, drop_connections, prefer_newest, share_port
from marble.transport.options import TransportOptions
from marble.transport.peers import host_of
from marble.transport.port import Port, PortOwner
from marble.transport.security import Security

DRAIN_S: Final = 6 * 3600.0
"""After this long a server that was replaced cancels what is still open there: no stream keeps an old certificate for ever."""

DRAINS_MAX: Final = 8
"""Servers that may be waited for at a time; certificates that change more often are taken up later."""

HANDSHAKE_S: Final = 1.0
"""How long a server that was replaced finishes with the connections that it had been given."""

REBIND_S: Final = 5.0
"""How long a new server may try to get the port that the old one gives up."""

WATCH_S: Final = 1.0
"""How late a client that does not read may be noticed."""

_REBIND_WAIT_S: Final = 0.005
_ERRORS: Final = (fl.FlightError, pa.ArrowException, OSError)
_log = logging.getLogger("marble.transport")


class _Server:
    """One Flight server with its limits."""

    def __init__(
        self,
        endpoint: str,
        owner: PortOwner,
        door: Door,
        security: Security,
        unpacked_bytes_max: int,
        shares_port: bool,
    ) -> None:
        self.gate = Gate(unpacked_bytes_max, shares_port=shares_port)
        tls = security.tls
        location = self.gate.location(endpoint, tls=tls is not None)
        options = {} if tls is None else dict(tls.server_options())
        try:
            self.port = Port(location, owner, AdmissionFactory(door), options)
        except BaseException:
            self.gate.close()
            raise
        self.drain: threading.Thread | None = None

    def shut_down(self, grace_s: float) -> None:
        """Listen no more, wait for calls, cancel them at last, and give everything back."""
        _shutdown.shut_down(self.port, grace_s)
        # Breaks the cycle between the Python and the C++ server.
        _shutdown.finalizer_of(self.port)()
        self.gate.close()

    def leave(self) -> None:
        """Never touch it again: pyarrow would wait, at exit or in its destructor, for what has not ended."""
        _shutdown.finalizer_of(self.port).detach()
        _shutdown.immortalize(self.port)


class Listening:
    """Listens from construction on. `reopen` belongs to one thread.

    Parameters
    ----------
    endpoint
        ``host:port`` to listen on; port 0 takes a free one.
    owner
        Gets what comes in.
    security
        Gives what counts now.
    options, clock, metrics
        Limits; time; counts ``transport_messages_oversized`` and ``transport_slow_readers_dropped``.
    cluster_id, node_id
        Of this node.

    Raises
    ------
    UsageError
        `endpoint` is not one.
    UnavailableError
        It cannot be listened on.
    """

    def __init__(
        self,
        endpoint: str,
        owner: PortOwner,
        security: Callable[[], Security],
        *,
        cluster_id: str,
        options: TransportOptions,
        clock: Clock,
        metrics: Metrics,
        node_id: int,
    ) -> None:
        self._owner = owner
        self._door = Door(security, cluster_id, node_id, metrics, clock)
        self._security = security
        self._options = options
        self._clock = clock
        self._node_id = node_id
        self.host = host_of(endpoint)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._older: list[_Server] = []
        self._oversized = metrics.counter("transport_messages_oversized")
        self._slow = metrics.counter("transport_slow_readers_dropped")
        self._seen = 0
        self._thread: threading.Thread | None = None
        try:
            self._server = self._open(endpoint)
        except _ERRORS as error:
            raise UnavailableError(f"cannot listen on {endpoint}: {error}") from None
        self.port = int(self._server.port.port)
        self._server.gate.report(node_id)

    def _open(self, endpoint: str, *, shares_port: bool = False) -> _Server:
        security = self._security()
        limit = max(self._options.entry_bytes_max, self._options.message_bytes_max)
        return _Server(endpoint, self._owner, self._door, security, limit, shares_port)

    def watch(self) -> None:
        """Begin to drop those who do not read."""
        self._thread = threading.Thread(target=self._watch, name=f"marble-port-{self._node_id}", daemon=True)
        self._thread.start()

    def take_up(self, before: Security, after: Security) -> None:
        """Certificates, tokens or the secret are others now."""
        if before.tls != after.tls:
            self.reopen()

    def reopen(self) -> bool:
        """Let a new server, with the certificates that count now, take all new connections; whether it does."""
        with self._lock:
            draining = len(self._older)
        if draining >= DRAINS_MAX:
            _log.warning(
                "node %d keeps its certificate for now: %d servers still have streams open", self._node_id, draining
            )
            return False
        old, endpoint = self._server, f"{self.host}:{self.port}"
        try:
            if old.gate.holds:
                self._wait_for_one_listener()
                share_port(self.port)
                fresh = self._open(endpoint, shares_port=True)
                prefer_newest(self.port)
                self._retire(old)
            else:
                self._retire(old, at_once=True)
                fresh = self._open_when_free(endpoint)
        except _ERRORS as error:
            _log.error("node %d cannot listen with its new certificate: %s", self._node_id, error)
            return False
        self._server = fresh
        return True

    def _wait_for_one_listener(self) -> None:
        """Until the server before the last has stopped to listen: of three, nobody could tell the kernel which is the newest."""
        end = self._clock.monotonic() + HANDSHAKE_S + REBIND_S
        while count_listeners(self.port) > 1 and self._clock.monotonic() < end:
            if self._stopping.wait(_REBIND_WAIT_S):
                break

    def _open_when_free(self, endpoint: str) -> _Server:
        end = self._clock.monotonic() + REBIND_S
        while True:
            try:
                return self._open(endpoint)
            except _ERRORS:
                if self._clock.monotonic() >= end or self._stopping.wait(_REBIND_WAIT_S):
                    raise

    def _retire(self, server: _Server, *, at_once: bool = False) -> None:
        """Let `server` listen no more, and go when its calls have ended."""
        with self._lock:
            self._older.append(server)

        def drain() -> None:
            # Connections that it was given may still be shaking hands.
            self._stopping.wait(0.0 if at_once else HANDSHAKE_S)
            server.shut_down(DRAIN_S)
            with self._lock:
                self._older.remove(server)

        server.drain = threading.Thread(target=drain, name=f"marble-drain-{self._node_id}", daemon=True)
        server.drain.start()

    def stop(self, end: float) -> bool:
        """Cancel all calls and free the port, until `end` of the clock; False if a handler hangs in its own code."""
        self._stopping.set()
        with self._lock:
            older = list(self._older)
        # A thread of its own waits for the handlers, since one of them may never look at its stream.
        stopper = threading.Thread(
            target=self._server.shut_down, args=(0.0,), name=f"marble-stop-{self._node_id}", daemon=True
        )
        stopper.start()
        if older:
            # Their calls cannot be cancelled any more: they are in a shutdown that waits. Their connections can be broken.
            drop_connections(self.port)
        ended = True
        for server, thread in [(self._server, stopper), *((each, each.drain) for each in older)]:
            assert thread is not None
            thread.join(max(0.0, end - self._clock.monotonic()))
            if thread.is_alive():
                server.leave()
                _log.warning("node %d stops although a handler of its port has not ended", self._node_id)
                ended = False
        if self._thread is not None:
            self._thread.join(max(0.0, end - self._clock.monotonic()))
        return ended

    def abandon(self) -> None:
        """In a forked child: gRPC's threads are not here, so that every destructor would hang."""
        for server in (self._server, *self._older):
            server.leave()

    def _watch(self) -> None:
        while not self._stopping.wait(WATCH_S):
            self.check()

    def check(self) -> None:
        """Count what was refused, and drop who does not read."""
        with self._lock:
            servers = [self._server, *self._older]
        refused = sum(server.gate.refused for server in servers)
        if refused > self._seen:
            self._oversized.add(refused - self._seen)
            _log.warning(
                "node %d refused messages that are too large (%d so far)", self._node_id, self._oversized.value
            )
        self._seen = refused
        slow = [peer for server in servers for peer in server.gate.slow(self._options.slow_reader_s)]
        addresses = {address for peer in slow if (address := address_of(peer)) is not None}
        if addresses:
            dropped = drop_connections(self.port, addresses)
            self._slow.add(dropped)
            _log.warning(
                "node %d dropped %d connections whose client has not read for %.0f s", self._node_id, dropped, self._options.slow_reader_s
            )  # fmt: skip
