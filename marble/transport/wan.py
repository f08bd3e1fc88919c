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

QUICK_MIN_S: Final = 1.0
"""However short election timeouts are, a peer may be busy for so long."""

RETRIES_PER_ELECTION: Final = 4
"""A peer that is away is called so often in an election timeout, or it would be back for long before it is noticed."""


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
    connect_s, silent_s, election_s = config.connect_timeout_ms / 1000, config.silent_peer_ms / 1000, election_ms / 1000
    pause_s = min(max(0.1, election_s / RETRIES_PER_ELECTION), 1.0)
    return TransportOptions(
        entry_bytes_max=entry_bytes_max,
        queue_bytes_max=config.queue_bytes_max,
        connect_timeout_s=connect_s,
        connect_quick_s=min(connect_s, max(QUICK_MIN_S, election_s) / 4),
        backoff_max_s=pause_s,
        # Where TCP has lost packets it waits longer and longer before it sends again: to open another stream is quicker.
        silent_peer_s=silent_s,
        silent_quick_s=min(silent_s, max(QUICK_MIN_S, election_s)),
        ping_s=heartbeat_ms / 1000 / PINGS_PER_HEARTBEAT,
        answer_s=heartbeat_ms / 1000 / 2,
        compression=config.compression,
        round_trip_max_s=election_s / ROUND_TRIPS_PER_ELECTION,
    )
