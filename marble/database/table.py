"""Tables as a user sees them.

Rule 1: a mistake of the caller is found here, before anything is sent: `UsageError`, nothing replicated.

Thread safety: every object here may be used from many threads at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import pyarrow as pa
import pyarrow.compute as pc

from marble.database.arguments import is_one_key, key_batch, one_batch
from marble.database.backend import Backend, Consistency, check_consistency, check_scan
from marble.database.window import WriteWindow, outcome
from marble.errors import InvariantError, UnavailableError
from marble.schema import TableInfo, conform, to_batches


class Table:
    """A replicated table: rows of one Arrow schema, at most one for each value of the primary key."""

    def __init__(self, backend: Backend, info: TableInfo) -> None:
        self._backend = backend
        self.info = info

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

        Each batch of a stream becomes one entry of the log: it takes effect as a whole, after the batches before it.
        A stream as a whole is not atomic.

        Parameters
        ----------
        data
            Anything with ``__arrow_c_stream__`` or ``__arrow_c_array__`` that has the table's columns, in any order.

        Returns
        -------
        int
            The index at which the last batch is committed, durable on a majority, and readable.

        Raises
        ------
        UsageError
            If a batch does not fit the table (see `marble.schema.conform`), is larger than ``max_entry_size``, or
            `data` has no rows.
        UnavailableError
            Nothing of the batch that a note on the error names was replicated: retry later, from that batch on.
        OutcomeUnknownError
            That batch may or may not have been written. Writing it again is harmless unless someone else wrote the
            same keys in between.

        Whatever the error, batches before the one named are written, and some after it may be.
        """
        with WriteWindow(self.name) as window:
            for batch in to_batches(data):
                if batch.num_rows > 0:
                    self._submit(window, conform(batch, self.info))
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
        """Upsert the rows of `data` as one entry, without waiting for it.

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
        return self._backend.write(self.info, conform(one_batch(data), self.info))

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

    def get(self, key: object, *, consistency: Consistency = "linearizable") -> dict[str, object] | None:
        """The row with this key, or None.

        Parameters
        ----------
        key
            The value of the key column; a tuple of values in key order; or a dict by column.
        consistency
            See `Consistency`.
        """
        row = self._backend.get_many(self.info, key_batch(self.info, [key]), check_consistency(consistency))
        if row.num_rows != 1:
            raise InvariantError(f"table {self.name!r}: asked for one key, got {row.num_rows} rows")
        found: dict[str, object] = row.to_pylist()[0]
        return None if found[self.key[0]] is None else found

    def get_many(self, keys: object, *, consistency: Consistency = "linearizable") -> pa.RecordBatch:
        """The rows with these keys, all of one state of the table.

        Parameters
        ----------
        keys
            A list of keys, each as for `get`; or Arrow data (anything with ``__arrow_c_stream__`` or
            ``__arrow_c_array__``) with exactly the key columns.
        consistency
            See `Consistency`.

        Returns
        -------
        pyarrow.RecordBatch
            The table's columns, all nullable; row i is for key i. Where there is no such row, every column is null,
            the key columns too, which a row that exists never has.
        """
        check_consistency(consistency)
        if isinstance(keys, Sequence) and not keys:
            return pa.RecordBatch.from_pylist([], self.info.lookup_schema)
        return self._backend.get_many(self.info, key_batch(self.info, keys), consistency)

    def scan(
        self,
        columns: Sequence[str] | None = None,
        filter: pc.Expression | None = None,  # noqa: A002
        *,
        consistency: Consistency = "linearizable",
    ) -> Scan:
        """Rows in key order, as something that any Arrow tool can read.

        Parameters
        ----------
        columns
            Names of the columns wanted, in the order wanted. All, if None.
        filter
            A boolean `pyarrow.compute.Expression` over any columns of the table, e.g. ``pc.field("a") > 1``.
        consistency
            See `Consistency`.

        Raises
        ------
        UsageError
            If a column is unknown or the filter does not fit.
        """
        schema = check_scan(self.info, columns, filter)
        return Scan(self._backend, self.info, schema, columns, filter, check_consistency(consistency))

    def count_rows(self, *, consistency: Consistency = "linearizable") -> int:
        """How many rows the table has."""
        return self.scan([self.key[0]], consistency=consistency).count_rows()


class Scan:
    """A read of a table that has not begun yet: each use begins one, on one state of the table.

    Attributes
    ----------
    schema
        The columns that it gives.
    """

    def __init__(
        self,
        backend: Backend,
        table: TableInfo,
        schema: pa.Schema,
        columns: Sequence[str] | None,
        filter: pc.Expression | None,  # noqa: A002
        consistency: Consistency,
    ) -> None:
        self._backend = backend
        self._table = table
        self.schema = schema
        self._columns = None if columns is None else list(columns)
        self._filter = filter
        self._consistency = consistency

    def to_reader(self) -> pa.RecordBatchReader:
        """Begin to read, batch by batch, in bounded memory."""
        return self._backend.scan(self._table, self._columns, self._filter, self._consistency)

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
