"""What checking, encoding and applying rows costs, without Raft and disk. The floor is the memtable alone."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble._core.memtable import Memtable
from marble.lsm import payload
from marble.lsm.machine import TableMachine
from marble.rows import conform
from marble.schema import TableInfo, check_table
from marble.types import EntryKind

SCHEMA = pa.schema([("id", pa.int64()), ("a", pa.float64()), ("b", pa.string())])
TABLE = TableInfo(1, "t", *check_table("t", SCHEMA, ["id"]))
SHAPES = [(1, 1), (64, 1), (64, 1000)]
"""Entries of a run, and rows of an entry."""


def rows(count: int, base: int) -> pa.RecordBatch:
    ids = [(base + i) * 7919 % 1_000_003 for i in range(count)]
    return pa.RecordBatch.from_pydict({"id": ids, "a": [0.5] * count, "b": ["text"] * count}, SCHEMA)


@pytest.mark.parametrize("count", [1, 1000])
def test_conform_and_encode(benchmark: Any, count: int) -> None:
    batch = rows(count, 0)
    benchmark(lambda: payload.encode_rows(conform(batch, TABLE)))


@pytest.mark.parametrize(("entries", "count"), SHAPES)
def test_apply(benchmark: Any, entries: int, count: int) -> None:
    machine = TableMachine()
    create = Proposal(EntryKind.CREATE_TABLE, 0, payload.encode_create_table("t", SCHEMA, ["id"]))
    machine.apply(entry_batch.build(1, 1, 1, [create]))
    payloads = [payload.encode_rows(rows(count, i * count)) for i in range(entries)]

    def setup() -> tuple[tuple[pa.RecordBatch], dict[str, Any]]:
        proposals = [Proposal(EntryKind.WRITE, 1, each) for each in payloads]
        return (entry_batch.build(1, machine.applied_index + 1, 1, proposals),), {}

    benchmark.pedantic(machine.apply, setup=setup, rounds=50, warmup_rounds=2)
    assert machine.read("t").row_count == entries * count


@pytest.mark.parametrize(("entries", "count"), SHAPES)
def test_floor_memtable(benchmark: Any, entries: int, count: int) -> None:
    table = Memtable(SCHEMA, ["id"])
    batches = [rows(count, i * count) for i in range(entries)]
    index = 0

    def upsert() -> None:
        nonlocal index
        for batch in batches:
            index += 1
            table.upsert(batch, index)

    benchmark.pedantic(upsert, rounds=50, warmup_rounds=2)
