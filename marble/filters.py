"""Filters over batches of rows: what they read, and what they leave. Used where rows are scanned, here or from afar.

A filter is a `pyarrow.compute.Expression`; `marble.database.check_scan` says whether it fits a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc


def filter_batches(
    source: pa.RecordBatchReader,
    columns: Sequence[str] | None,
    filter: pc.Expression,  # noqa: A002
) -> pa.RecordBatchReader:
    """The rows of `source` for which `filter` is true, batch by batch, in bounded memory.

    Parameters
    ----------
    source
        Has `columns` and whatever `filter` refers to (see `columns_read`).
    columns
        Names of the columns to give, in that order. All of the source, if None.
    filter
        Rows for which it is false or null are left out.
    """
    names = source.schema.names if columns is None else list(columns)
    schema = pa.schema([source.schema.field(name) for name in names])

    def kept() -> Iterator[pa.RecordBatch]:
        for batch in source:
            rows = batch.filter(filter)
            if rows.num_rows:
                yield pa.RecordBatch.from_arrays([rows.column(name) for name in names], schema=schema)

    return pa.RecordBatchReader.from_batches(schema, kept())


def columns_read(schema: pa.Schema, wanted: Sequence[str], filter: pc.Expression) -> list[str]:  # noqa: A002
    """The columns that a scan must read: those `wanted`, and those that `filter` looks at, in the schema's order.

    An expression does not say what it refers to, but it says whether it fits a schema: a column is needed if the
    expression does not fit without it. Halves are tried first, so that few among many are found quickly.
    """
    # A reference by position means another column as soon as one is left out.
    if _refers_by_position(filter):
        return list(schema.names)

    def fits(names: list[str]) -> bool:
        try:
            pa.schema([schema.field(name) for name in names]).empty_table().filter(filter)
        except pa.ArrowException:
            return False
        return True

    def needed(candidates: list[str], others: list[str]) -> list[str]:
        """Those of `candidates` that cannot be spared, where everything in `others` is there."""
        if not candidates or fits(others):
            return []
        if len(candidates) == 1:
            return candidates
        half = len(candidates) // 2
        first = needed(candidates[:half], others + candidates[half:])
        return first + needed(candidates[half:], others + first)

    chosen = {*wanted, *needed([name for name in schema.names if name not in wanted], list(wanted))}
    return [name for name in schema.names if name in chosen]


def _refers_by_position(filter: pc.Expression) -> bool:  # noqa: A002
    try:
        return "FieldPath(" in str(filter)
    except UnicodeDecodeError:  # A constant of bytes that are no text: pyarrow cannot show it. Read everything, then.
        return True


def first_rows(batches: Iterable[pa.RecordBatch], limit: int, enough: Callable[[], object]) -> Iterator[pa.RecordBatch]:
    """The first `limit` rows of `batches`; `enough` is called when no more are wanted."""
    left = limit
    source = iter(batches)
    while left > 0 and (batch := next(source, None)) is not None:
        yield batch.slice(0, left)
        left -= batch.num_rows
    enough()
