"""Arrow schemas: the row of the log, and what a table may be made of."""

from __future__ import annotations

from typing import Final

import pyarrow as pa


def _column(name: str, type_: pa.DataType) -> pa.Field:
    return pa.field(name, type_, nullable=False)


ENTRY_SCHEMA: Final = pa.schema(
    [
        _column("group", pa.uint32()),
        _column("index", pa.uint64()),
        _column("term", pa.uint64()),
        _column("kind", pa.uint8()),
        _column("session", pa.uint64()),
        _column("sequence", pa.uint64()),
        _column("table", pa.uint32()),
        _column("checksum", pa.uint64()),
        _column("payload", pa.binary()),
    ]
)
"""One row is one log entry (or, with kind HARD_STATE, a node's hard state).

``group``, ``index`` and ``term`` are given by the leader; the rest by the proposer. ``checksum`` is the proposer's: it covers
kind, session, sequence, table and payload, and travels with the entry to every replica's disk and memtable.
"""
