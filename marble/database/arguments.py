"""What a call on a table is given, brought into the form in which it is sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, time
from typing import Final

import pyarrow as pa
import pyarrow.types as pt

from marble._core.key_codec import type_of_all
from marble.errors import UsageError
from marble.rows import conform, conform_keys
from marble.schema import TableInfo, to_batches
from marble.table_options import fill

_PLAIN: Final = frozenset({int, str, bytes})
"""Types of values of which a list is a list of keys, if the key has one column: no value is a tuple or a dict."""


def one_batch(data: object) -> pa.RecordBatch:
    batches = list(to_batches(data))
    if len(batches) == 1:
        return batches[0]
    if not batches:
        raise UsageError("there are no rows: give at least one")
    return pa.concat_batches(batches)


def row_batch(table: TableInfo, batch: pa.RecordBatch) -> pa.RecordBatch:
    """`batch` as rows of `table`; it may lack the columns that the table fills by itself."""
    return conform(fill(batch, table.schema, table.options), table)


def is_arrow(data: object) -> bool:
    """Whether `data` speaks the Arrow PyCapsule protocol."""
    return hasattr(data, "__arrow_c_stream__") or hasattr(data, "__arrow_c_array__")


def is_one_key(table: TableInfo, keys: object) -> bool:
    """Whether `keys` is a key of `table` and not several: a value, a dict, or a tuple of values for several columns."""
    if isinstance(keys, tuple):
        return len(table.key) > 1 and not any(isinstance(part, tuple | Mapping) for part in keys)
    return not is_arrow(keys) and (isinstance(keys, Mapping | str | bytes) or not isinstance(keys, Iterable))


def key_batch(table: TableInfo, keys: object) -> pa.RecordBatch:
    """`keys`, as `Table.get_many` takes them, as a batch of the table's key schema."""
    if is_arrow(keys):
        return conform_keys(one_batch(keys), table)
    if not isinstance(keys, Iterable) or isinstance(keys, str | bytes | Mapping):
        raise UsageError(f"table {table.name!r}: keys must be a list of keys or Arrow data, got {keys!r}")
    if len(table.key) == 1 and isinstance(keys, Sequence) and _type_of(keys) in _PLAIN:
        column = _checked_column(table, table.key_schema.field(0), keys)
        return conform_keys(pa.RecordBatch.from_arrays([column], names=list(table.key)), table)
    rows = [_key_row(table, key) for key in keys]
    arrays = key_columns(table, rows) if rows else [pa.array([], field.type) for field in table.key_schema]
    return conform_keys(pa.RecordBatch.from_arrays(arrays, names=list(table.key)), table)


def _type_of(values: Sequence[object]) -> type | None:
    return type_of_all(values if isinstance(values, list | tuple) else list(values))


def key_columns(table: TableInfo, rows: Sequence[tuple[object, ...]]) -> list[pa.Array]:
    """`rows`, of which each has a value for each of the first key columns, as arrays of these columns' types."""
    columns = zip(table.key_schema, zip(*rows, strict=True), strict=False)
    return [_checked_column(table, field, values) for field, values in columns]


def _checked_column(table: TableInfo, field: pa.Field, values: Sequence[object]) -> pa.Array:
    """`values` of one key column."""
    try:
        return _key_column(values, field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"table {table.name!r}: key column {field.name!r} must be {field.type}: {error}") from error


def _key_column(values: Sequence[object], type_: pa.DataType) -> pa.Array:
    """`values` as an array of `type_`. Raises `pyarrow.ArrowInvalid` for a value that `type_` cannot hold as it is."""
    # PyArrow cuts 1.5 to 1 and a moment to its day without a word, and would so find, or delete, the row of another key.
    if pt.is_date(type_):
        for value in values:
            if isinstance(value, datetime) and value.time() != time(0):
                raise pa.ArrowInvalid(f"{value!r} is a moment and not a day")
    elif (pt.is_integer(type_) or pt.is_temporal(type_)) and _type_of(values) is not int:
        pa.array(values).cast(type_)
    return pa.array(values, type_)


def _key_row(table: TableInfo, key: object) -> tuple[object, ...]:
    if isinstance(key, Mapping):
        if set(key) != set(table.key):
            raise UsageError(f"table {table.name!r}: a key has the columns {list(table.key)}, got {list(key)}")
        return tuple(key[column] for column in table.key)
    row = key if isinstance(key, tuple) else (key,)
    if len(row) != len(table.key):
        raise UsageError(
            f"table {table.name!r}: a key has {len(table.key)} values, for {list(table.key)}, got {len(row)}: {key!r}"
        )
    return row
