"""Starting and stopping: the order of calls, streams that are open, leaders that go, directories that stay."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as flight
import pytest
from server.cluster import SCHEMA, WAIT_S, Cluster, eventually, free_endpoints, options, refused, rows

from marble.client import connect as marble_connect
from marble.config import ENTRY_BYTES_MAX, NodeConfig, RaftClusterConfig
from marble.errors import NotLeaderError, OutcomeUnknownError, UnavailableError, UsageError
from marble.local import open as marble_open
from marble.logstore.log import LogOptions
from marble.requests import ScanRequest
from marble.server import create_arrow_flight_transport, create_raft_server, server_from_config
from marble.transport import wire
from marble.transport.faults import from_flight_error
from marble.transport.tickets import encode_ticket
from marble.transport.wire import Ack, decode_ack
from marble.types import Role

MakeCluster = Callable[..., Cluster]


def _one_node(**settings: int) -> RaftClusterConfig:
    return RaftClusterConfig("one", free_endpoints(1), **settings)


# -- the face ----------------------------------------------------------------------------------------------------------


def test_a_server_of_one_node_leads_at_once_and_keeps_its_tables(tmp_path: Path) -> None:
    config = _one_node()
    with create_raft_server(create_arrow_flight_transport(config.endpoints[1]), data_dir=tmp_path) as server:
        server.initialize(config)
        assert not server.is_running()
        server.start()
        assert server.is_running()
        assert server.get_role() is Role.LEADER
        assert server.wait_for_leader(WAIT_S) == server.get_leader_endpoint() == server.endpoint == config.endpoints[1]
        assert server.get_cluster_status()["role"] == "leader"
        table = server.database.create_table("t", SCHEMA, ["id"])
        written = table.write(rows(0, 10))
        assert server.propose_operation(b"x") == written + 1
        server.database.close()  # The server goes on.
        assert server.is_running()
    assert not server.is_running()
    with create_raft_server(data_dir=tmp_path) as again:
        again.initialize(config)
        again.start()
        assert again.database.table("t").scan().to_table().equals(pa.Table.from_batches([rows(0, 10)]))


def test_calls_out_of_order_say_which_call_is_missing(tmp_path: Path) -> None:
    config = _one_node()
    server = create_raft_server(data_dir=tmp_path)
    needs_start: list[tuple[str, Callable[[], object]]] = [
        ("get_role", server.get_role),
        ("get_leader_endpoint", server.get_leader_endpoint),
        ("get_cluster_status", server.get_cluster_status),
        ("trigger_election", server.trigger_election),
        ("wait_for_leader", lambda: server.wait_for_leader(0.0)),
        ("propose_operation", lambda: server.propose_operation(b"x")),
        ("database", lambda: server.database),
        ("wait", lambda: server.wait(0.0)),
    ]
    for name, call in [("start", server.start), ("endpoint", lambda: server.endpoint), *needs_start]:
        with pytest.raises(UsageError, match=rf"{name}.*initialize\(\)"):
            call()
    with pytest.raises(UsageError, match="takes a RaftClusterConfig"):
        server.initialize({"cluster_id": "x"})  # type: ignore[arg-type]
    server.initialize(config)
    with pytest.raises(UsageError, match="initialize was called before"):
        server.initialize(config)
    for name, call in needs_start:
        with pytest.raises(UsageError, match=rf"{name}.*start\(\)"):
            call()
    server.start()
    with pytest.raises(UsageError, match="started before"):
        server.start()
    server.stop()
    server.stop()
    for name, call in [("start", server.start), *needs_start]:
        with pytest.raises(UsageError, match=rf"{name}.*create_raft_server"):
            call()
    create_raft_server(data_dir=tmp_path).stop()  # One that never started has nothing to stop.


def test_a_server_finds_out_which_node_it_is(tmp_path: Path) -> None:
    endpoints = free_endpoints(2)
    config = RaftClusterConfig("two", {4: endpoints[0], 9: endpoints[1]})
    server = create_raft_server(create_arrow_flight_transport(endpoints[1].upper()), data_dir=tmp_path)
    server.initialize(config)
    assert (server.node_id, server.endpoint) == (9, endpoints[1])
    with pytest.raises(UsageError, match=endpoints[0]):
        create_raft_server(create_arrow_flight_transport("127.0.0.1:1"), data_dir=tmp_path).initialize(config)
    with pytest.raises(UsageError, match="which node"):
        create_raft_server(data_dir=tmp_path).initialize(config)
    with pytest.raises(UsageError, match=r"\[4, 9\]"):
        create_raft_server(data_dir=tmp_path, node_id=1).initialize(config)
    with pytest.raises(UsageError, match="port"):
        create_arrow_flight_transport("localhost")


def test_a_config_makes_an_initialized_server(tmp_path: Path) -> None:
    config = _one_node()
    with server_from_config(NodeConfig(1, tmp_path, config, listen="127.0.0.1:0")) as server:
        server.start()
        assert server.get_role() is Role.LEADER


def test_what_is_in_use_is_said_and_given_back(tmp_path: Path) -> None:
    config = _one_node()
    with create_raft_server(data_dir=tmp_path / "a") as server:
        server.initialize(config)
        server.start()
        same_port = create_raft_server(data_dir=tmp_path / "b")
        same_port.initialize(config)
        with pytest.raises(UnavailableError, match=config.endpoints[1]):
            same_port.start()
        same_directory = create_raft_server(data_dir=tmp_path / "a")
        same_directory.initialize(RaftClusterConfig("one", other := free_endpoints(1)))
        with pytest.raises(UnavailableError, match="in use by another marble node"):
            same_directory.start()
        _bind(other[0])
    with create_raft_server(data_dir=tmp_path / "a") as stranger:
        stranger.initialize(RaftClusterConfig("another", config.endpoints))
        with pytest.raises(UsageError, match="belongs to"):
            stranger.start()
        assert not stranger.is_running()
        _bind(config.endpoints[1])


def test_operations_are_checked_and_belong_to_the_leader(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(max_entry_size=64 * 1024, append_bytes_max=64 * 1024)
    leader, follower = cluster.servers[cluster.leader()], cluster.servers[cluster.follower()]
    before = cluster.last_index()
    with pytest.raises(NotLeaderError) as caught:
        follower.propose_operation(b"x")
    assert caught.value.leader == leader.endpoint
    with pytest.raises(UsageError, match="max_entry_size"):
        leader.propose_operation(b"x" * 64 * 1024)
    with pytest.raises(UsageError, match="not a str"):
        leader.propose_operation("x")  # type: ignore[arg-type]
    assert cluster.last_index() == before
    for operation in (b"one", bytearray(b"two"), memoryview(b"three"), pa.py_buffer(b"four")):
        leader.propose_operation(operation)
    last = cluster.last_index()
    for node, commands in cluster.commands.items():
        eventually(lambda commands=commands: commands and commands[-1][0] == last, f"all operations at node {node}")
        assert [operation for _, operation in commands] == [b"one", b"two", b"three", b"four"]


# -- stopping ----------------------------------------------------------------------------------------------------------


def _bind(endpoint: str) -> None:
    """Prove that the port of `endpoint` is free."""
    host, port = endpoint.rsplit(":", 1)
    with socket.socket() as probe:
        # As a server would: connections that are closing do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, int(port)))
        probe.listen()


def test_a_server_stops_in_time_with_streams_open(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.create_table("t")
    # More messages than gRPC takes in advance, so that the scan stands still while nobody reads it.
    wide = pa.record_batch({"id": pa.array(range(64), pa.int64()), "name": ["x" * 65536] * 64}, schema=SCHEMA)
    for i in range(20):
        cluster.put(1, ["t"], [wide.set_column(0, "id", pa.array(range(64 * i, 64 * i + 64), pa.int64()))])
    leader, follower = cluster.leader(), cluster.follower()
    open_streams = []
    for node in (leader, follower):
        client = wire.connect(cluster.config.endpoints[node])
        put = client.do_put(flight.FlightDescriptor.for_path("t"), SCHEMA)
        put[0].write_batch(rows(0, 1))
        assert decode_ack(put[1].read()).error_code is None
        silent_put = client.do_put(flight.FlightDescriptor.for_path("t"), SCHEMA)
        lookup = client.do_exchange(flight.FlightDescriptor.for_path("t", "get"))
        lookup[0].begin(pa.schema([("id", pa.int64())]))
        scan = client.do_get(flight.Ticket(b"t"))
        taken = scan.read_chunk().data.num_rows
        open_streams.append((client, put, silent_put, lookup, scan, taken))
    for node in (follower, leader):
        server = cluster.servers.pop(node)
        # It raises if anything has not ended by then.
        server.stop(timeout_s=WAIT_S)
        assert not server.is_running()
        _bind(cluster.config.endpoints[node])
    for _, put, silent_put, lookup, scan, taken in open_streams:
        for ends in (put[0].close, silent_put[0].close, lookup[1].read_chunk, lookup[0].close):
            with pytest.raises((pa.ArrowException, OSError)):
                ends()
        with contextlib.suppress(pa.ArrowException, OSError):
            # On a busy machine gRPC may have taken in all of it; what is no error must be whole.
            taken += scan.read_all().num_rows
            assert taken == 20 * 64
    cluster.stop()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("marble-")], names


def test_a_server_without_a_leader_stops_in_time_though_calls_wait(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.create_table("t")
    alone = cluster.follower()
    for node in [node for node in cluster.servers if node != alone]:
        cluster.stop_node(node)
    client = cluster.client(alone)
    errors: list[BaseException] = []

    def read() -> None:
        try:
            client.do_get(flight.Ticket(b"t"), options()).read_all()
        except (pa.ArrowException, flight.FlightError) as error:
            errors.append(from_flight_error(error))

    def create() -> None:
        try:
            cluster.create_table("u", node=alone)
        except (pa.ArrowException, flight.FlightError) as error:
            errors.append(from_flight_error(error))

    writer, reader = client.do_put(flight.FlightDescriptor.for_path("t"), SCHEMA, options())
    writer.write_batch(rows(0, 1))
    threads = [threading.Thread(target=read), threading.Thread(target=create)]
    for thread in threads:
        thread.start()
    server = cluster.servers[alone]
    assert server._service is not None
    assert server._flight is not None
    flights, intakes = server._flight, server._service._intakes
    eventually(lambda: flights._calls == 3 and any(each._window for each in intakes), "three calls that wait")
    began = time.monotonic()
    cluster.stop_node(alone)
    assert time.monotonic() - began < 10.0
    for thread in threads:
        thread.join(WAIT_S)
    assert [type(error) for error in errors] == [UnavailableError] * 2
    # The batch was never sent anywhere, or its answer can no longer come: either way it says so.
    assert decode_ack(reader.read()).error_code in ("unavailable", "outcome_unknown")
    with pytest.raises((pa.ArrowException, flight.FlightError)):
        writer.close()


# -- failover ----------------------------------------------------------------------------------------------------------


def test_writes_go_on_when_the_leader_stops(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.create_table("t")
    before = cluster.leader()
    cluster.put(before, ["t"], [rows(0, 10)])
    cluster.stop_node(before)
    after = cluster.leader()
    assert after != before
    for node in cluster.servers:
        (ack,) = cluster.put(node, ["t"], [rows(10 * node, 10 * node + 10)])
        assert ack.error_code is None
    for node in cluster.servers:
        ids = cluster.get(node, b"t").column("id").to_pylist()
        assert ids == sorted({*range(10), *(10 * each + i for each in cluster.servers for i in range(10))})
    # The old leader comes back as a follower with everything.
    cluster.start_node(before)
    last = cluster.last_index()
    eventually(lambda: cluster.act(before, "status")["applied_index"] >= last, "the old leader to catch up")
    assert cluster.get(before, encode_ticket("t", ScanRequest(consistency="local"))).equals(cluster.get(after, b"t"))


class _Stream:
    """One open stream of writes at a node, with acks read by a thread, as an application has it."""

    def __init__(self, cluster: Cluster, node: int) -> None:
        descriptor = flight.FlightDescriptor.for_path("t")
        self._writer, self._reader = cluster.client(node).do_put(descriptor, SCHEMA, options(timeout_s=2 * WAIT_S))
        self.acks: list[Ack] = []
        self.sent = 0
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def send(self) -> None:
        self._writer.write_batch(rows(self.sent, self.sent + 1))
        self.sent += 1

    def close(self) -> None:
        self._writer.done_writing()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self._writer.close()

    def _read(self) -> None:
        while (data := self._reader.read()) is not None:
            self.acks.append(decode_ack(data))


def test_a_stream_at_a_follower_outlives_the_leader(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.create_table("t")
    leader, follower = cluster.leader(), cluster.follower()
    stream = _Stream(cluster, follower)
    for _ in range(50):
        stream.send()
    eventually(lambda: len(stream.acks) >= 10, "the first acks")
    stopper = threading.Thread(target=cluster.stop_node, args=(leader,))
    stopper.start()
    for _ in range(50):
        stream.send()
    stopper.join(WAIT_S)
    eventually(lambda: len(stream.acks) == 100, "an ack for every batch, of whatever kind")
    # Now that nothing is under way, the stream finds the new leader, whoever that is.
    cluster.leader()
    for _ in range(50):
        stream.send()
    stream.close()
    assert len(stream.acks) == 150
    errors = {ack.error_code for ack in stream.acks}
    assert errors <= {None, "outcome_unknown", "unavailable", "not_leader"}, errors
    assert [ack.error_code for ack in stream.acks[100:]] == [None] * 50
    indexes = [ack.index for ack in stream.acks if ack.error_code is None]
    assert indexes == sorted(indexes)
    sure = {number for number, ack in enumerate(stream.acks) if ack.error_code is None}
    unknown = {number for number, ack in enumerate(stream.acks) if ack.error_code == "outcome_unknown"}
    for node in cluster.servers:
        found = cluster.get(node, b"t").column("id").to_pylist()
        assert sure <= set(found) <= sure | unknown
        assert len(found) == len(set(found))


def test_a_stream_at_a_leader_that_loses_its_post_goes_on_at_the_next(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = make_cluster()
    cluster.create_table("t")
    leader = cluster.leader()
    stream = _Stream(cluster, leader)
    for _ in range(20):
        stream.send()
    eventually(lambda: len(stream.acks) == 20, "acks of the leader")
    # From now on nobody hears the leader, though it goes on to take batches.
    flights = cluster.servers[leader]._flight
    assert flights is not None
    monkeypatch.setattr(flights, "send", lambda to, envelopes: False)
    for _ in range(20):
        stream.send()
    assert cluster.servers[leader].get_role() is Role.LEADER
    eventually(lambda: cluster.servers[leader].get_role() is not Role.LEADER, "the leader to step down")
    monkeypatch.undo()
    stream.close()
    assert [ack.error_code for ack in stream.acks] == [None] * 40
    indexes = [ack.index for ack in stream.acks]
    assert indexes == sorted(set(indexes))
    cluster.leader()
    for node in cluster.servers:
        assert cluster.get(node, b"t").column("id").to_pylist() == list(range(40))


def test_a_call_that_changes_something_waits_for_the_next_leader(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    leader, follower = cluster.leader(), cluster.follower()
    cluster.stop_node(leader)
    created = cluster.create_table("t", node=follower)  # The follower may not know yet that its leader is gone.
    assert created["name"] == "t"
    (ack,) = cluster.put(follower, ["t"], [rows(0, 1)])
    assert ack.error_code is None


def test_an_operation_that_finds_no_quorum_is_of_unknown_outcome(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    leader = cluster.leader()
    for node in [node for node in cluster.servers if node != leader]:
        cluster.stop_node(node)
    # Either it was taken while this node still believed that it led, or it had already stepped down.
    with pytest.raises((OutcomeUnknownError, NotLeaderError)):
        cluster.servers[leader].propose_operation(b"x", timeout_s=0.2)


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_an_entry_larger_than_a_message_of_many_reaches_every_replica(make_cluster: MakeCluster) -> None:
    size = 20 * 1024 * 1024
    # While so much is written to three disks, a short election timeout would pass.
    cluster = make_cluster(max_entry_size=size, append_bytes_max=1024 * 1024, election_timeout_ms=5000)
    cluster.create_table("t")
    large = pa.record_batch({"id": [1], "name": ["x" * (size - 4096)]}, schema=SCHEMA)
    too_large = pa.record_batch({"id": [2], "name": ["x" * size]}, schema=SCHEMA)
    acks = cluster.put(cluster.follower(), ["t"], [large, too_large, rows(3, 4)])
    assert [ack.error_code for ack in acks] == [None, "usage", None]
    for node in cluster.servers:
        eventually(lambda node=node: cluster.act(node, "status")["applied_index"] >= acks[2].index, "all entries")
        found = cluster.get(node, encode_ticket("t", ScanRequest(consistency="local")))
        assert found.column("id").to_pylist() == [1, 3]
        assert found.slice(0, 1).to_batches()[0].equals(large)


def test_no_config_admits_an_entry_that_the_log_could_not_hold() -> None:
    assert LogOptions().entry_bytes_max >= ENTRY_BYTES_MAX
    with pytest.raises(UsageError, match="max_entry_size"):
        RaftClusterConfig("c", ["h:1"], max_entry_size=ENTRY_BYTES_MAX + 1)
    with pytest.raises(UsageError, match="max_entry_size"):
        marble_open("unused", max_entry_size=LogOptions().entry_bytes_max + 1)


def test_clients_of_a_node_that_stopped_by_itself_go_to_another(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.create_table("t")
    broken = cluster.leader()
    first = sorted(cluster.servers, key=lambda node: node != broken)
    with marble_connect("grpc://" + ",".join(cluster.config.endpoints[node] for node in first), timeout_s=WAIT_S) as db:
        table = db.table("t")
        table.write(rows(0, 1))
        cluster.servers[broken]._node.fail(OSError("no space left"))
        eventually(lambda: not cluster.servers[broken].is_running(), "the end of the engine")
        # What the node itself says, to reads and writes alike: nothing was done.
        with refused(UnavailableError, "has stopped: no space left: ask another node"):
            cluster.get(broken, encode_ticket("t"))
        with refused(UnavailableError, "ask another node"):
            cluster.create_table("u", node=broken)
        ack = cluster.put(broken, ("t",), [rows(5, 6)], forward=False)[0]
        assert isinstance(ack.error(), UnavailableError)
        # And so a client of all of them never hears of it.
        table.write(rows(1, 2))
        assert [info.name for info in db.tables()] == ["t"]
        assert table.count_rows() == 2
        assert table.get(1) == {"id": 1, "name": "x1"}
