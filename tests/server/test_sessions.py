"""Sessions over real nodes: whatever is sent twice takes effect once, and whoever lost an answer gets it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pyarrow as pa
import pyarrow.flight as flight
import pytest
from server.cluster import SCHEMA, WAIT_S, Cluster, eventually, options, refused, rows

from marble.client import ClientOptions, RemoteBackend
from marble.database import Database
from marble.errors import SessionExpiredError, UsageError
from marble.schema import TableInfo
from marble.transport import intake as intake_module
from marble.transport import wire
from marble.transport.wire import Stamp


def open_session(cluster: Cluster, node: int) -> int:
    return int(cluster.act(node, "open_session")["session"])


@pytest.fixture
def database(shared: Cluster) -> Iterator[Database]:
    with connect(shared) as database:
        yield database


def connect(cluster: Cluster) -> Database:
    return Database(RemoteBackend(tuple(cluster.config.endpoints.values()), ClientOptions(WAIT_S)))


def test_a_session_is_the_index_of_the_entry_that_opened_it(shared: Cluster, node: int) -> None:
    before = shared.last_index()
    first, second = open_session(shared, node), open_session(shared, node)
    assert before < first < second <= shared.last_index()


def test_a_batch_that_is_sent_twice_takes_effect_once(shared: Cluster, node: int, table: str) -> None:
    shared.put(node, [table], [rows(0, 5)])
    session = open_session(shared, node)
    keys = rows(3, 9).select(["id"])
    first = shared.put(node, [table, "delete"], [keys], stamps=[Stamp(session, 1)])
    shared.put(node, [table], [rows(3, 4, "new")])
    other = next(each for each in sorted(shared.servers) if each != node)
    for asked in (node, other):
        (again,) = shared.put(asked, [table, "delete"], [keys], stamps=[Stamp(session, 1)])
        assert (again.index, again.value) == (first[0].index, 2)
    assert shared.get(node, table.encode()).column("name").to_pylist() == ["x0", "x1", "x2", "new3"]


def test_an_error_is_an_answer_too(shared: Cluster, node: int, table: str) -> None:
    session = open_session(shared, node)
    info = TableInfo(10**6, "gone", SCHEMA, ("id",))
    stamp = Stamp(session, 1)
    server = shared.servers[shared.leader()]
    backend = server.database._backend
    for _ in range(2):
        with pytest.raises(UsageError):
            backend.write_entry(info, rows(0, 1), stamp=stamp).result(WAIT_S)


def test_an_operation_that_is_sent_twice_is_carried_out_once_on_every_node(shared: Cluster, node: int) -> None:
    session = open_session(shared, node)
    operation = f"once of {session}".encode()
    answers = [shared.act(node, "propose", operation, stamp=Stamp(session, 1)) for _ in range(3)]
    assert len({answer["index"] for answer in answers}) == 1
    last = shared.last_index()
    for each, server in shared.servers.items():
        eventually(lambda server=server: server.get_cluster_status()["applied_index"] >= last, "everything applied")
        assert [index for index, known in shared.commands[each] if known == operation] == [answers[0]["index"]]


def test_a_closed_session_refuses_what_it_still_sends(shared: Cluster, node: int, table: str) -> None:
    session = open_session(shared, node)
    shared.act(node, "close_session", {"session": session})
    (ack,) = shared.put(node, [table], [rows(0, 1)], stamps=[Stamp(session, 1)])
    assert ack.error_code == "session_expired"
    with refused(SessionExpiredError, "not executed"):
        shared.act(node, "propose", b"x", stamp=Stamp(session, 2))
    assert shared.get(node, table.encode()).num_rows == 0


def test_metadata_that_is_no_stamp_is_refused_and_the_stream_goes_on(shared: Cluster, node: int, table: str) -> None:
    writer, reader = shared.client(node).do_put(flight.FlightDescriptor.for_path(table), SCHEMA, options())
    with writer:
        writer.write_with_metadata(rows(0, 1), pa.py_buffer(b'{"session": 1}'))
        writer.write_batch(rows(1, 2))
        writer.done_writing()
        answers = [wire.decode_ack(reader.read()) for _ in range(2)]
    assert [ack.error_code for ack in answers] == ["usage", None]
    assert "no 'sequence'" in answers[0].message


def test_a_client_opens_one_session_for_each_stream_and_closes_it(shared: Cluster, table: str) -> None:
    database = connect(shared)
    handle = database.table(table)
    before = shared.last_index()
    for first in range(3):
        handle.write(rows(first, first + 1))
    handle.delete(0)
    assert shared.last_index() == before + 6  # Two sessions and four writes.
    stream = next(iter(database._backend._puts.values()))
    session = stream.session
    database.close()
    (ack,) = shared.put(1, [table], [rows(0, 1)], stamps=[Stamp(session, 99)])
    assert ack.error_code == "session_expired"


def test_a_client_whose_session_ended_opens_another_without_a_word(
    shared: Cluster, database: Database, table: str
) -> None:
    handle = database.table(table)
    handle.write(rows(0, 1))
    (stream,) = database._backend._puts.values()
    ended = stream.session
    shared.act(1, "close_session", {"session": ended})
    handle.write(rows(1, 2))
    assert stream.session not in (0, ended)
    assert handle.count_rows() == 2


def test_a_lost_answer_is_fetched_and_not_written_again(
    shared: Cluster, database: Database, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = database.table(table)
    first = handle.write(rows(0, 1))
    lost = threading.Event()
    encode = intake_module.encode_acks

    def lose_one(acks: list[wire.Ack]) -> bytes:
        if not lost.is_set() and acks[0].error_code is None:
            lost.set()
            raise OSError("the connection broke")
        return encode(acks)

    monkeypatch.setattr(intake_module, "encode_acks", lose_one)
    second = handle.write(rows(1, 2))
    assert lost.is_set()
    assert second == first + 1  # The answer of the first attempt; the second is an entry that did nothing.
    assert shared.last_index() == second + 1


def test_writes_in_flight_live_through_the_loss_of_their_leader(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster()
    cluster.create_table("t")
    with connect(cluster) as database:
        handle = database.table("t")
        handle.write(rows(0, 1))
        futures: list[Future[int]] = []
        for number in range(1, 300):
            if number == 150:
                killer = threading.Thread(target=cluster.stop_node, args=(cluster.leader(),))
                killer.start()
            # Each key is written by three writes: the order in which they take effect shows in the end.
            futures.append(handle.write_async(rows(number // 3, number // 3 + 1, f"{number}-")))
        killer.join()
        indexes = [future.result(WAIT_S) for future in futures]
        assert indexes == sorted(indexes)
        assert 3 < len(set(indexes)) <= len(indexes)  # What was gathered shares an index.
        names = handle.scan().to_table().column("name").to_pylist()
    assert names == [f"{min(3 * key + 2, 299)}-{key}" for key in range(100)]


def test_a_session_outlives_its_leader(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster()
    leader = cluster.leader()
    session = open_session(cluster, leader)
    first = cluster.act(leader, "propose", b"once", stamp=Stamp(session, 1))
    cluster.stop_node(leader)
    again = cluster.act(cluster.leader(), "propose", b"once", stamp=Stamp(session, 1))
    assert again["index"] == first["index"]
    cluster.start_node(leader)
    third = cluster.act(cluster.leader(), "propose", b"once", stamp=Stamp(session, 1))
    assert third["index"] == first["index"]
    last = cluster.last_index()
    for node, server in cluster.servers.items():
        eventually(lambda server=server: server.get_cluster_status()["applied_index"] >= last, "everything applied")
        assert cluster.commands[node] == [(first["index"], b"once")]


def test_writes_to_a_table_that_merges_are_not_gathered(shared: Cluster, database: Database) -> None:
    counts = database.create_table(
        "gathered_counts", pa.schema([("id", pa.int64()), ("n", pa.int64())]), ["id"], merge={"n": "sum"}
    )
    futures = [counts.write_async(pa.table({"id": [1], "n": [2]})) for _ in range(50)]
    assert len({future.result(WAIT_S) for future in futures}) == 50
    assert counts.get(1) == {"id": 1, "n": 100}
