"""Merge operators: what a write to a table with them makes of the rows that are there.

Each column of such a table has an operator (`marble.table_options.TableOptions.merge`), which says what becomes of the value
that is there and those that are written, in the order of writes and, in one write, of rows:

=========  ===========================================================================================================
sum        their sum; it must fit the column
min, max   the smallest, the largest; of floats -0.0 counts as 0.0
count      how many rows were written: what a writer gives for the column does not count
append     the items of all lists, one after the other
last       the last one that is not null
none       the last one, also if it is null
=========  ===========================================================================================================

For the first six a null changes nothing, and only nulls give null. Floats are added one after the other; NaN is one value.

Rule 1: deterministic: the result is a function of the rows there, those written, and their order. Nothing here depends on
how rows lie in memory, on threads, or on an order of summation that Arrow leaves open.
Rule 2: what cannot be merged is the writer's mistake, `UsageError`, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from marble.errors import UsageError
from marble.schema import TableInfo

LIST_ITEMS_MAX: Final = 64 * 1024
"""Items of one list that is appended to. A state that grows without end belongs into rows of its own."""

MERGED_ITEMS_MAX: Final = 4 * 1024 * 1024
"""Items of all lists that one write makes."""

MERGED_BYTES_MAX: Final = 256 * 1024 * 1024
"""Bytes of text in all lists of one column that one write makes."""

_Places = npt.NDArray[np.int64]


def first_places(keys: pa.RecordBatch) -> pa.Int64Array:
    """Where each distinct one of `keys` stands first."""
    if keys.num_rows == 1:
        return pa.array([0])
    groups = _grouped(keys, [("place", "min")])
    return groups.column("place_min").combine_chunks()


def merge(info: TableInfo, there: pa.RecordBatch, written: pa.RecordBatch) -> pa.RecordBatch:
    """The rows that a write leaves.

    Parameters
    ----------
    info
        The table; it has merge operators.
    there
        The rows that have a key of `written`, each once.
    written
        The rows of the write, of the table's schema, in order.

    Returns
    -------
    pyarrow.RecordBatch
        One row of the table's schema for each key of `written`.

    Raises
    ------
    UsageError
        A sum does not fit its column, or lists grow beyond the limits above.
    """
    try:
        return _merged(info, there, written)
    except (pa.ArrowInvalid, pa.ArrowCapacityError):
        # All else was checked: more than 2 GiB in a column, of which Arrow says so.
        raise UsageError(
            f"table {info.name!r}: too much for one column in the rows to merge: write fewer at a time"
        ) from None


def _merged(info: TableInfo, there: pa.RecordBatch, written: pa.RecordBatch) -> pa.RecordBatch:
    operators = dict(info.options.merge)
    columns = []
    for field in info.schema:
        mine = there.column(field.name)
        given = written.column(field.name)
        if operators.get(field.name) == "count":
            given = pa.repeat(pa.scalar(1, field.type), len(given))
        columns.append(pa.concat_arrays([mine.cast(field.type), given]))
    rows = pa.RecordBatch.from_arrays(columns, schema=pa.schema([field.with_nullable(True) for field in info.schema]))
    if written.num_rows == 1:
        ordered, ends = rows, np.array([rows.num_rows])
    else:
        groups = _grouped(rows.select(list(info.key)), [("place", "list")]).column("place_list").combine_chunks()
        ordered = rows.take(groups.flatten())
        ends = np.cumsum(groups.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)
    merged = []
    for field, column in zip(info.schema, ordered.columns, strict=True):
        where = f"table {info.name!r}, column {field.name!r}"
        merged.append(_merge_column(operators.get(field.name, ""), column, ends, where))
    return pa.RecordBatch.from_arrays(merged, schema=info.schema)


def _grouped(keys: pa.RecordBatch, aggregations: Sequence[tuple[str, str]]) -> pa.Table:
    """`keys` in groups, with ``place``, the number of a row, aggregated."""
    names = [str(position) for position in range(keys.num_columns)]
    columns = [_group_key(column) for column in keys.columns]
    table = pa.table([*columns, pa.array(np.arange(keys.num_rows))], names=[*names, "place"])
    return table.group_by(names, use_threads=False).aggregate(list(aggregations))


def _group_key(column: pa.Array) -> pa.Array:
    """`column` so that equal keys are equal to Arrow's grouping."""
    if pt.is_floating(column.type):
        return pc.add(column, pa.scalar(0.0, column.type))
    return column.view(pa.int64()) if pt.is_duration(column.type) else column


def _merge_column(operator: str, column: pa.Array, ends: _Places, where: str) -> pa.Array:
    """One value for each group of `column`: group i ends before ``ends[i]``, where the next one begins. No group is empty."""
    if not operator:
        return column.take(pa.array(ends - 1))
    if operator == "last":
        return column.take(_last_valid(column, ends))
    if operator == "append":
        return _append(column, ends, where)
    if operator in ("min", "max"):
        return _extreme(operator, column, ends)
    return _sum(column, ends, where)


def _last_valid(column: pa.Array, ends: _Places) -> pa.Int64Array:
    """Where in each group the last value stands that is not null; null where there is none."""
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    places = np.maximum.reduceat(np.where(valid, np.arange(len(column)), -1), _starts(ends))
    return pa.array(places, mask=places < 0)


def _append(column: pa.ListArray, ends: _Places, where: str) -> pa.Array:
    type_ = column.type
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    items = np.add.reduceat(lengths, _starts(ends))
    if items.max() > LIST_ITEMS_MAX or items.sum() > MERGED_ITEMS_MAX:
        raise UsageError(
            f"{where}: a list that is appended to has at most {LIST_ITEMS_MAX:,} items: delete the row first"
        )
    values = column.drop_null().flatten()
    if type_.value_type in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        nbytes = pc.sum(pc.binary_length(values).cast(pa.int64())).as_py() or 0
        if nbytes > MERGED_BYTES_MAX:
            raise UsageError(f"{where}: {nbytes:,} bytes in lists after one write: write fewer rows at a time")
    valid = np.maximum.reduceat(column.is_valid().to_numpy(zero_copy_only=False), _starts(ends))
    offsets = pa.array(np.concatenate([[0], np.cumsum(items)]), pa.int64())
    maker = pa.LargeListArray if pt.is_large_list(type_) else pa.ListArray
    narrow = offsets if pt.is_large_list(type_) else offsets.cast(pa.int32())
    return maker.from_arrays(narrow, values, type=type_, mask=pa.array(~valid))


def _extreme(operator: str, column: pa.Array, ends: _Places) -> pa.Array:
    type_ = column.type
    if pt.is_floating(type_):
        column = pc.add(column, pa.scalar(0.0, type_))
    elif pt.is_duration(type_):
        column = column.view(pa.int64())
    merged = _aggregated(operator, column, ends)
    return merged.view(type_) if pt.is_duration(type_) else merged


def _sum(column: pa.Array, ends: _Places, where: str) -> pa.Array:
    type_ = column.type
    if pt.is_duration(type_):
        return _sum(column.view(pa.int64()), ends, where).view(type_)
    if pt.is_floating(type_):
        summed = _aggregated("sum", column, ends)
        # Which NaN comes out of an addition is up to the processor.
        return pc.if_else(summed.is_nan(), pa.scalar(float("nan"), summed.type), summed).cast(type_, safe=False)
    try:
        if pt.is_decimal(type_):
            return _aggregated("sum", column.cast(pa.decimal256(76, type_.scale)), ends).cast(type_)
        if not _certainly_fits(column):
            return _aggregated("sum", column.cast(pa.decimal128(38, 0)), ends).cast(type_)
        return _whole_sum(column.cast(pa.int64()), ends).cast(type_)
    except pa.ArrowInvalid:
        raise UsageError(f"{where}: a sum is too large for {type_}") from None


def _whole_sum(column: pa.Int64Array, ends: _Places) -> pa.Int64Array:
    """Sums that fit: whole numbers may be added in any order."""
    starts = _starts(ends)
    sums = np.add.reduceat(pc.fill_null(column, 0).to_numpy(zero_copy_only=False), starts)
    if column.null_count == 0:
        return pa.array(sums)
    valid = np.maximum.reduceat(column.is_valid().to_numpy(zero_copy_only=False), starts)
    return pa.array(sums, mask=~valid)


def _certainly_fits(column: pa.Array) -> bool:
    """Whether no sum of values of `column`, of whole numbers, leaves the 64 bits in which Arrow adds them."""
    bounds = pc.min_max(column).as_py()
    if bounds["min"] is None:
        return True
    return bool(max(-bounds["min"], bounds["max"]) * len(column) < 2**63)


def _aggregated(function: str, column: pa.Array, ends: _Places) -> pa.Array:
    numbers = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
    table = pa.table([pa.array(numbers), column], names=["group", "value"])
    groups = table.group_by("group", use_threads=False).aggregate([("value", function)])
    # They come as Arrow found them; by their numbers they are in order again.
    merged = groups.take(pc.sort_indices(groups.column("group")))
    return merged.column(f"value_{function}").combine_chunks()


def _starts(ends: _Places) -> _Places:
    return np.concatenate([np.zeros(1, np.int64), ends[:-1]])
