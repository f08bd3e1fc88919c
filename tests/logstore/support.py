"""What the tests of the log share: entries that tell where they belong, and the contents of a log as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from marble._core import entry_batch, frame
from marble.env import SystemRandom
from marble.logstore.log import Log, LogOptions
from marble.schema import ENTRY_SCHEMA
from marble.testing.disk import SimulatedFiles
from marble.types import EntryKind, HardState

SEGMENT = "log/{:016d}.arrows".format
SYNCED = "log/SYNCED"
SMALL = LogOptions(segment_bytes_max=8192, cache_bytes_max=4096)


def entries(
    first: int, terms: Sequence[int], group: int = 1, size: int = 64, mark: int = 0, kind: int = EntryKind.WRITE
) -> pa.RecordBatch:
    """Entries from index `first` on, one for each term; `size` and `mark` vary the payloads."""
    rows = []
    for index, term in enumerate(terms, start=first):
        payload = (f"{group}/{index}/{term}/{mark};".encode() * (size // 8 + 1))[:size]
        checksum = entry_batch.entry_checksum(kind, mark, index, 1, pa.py_buffer(payload))
        rows.append((group, index, term, kind, mark, index, 10 * index + mark, 1, checksum, payload))
    columns = list(zip(*rows, strict=True))
    arrays = [pa.array(column, field.type) for column, field in zip(columns, ENTRY_SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=ENTRY_SCHEMA)


def disk(seed: int = 0) -> SimulatedFiles:
    return SimulatedFiles(SystemRandom(seed))


def contents(log: Log) -> dict[int, tuple[HardState, list[dict[str, Any]]]]:
    """Everything that `log` had when it was opened: hard state and entries of each group, read from disk."""
    found = {}
    for group, state in log.groups.items():
        rows: list[dict[str, Any]] = []
        for batch in log.replay(group, state.first_index, state.last_index + 1):
            batch.validate(full=True)
            entry_batch.verify(batch)
            rows += batch.to_pylist()
        assert [row["index"] for row in rows] == list(range(state.first_index, state.last_index + 1))
        if rows:
            terms = state.term_index.span(state.first_index, state.last_index + 1)
            assert terms.terms() == [row["term"] for row in rows]
            assert terms.sizes() == [len(row["payload"]) for row in rows]
        assert state.last_term == (rows[-1]["term"] if rows else state.purged_term)
        assert (state.first_index, state.term_index.first_index) == (state.purged_index + 1,) * 2
        assert state.term_index.last_index == state.last_index
        assert state.term_index.term_at(state.purged_index) == state.purged_term
        assert state.changes == [row["index"] for row in rows if row["kind"] == EntryKind.MEMBERSHIP]
        found[group] = (state.hard_state, rows)
    return found


def frame_ends(files: SimulatedFiles, path: str, number: int) -> list[int]:
    """0, and where each frame of a segment ends; behind the last one there may be room."""
    data, ends = files.read(path), [0]
    while any(data[ends[-1] : ends[-1] + 64]):
        seal = frame.check(data, ends[-1], number, ends[-1], 1 << 30)
        assert isinstance(seal, frame.Seal)
        ends.append(ends[-1] + seal.length)
    return ends


def reopened(files: Any, options: LogOptions = SMALL, *, writable: bool = False) -> dict[int, Any]:
    """`contents` of the log on `files`, and the log closed again."""
    log = Log.open(files, options, writable=writable)
    try:
        return contents(log)
    finally:
        log.close()
