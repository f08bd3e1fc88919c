"""The slow, obvious twin of `marble._core.entry_batch`: entries as Python tuples, one at a time.

XXH3 itself is not rewritten here: it comes from `marble._core.checksum`, whose own tests hold it against known values.
"""

from __future__ import annotations

import struct

import pyarrow as pa

from marble._core.checksum import xxh3_64
from marble.schema import ENTRY_SCHEMA

Row = tuple[int, int, int, int, bytes]
"""kind, table, session, sequence, payload"""


def entry_checksum(kind: int, session: int, sequence: int, table: int, payload: bytes) -> int:
    return int(xxh3_64(struct.pack("<BxxxIQQ", kind, table, session, sequence) + payload))


def build(group: int, first_index: int, term: int, rows: list[Row], time_us: int = 0) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(
        [
            {
                "group": group,
                "index": first_index + at,
                "term": term,
                "kind": kind,
                "session": session,
                "sequence": sequence,
                "time_us": time_us,
                "table": table,
                "checksum": entry_checksum(kind, session, sequence, table, payload),
                "payload": payload,
            }
            for at, (kind, table, session, sequence, payload) in enumerate(rows)
        ],
        schema=ENTRY_SCHEMA,
    )


def encode_payload(batch: pa.RecordBatch) -> bytes:
    """The rows only: a message that any reader of `decode_payload` must take, though not the same bytes."""
    message = batch.serialize().to_pybytes()
    return message + bytes(-len(message) % 64)


def changes(batch: pa.RecordBatch) -> tuple[int, ...]:
    return tuple(row["index"] for row in batch.to_pylist() if row["kind"] == 8)


def heads(batch: pa.RecordBatch) -> list[tuple[int, ...]]:
    names = ("index", "kind", "session", "sequence", "time_us", "table")
    return [tuple(row[name] for name in names) for row in batch.to_pylist()]


def snapshot_row(group: int, index: int, term: int, session: int, sequence: int, payload: bytes) -> pa.RecordBatch:
    return build(group, index, term, [(11, 0, session, sequence, payload)])


def places_checksum(batch: pa.RecordBatch, seed: int = 0) -> int:
    words = [value for name in ("index", "term", "time_us", "checksum") for value in batch.column(name).to_pylist()]
    return int(xxh3_64(struct.pack(f"<{len(words)}Q", *words), seed))
