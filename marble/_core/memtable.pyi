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
    keep_tombstones
        Older rows of the table lie elsewhere, in files: deletes are kept so that they hide them.

    Raises
    ------
    UsageError
        A key column is unknown, repeated or of a type that `KeyCodec` refuses; a column's type cannot be stored.
    """

    def __new__(cls, schema: pa.Schema, key: Sequence[str], keep_tombstones: bool = False) -> Self: ...
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
            Rows that were there and are no longer; with `keep_tombstones`, distinct keys, whether they were here or not.

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
        """Rows, exactly, tombstones aside. Counted when first asked, and then remembered."""
    @property
    def run_count(self) -> int:
        """Sorted runs that reads look into."""
    @property
    def entry_count(self) -> int:
        """Entries of its runs: at least as many as there are rows and tombstones."""
    @property
    def bytes_about(self) -> int:
        """About how many bytes its rows and keys have. Quick, unlike `nbytes`: for deciding when to flush."""
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
    def scan(
        self,
        batch_rows_max: int = 65536,
        columns: Sequence[str] | None = None,
        lower: bytes | None = None,
        upper: bytes | None = None,
        *,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Scan:
        """Iterate over rows in key order.

        Parameters
        ----------
        batch_rows_max
            Most rows of a batch, at least 1. Batches may be smaller, never empty.
        columns
            Names of the columns wanted, in that order; None for all.
        lower, upper
            Encoded keys, or any bytes: only rows with ``lower <= key < upper``.
        reverse
            From the largest key down.
        limit
            Most rows of all.

        Raises
        ------
        UsageError
            An unknown or repeated column, `batch_rows_max` below 1, `limit` below 0, or a bound that is not bytes.
        """

@final
class Scan:
    """Iterator over the rows of a snapshot in key order. Calls from several threads take turns; each row comes once."""

    @property
    def schema(self) -> pa.Schema:
        """Schema of the batches."""
    def close(self) -> None:
        """Let go of the snapshot now; the iterator has ended then."""
    def __iter__(self) -> Scan: ...
    def __next__(self) -> pa.RecordBatch: ...
