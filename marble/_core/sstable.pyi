"""Sorted tables in files: written once, mapped, read by block. Layout, ownership and invariants: head of ``sstable.pyx``."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self, final

import pyarrow as pa

class SSTableInfo(NamedTuple):
    """What a file holds.

    Keys are in the encoding of `marble._core.key_codec`. Tombstones count as rows.
    """

    name: str
    """XXH3-128 of the whole file, 32 lower-case hex digits: what it is called. Empty if it was not computed."""
    nbytes: int
    """Of the file."""
    rows: int
    tombstones: int
    block_count: int
    first_key: bytes
    last_key: bytes
    first_index: int
    """Smallest and largest Raft index of a row's write."""
    last_index: int
    ttl_min: int | None
    """Smallest and largest value of the TTL column, as its integer. None where a row that is no tombstone has none."""
    ttl_max: int | None

@final
class BlockCache:
    """Blocks that files have read, for all files that are opened with it. Safe to use in many threads at once.

    Parameters
    ----------
    bytes_max
        Memory for blocks, besides the mappings that they may share. 0 keeps none.
    """

    def __new__(cls, bytes_max: int) -> Self: ...
    @property
    def bytes_max(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Memory that is charged now; at most `bytes_max`."""
    @property
    def block_count(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...

@final
class SSTableWriter:
    """Makes the bytes of one file. It writes nothing itself: the caller writes what it is given, in order.

    For one thread at a time.

    Parameters
    ----------
    schema, key
        The table's, as for `Memtable`.
    block_rows_max, block_bytes_max
        A block ends before it has more rows, or more bytes than this (uncompressed); one row may have more.
    compression
        Of blocks: None, "lz4" or "zstd".
    ttl_column
        A column of integers, dates or timestamps, whose range `SSTableInfo` is to give.

    Raises
    ------
    UsageError
        As `Memtable`; a column has one of the names that files use themselves (``_marble_index``,
        ``_marble_deleted``); a limit below 1; an unknown compression; a TTL column of another type.
    """

    def __new__(
        cls,
        schema: pa.Schema,
        key: Sequence[str],
        *,
        block_rows_max: int = 4096,
        block_bytes_max: int = 65536,
        compression: Literal["lz4", "zstd"] | None = None,
        ttl_column: str | None = None,
    ) -> Self: ...
    @property
    def schema(self) -> pa.Schema:
        """Of the file: the table's columns, nullable but for the key, and the two of our own."""
    @property
    def nbytes(self) -> int:
        """Bytes given out so far."""
    @property
    def rows(self) -> int:
        """Rows added so far."""
    def add(
        self, batch: pa.RecordBatch, indexes: pa.UInt64Array, deleted: pa.BooleanArray | None = None
    ) -> list[pa.Buffer]:
        """Add rows behind those added before, and return what is ready of the file.

        Parameters
        ----------
        batch
            Rows of the table, by key; columns other than the key may be null. Must have passed ``validate(full=True)``.
        indexes
            Raft index of each row's write.
        deleted
            Which rows are tombstones; of these only the key is kept. None: no row is.

        Raises
        ------
        UsageError
            Wrong columns or lengths, a null or NaN in the key, keys that do not ascend strictly, or a writer that has
            finished. The writer is of no more use then.
        """
    def finish(self) -> tuple[pa.Buffer, SSTableInfo]:
        """Return the rest of the file, and what it holds.

        Raises
        ------
        UsageError
            No row was added: an sstable has at least one.
        """

@final
class SSTable:
    """One file, mapped. Immutable and safe to use in many threads at once; the GIL is released while it works.

    What it returns may share the mapping and keeps it alive.
    """

    @staticmethod
    def open(buffer: pa.Buffer, schema: pa.Schema, key: Sequence[str], cache: BlockCache, name: str = "") -> SSTable:
        """Take a file's bytes, and check all but its blocks; a block is checked when it is first read.

        Parameters
        ----------
        buffer
            The whole file. It is shared, and must never change.
        schema, key
            The table's, as for `SSTableWriter`.
        cache
            Keeps blocks that were read.
        name
            What errors call the file.

        Raises
        ------
        CorruptionError
            Naming file and offset.
        UsageError
            The file is sound, but of another schema or of a version that this marble does not know.
        """
    @property
    def info(self) -> SSTableInfo:
        """What the file says of itself; ``info.name`` is the `name` that it was opened with."""
    @property
    def schema(self) -> pa.Schema:
        """The table's columns, nullable but for the key."""
    def map_ahead(self, bytes_max: int) -> int:
        """Map what of the file's first `bytes_max` bytes is in memory already, so that nobody waits for page faults.

        Returns how many bytes those are: 0 where the system cannot tell. Nothing is read from the disk for it, but for what
        memory lacks within 256 KiB of which it has the first page.
        """
    def verify(self) -> str:
        """Read the whole file, check all there is to check, and return its name (XXH3-128 of it, as hex digits).

        Raises
        ------
        CorruptionError
            Naming file and offset.
        """
    def zone_maps(self) -> pa.RecordBatch:
        """Return what is known of each block: one row for each, in order.

        For column ``x`` there is ``x.nulls: uint64`` (a tombstone's are not counted) and, if its type has an order,
        ``x.min`` and ``x.max`` of its type. These two are null where nothing is known; strings are cut to 32 bytes, the largest
        upwards. Rows that are tombstones do not count.
        """
    def may_contain(self, keys: pa.RecordBatch) -> pa.BooleanArray:
        """Ask the bloom filter: false where no row has the key."""
    def get_many(self, keys: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.BooleanArray, pa.UInt64Array]:
        """Look rows up by key.

        Returns
        -------
        tuple
            For each key, in their order: the row (null but for the key where it is not found), whether it was found and
            is no tombstone, and the Raft index of its write, a tombstone's too (null where the file has no such key).

        Raises
        ------
        UsageError
            Wrong columns, or a null or NaN.
        CorruptionError
            Naming file and offset.
        """
    def scan(
        self,
        columns: Sequence[str] | None = None,
        lower: bytes | None = None,
        upper: bytes | None = None,
        *,
        reverse: bool = False,
        versions: bool = False,
    ) -> SSTableScan:
        """Iterate over rows by key, a block at a time.

        Parameters
        ----------
        columns
            Names of the columns wanted, in that order; None for all.
        lower, upper
            Encoded keys (or beginnings of such): only rows with ``lower <= key < upper``.
        reverse
            From the largest key down.
        versions
            Give tombstones too, and the columns ``_marble_index`` and ``_marble_deleted`` behind the others.

        Raises
        ------
        UsageError
            An unknown or repeated column.
        CorruptionError
            Naming file and offset, from the iterator.
        """

@final
class SSTableScan:
    """Iterator over the rows of a file. Calls from several threads take turns; each row comes once."""

    @property
    def schema(self) -> pa.Schema:
        """Schema of the batches."""
    def __iter__(self) -> SSTableScan: ...
    def __next__(self) -> pa.RecordBatch: ...
