"""The memtable against a dict, and what it refuses."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from reference.memtable import INT_SCHEMA, int_keys, ints, rows_of
from reference.memtable import Memtable as Twin

from marble._core.memtable import Memtable, Scan, Snapshot
from marble.errors import InvariantError, UsageError

Row = dict[str, object]
MakeRow = Callable[[random.Random], Row]


def check_snapshot(snapshot: Snapshot, twin: Twin, keys: pa.RecordBatch) -> None:
    assert snapshot.index == twin.index
    rows, found = snapshot.get_many(keys)
    rows.validate(full=True)
    expected = twin.get_many(keys)
    assert rows.num_rows == keys.num_rows
    assert found.to_pylist() == [row is not None for row in expected]
    for key, row, wanted in zip(keys.to_pylist(), rows.to_pylist(), expected, strict=True):
        assert row == (wanted or dict.fromkeys(snapshot.schema.names) | key)
    assert rows_of(snapshot) == twin.scan()
    assert rows_of(snapshot, batch_rows_max=7) == twin.scan()
    assert snapshot.row_count == len(twin.rows)


STRUCT = pa.struct([("x", pa.int16()), ("y", pa.list_(pa.string()))])
TABLES: dict[str, tuple[pa.Schema, list[str], MakeRow]] = {
    "whole_key": (
        pa.schema([("v", pa.string()), ("k", pa.int32()), ("f", pa.float64()), ("b", pa.bool_())]),
        ["k"],
        lambda r: {
            "k": r.randrange(-400, 400),
            "v": r.choice([None, "", "é" * r.randrange(5)]),
            "f": 0.5,
            "b": r.choice([None, True]),
        },
    ),
    "two_columns_in_eight_bytes": (
        pa.schema([("a", pa.int16()), ("b", pa.bool_()), ("v", pa.large_binary())]),
        ["b", "a"],
        lambda r: {"a": r.randrange(-200, 200), "b": r.random() < 0.5, "v": bytes(r.randrange(4))},
    ),
    "fixed_key_beyond_eight_bytes": (
        pa.schema([("t", pa.int64()), ("n", pa.uint32()), ("v", pa.list_(pa.int32()))]),
        ["t", "n"],
        lambda r: {"t": r.randrange(3), "n": r.randrange(200), "v": r.choice([None, [], [1, None, r.randrange(9)]])},
    ),
    "strings_with_long_common_starts": (
        pa.schema([("s", pa.string()), ("k", pa.int64()), ("v", STRUCT)]),
        ["s", "k"],
        lambda r: {
            "s": r.choice(["", "\0", "a" * 8, "a" * 16, "a" * 70]) + r.choice(["", "\0", "b", "bc"]),
            "k": r.randrange(10),
            "v": r.choice([None, {"x": None, "y": ["p", None]}, {"x": 3, "y": None}]),
        },
    ),
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", TABLES)
def test_any_history_reads_as_the_dict_does(name: str, seed: int) -> None:
    schema, key, make_row = TABLES[name]
    chance = random.Random(seed)

    def batch_of(count: int) -> pa.RecordBatch:
        return pa.RecordBatch.from_pylist([make_row(chance) for _ in range(count)], schema)

    table, twin = Memtable(schema, key), Twin(schema, key)
    kept = []
    for index in range(1, 120):
        batch = batch_of(chance.choice([0, 1, 1, 2, 5, 50, 300]))
        cut = chance.randrange(batch.num_rows + 1) if chance.random() < 0.3 else 0
        batch = batch.slice(cut)
        if chance.random() < 0.3:
            assert table.delete(batch.select(key), index) == twin.delete(batch.select(key), index)
        else:
            assert table.upsert(batch, index) == twin.upsert(batch, index)
        if chance.random() < 0.1:
            kept.append((table.snapshot(), twin.copy()))
    kept.append((table.snapshot(), twin.copy()))
    chance.shuffle(kept)
    del table
    for snapshot, expected in kept:
        check_snapshot(snapshot, expected, batch_of(150).select(key))


@pytest.mark.parametrize("seed", range(4))
def test_keys_that_have_less_and_less_in_common(seed: int) -> None:
    """Runs skip what all keys begin with: it shrinks with the writes, and starts anew when the table was empty."""
    schema = pa.schema([("s", pa.string()), ("v", pa.int64())])
    chance = random.Random(seed)
    table, twin = Memtable(schema, ["s"]), Twin(schema, ["s"])
    whole = "".join(chance.choice("ab\0") for _ in range(60))
    index = 0
    for _ in range(3):
        for kept in sorted((chance.randrange(len(whole) + 1) for _ in range(12)), reverse=True):
            index += 1
            keys = [whole[:kept] + chance.choice(["", "a", "b", "ab" * 9, "\0"]) for _ in range(chance.randrange(1, 5))]
            batch = pa.RecordBatch.from_pydict({"s": keys, "v": [index] * len(keys)}, schema)
            table.upsert(batch, index)
            twin.upsert(batch, index)
            asked = pa.record_batch({"s": [*keys, "", whole, whole[:kept], whole[: kept // 2], "z", whole + "z"]})
            check_snapshot(table.snapshot(), twin, asked)
            if chance.random() < 0.3:
                index += 1
                assert table.delete(asked, index) == twin.delete(asked, index)
                check_snapshot(table.snapshot(), twin, asked)
        index += 1
        everything = pa.record_batch({"s": [row["s"] for row in twin.scan()]}, pa.schema([("s", pa.string())]))
        assert table.delete(everything, index) == twin.delete(everything, index)
        assert table.snapshot().run_count == 0


def test_a_large_table_stops_skipping_when_its_keys_keep_moving_apart() -> None:
    schema = pa.schema([("s", pa.string())])
    table = Memtable(schema, ["s"])
    start = "x" * 30
    expected = [f"{start}{i:06d}" for i in range(70_000)]
    table.upsert(pa.record_batch({"s": expected}), 1)
    for index in range(2, 30):
        extra = "x" * (31 - index) + "a"
        expected.append(extra)
        table.upsert(pa.record_batch({"s": [extra]}), index)
    assert [row["s"] for row in rows_of(table.snapshot())] == sorted(expected)
    _, found = table.snapshot().get_many(pa.record_batch({"s": [expected[5], expected[-1], "y", "", "x"]}))
    assert found.to_pylist() == [True, True, False, False, False]


def test_an_empty_table_has_no_rows() -> None:
    table = Memtable(INT_SCHEMA, ["k"])
    snapshot = table.snapshot()
    assert (snapshot.index, snapshot.row_count, snapshot.run_count, snapshot.nbytes) == (0, 0, 0, 0)
    check_snapshot(snapshot, Twin(INT_SCHEMA, ["k"]), int_keys([1, 2]))
    rows, found = snapshot.get_many(int_keys([]))
    assert (rows.num_rows, len(found)) == (0, 0)


def test_the_last_row_of_a_batch_wins() -> None:
    table = Memtable(INT_SCHEMA, ["k"])
    batch = pa.RecordBatch.from_pydict({"k": [i % 7 for i in range(300)], "v": list(range(300))}, INT_SCHEMA)
    assert table.upsert(batch, 1) == 300
    assert [row["v"] for row in rows_of(table.snapshot())] == [294, 295, 296, 297, 298, 299, 293]


def test_an_empty_write_moves_the_index_only() -> None:
    table = Memtable(INT_SCHEMA, ["k"])
    table.upsert(ints([1]), 3)
    assert table.upsert(ints([]), 4) == 0
    assert table.delete(int_keys([]), 5) == 0
    assert table.delete(int_keys([8]), 6) == 0
    snapshot = table.snapshot()
    assert (snapshot.index, snapshot.row_count, snapshot.run_count) == (6, 1, 1)


def test_deleting_counts_each_row_once() -> None:
    table = Memtable(INT_SCHEMA, ["k"])
    table.upsert(ints(range(10)), 1)
    assert table.delete(int_keys([3, 3, 4, 99]), 2) == 2
    assert table.delete(int_keys([3, 4, 5]), 3) == 1
    assert table.snapshot().row_count == 7
    assert table.delete(int_keys(range(100)), 4) == 7
    assert table.snapshot().row_count == 0


def test_a_table_emptied_by_deletes_keeps_no_runs() -> None:
    table = Memtable(INT_SCHEMA, ["k"])
    table.upsert(ints(range(500)), 1)
    table.delete(int_keys(range(500)), 2)
    assert (table.snapshot().run_count, table.snapshot().nbytes) == (0, 0)


def test_runs_grow_with_the_logarithm_of_the_writes() -> None:
    table = Memtable(INT_SCHEMA, ["k"])
    for index in range(1, 2000):
        table.upsert(ints([index * 7919 % 2003]), index)
    assert table.snapshot().run_count <= 12


def test_count_of_rows_survives_merges_in_any_order_of_asking() -> None:
    chance = random.Random(5)
    table, twin = Memtable(INT_SCHEMA, ["k"]), Twin(INT_SCHEMA, ["k"])
    for index in range(1, 400):
        batch = ints(chance.randrange(2000) for _ in range(chance.randrange(20)))
        if chance.random() < 0.4:
            table.delete(batch.select(["k"]), index)
            twin.delete(batch.select(["k"]), index)
        else:
            table.upsert(batch, index)
            twin.upsert(batch, index)
        if chance.random() < 0.2:
            assert table.snapshot().row_count == len(twin.rows)
    assert table.snapshot().row_count == len(twin.rows)


def test_wanted_columns_come_in_the_wanted_order() -> None:
    schema = pa.schema([("a", pa.int8()), ("k", pa.int64()), ("c", pa.string())])
    table = Memtable(schema, ["k"])
    table.upsert(pa.RecordBatch.from_pydict({"a": [1, 2], "k": [9, 8], "c": ["x", "y"]}, schema), 1)
    snapshot = table.snapshot()
    assert rows_of(snapshot, columns=["c", "a"]) == [{"c": "y", "a": 2}, {"c": "x", "a": 1}]
    assert snapshot.scan(columns=["c", "a"]).schema.names == ["c", "a"]
    nothing = list(snapshot.scan(columns=[]))
    assert [(batch.num_columns, batch.num_rows) for batch in nothing] == [(0, 2)]


def test_a_scan_that_ended_stays_ended() -> None:
    table = Memtable(INT_SCHEMA, ["k"])
    table.upsert(ints([1]), 1)
    scan = table.snapshot().scan()
    assert len(list(scan)) == 1
    assert list(scan) == []


def test_many_overlapping_runs_scan_in_blocks() -> None:
    table = Memtable(INT_SCHEMA, ["k"])
    chance = np.random.default_rng(11)
    expected: dict[int, int] = {}
    for index, size in enumerate([150_000, 40_000, 9_000, 2_000, 300, 50, 7], 1):
        keys = chance.integers(0, 400_000, size)
        table.upsert(
            pa.RecordBatch.from_arrays([pa.array(keys), pa.array([index] * size, pa.int64())], schema=INT_SCHEMA), index
        )
        expected.update(dict.fromkeys(keys.tolist(), index))
    snapshot = table.snapshot()
    assert snapshot.run_count == 7
    scanned = pa.Table.from_batches(snapshot.scan(50_000))
    keys = sorted(expected)
    assert scanned["k"].to_pylist() == keys
    assert scanned["v"].to_pylist() == [expected[key] for key in keys]
    assert snapshot.row_count == len(keys)


def test_long_rows_make_short_batches() -> None:
    schema = pa.schema([("k", pa.int64()), ("v", pa.binary())])
    table = Memtable(schema, ["k"])
    value = bytes(4 << 20)
    for index in range(1, 40):
        table.upsert(pa.RecordBatch.from_pydict({"k": [index], "v": [value]}, schema), index)
    sizes = [batch.nbytes for batch in table.snapshot().scan()]
    assert len(sizes) > 1
    assert max(sizes) < 80 << 20


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (pa.record_batch({"k": [1]}), "the table has 2 columns, the batch 1"),
        (pa.record_batch({"v": [1], "k": [1]}), "column 0 of the table is 'k'"),
        (
            pa.record_batch({"k": [1], "v": ["x"]}),
            "column 1 of the table is 'v' of type int64, of the batch 'v' of type string",
        ),
        (pa.record_batch([pa.array([1, None]), pa.array([1, 2])], names=["k", "v"]), "key column 'k' is null in row 1"),
        ({"k": [1], "v": [1]}, r"expected a pyarrow\.RecordBatch, got dict"),
    ],
)
def test_a_wrong_batch_is_refused_and_changes_nothing(batch: object, message: str) -> None:
    table = Memtable(INT_SCHEMA, ["k"])
    table.upsert(ints([5]), 1)
    with pytest.raises(UsageError, match=message):
        table.upsert(batch, 2)
    snapshot = table.snapshot()
    assert (snapshot.index, rows_of(snapshot)) == (1, [{"k": 5, "v": 5}])


def test_wrong_keys_are_refused() -> None:
    table = Memtable(INT_SCHEMA, ["k"])
    for keys in (ints([1]), pa.record_batch({"k": ["x"]}), pa.record_batch({"x": [1]}), None):
        with pytest.raises(UsageError):
            table.delete(keys, 1)
        with pytest.raises(UsageError):
            table.snapshot().get_many(keys)
    assert table.snapshot().index == 0


def test_an_index_that_goes_back_is_an_invariant_broken() -> None:
    table = Memtable(INT_SCHEMA, ["k"])
    table.upsert(ints([1]), 5)
    with pytest.raises(InvariantError, match="index 4 was to be applied after 5"):
        table.upsert(ints([2]), 4)
    with pytest.raises(InvariantError, match="index 4 was to be applied after 5"):
        table.delete(int_keys([1]), 4)
    assert table.upsert(ints([2]), 5) == 1


@pytest.mark.parametrize(
    ("schema", "key", "message"),
    [
        (INT_SCHEMA, [], "at least one column"),
        (INT_SCHEMA, ["x"], "key column 'x' is not a column"),
        (INT_SCHEMA, ["k", "k"], "key column 'k' is named twice"),
        (INT_SCHEMA, "k", "the key is a sequence of column names"),
        (INT_SCHEMA, [1], "the key is a sequence of column names"),
        (None, ["k"], r"expected a pyarrow\.Schema, got NoneType"),
        (pa.schema([("k", pa.list_(pa.int8()))]), ["k"], "cannot be a key"),
        (pa.schema([("k", pa.int8()), ("v", pa.int8()), ("v", pa.int8())]), ["k"], "column 'v' is there twice"),
        (pa.schema([("k", pa.int8()), ("v", pa.dictionary(pa.int8(), pa.string()))]), ["k"], "cannot store"),
        (pa.schema([("k", pa.int8()), ("v", pa.list_(pa.dictionary(pa.int8(), pa.string())))]), ["k"], "cannot store"),
        (pa.schema([("k", pa.int8()), ("v", pa.run_end_encoded(pa.int32(), pa.string()))]), ["k"], "cannot store"),
        (pa.schema([("k", pa.int8()), ("v", pa.uuid())]), ["k"], "cannot store"),
    ],
)
def test_wrong_tables_are_refused(schema: object, key: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Memtable(schema, key)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_rows_max": 0}, "at least 1"),
        ({"columns": ["x"]}, "column 'x' is not in the table"),
        ({"columns": ["v", "v"]}, "named twice"),
        ({"columns": "k"}, "sequence of names"),
    ],
)
def test_wrong_scans_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Memtable(INT_SCHEMA, ["k"]).snapshot().scan(**options)


@pytest.mark.parametrize("class_", [Snapshot, Scan])
def test_objects_are_made_by_the_memtable_only(class_: type) -> None:
    with pytest.raises(TypeError, match="comes from"):
        class_()
    with pytest.raises(TypeError, match="comes from"):
        class_.__new__(class_)


def test_the_table_says_what_it_is() -> None:
    schema = pa.schema([pa.field("v", pa.int64(), nullable=False), pa.field("k", pa.int64(), nullable=False)])
    table = Memtable(schema, ["k"])
    assert (table.schema, table.key, table.key_schema) == (schema, ("k",), pa.schema([schema.field("k")]))
    assert table.get_schema == pa.schema([pa.field("v", pa.int64()), schema.field("k")])
    assert table.snapshot().schema == schema
