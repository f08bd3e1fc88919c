"""What is around the blocks of a file: filter, zone maps, cache."""

from __future__ import annotations

import math
import random
import threading

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import key_codec
from reference.memtable import INT_SCHEMA, int_keys, ints
from reference.sstable import Parts, bloom_has, open_bytes, rows_of, write

from marble._core.sstable import BlockCache, SSTable


def test_the_filter_knows_every_key_and_few_others() -> None:
    data, _ = write([ints(range(0, 40_000, 2))])
    table = open_bytes(data, INT_SCHEMA)
    assert table.may_contain(int_keys(range(0, 40_000, 2))).true_count == 20_000
    others = table.may_contain(int_keys(range(1, 40_000, 2)))
    assert others.true_count < 20_000 * 0.02
    bloom = Parts(data).part("bloom")
    assert len(bloom) == (20_000 * 10 + 511) // 512 * 64
    asked = int_keys(random.Random(1).choices(range(-9, 40_009), k=3000))
    expected = [bloom_has(bloom, key) for key in key_codec.encode(asked)]
    assert table.may_contain(asked).to_pylist() == expected


def test_keys_that_the_filter_rules_out_read_no_block() -> None:
    data, _ = write([ints(range(0, 2000, 2))], block_rows_max=50)
    cache = BlockCache(1 << 20)
    table = SSTable.open(pa.py_buffer(data), INT_SCHEMA, ["k"], cache)
    absent = int_keys(range(1, 2000, 2))
    ruled_out = absent.filter(pc.invert(table.may_contain(absent)))
    assert ruled_out.num_rows > 900
    for keys in (ruled_out, int_keys([-1, 1999, 5000])):
        assert table.get_many(keys)[1].true_count == 0
    assert (cache.hits, cache.misses) == (0, 0)


def test_each_block_has_the_range_of_its_values() -> None:
    chance = random.Random(5)
    columns = {
        "k": pa.array(range(100)),
        "u": pa.array([chance.choice([None, 0, 255]) for _ in range(100)], pa.uint8()),
        "f": pa.array([chance.uniform(-9, 9) for _ in range(100)]),
        "d": pa.array([chance.randrange(-9999, 9999) for _ in range(100)]).cast(pa.decimal128(22, 2)),
        "b": pa.array([n < 30 or n % 2 == 0 for n in range(100)]),
        "t": pa.array([chance.randrange(10**9) for _ in range(100)]).cast(pa.timestamp("us")),
        "s": pa.array([chance.choice([None, "", "b" * 31, "é"]) for _ in range(100)]),
        "y": pa.array([chance.randbytes(8) for _ in range(100)], pa.binary(8)),
        "z": pa.array([chance.randbytes(8) for _ in range(100)], pa.large_binary()),
    }
    batch = pa.record_batch(columns)
    data, info = write([batch.slice(first, 20) for first in range(0, 100, 20)], block_rows_max=25)
    zones = open_bytes(data, batch.schema).zone_maps()
    assert zones.num_rows == info.block_count == 4
    for i in range(4):
        rows = batch.slice(25 * i, 25)
        for name in columns:
            assert zones[f"{name}.nulls"][i].as_py() == rows[name].null_count
            assert {"min": zones[f"{name}.min"][i], "max": zones[f"{name}.max"][i]} == dict(
                pc.min_max(rows[name])
                if name != "y"
                else pc.min_max(rows[name].cast(pa.binary())).cast(
                    pa.struct([("min", pa.binary(8)), ("max", pa.binary(8))])
                )
            )


def test_where_nothing_is_known_there_is_no_range() -> None:
    schema = pa.schema([("k", pa.int64()), ("f", pa.float32()), ("s", pa.string()), ("l", pa.list_(pa.int8()))])
    rows = [
        {"k": 1, "f": 1.5, "s": "a", "l": [1]},
        {"k": 2, "f": math.nan, "s": None, "l": None},
        {"k": 3, "f": None, "s": None, "l": None},
        {"k": 4, "f": 2.5, "s": "gone", "l": None},
        {"k": 5, "f": 0.5, "s": "b", "l": [2]},
        {"k": 6, "f": -0.5, "s": None, "l": []},
    ]
    batch = pa.RecordBatch.from_pylist(rows, schema)
    data, _ = write([batch], deleted=[[False, False, False, True, False, False]], block_rows_max=2)
    zones = open_bytes(data, schema).zone_maps()
    assert zones.schema.names == [
        "k.nulls",
        "k.min",
        "k.max",
        "f.nulls",
        "f.min",
        "f.max",
        "s.nulls",
        "s.min",
        "s.max",
        "l.nulls",
    ]
    assert [(zone["f.min"], zone["f.max"], zone["f.nulls"]) for zone in zones.to_pylist()] == [
        *((None, None, 0), (None, None, 1), (-0.5, 0.5, 0))
    ]
    assert [(zone["s.min"], zone["s.max"], zone["s.nulls"]) for zone in zones.to_pylist()] == [
        *(("a", "a", 1), (None, None, 1), ("b", "b", 1))
    ]
    assert zones["l.nulls"].to_pylist() == [1, 1, 0]
    # A tombstone is no row, but its key says which rows it may hide.
    assert zones["k.max"].to_pylist() == [2, 4, 6]


LONG = st.text(st.sampled_from("a\x7f\u07ff\ud7ff\uffff\U0010ffff"), min_size=0, max_size=40)


@given(st.lists(st.tuples(LONG, LONG.map(str.encode) | st.binary(max_size=40)), min_size=1, max_size=8))
def test_cut_texts_stay_around_their_values(values: list[tuple[str, bytes]]) -> None:
    schema = pa.schema([("k", pa.int64()), ("s", pa.large_string()), ("b", pa.binary())])
    columns = [pa.array(range(len(values))), pa.array([s for s, _ in values], pa.large_string())]
    columns.append(pa.array([b for _, b in values], pa.binary()))
    data, _ = write([pa.record_batch(columns, schema=schema)])
    batch = open_bytes(data, schema).zone_maps()
    batch.validate(full=True)
    (zone,) = batch.to_pylist()
    for name, found in (("s", [s.encode() for s, _ in values]), ("b", [b for _, b in values])):
        low, high = zone[f"{name}.min"], zone[f"{name}.max"]
        if high is None:
            last = max(found)[:32]
            assert last in (b"\xff" * 32, "\U0010ffff".encode() * 8)
            assert low is None
            continue
        low, high = (each.encode() if isinstance(each, str) else each for each in (low, high))
        assert low <= min(found)
        assert max(found) <= high
        assert len(low) <= 32
        assert len(high) <= 33
        assert min(found).startswith(low)


def test_the_cache_keeps_within_its_bytes() -> None:
    data, _ = write([ints(range(10_000))], block_rows_max=100, compression="lz4")
    for bytes_max, all_fit in [(0, False), (8000, False), (20_000, False), (1 << 24, True)]:
        cache = BlockCache(bytes_max)
        table = SSTable.open(pa.py_buffer(data), INT_SCHEMA, ["k"], cache)
        for _ in range(2):
            for key in range(50, 10_000, 100):
                assert table.get_many(int_keys([key]))[1].to_pylist() == [True]
                assert cache.nbytes <= bytes_max
        assert cache.hits + cache.misses == 200
        assert (cache.hits == 100) == all_fit
        assert (cache.block_count > 0) == (bytes_max > 0)


def test_a_block_that_is_asked_for_outlives_a_scan() -> None:
    data, _ = write([ints(range(10_000))], block_rows_max=100)
    cache = BlockCache(40_000)
    table = SSTable.open(pa.py_buffer(data), INT_SCHEMA, ["k"], cache)
    for _ in range(3):
        table.get_many(int_keys([5]))
    before = cache.misses
    for batch in table.scan():
        table.get_many(int_keys([5]))
        assert batch.num_rows == 100
    assert cache.misses == before + 99


def test_the_cache_charges_what_a_block_holds() -> None:
    schema = pa.schema([pa.field("k", pa.int64()), pa.field("s", pa.string())])
    batch = pa.record_batch([pa.array(range(1000)), pa.array(["x" * 1000] * 1000)], schema=schema)
    charged = {}
    for compression in (None, "lz4"):
        cache = BlockCache(1 << 24)
        data, _ = write([batch], compression=compression)
        table = SSTable.open(pa.py_buffer(data), schema, ["k"], cache)
        assert len(rows_of(table)) == 1000
        charged[compression] = cache.nbytes
    assert charged[None] < 200_000
    assert 1_000_000 < charged["lz4"] < 1_500_000


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_threads_share_files_and_a_small_cache(compression: str | None) -> None:
    data, _ = write([ints(range(3000))], block_rows_max=100, compression=compression)
    cache = BlockCache(20_000)
    shared = SSTable.open(pa.py_buffer(data), INT_SCHEMA, ["k"], cache)
    wrong: list[object] = []
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        chance = random.Random(seed)
        start.wait()
        for _ in range(60):
            # Closing a file while others read frees Python's memory from under the cache.
            own = SSTable.open(pa.py_buffer(bytes(bytearray(data))), INT_SCHEMA, ["k"], cache)
            for table in (shared, own):
                asked = [chance.randrange(4000) for _ in range(30)]
                found = table.get_many(int_keys(asked))[1].to_pylist()
                if found != [key < 3000 for key in asked]:
                    wrong.append(asked)
            if sum(batch.num_rows for batch in own.scan()) != 3000:
                wrong.append(own)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    # All but the shared file's blocks are gone with their files.
    assert cache.nbytes <= 20_000
    assert cache.block_count <= shared.info.block_count
