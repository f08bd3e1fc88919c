"""Files of sorted rows: what was written is read, by key and in order, and by Arrow alone."""

from __future__ import annotations

import gc
import itertools
import math
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from core.test_memtable_types import VALUE_TYPES, column_of
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import key_codec
from reference.memtable import INT_SCHEMA, int_keys, ints
from reference.sstable import Parts, open_bytes, rows_of, write

from marble._core.sstable import BlockCache, SSTable, SSTableWriter
from marble.errors import UsageError

COMPRESSIONS = [None, "lz4", "zstd"]
TEXT_SCHEMA = pa.schema(
    [pa.field("n", pa.int32()), pa.field("a", pa.string(), False), pa.field("b", pa.int16(), False)]
)


def test_a_small_file_is_what_it_says() -> None:
    batch = ints([1, 2, 5, 9])
    data, info = write([batch], deleted=[[False, True, False, False]], first_index=7)
    assert (info.rows, info.tombstones, info.block_count, info.nbytes) == (4, 1, 1, len(data))
    assert (info.first_index, info.last_index) == (7, 10)
    assert (info.first_key, info.last_key) == tuple(key_codec.encode(int_keys([1, 9])))
    assert (info.ttl_min, info.ttl_max) == (None, None)
    table = open_bytes(data, INT_SCHEMA)
    assert table.info == info._replace(name="x.arrow")
    assert table.verify() == info.name
    assert rows_of(table) == [{"k": 1, "v": 1}, {"k": 5, "v": 5}, {"k": 9, "v": 9}]
    rows, found, indexes = table.get_many(int_keys([9, 2, 3, 1]))
    assert rows.to_pylist() == [{"k": 9, "v": 9}, {"k": 2, "v": None}, {"k": 3, "v": None}, {"k": 1, "v": 1}]
    assert found.to_pylist() == [True, False, False, True]
    assert indexes.to_pylist() == [10, 8, None, 7]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_arrow_alone_reads_a_file(compression: str | None, tmp_path: Path) -> None:
    batches = [ints(range(first, first + 1000), 3) for first in range(0, 10_000, 1000)]
    data, info = write(batches, compression=compression, block_rows_max=300)
    (tmp_path / "t.arrow").write_bytes(data)
    with pa.ipc.open_file(str(tmp_path / "t.arrow")) as file:
        assert file.num_record_batches == info.block_count == 34
        whole = file.read_all()
    whole.validate(full=True)
    assert whole.schema.names == ["k", "v", "_marble_index", "_marble_deleted"]
    assert whole.select(["k", "v"]) == pa.Table.from_batches(batches)
    assert whole["_marble_index"].to_pylist() == list(range(1, 10_001))
    assert not any(whole["_marble_deleted"].to_pylist())
    # Readers of streams find the same in it.
    assert pa.ipc.open_stream(data[8:]).read_all() == whole


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[tuple[str, int]], list[bool], random.Random]:
    keys = draw(st.sets(st.tuples(st.text("aé\x00b", max_size=5), st.integers(-3, 3)), min_size=1, max_size=40))
    keys = sorted(keys, key=lambda key: (key[0].encode(), key[1]))
    return keys, draw(st.lists(st.booleans(), min_size=len(keys), max_size=len(keys))), draw(st.randoms())


@settings(deadline=None)
@given(tables(), st.integers(1, 9), st.integers(1, 200), st.sampled_from(COMPRESSIONS), st.integers(0, 5000))
def test_a_file_is_a_dict(
    table: tuple[list[tuple[str, int]], list[bool], random.Random],
    block_rows_max: int,
    block_bytes_max: int,
    compression: str | None,
    cache_bytes: int,
) -> None:
    keys, deleted, chance = table
    rows = [{"n": i if i % 3 else None, "a": a, "b": b} for i, (a, b) in enumerate(keys)]
    batches, flags = [], []
    for first in range(0, len(rows), step := chance.randrange(1, len(rows) + 1)):
        batches.append(pa.RecordBatch.from_pylist(rows[first : first + step], TEXT_SCHEMA))
        flags.append(deleted[first : first + step])
    limits = {"block_rows_max": block_rows_max, "block_bytes_max": block_bytes_max, "compression": compression}
    data, info = write(batches, ["a", "b"], flags, **limits)
    assert info.rows == len(rows)
    assert info.tombstones == sum(deleted)
    file = open_bytes(data, TEXT_SCHEMA, ["a", "b"], cache_bytes)
    assert file.verify() == info.name
    encoded = key_codec.encode(pa.RecordBatch.from_pylist(rows, TEXT_SCHEMA).select(["a", "b"]))

    model = dict(zip(encoded, zip(rows, deleted, range(1, len(rows) + 1), strict=True), strict=True))
    asked = [*keys, ("aa", 9), ("", -9), ("zz", 0), *keys[::2]]
    chance.shuffle(asked)
    key_batch = pa.record_batch(
        [pa.array([a for a, _ in asked]), pa.array([b for _, b in asked], pa.int16())], names=["a", "b"]
    )
    got, found, indexes = file.get_many(key_batch)
    got.validate(full=True)
    known = [model.get(key) for key in key_codec.encode(key_batch)]
    assert found.to_pylist() == [each is not None and not each[1] for each in known]
    assert indexes.to_pylist() == [each and each[2] for each in known]
    assert got.column("n").to_pylist() == [each[0]["n"] if each and not each[1] else None for each in known]
    assert all(file.may_contain(key_batch).filter(pa.array([each is not None for each in known])).to_pylist())

    bounds = [None, b"", *encoded, *(key[: chance.randrange(len(key))] for key in encoded), b"\xff"]
    for _ in range(6):
        lower, upper = chance.choice(bounds), chance.choice(bounds)
        chosen = [
            ({**row, "n": None} if gone else row, gone, index)
            for key, (row, gone, index) in model.items()
            if (lower is None or key >= lower) and (upper is None or key < upper)
        ]
        assert rows_of(file, None, lower, upper) == [row for row, gone, _ in chosen if not gone]
        columns = chance.sample(TEXT_SCHEMA.names, chance.randrange(4))
        backwards = rows_of(file, columns, lower, upper, reverse=True, versions=True)
        assert backwards == [
            {**{name: row[name] for name in columns}, "_marble_index": index, "_marble_deleted": gone}
            for row, gone, index in reversed(chosen)
        ]


FILE_TYPES = [type_ for type_ in VALUE_TYPES if not pa.types.is_null(type_) and not pa.types.is_union(type_)]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("type_", FILE_TYPES, ids=str)
def test_columns_of_every_type_come_back(type_: pa.DataType, compression: str | None) -> None:
    chance = random.Random(f"{type_}{compression}")
    schema = pa.schema([pa.field("v", type_), pa.field("k", pa.int64(), False)])
    column = column_of(type_, 500, chance)
    batch = pa.record_batch([column, pa.array(range(500))], schema=schema)
    # Slices that do not begin with their buffers, and blocks of several of them.
    cuts = sorted({0, 500, *(chance.randrange(500) for _ in range(20))})
    pairs = list(itertools.pairwise(cuts))
    flags = [chance.random() < 0.3 for _ in range(500)]
    data, _ = write(
        [batch.slice(first, end - first) for first, end in pairs],
        deleted=[flags[first:end] for first, end in pairs],
        block_rows_max=70,
        compression=compression,
    )
    table = open_bytes(data, schema)
    assert table.schema == schema
    table.verify()
    expected = [row for row, gone in zip(batch.to_pylist(), flags, strict=True) if not gone]
    assert rows_of(table) == expected
    rows, _, _ = table.get_many(int_keys(range(500)))
    rows.validate(full=True)
    values = [None if gone else value for value, gone in zip(column.to_pylist(), flags, strict=True)]
    assert rows.column("v").to_pylist() == values
    assert pa.ipc.open_file(data).read_all()["v"].to_pylist() == values


@pytest.mark.parametrize(
    "type_",
    [
        *(pa.bool_(), pa.uint8(), pa.int16(), pa.float32(), pa.float64(), pa.decimal128(30, 3), pa.date64()),
        *(pa.time64("us"), pa.timestamp("ns", "UTC"), pa.binary(), pa.large_string(), pa.binary(9)),
    ],
    ids=str,
)
def test_keys_of_every_type_are_found(type_: pa.DataType) -> None:
    numbers = pa.array(range(2) if pa.types.is_boolean(type_) else range(120), pa.int64())
    if pa.types.is_date64(type_):
        numbers = pc.multiply(numbers, pa.scalar(86_400_000))
    elif not pa.types.is_primitive(type_) and not pa.types.is_decimal(type_):
        numbers = pa.array([f"{n:09}" for n in range(120)]).cast(pa.binary())
    every = numbers.cast(type_)
    keys, absent = (
        (every, every.slice(0, 0)) if len(every) == 2 else (every.take(pa.array(range(i, 120, 2))) for i in (0, 1))
    )
    schema = pa.schema([pa.field("k", type_, False)])
    data, _ = write([pa.record_batch([keys], schema=schema)], block_rows_max=7)
    table = open_bytes(data, schema)
    for asked, there in ((keys, True), (absent, False)):
        rows, found, _ = table.get_many(pa.record_batch([asked], schema=schema))
        assert found.to_pylist() == [there] * len(asked)
        assert rows.column("k") == asked
    assert pa.Table.from_batches(table.scan())["k"].combine_chunks() == keys


def test_long_keys_that_begin_alike_are_found() -> None:
    keys = [f"{'same' * 9}{n // 9:03}{'more' * 9}{n % 9}" for n in range(900)]
    schema = pa.schema([pa.field("k", pa.string(), False)])
    data, info = write([pa.record_batch([pa.array(keys)], schema=schema)], block_rows_max=10)
    assert info.block_count == 90
    table = open_bytes(data, schema)
    _, found, indexes = table.get_many(pa.record_batch([pa.array(keys[::-1])], schema=schema))
    assert found.true_count == 900
    assert indexes.to_pylist() == list(range(900, 0, -1))
    others = [key[:-1] for key in keys] + ["", "same", "zz", *(key + "!" for key in keys)]
    _, found, _ = table.get_many(pa.record_batch([pa.array(others)], schema=schema))
    assert found.true_count == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_end_before_their_limit_in_bytes(rows: int) -> None:
    schema = pa.schema([pa.field("k", pa.int64(), False), pa.field("s", pa.string())])
    # A row has 8 bytes of key, 4 of offset, 9 of ours with two bits over, and its text.
    texts = ["x" * 1000] * 9 + ["x" * 50_000] + ["x" * 1000] * 5
    batch = pa.record_batch([pa.array(range(15)), pa.array(texts)], schema=schema)
    data, info = write([batch.slice(at, rows) for at in range(0, 15, rows)], block_bytes_max=3100)
    assert [entry["rows"] for entry in Parts(data).entries] == [3, 3, 3, 1, 3, 2]
    assert info.block_count == 6


def test_the_ttl_column_has_a_range_if_every_row_has_a_time() -> None:
    schema = pa.schema([pa.field("k", pa.int64()), pa.field("t", pa.timestamp("us"))])
    batch = pa.record_batch([pa.array(range(4)), pa.array([50, -7, None, 90], pa.timestamp("us"))], schema=schema)
    for flags, expected in [
        ([False, False, True, False], (-7, 90)),
        ([False, False, True, True], (-7, 50)),
        ([False, False, False, False], (None, None)),
        ([True, True, True, True], (None, None)),
    ]:
        data, info = write([batch], deleted=[flags], ttl_column="t", block_rows_max=1)
        assert (info.ttl_min, info.ttl_max) == expected
        table = open_bytes(data, schema)
        assert table.info == info._replace(name="x.arrow")
    for type_, value in [(pa.int8(), -3), (pa.int16(), -300), (pa.date32(), -1), (pa.int64(), -(2**63))]:
        schema = pa.schema([pa.field("k", pa.int64()), pa.field("t", type_)])
        values = pa.array([value], pa.int32() if type_ == pa.date32() else type_).cast(type_)
        _, info = write([pa.record_batch([pa.array([1]), values], schema=schema)], ttl_column="t")
        assert (info.ttl_min, info.ttl_max) == (value, value)


def test_equal_rows_make_equal_files() -> None:
    one, info = write([ints(range(1000))])
    other, other_info = write([ints(range(first, first + 10)) for first in range(0, 1000, 10)])
    assert one == other
    assert info == other_info
    assert write([ints(range(1000), 7)])[1].name != info.name


def test_batches_outlive_the_file_and_its_cache(tmp_path: Path) -> None:
    data, _ = write([ints(range(10_000))], block_rows_max=100)
    (tmp_path / "t").write_bytes(data)
    with pa.memory_map(str(tmp_path / "t")) as mapped:
        buffer = mapped.read_buffer()
    cache = BlockCache(1 << 20)
    table = SSTable.open(buffer, INT_SCHEMA, ["k"], cache)
    scan = table.scan()
    rows, _, _ = table.get_many(int_keys([77]))
    first = next(scan)
    assert cache.block_count == 1
    del table, buffer
    gc.collect()
    assert sum(batch.num_rows for batch in scan) == 9900
    assert cache.block_count > 0
    del scan
    assert (cache.block_count, cache.nbytes) == (0, 0)
    (tmp_path / "t").unlink()
    assert first.to_pylist() == ints(range(100)).to_pylist()
    assert rows.to_pylist() == [{"k": 77, "v": 77}]


def test_rows_that_do_not_ascend_are_refused() -> None:
    for first, second in [([1, 2, 2], []), ([2, 1], []), ([1, 2], [2]), ([5], [4])]:
        writer = SSTableWriter(INT_SCHEMA, ["k"])
        numbers = pa.array([1, 1, 1], pa.uint64())
        if second:
            writer.add(ints(first), numbers.slice(0, len(first)))
        wrong = second or first
        with pytest.raises(UsageError, match="ascend"):
            writer.add(ints(wrong), numbers.slice(0, len(wrong)))
        with pytest.raises(UsageError, match="finished, or has failed"):
            writer.finish()


def test_wrong_calls_are_refused() -> None:
    batch, indexes = ints([1, 2]), pa.array([1, 2], pa.uint64())
    for names, options, words in [
        (["x"], {}, "key column 'x' is not a column"),
        ("k", {}, "sequence of column names"),
        (["k"], {"compression": "gzip"}, "unknown compression 'gzip'"),
        (["k"], {"block_rows_max": 0}, "at least one row"),
        (["k"], {"block_bytes_max": 0}, "at least one row and one byte"),
        (["k"], {"ttl_column": "x"}, "TTL column 'x' is no column"),
    ]:
        with pytest.raises(UsageError, match=words):
            SSTableWriter(INT_SCHEMA, names, **options)
    for field, words in [
        (pa.field("_marble_index", pa.int8()), "name that files"),
        (pa.field("x", pa.null()), "cannot store"),
        (pa.field("x", pa.dictionary(pa.int8(), pa.string())), "cannot store"),
    ]:
        with pytest.raises(UsageError, match=words):
            SSTableWriter(pa.schema([pa.field("k", pa.int8()), field]), ["k"])
    with pytest.raises(UsageError, match="use a signed integer"):
        SSTableWriter(pa.schema([pa.field("k", pa.int8()), pa.field("t", pa.float64())]), ["k"], ttl_column="t")
    for rows, numbers, flags, words in [
        (batch.select(["v", "k"]), indexes, None, "column 0 of the table"),
        (batch, indexes.slice(1), None, "one for each of the 2 rows"),
        (batch, indexes.cast(pa.int64()), None, "indexes are uint64"),
        (batch, pa.array([1, None], pa.uint64()), None, "indexes are uint64"),
        (batch, indexes, pa.array([True]), "deleted is bool"),
        (batch, indexes, pa.array([True, None]), "deleted is bool"),
        (batch, [1, 2], None, "indexes must be a pyarrow.Array"),
        (batch.to_pylist(), indexes, None, "expected a pyarrow.RecordBatch"),
        (pa.RecordBatch.from_pydict({"k": [1, None], "v": [1, 1]}, INT_SCHEMA), indexes, None, "null in row 1"),
    ]:
        with pytest.raises(UsageError, match=words):
            SSTableWriter(INT_SCHEMA, ["k"]).add(rows, numbers, flags)
    with pytest.raises(UsageError, match="at least one row"):
        SSTableWriter(INT_SCHEMA, ["k"]).finish()
    with pytest.raises(UsageError, match="NaN"):
        write([pa.record_batch([pa.array([math.nan])], names=["k"])])
    writer = SSTableWriter(INT_SCHEMA, ["k"])
    assert writer.add(batch.slice(0, 0), indexes.slice(0, 0)) == []
    writer.add(batch, indexes)
    writer.finish()
    with pytest.raises(UsageError, match="finished"):
        writer.add(ints([9]), pa.array([1], pa.uint64()))
    data, _ = write([batch])
    with pytest.raises(UsageError, match="at least 0"):
        BlockCache(-1)
    with pytest.raises(UsageError, match=r"pyarrow\.Buffer"):
        SSTable.open(data, INT_SCHEMA, ["k"], BlockCache(0))
    other = pa.schema([pa.field("k", pa.int64()), pa.field("w", pa.int64())])
    with pytest.raises(UsageError, match=r"x\.arrow holds other columns"):
        open_bytes(data, other)
    table = open_bytes(data, INT_SCHEMA)
    for columns, words in [(["x"], "'x' is not in the table"), (["k", "k"], "named twice"), ("k", "sequence of names")]:
        with pytest.raises(UsageError, match=words):
            table.scan(columns)
    with pytest.raises(UsageError, match="the key columns are 'k'"):
        table.get_many(ints([1]).select(["v"]))
    for each in (SSTable, type(table.scan())):
        with pytest.raises(TypeError):
            each()
