"""A table's rows in memory, ordered by key. Layout, ownership and invariants: head of ``memtable.pyx``."""

from collections.abc import Sequence
from typing import Self, final

import pyarrow as pa

@final
class Memtable:
    """The rows of one table in memory, ordered by primary key.

    Writes come from one thread at a time (others wait); snapshots may be taken and read in any thread, without waiting
    for writes, and outlive the memtable. Batches are kept by reference: do not change the memory under them afterwards.

    Parameters
    ----------
    schema
        The table's columns. Dictionary, run-end-encoded and extension types are refused.
    key
        Names of the key columns, in key order.

    Raises
    ------
    UsageError
        A key column is unknown, repeated or of a type that `KeyCodec` refuses; a column's type cannot be stored.
    """

    def __new__(cls, schema: pa.Schema, key: Sequence[str]) -> Self: ...
    @property
    def schema(self) -> pa.Schema:
        """The table's schema, as given."""
    @property
    def key(self) -> tuple[str, ...]:
        """Names of the key columns, in key order."""
    @property
    def key_schema(self) -> pa.Schema:
        """Fields of the key columns, in key order: what `delete` and `get_many` take."""
    @property
    def get_schema(self) -> pa.Schema:
        """Schema of what `Snapshot.get_many` returns: the table's, with every column outside of the key nullable."""
    def upsert(self, batch: pa.RecordBatch, index: int) -> int:
        """Insert or replace the rows of `batch`; of rows with the same key the last one counts.

        Parameters
        ----------
        batch
            Rows of the table: same column names, types and order as `schema`. Must have passed ``validate(full=True)``.
        index
            Log index of the write; never smaller than that of an earlier write.

        Returns
        -------
        int
            Rows of `batch`.

        Raises
        ------
        UsageError
            Wrong columns, or a null or NaN in the key. Nothing is changed then.
        InvariantError
            `index` goes back.
        """
    def delete(self, keys: pa.RecordBatch, index: int) -> int:
        """Delete the rows with the given keys (columns of `key_schema`); keys that are not there are no error.

        Returns
        -------
        int
            Rows that were there and are no longer.

        Raises
        ------
        UsageError
            Wrong columns, or a null or NaN. Nothing is changed then.
        InvariantError
            `index` goes back.
        """
    def snapshot(self) -> Snapshot:
        """Return the state after the last finished write; it never changes."""

@final
class Snapshot:
    """What a memtable held at one index.

    Immutable and safe to use in many threads at once. Made by `Memtable.snapshot` only.
    """

    @property
    def schema(self) -> pa.Schema:
        """The table's schema."""
    @property
    def index(self) -> int:
        """Index of the last write in it; 0 before the first."""
    @property
    def row_count(self) -> int:
        """Rows, exactly. Counted when first asked, and then remembered."""
    @property
    def run_count(self) -> int:
        """Sorted runs that reads look into."""
    @property
    def nbytes(self) -> int:
        """Bytes of memory held by this snapshot: index, keys, and the whole allocations behind batches, each once."""
    def get_many(self, keys: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.BooleanArray]:
        """Look rows up by key.

        Parameters
        ----------
        keys
            Columns of `Memtable.key_schema`.

        Returns
        -------
        tuple
            A batch of `Memtable.get_schema` with one row per key, in the order of `keys` (a missing row has its key and
            nulls), and for each key whether its row was found.

        Raises
        ------
        UsageError
            Wrong columns, or a null or NaN.
        """
    def scan(self, batch_rows_max: int = 65536, columns: Sequence[str] | None = None) -> Scan:
        """Iterate over all rows in key order.

        Parameters
        ----------
        batch_rows_max
            Most rows of a batch, at least 1. Batches may be smaller, never empty.
        columns
            Names of the columns wanted, in that order; None for all.

        Raises
        ------
        UsageError
            An unknown or repeated column, or `batch_rows_max` below 1.
        """

@final
class Scan:
    """Iterator over the rows of a snapshot in key order. Calls from several threads take turns; each row comes once."""

    @property
    def schema(self) -> pa.Schema:
        """Schema of the batches."""
    def __iter__(self) -> Scan: ...
    def __next__(self) -> pa.RecordBatch: ...
