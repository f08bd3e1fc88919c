"""Frames of the log. Layout, ownership, thread safety and invariants: head of ``frame.pyx``."""

from collections.abc import Sequence
from typing import Final, final

import pyarrow as pa
from typing_extensions import Buffer

ALIGNMENT: Final[int]
"""Frames are multiples of this many bytes."""

METADATA_BYTES_MAX: Final[int]
"""No frame's metadata, in which the seal stands, is longer."""

SEAL_MAGIC: Final[bytes]
"""What every seal's text begins with."""

SEAL_BYTES: Final[int]
"""Length of a seal's text: the magic, then length, segment, position, synced, chain and checksum of 16 hex digits
each."""

OVERHEAD_BYTES_MAX: Final[int]
"""Bytes of a frame besides its rows, at most."""

ROW_BYTES_MAX: Final[int]
"""Bytes of a row besides its payload, at most."""

@final
class Seal:
    """What a sound frame says of itself. Made by `check` only."""

    @property
    def length(self) -> int:
        """Bytes of the frame; the next one starts behind them."""

    @property
    def segment(self) -> int:
        """Number of the segment that it was written to."""

    @property
    def position(self) -> int:
        """Where in that segment it starts."""

    @property
    def synced(self) -> int:
        """All bytes of the segment below this offset were durable before the frame was written; ``<= position``."""

    @property
    def chain(self) -> int:
        """Checksum of the frame before it; 0 in the header of the first segment."""

    @property
    def checksum(self) -> int:
        """Its own checksum: the chain of the frame behind it."""

    @property
    def metadata_bytes(self) -> int:
        """Bytes of the frame in front of its body."""

def encode_header(version: str, segment: int, chain: int) -> tuple[pa.Buffer, int]:
    """The first frame of a segment, which holds the schema, and its checksum."""

def encode(
    hard_states: list[tuple[int, int, int, int]],
    ranges: list[tuple[pa.RecordBatch, int, int]],
    segment: int,
    position: int,
    synced: int,
    chain: int,
    snapshots: Sequence[tuple[int, int, int, int]] = ...,
) -> tuple[pa.Buffer, pa.RecordBatch, int]:
    """One frame of all the rows: first the hard states, then the snapshots' positions, then the ranges.

    Parameters
    ----------
    hard_states
        ``(group, term, vote, commit)``.
    ranges
        ``(batch, row, end)``: rows ``[row, end)`` of a batch that `check_entries` accepted.
    segment, position, synced, chain
        As in `Seal`.
    snapshots
        ``(group, index, term, last)``: everything up to ``index`` is in a snapshot, and of the entries before this frame
        those up to ``last`` stay.

    Returns
    -------
        The frame; the same rows as a batch that shares the frame's memory; the frame's checksum.

    Raises
    ------
    InvariantError
        There are no rows, or the payloads exceed 2 GiB.
    """

def check(data: Buffer, offset: int, segment: int, position: int, bytes_max: int) -> Seal | int:
    """Look for a frame at `offset` of `data` that claims to stand at `position` of `segment`.

    Returns its seal if it is sound; 0 if there is no such frame; otherwise the number of bytes from `offset` on, more
    than there are, that it takes to tell. `bytes_max` bounds that number and the length of a frame.
    """

def decode(data: Buffer, offset: int, seal: Seal) -> pa.RecordBatch:
    """The rows of the record batch frame that `check` found at `offset`, in memory of their own, aligned to 64 bytes.

    Raises CorruptionError or InvariantError if the sound frame does not hold a batch of `marble.schema.ENTRY_SCHEMA`.
    """

def check_entries(batch: pa.RecordBatch, group: int) -> tuple[int, int, int, int, int]:
    """Check that `batch` is a run of entries of `group` that may be encoded.

    Returns ``(first index, first term, last term, payload bytes, bytes of the largest payload)``. Raises
    InvariantError if it has another schema, nulls, no rows, rows of another group or rows that are no entries, or
    if indexes have gaps or terms fall.
    """

def runs(batch: pa.RecordBatch) -> list[tuple[int, int, int, int, int]]:
    """Split a decoded batch into ``(group, state, row, end, index of row)``.

    A row that is no entry is a run of its own, and ``state`` is its kind, HARD_STATE or SNAPSHOT; entries have state 0 and
    are together as long as the group is the same and indexes follow each other.
    Raises CorruptionError if indexes or terms are out of range or terms fall within a run.
    """

def terms_and_sizes(batch: pa.RecordBatch, row: int, end: int) -> tuple[bytes, bytes]:
    """Terms and payload sizes of rows ``[row, end)`` as native uint64."""

def clip(batch: pa.RecordBatch, row: int, end: int, bytes_max: int) -> tuple[int, int]:
    """The largest ``e <= end`` such that the payloads of ``[row, e)`` have at most `bytes_max` bytes, but at least
    ``row + 1``.

    Returns ``(e, payload bytes of [row, e))``.
    """
