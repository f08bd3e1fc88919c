"""What a stranger may send, and how long one may keep a node waiting. Also the canary: Arrow and gRPC are laid out as known."""

from __future__ import annotations

import dataclasses
import queue
import resource
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.flight as fl
import pyarrow.ipc as ipc
import pytest
from transport.pki import DEADLINE_S, QUICK, Node, ask, eventually, running

from marble.config import SecurityConfig
from marble.errors import UnavailableError, UsageError
from marble.transport import limits
from marble.transport.faults import from_flight_error
from marble.transport.flight import FlightTransport
from marble.transport.limits import SCHEMA_BYTES_MAX, Gate, address_of, drop_connections
from marble.transport.security import PLAIN

SCHEMA = pa.schema([("a", pa.binary())])
LIMIT = 8 << 20
SMALL = dataclasses.replace(QUICK, entry_bytes_max=LIMIT, message_bytes_max=LIMIT, slow_reader_s=0.2)


class Takes(Node):
    """Counts what comes out of a DoPut, and answers a DoGet without end."""

    def __init__(self) -> None:
        super().__init__(1, SecurityConfig(), SMALL, service=self)
        self.rows: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.ended = threading.Event()

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        for chunk in reader:
            self.rows.put(chunk.data.num_rows)

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        for chunk in reader:
            writer.write_metadata(chunk.app_metadata)

    def do_action(self, context: Any, action: fl.Action) -> Any:
        return iter([b"%d" % len(action.body)])

    def do_get(self, context: Any, ticket: fl.Ticket) -> fl.GeneratorStream:
        batch = pa.record_batch([[b"x" * (1 << 20)]], SCHEMA)

        def batches() -> Iterator[pa.RecordBatch]:
            try:
                while True:
                    yield batch
            finally:
                self.ended.set()

        return fl.GeneratorStream(SCHEMA, batches())


@pytest.fixture
def node() -> Iterator[Takes]:
    made = Takes()
    with running(made):
        made.start()
        yield made


def put(node: Node, batch: pa.RecordBatch, compression: str | None = None) -> None:
    options = fl.FlightCallOptions(timeout=DEADLINE_S, write_options=ipc.IpcWriteOptions(compression=compression))
    with PLAIN.client(node.endpoint, [("grpc.use_local_subchannel_pool", 1)]) as made:
        writer, _ = made.do_put(fl.FlightDescriptor.for_path("t"), batch.schema, options)
        writer.write_batch(batch)
        writer.close()


def test_arrow_and_grpc_are_laid_out_as_known(node: Takes) -> None:
    gate = node.transport._listening._server.gate
    assert pa.__version__.startswith(limits.TRIED)
    assert gate.holds
    put(node, pa.record_batch([[b"x"]], SCHEMA))
    assert gate.looks_inside
    assert node.rows.get(timeout=DEADLINE_S) == 1


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_what_unpacks_to_too_much_is_refused_before_it_is_unpacked(node: Takes, compression: str) -> None:
    put(node, pa.record_batch([[b"\0" * (LIMIT - (1 << 20))]], SCHEMA), compression)
    assert node.rows.get(timeout=DEADLINE_S) == 1
    bomb = pa.record_batch([[b"\0" * (1 << 29)]], SCHEMA)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        fl.FlightServerError, match=f"unpacks to 5368709.. bytes: this node takes {LIMIT} at most"
    ) as caught:
        put(node, bomb, compression)
    assert isinstance(from_flight_error(caught.value), UsageError)
    # In KiB: not even a quarter of it was ever there.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < (1 << 27) // 1024
    assert node.rows.empty()
    node.transport._listening.check()
    assert node.count("transport_messages_oversized") == 1
    put(node, pa.record_batch([[b"y"]], SCHEMA))
    assert node.rows.get(timeout=DEADLINE_S) == 1


def test_dictionaries_count_together(node: Takes) -> None:
    words = pa.array([b"%d" % number + b"\0" * (1 << 20) for number in range(6)])
    batch = pa.record_batch({"a": pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), words)})
    put(node, batch, "zstd")
    assert node.rows.get(timeout=DEADLINE_S) == 2
    larger = pa.array([b"%d" % number + b"\0" * (1 << 20) for number in range(9)])
    with pytest.raises(fl.FlightServerError, match="unpacks to"):
        put(node, pa.record_batch({"a": pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), larger)}), "zstd")


def test_a_schema_is_refused_by_its_size(node: Takes) -> None:
    largest = pa.schema(
        [pa.field(f"{number:0256}", pa.binary()) for number in range(4096)], {"pandas": "x" * (1 << 20)}
    )
    put(node, pa.record_batch([[b"x"]] * 4096, largest))
    assert node.rows.get(timeout=DEADLINE_S) == 1
    for wide in (
        pa.schema([pa.field(str(number), pa.null()) for number in range(100_000)]),
        pa.schema([pa.field("a", pa.null())], {"pandas": "x" * (SCHEMA_BYTES_MAX + 1)}),
    ):
        with pytest.raises(
            fl.FlightServerError, match=f"a schema of .* bytes: this node takes {SCHEMA_BYTES_MAX}"
        ) as caught:
            put(node, pa.record_batch([pa.nulls(1)] * len(wide), wide))
        assert isinstance(from_flight_error(caught.value), UsageError)
    assert node.rows.empty()


def test_a_message_has_a_largest_size_and_grpc_unpacks_none(node: Takes) -> None:
    with PLAIN.client(node.endpoint) as made:
        (answer,) = made.do_action(fl.Action("x", b"\0" * LIMIT))
        assert answer.body == b"%d" % LIMIT
        with pytest.raises(pa.ArrowInvalid, match="larger than max"):
            list(made.do_action(fl.Action("x", b"\0" * (2 * LIMIT))))
    with PLAIN.client(node.endpoint, [("grpc.default_compression_algorithm", 2)]) as made:
        with pytest.raises(pa.ArrowNotImplementedError, match="gzip"):
            list(made.do_action(fl.Action("x", b"\0" * 100_000)))


def test_who_does_not_read_is_dropped(node: Takes) -> None:
    with PLAIN.client(node.endpoint, [("grpc.use_local_subchannel_pool", 1)]) as made:
        reader = made.do_get(fl.Ticket(b"t"))
        reader.read_chunk()

        def dropped() -> bool:
            node.transport._listening.check()
            return node.count("transport_slow_readers_dropped") > 0

        eventually(dropped, "it is waited for")
        assert node.ended.wait(DEADLINE_S)
        with pytest.raises((fl.FlightError, pa.ArrowException, OSError)):
            reader.read_all()
    # Others are served as before.
    assert ask(node.endpoint, PLAIN) == b"0"


def test_a_port_is_nobody_else_s(node: Takes) -> None:
    with pytest.raises(UnavailableError, match="cannot listen"):
        FlightTransport(node.endpoint, "c", 2)


def test_a_gate_that_was_not_tried_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TRIED", ("0.0.",))
    gate = Gate(LIMIT)
    assert gate.location("h:1", tls=True) == "grpc+tls://h:1"
    assert (gate.holds, gate.looks_inside, gate.refused, gate.slow(0.0)) == (False, False, 0, [])
    with running(made := Takes()):
        made.start()
        assert ask(made.endpoint, PLAIN) == b"0"


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:127.0.0.1:50000", ("127.0.0.1", 50000)),
        ("ipv6:%5B::1%5D:50000", ("::1", 50000)),
        ("ipv6:[fe80::1%25eth0]:7", ("fe80::1", 7)),
        ("unix:/run/x", None),
        ("ipv4:127.0.0.1:x", None),
        ("", None),
    ],
)
def test_peers_are_found_by_their_address(peer: str, address: tuple[str, int] | None) -> None:
    assert address_of(peer) == address


def test_only_accepted_connections_of_a_port_are_dropped() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as caller, server.accept()[0] as accepted:
            caller.settimeout(DEADLINE_S)
            assert drop_connections(port, {("127.0.0.1", 1)}) == 0
            assert drop_connections(port, {caller.getsockname()}) == 1
            assert caller.recv(1) == b""
            assert accepted.fileno() != -1
