"""What a cluster and a node are told before they start, and the check of every word of it.

Rule 1: a config object that exists is valid. Whatever is wrong is a `UsageError` that names the key, what it holds,
what it may hold and, for a key that does not exist, the nearest one that does.

- Limits carry their unit last (``_ms``, ``_bytes_max``); ``snapshot_distance``, ``max_log_size`` and ``max_entry_size``
  keep the names under which users of MarbleDB know them.
- A switch for something that is not built is refused when it is turned, never ignored.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from marble.errors import UsageError
from marble.types import NODE_ID_MAX

NODES_MAX: Final = 31
"""Every write waits for a majority, every heartbeat goes to all: many voters only make a cluster slower."""

DEFAULT_PORT: Final = 5001

ENTRY_BYTES_MAX: Final = 60 * 2**20
"""An entry must fit a frame of the log (`marble.logstore.log.LogOptions`), which never grows beyond 64 MiB."""

PRIORITY_MAX: Final = 65_535
"""A node's priority travels as uint16."""

HEARTBEAT_TICKS: Final = 3
"""Ticks between two heartbeats. Finer ticks spread the randomised election timeouts of the nodes further apart."""

_MIB: Final = 2**20
_CLUSTER_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9_.-]{1,15})?")
_SCHEMES = ("grpc://", "grpc+tcp://")


def parse_endpoint(text: object, *, what: str = "endpoint", free_port: bool = False) -> tuple[str, int]:
    """Split ``host:port`` (IPv6: ``[host]:port``) and check both halves.

    Parameters
    ----------
    text
        What the user gave.
    what
        How the message calls it, e.g. ``"[cluster] node_endpoints[2]"``.
    free_port
        Whether port 0 ("any free one") is allowed: it is where a server listens, never where others find it.

    Returns
    -------
    tuple of str and int
        The host in lower case, without brackets, and the port.

    Raises
    ------
    UsageError
        If it is anything else.
    """
    if not isinstance(text, str):
        raise UsageError(f'{what} must be a string "host:port", not {_shown(text)}')
    if "://" in text:
        raise UsageError(f'{what} {text!r} must be "host:port", without a scheme')
    host, colon, port = text.rpartition(":")
    if not colon:
        raise UsageError(f'{what} {text!r} has no port: write "host:port", e.g. "{text or "127.0.0.1"}:{DEFAULT_PORT}"')
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        good = ":" in host and _IPV6.fullmatch(host) is not None
    elif ":" in host:
        raise UsageError(f'{what} {text!r} looks like an IPv6 address: write it in brackets, "[{host}]:{port}"')
    else:
        good = _HOST.fullmatch(host) is not None
    if not good:
        raise UsageError(f"{what} {text!r} has no valid host before the port")
    lowest = 0 if free_port else 1
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and lowest <= int(port) <= 65535):
        raise UsageError(f"{what} {text!r} has port {port!r}, which is not a number from {lowest} to 65535")
    return host.lower(), int(port)


def format_endpoint(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address: the inverse of `parse_endpoint`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_url(url: object) -> tuple[str, ...]:
    """Endpoints of a cluster from ``grpc://h1:5001,h2:5002``, in the order given, each once.

    Raises
    ------
    UsageError
        If the scheme is not ``grpc``, an endpoint is malformed or named twice, or there is none.
    """
    if not isinstance(url, str):
        raise UsageError(f'a cluster\'s address must be a string such as "grpc://127.0.0.1:5001", not {_shown(url)}')
    if url.startswith(("grpc+tls://", "grpcs://", "https://")):
        raise UsageError(f"{url!r}: encryption is not built yet; use grpc://host:port inside a trusted network")
    for scheme in _SCHEMES:
        if url.startswith(scheme):
            rest = url[len(scheme) :]
            break
    else:
        raise UsageError(f'{url!r} is not the address of a cluster: write "grpc://host:port,host:port"')
    return _endpoints(rest.rstrip("/").split(","), f"address {url!r}: endpoint")


def _endpoints(given: Iterable[object], what: str) -> tuple[str, ...]:
    seen: dict[str, int] = {}
    for position, text in enumerate(given, start=1):
        endpoint = format_endpoint(*parse_endpoint(text, what=f"{what} {position}"))
        if endpoint in seen:
            raise UsageError(f"{what} {position} is {endpoint!r}, which number {seen[endpoint]} has already")
        seen[endpoint] = position
    return tuple(seen)


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _check_int(name: str, value: object, lowest: int, highest: int) -> int:
    # bool is an int in Python, but `max_entry_size = true` in a file is a mistake.
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} must be a whole number, not {_shown(value)}")
    if not lowest <= value <= highest:
        raise UsageError(f"{name} is {value}: it must be within {lowest} to {highest}")
    return value


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false, not {_shown(value)}")


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
        or a mapping of node id to ``host:port``.
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
        Not built yet: only False is accepted.
    lease_reads
        Let a leader answer linearizable reads without asking the others, while they have confirmed it recently enough.
        Such a read is linearizable only while no node's monotonic clock runs more than 1 % faster or slower than real
        time; without it, reads need no clock at all.
    append_bytes_max
        Payload bytes that one AppendEntries carries, unless a single entry is larger.
    inflight_messages_max
        AppendEntries that may be under way to one follower without an answer.
    inflight_bytes_max
        Payload bytes that may be under way to one follower without an answer.
    uncommitted_bytes_max
        Payload bytes that a leader takes in before a majority has them; beyond it, writes are refused with
        `UnavailableError`.
    segment_bytes_max
        Size at which the log starts a new segment file.
    cache_bytes_max
        Recent entries that the log keeps in memory, in payload bytes.

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
    append_bytes_max: int = 4 * _MIB
    inflight_messages_max: int = 256
    inflight_bytes_max: int = 64 * _MIB
    uncommitted_bytes_max: int = 256 * _MIB
    segment_bytes_max: int = 64 * _MIB
    cache_bytes_max: int = 64 * _MIB
    endpoints: Mapping[int, str] = field(init=False, repr=False, compare=False)
    """Node id to canonical ``host:port``, in ascending id; read only."""

    def __post_init__(self) -> None:
        if not isinstance(self.cluster_id, str) or _CLUSTER_ID.fullmatch(self.cluster_id) is None:
            raise UsageError(
                f"cluster_id must be 1 to 128 letters, digits, '_', '.' or '-' and not start with '.' or '-', "
                f"not {_shown(self.cluster_id)}"
            )
        endpoints = _number_endpoints(self.node_endpoints)
        # A list or dict of the caller's could be changed under us after the check.
        given = self.node_endpoints
        copied = types.MappingProxyType(dict(endpoints)) if isinstance(given, Mapping) else tuple(endpoints.values())
        object.__setattr__(self, "node_endpoints", copied)
        object.__setattr__(self, "endpoints", types.MappingProxyType(endpoints))
        self._check_times()
        self._check_limits()
        self._check_switches()

    def _check_times(self) -> None:
        _check_int("heartbeat_interval_ms", self.heartbeat_interval_ms, 10, 60_000)
        _check_int("election_timeout_ms", self.election_timeout_ms, 20, 600_000)
        if self.election_timeout_ms <= 2 * self.heartbeat_interval_ms:
            raise UsageError(
                f"election_timeout_ms {self.election_timeout_ms} must be above twice heartbeat_interval_ms "
                f"{self.heartbeat_interval_ms}, or one late heartbeat would start an election: "
                f"make it {5 * self.heartbeat_interval_ms} or more"
            )

    def _check_limits(self) -> None:
        _check_int("max_entry_size", self.max_entry_size, 4096, ENTRY_BYTES_MAX)
        _check_int("append_bytes_max", self.append_bytes_max, 1, ENTRY_BYTES_MAX)
        _check_int("inflight_messages_max", self.inflight_messages_max, 1, 65_536)
        _check_int("inflight_bytes_max", self.inflight_bytes_max, 1, 2**40)
        _check_int("uncommitted_bytes_max", self.uncommitted_bytes_max, 1, 2**40)
        _check_int("segment_bytes_max", self.segment_bytes_max, 4096, 2**40)
        _check_int("cache_bytes_max", self.cache_bytes_max, 0, 2**40)
        _check_int("snapshot_distance", self.snapshot_distance, 1, 2**62)
        if self.max_log_size is not None:
            _check_int("max_log_size", self.max_log_size, 1, 2**62)
            self._check_at_least("max_log_size", "max_entry_size")
        self._check_at_least("inflight_bytes_max", "append_bytes_max")
        self._check_at_least("uncommitted_bytes_max", "max_entry_size")

    def _check_at_least(self, name: str, least: str) -> None:
        if getattr(self, name) < getattr(self, least):
            raise UsageError(f"{name} {getattr(self, name)} must not be below {least} {getattr(self, least)}")

    def _check_switches(self) -> None:
        for name in ("enable_pre_vote", "enable_ssl", "lease_reads"):
            _check_bool(name, getattr(self, name))
        if self.enable_ssl:
            raise UsageError("enable_ssl = true: encrypted connections are not built yet; run inside a trusted network")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "cluster") -> RaftClusterConfig:
        """Make a config from the keys and values of a file's table `where`.

        Raises
        ------
        UsageError
            For an unknown or missing key, or as the class itself.
        """
        names = [item.name for item in fields(cls) if item.init]
        _check_keys(values, names, required=("cluster_id", "node_endpoints"), where=where)
        arguments = dict(values)
        given = arguments["node_endpoints"]
        if isinstance(given, Mapping):
            # Keys of a TOML table are strings.
            arguments["node_endpoints"] = {_node_id(key): endpoint for key, endpoint in given.items()}
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
        canonical = format_endpoint(*parse_endpoint(endpoint))
        for node, other in self.endpoints.items():
            if other == canonical:
                return node
        nodes = ", ".join(self.endpoints.values())
        raise UsageError(f"no node of the cluster has the endpoint {canonical!r}: it has {nodes}")


def _node_id(key: object) -> int:
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
        key = int(key)
    return _check_int("node id in node_endpoints", key, 1, NODE_ID_MAX)


def _number_endpoints(given: object) -> dict[int, str]:
    if isinstance(given, Mapping):
        ids = sorted(_node_id(key) for key in given)
        endpoints = dict(zip(ids, _endpoints((given[node] for node in ids), "node_endpoints: number"), strict=True))
    elif isinstance(given, Sequence) and not isinstance(given, str | bytes):
        endpoints = dict(enumerate(_endpoints(given, "node_endpoints: number"), start=1))
    else:
        raise UsageError(
            f'node_endpoints must be a list of "host:port" or a mapping of node id to it, not {_shown(given)}'
        )
    if not 1 <= len(endpoints) <= NODES_MAX:
        raise UsageError(f"node_endpoints names {len(endpoints)} nodes: it must be 1 to {NODES_MAX}")
    return endpoints


def _check_keys(values: object, names: Sequence[str], required: Sequence[str], where: str) -> None:
    if not isinstance(values, Mapping):
        raise UsageError(f"[{where}] must be a table of keys, not {_shown(values)}")
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)
            raise UsageError(f"unknown key {key!r} in [{where}]: did you mean {near[0]!r}?")
    for key in required:
        if key not in values:
            raise UsageError(f"[{where}] has no {key!r}: it must be given")


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """One node: which of the cluster's it is, where it keeps its data, and where it listens.

    Parameters
    ----------
    id
        Its number in ``cluster.endpoints``.
    data_dir
        Directory for its log; made if missing. No two nodes may share one.
    cluster
        What all nodes agree on.
    listen
        ``host:port`` to bind, where that differs from where others find the node; port 0 takes any free one.
        None: the node's endpoint.
    priority
        Of several nodes that could lead, the one with the highest is to; 0 to `PRIORITY_MAX`.
    join
        Whether the node is to be added to a cluster that runs already: it starts without members and waits until
        somebody adds it (``marble members URL --add``). ``node_endpoints`` then says where to find the others.
    joining_endpoint
        ``host:port`` where others will find a joining node; needed unless ``node_endpoints`` has it.

    Raises
    ------
    UsageError
        If the cluster has no node `id` and it is not to join, or a value is malformed.
    """

    id: int
    data_dir: Path
    cluster: RaftClusterConfig
    listen: str | None = None
    priority: int = 0
    join: bool = False
    joining_endpoint: str | None = None

    def __post_init__(self) -> None:
        _check_int("[node] id", self.id, 1, NODE_ID_MAX)
        _check_int("[node] priority", self.priority, 0, PRIORITY_MAX)
        _check_bool("[node] join", self.join)
        if self.joining_endpoint is not None:
            self._check_joining(self.joining_endpoint)
        elif self.id not in self.cluster.endpoints:
            advice = "[node] endpoint must say where others find it" if self.join else "set [node] join to add another"
            nodes = ", ".join(map(str, self.cluster.voters))
            raise UsageError(f"[node] id is {self.id}, but the cluster's nodes are {nodes}: {advice}")
        if not isinstance(self.data_dir, str | Path) or not str(self.data_dir):
            raise UsageError(f"[node] data_dir must name a directory, not {_shown(self.data_dir)}")
        object.__setattr__(self, "data_dir", Path(self.data_dir))
        if self.listen is not None:
            listen = format_endpoint(*parse_endpoint(self.listen, what="[node] listen", free_port=True))
            object.__setattr__(self, "listen", listen)

    def _check_joining(self, given: str) -> None:
        endpoint = format_endpoint(*parse_endpoint(given, what="[node] endpoint"))
        if not self.join:
            raise UsageError(f"[node] endpoint {endpoint!r} beside an id is for a node with join = true")
        for node, other in self.cluster.endpoints.items():
            if (node == self.id) != (other == endpoint):
                raise UsageError(
                    f"[node] {self.id} is to join at {endpoint}, but in node_endpoints node {node} is at {other}"
                )
        object.__setattr__(self, "joining_endpoint", endpoint)

    @property
    def endpoint(self) -> str:
        """Where others find this node."""
        return self.joining_endpoint or self.cluster.endpoints[self.id]

    @property
    def listen_endpoint(self) -> str:
        """Where this node binds."""
        return self.listen if self.listen is not None else self.endpoint


def parse_config(text: str, directory: Path) -> NodeConfig:
    """Read a node's config from TOML. A relative ``data_dir`` starts at `directory`.

    Raises
    ------
    UsageError
        If it is not TOML, or anything in it is unknown, missing or wrong.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"not valid TOML: {error}") from None
    for key in tables:
        if key not in ("node", "cluster"):
            near = difflib.get_close_matches(key, ("node", "cluster"), n=1, cutoff=0.0)[0]
            raise UsageError(f"unknown key {key!r} outside of [node] and [cluster]: did you mean [{near}]?")
    for key in ("node", "cluster"):
        if key not in tables:
            raise UsageError(f"the table [{key}] is missing")
    cluster = RaftClusterConfig.from_mapping(tables["cluster"])
    node = tables["node"]
    _check_keys(
        node, ("id", "endpoint", "data_dir", "listen", "priority", "join"), required=("data_dir",), where="node"
    )
    join = node.get("join", False)
    if join is True and "id" not in node:
        raise UsageError("[node] needs an 'id' to join with: one that no node of the cluster has ever had")
    if join is not True and ("id" in node) == ("endpoint" in node):
        raise UsageError("[node] needs one of 'id' and 'endpoint': which node of the cluster this is")
    if not isinstance(node["data_dir"], str) or not node["data_dir"]:
        raise UsageError(f"[node] data_dir must name a directory, not {_shown(node['data_dir'])}")
    return NodeConfig(
        id=node["id"] if "id" in node else cluster.find_node(node["endpoint"]),
        data_dir=directory / node["data_dir"],
        cluster=cluster,
        listen=node.get("listen"),
        priority=node.get("priority", 0),
        join=join,
        joining_endpoint=node.get("endpoint") if join is True else None,
    )


def load_config(path: str | Path) -> NodeConfig:
    """Read a node's config file (TOML). A relative ``data_dir`` starts at the file's directory.

    Raises
    ------
    UsageError
        If the file cannot be read or anything in it is wrong; the message starts with its path.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a UTF-8 text file") from None
    try:
        return parse_config(text, path.absolute().parent)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
