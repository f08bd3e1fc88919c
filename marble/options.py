"""What a node is made of: identity, cluster, timing and limits, each with its unit last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from marble.config import RaftClusterConfig

CONFIRM_MIN_S: Final = 2.0
"""However short election timeouts are: on a busy machine an election takes longer."""

SEGMENT_BYTES_MIN: Final = 4096
"""A segment has a header and at least one sync's worth."""


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What a node is made of, checked by `marble.config` or by the caller.

    - ``endpoints`` holds every voter that the cluster has when it is new, this node (``node_id``) included unless ``join``.
      Later it only says where nodes are reached of which the log does not say so.
    - ``election_ticks`` and ``heartbeat_ticks`` count ticks of ``tick_ms`` milliseconds.
    """

    cluster_id: str
    node_id: int
    endpoints: Mapping[int, str]
    tick_ms: float = 100.0
    election_ticks: int = 15
    heartbeat_ticks: int = 3
    pre_vote: bool = True
    check_quorum: bool = True
    log_bytes_max: int | None = None
    """Snapshots are taken, and segments ended, so often that the log stays well below. While it is larger all the same (they
    cannot be written, or a peer needs what is old), writes are refused with UnavailableError. None: as large as the disk."""
    entry_bytes_max: int = 16 * 1024 * 1024
    append_bytes_max: int = 4 * 1024 * 1024
    """One AppendEntries carries at most this much, but always one entry."""
    inflight_messages_max: int = 256
    inflight_bytes_max: int = 64 * 1024 * 1024
    uncommitted_bytes_max: int = 256 * 1024 * 1024
    inbox_messages_max: int = 16_384
    """Peers' messages waiting for the engine; more are dropped and counted, which Raft tolerates."""
    inbox_bytes_max: int = 128 * 1024 * 1024
    """Proposals waiting for the engine; more are refused with UnavailableError."""
    segment_bytes_max: int = 64 * 1024 * 1024
    """Size at which the log begins another file."""
    cache_bytes_max: int = 64 * 1024 * 1024
    """Of the log's recent entries, kept in memory for followers and for apply."""
    propose_timeout_s: float = 10.0
    """After this an undecided proposal ends in OutcomeUnknownError."""
    read_timeout_s: float = 5.0
    snapshot_distance: int = 10_000
    """A snapshot is taken when so many entries were applied since the last."""
    snapshot_log_bytes: int = 256 * 1024 * 1024
    """Or so many bytes of them; what stays of the log behind a snapshot is no more than this either."""
    purge_tail: int | None = None
    """How many entries before a snapshot stay for followers that lag. None: ``snapshot_distance``."""
    memory_bytes_max: int = 64 * 1024 * 1024
    """Or about so many bytes of tables that are in memory only: a snapshot brings them into files."""
    backlog_bytes_max: int = 1024 * 1024 * 1024
    """Writes wait, and are then refused with UnavailableError, while tables' files lag further behind than this."""
    snapshot_piece_bytes: int = 1024 * 1024
    """What one message carries of a snapshot; at most ``append_bytes_max`` counts."""
    snapshot_window_bytes_max: int = 16 * 1024 * 1024
    """What is asked for ahead while a snapshot is fetched."""
    snapshot_bytes_per_s: int = 64 * 1024 * 1024
    """How fast a snapshot or a file of a table is written at most, unless so much waits that writers would soon be refused: unbridled,
    it would hold up the log's syncs on the same disk."""
    scrub_interval_s: float = 7 * 86400.0
    """Each file of the tables is read through and checked about once in this time. 0: never."""
    priority: int = 0
    """Of several nodes that could lead, the one with the highest does (`marble.raft.config.RaftConfig`)."""
    lease_reads: bool = False
    """The leader may answer reads from a lease, without asking a majority: rests on clocks that drift less than 1 %."""
    quiesce_ticks: int = 0
    """A group that had nothing to do for so long sleeps. 0: never."""
    join: bool = False
    """An empty directory becomes a node that waits to be added to a cluster which is there, and has no vote until then."""

    @property
    def confirm_timeout_s(self) -> float:
        """A read that no leader has confirmed for so long is refused, so that its caller asks elsewhere: two election timeouts."""
        two_s = 2 * self.election_ticks * self.tick_ms / 1000
        return min(self.read_timeout_s, max(CONFIRM_MIN_S, two_s))

    @property
    def election_spread_ticks(self) -> int:
        """Ticks below which the random part of an election timeout is: half of `election_ticks`, where etcd has all of them.

        So an election that begins when a fault ends is over within two timeouts. `bench/elections.py` tells what that costs in
        votes that are split: nothing to speak of, unless a round trip takes a tenth of an election timeout.
        """
        return -(-self.election_ticks // 2)

    @property
    def log_bytes_kept(self) -> int:
        """After so many bytes of entries a snapshot is taken, and so much of the log stays behind one."""
        if self.log_bytes_max is None:
            return self.snapshot_log_bytes
        return max(1, min(self.snapshot_log_bytes, self.log_bytes_max // 4))

    @property
    def log_segment_bytes(self) -> int:
        """Size at which the log begins another file: small enough that whole files become superfluous in time."""
        if self.log_bytes_max is None:
            return self.segment_bytes_max
        return min(self.segment_bytes_max, max(SEGMENT_BYTES_MIN, self.log_bytes_max // 8))


def options_of(
    config: RaftClusterConfig, node_id: int, endpoints: Mapping[int, str], *, priority: int, join: bool
) -> NodeOptions:
    """What node `node_id` of the cluster that `config` describes is made of; the rest is the node's own."""
    return NodeOptions(
        cluster_id=config.cluster_id,
        node_id=node_id,
        endpoints=endpoints,
        tick_ms=config.tick_ms,
        election_ticks=config.election_ticks,
        heartbeat_ticks=config.heartbeat_ticks,
        pre_vote=config.enable_pre_vote,
        log_bytes_max=config.max_log_size,
        entry_bytes_max=config.max_entry_size,
        append_bytes_max=config.append_bytes_max,
        inflight_messages_max=config.inflight_messages_max,
        inflight_bytes_max=_window_of(config),
        uncommitted_bytes_max=config.uncommitted_bytes_max,
        segment_bytes_max=config.segment_bytes_max,
        cache_bytes_max=config.cache_bytes_max,
        snapshot_distance=config.snapshot_distance,
        snapshot_window_bytes_max=config.transport.snapshot_window_bytes_max or 0,
        scrub_interval_s=config.scrub_interval_s,
        priority=priority,
        lease_reads=config.lease_reads,
        join=join,
    )


def _window_of(config: RaftClusterConfig) -> int:
    """Bytes of entries under way to one follower: what fits into a queue of the transport's, with the append by which the core may pass its
    window and one that is being written. Of a window that does not fit all is dropped and sent again, and so again, for ever.
    """
    assert config.transport.queue_bytes_max is not None
    fits = config.transport.queue_bytes_max - 2 * config.append_bytes_max
    return min(config.inflight_bytes_max, max(fits, config.append_bytes_max))
