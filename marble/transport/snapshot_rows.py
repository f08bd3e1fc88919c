"""Snapshots between nodes: the one row that an INSTALL_SNAPSHOT or a SNAPSHOT_PIECE brings.

Both are rows of kind SNAPSHOT in `marble.schema.ENTRY_SCHEMA`, whose group, index and term are the snapshot's:

====================  =====================================  ==============================
column                INSTALL_SNAPSHOT (an offer)            SNAPSHOT_PIECE
====================  =====================================  ==============================
``session``           bytes of the snapshot's file           offset of the piece in the file
``sequence``          XXH3-64 of the file                    bytes of the piece
``payload``           members (`marble.members`)             the piece, filled with zeros to a multiple of 64 bytes
``time_us, table``    0                                      0
====================  =====================================  ==============================

Rule 1: what these numbers mean is said here and nowhere else.
Rule 2: a row from a peer is judged by the same functions that read it, so there is no reading without judgement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pyarrow as pa

from marble._core import entry_batch
from marble.errors import InvariantError, ProtocolError, check
from marble.members import decode_members, encode_members
from marble.types import INDEX_MAX, PAYLOAD_ALIGNMENT_BYTES, EntryKind, Position, SnapshotMeta


class Offer(NamedTuple):
    """What a leader says of a snapshot before the first piece of it travels."""

    meta: SnapshotMeta
    endpoints: dict[int, str]
    nbytes: int
    """Of its file."""
    checksum: int
    """XXH3-64 of its file."""


class Piece(NamedTuple):
    """A part of a snapshot's file; never empty."""

    position: Position
    """Which snapshot: the index and term up to which it reaches."""
    offset: int
    data: pa.Buffer


def offer_row(
    group: int, meta: SnapshotMeta, endpoints: Mapping[int, str], nbytes: int, checksum: int
) -> pa.RecordBatch:
    """The row of an INSTALL_SNAPSHOT.

    Parameters
    ----------
    group
        Raft group.
    meta, endpoints
        What the snapshot stands for, and where members are reached.
    nbytes, checksum
        Of the snapshot's file: its length, at least 1, and XXH3-64.

    Raises
    ------
    InvariantError
        A number is out of range, or the membership breaks a rule.
    """
    check(1 <= nbytes <= INDEX_MAX, f"a snapshot of {nbytes} bytes")
    return entry_batch.snapshot_row(
        group, meta.index, meta.term, nbytes, checksum, encode_members(meta.members, endpoints)
    )


def offer_of(batch: pa.RecordBatch) -> Offer:
    """The offer in `batch`, which `entry_batch.admit` has taken as a snapshot's row. Raises ProtocolError."""
    row = _row(batch)
    nbytes = row["session"]
    if not 1 <= nbytes <= INDEX_MAX:
        raise ProtocolError(f"the offer of a snapshot of {nbytes} bytes")
    members, endpoints = decode_members(entry_batch.payload(batch, 0))
    return Offer(SnapshotMeta(row["index"], row["term"], members), endpoints, nbytes, row["sequence"])


def piece_row(group: int, position: Position, offset: int, data: bytes | memoryview) -> pa.RecordBatch:
    """The row of a SNAPSHOT_PIECE: `data`, not empty, which stands at `offset` of the file of the snapshot `position`.

    Raises InvariantError if a number is out of range or there is no data.
    """
    size = len(data)
    check(size > 0 and 0 <= offset <= INDEX_MAX - size, f"a piece of {size} bytes at {offset}")
    payload = pa.py_buffer(bytes(data) + bytes(-size % PAYLOAD_ALIGNMENT_BYTES))
    return entry_batch.snapshot_row(group, position.index, position.term, offset, size, payload)


def piece_of(batch: pa.RecordBatch) -> Piece:
    """The piece in `batch`, which `entry_batch.admit` has taken as a snapshot's row; shares its memory.

    Raises ProtocolError.
    """
    row = _row(batch)
    offset, size = row["session"], row["sequence"]
    payload = entry_batch.payload(batch, 0)
    if not 0 < size <= payload.size < size + PAYLOAD_ALIGNMENT_BYTES or offset > INDEX_MAX - size:
        raise ProtocolError(f"a piece of {size} bytes at {offset} in a payload of {payload.size}")
    if any(payload.slice(size).to_pybytes()):
        raise ProtocolError(f"a piece of {size} bytes with more behind its end")
    return Piece(Position(row["index"], row["term"]), offset, payload.slice(0, size))


def _row(batch: pa.RecordBatch) -> dict[str, int]:
    names = ("index", "term", "kind", "session", "sequence")
    if batch.num_rows != 1:
        raise InvariantError(f"{batch.num_rows} rows where one describes a snapshot")
    row = {name: batch.column(name)[0].as_py() for name in names}
    check(row["kind"] == EntryKind.SNAPSHOT, f"a row of kind {row['kind']} describes no snapshot")
    return row
