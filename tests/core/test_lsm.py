"""Reads over memtables and files, and what flush and compaction make of them, against a dict."""

from __future__ import annotations

import random

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from core.test_memtable_scan import TABLES, any_bound
from reference import key_codec
from reference.lsm import Tree, write_file
from reference.memtable import INT_SCHEMA, int_keys, ints, rows_of

from marble._core.lsm import Reader, Scan, VersionScan, conjuncts
from marble._core.memtable import Memtable
from marble._core.sstable import BlockCache, SSTable, SSTableWriter
from marble.errors import CorruptionError, UsageError


def grown(name: str, seed: int, steps: int = 90) -> Tree:
    schema, key, make_row = TABLES[name]
    tree = Tree(schema, key, random.Random(seed), block_rows_max=random.Random(seed).choice([1, 7, 4096]))
    for _ in range(steps):
        tree.step(make_row)
    return tree


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", TABLES)
def test_any_tree_reads_as_the_dict_does(name: str, seed: int) -> None:
    tree = grown(name, seed)
    _, _, make_row = TABLES[name]
    chance = tree.chance
    reader = tree.reader()
    assert reader.row_count == len(tree.rows.rows)
    assert rows_of(reader) == tree.rows.scan()
    keys = sorted(tree.rows.rows)
    for _ in range(60):
        lower, upper = any_bound(chance, keys), any_bound(chance, keys)
        reverse, limit = chance.random() < 0.5, chance.choice([None, None, 0, 1, 5, 40])
        wanted = [k for k in keys if (lower is None or k >= lower) and (upper is None or k < upper)]
        assert reader.count_rows(lower, upper) == len(wanted)
        if reverse:
            wanted.reverse()
        most = {"batch_rows_max": chance.choice([3, 50, 65536]), "batch_bytes_max": chance.choice([None, 1, 1000])}
        found = rows_of(reader, **most, lower=lower, upper=upper, reverse=reverse, limit=limit)
        assert found == [tree.rows.rows[k] for k in wanted[:limit]]
    asked = pa.RecordBatch.from_pylist([make_row(chance) for _ in range(200)], tree.schema).select(tree.key)
    rows, found = reader.get_many(asked)
    rows.validate(full=True)
    expected = tree.rows.get_many(asked)
    assert found.to_pylist() == [row is not None for row in expected]
    for key, row, wanted in zip(asked.to_pylist(), rows.to_pylist(), expected, strict=True):
        assert row == (wanted or dict.fromkeys(tree.schema.names) | key)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TABLES)
def test_versions_are_the_newest_of_each_key_tombstones_too(name: str, seed: int) -> None:
    """Flush and compaction lose no version that counts; a tombstone may go only where nothing is below it."""
    tree = grown(name, seed + 100)
    chance = tree.chance
    lower, upper = any_bound(chance, sorted(tree.versions)), any_bound(chance, sorted(tree.versions))
    for bounds in ((None, None), (lower, upper)):
        found = {}
        for batch, indexes, deleted in tree.reader().scan_versions(chance.choice([9, 65536]), *bounds):
            assert len(indexes) == len(deleted) == batch.num_rows
            assert batch.schema == tree.reader().get_schema
            keys = key_codec.encode(batch.select(tree.key))
            for key, index, gone, row in zip(
                keys, indexes.to_pylist(), deleted.to_pylist(), batch.to_pylist(), strict=True
            ):
                assert key not in found
                found[key] = (index, gone)
                values = {column: value for column, value in row.items() if column not in tree.key}
                assert tree.rows.rows.get(key) == (None if gone else row)
                assert not gone or set(values.values()) <= {None}
        low, high = bounds
        wanted = {k: v for k, v in tree.versions.items() if (low is None or k >= low) and (high is None or k < high)}
        assert list(found) == sorted(found)
        assert {k: v for k, v in wanted.items() if not v[1]}.items() <= found.items() <= wanted.items()
        assert [k for k, (_, gone) in found.items() if not gone] == [k for k in sorted(wanted) if not wanted[k][1]]


@pytest.mark.parametrize("name", ["whole", "text_and_number"])
def test_indexes_survive_that_small_writes_are_put_together(name: str) -> None:
    schema, key, make_row = TABLES[name]
    chance = random.Random(4)
    table = Memtable(schema, key, keep_tombstones=True)
    written: dict[bytes, tuple[int, bool]] = {}
    for index in range(10, 2000, 3):
        batch = pa.RecordBatch.from_pylist([make_row(chance)], schema)
        gone = chance.random() < 0.5
        if gone:
            table.delete(batch.select(key), index)
        else:
            table.upsert(batch, index)
        written[key_codec.encode(batch.select(key))[0]] = (index, gone)
    ((batch, indexes, deleted),) = Reader([table.snapshot()], []).scan_versions()
    found = zip(key_codec.encode(batch.select(key)), indexes.to_pylist(), deleted.to_pylist(), strict=True)
    assert {k: (index, gone) for k, index, gone in found} == written


@pytest.mark.parametrize("seed", range(3))
def test_a_tree_that_is_emptied_has_no_rows(seed: int) -> None:
    tree = grown("text", seed)
    everything = pa.RecordBatch.from_pylist(tree.rows.scan(), tree.schema)
    tree.write(everything, delete=True)
    for _ in range(3):
        assert rows_of(tree.reader()) == rows_of(tree.reader(), reverse=True, limit=1) == []
        assert tree.reader().row_count == 0
        tree.freeze()
        while tree.frozen:
            tree.flush()
        tree.compact()


def int_file(batch: pa.RecordBatch, index: int, cache: BlockCache, *, deleted: bool = False, rows: int = 100) -> object:
    count = batch.num_rows
    version = (batch, pa.array([index] * count, pa.uint64()), pa.array([deleted] * count))
    return write_file([version], INT_SCHEMA, ["k"], cache, block_rows_max=rows)


def test_the_newest_source_wins_whatever_its_index() -> None:
    """Order is that of the sources alone: two writes of one index are told apart by it."""
    cache = BlockCache(1 << 20)
    files = [[int_file(ints(range(10), value=value), 5, cache)] for value in (3, 2, 1)]
    table = Memtable(INT_SCHEMA, ["k"], keep_tombstones=True)
    table.upsert(ints([4], value=9), 5)
    reader = Reader([table.snapshot()], files)
    assert [row["v"] for row in rows_of(reader)] == [3, 3, 3, 3, 9, 3, 3, 3, 3, 3]
    rows, found = reader.get_many(int_keys([4, 5, 10]))
    assert (rows["v"].to_pylist(), found.to_pylist()) == ([9, 3, None], [True, True, False])


def test_a_block_that_cannot_match_still_hides_what_is_older() -> None:
    """Were the newer block left out for its small values, the old row would come back from the dead."""
    cache = BlockCache(1 << 20)
    old = int_file(ints(range(1000), value=100), 1, cache)
    new = int_file(ints(range(500, 600), value=1), 2, cache)
    gone = int_file(int_keys(range(600, 700)).append_column("v", pa.nulls(100, pa.int64())), 3, cache, deleted=True)
    asked: list[int] = []

    def above_50(zones: pa.RecordBatch) -> pa.BooleanArray:
        asked.append(zones.num_rows)
        return pc.greater(zones.column("v.max"), 50)

    reader = Reader([], [[gone], [new], [old]])
    for reverse in (False, True):
        found = [row["k"] for row in rows_of(reader, may_match=above_50, reverse=reverse) if row["v"] > 50]
        assert sorted(found) == [*range(500), *range(700, 1000)]
    assert asked == [1, 1, 10] * 2


def test_blocks_that_cannot_match_are_not_read() -> None:
    cache = BlockCache(1 << 20)
    file = int_file(ints(range(1000)), 1, cache)
    reader = Reader([], [[file]])
    found = rows_of(reader, may_match=lambda zones: pc.equal(zones.column("v.min"), 300))
    assert [row["k"] for row in found] == list(range(300, 400))
    assert (cache.misses, cache.block_count) == (1, 1)
    nothing = Reader([], [[file]]).scan(may_match=lambda zones: pa.array([None, *[False] * 9]))
    assert [row["k"] for row in nothing.__next__().to_pylist()] == list(range(100))


def test_a_zone_predicate_answers_for_each_block() -> None:
    reader = Reader([], [[int_file(ints(range(10)), 1, BlockCache(0))]])
    with pytest.raises(Exception, match="an answer for each block"):
        reader.scan(may_match=lambda zones: pa.array([], pa.bool_()))


def test_bounds_spare_blocks_and_files() -> None:
    cache = BlockCache(1 << 20)
    files = [int_file(ints(range(first, first + 1000)), 1, cache) for first in range(0, 10_000, 1000)]
    reader = Reader([], [files])
    lower, upper = key_codec.encode(int_keys([4950, 5050]))
    assert [row["k"] for row in rows_of(reader, lower=lower, upper=upper)] == list(range(4950, 5050))
    assert cache.misses == 2
    assert [row["k"] for row in rows_of(reader, lower=lower, upper=upper, reverse=True)] == list(range(5049, 4949, -1))
    assert [row["k"] for row in rows_of(reader, limit=3, reverse=True)] == [9999, 9998, 9997]
    assert cache.misses == 3


def test_a_scan_of_wide_rows_holds_few_blocks() -> None:
    """A scan gives its batches long before it has read all."""
    cache = BlockCache(0)
    schema = pa.schema([("k", pa.int64()), ("v", pa.binary())])
    count = 200
    batch = pa.RecordBatch.from_arrays([pa.array(range(count)), pa.array([bytes(1 << 20)] * count)], schema=schema)
    version = (batch, pa.array([1] * count, pa.uint64()), pa.array([False] * count))
    file = write_file([version], schema, ["k"], cache, compression="lz4")
    scan = Reader([], [[file]]).scan()
    sizes = [next(scan).num_rows]
    assert cache.misses < 80
    sizes += [part.num_rows for part in scan]
    assert sum(sizes) == count
    assert max(sizes) <= 80


def test_only_keys_are_looked_up_where_no_column_is_wanted() -> None:
    reader = Reader([], [[int_file(ints(range(10)), 1, BlockCache(0))]])
    rows, found = reader.get_many(int_keys([3, 11]), [])
    assert (rows.num_columns, rows.num_rows, found.to_pylist()) == (0, 2, [True, False])
    rows, _ = reader.get_many(int_keys([3, 11]), ["v"])
    assert rows.to_pydict() == {"v": [3, None]}
    with pytest.raises(UsageError, match="column 'x' is not in the table"):
        reader.get_many(int_keys([3]), ["x"])


def test_more_keys_than_are_looked_up_at_a_time() -> None:
    cache = BlockCache(1 << 20)
    reader = Reader([], [[int_file(ints(range(0, 20_000, 2)), 1, cache)]])
    keys = list(range(20_000))
    random.Random(3).shuffle(keys)
    rows, found = reader.get_many(int_keys(keys))
    assert rows["v"].to_pylist() == [None if key % 2 else key for key in keys]
    assert found.to_pylist() == [key % 2 == 0 for key in keys]


def test_a_scan_survives_its_reader_and_ends_when_closed() -> None:
    table = Memtable(INT_SCHEMA, ["k"], keep_tombstones=True)
    table.upsert(ints(range(100, 200)), 2)
    reader = Reader([table.snapshot()], [[int_file(ints(range(100)), 1, BlockCache(0), rows=10)]])
    scans = [reader.scan(10), reader.scan_versions(10), reader.scan(10)]
    del table, reader
    assert [row["k"] for row in next(scans[0]).to_pylist()] == list(range(10))
    assert sum(len(indexes) for _, indexes, _ in scans[1]) == 200
    for scan in scans[:2]:
        scan.close()
        assert list(scan) == []
        scan.close()
    assert sum(batch.num_rows for batch in scans[2]) == 200


def test_a_damaged_block_is_named_and_the_rest_can_be_read() -> None:
    cache = BlockCache(1 << 20)
    sound = int_file(ints(range(1000)), 1, cache)
    assert sound.info.block_count == 10
    data = bytearray(bytes(sound_bytes(ints(range(1000)))))
    at = data.find((555).to_bytes(8, "little"))
    data[at] ^= 1
    damaged = open_ints(bytes(data))
    reader = Reader([], [[damaged]])
    scan = reader.scan(50)
    found = []
    with pytest.raises(CorruptionError, match="some file"):
        found.extend(key for batch in scan for key in batch["k"].to_pylist())
    with pytest.raises(CorruptionError, match="some file"):
        next(scan)
    assert found == list(range(len(found)))
    assert 400 <= len(found) <= 500
    with pytest.raises(CorruptionError, match="some file"):
        reader.get_many(int_keys([550]))
    with pytest.raises(CorruptionError, match="some file"):
        reader.row_count  # noqa: B018
    assert reader.get_many(int_keys([3, 999]))[1].to_pylist() == [True, True]
    assert [row["k"] for row in rows_of(reader, lower=key_codec.encode(int_keys([600]))[0])] == list(range(600, 1000))


def test_a_merge_gives_no_damage_a_new_checksum() -> None:
    """A block that was sound when it was first read may have rotted since: only a merge makes that last."""
    data = bytearray(sound_bytes(ints(range(1000))))
    file = open_ints(data)
    reader = Reader([], [[file]])
    assert len(rows_of(reader)) == 1000
    data[data.find((555).to_bytes(8, "little"))] ^= 1
    scan = reader.scan_versions()
    with pytest.raises(CorruptionError, match="some file"):
        next(scan)
    with pytest.raises(CorruptionError, match="some file"):
        next(scan)


def test_a_merge_leaves_the_cache_as_it_was() -> None:
    cache = BlockCache(1 << 20)
    reader = Reader([], [[int_file(ints(range(1000)), 1, cache)]])
    assert sum(len(indexes) for _, indexes, _ in reader.scan_versions()) == 1000
    assert (cache.block_count, cache.misses) == (0, 0)


def sound_bytes(batch: pa.RecordBatch) -> bytes:
    writer = SSTableWriter(INT_SCHEMA, ["k"], block_rows_max=100)
    parts = writer.add(batch, pa.array([1] * batch.num_rows, pa.uint64()))
    return b"".join([*map(bytes, parts), bytes(writer.finish()[0])])


def open_ints(data: bytes | bytearray) -> object:
    return SSTable.open(pa.py_buffer(data), INT_SCHEMA, ["k"], BlockCache(1 << 20), "some file")


def test_wrong_readers_are_refused() -> None:
    cache = BlockCache(0)
    first, second = int_file(ints(range(10)), 1, cache), int_file(ints(range(9, 20)), 1, cache)
    other = Memtable(pa.schema([("k", pa.int64())]), ["k"]).snapshot()
    with pytest.raises(UsageError, match="at least one memtable or file"):
        Reader([], [[]])
    with pytest.raises(UsageError, match="overlap or are out of order"):
        Reader([], [[first, second]])
    with pytest.raises(UsageError, match="of different tables"):
        Reader([other], [[first]])
    with pytest.raises(UsageError, match="expected a Snapshot"):
        Reader([first], [])
    with pytest.raises(UsageError, match="expected an SSTable"):
        Reader([], [[other]])
    with pytest.raises(UsageError, match="limit must be"):
        Reader([], [[first]]).scan(limit=-1)


@pytest.mark.parametrize("class_", [Scan, VersionScan])
def test_scans_are_made_by_the_reader_only(class_: type) -> None:
    with pytest.raises(TypeError, match="comes from"):
        class_()


def test_a_reader_says_what_it_is() -> None:
    table = Memtable(INT_SCHEMA, ["k"])
    reader = Reader([table.snapshot()], [[], []])
    assert (reader.schema, reader.key_schema, reader.files) == (INT_SCHEMA, pa.schema([("k", pa.int64())]), ())
    assert reader.scan(columns=["v"]).schema.names == ["v"]
    assert len(reader.memtables) == 1


def test_files_stay_behind_other_memtables() -> None:
    cache = BlockCache(1 << 20)
    table = Memtable(INT_SCHEMA, ["k"], keep_tombstones=True)
    first = Reader([table.snapshot()], [[], [int_file(ints(range(5)), 1, cache)]])
    table.delete(int_keys([1, 3]), 2)
    second = first.with_memtables([table.snapshot()])
    assert [row["k"] for row in rows_of(second)] == [0, 2, 4]
    assert second.row_count == second.with_memtables(second.memtables).row_count == 3
    assert (first.row_count, second.files) == (5, first.files)
    assert second.with_memtables([]).row_count == 5
    with pytest.raises(UsageError, match="of different tables"):
        first.with_memtables([Memtable(pa.schema([("k", pa.int64())]), ["k"]).snapshot()])
    with pytest.raises(UsageError, match="expected a Snapshot"):
        first.with_memtables([first])


def test_conjuncts_are_found_in_any_order_and_depth() -> None:
    k, v, s = pc.field("k"), pc.field("v"), pc.field("s")
    filter_ = (k > 3) & ((pc.scalar(7) >= v) & ((s == "x") & (k < v))) & ((k == 1) | (v == 2)) & ~(v == 5)
    found = [(column, op, value.as_py()) for column, op, value in conjuncts(filter_)]
    assert found == [("k", ">", 3), ("v", "<=", 7), ("s", "==", "x")]
    found = conjuncts(k.isin([3, 4]) & pc.starts_with(s, "ab") & (v == pa.scalar(None, pa.int64())))
    assert [(column, op) for column, op, _ in found] == [("k", "in"), ("s", "starts_with")]
    assert found[0][2].to_pylist() == [3, 4]
    assert conjuncts(pc.starts_with(s, "ab", ignore_case=True)) == []
    assert conjuncts(pc.field("a", "b") == 3) == conjuncts(pc.scalar(True)) == []


def test_a_batch_has_about_so_many_bytes() -> None:
    """What a reader that is slow keeps in memory: from files and memtables alike, whether rows merge or not."""
    schema = pa.schema([pa.field("k", pa.int64()), pa.field("v", pa.binary())])
    cache, files = BlockCache(1 << 26), []
    batches = [
        pa.record_batch({"k": range(first, 6000, 3), "v": [bytes(500)] * len(range(first, 6000, 3))}, schema=schema)
        for first in range(3)
    ]
    for batch in batches[:2]:
        versions = batch, pa.array([1] * batch.num_rows, pa.uint64()), pa.array([False] * batch.num_rows)
        files.append([write_file([versions], schema, ["k"], cache, block_rows_max=300)])
    memtable = Memtable(schema, ["k"], keep_tombstones=True)
    memtable.upsert(batches[2], 2)
    reader = Reader([memtable.snapshot()], files)
    for most in (1, 600, 10_000, 200_000):
        found = list(reader.scan(batch_bytes_max=most))
        assert [k for batch in found for k in batch.column("k").to_pylist()] == list(range(6000))
        assert max(batch.nbytes for batch in found) <= max(most, 600)
        assert len(found) <= max(1, 2 * sum(batch.nbytes for batch in found) // most)
    with pytest.raises(UsageError, match="at least 1"):
        reader.scan(batch_bytes_max=0)
