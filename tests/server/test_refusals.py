"""Whatever a client can get wrong is a clear UsageError to it, nothing is replicated, and the node is unharmed."""

from __future__ import annotations

import base64
import random
import socket
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest
from server.cluster import SCHEMA, WAIT_S, Cluster, eventually, options, refused, rows

from marble import service as service_module
from marble.errors import UnavailableError, UsageError
from marble.transport import wire
from marble.transport.wire import decode_ack


@pytest.fixture
def unharmed(shared: Cluster, table: str) -> Iterator[None]:
    """Nothing but the table of the test was replicated, and the cluster takes writes as before."""
    before = shared.last_index()
    yield
    assert shared.last_index() == before
    for node in shared.servers:
        (ack,) = shared.put(node, [table], [rows(7, 8)])
        assert ack.error_code is None
        assert shared.get(node, table.encode()).column("id").to_pylist() == [7]
        assert shared.servers[node].is_running()


WRONG_BATCHES = {
    "wrong type": (pa.record_batch({"id": ["a"], "name": ["b"]}), "int64"),
    "missing column": (pa.record_batch({"id": pa.array([1], pa.int64())}), "'name' is missing"),
    "unknown column": (pa.record_batch({"id": pa.array([1], pa.int64()), "nmae": ["b"]}), "did you mean 'name'"),
    "duplicate column": (
        pa.RecordBatch.from_arrays(
            [pa.array([1], pa.int64()), pa.array(["a"]), pa.array(["b"])], ["id", "name", "name"]
        ),
        "stands twice",
    ),
    "null in the key": (
        pa.record_batch({"id": pa.array([1, None], pa.int64()), "name": ["a", "b"]}),
        "is null in row 1",
    ),
    "empty": (rows(0, 0), "empty"),
    "above max_entry_size": (
        pa.record_batch({"id": pa.array([1], pa.int64()), "name": ["x" * (300 * 1024)]}),
        "max_entry_size",
    ),
    "not UTF-8": (
        pa.record_batch(
            {"id": pa.array([1], pa.int64()), "name": pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())}
        ),
        "not valid Arrow data",
    ),
}


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("wrong", WRONG_BATCHES)
def test_a_wrong_batch_changes_nothing(shared: Cluster, node: int, table: str, wrong: str) -> None:
    batch, says = WRONG_BATCHES[wrong]
    (ack,) = shared.put(node, [table], [batch])
    assert ack.error_code == "usage"
    assert says in ack.message


@pytest.mark.usefixtures("unharmed")
def test_a_batch_for_a_table_that_is_not_there_changes_nothing(shared: Cluster, node: int) -> None:
    (ack,) = shared.put(node, ["nowhere"], [rows(0, 1)])
    assert ack.error_code == "usage"
    assert "nowhere" in ack.message


@pytest.mark.usefixtures("unharmed")
def test_a_delete_with_more_than_the_key_changes_nothing(shared: Cluster, node: int, table: str) -> None:
    (ack,) = shared.put(node, [table, "delete"], [rows(0, 1)])
    assert ack.error_code == "usage"
    assert "'name' is not in the key" in ack.message


def _schema(*fields: tuple[str, pa.DataType]) -> str:
    return wire.encode_schema(pa.schema(fields))


WRONG_TABLES: dict[str, tuple[Any, str]] = {
    "name leaves the directory": ({"name": "../x", "key": ["a"], "schema": _schema(("a", pa.int64()))}, "'../x'"),
    "name with a NUL": ({"name": "a\x00b", "key": ["a"], "schema": _schema(("a", pa.int64()))}, "'a\\x00b'"),
    "name of another type": ({"name": 7, "key": ["a"], "schema": _schema(("a", pa.int64()))}, "name of a table"),
    "no key": ({"name": "t", "key": [], "schema": _schema(("a", pa.int64()))}, "at least one key column"),
    "key of another type": ({"name": "t", "key": "a", "schema": _schema(("a", pa.int64()))}, "list of column names"),
    "unknown key": ({"name": "t", "key": ["b"], "schema": _schema(("a", pa.int64()))}, "not in the schema"),
    "key that has no order": ({"name": "t", "key": ["a"], "schema": _schema(("a", pa.list_(pa.int8())))}, "in the key"),
    "duplicate column": (
        {"name": "t", "key": ["a"], "schema": _schema(("a", pa.int64()), ("a", pa.int64()))},
        "stands twice",
    ),
    "a type that cannot be stored": (
        {"name": "t", "key": ["a"], "schema": _schema(("a", pa.int64()), ("d", pa.dictionary(pa.int8(), pa.string())))},
        "cast to string",
    ),
    "schema of bytes": ({"name": "t", "key": ["a"], "schema": base64.b64encode(b"x" * 64).decode()}, "a schema must"),
    "schema not base64": ({"name": "t", "key": ["a"], "schema": "!"}, "a schema must be base64"),
    "a key of JSON missing": ({"name": "t", "key": ["a"]}, "no 'schema'"),
    "a key of JSON unknown": (
        {"name": "t", "key": ["a"], "schema": _schema(("a", pa.int64())), "if_not_exists": True},
        "unknown key 'if_not_exists'",
    ),
    "a list": ([], "JSON object"),
    "no JSON": (b"name=t", "not JSON"),
    "no text": (b"\xff\xfe", "not JSON"),
    "a deep nest": (b"[" * 100_000, "not JSON"),
    "too large": (b" " * (wire.TABLE_BYTES_MAX + 1), "more than"),
}


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("wrong", WRONG_TABLES)
def test_a_wrong_table_is_not_created(shared: Cluster, node: int, wrong: str) -> None:
    body, says = WRONG_TABLES[wrong]
    before = shared.act(node, "tables")
    with refused(UsageError, says):
        shared.act(node, "create_table", body)
    assert shared.act(node, "tables") == before


def test_a_table_of_the_same_name_but_another_schema_is_refused_alike_everywhere(shared: Cluster, table: str) -> None:
    # This one depends on the log's order, so it is apply that refuses: the entry is there and has no effect.
    schema = pa.schema([("id", pa.int64())])
    for node in shared.servers:
        with refused(UsageError, table):
            shared.create_table(table, schema, node=node)
    shared.put(shared.leader(), [table], [rows(0, 1)])
    for node in shared.servers:
        assert shared.get(node, table.encode()).schema.equals(SCHEMA)


@pytest.mark.usefixtures("unharmed")
def test_an_operation_above_max_entry_size_is_refused(shared: Cluster, node: int) -> None:
    for size in (256 * 1024, 300 * 1024):
        with refused(UsageError, "max_entry_size"):
            shared.act(node, "propose", b"x" * size)


@pytest.mark.usefixtures("unharmed")
def test_more_streams_than_the_node_holds_are_refused(shared: Cluster, table: str) -> None:
    service = shared.servers[1]._service
    assert service is not None
    held = [service._streams.acquire(blocking=False) for _ in range(service_module.STREAMS_MAX + 1)]
    assert held == [True] * service_module.STREAMS_MAX + [False]
    try:
        with refused(UnavailableError, "streams open"):
            shared.get(1, table.encode())
        writer, _ = shared.client(1).do_put(flight.FlightDescriptor.for_path(table), SCHEMA, options())
        with refused(UnavailableError, "streams open"):
            writer.close()
    finally:
        service._streams.release(service_module.STREAMS_MAX)
    assert shared.get(1, table.encode()).num_rows == 0


def test_streams_that_ended_any_way_are_no_longer_counted(shared: Cluster, table: str) -> None:
    shared.put(1, [table], [rows(0, 1000)])
    service = shared.servers[1]._service
    assert service is not None
    for _ in range(20):
        shared.client(1).do_get(flight.Ticket(table), options()).cancel()
        shared.get(1, table.encode())
        with refused(UsageError):
            shared.get(1, b"nowhere")
        writer, _ = shared.client(1).do_put(flight.FlightDescriptor.for_path(table), SCHEMA, options())
        writer.close()
        writer, reader = shared.client(1).do_exchange(flight.FlightDescriptor.for_path(table, "get"), options())
        reader.cancel()
    eventually(lambda: service._streams._value == service_module.STREAMS_MAX, "the end of all streams")


def _garbage() -> Iterator[tuple[str, bytes]]:
    random_bytes = random.Random(2013).randbytes(4096)
    yield "noise", random_bytes
    yield "HTTP/1", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    yield "HTTP/2 preface and noise", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + random_bytes
    yield "a TLS hello", bytes.fromhex("16030100a5010000a10303") + random_bytes[:160]
    yield "nothing", b""


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(("name", "data"), list(_garbage()), ids=lambda value: value if isinstance(value, str) else "")
def test_garbage_on_the_port_harms_nobody(shared: Cluster, name: str, data: bytes) -> None:
    host, port = shared.config.endpoints[1].rsplit(":", 1)
    with socket.create_connection((host, int(port)), WAIT_S) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(WAIT_S)
        # The server hangs up by itself. What it says before that, if anything, is gRPC's business.
        try:
            while connection.recv(65536):
                pass
        except ConnectionResetError:
            assert name != "nothing"


@pytest.mark.usefixtures("unharmed")
def test_garbage_between_nodes_is_counted_and_harms_nobody(shared: Cluster) -> None:
    counted = shared.act(1, "status")["metrics"]["transport_protocol_errors"]
    for metadata in (b"\x00", b"MBLH", random.Random(7).randbytes(200)):
        descriptor = flight.FlightDescriptor.for_command(b"marble.raft/1")
        writer, reader = shared.client(1).do_exchange(descriptor, options())
        writer.write_metadata(metadata)
        with pytest.raises((pa.ArrowException, flight.FlightError)):
            reader.read_chunk()
        with pytest.raises((pa.ArrowException, flight.FlightError)):
            writer.close()
    assert shared.act(1, "status")["metrics"]["transport_protocol_errors"] == counted + 3


@pytest.mark.usefixtures("unharmed")
def test_a_client_that_vanishes_in_the_middle_harms_nobody(shared: Cluster, node: int, table: str) -> None:
    for _ in range(5):
        client = wire.connect(shared.config.endpoints[node])
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_path(table, "upsert"), options())
        writer.begin(SCHEMA)
        writer.write_batch(rows(0, 0))
        assert decode_ack(reader.read_chunk().app_metadata).error_code == "usage"
        reader.cancel()
        client.close()
