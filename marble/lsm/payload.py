"""What the payload of each kind of entry holds: to bytes, and back from bytes that nobody vouches for.

A payload is one encapsulated Arrow IPC record-batch message (see `marble._core.entry_batch`); the schema is known from
the kind of the entry and its table:

- WRITE: rows of the table, in its schema. DELETE: keys, in its key schema. At least one.
- CREATE_TABLE: one row of `CREATE_TABLE_SCHEMA`. DROP_TABLE: one row of `DROP_TABLE_SCHEMA`.
- COMMAND: one row of `COMMAND_SCHEMA`.

Rule 1: what comes out of a ``decode_*`` has passed ``validate(full=True)`` and every rule of `marble.schema`.
Rule 2: bytes that are not such a payload are the proposer's mistake, the same on every replica: `UsageError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import pyarrow as pa

from marble._core.entry_batch import decode_payload, encode_payload
from marble.errors import ProtocolError, UsageError
from marble.schema import TableInfo, check_keys, check_rows, check_table, check_table_name
from marble.table_options import DEFAULT_OPTIONS, TableOptions, check_options


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
    ]
)
"""``schema`` is an encapsulated IPC schema message, as `pyarrow.Schema.serialize` makes it. The last three are the fields of
`marble.table_options.TableOptions`, with an empty text for None."""

DROP_TABLE_SCHEMA: Final = pa.schema([_column("name", pa.string())])

COMMAND_SCHEMA: Final = pa.schema([_column("operation", pa.binary())])

_EXTENSION_MARK: Final = b"ARROW:extension:"


def encode_rows(batch: pa.RecordBatch) -> pa.Buffer:
    """The payload of a WRITE (rows that `marble.schema.conform` returned) or DELETE (keys from `conform_keys`)."""
    return encode_payload(batch)


def encode_create_table(
    name: str, schema: pa.Schema, key: Sequence[str], options: TableOptions = DEFAULT_OPTIONS
) -> pa.Buffer:
    """The payload of a CREATE_TABLE. Raises UsageError if `check_table` or `check_options` does."""
    schema, key = check_table(name, schema, key)
    check_options(name, schema, options)
    row = {
        "name": name,
        "schema": schema.serialize().to_pybytes(),
        "key": list(key),
        "compression": options.compression or "",
        "ttl_column": options.ttl_column or "",
        "ttl_us": options.ttl_us,
    }
    return encode_payload(pa.RecordBatch.from_pylist([row], CREATE_TABLE_SCHEMA))


def encode_drop_table(name: str) -> pa.Buffer:
    """The payload of a DROP_TABLE. Raises UsageError if there can be no table of that name."""
    return encode_payload(pa.RecordBatch.from_pylist([{"name": check_table_name(name)}], DROP_TABLE_SCHEMA))


def encode_command(operation: bytes) -> pa.Buffer:
    """The payload of a COMMAND."""
    return encode_payload(pa.RecordBatch.from_pylist([{"operation": bytes(operation)}], COMMAND_SCHEMA))


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
    options = TableOptions(row["compression"] or None, row["ttl_column"] or None, row["ttl_us"])
    return name, schema, key, check_options(name, schema, options)


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
        batch.validate(full=True)
    except (ProtocolError, pa.ArrowInvalid):
        # Arrow's words differ between its versions; a result must be the same on every replica.
        raise UsageError(f"{what}: the payload is not a valid record batch of the schema expected") from None
    if batch.num_rows == 0:
        raise UsageError(f"{what}: there are none")
    if check is not None:
        check(batch)
    return batch


def _decode_row(payload: pa.Buffer, schema: pa.Schema, what: str) -> dict[str, Any]:
    batch = _decode(payload, schema, what)
    row: dict[str, Any] = batch.to_pylist()[0]
    if batch.num_rows != 1 or None in row.values() or None in row.get("key", ()):
        raise UsageError(f"{what}: one row without nulls expected")
    return row
