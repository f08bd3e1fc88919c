"""What the memtable keeps alive, for how long, and threads beside each other."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from reference.memtable import INT_SCHEMA, int_keys, ints, rows_of

from marble._core.memtable import Memtable


class Memory:
    """Batches over memory whose release can be seen."""

    def __init__(self) -> None:
        self.held = 0

    def batch(self, keys: Iterable[int]) -> pa.RecordBatch:
        array = np.array(list(keys), np.int64)
        self.held += 1
        weakref.finalize(array, self._release)
        buffer = pa.py_buffer(array)
        column = pa.Array.from_buffers(pa.int64(), len(array), [None, buffer])
        return pa.RecordBatch.from_arrays([column, column], schema=INT_SCHEMA)

    def _release(self) -> None:
        self.held -= 1


def test_a_batch_without_live_rows_is_let_go() -> None:
    memory = Memory()
    table = Memtable(INT_SCHEMA, ["k"])
    for index in range(1, 50):
        table.upsert(memory.batch(range(1000)), index)
    gc.collect()
    assert memory.held <= 2
    assert table.snapshot().row_count == 1000


LARGE = 100 * 1024 * 1024


@pytest.mark.parametrize("type_", [pa.int64(), pa.binary(), pa.list_(pa.int64())], ids=str)
def test_a_small_slice_pins_no_large_batch(type_: pa.DataType) -> None:
    """Ten rows of a batch of 100 MB: what the memtable keeps is counted by whole allocation, and is not 100 MB."""
    memory, count = Memory(), 1000
    keys = memory.batch(range(LARGE // 8)).column(0)
    values: pa.Array = keys
    if type_ != pa.int64():
        step = LARGE // count if type_ == pa.binary() else LARGE // 8 // count
        offsets = pa.array(range(0, (count + 1) * step, step), pa.int32())
        buffers = [None, offsets.buffers()[1]]
        if type_ == pa.binary():
            values = pa.Array.from_buffers(type_, count, [*buffers, keys.buffers()[1]])
        else:
            values = pa.Array.from_buffers(type_, count, buffers, children=[keys])
    schema = pa.schema([("k", pa.int64()), ("v", type_)])
    large = pa.RecordBatch.from_arrays([keys[: len(values)], values], schema=schema)
    wanted = large.slice(500, 10 if type_ == pa.int64() else 1)
    expected = wanted.to_pylist()
    table = Memtable(schema, ["k"])
    table.upsert(wanted, 1)
    del keys, values, large, wanted
    gc.collect()
    own = 1024 if type_ == pa.int64() else LARGE // count
    assert table.snapshot().nbytes < own + 16 * 1024
    assert memory.held == 0
    assert rows_of(table.snapshot()) == expected


def test_what_is_most_of_its_memory_is_shared() -> None:
    memory = Memory()
    table = Memtable(INT_SCHEMA, ["k"])
    table.upsert(memory.batch(range(100_000)).slice(0, 50_000), 1)
    table.upsert(memory.batch(range(10)), 2)
    gc.collect()
    assert memory.held == 2


def test_readers_keep_what_they_read_and_no_longer() -> None:
    memory = Memory()
    table = Memtable(INT_SCHEMA, ["k"])
    table.upsert(memory.batch(range(1000)), 1)
    old = table.snapshot()
    scan = old.scan(100)
    first = next(scan)
    table.upsert(memory.batch(range(1000)), 2)
    table.delete(int_keys(range(1000)), 3)
    assert table.snapshot().row_count == 0
    assert memory.held == 1
    assert old.row_count == 1000
    del old, table
    assert first["k"].to_pylist() == list(range(100))
    assert [row["k"] for batch in scan for row in batch.to_pylist()] == list(range(100, 1000))
    assert memory.held == 1
    del scan
    assert memory.held == 0
    assert first["k"].to_pylist() == list(range(100))


def test_slices_given_to_readers_hold_the_memory() -> None:
    memory = Memory()
    table = Memtable(INT_SCHEMA, ["k"])
    table.upsert(memory.batch(range(1000)), 1)
    whole = next(table.snapshot().scan())
    rows, _ = table.snapshot().get_many(int_keys(range(900)))
    del table
    assert memory.held == 1
    assert whole["v"].to_pylist() == list(range(1000))
    del whole
    assert rows["v"].to_pylist() == list(range(900))
    del rows
    assert memory.held == 0


def test_many_small_batches_become_few() -> None:
    memory = Memory()
    table = Memtable(INT_SCHEMA, ["k"])
    for index in range(1, 4097):
        table.upsert(memory.batch([index * 2039 % 4099]), index)
    assert memory.held < 200
    assert [row["v"] for row in rows_of(table.snapshot())] == sorted(index * 2039 % 4099 for index in range(1, 4097))


@pytest.mark.parametrize("key", [["k"], ["s", "k"]])
def test_batches_that_are_mostly_dead_are_rewritten(key: list[str]) -> None:
    schema = pa.schema([("k", pa.int64()), ("s", pa.string()), ("v", pa.binary(64))])
    table = Memtable(schema, key)

    def batch_of(keys: range) -> pa.RecordBatch:
        columns = [
            pa.array(keys, pa.int64()),
            pa.array(f"same start of {i}" for i in keys),
            pa.array([b"v" * 64] * len(keys), pa.binary(64)),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    # Of the first batch every 128th row stays.
    table.upsert(batch_of(range(20_000)), 1)
    full = table.snapshot().nbytes
    dead = pa.array(i % 128 != 0 for i in range(20_000))
    assert table.delete(batch_of(range(20_000)).filter(dead).select(key), 2) == 20_000 - 157
    snapshot = table.snapshot()
    assert sorted(row["k"] for row in rows_of(snapshot)) == list(range(0, 20_000, 128))
    assert snapshot.nbytes < full / 50


def test_nbytes_counts_a_shared_allocation_once() -> None:
    schema = INT_SCHEMA
    whole = ints(range(8000))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for start in range(0, 8000, 1000):
            writer.write_batch(whole.slice(start, 1000))
    message = sink.getvalue()
    table = Memtable(schema, ["k"])
    for index, batch in enumerate(pa.ipc.open_stream(message), 1):
        table.upsert(batch, index)
    assert message.size <= table.snapshot().nbytes < message.size + 8000 * 16 + 10_000


def test_readers_beside_a_writer_see_whole_writes_only() -> None:
    """Each write gives all keys the same value, so any snapshot, read in any way, holds one value."""
    table = Memtable(INT_SCHEMA, ["k"])
    keys = [*range(0, 3000, 3)]
    table.upsert(ints(keys, 1), 1)
    stop = threading.Event()
    seen: list[set[int]] = []
    errors: list[BaseException] = []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        last = 0
        values: set[int] = set()
        try:
            while not stop.is_set():
                snapshot = table.snapshot()
                assert snapshot.index >= last
                last = snapshot.index
                asked = chance.sample(keys, 50)
                rows, found = snapshot.get_many(int_keys(asked))
                got = set(rows["v"].to_pylist())
                scanned = pa.Table.from_batches(snapshot.scan(chance.choice([100, 5000])))
                assert scanned["k"].to_pylist() == keys
                assert got == set(scanned["v"].to_pylist()) == {last}
                assert pc.all(found).as_py()
                assert snapshot.row_count == len(keys)
                values |= got
            seen.append(values)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for index in range(2, 300):
        table.upsert(ints(reversed(keys), index), index)
    stop.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert errors == []
    assert len(seen) == 3


def test_threads_that_share_a_scan_get_each_row_once() -> None:
    table = Memtable(INT_SCHEMA, ["k"])
    for index in range(1, 30):
        table.upsert(ints(range(index, 60_000, 29)), index)
    scan = table.snapshot().scan(500)
    taken: list[list[int]] = [[], [], []]

    def take(mine: list[int]) -> None:
        for batch in scan:
            mine += batch["k"].to_pylist()

    threads = [threading.Thread(target=take, args=(mine,)) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(key for mine in taken for key in mine) == list(range(1, 60_000))


def test_writers_in_several_threads_take_turns() -> None:
    table = Memtable(INT_SCHEMA, ["k"])

    def write(start: int) -> None:
        for part in range(50):
            table.upsert(ints(range(start + part * 20, start + part * 20 + 20)), 1)

    threads = [threading.Thread(target=write, args=(start,)) for start in (0, 1000, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert [row["k"] for row in rows_of(table.snapshot())] == list(range(3000))
