"""The transport under the name that users of MarbleDB know, for those who send messages of their own and for a server to listen on.

Rule 1: this is a face of `marble.transport.flight.FlightTransport`, and opens nothing before it is started, by `start` or by the
server that it was given to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Final

from marble._core.checksum import xxh3_64
from marble._core.packing import ReceivedMessage
from marble.config import format_endpoint, parse_endpoint
from marble.errors import UsageError
from marble.transport.flight import FlightTransport
from marble.transport.messaging import SEND_TIMEOUT_S, MetricsCollector, OnMessages, Peer, Sendable
from marble.transport.options import TransportOptions
from marble.types import NODE_ID_MAX

CLUSTER_ID: Final = "default"
"""Of transports that nobody gave one."""


class ArrowFlightTransport:
    """Where a node listens, for peers and clients alike, and what it sends messages through. A context manager: leaving it stops.

    Made by `create_arrow_flight_transport`. Thread-safe, except that `start` and `stop` belong to one caller. What it does is
    said at `marble.transport.messaging.Messaging`. A transport that was given to a server is started and stopped by it.
    """

    def __init__(self, endpoint: str, cluster_id: str, node_id: int, options: TransportOptions) -> None:
        self._endpoint = endpoint
        self._cluster_id = cluster_id
        self._node_id = node_id
        self._options = options
        self._flight: FlightTransport | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.endpoint}>"

    @property
    def endpoint(self) -> str:
        """``host:port`` to listen on; with the real port once it does."""
        return self._endpoint if self._flight is None else self._flight.endpoint

    @property
    def node_id(self) -> int:
        """By which id others know this node."""
        return self._node_id if self._flight is None else self._flight.node_id

    def attach(self, flight: FlightTransport) -> None:
        """Be the face of `flight`, which a server has started."""
        if self._flight is not None:
            raise UsageError(f"the transport at {self.endpoint} is in use already")
        self._flight = flight

    def start(self, on_messages: OnMessages | None = None) -> None:
        """Listen, and take messages.

        Parameters
        ----------
        on_messages
            Called with messages as they come, in the order of each sender, on gRPC's threads; while it does not return, that
            sender is held back. None: they wait for `receive_message`.

        Raises
        ------
        UsageError
            It was started before.
        UnavailableError
            The endpoint cannot be listened on.
        """
        flight = FlightTransport(self._endpoint, self._cluster_id, self._node_id, options=self._options)
        try:
            self.attach(flight)
            flight.start(on_messages=on_messages)
        except BaseException:
            flight.stop(0.0)
            raise

    def stop(self, deadline_s: float = 5.0) -> bool:
        """End all streams, free the port; messages that were sent may leave first. Whether all ended within `deadline_s` seconds."""
        return self._flight is None or self._flight.stop(deadline_s)

    def __enter__(self) -> ArrowFlightTransport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def connect_to_peer(self, peer: Peer, endpoint: str | None = None, *, timeout_s: float = SEND_TIMEOUT_S) -> int:
        """Keep streams to another node from now on; its id. See `Messaging.connect_to_peer`."""
        return self._started.connect_to_peer(peer, endpoint, timeout_s=timeout_s)

    def disconnect_from_peer(self, peer: Peer) -> None:
        """Give up the streams to a node. See `Messaging.disconnect_from_peer`."""
        self._started.disconnect_from_peer(peer)

    def send_message(self, peer: Peer, message: Sendable, *, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Queue a message for a node. See `Messaging.send_message`."""
        (self._flight or self._started).send_message(peer, message, timeout_s=timeout_s)

    def send_messages(
        self,
        peer: Peer,
        messages: Iterable[Sendable],
        *,
        timeout_s: float = SEND_TIMEOUT_S,
    ) -> None:
        """Queue messages for a node. See `Messaging.send_messages`."""
        self._started.send_messages(peer, messages, timeout_s=timeout_s)

    def receive_message(self, timeout_s: float | None = None) -> ReceivedMessage | None:
        """Take out the next message; None if none has come in time. See `Messaging.receive_message`."""
        return self._started.receive_message(timeout_s)

    def receive_messages(self, count_max: int = 1024, timeout_s: float | None = None) -> list[ReceivedMessage]:
        """Take out the next messages. See `Messaging.receive_messages`."""
        return self._started.receive_messages(count_max, timeout_s)

    def messages(self) -> Iterator[ReceivedMessage]:
        """All messages as they come, until the transport has stopped."""
        return self._started.messages()

    def get_health_status(self) -> dict[str, bool]:
        """Which parts work. See `Messaging.get_health_status`."""
        if self._flight is None:
            return {"transport": False, "server": False}
        return self._flight.get_health_status()

    def get_metrics_collector(self) -> MetricsCollector:
        """What was counted. See `Messaging.get_metrics_collector`."""
        return self._started.get_metrics_collector()

    @property
    def _started(self) -> FlightTransport:
        if self._flight is None:
            raise UsageError(f"the transport at {self._endpoint} was not started: call start(), or give it to a server")
        return self._flight


def create_arrow_flight_transport(
    endpoint: str,
    *,
    cluster_id: str = CLUSTER_ID,
    node_id: int | None = None,
    options: TransportOptions | None = None,
) -> ArrowFlightTransport:
    """Name the place where a node will listen: give it to `create_raft_server`, or start it and send messages of your own.

    Parameters
    ----------
    endpoint
        ``host:port``. Port 0 takes any free one, for who is told a ``node_id``.
    cluster_id
        Nodes of other clusters are refused. A server says it itself.
    node_id
        1 to 2**32 - 1, another one for each node. None: a number made from `endpoint`. A server says it itself.
    options
        Limits. A server says them itself.

    Raises
    ------
    UsageError
        If `endpoint` is not of that form.
    """
    place = format_endpoint(*parse_endpoint(endpoint, free_port=True))
    number = node_id if node_id is not None else int(xxh3_64(place.encode())) % NODE_ID_MAX + 1
    return ArrowFlightTransport(place, cluster_id, number, options or TransportOptions())
