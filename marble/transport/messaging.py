"""What those who bring their own Raft, or their own messages, call: peers, messages, health and counters.

Rule 1: whoever sends is told. A message that cannot be queued is an error that names the peer, the cause and what to do next.

::

    transport = create_arrow_flight_transport("127.0.0.1:5001", cluster_id="c", node_id=1)
    transport.start()
    transport.connect_to_peer(2, "127.0.0.1:5002")
    transport.send_message(2, b"hello")
    message = transport.receive_message(timeout_s=5.0)
    print(message.sender, bytes(message))
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeAlias

import pyarrow as pa

from marble._core.packing import ReceivedMessage
from marble.errors import UnavailableError, UsageError
from marble.metrics import Metrics
from marble.transport.messages import Mailbox
from marble.transport.options import TransportOptions
from marble.transport.paths import Peering

Sendable: TypeAlias = bytes | bytearray | memoryview | pa.Buffer | pa.RecordBatch
Peer: TypeAlias = int | str
"""A node's id, or its ``host:port``."""
OnMessages = Callable[[list[ReceivedMessage]], None]

SEND_TIMEOUT_S: Final = 5.0


class MetricsCollector:
    """A transport's instruments by name, with or without the prefix ``transport_`` that all of them have."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def get_counter(self, name: str) -> int:
        """How much was counted, of all peers together. Raises UsageError if there is no such counter."""
        value = self._find(name)
        if not isinstance(value, int):
            raise UsageError(f"{name!r} is no counter: its value is {value}")
        return value

    def get_gauge(self, name: str) -> float:
        """The value now. Raises UsageError if there is no such gauge."""
        value = self._find(name)
        if not isinstance(value, float):
            raise UsageError(f"{name!r} is no gauge: its value is {value}")
        return value

    def get_counters(self) -> dict[str, int]:
        """All counters by their full names."""
        return {name: value for name, value in self._metrics.snapshot().items() if isinstance(value, int)}

    def _find(self, name: str) -> object:
        values = self._metrics.snapshot()
        for known in (name, f"transport_{name}"):
            if known in values:
                return values[known]
        raise UsageError(f"there is no instrument {name!r}; there are {', '.join(values) or 'none'}")


class Messaging(abc.ABC):
    """The part of a transport that users call. Thread-safe."""

    options: TransportOptions
    metrics: Metrics
    node_id: int

    def __init__(self, options: TransportOptions, metrics: Metrics) -> None:
        self.options = options
        self.metrics = metrics
        self._mailbox = Mailbox(options.mailbox_bytes_max, options.mailbox_count_max)
        self._on_messages: OnMessages | None = None

    @abc.abstractmethod
    def connect_to_peer(self, peer: Peer, endpoint: str | None = None, *, timeout_s: float = SEND_TIMEOUT_S) -> int:
        """Keep streams to another node from now on, and wait until it is reached.

        Parameters
        ----------
        peer
            Its id; or its ``host:port``, and then the node there is asked who it is.
        endpoint
            Its ``host:port``, if `peer` is an id. Another one than before moves the streams.
        timeout_s
            How long to wait, in seconds; with 0 it is reached whenever that comes to be possible.

        Returns
        -------
        int
            Its id.

        Raises
        ------
        UnavailableError
            It was not reached in time. If `peer` is an id, the transport goes on trying until `disconnect_from_peer`.
        UsageError
            Not an id or an endpoint of another node, or the transport was not started.
        """

    @abc.abstractmethod
    def disconnect_from_peer(self, peer: Peer) -> None:
        """Give up the streams to a node, and what is queued for it. Nothing happens if it is not connected to.

        Raises UsageError if it is a member of the cluster that this transport serves: it is removed there.
        """

    @abc.abstractmethod
    def _find_link(self, peer: Peer) -> Peering | None:
        """The link to `peer`. Raises UsageError in a forked child, UnavailableError after `stop`."""

    @abc.abstractmethod
    def get_health_status(self) -> dict[str, bool]:
        """Which parts work: ``transport``, ``server`` (the port), and ``peer:2`` for each node that is connected to."""

    def get_metrics_collector(self) -> MetricsCollector:
        """What was counted: ``messages_sent``, ``messages_received``, ``streams_broken``, ..."""
        return MetricsCollector(self.metrics)

    def send_message(self, peer: Peer, message: Sendable, *, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Queue `message` for a node. Messages to one node arrive in the order of these calls.

        A message arrives at most once. One that was queued is lost only if its stream breaks while it is under way, or one
        of the two transports ends: what must not get lost needs an answer from the other side.

        Parameters
        ----------
        peer
            Id or ``host:port`` of a node that is connected to, or that has a stream open to this one.
        message
            Its bytes. Bytes and immutable `pyarrow.Buffer` are not copied; what can be changed is. A RecordBatch travels as an
            Arrow IPC stream: ``pyarrow.ipc.open_stream(received.data)`` reads it, without a copy.
        timeout_s
            How long to wait, in seconds, for the peer to be reached and for room in the queue.

        Raises
        ------
        UnavailableError
            The peer is not reached, or takes messages more slowly than they are sent. Nothing was queued.
        UsageError
            The peer is unknown, or `message` is no bytes or larger than ``message_bytes_max``.
        """
        link = self._find_link(peer)
        quick = link is not None and type(message) is bytes and len(message) <= self.options.message_bytes_max
        if not (quick and link is not None and link.send_message(message)):
            self.send_messages(peer, [message], timeout_s=timeout_s)

    def send_messages(
        self,
        peer: Peer,
        messages: Iterable[Sendable],
        *,
        timeout_s: float = SEND_TIMEOUT_S,
    ) -> None:
        """Queue `messages` for a node, in order: like `send_message` for each, at less cost.

        Raises
        ------
        UnavailableError
            As `send_message`. It says how many of the first were queued; the others were not.
        UsageError
            As `send_message`. None was queued.
        """
        link = self._find_link(peer)
        if link is None:
            raise UsageError(f"node {peer} is not connected to: call connect_to_peer first")
        frozen = [message if type(message) is bytes else _frozen(message) for message in messages]
        largest = max(map(len, frozen), default=0)
        if largest > self.options.message_bytes_max:
            raise UsageError(
                f"a message of {largest} bytes exceeds message_bytes_max, {self.options.message_bytes_max}"
            )
        queued = link.send_messages(frozen, timeout_s)
        if queued < len(frozen):
            raise self._not_sent(link, timeout_s, f"; of {len(frozen)} messages {queued} were queued")

    def _not_sent(self, link: Peering, timeout_s: float, rest: str = "") -> UnavailableError:
        who = f"node {link.peer} at {link.endpoint}"
        if link.connected:
            cause = (
                f"the queue to {who} had no room for {timeout_s} s: it takes messages more slowly than they are sent"
            )
        else:
            trouble = link.trouble or "no connection yet"
            cause = f"{who} was not reached in {timeout_s} s ({trouble}): see that it runs and is reachable"
        return UnavailableError(cause + rest)

    def receive_message(self, timeout_s: float | None = None) -> ReceivedMessage | None:
        """Take out the next message of any node.

        Parameters
        ----------
        timeout_s
            How long to wait for one, in seconds; None: until there is one. 0 looks only.

        Returns
        -------
        ReceivedMessage or None
            None if none has come in time, or the transport has stopped and all were taken out.
        """
        return self._mailbox.get(timeout_s)

    def receive_messages(self, count_max: int = 1024, timeout_s: float | None = None) -> list[ReceivedMessage]:
        """Take out the next messages, `count_max` at most, as soon as there is one; else as `receive_message`."""
        return self._mailbox.get_many(count_max, timeout_s)

    def messages(self) -> Iterator[ReceivedMessage]:
        """All messages as they come, until the transport has stopped."""
        while (message := self.receive_message()) is not None:
            yield message

    def _deliver(self, messages: list[ReceivedMessage], nbytes: int, wanted: Callable[[], bool]) -> bool:
        """Take in what came; whether it was. Runs on gRPC's threads, and may wait: that is what holds the sender back."""
        if self._on_messages is not None:
            self._on_messages(messages)
            return True
        return self._mailbox.put(messages, nbytes, wanted)


def _frozen(message: object) -> bytes | pa.Buffer:
    """`message` as what nobody can change any more."""
    if isinstance(message, pa.Buffer):
        return message if not message.is_mutable else message.to_pybytes()
    if isinstance(message, bytes | bytearray | memoryview | ReceivedMessage):
        return bytes(message)
    if isinstance(message, pa.RecordBatch):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, message.schema) as writer:
            writer.write_batch(message)
        return sink.getvalue()
    raise UsageError(f"a message must be bytes or a RecordBatch, not a {type(message).__name__}")
