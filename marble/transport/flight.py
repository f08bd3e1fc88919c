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

from marble._core.entry_batch import ENTRY_SCHEMA
from marble.config import SecurityConfig
from marble.env import Clock, Random, SystemClock, SystemRandom
from marble.errors import InvariantError, ProtocolError, UnavailableError, UsageError
from marble.metrics import Metrics
from marble.transport import _shutdown
from marble.transport.assembly import Assemblies
from marble.transport.carrier import STREAM_ERRORS, Arrival, Carrier, FlightCarrier
from marble.transport.codec import Codec, Envelope, Hello, Lane
from marble.transport.compression import unwrap
from marble.transport.faults import cause_of, to_flight_error
from marble.transport.handshake import ECHO, ONLY, SPREAD, Acquaintances, Chunk, Handshake
from marble.transport.listening import Listening
from marble.transport.messages import MessageCodec, MessageIntake
from marble.transport.messaging import SEND_TIMEOUT_S, Messaging, OnMessages, Peer
from marble.transport.options import TransportOptions
from marble.transport.parts import PartsCodec
from marble.transport.paths import Peering, make_link
from marble.transport.peers import Peers, host_of
from marble.transport.port import FlightService
from marble.transport.pump import Surroundings
from marble.transport.succession import Succession
from marble.transport.watch import Watch
from marble.transport.watching import WatchedSecurity

COUNTED_BY_PEER: Final = (
    "transport_messages_sent",
    "transport_messages_received",
    "transport_messages_dropped",
    "transport_packets_sent",
    "transport_streams_opened",
    "transport_streams_broken",
    "transport_user_messages_sent",
    "transport_user_bytes_sent",
    "transport_parts_bytes_sent",
)
"""Counters that there is one of for each peer."""

ORDERED: Final = frozenset({Lane.LOG, Lane.MESSAGES})
"""Lanes whose packets may come in parts."""

_log = logging.getLogger("marble.transport")
_FINISH_S: Final = 1.0
"""How long at most a stop waits for users' messages to leave."""
_CANCEL_RESERVE_S: Final = 0.25
"""Part of a stop's deadline that is kept for cancelling calls that did not end by themselves."""


Receiver = Callable[[list[Envelope]], None]
Told = Callable[[int], None]
WayLost = Callable[[int, bool], None]


class FlightTransport(Messaging):
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
    security
        Certificates, tokens and the cluster's secret; watched from `start` to `stop`. None: whoever reaches the port comes in.

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
        security: WatchedSecurity | None = None,
    ) -> None:
        super().__init__(options or TransportOptions(), metrics or Metrics())
        self.node_id = node_id
        self._codec = Codec(cluster_id, node_id, self.options.entry_bytes_max)
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._started = self._stopped = self._forked = False
        self._receiver: Receiver | None = None
        self._service: FlightService | None = None
        self._unreachable: Told = _ignore
        self._way_lost: WayLost = self._tell_way_lost
        self._failed: Callable[[BaseException], None] = _ignore
        self._calls = 0
        self._succession = Succession()
        count = self.metrics.counter
        self.metrics.expect(*COUNTED_BY_PEER)
        self._garbage, self._refused = count("transport_protocol_errors"), count("transport_calls_refused")
        self._faults = count("transport_internal_errors")
        self._security = security or WatchedSecurity(SecurityConfig(), node_id, self.metrics)
        current = self._security.current
        self._listening = Listening(
            endpoint,
            self,
            current,
            cluster_id=cluster_id,
            options=self.options,
            clock=self._clock,
            metrics=self.metrics,
            node_id=node_id,
        )
        place, strangers_max = advertised or self.endpoint, self.options.strangers_max
        self._handshake = Handshake(self._codec, place, strangers_max, self.metrics, lambda: current().secret)
        self._around = Surroundings(
            carrier or FlightCarrier(lambda: current().peer_credentials(cluster_id, node_id)),
            self._handshake,
            self.options,
            random or SystemRandom(),
            self._clock,
            self.metrics,
            unreachable=lambda peer: self._unreachable(peer),
            way_lost=lambda peer, carried: self._way_lost(peer, carried),
            failed=lambda error: self._failed(error),
        )
        self._peers = Peers(node_id, lambda peer, endpoint: make_link(peer, endpoint, self._codec, self._around))
        self._messages = MessageIntake(
            MessageCodec(self._codec, self.options.message_bytes_max),
            self._deliver,
            self._mailbox.look_again,
            self.metrics,
        )
        self._assemblies = Assemblies(PartsCodec(self._codec), self.options.silent_peer_s, self.metrics)
        self._watch = Watch(
            node_id, lambda: list(self._peers.links.values()), self._clock, lambda error: self._failed(error)
        )
        _live.add(self)
        atexit.register(self.stop, 1.0)  # At exit pyarrow would wait for every open call; this runs before that.

    @property
    def port(self) -> int:
        return self._listening.port

    @property
    def endpoint(self) -> str:
        """``host:port`` with the real port."""
        return f"{self._listening.host}:{self._listening.port}"

    def start(
        self,
        receiver: Receiver | None = None,
        service: FlightService | None = None,
        *,
        unreachable: Told | None = None,
        way_lost: WayLost | None = None,
        failed: Callable[[BaseException], None] | None = None,
        acquaintances: Acquaintances | None = None,
        on_messages: OnMessages | None = None,
    ) -> None:
        """Begin to serve and to send.

        Parameters
        ----------
        receiver
            Gets the Raft messages of one packet, checked, in order; called on gRPC's threads, several at once for several
            peers and lanes. It must not block: it puts them where another thread takes them. Without one they are refused.
        service
            Answers clients; without one they are refused with UnavailableError.
        unreachable
            Called with a peer's id when the link to it broke or could not be opened; must not block.
        way_lost
            The same when it was one of several ways to the peer, and whether entries were under way on it, which are lost then.
            Without one, `unreachable` is called if there were.
        failed
            Called with an error that is marble's own; the node should stop.
        acquaintances
            Knows the data directories of this node and the others; without it none is told and none is asked for.
        on_messages
            Gets users' messages in the order of each sender, instead of `receive_message`; called on gRPC's threads. While it
            does not return, that sender is held back.
        """
        self._check_usable()
        with self._lock:
            if self._started:
                raise UsageError("the transport has been started before")
            self._service = service
            self._unreachable, self._way_lost = unreachable or _ignore, way_lost or self._tell_way_lost
            self._failed = failed or _log_failure
            self._handshake.acquaintances = acquaintances or self._handshake.acquaintances
            self._receiver, self._on_messages = receiver, on_messages
            self._started = True
        self._watch.start()
        self._listening.watch()
        self._security.start(self._listening.take_up)
        self._peers.start()

    def reload(self) -> None:
        """Look at the files of certificates, tokens and the secret now. Returns at once; a signal handler may call it."""
        self._security.look()

    def set_peers(self, endpoints: Mapping[int, str]) -> None:
        """Send to these nodes (id to ``host:port``; this node itself is left out), and to visitors while they stay.

        A visitor is another node of the cluster that has opened a stream to this one: a node that joined while this one was
        away leads now, say, and will tell it so. It is answered where its hello says that it is found. Who was named before and
        is no longer was removed, and is not answered until it comes anew.

        After `stop` this does nothing: the node that calls may be still at work.
        """
        if self._forked:
            self._check_usable()
        self._peers.set_members(endpoints)

    def send(self, to: int, envelopes: Sequence[Envelope]) -> bool:
        """Queue `envelopes`, in order, for node `to`, or drop all of them; never waits.

        Returns whether they were queued; if not, the core must hear that the peer is unreachable.
        """
        if self._forked:
            self._check_usable()
        link = self._peers.links.get(to)
        return link is not None and link.send(envelopes)

    def connected(self, peer: int) -> bool:
        """Whether the stream to `peer` is open, as far as this node knows."""
        link = self._peers.links.get(peer)
        return link is not None and link.connected

    def round_trip_s(self, peer: int) -> float | None:
        """How long an empty packet takes to the process of `peer` and back, smoothed; None before it is known."""
        link = self._peers.links.get(peer)
        return None if link is None else link.round_trip_s

    def connect_to_peer(self, peer: Peer, endpoint: str | None = None, *, timeout_s: float = SEND_TIMEOUT_S) -> int:
        self._check_usable()
        if not self._started:
            raise UsageError("connect_to_peer: call start() first")
        if isinstance(peer, str):
            known = self._peers.find(peer)
            endpoint = peer
            peer = self._ask(endpoint) if known is None else known.peer
        link = self._peers.add(peer, endpoint or "")
        if timeout_s > 0 and not link.wait_connected(timeout_s):
            raise self._not_sent(link, timeout_s)
        return peer

    def _ask(self, endpoint: str) -> int:
        """Who is at `endpoint`."""
        host_of(endpoint)
        around, timeout_s = self._around, self.options.connect_timeout_s
        try:
            stream = around.carrier.open(
                endpoint, ENTRY_SCHEMA, connect_timeout_s=timeout_s, silent_peer_s=self.options.silent_peer_s
            )
            alarm = threading.Timer(timeout_s, stream.cancel)
            alarm.name = f"marble-ask-{self.node_id}"
            alarm.daemon = True
            alarm.start()
            try:
                return self._handshake.ask(stream, endpoint)
            finally:
                alarm.cancel()
                stream.close()
        except STREAM_ERRORS as error:
            raise UnavailableError(f"nobody at {endpoint} says who it is: {cause_of(error)}") from None

    def disconnect_from_peer(self, peer: Peer) -> None:
        link = self._find_link(peer)
        if link is not None:
            self._peers.remove(link.peer)

    def _find_link(self, peer: Peer) -> Peering | None:
        if self._forked or self._stopped:
            self._check_usable()
        return self._peers.find(peer)

    def get_health_status(self) -> dict[str, bool]:
        serving = self._started and not self._stopped and not self._forked
        peers = {f"peer:{peer}": link.connected for peer, link in sorted(self._peers.links.items())}
        return {"transport": serving, "server": not self._stopped and not self._forked, **peers}

    def stop(self, deadline_s: float = 5.0, grace_s: float | None = None) -> bool:
        """Refuse new calls, end links and streams, free the port. Idempotent.

        Calls of clients get `grace_s` seconds (None: most of the time) to end by themselves and are then cancelled.

        Returns
        -------
        bool
            Whether everything ended within `deadline_s` seconds. If not, a handler hangs in its own code (or a link in
            connecting); its thread is left behind.
        """
        if self._forked:
            return True
        began = self._clock.monotonic()
        end = began + deadline_s
        grace_s = max(0.0, deadline_s - _CANCEL_RESERVE_S) if grace_s is None else min(grace_s, deadline_s)
        with self._lock:
            if self._stopped:
                return True
            self._stopped = True
        atexit.unregister(self.stop)
        links, leaving = self._peers.stop()
        for link in links:
            link.request_finish()
        # What users have sent may leave yet, also while their own mailbox is full.
        finish = began + min(_FINISH_S, grace_s / 3)
        for link in links:
            link.wait_finished(finish - self._clock.monotonic())
        self._mailbox.close()
        self._assemblies.close()
        for link in links:
            link.request_stop()
        with self._lock:
            self._idle.wait_for(lambda: self._calls == 0, max(0.0, began + grace_s - self._clock.monotonic()))
        self._security.stop()
        ended = self._listening.stop(end)
        for link in (*links, *leaving):
            ended = link.join(end - self._clock.monotonic()) and ended
        return self._watch.stop(end - self._clock.monotonic()) and ended

    def _check_usable(self) -> None:
        if self._forked:
            raise UsageError("a transport cannot be used in a forked child: start it there, or spawn the process")
        if self._stopped:
            raise UnavailableError(f"the transport of node {self.node_id} has stopped")

    def _tell_way_lost(self, peer: int, carried: bool) -> None:
        if carried:
            self._unreachable(peer)

    def _abandon(self) -> None:
        """In a forked child: gRPC's threads are not here, so that every call and every destructor would hang."""
        self._forked = True
        atexit.unregister(self.stop)
        self._listening.abandon()
        _shutdown.immortalize(self)

    # What follows runs on gRPC's threads.

    @contextlib.contextmanager
    def serve(self) -> Iterator[FlightService]:
        """Count a client's call, and turn what it raises into what the client is told."""
        with self._lock:
            service = self._service
            closed = not self._started or service is None or self._stopped
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
            if not self._started or self._stopped:
                self._refused.add()
                raise UnavailableError(f"node {self.node_id} does not take messages now")
            chunks = iter(arrival)
            guest = self._handshake.greet(chunks)
            if guest is None:
                return
            hello = guest.hello
            with self._succession.place(hello) as newest:
                if not arrival.answer(self._handshake.reply(guest)) or hello.question:
                    return
                if not self._handshake.confirm(guest, chunks):
                    return
                with self._peers.visit(hello.sender, hello.endpoint):
                    self._take(hello, chunks, arrival, newest)
        except fl.FlightError:
            raise
        except Exception as error:
            self._count_garbage(error)
            if isinstance(error, InvariantError):
                self._failed(error)
            raise self._told(error) from None

    def _take(self, hello: Hello, chunks: Iterator[Chunk], arrival: Arrival, newest: Callable[[], bool]) -> None:
        """What a stream brings that began with `hello`."""
        with contextlib.ExitStack() as stack:
            if hello.lane in ORDERED and hello.features & SPREAD and not hello.features & ONLY:
                chunks = self._assemblies.ordered(hello.sender, chunks, arrival.answer)
                # It ends with this call, not when it is collected.
                stack.callback(chunks.close)
            if hello.lane is Lane.PARTS:
                self._assemblies.fill(hello.sender, chunks, arrival.answer)
            elif hello.lane is Lane.MESSAGES:
                self._messages.take(hello.sender, chunks)
            else:
                echoes = hello.lane is Lane.CONTROL and hello.features & ECHO
                self._take_envelopes(hello.sender, chunks, arrival.answer if echoes else None, newest)

    def _take_envelopes(
        self, sender: int, chunks: Iterator[Chunk], echo: Callable[[bytes], bool] | None, newest: Callable[[], bool]
    ) -> None:
        """Messages of Raft, while the stream is the `newest`. Packets without any go to `echo`, until it says that nobody wants them."""
        receiver = self._receiver
        received = self.metrics.counter("transport_messages_received", peer=sender)
        for metadata, batch in chunks:
            if metadata is None:
                raise ProtocolError(f"entries without messages from node {sender}")
            packet = unwrap(metadata.to_pybytes(), batch, self.options.entry_bytes_max)
            envelopes = self._codec.decode(sender, packet.metadata, packet.batch)
            if not newest():
                return
            link = self._peers.links.get(sender)
            if link is not None:
                link.heard()
            if envelopes:
                if receiver is None:
                    raise ProtocolError(f"node {self.node_id} takes no messages of Raft, only those of users")
                received.add(len(envelopes))
                receiver(envelopes)
            elif echo is not None and not echo(metadata.to_pybytes()):
                return

    def _count_garbage(self, error: Exception) -> None:
        if isinstance(error, ProtocolError | pa.ArrowException):
            self._garbage.add()
            count = self._garbage.value
            # A flood of garbage must not flood the log as well.
            if count & (count - 1) == 0:
                _log.warning("node %d refused a stream (%d so far): %s", self.node_id, count, error)


def _ignore(_: object) -> None:
    """For callbacks that nobody asked for."""


def _log_failure(error: BaseException) -> None:
    _log.error("a link failed", exc_info=error)


_live: weakref.WeakSet[FlightTransport] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for transport in list(_live):
        transport._abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
