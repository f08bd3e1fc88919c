"""What tables can do, said from afar: ranges, past states, merges and transactions, through any node of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.flight as flight
import pytest
from server.cluster import SCHEMA, WAIT_S, Cluster, eventually, options, refused, rows

from marble._core.key_codec import KeyCodec
from marble.client import ClientOptions, RemoteBackend
from marble.database import Database
from marble.errors import UsageError
from marble.lsm import payload
from marble.lsm.payload import Operation
from marble.requests import ScanRequest
from marble.transport import wire
from marble.transport.tickets import encode_ticket
from marble.types import EntryKind

STATE = pa.schema([("k", pa.string()), ("n", pa.int64()), ("rows", pa.int64()), ("at", pa.timestamp("us"))])


@pytest.fixture
def database(shared: Cluster, node: int) -> Iterator[Database]:
    """A client that knows one node: the leader or a follower."""
    with Database(RemoteBackend([shared.config.endpoints[node]], ClientOptions(WAIT_S))) as made:
        yield made


def encoded(*ids: int) -> list[bytes]:
    batch = pa.record_batch({"id": ids}, schema=pa.schema([SCHEMA.field("id")]))
    return KeyCodec(batch.schema).encode(batch).to_pylist()


def ids(scan: Any) -> list[int]:
    return scan.to_table()["id"].to_pylist()


def test_scans_say_which_keys_in_which_order_and_how_many(database: Database, table: str) -> None:
    made = database.table(table)
    made.write(rows(0, 1000))
    assert ids(made.scan(["id"], between=(990, None))) == list(range(990, 1000))
    assert ids(made.scan(prefix=7)) == [7]
    assert ids(made.scan(reverse=True, limit=3)) == [999, 998, 997]
    assert ids(made.scan(limit=0)) == []
    even = pc.bit_wise_and(pc.field("id"), 1) == 0
    assert ids(made.scan(["id"], even & (pc.field("id") > 500), limit=3)) == [502, 504, 506]
    assert ids(made.scan(["id"], pc.field("name") == "x77", reverse=True)) == [77]
    assert made.scan(["name"], pc.field("id").isin([3, 5]), between=(4, 9)).to_table().to_pylist() == [{"name": "x5"}]


def test_only_rows_that_a_filter_leaves_possible_travel(
    database: Database, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = database.table(table)
    made.write(rows(0, 1000))
    sent = []
    ticket = flight.Ticket
    monkeypatch.setattr("marble.client.fl.Ticket", lambda data: sent.append(data) or ticket(data))
    assert ids(made.scan(["id"], (pc.field("id") >= 10) & (pc.field("id") < 13), limit=2)) == [10, 11]
    lower, upper = encoded(10, 13)
    # The filter is a range of keys and nothing else, so that the server knows which rows are the first.
    assert sent == [encode_ticket(table, ScanRequest(("id",), None, lower, upper, limit=2))]


def test_a_ticket_of_any_client(shared: Cluster, node: int, table: str) -> None:
    shared.put(node, [table], [rows(0, 50)])
    lower, upper = encoded(10, 20)
    request = ScanRequest(("name",), None, lower, upper, True, 2)
    assert shared.get(node, encode_ticket(table, request)).to_pydict() == {"name": ["x19", "x18"]}


def test_past_states(shared: Cluster, node: int, database: Database, table: str) -> None:
    made = database.table(table)
    first = made.write(rows(0, 3, "old"))
    second = made.write(rows(0, 3, "new"))
    assert made.scan(["name"], at_index=first, limit=1).to_table().to_pylist() == [{"name": "old0"}]
    assert made.get(1, at_index=first) == {"id": 1, "name": "old1"}
    assert made.get(1, at_index=second) == {"id": 1, "name": "new1"}
    assert made.get_many([2, 9], at_index=first)["name"].to_pylist() == ["old2", None]
    with pytest.raises(UsageError, match="has not been applied"):
        made.get(1, at_index=2**62)
    with pytest.raises(UsageError, match=r"is not kept|there is no table"):
        made.get(1, at_index=1)
    for index in ("x", "-1", "1.5", str(2**64), "9" * 30, "\u0661"):
        path = flight.FlightDescriptor.for_path(table, wire.GET, "local", index)
        writer, reader = shared.client(node).do_exchange(path, options())
        with refused(UsageError, "whole number"):
            reader.read_chunk()
        with refused(UsageError):
            writer.close()


def test_states_that_accumulate(database: Database, shared: Cluster, node: int) -> None:
    name = f"state{node}_{shared.last_index()}"
    made = database.create_table(
        name,
        STATE,
        ["k"],
        merge={"n": "sum", "rows": "count"},
        ttl=timedelta(days=1),
        ttl_column="at",
        ttl_stamped=True,
    )
    assert database.table(name).info == made.info
    for _ in range(3):
        made.write(pa.record_batch({"k": ["a", "b", "a"], "n": [1, 2, 3]}))
    left = made.scan(["k", "n", "rows"]).to_table().to_pylist()
    assert left == [{"k": "a", "n": 12, "rows": 6}, {"k": "b", "n": 6, "rows": 3}]
    assert made.get("a")["at"].year >= 2024  # type: ignore[index, union-attr]
    # A client without marble may leave out what the table fills by itself, too.
    (ack,) = shared.put(node, [name], [pa.record_batch({"n": [5], "k": ["b"]})])
    assert ack.error_code is None
    assert made.get("b")["n"] == 11  # type: ignore[index]


def test_transactions(database: Database, shared: Cluster, table: str) -> None:
    made = database.table(table)
    other = database.create_table(f"{table}_other", SCHEMA, ["id"])
    made.write(rows(0, 10))
    with database.transaction() as t:
        t.delete_range(made, between=(2, 8))
        t.write(other, rows(100, 102))
        t.delete(made, [0])
    assert ids(made.scan()) == [1, 9]
    assert ids(other.scan()) == [100, 101]
    assert t.index is not None
    for each in shared.servers:
        view = shared.servers[each].database.table(table)
        eventually(lambda view=view: view.scan(consistency="local").count_rows() == 2, f"the transaction at {each}")
    made.delete_range(between=(None, 5))
    assert ids(made.scan()) == [9]


def test_a_transaction_that_is_refused_changes_nothing(database: Database, shared: Cluster, table: str) -> None:
    made = database.table(table)
    made.write(rows(0, 3))
    gone = database.create_table(f"{table}_gone", SCHEMA, ["id"])
    database.drop_table(gone.name)

    def change() -> None:
        with database.transaction() as t:
            t.delete_range(made, between=(None, None))
            t.write(gone, rows(0, 1))

    with pytest.raises(UsageError, match="it has been dropped"):
        change()
    assert ids(made.scan()) == [0, 1, 2]


def test_what_is_no_transaction_is_refused_before_the_log(shared: Cluster, node: int, table: str) -> None:
    info = next(each for each in wire.decode_tables(wire.encode_json(shared.act(node, "tables"))) if each.name == table)
    write = Operation(EntryKind.WRITE, info.id, payload.encode_rows(rows(0, 1)))
    before = shared.last_index()
    for body, says in [
        (b"", "not a valid record batch"),
        (b"x" * 64, "not a valid record batch"),
        (write.payload.to_pybytes(), "not a valid record batch"),
        (payload.encode_transaction([write])[:128].to_pybytes(), "not a valid record batch"),
        (bytes(300 * 1024), "more than max_entry_size"),
        (
            payload.encode_transaction([write, Operation(EntryKind.DELETE, info.id, write.payload)]).to_pybytes(),
            "keys: the payload is not a valid record batch",
        ),
        (
            payload.encode_transaction([Operation(EntryKind.WRITE, 10**6, write.payload)]).to_pybytes(),
            "no table with id",
        ),
        (
            payload.encode_transaction([Operation(EntryKind.COMMAND, 0, write.payload)]).to_pybytes(),
            "operation 0 is not",
        ),
    ]:
        with refused(UsageError, says):
            shared.act(node, "transaction", body)
    assert shared.last_index() == before
    answer = shared.act(node, "transaction", payload.encode_transaction([write, write]).to_pybytes())
    assert answer["value"] == 2
    assert answer["index"] == before + 1


def test_a_transaction_takes_effect_once(shared: Cluster, node: int) -> None:
    name = f"once{node}_{shared.last_index()}"
    body = {"name": name, "key": ["k"], "schema": wire.encode_schema(STATE), "options": {"merge": {"n": "sum"}}}
    id_ = shared.act(node, "create_table", body)["id"]
    row = pa.RecordBatch.from_pylist([{"k": "a", "n": 5}], STATE)
    data = payload.encode_transaction([Operation(EntryKind.WRITE, id_, payload.encode_rows(row))]).to_pybytes()
    stamp = wire.Stamp(int(shared.act(node, "open_session")["session"]), 1)
    answers = [shared.act(node, "transaction", data, stamp=stamp) for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert shared.get(node, name.encode()).select(["k", "n"]).to_pylist() == [{"k": "a", "n": 5}]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"x": 1}, "unknown key 'x'"),
        ([], "must be a JSON object"),
        ({"merge": {"n": "avg"}}, "no merge operator"),
        ({"merge": {"q": "sum"}}, "unknown key 'q'"),
        ({"ttl_us": "1"}, "ttl_us of a table must be a int"),
        ({"ttl_us": 1}, "needs a column"),
    ],
)
def test_options_that_make_no_sense_are_refused(shared: Cluster, node: int, given: Any, says: str) -> None:
    body = {"name": "never", "key": ["k"], "schema": wire.encode_schema(STATE), "options": given}
    with refused(UsageError, says):
        shared.act(node, "create_table", body)


def test_tables_of_one_node_are_not_for_clients(database: Database) -> None:
    with pytest.raises(UsageError, match="a client of a cluster cannot have tables that are not replicated"):
        database.create_table("mine", SCHEMA, ["id"], replicated=False)


def test_a_node_has_tables_of_its_own_whoever_leads(shared: Cluster, node: int, database: Database) -> None:
    with shared.servers[node].database as own:
        name = f"own{node}_{shared.last_index()}"
        made = own.create_table(name, SCHEMA, ["id"], replicated=False)
        assert made.info.local
        index = made.write(rows(0, 5))
        with own.transaction() as t:
            t.delete(made, 1)
            t.delete_range(made, prefix=3)
        assert t.index == index + 1
        assert ids(made.scan(reverse=True)) == [4, 2, 0]
        assert own.table(name).info == made.info
        assert name in [each.name for each in own.tables()]
        assert name not in [each.name for each in database.tables()]
        other = next(each for each in shared.servers if each != node)
        assert name not in [each.name for each in shared.servers[other].database.tables()]
        own.drop_table(name)
        with pytest.raises(UsageError, match="no table"):
            own.table(name)


def test_tables_of_a_node_need_nobody_else(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster()
    node = cluster.follower()
    with cluster.servers[node].database as own:
        own.create_table("mine", SCHEMA, ["id"], replicated=False)
        for other in [each for each in cluster.servers if each != node]:
            cluster.stop_node(other)
        made = own.table("mine")
        made.write(rows(0, 5))
        assert ids(made.scan(between=(2, 3))) == [2, 3]
