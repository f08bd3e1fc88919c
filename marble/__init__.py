"""marble: replicated Arrow tables inside a Python process.

A write is a ``RecordBatch``; Raft orders it, a majority makes it durable, every replica applies it, and it is read back as Arrow.
`open` embeds a database in this process, `connect` reaches a cluster, `create_raft_server` runs one of its nodes.

The floors; imports only run downwards, and modules of one floor never import each other (``tests/test_layering.py``):

==  =====================================================================================================================  =========
``testing`` stands beside them: it imports floors 0 to 4, and nothing but ``simulate`` imports it.
"""

from marble.client import connect
from marble.config import RaftClusterConfig, SecurityConfig, TlsConfig, TokensConfig
from marble.database import Database, Scan, Table, Transaction
from marble.errors import (
    CorruptionError,
    ForbiddenError,
    InvariantError,
    MarbleError,
    NotLeaderError,
    OutcomeUnknownError,
    ProtocolError,
    SessionExpiredError,
    UnauthenticatedError,
    UnavailableError,
    UsageError,
)
from marble.local import open  # noqa: A004
from marble.logs import initialize_logging
from marble.server import RaftServer, create_raft_server
from marble.transport.arrow_flight import create_arrow_flight_transport
from marble.types import Change, ChangeKind, Members, Transition

__version__ = "0.1.0"

__all__ = [
    "Change",
    "ChangeKind",
    "CorruptionError",
    "Database",
    "ForbiddenError",
    "InvariantError",
    "MarbleError",
    "Members",
    "NotLeaderError",
    "OutcomeUnknownError",
    "ProtocolError",
    "RaftClusterConfig",
    "RaftServer",
    "Scan",
    "SecurityConfig",
    "SessionExpiredError",
    "Table",
    "TlsConfig",
    "TokensConfig",
    "Transaction",
    "Transition",
    "UnauthenticatedError",
    "UnavailableError",
    "UsageError",
    "connect",
    "create_arrow_flight_transport",
    "create_raft_server",
    "initialize_logging",
    "open",
]
