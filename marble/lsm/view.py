"""One state of one table, as readers see it.

Thread safety: immutable; any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import pyarrow as pa
import pyarrow.compute as pc

from marble._core.lsm import Reader
from marble._core.memtable import Snapshot
from marble.errors import CorruptionError
from marble.filters import columns_read, filter_batches
from marble.lsm.keyrange import KeyRange
from marble.lsm.pushdown import living_blocks, push_down
from marble.schema import TableInfo

SCAN_BATCH_ROWS_MAX: Final = 65536
"""Rows that a scan gathers at a time: large enough that the work per batch does not count, small enough to stream."""


@dataclass(frozen=True, slots=True)
class TableView:
    """What table `info` held after entry `index` of the log was applied, in memory alone or in files too."""

    index: int
    info: TableInfo
    snapshot: Snapshot | Reader
    expired_until: int | None = None
    """The highest value of the TTL column that is gone by now (`marble.table_options.expired_until`)."""
    blame: Callable[[CorruptionError], object] | None = field(default=None, repr=False, compare=False)
    """Told of a file that turns out to be damaged while it is read."""

    @property
    def row_count(self) -> int:
        """Rows of the table. With files behind it, or a time to live, all keys or times are read to tell."""
        if self.expired_until is None:
            return self.snapshot.row_count
        return sum(batch.num_rows for batch in self.scan(self.info.key[:1]))

    def get_many(self, keys: pa.RecordBatch) -> pa.RecordBatch:
        """Look rows up by key.

        Parameters
        ----------
        keys
            Of the table's key schema, as `marble.rows.conform_keys` returns them. May be empty.

        Returns
        -------
        pyarrow.RecordBatch
            Schema ``info.lookup_schema``; one row for each key, in their order. Where there is no such row, every
            column is null, the key columns too: that is how to tell, since a key is never null.

        Raises
        ------
        UsageError
            If `keys` are not of the key schema, or hold a null or NaN.
        CorruptionError
            A file is damaged; it is named.
        """
        try:
            rows, found = self.snapshot.get_many(keys)
        except CorruptionError as error:
            self._tell(error)
            raise
        if self.expired_until is not None:
            living = pc.and_not(found, expired_rows(rows, self.info, self.expired_until))
            # Nothing of a row that is gone may be seen: its place is taken by a null of every column.
            places = pc.if_else(living, pa.array(range(len(living)), pa.int64()), pa.scalar(None, pa.int64()))
            rows, found = rows.take(places), living
        columns = rows.columns
        if found.true_count < len(found):
            for name in self.info.key:
                position = rows.schema.get_field_index(name)
                column = columns[position]
                columns[position] = pc.if_else(found, column, pa.scalar(None, column.type))
        return pa.RecordBatch.from_arrays(columns, schema=self.info.lookup_schema)

    def get_row(self, names: tuple[str, ...], key: tuple[object, ...]) -> dict[str, object] | Literal[False] | None:
        """Look one row up, as `marble._core.lsm.Reader.get_row` does; False where only `get_many` can tell."""
        if self.expired_until is not None or not isinstance(self.snapshot, Reader):
            return False
        try:
            return self.snapshot.get_row(names, key)
        except CorruptionError as error:
            self._tell(error)
            raise

    def scan(
        self,
        columns: Sequence[str] | None = None,
        filter: pc.Expression | None = None,  # noqa: A002
        batch_rows_max: int = SCAN_BATCH_ROWS_MAX,
        *,
        keys: KeyRange | None = None,
        reverse: bool = False,
        limit: int | None = None,
        batch_bytes_max: int | None = None,
    ) -> pa.RecordBatchReader:
        """Read rows in key order, in bounded memory.

        Parameters
        ----------
        columns
            Names of the columns wanted, in that order. All, if None.
        filter
            Gives only rows for which it is true (`marble.database.check_scan` says whether it fits). What it says about
            keys and values spares reading blocks of files.
        batch_rows_max
            Most rows of a batch.
        keys
            Gives only rows whose keys lie in it; see `marble.lsm.keyrange`.
        reverse
            From the largest key down.
        limit
            Most rows of all, after the filter.
        batch_bytes_max
            About how many bytes a batch has at most, where the table has files; see `marble._core.lsm.Reader.scan`.

        Raises
        ------
        UsageError
            An unknown or repeated column, or a number that makes no sense.
        CorruptionError
            From the reader: a file is damaged; it is named.
        """
        schema = self.info.schema
        wanted = list(schema.names) if columns is None else list(columns)
        bounds = KeyRange() if keys is None else keys
        may_match = None
        if filter is not None:
            pushed = push_down(self.info, filter)
            bounds, may_match = bounds & pushed.keys, pushed.may_match
            if pushed.exact:
                filter = None  # noqa: A001
        if self.expired_until is not None:
            living = living_filter(self.info, self.expired_until)
            filter = living if filter is None else filter & living  # noqa: A001
            if isinstance(self.snapshot, Reader) and self._has_expired(self.snapshot):
                may_match = living_blocks(self.info, self.expired_until, may_match)
        read = wanted if filter is None else columns_read(schema, wanted, filter)
        given = schema.remove_metadata() if read == schema.names else pa.schema([schema.field(name) for name in read])
        # What a filter leaves is counted behind it.
        most = limit if filter is None else None
        if isinstance(self.snapshot, Reader):
            batches: Iterator[pa.RecordBatch] = self.snapshot.scan(
                batch_rows_max,
                read,
                bounds.lower,
                bounds.upper,
                reverse=reverse,
                limit=most,
                may_match=may_match,
                batch_bytes_max=batch_bytes_max,
            )
        else:
            batches = self.snapshot.scan(batch_rows_max, read, bounds.lower, bounds.upper, reverse=reverse, limit=most)
        source = pa.RecordBatchReader.from_batches(given, self._typed(batches, given))
        if filter is None:
            return source
        kept = filter_batches(source, columns, filter)
        return kept if limit is None else pa.RecordBatchReader.from_batches(kept.schema, _first_rows(kept, limit))

    def _has_expired(self, reader: Reader) -> bool:
        """Whether some file has a row whose time is over: else its blocks need not be asked."""
        until = self.expired_until
        assert until is not None
        ends = (file.info.ttl_min for level in reader.files for file in level)
        return any(end is not None and end <= until for end in ends)

    def _typed(self, batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        try:
            for batch in batches:
                # Mostly they are of this schema already.
                yield batch if batch.schema.equals(schema) else pa.RecordBatch.from_arrays(batch.columns, schema=schema)
        except CorruptionError as error:
            self._tell(error)
            raise

    def _tell(self, error: CorruptionError) -> None:
        if self.blame is not None:
            self.blame(error)


def expired_rows(batch: pa.RecordBatch, info: TableInfo, until: int) -> pa.BooleanArray:
    """Which rows' time to live is over. A row without a time stays."""
    times = batch.column(info.options.ttl_column)
    plain = times.view(pa.int32() if times.type.bit_width == 32 else pa.int64())
    return pc.fill_null(pc.less_equal(plain, pa.scalar(until, pa.int64())), False)


def living_filter(info: TableInfo, until: int) -> pc.Expression:
    """Is true for rows whose time to live is not over."""
    column = info.options.ttl_column
    time = pc.field(column)
    return (time > pa.scalar(until, info.schema.field(column).type)) | time.is_null()


def _first_rows(batches: Iterator[pa.RecordBatch], limit: int) -> Iterator[pa.RecordBatch]:
    left = limit
    while left > 0 and (batch := next(batches, None)) is not None:
        yield batch.slice(0, left)
        left -= batch.num_rows
