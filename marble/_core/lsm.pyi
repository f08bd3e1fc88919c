"""Memtables and files of one table read as one. Layout, ownership and invariants: head of ``lsm.pyx``."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Self, final

import pyarrow as pa
import pyarrow.compute as pc

from marble._core.memtable import Snapshot
from marble._core.sstable import SSTable

def conjuncts(filter: pc.Expression) -> list[tuple[str, str, pa.Scalar | pa.Array]]:  # noqa: A002
    """What a filter demands of single columns: triples of column, operator and constant.

    Operators are ``==``, ``<``, ``<=``, ``>``, ``>=``, ``starts_with`` and ``in``, whose constant is an array. Every row
    that passes the filter fulfils all of them; constants are never null, and of the type that the filter gives them.
    Parts of the filter that have another form are left out.
    """

@final
class Reader:
    """One table whose rows lie in memtables and in files: of each key the newest version counts.

    Immutable and safe to use in many threads at once; it keeps alive what it reads from.

    Parameters
    ----------
    memtables
        Newest first. While older rows lie in files, memtables must have kept their tombstones.
    files
        Levels, newest first, each a sequence of files whose keys do not overlap, in key order. A file that overlaps
        others, as in level 0, is a level of its own. Every row of a memtable or level is newer than the rows of those
        behind it with the same key.

    Raises
    ------
    UsageError
        Nothing to read from, tables that differ, or files of a level that overlap.
    """

    def __new__(cls, memtables: Iterable[Snapshot], files: Iterable[Sequence[SSTable]] = ()) -> Self: ...
    def with_memtables(self, memtables: Iterable[Snapshot]) -> Reader:
        """Return a reader of the same files behind other memtables. Quick, however many files there are.

        Raises
        ------
        UsageError
            A memtable of another table.
        """
    @property
    def memtables(self) -> tuple[Snapshot, ...]:
        """As given."""
    @property
    def files(self) -> tuple[tuple[SSTable, ...], ...]:
        """As given, without empty levels."""
    @property
    def schema(self) -> pa.Schema:
        """The table's schema."""
    @property
    def key_schema(self) -> pa.Schema:
        """Fields of the key columns, in key order: what `get_many` takes."""
    @property
    def get_schema(self) -> pa.Schema:
        """Schema of what `get_many` returns: the table's, with every column outside of the key nullable."""
    @property
    def row_count(self) -> int:
        """Rows of the table. All keys are read to tell."""
    def count_rows(self, lower: bytes | None = None, upper: bytes | None = None) -> int:
        """Count the rows with ``lower <= key < upper``, by reading their keys.

        Raises
        ------
        CorruptionError
            Naming file and offset.
        """
    def get_many(
        self, keys: pa.RecordBatch, columns: Sequence[str] | None = None
    ) -> tuple[pa.RecordBatch, pa.BooleanArray]:
        """Look rows up by key.

        Parameters
        ----------
        keys
            Columns of `key_schema`.
        columns
            Names of the columns wanted, in that order; None for all. With none, nothing but ``found`` is made.

        Returns
        -------
        tuple
            A batch with one row per key, in the order of `keys` (a missing row has its key and nulls), and for each key
            whether its row was found.

        Raises
        ------
        UsageError
            Wrong columns, or a null or NaN.
        CorruptionError
            Naming file and offset.
        """
    def get_row(self, names: tuple[str, ...], key: tuple[object, ...]) -> dict[str, object] | Literal[False] | None:
        """Look one row up, without batches around it.

        Parameters
        ----------
        names
            What to call the columns, all of them in their order.
        key
            The values of the key columns, as Python has them.

        Returns
        -------
        dict or None
            The row as pyarrow's ``to_pylist`` gives it, or None where there is none. False if a value of `key`
            is not exactly of the Python type of its column, or has no place in it, or is of a type for which there is no
            short cut: `get_many` takes arrays of all types.

        Raises
        ------
        CorruptionError
            Naming file and offset.
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
        may_match: Callable[[pa.RecordBatch], pa.BooleanArray] | None = None,
        batch_bytes_max: int | None = None,
    ) -> Scan:
        """Iterate over rows in key order, in bounded memory.

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
        may_match
            Says of the zone maps of a file (`SSTable.zone_maps`) which blocks can have a row that the caller wants; null
            means yes. Rows of other blocks may be left out, and may be there: the caller still looks at each row.
        batch_bytes_max
            About how many bytes a batch has at most, of all columns, if the rows of each source (a batch in memory, a block of a file) are
            about as long as one another; at least one row. None: 64 MiB, which is never passed by more than a row.

        Raises
        ------
        UsageError
            An unknown or repeated column, `batch_rows_max` below 1, `limit` below 0, or a bound that is not bytes.
        CorruptionError
            Naming file and offset; also from the iterator, which may be asked again once the file is mended.
        """
    def scan_versions(
        self,
        batch_rows_max: int = 65536,
        lower: bytes | None = None,
        upper: bytes | None = None,
        *,
        drop_tombstones: bool = False,
    ) -> VersionScan:
        """Iterate over the newest version of each key in key order, tombstones too: what flush and compaction write.

        Parameters
        ----------
        batch_rows_max, lower, upper
            As in `scan`.
        drop_tombstones
            Leave tombstones out after all. Right only if no older version of any key lies outside of this reader.

        Raises
        ------
        UsageError
            As `scan`.
        CorruptionError
            Naming file and offset; also from the iterator.
        """

@final
class Scan:
    """Iterator over rows in key order. Calls from several threads take turns; each row comes once."""

    @property
    def schema(self) -> pa.Schema:
        """Schema of the batches."""
    def close(self) -> None:
        """Let go of memtables and files now; the iterator has ended then."""
    def __iter__(self) -> Scan: ...
    def __next__(self) -> pa.RecordBatch: ...

@final
class VersionScan:
    """Iterator over versions in key order: what `marble._core.sstable.SSTableWriter.add` takes.

    Each item is a batch of `Reader.get_schema`, where a tombstone has its key and nulls; the log index of each row's
    write; and which rows are tombstones.
    """

    @property
    def schema(self) -> pa.Schema:
        """Schema of the batches."""
    def close(self) -> None:
        """Let go of memtables and files now; the iterator has ended then."""
    def __iter__(self) -> VersionScan: ...
    def __next__(self) -> tuple[pa.RecordBatch, pa.UInt64Array, pa.BooleanArray]: ...
