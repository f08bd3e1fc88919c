"""The limits of a transport that fit a cluster: what its config says, and what follows from its heartbeats.

Most of what a long way needs is measured on it and set by nobody: HTTP/2's windows (gRPC estimates the product of bandwidth and
delay), the patience with a peer (`marble.transport.pulse`), the window of a snapshot (`marble.transport.window`).
"""

from __future__ import annotations

from typing import Final

from marble.config import TransportConfig
from marble.transport.options import TransportOptions

PINGS_PER_HEARTBEAT: Final = 4
"""With an answer awaited for half an interval, a way that dies is left within three quarters of one."""

ROUND_TRIPS_PER_ELECTION: Final = 10
"""An election timeout should have so many, or lost and late messages elect."""


def options_for(
    config: TransportConfig, *, heartbeat_ms: float, election_ms: float, entry_bytes_max: int
) -> TransportOptions:
    """The options of a node's transport.

    Parameters
    ----------
    config
        The cluster's.
    heartbeat_ms, election_ms
        Of its heartbeats' interval and its shortest election timeout, in milliseconds.
    entry_bytes_max
        See `TransportOptions`.
    """
    assert config.connect_timeout_ms is not None
    assert config.silent_peer_ms is not None
    assert config.queue_bytes_max is not None
    return TransportOptions(
        entry_bytes_max=entry_bytes_max,
        queue_bytes_max=config.queue_bytes_max,
        connect_timeout_s=config.connect_timeout_ms / 1000,
        silent_peer_s=config.silent_peer_ms / 1000,
        ping_s=heartbeat_ms / 1000 / PINGS_PER_HEARTBEAT,
        answer_s=heartbeat_ms / 1000 / 2,
        compression=config.compression,
        round_trip_max_s=election_ms / 1000 / ROUND_TRIPS_PER_ELECTION,
    )
