"""One node's own config, the table ``[node]``, and the file that has it beside the cluster's."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from marble.config.cluster import RaftClusterConfig
from marble.config.endpoints import addresses_of, canonical_endpoint, format_endpoint, parse_endpoint
from marble.config.http import HttpConfig
from marble.config.security import SecurityConfig
from marble.config.values import check_bool, check_int, check_keys, read_table, shown
from marble.errors import UsageError
from marble.logs import check_format, check_level
from marble.types import NODE_ID_MAX

PRIORITY_MAX: Final = 65_535
"""A node's priority travels as uint16."""

_KEYS: Final = (
    "id",
    "endpoint",
    "data_dir",
    "listen",
    "priority",
    "join",
    "tls",
    "tokens",
    "secret_file",
    "http",
    "retention",
    "log_level",
    "log_format",
)


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
        None: the node's endpoint. A node with several addresses needs it.
    priority
        Of several nodes that could lead, the one with the highest is to; 0 to `PRIORITY_MAX`.
    join
        Whether the node is to be added to a cluster that runs already: it starts without members and waits until
        somebody adds it (``marble members URL --add``). ``node_endpoints`` then says where to find the others.
    joining_endpoint
        ``host:port`` where others will find a joining node; needed unless ``node_endpoints`` has it.
    security
        Who may connect: ``[node.tls]``, ``[node.tokens]`` and ``secret_file``.
    http
        Health, metrics and a page over HTTP: ``[node.http]``. None: there is no such port.
    retention
        For how many entries back the tables can be read as they were (``at_index``); 0 to 2**32. It keeps their memory and files.
    log_level
        What ``marble serve`` logs: "DEBUG", "INFO", "WARNING", "ERROR" or "CRITICAL", in any case.
    log_format
        How: "text", or "json": one object a line.

    Raises
    ------
    UsageError
        If the cluster has no node `id` and it is not to join, a value is malformed, or only one of ``enable_ssl`` and
        ``[node.tls]`` is there.
    """

    id: int
    data_dir: Path
    cluster: RaftClusterConfig
    listen: str | None = None
    priority: int = 0
    join: bool = False
    joining_endpoint: str | None = None
    security: SecurityConfig = field(default_factory=SecurityConfig)
    http: HttpConfig | None = None
    retention: int = 0
    log_level: str = "INFO"
    log_format: str = "text"

    def __post_init__(self) -> None:
        check_int("[node] id", self.id, 1, NODE_ID_MAX)
        check_int("[node] priority", self.priority, 0, PRIORITY_MAX)
        check_bool("[node] join", self.join)
        check_int("[node] retention", self.retention, 0, 2**32)
        if self.joining_endpoint is not None:
            self._check_joining(self.joining_endpoint)
        elif self.id not in self.cluster.endpoints:
            advice = "[node] endpoint must say where others find it" if self.join else "set [node] join to add another"
            nodes = ", ".join(map(str, self.cluster.voters))
            raise UsageError(f"[node] id is {self.id}, but the cluster's nodes are {nodes}: {advice}")
        if not isinstance(self.data_dir, str | Path) or not str(self.data_dir):
            raise UsageError(f"[node] data_dir must name a directory, not {shown(self.data_dir)}")
        object.__setattr__(self, "data_dir", Path(self.data_dir))
        if self.listen is not None:
            listen = format_endpoint(*parse_endpoint(self.listen, what="[node] listen", free_port=True))
            object.__setattr__(self, "listen", listen)
        elif len(addresses_of(self.endpoint)) > 1:
            raise UsageError(
                f"[node] listen is missing: node {self.id} has several addresses, {self.endpoint}, and listens at one, "
                "which may be that of all interfaces, 0.0.0.0 or [::]"
            )
        self.cluster.check_security(self.security)
        check_level(self.log_level, "[node] log_level")
        check_format(self.log_format, "[node] log_format")

    def _check_joining(self, given: str) -> None:
        endpoint = canonical_endpoint(given, what="[node] endpoint")
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
    except (ValueError, RecursionError) as error:
        # Not only TOMLDecodeError: a number of thousands of digits and lists in lists without end have errors of their own.
        raise UsageError(f"not valid TOML: {str(error)[:200]}") from None
    for key in tables:
        if key not in ("node", "cluster"):
            near = difflib.get_close_matches(key, ("node", "cluster"), n=1, cutoff=0.0)[0]
            raise UsageError(f"unknown key {key!r} outside of [node] and [cluster]: did you mean [{near}]?")
    for key in ("node", "cluster"):
        if key not in tables:
            raise UsageError(f"the table [{key}] is missing")
    cluster = RaftClusterConfig.from_mapping(tables["cluster"])
    node = tables["node"]
    check_keys(node, _KEYS, required=("data_dir",), where="node")
    join = node.get("join", False)
    if join is True and "id" not in node:
        raise UsageError("[node] needs an 'id' to join with: one that no node of the cluster has ever had")
    if join is not True and ("id" in node) == ("endpoint" in node):
        raise UsageError("[node] needs one of 'id' and 'endpoint': which node of the cluster this is")
    if not isinstance(node["data_dir"], str) or not node["data_dir"]:
        raise UsageError(f"[node] data_dir must name a directory, not {shown(node['data_dir'])}")
    return NodeConfig(
        id=node["id"] if "id" in node else cluster.find_node(node["endpoint"]),
        data_dir=directory / node["data_dir"],
        cluster=cluster,
        listen=node.get("listen"),
        priority=node.get("priority", 0),
        join=join,
        joining_endpoint=node.get("endpoint") if join is True else None,
        security=SecurityConfig.from_mapping(node, directory),
        http=read_table(HttpConfig, node["http"], "node.http") if "http" in node else None,
        retention=node.get("retention", 0),
        log_level=node.get("log_level", "INFO"),
        log_format=node.get("log_format", "text"),
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
