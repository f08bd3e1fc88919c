"""Settings of gRPC's connections: how soon one that leads nowhere is given up, and how soon the next one is tried.

Rule 1: nobody waits for TCP. It sends what was lost again after pauses that double, so that after a fault it waits about as long again
as the fault took; a connection that was given up, and opened anew, is there at once.

What gRPC makes of it, found by trying (pyarrow 26.0.1): keepalive pings are off in effect, for servers refuse more than one in five
minutes; but with them gRPC sets ``TCP_USER_TIMEOUT``: the kernel ends a connection on which nothing was acknowledged for so long.
"""

from __future__ import annotations

from typing import Final

UNACKNOWLEDGED_MS: Final = 2_000
"""For clients, and for nodes that relay to the leader. Above what a few lost packets in a row take."""

CONNECT_MS: Final = 2_000
"""One attempt; TLS over a long way takes four round trips."""

PING_MS: Final = 600_000


def dying(timeout_ms: int) -> tuple[tuple[str, int], ...]:
    """The settings by which a connection dies on which nothing was acknowledged for so long."""
    return ("grpc.keepalive_time_ms", PING_MS), ("grpc.keepalive_timeout_ms", timeout_ms)


CHANNEL_OPTIONS: Final = (
    # gRPC's own waits grow to two minutes: too long for a node that is back after a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", CONNECT_MS),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    *dying(UNACKNOWLEDGED_MS),
    # Nodes are reached directly, whatever proxy the environment names for the outside world.
    ("grpc.enable_http_proxy", 0),
    # Otherwise clients of one process share connections, and with them each other's waits.
    ("grpc.use_local_subchannel_pool", 1),
)
"""Of a client of nodes."""
