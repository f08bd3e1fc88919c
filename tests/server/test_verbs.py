"""Every verb of Flight, as a plain client uses it, at the leader and at a follower."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.flight as flight
import pytest
from server.cluster import SCHEMA, Cluster, eventually, options, refused, rows

from marble import service as service_module
from marble.actions import ACTIONS
from marble.errors import NotLeaderError, UsageError
from marble.requests import ScanRequest
from marble.transport import wire
from marble.transport.tickets import encode_ticket
from marble.transport.wire import decode_ack, decode_tables


def test_put_acknowledges_each_batch_and_every_node_reads_it(shared: Cluster, node: int, table: str) -> None:
    acks = shared.put(node, [table], [rows(10 * i, 10 * i + 10) for i in range(20)])
    assert [ack.error_code for ack in acks] == [None] * 20
    assert [ack.value for ack in acks] == [10] * 20
    indexes = [ack.index for ack in acks]
    assert indexes == sorted(set(indexes))
    assert all(ack.term >= 1 for ack in acks)
    for other in shared.servers:
        found = shared.get(other, table.encode())
        assert found.equals(pa.Table.from_batches([rows(0, 200)]))


def test_put_replaces_rows_with_the_same_key(shared: Cluster, node: int, table: str) -> None:
    shared.put(node, [table, "upsert"], [rows(0, 3, "old"), rows(1, 2, "new")])
    assert shared.get(node, table.encode()).column("name").to_pylist() == ["old0", "new1", "old2"]


def test_put_deletes_by_key(shared: Cluster, node: int, table: str) -> None:
    shared.put(node, [table], [rows(0, 5)])
    keys = rows(3, 9).select(["id"])
    (ack,) = shared.put(node, [table, "delete"], [keys])
    assert ack.value == 2
    assert shared.get(node, table.encode()).column("id").to_pylist() == [0, 1, 2]


def test_a_wrong_batch_gets_an_error_for_its_ack_and_the_stream_goes_on(shared: Cluster, node: int, table: str) -> None:
    null_key = pa.record_batch({"id": pa.array([None], pa.int64()), "name": ["x"]}, schema=SCHEMA)
    acks = shared.put(node, [table], [rows(0, 1), null_key, rows(0, 0), rows(1, 2)])
    assert [ack.error_code for ack in acks] == [None, "usage", "usage", None]
    assert "null" in acks[1].message
    assert "empty" in acks[2].message
    assert shared.get(node, table.encode()).column("id").to_pylist() == [0, 1]


def test_a_message_without_rows_gets_an_error_for_its_ack(shared: Cluster, node: int, table: str) -> None:
    writer, reader = shared.client(node).do_put(flight.FlightDescriptor.for_path(table), SCHEMA, options())
    with writer:
        writer.write_metadata(b"?")
        writer.write_batch(rows(0, 1))
        writer.done_writing()
        assert [decode_ack(reader.read()).error_code for _ in range(2)] == ["usage", None]


def test_a_slow_reader_of_acks_loses_none(shared: Cluster, node: int, table: str) -> None:
    writer, reader = shared.client(node).do_put(flight.FlightDescriptor.for_path(table), SCHEMA, options())
    with writer:
        for i in range(1500):  # More than may be under way at once.
            writer.write_batch(rows(i, i + 1))
        writer.done_writing()
        assert {decode_ack(reader.read()).error_code for _ in range(1500)} == {None}
        assert reader.read() is None
    assert shared.get(node, table.encode()).num_rows == 1500


def test_exchange_writes_like_put(shared: Cluster, node: int, table: str) -> None:
    descriptor = flight.FlightDescriptor.for_path(table, "upsert")
    writer, reader = shared.client(node).do_exchange(descriptor, options())
    with writer:
        writer.begin(SCHEMA)
        writer.write_batch(rows(0, 4))
        assert decode_ack(reader.read_chunk().app_metadata).value == 4
        writer.write_batch(rows(0, 0))
        assert decode_ack(reader.read_chunk().app_metadata).error_code == "usage"
        writer.done_writing()
        with pytest.raises(StopIteration):
            reader.read_chunk()


def test_exchange_looks_keys_up_in_order(shared: Cluster, node: int, table: str) -> None:
    shared.put(shared.leader(), [table], [rows(0, 10)])
    writer, reader = shared.client(node).do_exchange(flight.FlightDescriptor.for_path(table, "get"), options())
    with writer:
        writer.begin(SCHEMA.empty_table().select(["id"]).schema)
        for asked in ([3, 99, 1], [7]):
            writer.write_batch(pa.record_batch({"id": pa.array(asked, pa.int64())}))
        writer.done_writing()
        found = [reader.read_chunk().data for _ in range(2)]
    assert found[0].column("name").to_pylist() == ["x3", None, "x1"]
    assert found[1].column("name").to_pylist() == ["x7"]


def test_exchange_looks_keys_up_locally(shared: Cluster, node: int, table: str) -> None:
    (ack,) = shared.put(node, [table], [rows(0, 3)])
    eventually(lambda: shared.act(node, "status")["applied_index"] >= ack.index, "the write at the asked node")
    descriptor = flight.FlightDescriptor.for_path(table, "get", "local")
    writer, reader = shared.client(node).do_exchange(descriptor, options())
    with writer:
        writer.begin(pa.schema([("id", pa.int64())]))
        writer.write_batch(pa.record_batch({"id": pa.array([2], pa.int64())}))
        assert reader.read_chunk().data.column("name").to_pylist() == ["x2"]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (pa.record_batch({"id": pa.array([None], pa.int64())}), "null"),
        (pa.record_batch({"name": ["a"]}), "name"),
        (pa.record_batch({"id": ["a"]}), "int64"),
    ],
)
def test_exchange_refuses_wrong_keys(shared: Cluster, table: str, keys: pa.RecordBatch, says: str) -> None:
    descriptor = flight.FlightDescriptor.for_path(table, "get")
    writer, reader = shared.client(1).do_exchange(descriptor, options())
    writer.begin(keys.schema)
    writer.write_batch(keys)
    with refused(UsageError, says):
        reader.read_chunk()
    with refused(UsageError):
        writer.close()


def test_get_takes_a_ticket_with_columns_and_consistency(shared: Cluster, node: int, table: str) -> None:
    (ack,) = shared.put(node, [table], [rows(0, 5)])
    eventually(lambda: shared.act(node, "status")["applied_index"] >= ack.index, "the write at the asked node")
    for consistency in ("linearizable", "local"):
        found = shared.get(node, encode_ticket(table, ScanRequest(("name",), consistency=consistency)))
        assert found.schema.names == ["name"]
        assert found.num_rows == 5


@pytest.mark.parametrize(
    ("ticket", "says"),
    [
        (b"no_such_table", "no_such_table"),
        (b"../../etc/passwd", "cannot be the name"),
        (b"a\x00b", "cannot be the name"),
        (b"\xff", "cannot be the name"),
        (b'{"table": "TABLE", "columns": ["nmae"]}', "did you mean 'name'"),
        (b'{"table": "TABLE", "columns": ["name", "name"]}', "twice"),
        (b'{"table": "TABLE", "columns": ["\\ud800"]}', "no column"),
        (b'{"table": "TABLE", "consistency": "eventual"}', "'linearizable', 'local'"),
        (b'{"table": "TABLE", "filter": "1 = 1"}', "unknown key 'filter'"),
        (b"{", "not JSON"),
    ],
)
def test_get_refuses_a_wrong_ticket(shared: Cluster, node: int, table: str, ticket: bytes, says: str) -> None:
    with refused(UsageError, says):
        shared.get(node, ticket.replace(b"TABLE", table.encode()))


def test_get_splits_what_is_large(shared: Cluster, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "READ_BATCH_BYTES_MAX", 1024)
    shared.put(1, [table], [rows(0, 2000)])
    reader = shared.client(1).do_get(flight.Ticket(table), options())
    sizes = [chunk.data.nbytes for chunk in reader]
    assert len(sizes) > 10
    assert max(sizes) <= 2048


def test_flights_are_tables(shared: Cluster, node: int, table: str) -> None:
    shared.put(node, [table], [rows(0, 7)])
    client = shared.client(node)
    descriptor = flight.FlightDescriptor.for_path(table)
    info = client.get_flight_info(descriptor, options())
    assert info.schema.equals(SCHEMA)
    assert info.total_records == 7
    assert len(info.endpoints[0].locations) == 3
    assert client.get_schema(descriptor, options()).schema.equals(SCHEMA)
    listed = {each.descriptor.path[0]: each for each in client.list_flights(b"", options())}
    assert listed[table.encode()].total_records == 7
    # The ticket and the first location lead to the rows.
    found = flight.connect(info.endpoints[0].locations[0]).do_get(info.endpoints[0].ticket, options()).read_all()
    assert found.num_rows == 7


def test_flights_take_no_criteria(shared: Cluster) -> None:
    with refused(UsageError, "criteria"):
        list(shared.client(1).list_flights(b"x", options()))


@pytest.mark.parametrize(
    "descriptor",
    [
        flight.FlightDescriptor.for_path("../x"),
        flight.FlightDescriptor.for_path("../../etc/passwd"),
        flight.FlightDescriptor.for_path(b"a\x00b"),
        flight.FlightDescriptor.for_path(""),
        flight.FlightDescriptor.for_path(),
        flight.FlightDescriptor.for_path("t", "drop"),
        flight.FlightDescriptor.for_path("t", "delete", "x"),
        flight.FlightDescriptor.for_command(b"t"),
    ],
    ids=repr,
)
def test_a_wrong_descriptor_is_refused_by_every_verb(shared: Cluster, descriptor: flight.FlightDescriptor) -> None:
    client = shared.client(1)
    with refused(UsageError):
        client.get_flight_info(descriptor, options())
    with pytest.raises(pa.ArrowInvalid, match="table"):  # pyarrow's server cannot say more here.
        client.get_schema(descriptor, options())
    writer, _ = client.do_put(descriptor, SCHEMA, options())
    with refused(UsageError):
        writer.close()


def test_exchange_needs_a_verb(shared: Cluster, table: str) -> None:
    for path in ([table], [table, "scan"], [table, "get", "local", "1", "x"]):
        writer, reader = shared.client(1).do_exchange(flight.FlightDescriptor.for_path(*path), options())
        with refused(UsageError, "a path [table]" if len(path) > 1 else "DoExchange needs"):
            reader.read_chunk()
        with refused(UsageError):
            writer.close()


def test_actions_say_what_they_are(shared: Cluster, node: int) -> None:
    listed = {each.type: each.description for each in shared.client(node).list_actions(options())}
    assert listed == ACTIONS
    assert {"change_membership", "open_session", "propose", "snapshot", "status", "transfer_leadership"} <= set(listed)
    assert all(listed.values())
    with refused(UsageError, "there is no action 'Status': there is 'begin_backup', 'campaign', 'change_membership'"):
        shared.act(node, "Status")


def test_status_and_ping(shared: Cluster, node: int) -> None:
    status = shared.act(node, "status")
    assert status["node_id"] == node
    assert status["leader_endpoint"] == shared.config.endpoints[shared.leader()]
    assert shared.act(node, "ping") == {}


def test_campaign_does_not_disturb_a_healthy_leader(shared: Cluster) -> None:
    leader = shared.leader()
    term = shared.act(leader, "status")["term"]
    shared.act(shared.follower(), "campaign")
    assert shared.leader() == leader
    assert shared.act(leader, "status")["term"] == term


def test_tables_are_created_listed_and_dropped_at_any_node(shared: Cluster, node: int) -> None:
    created = shared.create_table("passing", node=node)
    assert (created["name"], created["key"]) == ("passing", ["id"])
    assert shared.create_table("passing", node=node) == created
    (found,) = (each for each in shared.act(node, "tables") if each["name"] == "passing")
    assert found == created
    (info,) = (
        each for each in decode_tables(json.dumps(shared.act(node, "tables")).encode()) if each.name == "passing"
    )
    assert info.schema.equals(SCHEMA)
    assert isinstance(shared.act(node, "tables", {"consistency": "local"}), list)
    dropped = shared.act(node, "drop_table", {"name": "passing"})
    assert dropped["index"] > 0
    assert "passing" not in [each["name"] for each in shared.act(node, "tables")]
    (ack,) = shared.put(node, ["passing"], [rows(0, 1)])
    assert ack.error_code == "usage"
    with refused(UsageError, "passing"):
        shared.act(node, "drop_table", {"name": "passing"})


def test_a_table_created_elsewhere_is_known_at_once(shared: Cluster, node: int) -> None:
    other = next(each for each in shared.servers if each != node)
    for i in range(5):
        name = f"quick_{node}_{i}"
        shared.create_table(name, node=other)
        (ack,) = shared.put(node, [name], [rows(0, 1)])
        assert ack.error_code is None


def test_operations_reach_every_replica_at_the_same_index(shared: Cluster, node: int) -> None:
    operation = b"\x00operation \xff at %d" % node
    answer = shared.act(node, "propose", operation)
    for commands in shared.commands.values():
        eventually(lambda commands=commands: (answer["index"], operation) in commands, "the operation at a replica")


def test_refusal_names_the_leader(shared: Cluster, table: str) -> None:
    follower, leader = shared.follower(), shared.leader()
    before = shared.last_index()
    (ack,) = shared.put(follower, [table], [rows(0, 1)], forward=False)
    assert ack.error_code == "not_leader"
    assert ack.leader == shared.config.endpoints[leader]
    bodies = {
        "create_table": {"name": "never", "key": ["id"], "schema": wire.encode_schema(SCHEMA)},
        "drop_table": {"name": table},
        "propose": b"x",
    }
    for name, body in bodies.items():
        with refused(NotLeaderError) as told:
            shared.act(follower, name, body, forward=False)
        assert isinstance(told[0], NotLeaderError)
        assert told[0].leader == shared.config.endpoints[leader]
    assert shared.last_index() == before
    # The leader itself takes the same calls.
    (ack,) = shared.put(leader, [table], [rows(0, 1)], forward=False)
    assert ack.error_code is None
