"""One state of one table, as readers see it.

Thread safety: immutable; any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from marble._core.memtable import Snapshot
from marble.schema import TableInfo

SCAN_BATCH_ROWS_MAX: Final = 65536
"""Rows that a scan gathers at a time: large enough that the work per batch does not count, small enough to stream."""


@dataclass(frozen=True, slots=True)
class TableView:
    """What table `info` held after entry `index` of the log was applied."""

    index: int
    info: TableInfo
    snapshot: Snapshot

    @property
    def row_count(self) -> int:
        """Rows of the table."""
        return self.snapshot.row_count

    def get_many(self, keys: pa.RecordBatch) -> pa.RecordBatch:
        """Look rows up by key.

        Parameters
        ----------
        keys
            Of the table's key schema, as `marble.schema.conform_keys` returns them. May be empty.

        Returns
        -------
        pyarrow.RecordBatch
            Schema ``info.lookup_schema``; one row for each key, in their order. Where there is no such row, every
            column is null, the key columns too: that is how to tell, since a key is never null.

        Raises
        ------
        UsageError
            If `keys` are not of the key schema, or hold a null or NaN.
        """
        rows, found = self.snapshot.get_many(keys)
        columns = rows.columns
        if found.true_count < len(found):
            for name in self.info.key:
                position = rows.schema.get_field_index(name)
                column = columns[position]
                columns[position] = pc.if_else(found, column, pa.scalar(None, column.type))
        return pa.RecordBatch.from_arrays(columns, schema=self.info.lookup_schema)

    def scan(
        self,
        columns: Sequence[str] | None = None,
        filter: pc.Expression | None = None,  # noqa: A002
        batch_rows_max: int = SCAN_BATCH_ROWS_MAX,
    ) -> pa.RecordBatchReader:
        """Read rows in key order, in bounded memory.

        Parameters
        ----------
        columns
            Names of the columns wanted, in that order. All, if None.
        filter
            Gives only rows for which it is true (`marble.database.check_scan` says whether it fits).
        batch_rows_max
            Most rows of a batch.
        """
        schema = self.info.schema
        wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
        if filter is None:
            batches = self.snapshot.scan(batch_rows_max, columns)
            return pa.RecordBatchReader.from_batches(wanted, _typed(batches, wanted))
        read = columns_read(schema, wanted.names, filter)
        batches = self.snapshot.scan(batch_rows_max, read)
        return pa.RecordBatchReader.from_batches(wanted, _filtered(batches, wanted, filter))


def _typed(batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)


def _filtered(
    batches: Iterator[pa.RecordBatch], schema: pa.Schema, expression: pc.Expression
) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        kept = batch.filter(expression)
        if kept.num_rows:
            yield pa.RecordBatch.from_arrays([kept.column(name) for name in schema.names], schema=schema)


def columns_read(schema: pa.Schema, wanted: Sequence[str], expression: pc.Expression) -> list[str]:
    """The columns that a scan must read: those wanted, and those that `expression` looks at, in the schema's order.

    An expression does not say what it refers to, but it says whether it fits a schema: a column is needed if the
    expression does not fit without it. Halves are tried first, so that few among many are found quickly.
    """
    # A reference by position means another column as soon as one is left out.
    if "FieldPath(" in str(expression):
        return list(schema.names)

    def fits(names: list[str]) -> bool:
        try:
            pa.schema([schema.field(name) for name in names]).empty_table().filter(expression)
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
