"""A whole node on a real port as one target: verbs, descriptors, tickets, actions, headers and batches of a client that means no good.

Rule 1: every call ends, with an answer or with an error that marble has put into words. What the server did not expect itself
(`FlightInternalError`) is a finding, and so is a call that takes `HANG_S`, and a node that does not answer afterwards.
Rule 2: what changes who takes part is not sent if it could be carried out: a node that waits for others for ever proves nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as fl
from fuzz.target import Finding, Target, batch_of, join, split, stream_of

from marble.actions import ACTIONS, decode_changes
from marble.config import RaftClusterConfig
from marble.errors import InvariantError, MarbleError, UsageError
from marble.server import create_arrow_flight_transport, create_raft_server
from marble.transport.faults import from_flight_error
from marble.transport.wire import FORWARD_HEADER, STAMP_HEADER, Stamp, encode_stamp

HANG_S = 60.0
"""Nothing takes nearly as long; a call that does is one that would never end."""

SCHEMA = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("name", pa.string())])
ROWS = pa.record_batch({"id": [1, 2], "name": ["a", "b"]}, schema=SCHEMA)
KEYS = ROWS.select(["id"])
TABLE = b"t"
HEADERS = (STAMP_HEADER.encode(), FORWARD_HEADER.encode(), b"authorization", b"marble-peer")
VERBS = (
    "do_action",
    "do_get",
    "get_flight_info",
    "get_schema",
    "do_put",
    "do_exchange",
    "list_flights",
    "list_actions",
)
UNSENT = bytes(set(range(256)) - set(range(0x20, 0x7F)))
"""What gRPC sends in no header, whoever asks it to."""


def _input(
    verb: str, place: bytes, body: bytes = b"", headers: bytes = b"", batch: pa.RecordBatch | None = None
) -> bytes:
    return join(bytes([VERBS.index(verb)]), place, body, headers, b"" if batch is None else stream_of(batch))


def _seeds() -> list[bytes]:
    stamp = encode_stamp(Stamp(2**40, 7))
    return [
        _input("do_action", b"status"),
        _input("do_action", b"create_table", b'{"name":"t","key":["id"],"schema":""}'),
        _input("do_action", b"tables", b'{"consistency":"local"}'),
        _input("do_action", b"members", b'{"consistency":"linearizable"}'),
        _input("do_action", b"change_membership", b'{"changes":[{"kind":"remove","node":9}],"transition":"auto"}'),
        _input("do_action", b"close_session", b'{"session":77}'),
        _input("do_action", b"drop_table", b'{"name":"none"}', stamp),
        _input("do_action", b"picture", b'{"after":1.5}'),
        _input("do_action", b"read_backup", b'{"token":"x","path":"a/b","offset":0,"bytes":100}'),
        _input("do_action", b"transaction", bytes(64)),
        _input("do_action", b"transfer_leadership", b'{"to":1}'),
        _input("do_get", TABLE),
        _input("do_get", b'{"table":"t","columns":["id"],"consistency":"local","limit":1,"reverse":true}'),
        _input("get_flight_info", TABLE),
        _input("get_schema", TABLE),
        _input("do_put", TABLE, batch=ROWS),
        _input("do_put", TABLE + b"/delete", batch=KEYS),
        _input("do_exchange", TABLE + b"/get/linearizable", batch=KEYS),
        _input("do_exchange", TABLE + b"/get/local/3", batch=KEYS),
        _input("do_exchange", TABLE + b"/upsert", stamp, batch=ROWS),
        _input("list_flights", b""),
        _input("list_actions", b""),
    ]


class Live:
    """One node and a client of it."""

    def __init__(self, endpoint: str) -> None:
        self._client = fl.FlightClient(f"grpc://{endpoint}")
        self._verbs: dict[str, Callable[[bytes, bytes, fl.FlightCallOptions, pa.RecordBatch], object]] = {
            "do_action": self._do_action,
            "do_get": lambda place, body, options, batch: self._client.do_get(fl.Ticket(place), options).read_all(),
            "get_flight_info": lambda place, body, options, batch: self._client.get_flight_info(
                _descriptor(place), options
            ),
            "get_schema": lambda place, body, options, batch: self._client.get_schema(_descriptor(place), options),
            "do_put": self._do_put,
            "do_exchange": self._do_exchange,
            "list_flights": lambda place, body, options, batch: list(self._client.list_flights(body, options)),
            "list_actions": lambda place, body, options, batch: self._client.list_actions(options),
        }

    def close(self) -> None:
        self._client.close()

    def target(self) -> Target:
        return Target("port", _seeds, self.parse, (MarbleError,))

    def parse(self, data: bytes) -> None:
        verb, place, body, headers, stream = split(data, 5)
        name = VERBS[(verb or b"\0")[0] % len(VERBS)]
        batch = _sound(batch_of(stream)) if stream else ROWS
        lines = [line.translate(None, UNSENT) for line in headers.split(b"\n")]
        pairs = [(HEADERS[number % len(HEADERS)], line) for number, line in enumerate(lines) if line]
        options = fl.FlightCallOptions(timeout=HANG_S, headers=pairs)
        try:
            self._verbs[name](place, body, options, batch)
        except (pa.ArrowException, fl.FlightError, OSError) as error:
            if isinstance(error, fl.FlightInternalError | fl.FlightTimedOutError):
                raise Finding(f"{name}: {error}") from error
            told = from_flight_error(error)
            if isinstance(told, InvariantError):
                raise Finding(f"{name}: {told}") from error
            raise told from None
        finally:
            self.check_alive()

    def check_alive(self) -> None:
        """The node answers, and its engine goes on."""
        for action in ("ping", "status"):
            try:
                list(self._client.do_action(fl.Action(action, b""), fl.FlightCallOptions(timeout=HANG_S)))
            except (pa.ArrowException, OSError) as error:
                raise Finding(f"afterwards the node does not answer {action}: {error}") from error

    def _do_action(self, place: bytes, body: bytes, options: fl.FlightCallOptions, batch: pa.RecordBatch) -> object:
        kind = place.decode("utf-8", "replace")
        if kind == "change_membership":
            decode_changes(body)
            raise UsageError("not sent: it would be carried out")
        return list(self._client.do_action(fl.Action(kind, body), options))

    def _do_put(self, place: bytes, body: bytes, options: fl.FlightCallOptions, batch: pa.RecordBatch) -> None:
        writer, reader = self._client.do_put(_descriptor(place), batch.schema, options)
        with writer:
            if body:
                writer.write_with_metadata(batch, body)
            else:
                writer.write_batch(batch)
            writer.done_writing()
            while reader.read() is not None:
                continue

    def _do_exchange(self, place: bytes, body: bytes, options: fl.FlightCallOptions, batch: pa.RecordBatch) -> None:
        writer, reader = self._client.do_exchange(_descriptor(place), options)
        with writer:
            writer.begin(batch.schema)
            if body:
                writer.write_with_metadata(batch, body)
            else:
                writer.write_batch(batch)
            writer.done_writing()
            with contextlib.suppress(StopIteration):
                while True:
                    reader.read_chunk()


def _descriptor(place: bytes) -> fl.FlightDescriptor:
    if place.startswith(b"\0"):
        return fl.FlightDescriptor.for_command(place[1:])
    # Protobuf lets no other text pass: such a call ends before it reaches a handler.
    return fl.FlightDescriptor.for_path(*place.decode("utf-8", "replace").split("/"))


def _sound(batch: pa.RecordBatch | None) -> pa.RecordBatch:
    """`batch` if this process can send it: what cannot be, the target "batch" tries. Otherwise one that it can."""
    if batch is None:
        return ROWS
    try:
        batch.validate(full=True)
        str(batch.schema)
    except (pa.ArrowException, UnicodeDecodeError):
        return ROWS
    return batch


def actions_without_seed() -> Sequence[str]:
    """Actions that no seed names: they are tried by name alone."""
    named = {split(seed, 5)[1].decode() for seed in _seeds()}
    return sorted(set(ACTIONS) - named - {"campaign"})


@contextlib.contextmanager
def live_node(directory: Path) -> Iterator[Live]:
    """A cluster of one, with the table that the seeds speak of."""
    server = create_raft_server(create_arrow_flight_transport("127.0.0.1:0"), data_dir=directory, node_id=1)
    server.initialize(RaftClusterConfig("fuzz", ["127.0.0.1:1"], election_timeout_ms=600, heartbeat_interval_ms=100))
    server.start()
    try:
        server.database.create_table(TABLE.decode(), SCHEMA, key=["id"])
        live = Live(server._flight.endpoint)
        try:
            yield live
        finally:
            live.close()
    finally:
        server.stop()
