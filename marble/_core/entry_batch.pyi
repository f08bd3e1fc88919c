"""Log entries as rows of a record batch. Layout, ownership and invariants: head of ``entry_batch.pyx``."""

from collections.abc import Iterable
from typing import Self, final

import pyarrow as pa

from marble._core.term_index import EntrySpan
from marble.types import EntryKind

ENTRY_SCHEMA: pa.Schema

@final
class Proposal:
    """An entry as its proposer makes it: all but its place in the log. Immutable.

    Parameters
    ----------
    kind
        Any kind of entry: not HARD_STATE, not SNAPSHOT.
    table
        Id of the table, 0 where there is none.
    payload
        What `encode_payload` returned; kept, not copied. None exactly for NOOP, OPEN_SESSION and CLOSE_SESSION.
    session, sequence
        Who proposes and its how-manieth proposal this is; 0 for no session. A CLOSE_SESSION names its session.

    Raises
    ------
    UsageError
        The kind cannot be proposed, or the payload does not fit it.
    """

    def __new__(
        cls,
        kind: EntryKind | int,
        table: int = 0,
        payload: pa.Buffer | None = None,
        session: int = 0,
        sequence: int = 0,
    ) -> Self: ...
    @property
    def kind(self) -> EntryKind: ...
    @property
    def table(self) -> int: ...
    @property
    def payload(self) -> pa.Buffer | None: ...
    @property
    def session(self) -> int: ...
    @property
    def sequence(self) -> int: ...
    @property
    def checksum(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Bytes of the payload: what every limit on the bytes of entries counts."""

def entry_checksum(
    kind: EntryKind | int, session: int, sequence: int, table: int, payload: pa.Buffer | None = None
) -> int:
    """XXH3-64 over little-endian ``struct "<BxxxIQQ"`` of (kind, table, session, sequence), then the payload."""

def encode_payload(batch: pa.RecordBatch) -> pa.Buffer:
    """One uncompressed IPC record-batch message with the rows of `batch`, zero-filled to a whole number of 64 bytes.

    Raises UsageError if Arrow cannot write the batch.
    """

def decode_payload(buffer: pa.Buffer, schema: pa.Schema) -> pa.RecordBatch:
    """The rows of a payload that `encode_payload` made of a batch of `schema`.

    Shares the memory of `buffer` if that starts 8-byte aligned, else of one copy of it. The message and the lengths of
    all buffers are checked; offsets and values are not: call ``validate(full=True)`` before you trust them.

    Raises
    ------
    ProtocolError
        Not a whole, uncompressed record-batch message of IPC V5 with the columns of `schema`.
    """

def build(group: int, first_index: int, term: int, proposals: Iterable[Proposal], time_us: int = 0) -> pa.RecordBatch:
    """The `proposals` as entries ``first_index, first_index + 1, ...`` of `term` (schema `ENTRY_SCHEMA`).

    All of them were taken in at `time_us`, microseconds since 1970 UTC on the leader's clock. A single proposal's
    payload is not copied. Raises UsageError if the payloads together exceed 2 GiB.
    """

def snapshot_row(
    group: int, index: int, term: int, session: int, sequence: int, payload: pa.Buffer | None = None
) -> pa.RecordBatch:
    """One row of kind SNAPSHOT, with its checksum. What its numbers mean is said where such rows are used.

    `payload` is None or a whole number of 64 bytes, and is not copied. Raises InvariantError if a number is out of
    range.
    """

def verify(batch: pa.RecordBatch) -> None:
    """Recompute the checksum of every entry. Raises CorruptionError that names the first entry that is damaged."""

def check_contiguous(batch: pa.RecordBatch) -> None:
    """Check that the rows are a run of one group's log, fit to come from a peer; an empty batch is.

    Raises
    ------
    ProtocolError
        Wrong schema, a null, indexes not consecutive or out of range, several groups, a kind that no entry has (unknown,
        HARD_STATE, SNAPSHOT), falling or zero terms, a time out of range, a CLOSE_SESSION without session, or a payload
        that is no whole number of 64 bytes or that the kind may not have.
    """

def changes(batch: pa.RecordBatch) -> tuple[int, ...]:
    """Indexes, ascending, of the entries of `batch` that change the membership (kind MEMBERSHIP)."""

def heads(batch: pa.RecordBatch) -> list[tuple[int, int, int, int, int, int]]:
    """``(index, kind, session, sequence, time_us, table)`` of each entry of `batch`."""

def admit(batch: pa.RecordBatch, bytes_max: int, snapshot: bool = False) -> pa.RecordBatch:
    """Check everything about a batch that a peer has sent; return a copy of it in one 64-byte aligned allocation.

    Checked: schema, at least one row, at most `bytes_max` bytes in all buffers, ``validate(full=True)``,
    `check_contiguous` and `verify`. Because the copy is aligned, its payloads decode without another one.

    With `snapshot`, what stands in the place of `check_contiguous` is that there is exactly one row, of kind SNAPSHOT:
    index and term in range, neither time nor table, a payload of whole 64 bytes or none.

    Raises
    ------
    ProtocolError
        Something is wrong with the batch.
    """

def group_of(batch: pa.RecordBatch) -> int:
    """The group of the first entry. Raises UsageError if there is none."""

def payload(batch: pa.RecordBatch, row: int) -> pa.Buffer:
    """The payload of row `row`, sharing the batch's memory. Raises IndexError."""

def span(batch: pa.RecordBatch) -> EntrySpan:
    """Indexes, terms and payload bytes of rows that `check_contiguous` accepts. Raises UsageError if there are none."""

def places_checksum(batch: pa.RecordBatch, seed: int = 0) -> int:
    """XXH3-64 with `seed` over the values of the columns index, term, time_us and checksum, one column after the other."""

def concat(batches: Iterable[pa.RecordBatch]) -> pa.RecordBatch:
    """The rows of all `batches` in one batch with contiguous buffers; a single batch is returned as it is.

    Raises UsageError if there is none, if one is not of `ENTRY_SCHEMA`, or if payloads together exceed 2 GiB.
    """
