"""Parsers of what tables are made of: batches of strangers, payloads of entries, memberships, whole entries at apply."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa
from fuzz.target import Finding, Target, aligned, batch_of, stream_of
from fuzz.wire_targets import ENDPOINTS, META, SCHEMA, TABLE

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.errors import CorruptionError, ProtocolError, UsageError
from marble.lsm import payload
from marble.lsm.machine import TableMachine
from marble.members import decode_members, encode_members
from marble.rows import conform, conform_keys
from marble.schema import TableInfo
from marble.table_options import fill
from marble.transport import wire
from marble.types import EntryKind

RICH = pa.schema(
    [
        pa.field("k", pa.string(), nullable=False),
        pa.field("n", pa.decimal128(9, 2), nullable=False),
        pa.field("l", pa.list_(pa.struct([("a", pa.int8()), ("b", pa.binary())]))),
        pa.field("m", pa.map_(pa.string(), pa.float64())),
        pa.field("d", pa.dictionary(pa.int8(), pa.string())),
    ]
)
"""As many ways to lie about offsets as possible. Dictionaries cannot be stored: for `conform` only."""

STORED = pa.schema(list(RICH)[:4])


def _rows(schema: pa.Schema = SCHEMA) -> list[pa.RecordBatch]:
    if schema is SCHEMA:
        batch = pa.record_batch({"id": [1, 2, 3], "name": ["a", None, "ccc"], "at": [5, 6, None]}, schema=SCHEMA)
        return [batch, batch.slice(1)]
    row = {"k": "key", "n": 5, "l": [{"a": 1, "b": b"x"}, None], "m": [("x", 1.5)]}
    return [pa.RecordBatch.from_pylist([row, {**row, "k": "other", "l": None}], schema)]


def _table(schema: pa.Schema, key: tuple[str, ...]) -> TableInfo:
    return TableInfo(4, "rich", schema, key)


STORED_TABLE = _table(STORED, ("k", "n"))


# -- what DoPut brings ---------------------------------------------------------------------------------------------------


def _batches() -> list[bytes]:
    large = pa.record_batch(
        [pa.array([1]), pa.array(["x"], pa.large_string()), pa.array([None], pa.timestamp("us"))], SCHEMA.names
    )
    views = pa.record_batch(
        [pa.array([1]), pa.array(["x" * 30], pa.string_view()), pa.array([3], pa.timestamp("us"))], SCHEMA.names
    )
    return [stream_of(batch) for batch in (*_rows(), large, views)]


def _parse_batch(data: bytes) -> None:
    batch = batch_of(data)
    if batch is None:
        raise UsageError("what Flight itself refuses")
    wire.check_texts(batch.schema)
    conform(fill(batch, TABLE.schema, TABLE.options), TABLE).validate(full=True)


def _parse_rich_batch(data: bytes) -> None:
    batch = batch_of(data)
    if batch is None:
        raise UsageError("what Flight itself refuses")
    wire.check_texts(batch.schema)
    payload.encode_rows(conform(batch, STORED_TABLE))


def _parse_keys(data: bytes) -> None:
    batch = batch_of(data)
    if batch is None:
        raise UsageError("what Flight itself refuses")
    wire.check_texts(batch.schema)
    conform_keys(batch, TABLE).validate(full=True)


# -- payloads ------------------------------------------------------------------------------------------------------------

_OPERATIONS = [
    payload.Operation(EntryKind.WRITE, TABLE.id, payload.encode_rows(_rows()[0])),
    payload.Operation(EntryKind.DELETE, TABLE.id, payload.encode_rows(_rows()[0].select(["id"]))),
    payload.Operation(EntryKind.DELETE_RANGE, TABLE.id, payload.encode_range(b"a", None)),
]


def _of(function: Callable[[pa.Buffer], object]) -> Callable[[bytes], object]:
    return lambda data: function(aligned(data))


def _parse_rows(data: bytes) -> None:
    payload.decode_rows(aligned(data), STORED_TABLE)


def _parse_transaction(data: bytes) -> None:
    for operation in payload.decode_transaction(aligned(data)):
        payload.check_operation(operation, TABLE)


def _bytes(*buffers: pa.Buffer) -> list[bytes]:
    return [buffer.to_pybytes() for buffer in buffers]


def _members() -> list[bytes]:
    return _bytes(encode_members(META.members, ENDPOINTS))


# -- entries at apply ----------------------------------------------------------------------------------------------------

_APPLIED = (
    EntryKind.WRITE,
    EntryKind.DELETE,
    EntryKind.DELETE_RANGE,
    EntryKind.TRANSACTION,
    EntryKind.CREATE_TABLE,
    EntryKind.DROP_TABLE,
    EntryKind.COMMAND,
)


def _entries() -> list[bytes]:
    """Kind, then payload."""
    found = [bytes([each.kind]) + each.payload.to_pybytes() for each in _OPERATIONS]
    others = {
        EntryKind.TRANSACTION: payload.encode_transaction(_OPERATIONS),
        EntryKind.CREATE_TABLE: payload.encode_create_table("u", STORED, ["k"]),
        EntryKind.DROP_TABLE: payload.encode_drop_table("people"),
        EntryKind.COMMAND: payload.encode_command(b"any"),
    }
    return found + [bytes([kind]) + body.to_pybytes() for kind, body in others.items()]


def _parse_entry(data: bytes) -> None:
    """What a replica does with an entry that a majority has: the same everywhere, so it answers with a result, whatever it is."""
    kind = data[0] if data[:1] and data[0] in _APPLIED else EntryKind.WRITE
    machine = TableMachine()
    create = Proposal(EntryKind.CREATE_TABLE, 0, payload.encode_create_table("people", SCHEMA, ["id"], TABLE.options))
    (made,) = machine.apply(entry_batch.build(0, 1, 1, [create], 5))
    if made.error_code is not None:
        raise Finding(f"the table was not made: {made.message}")
    table = made.value if kind in (EntryKind.WRITE, EntryKind.DELETE, EntryKind.DELETE_RANGE) else 0
    (result,) = machine.apply(entry_batch.build(0, 2, 1, [Proposal(kind, table, aligned(data[1:]))], 6))
    for info in machine.tables():
        machine.read(info.id).scan().read_all().validate(full=True)
    result.raise_for_error()


DATA_TARGETS: Sequence[Target] = (
    Target("batch", _batches, _parse_batch, (UsageError,)),
    Target("rich batch", lambda: [stream_of(batch) for batch in _rows(STORED)], _parse_rich_batch, (UsageError,)),
    Target("keys", lambda: [stream_of(batch.select(["id"])) for batch in _rows()], _parse_keys, (UsageError,)),
    Target("rows", lambda: _bytes(*map(payload.encode_rows, _rows(STORED))), _parse_rows, (UsageError,)),
    Target(
        "range",
        lambda: _bytes(payload.encode_range(b"a", b"b"), payload.encode_range(b"", None)),
        _of(payload.decode_range),
        (UsageError,),
    ),
    Target("transaction", lambda: _bytes(payload.encode_transaction(_OPERATIONS)), _parse_transaction, (UsageError,)),
    Target(
        "creation",
        lambda: _bytes(
            payload.encode_create_table("t", SCHEMA, ["id"], TABLE.options),
            payload.encode_create_table("u", STORED, ["k"]),
        ),
        _of(payload.decode_create_table),
        (UsageError,),
    ),
    Target("drop", lambda: _bytes(payload.encode_drop_table("people")), _of(payload.decode_drop_table), (UsageError,)),
    Target("command", lambda: _bytes(payload.encode_command(b"any bytes")), _of(payload.decode_command), (UsageError,)),
    Target("members", _members, _of(decode_members), (ProtocolError,)),
    Target("entry", _entries, _parse_entry, (UsageError, CorruptionError)),
)
