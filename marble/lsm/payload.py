"""What the payload of each kind of entry holds: to bytes, and back from bytes that nobody vouches for.

A payload is one encapsulated Arrow IPC record-batch message (see `marble._core.entry_batch`); the schema is known from
the kind of the entry and its table:

- WRITE: rows of the table, in its schema. DELETE: keys, in its key schema. At least one.
- DELETE_RANGE: one row of `RANGE_SCHEMA`.
- TRANSACTION: rows of `TRANSACTION_SCHEMA`: payloads inside of a payload.
- CREATE_TABLE: one row of `CREATE_TABLE_SCHEMA`. DROP_TABLE: one row of `DROP_TABLE_SCHEMA`.
- COMMAND: one row of `COMMAND_SCHEMA`.

Rule 1: what comes out of a ``decode_*`` has passed ``validate(full=True)`` and every rule of `marble.schema`.
Rule 2: bytes that are not such a payload are the proposer's mistake, the same on every replica: `UsageError`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from marble._core.entry_batch import decode_payload, encode_payload
from marble._core.validity import fault_of
from marble.errors import ProtocolError, UsageError
from marble.requests import TableChange
from marble.schema import TableInfo, check_keys, check_rows, check_table, check_table_name
from marble.table_options import DEFAULT_OPTIONS, TableOptions, check_options
from marble.types import PAYLOAD_ALIGNMENT_BYTES, EntryKind


def _column(name: str, type_: pa.DataType) -> pa.Field:
    return pa.field(name, type_, nullable=False)


CREATE_TABLE_SCHEMA: Final = pa.schema(
    [
        _column("name", pa.string()),
        _column("schema", pa.binary()),
        _column("key", pa.list_(_column("item", pa.string()))),
        _column("compression", pa.string()),
        _column("ttl_column", pa.string()),
        _column("ttl_us", pa.int64()),
        _column("ttl_stamped", pa.bool_()),
        _column("merge_columns", pa.list_(_column("item", pa.string()))),
        _column("merge_operators", pa.list_(_column("item", pa.string()))),
    ]
)
"""``schema`` is an encapsulated IPC schema message, as `pyarrow.Schema.serialize` makes it. From ``compression`` on these are
the fields of `marble.table_options.TableOptions`, with an empty text for None; each of ``merge_columns`` has its operator."""

DROP_TABLE_SCHEMA: Final = pa.schema([_column("name", pa.string())])

COMMAND_SCHEMA: Final = pa.schema([_column("operation", pa.binary())])

RANGE_SCHEMA: Final = pa.schema([_column("lower", pa.binary()), pa.field("upper", pa.binary())])
"""The keys from ``lower`` on and before ``upper``, as `marble._core.key_codec.KeyCodec` encodes them. ``upper`` null: to the end."""

BOUND_BYTES_MAX: Final = 256 * 1024
"""Of one end of a range."""

TRANSACTION_SCHEMA: Final = pa.schema(
    [_column("kind", pa.uint8()), _column("table", pa.uint32()), _column("payload", pa.binary())]
)
"""One row is one operation: what an entry with this kind, table and payload would do. Payloads are whole numbers of 64 bytes
and stand one after the other in one buffer that is aligned like them, so that their rows are used in place, like an entry's."""

TRANSACTION_OPERATIONS_MAX: Final = 4096
"""Each costs a look at its table before anything is changed."""

OPERATION_KINDS: Final = (EntryKind.WRITE, EntryKind.DELETE, EntryKind.DELETE_RANGE)
"""What a transaction may consist of."""

_EXTENSION_MARK: Final = b"ARROW:extension:"

INT32_MAX: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Operation:
    """One of several in a transaction: ``payload`` is that of an entry of ``kind``, one of `OPERATION_KINDS`."""

    kind: EntryKind
    table: int
    payload: pa.Buffer


def encode_rows(batch: pa.RecordBatch) -> pa.Buffer:
    """The payload of a WRITE (rows that `marble.rows.conform` returned) or DELETE (keys from `conform_keys`)."""
    return encode_payload(batch)


def encode_create_table(
    name: str, schema: pa.Schema, key: Sequence[str], options: TableOptions = DEFAULT_OPTIONS
) -> pa.Buffer:
    """The payload of a CREATE_TABLE. Raises UsageError if `check_table` or `check_options` does."""
    schema, key = check_table(name, schema, key)
    check_options(name, schema, key, options)
    row = {
        "name": name,
        "schema": schema.serialize().to_pybytes(),
        "key": list(key),
        "compression": options.compression or "",
        "ttl_column": options.ttl_column or "",
        "ttl_us": options.ttl_us,
        "ttl_stamped": options.ttl_stamped,
        "merge_columns": [column for column, _ in options.merge],
        "merge_operators": [operator for _, operator in options.merge],
    }
    return encode_payload(pa.RecordBatch.from_pylist([row], CREATE_TABLE_SCHEMA))


def encode_drop_table(name: str) -> pa.Buffer:
    """The payload of a DROP_TABLE. Raises UsageError if there can be no table of that name."""
    return encode_payload(pa.RecordBatch.from_pylist([{"name": check_table_name(name)}], DROP_TABLE_SCHEMA))


def encode_command(operation: bytes) -> pa.Buffer:
    """The payload of a COMMAND."""
    return encode_payload(pa.RecordBatch.from_pylist([{"operation": bytes(operation)}], COMMAND_SCHEMA))


def encode_range(lower: bytes, upper: bytes | None) -> pa.Buffer:
    """The payload of a DELETE_RANGE. Raises UsageError if a bound is too long."""
    _check_bounds(lower, upper)
    return encode_payload(pa.RecordBatch.from_pylist([{"lower": lower, "upper": upper}], RANGE_SCHEMA))


def encode_transaction(operations: Sequence[Operation]) -> pa.Buffer:
    """The payload of a TRANSACTION. Raises UsageError if there are none, or more than `TRANSACTION_OPERATIONS_MAX`."""
    if not 1 <= len(operations) <= TRANSACTION_OPERATIONS_MAX:
        raise UsageError(
            f"a transaction has 1 to {TRANSACTION_OPERATIONS_MAX:,} operations, not {len(operations):,}: "
            "give each table its rows in one batch"
        )
    size = sum(operation.payload.size for operation in operations)
    if size > INT32_MAX:
        raise UsageError(f"a transaction of {size:,} bytes cannot be one entry: split it")
    ends = itertools.accumulate((operation.payload.size for operation in operations), initial=0)
    offsets = pa.array(ends, pa.int32()).buffers()[1]
    values = pa.py_buffer(b"".join(memoryview(operation.payload) for operation in operations))
    columns = [
        pa.array([int(operation.kind) for operation in operations], pa.uint8()),
        pa.array([operation.table for operation in operations], pa.uint32()),
        pa.Array.from_buffers(pa.binary(), len(operations), [None, offsets, values]),
    ]
    return encode_payload(pa.RecordBatch.from_arrays(columns, schema=TRANSACTION_SCHEMA))


def operation_of(change: TableChange) -> Operation:
    """`change` as it stands in a transaction. Raises UsageError if a bound of its range is too long."""
    batch = change.batch
    data = encode_range(change.lower or b"", change.upper) if batch is None else encode_rows(batch)
    return Operation(change.kind, change.table.id, data)


def encode_changes(changes: Sequence[TableChange]) -> tuple[EntryKind, int, pa.Buffer]:
    """Kind, table and payload of the entry that makes all of `changes`: of one as it is, of several a transaction."""
    operations = [operation_of(change) for change in changes]
    if len(operations) == 1:
        return operations[0].kind, operations[0].table, operations[0].payload
    return EntryKind.TRANSACTION, 0, encode_transaction(operations)


def check_entry_size(payload: pa.Buffer, entry_bytes_max: int, what: str) -> None:
    """Raise UsageError if `payload` is larger than an entry may be. `what` names the batch or call in the message."""
    if payload.size > entry_bytes_max:
        raise UsageError(
            f"{what} takes {payload.size:,} bytes in the log, above max_entry_size={entry_bytes_max:,}: "
            "split it into smaller batches, or raise max_entry_size on all nodes"
        )


def decode_rows(payload: pa.Buffer, table: TableInfo) -> pa.RecordBatch:
    """The rows of a WRITE. Shares the memory of `payload`."""
    return _decode(payload, table.schema, f"table {table.name!r}: rows", lambda batch: check_rows(batch, table))


def decode_keys(payload: pa.Buffer, table: TableInfo) -> pa.RecordBatch:
    """The keys of a DELETE. Shares the memory of `payload`."""
    return _decode(payload, table.key_schema, f"table {table.name!r}: keys", lambda batch: check_keys(batch, table))


def decode_range(payload: pa.Buffer) -> tuple[bytes, bytes | None]:
    """The bounds in a DELETE_RANGE: any bytes are bounds of keys."""
    row = _decode_row(payload, RANGE_SCHEMA, "a range of keys")
    _check_bounds(row["lower"], row["upper"])
    return row["lower"], row["upper"]


def decode_transaction(payload: pa.Buffer) -> list[Operation]:
    """The operations of a TRANSACTION. Their payloads share the memory of `payload`, and nobody vouches for them."""
    what = "a transaction"
    batch = _decode(payload, TRANSACTION_SCHEMA, what)
    if batch.num_rows > TRANSACTION_OPERATIONS_MAX or any(column.null_count for column in batch.columns):
        raise UsageError(f"{what}: 1 to {TRANSACTION_OPERATIONS_MAX} operations without nulls expected")
    kinds, tables = batch.column("kind").to_pylist(), batch.column("table").to_pylist()
    _, offsets, values = batch.column("payload").buffers()
    ends = np.frombuffer(offsets, np.int32, batch.num_rows + 1).tolist()
    operations = []
    for row, (kind, table) in enumerate(zip(kinds, tables, strict=True)):
        # Not through scalars, which would copy.
        size = ends[row + 1] - ends[row]
        if kind not in OPERATION_KINDS or size == 0 or size % PAYLOAD_ALIGNMENT_BYTES:
            raise UsageError(f"{what}: operation {row} is not one that a transaction may have")
        operations.append(Operation(EntryKind(kind), table, values.slice(ends[row], size)))
    return operations


def check_operation(operation: Operation, table: TableInfo) -> None:
    """Raise UsageError if `operation` does not fit `table`, as apply would."""
    if operation.kind is EntryKind.WRITE:
        decode_rows(operation.payload, table)
    elif operation.kind is EntryKind.DELETE:
        decode_keys(operation.payload, table)
    else:
        decode_range(operation.payload)


def _check_bounds(lower: bytes, upper: bytes | None) -> None:
    if max(len(lower), len(upper or b"")) > BOUND_BYTES_MAX:
        raise UsageError(f"an end of a range of keys takes more than {BOUND_BYTES_MAX:,} bytes: use a shorter one")


def decode_create_table(payload: pa.Buffer) -> tuple[str, pa.Schema, tuple[str, ...], TableOptions]:
    """Name, schema, key and options of a CREATE_TABLE, as `check_table` and `check_options` return them."""
    row = _decode_row(payload, CREATE_TABLE_SCHEMA, "the definition of a table")
    name, serialized, key = row["name"], row["schema"], row["key"]
    # Reading a schema instantiates the extension types in it, which is code that someone registered: not for strangers.
    if _EXTENSION_MARK in serialized:
        raise UsageError(f"table {name!a}: extension types cannot be stored: cast to the storage type")
    try:
        schema, key = check_table(name, pa.ipc.read_schema(pa.py_buffer(serialized)), key)
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        raise UsageError(f"table {name!a}: its schema is not an Arrow IPC schema message") from None
    columns, operators = row["merge_columns"], row["merge_operators"]
    if len(columns) != len(operators) or len(columns) > len(schema):
        raise UsageError(f"table {name!r}: each column that is merged needs one operator")
    merge = tuple(zip(columns, operators, strict=True))
    options = TableOptions(
        row["compression"] or None, row["ttl_column"] or None, row["ttl_us"], row["ttl_stamped"], merge
    )
    return name, schema, key, check_options(name, schema, key, options)


def decode_drop_table(payload: pa.Buffer) -> str:
    """The name in a DROP_TABLE."""
    return check_table_name(_decode_row(payload, DROP_TABLE_SCHEMA, "the name of a table")["name"])


def decode_command(payload: pa.Buffer) -> bytes:
    """The bytes of a COMMAND."""
    operation: bytes = _decode_row(payload, COMMAND_SCHEMA, "an operation")["operation"]
    return operation


def _decode(
    payload: pa.Buffer, schema: pa.Schema, what: str, check: Callable[[pa.RecordBatch], None] | None = None
) -> pa.RecordBatch:
    try:
        batch = decode_payload(payload, schema)
        wrong = bool(fault_of(batch))
    except ProtocolError:
        wrong = True
    if wrong:
        # Arrow's words differ between its versions; a result must be the same on every replica.
        raise UsageError(f"{what}: the payload is not a valid record batch of the schema expected")
    if batch.num_rows == 0:
        raise UsageError(f"{what}: there are none")
    if check is not None:
        check(batch)
    return batch


def _decode_row(payload: pa.Buffer, schema: pa.Schema, what: str) -> dict[str, Any]:
    batch = _decode(payload, schema, what)
    row: dict[str, Any] = batch.to_pylist()[0]
    lists = [each for each in row.values() if isinstance(each, list)]
    nulls = any(row[field.name] is None for field in schema if not field.nullable)
    if batch.num_rows != 1 or nulls or any(None in each for each in lists):
        raise UsageError(f"{what}: one row without nulls expected")
    return row
