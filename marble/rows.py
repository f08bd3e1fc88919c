"""Rows and keys as a caller brings them, made those of a table, or refused while the call can still be mended.

Rule 1: values are never changed. What a table may hold is decided in `marble.schema`, here as on every replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pyarrow as pa
import pyarrow.types as pt

from marble._core.validity import fault_of
from marble.errors import UsageError
from marble.schema import TableInfo, check_keys, check_rows, nearest, shown

_STRINGS: Final = (pa.string(), pa.large_string(), pa.string_view())
_BINARIES: Final = (pa.binary(), pa.large_binary(), pa.binary_view())


def conform(batch: pa.RecordBatch, table: TableInfo) -> pa.RecordBatch:
    """`batch` as rows of `table`: every check that apply makes, made where the caller can still mend the call.

    Columns may come in any order and are put into the table's. Values are never changed; only representations of the
    same values (``string``, ``large_string`` and ``string_view``; likewise binary and lists) are cast to the table's.

    Returns
    -------
    pyarrow.RecordBatch
        With exactly the table's schema. Shares the buffers of `batch` where no cast was needed.

    Raises
    ------
    UsageError
        Naming the table and column, what was expected, what came, and what to do.
    """
    conformed = _conform(batch, table, table.schema, "row")
    check_rows(conformed, table)
    return conformed


def conform_keys(batch: pa.RecordBatch, table: TableInfo) -> pa.RecordBatch:
    """`batch` as keys of `table`: exactly its key columns, in key order. Otherwise like `conform`."""
    conformed = _conform(batch, table, table.key_schema, "key")
    check_keys(conformed, table)
    return conformed


def _conform(batch: pa.RecordBatch, table: TableInfo, schema: pa.Schema, noun: str) -> pa.RecordBatch:
    where = f"table {table.name!r}"
    if batch.num_rows == 0:
        raise UsageError(f"{where}: the batch is empty: give at least one {noun}")
    if fault := fault_of(batch):
        raise UsageError(f"{where}: the batch is not valid Arrow data: {fault}")
    if batch.schema.equals(schema, check_metadata=True):
        return batch
    _check_same_names(batch.schema.names, schema.names, where, noun)
    columns = [_conform_column(batch.column(field.name), field, where) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _check_same_names(names: Sequence[str], wanted: Sequence[str], where: str, noun: str) -> None:
    known, seen = set(wanted), set()
    for name in names:
        if name in seen:
            raise UsageError(f"{where}: column {shown(name)} stands twice in the batch: keep one")
        seen.add(name)
        if name not in known:
            owner = "the table" if noun == "row" else "the key"
            raise UsageError(f"{where}: column {shown(name)} is not in {owner}: drop it{nearest(name, wanted)}")
    for name in wanted:
        if name not in seen:
            raise UsageError(f"{where}: column {name!r} is missing: each {noun} needs all of {list(wanted)}")


def _conform_column(column: pa.Array, field: pa.Field, where: str) -> pa.Array:
    if column.type == field.type:
        return column
    if not _represents_same(column.type, field.type):
        raise UsageError(
            f"{where}: column {field.name!r} must be {field.type}, got {column.type}: "
            f"cast it, e.g. with pyarrow.compute.cast(column, {str(field.type)!r})"
        )
    try:
        return column.cast(field.type)
    except pa.ArrowException as error:
        raise UsageError(f"{where}: column {field.name!r} cannot be cast to {field.type}: {error}") from error


def _represents_same(type_: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether the two types hold the same values, so that a cast between them changes nothing."""
    if type_ == wanted:
        return True
    for family in (_STRINGS, _BINARIES):
        if type_ in family and wanted in family:
            return True
    if _is_plain_list(type_) and _is_plain_list(wanted):
        return bool(
            type_.value_field.nullable == wanted.value_field.nullable
            and _represents_same(type_.value_type, wanted.value_type)
        )
    if pt.is_struct(type_) and pt.is_struct(wanted) and type_.num_fields == wanted.num_fields:
        pairs = [(type_.field(i), wanted.field(i)) for i in range(type_.num_fields)]
        return all(
            one.name == other.name and one.nullable == other.nullable and _represents_same(one.type, other.type)
            for one, other in pairs
        )
    return False


def _is_plain_list(type_: pa.DataType) -> bool:
    return bool(pt.is_list(type_) or pt.is_large_list(type_) or pt.is_list_view(type_) or pt.is_large_list_view(type_))
