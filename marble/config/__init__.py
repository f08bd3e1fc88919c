"""What a cluster and a node are told before they start, and the check of every word of it.

Rule 1: a config object that exists is valid. Whatever is wrong is a `UsageError` that names the key, what it holds,
what it may hold and, for a key that does not exist, the nearest one that does.

- Limits carry their unit last (``_ms``, ``_bytes_max``); ``snapshot_distance``, ``max_log_size`` and ``max_entry_size``
  keep the names under which users of MarbleDB know them.
- A module for each table of the file; `read_table` makes a dataclass of one, whose fields are its keys.
- A switch for something that is not built is refused when it is turned, never ignored.
"""

from marble.config.cluster import ENTRY_BYTES_MAX, HEARTBEAT_TICKS, NODES_MAX, RaftClusterConfig
from marble.config.endpoints import (
    ADDRESSES_MAX,
    DEFAULT_PORT,
    addresses_of,
    canonical_endpoint,
    format_endpoint,
    is_tls,
    parse_endpoint,
    parse_url,
)
from marble.config.http import HttpConfig
from marble.config.node import PRIORITY_MAX, NodeConfig, load_config, parse_config
from marble.config.security import SecurityConfig, TlsConfig, TokensConfig
from marble.config.transport import TransportConfig

__all__ = [
    "ADDRESSES_MAX",
    "DEFAULT_PORT",
    "ENTRY_BYTES_MAX",
    "HEARTBEAT_TICKS",
    "NODES_MAX",
    "PRIORITY_MAX",
    "HttpConfig",
    "NodeConfig",
    "RaftClusterConfig",
    "SecurityConfig",
    "TlsConfig",
    "TokensConfig",
    "TransportConfig",
    "addresses_of",
    "canonical_endpoint",
    "format_endpoint",
    "is_tls",
    "load_config",
    "parse_config",
    "parse_endpoint",
    "parse_url",
]
