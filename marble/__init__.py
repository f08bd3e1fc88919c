"""marble: replicated Arrow tables inside a Python process.

A write is a ``RecordBatch``; Raft orders it, a majority makes it durable, every replica applies it, and it is read back as Arrow.
`open` embeds a database in this process, `connect` reaches a cluster, `create_raft_server` runs one of its nodes.

The floors; imports only run downwards, and modules of one floor never import each other (``tests/test_layering.py``):

==  ==============================================================================================================  =========
8   cli demo simulate backup_commands status_commands watch certs                                                   commands
7   server service actions operating                                                                                ports
6   local client contacts vigil orders admin backup doctor                                                          near, far
5   node engine desk workers status stopwatch web                                                                   threads
4   archive checkpoint driver compacting fetching groups identity jobs options pacing promises rebuilding recovery  turns
    snapshotting transfer verify
3   transport                                                                                                       Flight
2   raft | logstore | lsm | database | members                                                                      log, LSM
1   _core rows                                                                                                      kernels
0   types errors table_options schema requests filters env metrics sampling machine config sessions writing logs    words
    memory
==  ==============================================================================================================  =========

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
