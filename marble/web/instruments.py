"""Every metric that a node shows: kind, unit and meaning. ``docs/operations.md`` has the same list, and a test compares them.

Rule 1: what `marble.metrics` counts has its line here under the same name; what is computed when somebody looks (the gauges of
a status, of the process, of the disk) is computed in `marble.web.exposition` and described here, too.
Rule 2: outside, a name starts with ``marble_``, and a counter's ends with ``_total``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

PREFIX: Final = "marble_"


class Kind(enum.Enum):
    """What a number does over time."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Described:
    """One metric. ``name`` is that in `marble.metrics`; ``exported`` the one that others see."""

    name: str
    kind: Kind
    unit: str
    meaning: str
    labels: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """Name in Prometheus' text."""
        return PREFIX + self.name + ("_total" if self.kind is Kind.COUNTER else "")


def _counter(name: str, unit: str, meaning: str, *labels: str) -> Described:
    return Described(name, Kind.COUNTER, unit, meaning, labels)


def _gauge(name: str, unit: str, meaning: str, *labels: str) -> Described:
    return Described(name, Kind.GAUGE, unit, meaning, labels)


def _histogram(name: str, meaning: str, *labels: str) -> Described:
    return Described(name, Kind.HISTOGRAM, "seconds", meaning, labels)


_ALL: Final = (
    # Who and where.
    _gauge("node_info", "1", "what this node is", "cluster_id", "node_id", "version"),
    _gauge("healthy", "0 or 1", "whether a component is well; /healthz says what is wrong", "component"),
    _gauge("ready", "0 or 1", "whether this node can serve clients, as /readyz says"),
    _gauge("role", "0 or 1", "1 for the role that this node has in its group", "role"),
    _gauge("leads", "0 or 1", "whether this node leads"),
    _gauge("leader_id", "node id", "the leader as far as this node knows, 0 if it knows none"),
    _gauge("term", "terms", "the current term"),
    _gauge("voters", "nodes", "members with a vote"),
    _counter("leader_changes", "leaders", "leaders that this node has followed or been, one after the other"),
    # Positions of the log.
    _gauge("last_index", "index", "the last entry of this node's log"),
    _gauge("persisted_index", "index", "the last entry that is durable on this node"),
    _gauge("commit_index", "index", "the last entry that this node knows to be committed"),
    _gauge("applied_index", "index", "the last entry whose effect is in this node's tables"),
    _gauge("snapshot_index", "index", "the entry at which the newest snapshot stands"),
    _gauge("purged_index", "index", "the last entry that the log has forgotten"),
    _gauge("apply_lag_entries", "entries", "entries that are committed and not yet applied here"),
    # Writes and reads.
    _counter("writes_committed", "writes", "writes of this node's callers that took effect; batches, not rows"),
    _counter("write_bytes_committed", "bytes", "payload of these writes"),
    _counter("reads_confirmed", "reads", "linearizable reads of this node's callers that were confirmed"),
    _counter("proposals_refused", "writes", "writes refused because too many waited"),
    _counter("entries_applied", "entries", "entries applied to the tables since the start, whoever wrote them"),
    _counter("bytes_applied", "bytes", "payload of these entries"),
    _histogram("write_seconds", "a write of this node's callers, from its arrival until it took effect here"),
    _histogram("commit_seconds", "a write of this node's callers, from the log until a majority had it"),
    _histogram("read_index_seconds", "confirming a linearizable read"),
    _histogram(
        "request_seconds",
        "a call of a client, from its arrival until its answer begins; no streams of writes",
        "method",
    ),
    _counter("requests", "calls", "calls of clients, streams among them, by what became of them", "method", "outcome"),
    # Disk and memory.
    _histogram("log_sync_seconds", "one sync of the log, and removing what it made superfluous"),
    _histogram("apply_seconds", "applying one run of entries to the tables"),
    _histogram("flush_seconds", "writing what is in memory to files of the tables, and a snapshot that names them"),
    _histogram("compaction_seconds", "one step of compaction"),
    _counter("compactions_failed", "steps", "steps of compaction that failed; they are tried again"),
    _counter("files_scrubbed", "files", "files of tables that were read through and checked"),
    _counter("files_found_damaged", "files", "files of tables that were found damaged when they were checked"),
    _gauge("log_bytes", "bytes", "size of the log's files, without purged segments that wait to be written over"),
    _gauge("memory_bytes", "bytes", "tables that are in memory only (memtables)"),
    _gauge("backlog_bytes", "bytes", "what compaction has yet to do"),
    _gauge("sessions", "sessions", "sessions of clients"),
    _gauge("disk_free_bytes", "bytes", "free on the file system of the data directory"),
    _gauge("disk_size_bytes", "bytes", "size of that file system"),
    _gauge(
        "working_seconds", "seconds", "for how long a thread has been at its present job, 0 if it has none", "thread"
    ),
    _gauge("engine_turn_seconds", "seconds", "how long the engine took to answer when it was last asked how it is"),
    _gauge(
        "clock_skew_seconds", "seconds", "by how much the latest entry's clock is ahead of this node's; 0 if it is not"
    ),
    # Peers.
    _gauge("peer_connected", "0 or 1", "whether the stream to the peer is open", "peer"),
    _gauge("peer_match_index", "index", "the last entry that the peer is known to have; at the leader", "peer"),
    _gauge("peer_lag_entries", "entries", "entries of the leader's log that the peer lacks; at the leader", "peer"),
    _gauge("peer_inflight_messages", "messages", "appends under way to the peer; at the leader", "peer"),
    _gauge("peer_inflight_bytes", "bytes", "payload of these; at the leader", "peer"),
    # Messages between nodes.
    _counter("transport_messages_sent", "messages", "Raft messages sent", "peer"),
    _counter("transport_packets_sent", "messages", "Flight messages that carried them", "peer"),
    _counter("transport_messages_received", "messages", "Raft messages that passed every check", "peer"),
    _counter(
        "transport_messages_dropped",
        "messages",
        "messages that a full or broken link would not take; Raft repeats what matters",
        "peer",
    ),
    _counter("transport_streams_opened", "streams", "streams to peers that were opened", "peer"),
    _counter("transport_streams_broken", "streams", "streams to peers that broke", "peer"),
    _histogram("transport_round_trip_seconds", "an empty packet to the peer's process and back", "peer"),
    _counter("transport_paths_changed", "changes", "changes of the way that a peer is reached by first"),
    _counter(
        "transport_parts_bytes_sent",
        "bytes",
        "parts of large packets that this way (0: the first address) took",
        "peer",
        "way",
    ),
    _counter(
        "transport_parts_sent_again", "parts", "parts that were late, or whose stream broke, and took another way"
    ),
    _counter("transport_ways_rested", "times", "a way was left out because parts were late on it"),
    _counter("transport_parts_received", "parts", "parts of large packets that arrived"),
    _counter(
        "transport_parts_dropped", "parts", "that arrived twice, or after the stream that they were for had ended"
    ),
    _counter("transport_bytes_before_compression", "bytes", "payloads that were compressed, as they were"),
    _counter("transport_bytes_after_compression", "bytes", "the same payloads as they were sent"),
    _counter(
        "transport_incarnations_refused",
        "hellos",
        "hellos, calling or answering, of nodes whose data directory was replaced",
    ),
    _counter("transport_protocol_errors", "calls", "calls closed because of what they carried"),
    _counter("transport_calls_refused", "calls", "calls of other clusters or nodes, or above the limits"),
    _counter("transport_internal_errors", "errors", "our own faults in the transport; the node stops"),
    _counter("transport_user_messages_sent", "messages", "messages that users of the transport sent", "peer"),
    _counter("transport_user_bytes_sent", "bytes", "of these messages", "peer"),
    _counter("transport_user_messages_received", "messages", "messages for users of the transport that arrived"),
    _counter("transport_user_bytes_received", "bytes", "of these messages"),
    _counter(
        "transport_user_messages_missed",
        "messages",
        "messages that were lost on the way, as the gaps in the others show",
    ),
    _counter("transport_messages_oversized", "calls", "calls cut off because of a message above the limit"),
    _counter("transport_slow_readers_dropped", "calls", "calls cut off because their client did not read"),
    _counter("transport_unauthenticated", "calls", "calls without the right credentials"),
    _counter("transport_forbidden", "calls", "calls that their token does not allow"),
    _counter(
        "security_reloads", "times", "certificates, tokens or the secret were read anew because a file had changed"
    ),
    _counter("security_reload_failures", "times", "that failed, and the old ones are used still"),
    _counter("messages_dropped_inbox_full", "messages", "messages that the engine had no room for"),
    _counter("messages_refused", "messages", "messages that no correct member of the group would send"),
    _counter("messages_misdirected", "messages", "messages for another node or group"),
    # The HTTP port.
    _counter("http_requests", "requests", "requests at the HTTP port", "code"),
    _counter("http_refused", "connections", "connections at the HTTP port that were closed because too many were open"),
    # The process.
    _gauge("process_threads", "threads", "threads of this process"),
    _gauge("process_open_fds", "files", "open file descriptors of this process"),
    _gauge("process_resident_bytes", "bytes", "memory of this process that is in RAM"),
    _gauge("process_cpu_seconds", "seconds", "processor time of this process since its start"),
    _gauge("uptime_seconds", "seconds", "since this node was started"),
)

INSTRUMENTS: Final = {described.name: described for described in _ALL}
"""By the name inside."""
