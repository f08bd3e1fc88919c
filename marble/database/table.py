"""Tables as a user sees them.

Rule 1: a mistake of the caller is found here, before anything is sent: `UsageError`, nothing replicated.

Thread safety: every object here may be used from many threads at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from marble._core.expression import key_bounds
from marble.database.arguments import is_one_key, key_batch, one_batch, row_batch
from marble.database.backend import Backend, Consistency, NearBackend, check_consistency, check_count, check_scan
from marble.database.ranges import key_range, within
from marble.database.window import WriteWindow, outcome
from marble.errors import InvariantError, UnavailableError, UsageError
from marble.requests import ScanRequest, TableChange
from marble.schema import TableInfo, to_batches
from marble.types import EntryKind

_PLAIN_VALUES: Final = frozenset({bytes, str, int, bool})
"""Types of values that are a key by themselves, and of which a row may be found without Arrow."""


class Table:
    """A replicated table: rows of one Arrow schema, at most one for each value of the primary key."""

    def __init__(self, backend: Backend, info: TableInfo) -> None:
        self._backend = backend
        self.info = info
        self._near = backend if isinstance(backend, NearBackend) else None
        self._names = tuple(info.schema.names)

    @property
    def name(self) -> str:
        """The table's name."""
        return self.info.name

    @property
    def schema(self) -> pa.Schema:
        """The table's columns."""
        return self.info.schema

    @property
    def key(self) -> tuple[str, ...]:
        """Names of the key columns."""
        return self.info.key

    def __repr__(self) -> str:
        return f"<marble.Table {self.name!r} key={list(self.key)} columns={self.schema.names}>"

    def write(self, data: object) -> int:
        """Upsert rows: a row replaces the one with the same key; of equal keys in a batch the last counts.

        In a table with merge operators a row is merged into the one with the same key, and equal keys of a batch in order.

        Each batch of a stream becomes one entry of the log: it takes effect as a whole, after the batches before it.
        A stream as a whole is not atomic.

        Parameters
        ----------
        data
            Anything with ``__arrow_c_stream__`` or ``__arrow_c_array__`` that has the table's columns, in any order. Those with a
            merge operator may be missing: then they stay as they are.

        Returns
        -------
        int
            The index at which the last batch is committed, durable on a majority, and readable.

        Raises
        ------
        UsageError
            If a batch does not fit the table (see `marble.rows.conform`), is larger than ``max_entry_size``, or
            `data` has no rows.
        UnavailableError
            Nothing of the batch that a note on the error names was replicated: retry later, from that batch on.
        OutcomeUnknownError
            That batch may or may not have been written. Writing it again is harmless unless someone else wrote the
            same keys in between, or the table has merge operators.

        Whatever the error, batches before the one named are written, and some after it may be.
        """
        with WriteWindow(self.name) as window:
            for batch in to_batches(data):
                if batch.num_rows > 0:
                    self._submit(window, row_batch(self.info, batch))
            return window.finish()

    def _submit(self, window: WriteWindow, batch: pa.RecordBatch) -> None:
        window.make_room(batch.nbytes)
        while True:
            try:
                window.add(self._backend.write(self.info, batch), batch.nbytes)
                return
            except UnavailableError:
                # Nothing of this batch was replicated. What this very stream has in flight may be what fills the queue.
                if not window.wait_one():
                    raise

    def write_async(self, data: object) -> Future[int]:
        """Upsert the rows of `data`, all of them at one index, without waiting for it.

        From afar, small writes to a table without merge operators that are under way together may share an entry and its index.

        Parameters
        ----------
        data
            As for `write`; several batches are joined into one.

        Returns
        -------
        concurrent.futures.Future
            The index, once the entry is committed, durable on a majority, and readable; or an error as from `write`.

        Raises
        ------
        UsageError
            At once, if the rows do not fit the table.
        UnavailableError
            At once, if too much is in flight: wait for an earlier future, then call again.
        """
        return self._backend.write(self.info, row_batch(self.info, one_batch(data)))

    def delete(self, keys: object) -> int:
        """Delete the rows with these keys; keys without a row are passed over.

        Parameters
        ----------
        keys
            As for `get_many`, or one key as for `get`. At least one.

        Returns
        -------
        int
            The index at which the deletion is committed, durable on a majority, and visible.
        """
        if is_one_key(self.info, keys):
            keys = [keys]
        return outcome(self._backend.delete(self.info, key_batch(self.info, keys)))

    def delete_range(self, *, prefix: object = None, between: object = None) -> int:
        """Delete all rows whose keys lie in a range; at least one of the parameters must be given.

        Parameters
        ----------
        prefix, between
            As for `scan`. ``between=(None, None)`` means all rows.

        Returns
        -------
        int
            The index at which the deletion is committed, durable on a majority, and visible.
        """
        return outcome(self._backend.change([delete_range(self.info, prefix, between)]))

    def get(
        self, key: object, *, consistency: Consistency = "linearizable", at_index: int | None = None
    ) -> dict[str, object] | None:
        """The row with this key, or None.

        Parameters
        ----------
        key
            The value of the key column; a tuple of values in key order; or a dict by column.
        consistency
            See `Consistency`.
        at_index
            As for `scan`.
        """
        # Written for speed: the look-up itself takes less time than what stands around it.
        if at_index is None and self._near is not None:
            values: tuple[object, ...] | None = None
            if isinstance(key, tuple):
                values = key
            elif type(key) in _PLAIN_VALUES:
                values = (key,)
            if values is not None:
                known = consistency if consistency == "linearizable" else check_consistency(consistency)
                row = self._near.get_row(self.info, self._names, values, known)
                if row is not False:
                    return row
        check_count(at_index, "at_index")
        keys = key_batch(self.info, [key])
        rows = self._backend.get_many(self.info, keys, check_consistency(consistency), at_index)
        if rows.num_rows != 1:
            raise InvariantError(f"table {self.name!r}: asked for one key, got {rows.num_rows} rows")
        found: dict[str, object] = rows.to_pylist()[0]
        return None if found[self.key[0]] is None else found

    def get_many(
        self, keys: object, *, consistency: Consistency = "linearizable", at_index: int | None = None
    ) -> pa.RecordBatch:
        """The rows with these keys, all of one state of the table.

        Parameters
        ----------
        keys
            A list of keys, each as for `get`; or Arrow data (anything with ``__arrow_c_stream__`` or
            ``__arrow_c_array__``) with exactly the key columns.
        consistency
            See `Consistency`.
        at_index
            As for `scan`.

        Returns
        -------
        pyarrow.RecordBatch
            The table's columns, all nullable; row i is for key i. Where there is no such row, every column is null,
            the key columns too, which a row that exists never has.
        """
        check_consistency(consistency)
        check_count(at_index, "at_index")
        if isinstance(keys, Sequence) and not keys:
            return pa.RecordBatch.from_pylist([], self.info.lookup_schema)
        return self._backend.get_many(self.info, key_batch(self.info, keys), consistency, at_index)

    def scan(
        self,
        columns: Sequence[str] | None = None,
        filter: pc.Expression | None = None,  # noqa: A002
        *,
        prefix: object = None,
        between: object = None,
        reverse: bool = False,
        limit: int | None = None,
        at_index: int | None = None,
        consistency: Consistency = "linearizable",
    ) -> Scan:
        """Rows in key order, as something that any Arrow tool can read.

        Parameters
        ----------
        columns
            Names of the columns wanted, in the order wanted. All, if None.
        filter
            A boolean `pyarrow.compute.Expression` over any columns of the table, e.g. ``pc.field("a") > 1``. What it says of
            the first key columns (comparisons with constants, ``isin``, ``starts_with``, joined by ``&``) is used to read
            only those keys.
        prefix
            Only keys that begin so: a value of the first key column, or a tuple of values of the first ones.
        between
            A pair (from, to): only keys whose columns after those of `prefix` lie there, both ends included. Each end is a
            value, a tuple of values, or None for no bound.
        reverse
            From the largest key down.
        limit
            At most so many rows, after the filter. None: all.
        at_index
            The state after this entry of the log: an index that a write returned. Only as far back as the database keeps
            old states (``retention``). None: the present state.
        consistency
            See `Consistency`.

        Raises
        ------
        UsageError
            If a column is unknown, the filter does not fit, or a bound does not fit the key.
        """
        known = key_bounds(filter, self.info.key_schema) if isinstance(filter, pc.Expression) else None
        if known is not None:
            filter = None  # noqa: A001  (it is a range of keys and nothing else, and so it fits)
        schema = check_scan(self.info, columns, filter)
        lower, upper = within(key_range(self.info, prefix, between), known)
        request = ScanRequest(
            None if columns is None else tuple(columns),
            filter,
            lower,
            upper,
            bool(reverse),
            check_count(limit, "limit"),
            check_count(at_index, "at_index"),
            check_consistency(consistency),
        )
        return Scan(self._backend, self.info, schema, request)

    def count_rows(self, *, consistency: Consistency = "linearizable") -> int:
        """How many rows the table has."""
        return self.scan([self.key[0]], consistency=consistency).count_rows()


def delete_range(table: TableInfo, prefix: object, between: object) -> TableChange:
    """The deletion of a range of `table`; see `Table.delete_range`."""
    if prefix is None and between is None:
        raise UsageError(
            f"table {table.name!r}: say which keys to delete: prefix, between, or between=(None, None) for all"
        )
    lower, upper = key_range(table, prefix, between)
    return TableChange(EntryKind.DELETE_RANGE, table, None, lower, upper)


class Scan:
    """A read of a table that has not begun yet: each use begins one, on one state of the table.

    Attributes
    ----------
    schema
        The columns that it gives.
    """

    def __init__(self, backend: Backend, table: TableInfo, schema: pa.Schema, request: ScanRequest) -> None:
        self._backend = backend
        self._table = table
        self.schema = schema
        self._request = request

    def to_reader(self) -> pa.RecordBatchReader:
        """Begin to read, batch by batch, in bounded memory."""
        return self._backend.scan(self._table, self._request)

    def to_table(self) -> pa.Table:
        """Read everything."""
        with self.to_reader() as reader:
            return reader.read_all()

    def count_rows(self) -> int:
        """How many rows it gives."""
        return sum(batch.num_rows for batch in self)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        with self.to_reader() as reader:
            yield from reader

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Begin to read through the Arrow PyCapsule protocol, as DuckDB, polars and others do."""
        return self.to_reader().__arrow_c_stream__(requested_schema)
