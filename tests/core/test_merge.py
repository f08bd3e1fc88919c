"""Merges of sorted sources by the thousand rows: of any sizes, with keys in common and words that tie; how far they read."""

from __future__ import annotations

import random
from collections.abc import Callable

import pyarrow as pa
import pytest
from reference import key_codec
from reference.lsm import write_file
from reference.memtable import Memtable as Twin
from reference.memtable import rows_of

from marble._core.lsm import Reader
from marble._core.memtable import Memtable
from marble._core.sstable import BlockCache, SSTable, SSTableWriter
from marble.errors import CorruptionError

INTS = pa.schema([("k", pa.int64()), ("v", pa.int64())])
TEXTS = pa.schema([("k", pa.string()), ("v", pa.int64())])

# Of each: the schema, and the key that belongs to a number. Words tie where keys differ behind their first bytes only.
KEYS: dict[str, tuple[pa.Schema, Callable[[int], int | str]]] = {
    "numbers": (INTS, lambda n: n),
    "texts": (TEXTS, lambda n: f"common {n:06}"),
    "texts_of_many_lengths": (TEXTS, lambda n: f"common {n:x}"),
    "texts_that_tie": (TEXTS, lambda n: f"{n % 5} and then the same for long: {n:06}"),
    "texts_that_tie_in_groups": (TEXTS, lambda n: f"{n // 100:05}-------{n:06}"),
}


def any_batch(chance: random.Random, name: str, domain: int, index: int) -> pa.RecordBatch:
    """Rows drawn from some stretch of the first `domain` keys, few or many, all of the same value."""
    schema, key = KEYS[name]
    size = chance.choice([1, 2, 3, 40, 700, 2500])
    first, end = sorted(chance.choices(range(domain + 1), k=2))
    keys = [key(chance.randrange(first, max(first + 1, end))) for _ in range(size)]
    return pa.RecordBatch.from_pydict({"k": keys, "v": [index] * size}, schema)


def file_of(rows: list[dict[str, object]], schema: pa.Schema, cache: BlockCache, block_rows_max: int) -> SSTable:
    batch = pa.RecordBatch.from_pylist(rows, schema)
    indexes, deleted = pa.array([1] * len(rows), pa.uint64()), pa.array([False] * len(rows))
    return write_file([(batch, indexes, deleted)], schema, ["k"], cache, block_rows_max=block_rows_max)


def check_scans(reader: Memtable | Reader, twin: Twin, chance: random.Random) -> None:
    expected = twin.scan()
    assert rows_of(reader) == expected
    keys = sorted(twin.rows)
    for _ in range(6):
        lower, upper = sorted(chance.choices(keys, k=2))
        reverse, limit = chance.random() < 0.5, chance.choice([None, None, 1, 100, 3000])
        wanted = [key for key in keys if lower <= key < upper]
        if reverse:
            wanted.reverse()
        options = {"lower": lower, "upper": upper, "reverse": reverse, "limit": limit}
        assert rows_of(reader, batch_rows_max=chance.choice([100, 65536]), **options) == [
            twin.rows[key] for key in wanted[:limit]
        ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", KEYS)
def test_runs_of_any_sizes_merge_as_the_dict_does(name: str, seed: int) -> None:
    chance = random.Random(seed)
    schema, _ = KEYS[name]
    domain = chance.choice([50, 3000, 100_000])
    table, twin = Memtable(schema, ["k"]), Twin(schema, ["k"])
    for index in range(1, 25):
        batch = any_batch(chance, name, domain, index)
        if chance.random() < 0.2:
            table.delete(batch.select(["k"]), index)
            twin.delete(batch.select(["k"]), index)
        else:
            table.upsert(batch, index)
            twin.upsert(batch, index)
        assert table.snapshot().row_count == len(twin.rows)
    if twin.rows:
        check_scans(table.snapshot(), twin, chance)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", KEYS)
def test_files_of_any_sizes_merge_as_the_dict_does(name: str, seed: int) -> None:
    """Windows of several blocks, whose ends lie anywhere, beside a memtable whose words stand behind other bytes."""
    chance = random.Random(seed)
    schema, _ = KEYS[name]
    domain = chance.choice([3000, 100_000])
    cache = BlockCache(1 << 20)
    twin, levels = Twin(schema, ["k"]), []
    for index in range(1, 9):
        one = Twin(schema, ["k"])
        for _ in range(chance.choice([1, 5])):
            one.upsert(any_batch(chance, name, domain, index), index)
        levels.insert(0, [file_of(one.scan(), schema, cache, chance.choice([1, 30, 100, 4096]))])
        twin.rows.update(one.rows)
    memory = []
    if chance.random() < 0.5:
        table = Memtable(schema, ["k"], keep_tombstones=True)
        batch = any_batch(chance, name, domain, 9)
        table.upsert(batch, 9)
        twin.upsert(batch, 9)
        memory.append(table.snapshot())
    check_scans(Reader(memory, levels), twin, chance)


@pytest.mark.parametrize("type_", [pa.string(), pa.binary(), pa.large_string(), pa.large_binary()], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_texts_of_one_length_and_of_many_are_copied_alike(type_: pa.DataType, seed: int) -> None:
    """Batches whose texts have one length, none, lengths around those that are copied in another way, or nulls."""
    chance = random.Random(seed)
    schema = pa.schema([("k", pa.int64()), ("v", type_)])
    table, twin = Memtable(schema, ["k"]), Twin(schema, ["k"])
    for index in range(1, 30):
        lengths = chance.choice([[0], [1], [7], [24], [100], [300], [0, 1], range(40), range(250, 262), [5, 5, None]])
        rows = []
        for _ in range(chance.choice([1, 5, 200])):
            length = chance.choice(list(lengths))
            text = None if length is None else "".join(chance.choices("abcdefgh", k=length))
            binary = pa.types.is_binary(type_) or pa.types.is_large_binary(type_)
            rows.append({"k": chance.randrange(3000), "v": text.encode() if binary and text is not None else text})
        batch = pa.RecordBatch.from_pylist(rows, schema)
        batch = batch.slice(chance.randrange(batch.num_rows))
        table.upsert(batch, index)
        twin.upsert(batch, index)
    check_scans(table.snapshot(), twin, chance)
    # The same in a file, where rows of a block lie one behind the other.
    cache = BlockCache(1 << 20)
    files = [[file_of(twin.scan(), schema, cache, chance.choice([1, 50, 4096]))] for _ in range(2)]
    check_scans(Reader([], files), twin, chance)


def test_data_in_key_order_merges_by_the_stretch() -> None:
    """Each batch lies wholly behind the ones before it, or wholly before them."""
    for order in (range(20), reversed(range(20))):
        table = Memtable(INTS, ["k"])
        for index, part in enumerate(order, 1):
            keys = list(range(part * 1000, part * 1000 + 1000))
            table.upsert(pa.RecordBatch.from_pydict({"k": keys, "v": keys}, INTS), index)
        assert [row["k"] for row in rows_of(table.snapshot())] == list(range(20_000))


def test_a_limit_reads_no_blocks_ahead() -> None:
    cache = BlockCache(1 << 20)
    levels = [
        [file_of([{"k": k, "v": 0} for k in range(first, 8000, 8)], INTS, cache, block_rows_max=10)]
        for first in range(8)
    ]
    reader = Reader([], levels)
    assert [row["k"] for row in rows_of(reader, limit=3)] == [0, 1, 2]
    assert cache.misses == 8
    assert [row["k"] for row in rows_of(reader, limit=3, reverse=True)] == [7999, 7998, 7997]
    assert cache.misses == 16


def test_a_scan_of_narrow_rows_reads_a_part_of_them_for_a_batch() -> None:
    cache = BlockCache(0)
    levels = [
        [file_of([{"k": k, "v": 0} for k in range(first, 200_000, 4)], INTS, cache, block_rows_max=100)]
        for first in range(4)
    ]
    scan = Reader([], levels).scan(1000)
    for _ in range(10):
        assert next(scan).num_rows == 1000
    # A block of the merge and the windows behind it: each of 16,384 rows at most, and a block of a file for each lane.
    assert cache.misses <= 2 * 164 + 8


@pytest.mark.parametrize("reverse", [False, True])
def test_rows_before_a_damaged_block_are_given_out_first(reverse: bool) -> None:
    cache = BlockCache(1 << 20)
    rows = [{"k": k, "v": k} for k in range(0, 4000, 2)]
    file = file_of(rows, INTS, cache, block_rows_max=100)
    assert file.info.block_count == 20
    other = file_of([{"k": k, "v": k} for k in range(1, 4000, 2)], INTS, cache, block_rows_max=100)
    data = bytearray(bytes_of(rows))
    at = data.find((2222).to_bytes(8, "little"))
    data[at] ^= 1
    damaged = SSTable.open(pa.py_buffer(data), INTS, ["k"], BlockCache(1 << 20), "some file")
    for levels in ([[damaged], [other]], [[other], [damaged]]):
        scan = Reader([], levels).scan(50, reverse=reverse)
        found: list[int] = []
        for _ in range(2):
            with pytest.raises(CorruptionError, match="some file"):
                found.extend(key for batch in scan for key in batch["k"].to_pylist())
        # The block has the keys from 2200 to 2398.
        expected = list(range(3999, 2399, -1)) if reverse else list(range(2199))
        assert found == expected[: len(found)]
        assert len(found) >= len(expected) - 50 - 1
        # Who asks for less never hears of it.
        lower = key_codec.encode(pa.record_batch({"k": pa.array([2400])}))[0]
        assert [row["k"] for row in rows_of(Reader([], levels), lower=lower)] == list(range(2400, 4000))


def bytes_of(rows: list[dict[str, object]]) -> bytes:
    writer = SSTableWriter(INTS, ["k"], block_rows_max=100)
    parts = writer.add(pa.RecordBatch.from_pylist(rows, INTS), pa.array([1] * len(rows), pa.uint64()))
    return b"".join([*map(bytes, parts), bytes(writer.finish()[0])])
