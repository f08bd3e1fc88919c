"""One node of a cluster in this process, under the names that users of MarbleDB know, in Python spelling.

Rule 1: this is a face. It checks the order of calls, puts the parts together and takes them apart; it decides nothing.

::

    transport = create_arrow_flight_transport("127.0.0.1:5001")
    with create_raft_server(transport, data_dir="data/1") as server:
        server.initialize(RaftClusterConfig("c", ["127.0.0.1:5001", "127.0.0.1:5002", "127.0.0.1:5003"]))
        server.start()
        server.wait_for_leader(10)
        server.database.table("flights").scan(consistency="local")
"""

from __future__ import annotations

import contextlib
import enum
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import pyarrow as pa

from marble._core.entry_batch import Proposal
from marble.config import HttpConfig, NodeConfig, RaftClusterConfig, SecurityConfig
from marble.database import Database
from marble.env import SystemFiles
from marble.errors import UnavailableError, UsageError
from marble.local import LOCAL_GROUP, LocalBackend
from marble.lsm import payload
from marble.lsm.files import TableFiles
from marble.lsm.machine import TableMachine
from marble.metrics import Metrics
from marble.node import GROUP, Node
from marble.operating import Operated, wait_for
from marble.options import NodeOptions, options_of
from marble.promises import IndexFuture
from marble.service import TablesService
from marble.transport.arrow_flight import ArrowFlightTransport, create_arrow_flight_transport
from marble.transport.flight import FlightTransport
from marble.transport.wan import options_for
from marble.transport.watching import WatchedSecurity
from marble.types import EntryKind, Members, Role
from marble.web.authority import token_authority
from marble.web.watch import Watch, Watched

T = TypeVar("T")

STOP_GRACE_S: Final = 1.0
"""How long open calls get to end when a server stops: enough to write the acks that are due. Then they are cancelled."""

STOP_SHARE: Final = 0.6
"""Of the time that a stop may take, how much is for calls and links."""

MESSAGE_OVERHEAD_BYTES: Final = 1024 * 1024
"""What a message between nodes holds beside entries, generously."""


def create_raft_server(
    transport: ArrowFlightTransport | None = None,
    *,
    data_dir: str | os.PathLike[str],
    machine: TableMachine | None = None,
    node_id: int | None = None,
    priority: int = 0,
    join: str | None = None,
    security: SecurityConfig | None = None,
    http: str | HttpConfig | None = None,
) -> RaftServer:
    """Make a server, to be initialized and started.

    Parameters
    ----------
    transport
        Where to listen. None: at the node's endpoint in the cluster's config.
    data_dir
        The node's own directory, made when the server starts.
    machine
        What to apply to, still empty: pass ``TableMachine(on_command=...)`` to be called with every operation that
        `RaftServer.propose_operation` replicates.
    node_id
        Which node of the cluster this is. None: the one whose endpoint is that of `transport`, or the only one.
    priority
        Of several nodes that could lead, the one with the highest is to; 0 to 65,535.
    join
        ``host:port`` where others will find this node, if it is to be added to a cluster that runs already. It then needs a
        `node_id` that no node of the cluster has ever had, starts without members, and waits for `RaftServer.add_node` on
        another one.
    security
        Certificates, tokens and the cluster's secret. None: whoever reaches the port may do anything.
    http
        ``host:port`` for health, metrics and a page in a browser; port 0 takes any free one. None: no such port.
    """
    shown = HttpConfig(http) if isinstance(http, str) else http
    return RaftServer(transport, data_dir, machine or TableMachine(), node_id, priority, join, security, shown)


def server_from_config(config: NodeConfig) -> RaftServer:
    """An initialized server, to be started."""
    server = create_raft_server(
        create_arrow_flight_transport(config.listen_endpoint),
        data_dir=config.data_dir,
        machine=TableMachine(retention=config.retention),
        node_id=config.id,
        priority=config.priority,
        join=config.endpoint if config.join else None,
        security=config.security,
        http=config.http,
    )
    server.initialize(config.cluster)
    return server


class _Phase(enum.Enum):
    """How far a server has come. It only goes forward."""

    MADE = "initialize"
    INITIALIZED = "start"
    STARTED = ""
    STOPPED = "create_raft_server"


class _ServerBackend(LocalBackend):
    """The tables for the process that embeds the server; closing them leaves the server running."""

    def close(self) -> None:
        """Nothing is held: the server owns the node."""


class RaftServer(Operated, Watched):
    """A node that takes part in a cluster. A context manager: leaving it stops the server.

    Made by `create_raft_server`. `initialize`, `start` and `stop` belong to one caller; the rest is thread-safe.
    """

    def __init__(
        self,
        transport: ArrowFlightTransport | None,
        data_dir: str | os.PathLike[str],
        machine: TableMachine,
        node_id: int | None,
        priority: int = 0,
        join: str | None = None,
        security: SecurityConfig | None = None,
        http: HttpConfig | None = None,
    ) -> None:
        self._listen = transport
        self._data_dir = data_dir
        self._machine = machine
        self._node_id = node_id
        self._priority = priority
        self._join = join
        self._security = security or SecurityConfig()
        self._http = http
        self._endpoint = ""
        self._phase = _Phase.MADE
        self._config: RaftClusterConfig | None = None
        self._options: NodeOptions | None = None
        self._node: Node | None = None
        self._own: TableMachine | None = None
        self._flight: FlightTransport | None = None
        self._service: TablesService | None = None
        self._watch: Watch | None = None

    # -- life --------------------------------------------------------------------------------------------------------

    def initialize(self, config: RaftClusterConfig) -> None:
        """Say which cluster this server is of. Opens nothing.

        Raises
        ------
        UsageError
            If it is initialized already, or the cluster has no node at the transport's endpoint.
        """
        if self._phase is not _Phase.MADE:
            raise UsageError("initialize was called before: a server belongs to one cluster")
        if not isinstance(config, RaftClusterConfig):
            raise UsageError(f"initialize takes a RaftClusterConfig, not a {type(config).__name__}")
        config.check_security(self._security)
        node_id, self._endpoint = self._find_node(config)
        endpoints = config.endpoints if self._join is None else {**config.endpoints, node_id: self._endpoint}
        self._options = options_of(config, node_id, endpoints, priority=self._priority, join=self._join is not None)
        self._config, self._phase = config, _Phase.INITIALIZED

    def _find_node(self, config: RaftClusterConfig) -> tuple[int, str]:
        """Which node this is, and where others find it."""
        if self._join is not None:
            if self._node_id is None:
                raise UsageError("pass a node_id to join with: one that no node of the cluster has ever had")
            # The checks are those of a config file.
            found = NodeConfig(
                self._node_id, Path(self._data_dir), config, None, self._priority, True, joining_endpoint=self._join
            )
            return found.id, found.endpoint
        node = self._node_id
        if node is None and self._listen is not None:
            node = config.find_node(self._listen.endpoint)
        elif node is None and len(config.endpoints) == 1:
            node = config.voters[0]
        if node is None:
            raise UsageError("pass a transport or a node_id to create_raft_server: which node of the cluster is this?")
        if node not in config.endpoints:
            raise UsageError(f"node_id is {node}, but the cluster's nodes are {list(config.voters)}")
        return node, config.endpoints[node]

    def start(self) -> None:
        """Recover the log, listen, and take part in the cluster. Does not wait for a leader.

        Raises
        ------
        UsageError
            If `initialize` is missing, the server was started before, or the directory belongs to another node.
        UnavailableError
            If the directory or the port is in use.
        CorruptionError
            If the log is damaged.
        """
        if self._phase is not _Phase.INITIALIZED:
            raise self._out_of_order("start")
        assert self._options is not None
        assert self._config is not None
        metrics = Metrics()
        security = WatchedSecurity(self._security, self._options.node_id, metrics)
        self._phase = _Phase.STOPPED  # It stays so if starting fails.
        with contextlib.ExitStack() as stack:
            listen = self._listen.endpoint if self._listen is not None else self.endpoint
            security = WatchedSecurity(self._security, self._options.node_id, metrics)
            carrier = FlightTransport(
                listen,
                self._options.cluster_id,
                self._options.node_id,
                advertised=self._endpoint,
                options=options_for(
                    self._config.transport,
                    heartbeat_ms=self._config.heartbeat_interval_ms,
                    election_ms=self._config.election_timeout_ms,
                    # The columns beside a payload take less than the smallest payload: at most as much again.
                    entry_bytes_max=2 * self._config.message_bytes_max + MESSAGE_OVERHEAD_BYTES,
                ),
                metrics=metrics,
                security=security,
            )
            stack.callback(carrier.stop, STOP_GRACE_S)
            files = SystemFiles(self._data_dir)
            if self._machine.store is None:
                self._machine.keep_in(TableFiles(files, GROUP))
            own = TableMachine(files=TableFiles(files, LOCAL_GROUP))
            machines = {GROUP: self._machine, LOCAL_GROUP: own}
            node = Node(self._options, files, machines, carrier, metrics=metrics, alone=(LOCAL_GROUP,))
            stack.callback(node.stop)
            may = token_authority(security.current, metrics)
            watch = Watch(node, self.node_id, self._data_dir, carrier, http=self._http, authorize=may)
            stack.callback(watch.stop)
            backend = LocalBackend(node, self._machine, lease_reads=self._config.lease_reads)
            service = TablesService(backend, watch, lambda: security.current().relay_credentials())

            def unreachable(peer: int) -> None:
                node.unreachable(peer)
                service.unreachable(peer)

            def way_lost(peer: int, carried: bool) -> None:
                if carried:
                    node.way_lost(peer)
                service.unreachable(peer)

            node.start()
            carrier.start(
                node.receive,
                service,
                unreachable=unreachable,
                way_lost=way_lost,
                failed=node.fail,
                acquaintances=node.acquaintances,
            )
            watch.start()
            if self._listen is not None:
                self._listen.attach(carrier)
            stack.pop_all()
        self._node, self._flight, self._service, self._own, self._watch = node, carrier, service, own, watch
        self._phase = _Phase.STARTED

    def reload(self) -> None:
        """Look at the files of certificates, tokens and the secret now, not at the next interval. Returns at once."""
        if self._flight is not None:
            self._flight.reload()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End all calls and streams, leave the cluster's traffic, close the log. Idempotent.

        What clients have under way and is not decided yet ends in OutcomeUnknownError.

        Parameters
        ----------
        timeout_s
            Within how many seconds.

        Raises
        ------
        UnavailableError
            If something did not end in time (a disk that hangs). The data directory then stays locked.
        """
        deadline = time.monotonic() + timeout_s
        started, self._phase = self._phase is _Phase.STARTED, _Phase.STOPPED
        if not started:
            return
        assert self._node is not None
        assert self._flight is not None
        assert self._service is not None
        assert self._watch is not None
        self._watch.stop()
        self._service.stop()
        # On a busy machine also what was cancelled takes its time; the log is closed in what is left.
        ended = self._flight.stop(timeout_s * STOP_SHARE, min(STOP_GRACE_S, timeout_s / 4))
        self._node.stop(max(0.1, deadline - time.monotonic()))
        if not ended:
            raise UnavailableError(f"a call at node {self.node_id} did not end in time; its thread is left behind")

    def __enter__(self) -> RaftServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def is_running(self) -> bool:
        """True from `start` to `stop`, unless the engine had to give up: then `failure` says why."""
        return self._phase is _Phase.STARTED and self._node is not None and self._node.is_running

    @property
    def failure(self) -> BaseException | None:
        """What made the engine give up, if it did: a failed disk, or an error of marble's."""
        return None if self._node is None else self._node.failure

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the engine has ended, by `stop` or by a failure. False after `timeout_s` seconds."""
        return self._running("wait").stopped.wait(timeout_s)

    # -- the cluster -------------------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """``host:port`` where others find this node."""
        if self._options is None:
            raise self._out_of_order("endpoint")
        return self._endpoint

    @property
    def node_id(self) -> int:
        """Which node of the cluster this is."""
        if self._options is None:
            raise self._out_of_order("node_id")
        return self._options.node_id

    def get_role(self) -> Role:
        """What this node is in its group now."""
        return self._running("get_role").role

    def get_leader_endpoint(self) -> str | None:
        """``host:port`` of the leader as far as this node knows."""
        return self._running("get_leader_endpoint").leader_endpoint

    def wait_for_leader(self, timeout_s: float = 10.0) -> str:
        """Wait until this node knows a leader; its endpoint. Raises UnavailableError after `timeout_s` seconds."""
        node = self._running("wait_for_leader")
        leader = node.wait_for_leader(timeout_s)
        # It may be gone again by now, or be a node that has joined and of which only the id is known yet.
        return node.endpoints.get(leader, f"node {leader}")

    def trigger_election(self) -> None:
        """Let this node stand for election now. A healthy leader is not disturbed, if pre-votes are on."""
        self._running("trigger_election").campaign()

    def get_cluster_status(self) -> dict[str, Any]:
        """What this node knows of itself and of the cluster, as values for JSON."""
        return self._running("get_cluster_status").status()

    def get_members(self) -> Members:
        """Who takes part in the cluster, as far as this node has applied it; `get_cluster_status` says where they are."""
        return self._running("get_members").members()

    def propose_operation(
        self, operation: bytes | bytearray | memoryview | pa.Buffer | Proposal, timeout_s: float = 10.0
    ) -> int:
        """Replicate `operation` and return the index at which it is committed, durable and applied here.

        Parameters
        ----------
        operation
            Bytes, which every replica hands to its machine's ``on_command``; or a Proposal of any kind.
        timeout_s
            How long to wait, in seconds.

        Raises
        ------
        NotLeaderError
            If this node does not lead; it names the leader. Nothing was replicated.
        UnavailableError
            If no more is taken now. Nothing was replicated.
        OutcomeUnknownError
            If it was not decided in time.
        UsageError
            If `operation` is too large.
        """
        node = self._running("propose_operation")
        if not isinstance(operation, Proposal):
            if not isinstance(operation, bytes | bytearray | memoryview | pa.Buffer):
                raise UsageError(f"an operation must be bytes or a Proposal, not a {type(operation).__name__}")
            operation = Proposal(EntryKind.COMMAND, 0, payload.encode_command(bytes(operation)))
        return int(wait_for(node.propose(operation, future=IndexFuture()), timeout_s, "the operation"))

    @property
    def database(self) -> Database:
        """The tables, for this process: reads on any node, writes while this node leads (else NotLeaderError).

        Tables of this node alone (``create_table(..., replicated=False)``) are written whoever leads.
        """
        node = self._running("database")
        return Database(_ServerBackend(node, self._machine, self._own, lease_reads=node.options.lease_reads))

    def _watching(self, what: str) -> Watch:
        self._running(what)
        assert self._watch is not None
        return self._watch

    def _running(self, what: str) -> Node:
        if self._phase is not _Phase.STARTED or self._node is None:
            raise self._out_of_order(what)
        return self._node

    def _out_of_order(self, what: str) -> UsageError:
        if self._phase is _Phase.STOPPED:
            return UsageError(f"{what}: the server was stopped; make another one with create_raft_server")
        if self._phase is _Phase.STARTED:
            return UsageError(f"{what}: the server was started before")
        return UsageError(f"{what}: call {self._phase.value}() first")
