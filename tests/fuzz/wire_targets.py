"""Parsers of what peers and clients send: packets and hellos, tickets, descriptors, bodies of actions, acks, errors, addresses."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
from fuzz.target import Target, batch_of, join, split, stream_of

from marble import service
from marble._core import entry_batch
from marble._core.checksum import xxh3_64
from marble._core.entry_batch import Proposal
from marble.actions import check_endpoints, decode_changes
from marble.config import parse_endpoint, parse_url
from marble.errors import MarbleError, ProtocolError, UsageError
from marble.members import encode_members
from marble.raft.messages import Message, MessageKind
from marble.requests import ScanRequest
from marble.schema import ENTRY_SCHEMA, TableInfo
from marble.table_options import TableOptions
from marble.transport import wire
from marble.transport.codec import Codec, Envelope, Lane
from marble.transport.faults import from_flight_error, to_flight_error
from marble.transport.snapshot_rows import offer_row, piece_row
from marble.transport.tickets import decode_ticket, encode_ticket
from marble.types import EntryKind, Members, Position, SnapshotMeta

ONE, TWO = Codec("cluster", 1, 1 << 20), Codec("cluster", 2, 1 << 20)
META = SnapshotMeta(9, 3, Members((1, 2), (2, 3), (4,), (3,), True))
ENDPOINTS = {1: "a:7001", 4: "d:7004"}
SCHEMA = pa.schema([pa.field("id", pa.int64()), pa.field("name", pa.string()), pa.field("at", pa.timestamp("us"))])
TABLE = TableInfo(1, "people", SCHEMA, ("id",), TableOptions(compression="lz4", merge=(("at", "max"),)))


# -- between nodes -------------------------------------------------------------------------------------------------------


def _hellos() -> list[bytes]:
    return [ONE.hello(2, "host:5001", 77), ONE.hello(0), ONE.hello(2, "[::1]:5001", 2**64 - 1, Lane.MESSAGES, 3)]


def _parse_hello(data: bytes) -> None:
    said = TWO.check_hello(data)
    if "�" not in said.endpoint:
        to = 0 if said.question else 2
        again = Codec("cluster", said.sender, 1 << 20).hello(to, said.endpoint, *said[2:5])
        assert again == data


def _mend_hello(data: bytes) -> bytes:
    return data if len(data) < 16 else data[:8] + struct.pack("<Q", xxh3_64(data[16:])) + data[16:]


def _messages() -> list[Envelope]:
    payload = entry_batch.encode_payload(pa.record_batch({"a": [1, 2, 3]}))
    members = encode_members(META.members, ENDPOINTS)
    kinds = [(EntryKind.WRITE, payload), (EntryKind.MEMBERSHIP, members), (EntryKind.OPEN_SESSION, None)]
    batch = entry_batch.build(7, 5, 3, [Proposal(kind, 0, body) for kind, body in kinds], 77)
    spans: dict[str, Any] = {"entries": entry_batch.span(batch), "changes": entry_batch.changes(batch)}
    append = Message(MessageKind.APPEND_ENTRIES, 1, 2, 4, log_index=4, log_term=2, commit=3, **spans)
    offer = Message(MessageKind.INSTALL_SNAPSHOT, 1, 2, 4, log_index=9, log_term=3, members=META.members)
    piece = Message(MessageKind.SNAPSHOT_PIECE, 1, 2, 4, log_index=9, log_term=3, context=64)
    return [
        Envelope(7, append, batch),
        Envelope(7, offer, offer_row(7, META, ENDPOINTS, 1000, 2**64 - 1)),
        Envelope(7, piece, piece_row(7, Position(9, 3), 64, b"some bytes")),
        Envelope(7, Message(MessageKind.HEARTBEAT, 1, 2, 4, commit=3)),
        Envelope(7, Message(MessageKind.REQUEST_PRE_VOTE, 1, 2, 4, log_index=3, log_term=3)),
    ]


def _packets() -> list[bytes]:
    *bringing, beat, vote = _messages()
    packets = [packet for each in bringing for packet in ONE.encode(2, [beat, each, vote])]
    packets += ONE.encode(2, [beat, vote])
    return [join(each.metadata, b"" if each.batch is None else stream_of(each.batch)) for each in packets]


def _parse_packet(data: bytes) -> None:
    metadata, stream = split(data, 2)
    envelopes = TWO.decode(1, metadata, batch_of(stream) if stream else None)
    again = ONE.encode(2, envelopes)
    assert b"".join(packet.metadata for packet in again) == metadata


def _mend_packet(data: bytes) -> bytes:
    """Each row's checksum, then the packet's."""
    metadata, stream = split(data, 2)
    batch = batch_of(stream)
    if batch is not None and batch.schema.equals(ENTRY_SCHEMA):
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid:
            return data
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        names = ("kind", "session", "sequence", "table", "payload")
        rows = zip(*(columns[name].to_pylist() for name in names), strict=True)
        if not any(column.null_count for column in batch.columns):
            columns["checksum"] = pa.array([_row_checksum(*row) for row in rows], pa.uint64())
        batch = pa.record_batch(list(columns.values()), schema=ENTRY_SCHEMA)
        stream = stream_of(batch)
        if len(metadata) >= 40:
            metadata = metadata[:36] + struct.pack("<I", batch.num_rows) + metadata[40:]
    if len(metadata) >= 40:
        seed = 0 if batch is None or not batch.schema.equals(ENTRY_SCHEMA) else entry_batch.places_checksum(batch)
        metadata = metadata[:8] + struct.pack("<Q", xxh3_64(metadata[16:], seed)) + metadata[16:]
    return join(metadata, stream)


def _row_checksum(kind: int, session: int, sequence: int, table: int, payload: bytes) -> int:
    return int(entry_batch.entry_checksum(kind, session, sequence, table, pa.py_buffer(payload)))


# -- of clients ----------------------------------------------------------------------------------------------------------


def _tickets() -> list[bytes]:
    request = ScanRequest(("id", "name"), lower=b"\x80\0", upper=b"\xff", reverse=True, limit=7, at_index=12)
    return [b"people", encode_ticket("people"), encode_ticket("people", request)]


def _descriptors() -> list[bytes]:
    paths = [("people",), ("people", "upsert"), ("people", "get", "local", "17"), ("people", "delete")]
    return [join(*(part.encode() for part in path), *([b""] * (4 - len(path)))) for path in paths]


def _parse_descriptor(data: bytes) -> None:
    path = [part for part in split(data, 4) if part]
    descriptor = flight.FlightDescriptor.for_path(*path)
    name, _, rest = service._path(descriptor, (wire.GET, wire.UPSERT, wire.DELETE))
    assert name == path[0].decode()
    service._moment(rest)


def _changes() -> list[bytes]:
    added = {"kind": "add-voter", "node": 4, "endpoint": "d:7004"}
    removed = {"kind": "remove", "node": 1}
    whole = {
        "changes": [added, removed, {"kind": "add-learner", "node": 5, "endpoint": "[::1]:1"}],
        "transition": "joint",
    }
    return [wire.encode_json(each) for each in (whole, {"changes": []}, {"changes": [removed]})]


def _parse_changes(data: bytes) -> None:
    changes, endpoints, _ = decode_changes(data)
    check_endpoints(changes, endpoints, ENDPOINTS)


def _definitions() -> list[bytes]:
    plain = {"name": "t", "key": ["id"], "schema": wire.encode_schema(SCHEMA)}
    return [wire.encode_json(plain), wire.encode_json({**plain, "options": wire.options_to_json(TABLE.options)})]


def _parse_definition(data: bytes) -> None:
    asked = wire.decode_object(data, "create_table", wire.TABLE_BYTES_MAX, ("name", "key", "schema"), ("options",))
    schema = wire.decode_schema(asked["schema"])
    wire.options_from_json(asked.get("options", {}), schema)


def _schemas() -> list[bytes]:
    nested = pa.schema([("s", pa.struct([("m", pa.map_(pa.string(), pa.list_(pa.decimal128(5, 2))))]))])
    dictionary = pa.schema([pa.field("d", pa.dictionary(pa.int8(), pa.string()), metadata={"a": "b"})])
    return [schema.serialize().to_pybytes() for schema in (SCHEMA, nested, dictionary)]


# -- of servers, to clients ----------------------------------------------------------------------------------------------


def _acks() -> list[bytes]:
    good, bad = wire.Ack(5, 2, 1), wire.Ack(error_code="not_leader", message="no", leader="a:1")
    return [wire.encode_ack(good), wire.encode_ack(bad), wire.encode_acks([good, bad])]


def _parse_acks(data: bytes) -> None:
    for ack in wire.decode_acks(data):
        ack.error()


def _errors() -> list[bytes]:
    infos = ({"code": "not_leader", "message": "no", "leader": "a:1"}, {"code": "usage", "message": "wrong"})
    return [json.dumps(info).encode() for info in infos]


def _parse_error(data: bytes) -> None:
    error = from_flight_error(flight.FlightUnavailableError("why", data))
    assert isinstance(error, MarbleError)
    # And it can be told on: a relay does so.
    again = from_flight_error(to_flight_error(error))
    assert type(again) is type(error)


# -- addresses -----------------------------------------------------------------------------------------------------------


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _parse_url(data: bytes) -> None:
    for endpoint in parse_url(_text(data)):
        host, port = parse_endpoint(endpoint)
        assert host
        assert 0 < port < 2**16


WIRE_TARGETS: Sequence[Target] = (
    Target("hello", _hellos, _parse_hello, (ProtocolError,), _mend_hello),
    Target("packet", _packets, _parse_packet, (ProtocolError,), _mend_packet),
    Target("ticket", _tickets, decode_ticket, (UsageError,)),
    Target("descriptor", _descriptors, _parse_descriptor, (UsageError,)),
    Target("stamp", lambda: [wire.encode_stamp(wire.Stamp(3, 4))], wire.decode_stamp, (UsageError,)),
    Target("changes", _changes, _parse_changes, (UsageError,)),
    Target("definition", _definitions, _parse_definition, (UsageError,)),
    Target("schema", _schemas, lambda data: wire.decode_schema(base64.b64encode(data).decode()), (UsageError,)),
    Target("acks", _acks, _parse_acks, (ProtocolError,)),
    Target("table", lambda: [wire.encode_table_info(TABLE)], wire.decode_table_info, (ProtocolError,)),
    Target("tables", lambda: [wire.encode_tables([TABLE, TABLE])], wire.decode_tables, (ProtocolError,)),
    Target("error", _errors, _parse_error, ()),
    Target("url", lambda: [b"grpc://a:1,[::1]:5001,127.0.0.1:5002", b"grpc+tcp://h:1/"], _parse_url, (UsageError,)),
)
