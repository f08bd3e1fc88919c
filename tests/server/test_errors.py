"""What users read when something is wrong: who, why, and what to do."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as flight
import pytest
from server.cluster import SCHEMA, Cluster, eventually, free_endpoints, rows

import marble
from marble.errors import CorruptionError, MarbleError, ProtocolError, UnavailableError, UsageError

HASTY_S = 1.0


def told(kind: type[MarbleError], endpoint: str, timeout_s: float = HASTY_S) -> str:
    """What reading the tables at `endpoint` ends in."""
    with marble.connect(f"grpc://{endpoint}", timeout_s=timeout_s) as database, pytest.raises(kind) as caught:
        database.table("t")
    assert "gRPC" not in str(caught.value)
    assert "Flight returned" not in str(caught.value)
    return str(caught.value)


def test_a_node_that_is_down() -> None:
    (endpoint,) = free_endpoints(1)
    assert told(UnavailableError, endpoint) == (
        f"{endpoint}: the connection is refused: nothing listens there (does the node run?); see `marble doctor {endpoint}`"
    )


def test_a_name_that_nobody_knows() -> None:
    assert told(UnavailableError, "marble-doctor.invalid:5001").startswith(
        "marble-doctor.invalid:5001: the name of the host is not known"
    )


@contextlib.contextmanager
def port(answer: bytes) -> Iterator[str]:
    """A port of another program, which says `answer` to whoever connects and then waits."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def accept() -> None:
            with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
                while not over.is_set():
                    connection, _ = listener.accept()
                    stack.enter_context(connection).sendall(answer)

        thread = threading.Thread(target=accept, name="test-port", daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(30.0)


def test_a_port_of_another_program() -> None:
    with port(b"SSH-2.0-OpenSSH_9.2\r\n" * 10) as endpoint:
        assert told(UnavailableError, endpoint).startswith(f"{endpoint}: another program is on that port")


def test_a_port_that_says_nothing() -> None:
    with port(b"") as endpoint:
        assert told(UnavailableError, endpoint).startswith(f"{endpoint}: no answer in time")


def test_a_flight_server_that_is_no_node() -> None:
    with flight.FlightServerBase("grpc://127.0.0.1:0") as server:
        words = told(ProtocolError, f"127.0.0.1:{server.port}")
    assert words.startswith(f"127.0.0.1:{server.port}: this is not a marble node, or one of another version")


def test_no_majority_for_a_write_and_for_a_read(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(3)
    cluster.create_table("t")
    url = "grpc://" + ",".join(cluster.config.endpoints.values())
    with marble.connect(url, timeout_s=2.0) as database:
        table = database.table("t")
        table.write(rows(0, 1))
        keeps = cluster.follower()
        for node in set(cluster.servers) - {keeps}:
            cluster.stop_node(node)
        eventually(lambda: cluster.servers[keeps].get_leader_endpoint() is None, "no leader")
        with pytest.raises(UnavailableError) as written:
            table.write(rows(1, 2))
        with pytest.raises(UnavailableError) as read:
            table.get(0)
    words = str(written.value)
    assert "no leader is known to" in words
    assert words.count("the connection is refused") == 2
    assert "a majority of the voters must run and reach each other, see `marble doctor" in words
    for endpoint in cluster.config.endpoints.values():
        assert endpoint in words
    assert "the connection is refused" in str(read.value)


def test_no_node_at_all_for_a_write() -> None:
    one, two = free_endpoints(2)
    with marble.connect(f"grpc://{one},{two}", timeout_s=HASTY_S) as database:
        with pytest.raises(UnavailableError) as caught:
            database.create_table("t", SCHEMA, key=["id"])
    words = str(caught.value)
    assert f"`marble doctor {one},{two}`" in words
    assert words.count("the connection is refused") == 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda table: table.write(pa.record_batch({"id": ["x"], "name": ["y"]})), "id"),
        (lambda table: table.write(pa.record_batch({"id": [1], "nam": ["y"]})), "nam"),
        (lambda table: table.write(pa.record_batch({"id": [None], "name": ["y"]}, schema=SCHEMA)), "id"),
        (lambda table: table.scan(columns=["nothing"]).to_table(), "nothing"),
    ],
)
def test_what_does_not_fit_a_table_is_named(
    shared: Cluster, table: str, wrong: Callable[[marble.Table], object], words: str
) -> None:
    with marble.connect(f"grpc://{shared.config.endpoints[1]}") as database:
        with pytest.raises(UsageError, match=words):
            wrong(database.table(table))


def test_a_table_that_is_not_there_is_named_with_those_that_are(shared: Cluster, table: str) -> None:
    with marble.connect(f"grpc://{shared.config.endpoints[1]}") as database:
        with pytest.raises(UsageError, match="nothing") as caught:
            database.table("nothing")
    assert table in str(caught.value)


def test_a_directory_in_use_and_one_of_another_node(tmp_path: Path) -> None:
    with marble.open(tmp_path / "d"):
        with pytest.raises(UnavailableError, match=r"is in use|locked") as caught:
            marble.open(tmp_path / "d")
        assert str(tmp_path) in str(caught.value)


def test_a_damaged_log_names_the_file_and_what_to_do(tmp_path: Path) -> None:
    with marble.open(tmp_path) as database:
        table = database.create_table("t", SCHEMA, key=["id"])
        table.write(rows(0, 100))
        table.write(rows(100, 200))
    (segment,) = (tmp_path / "log").glob("*.arrows")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    with pytest.raises(CorruptionError) as caught:
        marble.open(tmp_path)
    assert segment.name in str(caught.value)
