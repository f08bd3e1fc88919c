"""Batches whose buffers lie at odd addresses, as those off a network do: every kernel that takes one reads the same of it.

Most processors would not mind if one read them as they are; UndefinedBehaviorSanitizer does (docs/testing.md).
"""

from __future__ import annotations

import datetime
import decimal

import pyarrow as pa
import pytest

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble._core.key_codec import KeyCodec
from marble._core.lsm import Reader
from marble._core.memtable import Memtable
from marble._core.sstable import BlockCache, SSTable, SSTableWriter
from marble.types import EntryKind

SCHEMA = pa.schema(
    [
        pa.field("a", pa.int64(), nullable=False),
        pa.field("b", pa.string(), nullable=False),
        pa.field("c", pa.decimal128(20, 3)),
        pa.field("d", pa.timestamp("us")),
        pa.field("e", pa.list_(pa.int32())),
        pa.field("f", pa.float64()),
    ]
)
KEY = ["a", "b"]
ROWS = 40


def odd(array: pa.Array) -> pa.Array:
    """The same values, each buffer one byte behind where it could be read as what it is."""
    if pa.types.is_list(array.type):
        return pa.ListArray.from_arrays(odd(array.offsets), odd(array.values), type=array.type)
    buffers = []
    for buffer in array.buffers():
        if buffer is None:
            buffers.append(None)
            continue
        place = pa.allocate_buffer(buffer.size + 64)
        at = 1 + -place.address % 8
        memoryview(place)[at : at + buffer.size] = memoryview(buffer)
        buffers.append(place.slice(at, buffer.size))
    return pa.Array.from_buffers(array.type, len(array), buffers)


def odd_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    moved = pa.RecordBatch.from_arrays([odd(column) for column in batch.columns], schema=batch.schema)
    assert any(b is not None and b.address % 8 for column in moved.columns for b in column.buffers())
    moved.validate(full=True)
    return moved


@pytest.fixture(scope="module")
def rows() -> pa.RecordBatch:
    return pa.record_batch(
        [
            pa.array(range(-5, ROWS - 5)),
            pa.array([f"key {n}" for n in range(ROWS)]),
            pa.array([decimal.Decimal(n) for n in range(ROWS)], pa.decimal128(20, 3)),
            pa.array([datetime.datetime(2026, 1, 1) + datetime.timedelta(n) for n in range(ROWS)], pa.timestamp("us")),
            pa.array([list(range(n % 4)) for n in range(ROWS)], pa.list_(pa.int32())),
            pa.array([n / 3 for n in range(ROWS)]),
        ],
        schema=SCHEMA,
    )


def test_keys(rows: pa.RecordBatch) -> None:
    keys = rows.select(KEY)
    codec = KeyCodec(keys.schema)
    assert codec.encode(odd_batch(keys)).to_pylist() == codec.encode(keys).to_pylist()


def test_rows_of_a_memtable_and_of_a_file(rows: pa.RecordBatch) -> None:
    table = Memtable(SCHEMA, KEY, keep_tombstones=True)
    table.upsert(odd_batch(rows), 1)
    (batch,) = table.snapshot().scan()
    assert pa.RecordBatch.from_arrays(batch.columns, schema=SCHEMA).equals(rows)
    writer = SSTableWriter(SCHEMA, KEY, ttl_column="d")
    indexes, deleted = pa.array([1] * ROWS, pa.uint64()), pa.array([False] * ROWS)
    parts = [*writer.add(odd_batch(rows), indexes, deleted), writer.finish()[0]]
    file = SSTable.open(pa.py_buffer(b"".join(bytes(part) for part in parts)), SCHEMA, KEY, BlockCache(0))
    for reader in (Reader([table.snapshot()], []), Reader([], [[file]])):
        found, there = reader.get_many(odd_batch(rows.select(KEY)))
        assert there.true_count == ROWS
        assert pa.RecordBatch.from_arrays(found.columns, schema=SCHEMA).equals(rows)
    table.delete(odd_batch(rows.select(KEY)), 2)
    assert table.snapshot().row_count == 0


def test_entries() -> None:
    data = entry_batch.encode_payload(pa.record_batch([pa.array([b"text"])], names=["command"]))
    entries = entry_batch.build(3, 7, 1, [Proposal(EntryKind.COMMAND, 0, data)] * 5, 9)
    moved = odd_batch(entries)
    entry_batch.verify(moved)
    assert entry_batch.payload(moved, 4).equals(data)
