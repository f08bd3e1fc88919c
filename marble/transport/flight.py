"""The node's one port: messages between nodes come in here and go out through a `Link` to each peer.

Rule 1: handlers run on gRPC's threads. They check what came, hand it to the receiver, and decide nothing.
Rule 2: what a stranger sends ends that stranger's call and is counted; it does nothing else.
Rule 3: `FlightTransport.stop` returns within its deadline, whoever keeps a stream open.

Calls other than the nodes' own streams (`marble.transport.port`) go to a `FlightService`, so that one
port serves peers and clients.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import pyarrow as pa
import pyarrow.flight as fl

from marble.env import Clock, Random, SystemClock, SystemRandom
from marble.errors import InvariantError, ProtocolError, UnavailableError, UsageError
from marble.metrics import Metrics
from marble.transport import _shutdown
from marble.transport.carrier import Arrival, Carrier, FlightCarrier
from marble.transport.codec import Codec, Envelope
from marble.transport.faults import to_flight_error
from marble.transport.handshake import Acquaintances, Handshake
from marble.transport.link import Link
from marble.transport.options import TransportOptions
from marble.transport.port import FlightService, Port
from marble.transport.pump import Surroundings

VISITORS_MAX: Final = 32
"""Nodes that are answered although `FlightTransport.set_peers` has not named them."""

_log = logging.getLogger("marble.transport")
_CANCEL_RESERVE_S: Final = 0.25
"""Part of a stop's deadline that is kept for cancelling calls that did not end by themselves."""


Receiver = Callable[[list[Envelope]], None]


class FlightTransport:
    """Listens on `endpoint` from construction on; serves and sends from `start` until `stop`.

    Parameters
    ----------
    endpoint
        ``host:port`` to listen on; port 0 takes a free one (see `port`).
    cluster_id, node_id
        Who this is. Streams of other clusters, or meant for other nodes, are refused.
    advertised
        ``host:port`` where others reach this node, if that is not `endpoint`.
    options, random, clock, metrics
        Limits; jitter; time; where everything is counted (names begin with ``transport_``).
    carrier
        What opens streams to peers. None: Flight.

    Raises
    ------
    UsageError
        `endpoint`, `cluster_id` or `node_id` is not one.
    UnavailableError
        The endpoint cannot be listened on.
    """

    def __init__(
        self,
        endpoint: str,
        cluster_id: str,
        node_id: int,
        *,
        advertised: str | None = None,
        options: TransportOptions | None = None,
        random: Random | None = None,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
        carrier: Carrier | None = None,
    ) -> None:
        self.options = options or TransportOptions()
        self.metrics = metrics or Metrics()
        self.node_id = node_id
        self._codec = Codec(cluster_id, node_id, self.options.entry_bytes_max)
        self._clock = clock or SystemClock()
        self._host = _host_of(endpoint)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._endpoints: dict[int, str] = {}
        self._visitors: dict[int, int] = {}
        self._links: dict[int, Link] = {}
        self._receiver: Receiver | None = None
        self._service: FlightService | None = None
        self._unreachable: Callable[[int], None] = _ignore
        self._failed: Callable[[BaseException], None] = _ignore
        self._calls = 0
        self._stopped = False
        self._forked = False
        self._received = self.metrics.counter("transport_messages_received")
        self._garbage = self.metrics.counter("transport_protocol_errors")
        self._refused = self.metrics.counter("transport_calls_refused")
        self._faults = self.metrics.counter("transport_internal_errors")
        try:
            self._server = Port(f"grpc://{endpoint}", self)
            self._port = int(self._server.port)
        except (fl.FlightError, pa.ArrowException, OSError) as error:
            raise UnavailableError(f"cannot listen on {endpoint}: {error}") from None
        self._handshake = Handshake(self._codec, advertised or self.endpoint, self.options.strangers_max, self.metrics)
        self._around = Surroundings(
            carrier or FlightCarrier(),
            self._handshake,
            self.options,
            random or SystemRandom(),
            self._clock,
            self.metrics,
            unreachable=lambda peer: self._unreachable(peer),
            failed=lambda error: self._failed(error),
        )
        _live.add(self)
        # At exit pyarrow would wait for every open call; this runs before that.
        atexit.register(self.stop, 1.0)

    @property
    def port(self) -> int:
        return self._port

    @property
    def endpoint(self) -> str:
        """``host:port`` with the real port."""
        return f"{self._host}:{self._port}"

    def start(
        self,
        receiver: Receiver,
        service: FlightService | None = None,
        *,
        unreachable: Callable[[int], None] | None = None,
        failed: Callable[[BaseException], None] | None = None,
        acquaintances: Acquaintances | None = None,
    ) -> None:
        """Begin to serve and to send.

        Parameters
        ----------
        receiver
            Gets the messages of one packet, checked, in order; called on gRPC's threads, several at once for several
            peers. It must not block: it puts them where another thread takes them.
        service
            Answers clients; without one they are refused with UnavailableError.
        unreachable
            Called with a peer's id when the link to it broke or could not be opened; must not block.
        failed
            Called with an error that is marble's own; the node should stop.
        acquaintances
            Knows the data directories of this node and the others; without it none is told and none is asked for.
        """
        self._check_usable()
        with self._lock:
            if self._receiver is not None:
                raise UsageError("the transport has been started before")
            self._service = service
            self._unreachable = unreachable or _ignore
            self._failed = failed or _log_failure
            self._handshake.acquaintances = acquaintances or self._handshake.acquaintances
            self._receiver = receiver
            links = list(self._links.values())
        for link in links:
            link.start()

    def set_peers(self, endpoints: Mapping[int, str]) -> None:
        """Send to these nodes (id to ``host:port``; this node itself is left out), and to visitors while they stay.

        A visitor is another node of the cluster that has opened a stream to this one: a node that joined while this one was
        away leads now, say, and will tell it so. It is answered where its hello says that it is found. Who was named before and
        is no longer was removed, and is not answered until it comes anew.

        After `stop` this does nothing: the node that calls may be still at work.
        """
        if self._forked:
            self._check_usable()
        wanted = {peer: endpoint for peer, endpoint in sorted(endpoints.items()) if peer != self.node_id}
        for endpoint in wanted.values():
            _host_of(endpoint)
        fresh = []
        with self._lock:
            if self._stopped:
                return
            gone = [
                link
                for peer, link in self._links.items()
                if wanted.get(peer) != link.endpoint
                and (peer in wanted or peer in self._endpoints or peer not in self._visitors)
            ]
            links = {peer: link for peer, link in self._links.items() if link not in gone}
            for peer, endpoint in wanted.items():
                if peer not in links:
                    links[peer] = self._link(peer, endpoint)
                    fresh.append(links[peer])
            self._links = links
            self._endpoints = wanted
            started = self._receiver is not None
        for link in gone:
            link.request_stop()
        if started:
            for link in fresh:
                link.start()

    def _link(self, peer: int, endpoint: str) -> Link:
        return Link(peer, endpoint, self._codec, self._around)

    def send(self, to: int, envelopes: Sequence[Envelope]) -> bool:
        """Queue `envelopes`, in order, for node `to`, or drop all of them; never waits.

        Returns whether they were queued; if not, the core must hear that the peer is unreachable.
        """
        if self._forked:
            self._check_usable()
        link = self._links.get(to)
        return link is not None and link.send(envelopes)

    def connected(self, peer: int) -> bool:
        """Whether the stream to `peer` is open, as far as this node knows."""
        link = self._links.get(peer)
        return link is not None and link.connected

    def stop(self, deadline_s: float = 5.0) -> bool:
        """Refuse new calls, end links and streams, free the port. Idempotent.

        Calls of clients get most of the time to end by themselves and are then cancelled.

        Returns
        -------
        bool
            Whether everything ended within `deadline_s` seconds. If not, a handler hangs in its own code (or a link in
            connecting); its thread is left behind.
        """
        if self._forked:
            return True
        end = self._clock.monotonic() + deadline_s
        with self._lock:
            if self._stopped:
                return True
            self._stopped = True
            links = list(self._links.values())
        atexit.unregister(self.stop)
        for link in links:
            link.request_stop()
        with self._lock:
            self._idle.wait_for(lambda: self._calls == 0, max(0.0, deadline_s - _CANCEL_RESERVE_S))
        ended = self._stop_server(end)
        for link in links:
            ended = link.join(end - self._clock.monotonic()) and ended
        return ended

    def _stop_server(self, end: float) -> bool:
        """Cancel all calls. A thread of its own waits for them, since a handler may never look at its stream."""
        stopper = threading.Thread(
            target=_shutdown.shut_down, args=(self._server, 0.0), name=f"marble-stop-{self.node_id}", daemon=True
        )
        stopper.start()
        stopper.join(max(0.0, end - self._clock.monotonic()))
        finalizer = _shutdown.finalizer_of(self._server)
        if stopper.is_alive():
            # pyarrow would wait for the same handler at exit, without a deadline.
            finalizer.detach()
            _shutdown.immortalize(self._server)
            _log.warning("node %d stops although a handler of its port has not ended", self.node_id)
            return False
        # Breaks the cycle between the Python and the C++ server, and frees the port.
        finalizer()
        return True

    def _check_usable(self) -> None:
        if self._forked:
            raise UsageError("a transport cannot be used in a forked child: start it there, or spawn the process")
        if self._stopped:
            raise UnavailableError(f"the transport of node {self.node_id} has stopped")

    def _abandon(self) -> None:
        """In a forked child: gRPC's threads are not here, so that every call and every destructor would hang."""
        self._forked = True
        atexit.unregister(self.stop)
        _shutdown.finalizer_of(self._server).detach()
        _shutdown.immortalize(self)

    # What follows runs on gRPC's threads.

    @contextlib.contextmanager
    def serve(self) -> Iterator[FlightService]:
        """Count a client's call, and turn what it raises into what the client is told."""
        with self._lock:
            service = self._service
            closed = self._receiver is None or service is None or self._stopped
            refused = closed or self._calls >= self.options.calls_max
            self._calls += not refused
        try:
            if refused or service is None:
                self._refused.add()
                raise UnavailableError(f"node {self.node_id} does not take calls now")
            try:
                yield service
            finally:
                with self._lock:
                    self._calls -= 1
                    if self._calls == 0:
                        self._idle.notify_all()
        except (GeneratorExit, fl.FlightError):
            raise
        except Exception as error:
            raise self._told(error) from None

    def _told(self, error: Exception) -> fl.FlightError:
        told = to_flight_error(error)
        if isinstance(told, fl.FlightInternalError):
            self._faults.add()
            _log.error("a call failed", exc_info=error)
        return told

    def take_messages(self, arrival: Arrival) -> None:
        """A stream of messages from a peer, until it ends."""
        try:
            receiver = self._receiver
            if receiver is None or self._stopped:
                self._refused.add()
                raise UnavailableError(f"node {self.node_id} does not take messages now")
            chunks = iter(arrival)
            hello = self._handshake.greet(chunks)
            if hello is None:
                return
            sender = hello.sender
            with self._visit(sender, hello.endpoint):
                if not arrival.answer(self._handshake.hello(sender, hello.lane)):
                    return
                for metadata, batch in chunks:
                    if metadata is None:
                        raise ProtocolError(f"entries without messages from node {sender}")
                    envelopes = self._codec.decode(sender, metadata.to_pybytes(), batch)
                    if envelopes:
                        self._received.add(len(envelopes))
                        receiver(envelopes)
        except fl.FlightError:
            raise
        except Exception as error:
            self._count_garbage(error)
            if isinstance(error, InvariantError):
                self._failed(error)
            raise self._told(error) from None

    @contextlib.contextmanager
    def _visit(self, sender: int, endpoint: str) -> Iterator[None]:
        """While a stream of `sender` is open there is a way back, also if it is none of the peers that this node knows."""
        fresh = None
        with self._lock:
            if sender not in self._links:
                if not endpoint or len(self._visitors) >= VISITORS_MAX:
                    raise ProtocolError(f"node {sender} is not a peer of node {self.node_id}")
                self._check_usable()
                try:
                    _host_of(endpoint)
                except UsageError as error:
                    raise ProtocolError(f"the hello of node {sender}: {error}") from None
                fresh = self._links[sender] = self._link(sender, endpoint)
            self._visitors[sender] = self._visitors.get(sender, 0) + 1
        if fresh is not None:
            fresh.start()
        try:
            yield
        finally:
            with self._lock:
                self._visitors[sender] -= 1
                gone = None
                if not self._visitors[sender]:
                    del self._visitors[sender]
                    gone = None if sender in self._endpoints else self._links.pop(sender, None)
            if gone is not None:
                gone.request_stop()

    def _count_garbage(self, error: Exception) -> None:
        if isinstance(error, ProtocolError | pa.ArrowException):
            self._garbage.add()
            count = self._garbage.value
            # A flood of garbage must not flood the log as well.
            if count & (count - 1) == 0:
                _log.warning("node %d refused a stream (%d so far): %s", self.node_id, count, error)


def _host_of(endpoint: str) -> str:
    host, colon, port = endpoint.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{endpoint!r} is not an endpoint: expected host:port")
    return host


def _ignore(_: object) -> None:
    """For callbacks that nobody asked for."""


def _log_failure(error: BaseException) -> None:
    _log.error("a link failed", exc_info=error)


_live: weakref.WeakSet[FlightTransport] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for transport in list(_live):
        transport._abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
