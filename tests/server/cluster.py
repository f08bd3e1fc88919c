"""Clusters of real servers in this process, over loopback, for tests."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from marble.config import HttpConfig, RaftClusterConfig
from marble.demo.processes import find_free_ports
from marble.errors import MarbleError, UnavailableError
from marble.lsm.machine import TableMachine
from marble.server import RaftServer, create_arrow_flight_transport, create_raft_server
from marble.transport import wire
from marble.transport.faults import from_flight_error
from marble.transport.wire import Ack, decode_ack
from marble.types import Role

WAIT_S = 30.0
"""A test that waits longer has failed. Nothing takes nearly as long, but the machine may be busy."""

PAST_ENTRIES = 50
"""How far back every server can read."""

SCHEMA = pa.schema([pa.field("id", pa.int64()), pa.field("name", pa.string())])


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """Wait until `condition` gives something true, and return it: for what a node does and signals to nobody."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come about within {timeout_s} s"
        pause.wait(0.005)
    return value


def free_endpoints(count: int) -> list[str]:
    """Endpoints on which nobody listened a moment ago, of ports that the kernel gives to nobody who asks for any, or calls somebody."""
    return [f"127.0.0.1:{port}" for port in find_free_ports(count)]


def rows(first: int, end: int, tag: str = "x") -> pa.RecordBatch:
    ids = range(first, end)
    return pa.record_batch({"id": list(ids), "name": [f"{tag}{i}" for i in ids]}, schema=SCHEMA)


class Cluster:
    """Servers of one cluster; `start` and `stop_node` as one likes."""

    http: Mapping[int, HttpConfig] = {}
    """The HTTP ports of nodes that have one."""

    def __init__(self, directory: Path, nodes: int = 3, **settings: Any) -> None:
        self.directory = directory
        self.settings = {"election_timeout_ms": 600, "heartbeat_interval_ms": 100} | settings
        self.commands: dict[int, list[tuple[int, bytes]]] = {}
        self.servers: dict[int, RaftServer] = {}
        self.joined: dict[int, str] = {}
        self._clients: dict[str, flight.FlightClient] = {}
        for attempt in range(5):
            self.config = RaftClusterConfig("test", free_endpoints(nodes), **self.settings)
            try:
                for node in self.config.voters:
                    self.start_node(node)
                break
            except UnavailableError:
                # Somebody else took a port between our finding and our using it.
                self.stop()
                if attempt == 4:
                    raise
                self.directory = directory / f"attempt{attempt + 2}"
        eventually(self._elect, "the first leader")
        self.leader()

    def _elect(self) -> bool:
        """Whether there is a leader; otherwise call for one, as every test would first wait for the election timeout."""
        pause = threading.Event()
        for _ in range(10):  # The links to the others may not stand yet.
            if any(server.get_leader_endpoint() is not None for server in self.servers.values()):
                return True
            pause.wait(0.005)
        self.servers[1].trigger_election()
        return False

    def join_node(self, node: int) -> RaftServer:
        """Start a node that waits to be added, or that was added; `joined` says where it is."""
        for attempt in range(5):
            try:
                self.joined.setdefault(node, free_endpoints(1)[0])
                return self.start_node(node)
            except UnavailableError:
                del self.joined[node]
                if attempt == 4:
                    raise
        raise AssertionError

    def start_node(self, node: int) -> RaftServer:
        commands = self.commands[node] = []
        machine = TableMachine(
            on_command=lambda index, operation: commands.append((index, operation)), retention=PAST_ENTRIES
        )
        join = self.joined.get(node)
        transport = create_arrow_flight_transport(join or self.config.endpoints[node])
        server = create_raft_server(
            transport,
            data_dir=self.directory / str(node),
            machine=machine,
            node_id=node if join else None,
            join=join,
            http=self.http.get(node),
        )
        server.initialize(self.config)
        server.start()
        self.servers[node] = server
        return server

    def stop_node(self, node: int) -> None:
        self.servers.pop(node).stop()

    def stop(self) -> None:
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        while self.servers:
            self.servers.popitem()[1].stop()

    def leader(self) -> int:
        """Id of the leader on which all running nodes agree."""

        def agreed() -> int | None:
            known = {server.get_leader_endpoint() for server in self.servers.values()}
            leading = [node for node, server in self.servers.items() if server.get_role() is Role.LEADER]
            return (
                leading[0]
                if len(leading) == 1 and known == {self.joined.get(leading[0]) or self.config.endpoints[leading[0]]}
                else None
            )

        return int(eventually(agreed, "a leader known to all"))

    def follower(self) -> int:
        leader = self.leader()
        return next(node for node in sorted(self.servers) if node != leader)

    def client(self, node: int) -> flight.FlightClient:
        endpoint = self.joined.get(node) or self.config.endpoints[node]
        if endpoint not in self._clients:
            self._clients[endpoint] = wire.connect(endpoint)
        return self._clients[endpoint]

    def act(
        self, node: int, name: str, body: Any = b"", *, forward: bool = True, stamp: wire.Stamp | None = None
    ) -> Any:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        call = options(forward=forward, stamp=stamp)
        results = list(self.client(node).do_action(flight.Action(name, data), call))
        assert len(results) == 1
        return json.loads(results[0].body.to_pybytes())

    def create_table(self, name: str, schema: pa.Schema = SCHEMA, key: Sequence[str] = ("id",), node: int = 1) -> Any:
        return self.act(node, "create_table", {"name": name, "key": list(key), "schema": wire.encode_schema(schema)})

    def put(
        self,
        node: int,
        path: Sequence[str],
        batches: Sequence[pa.RecordBatch],
        stamps: Sequence[wire.Stamp] = (),
        **call: Any,
    ) -> list[Ack]:
        """Write batches as README shows; an ack for each."""
        descriptor = flight.FlightDescriptor.for_path(*path)
        writer, reader = self.client(node).do_put(descriptor, batches[0].schema, options(**call))
        with writer:
            for batch, stamp in itertools.zip_longest(batches, stamps):
                if stamp is None:
                    writer.write_batch(batch)
                else:
                    writer.write_with_metadata(batch, pa.py_buffer(wire.encode_stamp(stamp)))
            writer.done_writing()
            return [decode_ack(reader.read()) for _ in batches]

    def get(self, node: int, ticket: bytes) -> pa.Table:
        return self.client(node).do_get(flight.Ticket(ticket), options()).read_all()

    def last_index(self) -> int:
        return int(self.servers[self.leader()].get_cluster_status()["last_index"])


def options(
    *, forward: bool = True, timeout_s: float = WAIT_S, stamp: wire.Stamp | None = None
) -> flight.FlightCallOptions:
    return wire.call_options(timeout_s, forward=forward, stamp=stamp)


@contextlib.contextmanager
def refused(kind: type[MarbleError], match: str = "") -> Iterator[list[MarbleError]]:
    """Expect a Flight error that says that it is a `kind`."""
    told: list[MarbleError] = []
    with pytest.raises((pa.ArrowException, flight.FlightError)) as caught:
        yield told
    error = from_flight_error(caught.value)
    told.append(error)
    assert type(error) is kind, repr(error)
    assert match in str(error)
