"""What all nodes of a cluster agree on: the table ``[cluster]``."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

from marble.config.endpoints import addresses_of, canonical_endpoint, endpoints_of
from marble.config.security import SecurityConfig
from marble.config.transport import TransportConfig
from marble.config.values import check_bool, check_int, check_keys, read_table, shown
from marble.errors import UsageError
from marble.types import NODE_ID_MAX

NODES_MAX: Final = 31
"""Every write waits for a majority, every heartbeat goes to all: many voters only make a cluster slower."""

ENTRY_BYTES_MAX: Final = 60 * 2**20
"""An entry must fit a frame of the log (`marble.logstore.log.LogOptions`), which never grows beyond 64 MiB."""

HEARTBEAT_TICKS: Final = 3
"""Ticks between two heartbeats. Finer ticks spread the randomised election timeouts of the nodes further apart."""

_MIB: Final = 2**20
_CLUSTER_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True)
class RaftClusterConfig:
    """What all nodes of a cluster agree on. Every node must be given the same values.

    Invariants: every field is valid; `endpoints` holds 1 to `NODES_MAX` distinct ``host:port``;
    ``heartbeat_ticks < election_ticks``; every limit admits at least one entry of ``max_entry_size``.

    Parameters
    ----------
    cluster_id
        Name of the cluster: letters, digits, ``_``, ``.``, ``-``; at most 128. Nodes of different clusters refuse
        each other.
    node_endpoints
        Where the nodes are found: a sequence of ``host:port``, which gives the nodes the ids 1, 2, ... in this order,
        or a mapping of node id to ``host:port``. A node that is reached over several networks has several, with commas
        between (``"10.0.0.1:5001,10.1.0.1:5001"``, at most 4): the others use all of them, clients the first.
    election_timeout_ms
        A follower that hears of no leader for this long, up to twice of it (chosen anew each time), starts an election.
        Must be above two heartbeat intervals.
    heartbeat_interval_ms
        How often a leader shows that it lives; 10 to 60000.
    snapshot_distance
        Entries between two snapshots of a node's state; 1 to 2**62. A snapshot also comes when the log has grown by
        256 MiB. Behind it the log keeps this many entries for followers that are a little slow, and forgets the rest.
    max_log_size
        Bytes of log at which a node refuses further writes with `UnavailableError`, until a snapshot lets it forget
        some. Leave room for two snapshot distances of what is written. None: no limit.
    max_entry_size
        Bytes of one entry's payload, that is of one written batch, at most; 4 KiB to 60 MiB.
    enable_pre_vote
        Ask whether an election could be won before starting it (thesis §9.6), so that a node that was cut off does
        not disturb the others.
    enable_ssl
        Whether all connections, of nodes and of clients, are encrypted. Each node then needs a ``[node.tls]``.
    lease_reads
        Let a leader answer linearizable reads without asking the others, while they have confirmed it recently enough.
        Such a read is linearizable only while no node's monotonic clock runs more than 1 % faster or slower than real
        time; without it, reads need no clock at all.
    scrub_interval_s
        About once in so many seconds each file of the tables is read through and checked; what is damaged is fetched from the
        other nodes. At most a year; 0: never.
    append_bytes_max
        Payload bytes that one AppendEntries carries, unless a single entry is larger.
    inflight_messages_max
        AppendEntries that may be under way to one follower without an answer.
    inflight_bytes_max
        Payload bytes that may be under way to one follower without an answer; no more than `transport.queue_bytes_max` holds with
        two appends beside.
    uncommitted_bytes_max
        Payload bytes that a leader takes in before a majority has them; beyond it, writes are refused with
        `UnavailableError`.
    segment_bytes_max
        Size at which the log starts a new segment file.
    cache_bytes_max
        Recent entries that the log keeps in memory, in payload bytes.
    transport
        Limits of the way between nodes: ``[cluster.transport]``.

    Raises
    ------
    UsageError
        If a value is of the wrong type, out of bounds, contradicts another, or asks for something that is not built.
    """

    cluster_id: str
    node_endpoints: Sequence[str] | Mapping[int, str]
    election_timeout_ms: int = 1500
    heartbeat_interval_ms: int = 300
    snapshot_distance: int = 10_000
    max_log_size: int | None = None
    max_entry_size: int = 16 * _MIB
    enable_pre_vote: bool = True
    enable_ssl: bool = False
    lease_reads: bool = False
    scrub_interval_s: int = 7 * 86_400
    append_bytes_max: int = 4 * _MIB
    inflight_messages_max: int = 256
    inflight_bytes_max: int = 64 * _MIB
    uncommitted_bytes_max: int = 256 * _MIB
    segment_bytes_max: int = 64 * _MIB
    cache_bytes_max: int = 64 * _MIB
    transport: TransportConfig = field(default_factory=TransportConfig)
    endpoints: Mapping[int, str] = field(init=False, repr=False, compare=False)
    """Node id to canonical ``host:port``, in ascending id; read only."""

    def __post_init__(self) -> None:
        if not isinstance(self.cluster_id, str) or _CLUSTER_ID.fullmatch(self.cluster_id) is None:
            raise UsageError(
                f"cluster_id must be 1 to 128 letters, digits, '_', '.' or '-' and not start with '.' or '-', "
                f"not {shown(self.cluster_id)}"
            )
        endpoints = _number_endpoints(self.node_endpoints)
        # A list or dict of the caller's could be changed under us after the check.
        given = self.node_endpoints
        copied = types.MappingProxyType(dict(endpoints)) if isinstance(given, Mapping) else tuple(endpoints.values())
        object.__setattr__(self, "node_endpoints", copied)
        object.__setattr__(self, "endpoints", types.MappingProxyType(endpoints))
        if not isinstance(self.transport, TransportConfig):
            raise UsageError(f"transport must be a TransportConfig, not {shown(self.transport)}")
        self._check_times()
        self._check_limits()
        self._check_switches()

    def _check_times(self) -> None:
        check_int("heartbeat_interval_ms", self.heartbeat_interval_ms, 10, 60_000)
        check_int("election_timeout_ms", self.election_timeout_ms, 20, 600_000)
        check_int("scrub_interval_s", self.scrub_interval_s, 0, 366 * 86_400)
        if self.election_timeout_ms <= 2 * self.heartbeat_interval_ms:
            raise UsageError(
                f"election_timeout_ms {self.election_timeout_ms} must be above twice heartbeat_interval_ms "
                f"{self.heartbeat_interval_ms}, or one late heartbeat would start an election: "
                f"make it {5 * self.heartbeat_interval_ms} or more"
            )

    def _check_limits(self) -> None:
        check_int("max_entry_size", self.max_entry_size, 4096, ENTRY_BYTES_MAX)
        check_int("append_bytes_max", self.append_bytes_max, 1, ENTRY_BYTES_MAX)
        check_int("inflight_messages_max", self.inflight_messages_max, 1, 65_536)
        check_int("inflight_bytes_max", self.inflight_bytes_max, 1, 2**40)
        check_int("uncommitted_bytes_max", self.uncommitted_bytes_max, 1, 2**40)
        check_int("segment_bytes_max", self.segment_bytes_max, 4096, 2**40)
        check_int("cache_bytes_max", self.cache_bytes_max, 0, 2**40)
        check_int("snapshot_distance", self.snapshot_distance, 1, 2**62)
        if self.max_log_size is not None:
            check_int("max_log_size", self.max_log_size, 1, 2**62)
            self._check_at_least("max_log_size", "max_entry_size")
        self._check_at_least("inflight_bytes_max", "append_bytes_max")
        self._check_at_least("uncommitted_bytes_max", "max_entry_size")

    def _check_at_least(self, name: str, least: str) -> None:
        if getattr(self, name) < getattr(self, least):
            raise UsageError(f"{name} {getattr(self, name)} must not be below {least} {getattr(self, least)}")

    def _check_switches(self) -> None:
        for name in ("enable_pre_vote", "enable_ssl", "lease_reads"):
            check_bool(name, getattr(self, name))

    def check_security(self, security: SecurityConfig) -> None:
        """Raise UsageError if a node with `security` cannot take part in this cluster."""
        if self.enable_ssl and security.tls is None:
            raise UsageError("[cluster] enable_ssl = true needs [node.tls]: certificate, key and ca (try marble certs)")
        if security.tls is not None and not self.enable_ssl:
            raise UsageError("[node.tls] is given, but not [cluster] enable_ssl = true: all nodes encrypt, or none")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "cluster") -> RaftClusterConfig:
        """Make a config from the keys and values of a file's table `where`.

        Raises
        ------
        UsageError
            For an unknown or missing key, or as the class itself.
        """
        names = [item.name for item in fields(cls) if item.init]
        check_keys(values, names, required=("cluster_id", "node_endpoints"), where=where)
        arguments = dict(values)
        given = arguments["node_endpoints"]
        if isinstance(given, Mapping):
            # Keys of a TOML table are strings.
            arguments["node_endpoints"] = {_node_id(key): endpoint for key, endpoint in given.items()}
        if "transport" in arguments:
            arguments["transport"] = read_table(TransportConfig, arguments["transport"], f"{where}.transport")
        return cls(**arguments)

    @property
    def voters(self) -> tuple[int, ...]:
        """Ids of the nodes, ascending."""
        return tuple(self.endpoints)

    @property
    def tick_ms(self) -> float:
        """Milliseconds between two ticks of the core."""
        return self.heartbeat_interval_ms / HEARTBEAT_TICKS

    @property
    def heartbeat_ticks(self) -> int:
        """Ticks between two heartbeats."""
        return HEARTBEAT_TICKS

    @property
    def election_ticks(self) -> int:
        """Ticks in the shortest election timeout; above ``2 * heartbeat_ticks``."""
        return -(-self.election_timeout_ms * HEARTBEAT_TICKS // self.heartbeat_interval_ms)

    @property
    def message_bytes_max(self) -> int:
        """Payload bytes in the largest message of a peer: an AppendEntries that is full or holds one large entry."""
        return max(self.append_bytes_max, self.max_entry_size)

    def find_node(self, endpoint: str) -> int:
        """The id of the node at `endpoint`.

        Raises
        ------
        UsageError
            If no node of the cluster has it.
        """
        canonical = canonical_endpoint(endpoint)
        for node, other in self.endpoints.items():
            if canonical == other or canonical in addresses_of(other):
                return node
        nodes = ", ".join(self.endpoints.values())
        raise UsageError(f"no node of the cluster has the endpoint {canonical!r}: it has {nodes}")


def _node_id(key: object) -> int:
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
        key = int(key)
    return check_int("node id in node_endpoints", key, 1, NODE_ID_MAX)


def _number_endpoints(given: object) -> dict[int, str]:
    if isinstance(given, Mapping):
        ids = sorted(_node_id(key) for key in given)
        endpoints = dict(zip(ids, endpoints_of((given[node] for node in ids), "node_endpoints: number"), strict=True))
    elif isinstance(given, Sequence) and not isinstance(given, str | bytes):
        endpoints = dict(enumerate(endpoints_of(given, "node_endpoints: number"), start=1))
    else:
        raise UsageError(
            f'node_endpoints must be a list of "host:port" or a mapping of node id to it, not {shown(given)}'
        )
    if not 1 <= len(endpoints) <= NODES_MAX:
        raise UsageError(f"node_endpoints names {len(endpoints)} nodes: it must be 1 to {NODES_MAX}")
    return endpoints
