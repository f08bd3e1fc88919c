"""Single rows of blocks that nobody has read: found and checked by parts, and the same as when the block is read whole."""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from core.test_memtable_types import VALUE_TYPES, column_of
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import key_codec
from reference.memtable import INT_SCHEMA, int_keys, ints
from reference.sstable import PART_BYTES, Parts, as_version_1, open_bytes, rows_of, write

from marble._core.lsm import Reader
from marble._core.sstable import SSTable
from marble.errors import CorruptionError

SCHEMA = pa.schema(
    [
        pa.field("v", pa.string()),
        pa.field("k", pa.binary(), False),
        pa.field("n", pa.int32()),
        pa.field("b", pa.bool_()),
    ]
)
NAMES = tuple(SCHEMA.names)
FLAT = [
    type_ for type_ in VALUE_TYPES if not (pa.types.is_null(type_) or pa.types.is_nested(type_) or "view" in str(type_))
]


def rows_batch(rows: int = 400) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(
        [
            {
                "v": None if n % 11 == 0 else f"välue {n} " * (n % 13),
                "k": b"key \0%06d" % (2 * n),
                "n": None if n % 5 == 1 else n,
                "b": n % 3 == 0,
            }
            for n in range(rows)
        ],
        SCHEMA,
    )


def a_file(rows: int = 400, **options: Any) -> bytes:
    return write([rows_batch(rows)], deleted=[[n % 7 == 3 for n in range(rows)]], **options)[0]


def get(table: SSTable, key: bytes) -> dict[str, object] | None:
    row = Reader([], [[table]]).get_row(NAMES, (key,))
    assert row is not False
    return row


def get_many(table: SSTable, keys: list[bytes], columns: list[str] | None = None) -> list[dict[str, object] | None]:
    rows, found = Reader([], [[table]]).get_many(pa.record_batch([pa.array(keys, pa.binary())], names=["k"]), columns)
    rows.validate(full=True)
    return [row if there.as_py() else None for row, there in zip(rows.to_pylist(), found, strict=True)]


def model(rows: int = 400) -> dict[bytes, dict[str, object]]:
    """By key what is there: all rows but the tombstones."""
    return {row["k"]: row for n, row in enumerate(rows_batch(rows).to_pylist()) if n % 7 != 3}


def test_the_index_has_checksums_of_parts_and_words_of_keys() -> None:
    batch = rows_batch(3000)
    data, info = write([batch.slice(0, 1234), batch.slice(1234)])
    assert info.block_count > 3
    parts = Parts(data)
    assert all(entry["step"] > 0 for entry in parts.entries)
    sums = parts.checksums()
    assert parts.part("parts") == struct.pack(f"<{len(sums)}I", *sums)
    assert len(sums) == sum(-(-entry["bytes"] // PART_BYTES) for entry in parts.entries)
    encoded, expected, first = key_codec.encode(batch.select(["k"])), [], 0
    for entry in parts.entries:
        keys = encoded[first : first + entry["rows"]]
        common = next(i for i in range(99) if keys[0][i] != keys[-1][i])
        expected += [key[common : common + 8].ljust(8, b"\0") for key in keys[:: entry["step"]]]
        first += entry["rows"]
    assert [struct.pack(">Q", word) for (word,) in struct.iter_unpack("<Q", parts.part("words"))] == expected


def test_they_cost_little_more_than_a_hundredth() -> None:
    for size in (8, 100, 1000):
        values = pa.array([random.Random(n).randbytes(size) for n in range(4000)])
        data, _ = write([pa.record_batch([pa.array(range(4000)), values], names=["k", "v"])])
        parts = Parts(data)
        assert 0 < parts.head["parts_bytes"] + parts.head["words_bytes"] < len(data) * 0.013


def test_blocks_that_gain_nothing_by_parts_have_none() -> None:
    nested = pa.schema([pa.field("k", pa.int64(), False), pa.field("v", pa.list_(pa.int8()))])
    batch = pa.record_batch(
        [pa.array(range(100)), pa.array([[n % 9] for n in range(100)], pa.list_(pa.int8()))], schema=nested
    )
    for data in (write([batch])[0], a_file(compression="lz4"), a_file(compression="zstd"), a_file(3)):
        assert Parts(data).head["parts_bytes"] == Parts(data).head["words_bytes"] == 0
        assert [entry["step"] for entry in Parts(data).entries] == [0] * Parts(data).head["blocks"]


def test_a_row_is_read_without_its_block() -> None:
    data = bytearray(a_file())
    (entry,) = Parts(bytes(data)).entries
    data[entry["offset"] + entry["bytes"] - 1600] ^= 1  # In the indexes of 400 rows, for which nobody asks.
    table = open_bytes(data, SCHEMA, ["k"])
    there = model()
    key = b"key \0%06d" % 200
    assert get(table, key) == there[key]
    assert get_many(table, [key]) == [there[key]]
    with pytest.raises(CorruptionError, match="block 0 is damaged"):
        rows_of(table)
    with pytest.raises(CorruptionError, match="block 0 is damaged"):
        table.verify()


@settings(deadline=None)
@given(st.data(), st.integers(1, 400), st.sampled_from([4, 9, 50, 4096]), st.sampled_from([400, 4000, 65536]))
def test_rows_are_the_same_alone_together_and_in_whole_blocks(
    data: st.DataObject, rows: int, block_rows_max: int, block_bytes_max: int
) -> None:
    file = a_file(rows, block_rows_max=block_rows_max, block_bytes_max=block_bytes_max)
    there = model(rows)
    asked = data.draw(st.lists(st.integers(-1, 2 * rows + 1).map(lambda n: b"key \0%06d" % n), min_size=1, max_size=40))
    for contents in (file, as_version_1(file)):
        alone, together = open_bytes(contents, SCHEMA, ["k"]), open_bytes(contents, SCHEMA, ["k"])
        expected = [there.get(key) for key in asked]
        assert [get(alone, key) for key in asked] == expected
        assert get_many(together, asked) == expected
        for key, row in zip(asked, expected, strict=True):
            assert get_many(together, [key], ["n", "v"]) == [row and {"n": row["n"], "v": row["v"]}]
        rows_of(alone)  # From here on blocks are in the cache.
        assert [get(alone, key) for key in asked] == expected
        assert get_many(alone, asked) == expected


def test_a_block_that_is_asked_often_is_read_whole() -> None:
    table = open_bytes(a_file(), SCHEMA, ["k"])
    reader, there = Reader([], [[table]]), model()
    for n in range(200):
        key = b"key \0%06d" % (n * 2)
        assert reader.get_row(NAMES, (key,)) == there.get(key)
    entry = Parts(a_file()).entries[0]
    wrong = bytearray(a_file())
    wrong[entry["offset"] + entry["bytes"] - 1] ^= 1  # Padding, which no row needs.
    table = open_bytes(wrong, SCHEMA, ["k"])
    asked = (get(table, b"key \0%06d" % (n * 2)) for n in range(200))
    with pytest.raises(CorruptionError, match="block 0 is damaged"):
        list(asked)


@pytest.mark.parametrize("type_", FLAT, ids=str)
def test_values_of_every_type_are_the_same_alone(type_: pa.DataType) -> None:
    schema = pa.schema([pa.field("v", type_), pa.field("k", pa.int64(), False)])
    column = column_of(type_, 300, random.Random(str(type_)))
    batch = pa.record_batch([column, pa.array(range(300))], schema=schema)
    data, _ = write([batch], block_rows_max=70)
    assert Parts(data).head["parts_bytes"] > 0
    whole = open_bytes(data, schema)
    rows_of(whole)
    for n, row in enumerate(batch.to_pylist()):
        alone = open_bytes(data, schema) if n % 7 == 0 else alone  # noqa: F821
        for table in (alone, whole):
            assert repr(Reader([], [[table]]).get_row(("v", "k"), (n,))) == repr(row)
    asked = [5, 299, 300, 130, 5, 131]
    rows, found = Reader([], [[open_bytes(data, schema)]]).get_many(int_keys(asked))
    rows.validate(full=True)
    assert found.to_pylist() == [True, True, False, True, True, True]
    given_rows = batch.to_pylist()
    assert repr(rows.column("v").to_pylist()) == repr([given_rows[n]["v"] if n < 300 else None for n in asked])


KEY_TYPES = [
    (pa.bool_(), [False, True]),
    (pa.int16(), range(-300, 300)),
    (pa.uint32(), range(0, 1 << 20, 1111)),
    (pa.float64(), [float("-inf"), -1.5, -0.0, 1e-300, 2.5, float("inf")]),
    (pa.float32(), [n / 4 for n in range(-40, 40)]),
    (pa.string(), sorted(f"{'é' * (n % 5)}\0{n:03}" for n in range(300))),
    (pa.large_binary(), sorted(b"\0" * (n % 4) + b"%d" % n for n in range(300))),
    (pa.binary(3), sorted(b"%03d" % n for n in range(300))),
    (pa.decimal32(9, 2), [Decimal(n) / 4 for n in range(-200, 200)]),
    (pa.decimal64(18, 2), [Decimal(n) / 4 for n in range(-200, 200)]),
    (pa.decimal128(9, 2), [Decimal(n) / 4 for n in range(-200, 200)]),
    (pa.decimal256(70, 2), [Decimal(n) / 4 for n in range(-200, 200)]),
    (pa.timestamp("us"), range(-(10**9), 10**9, 10**7 + 1)),
]


@pytest.mark.parametrize(
    ("type_", "values"), KEY_TYPES, ids=lambda each: str(each) if isinstance(each, pa.DataType) else ""
)
def test_keys_of_every_type_are_found_alone(type_: pa.DataType, values: Any) -> None:
    schema = pa.schema([pa.field("k", type_, False), pa.field("m", pa.int8(), False), pa.field("n", pa.int64())])
    columns = [
        pa.array([value for value in values for _ in range(3)]).cast(type_),
        pa.array([-1, 0, 7] * len(values), pa.int8()),
    ]
    batch = pa.record_batch([*columns, pa.array(range(len(columns[0])))], schema=schema)
    data, _ = write([batch], ["k", "m"], block_rows_max=50)
    absent = pa.record_batch([batch.column(0), pa.array([3] * batch.num_rows, pa.int8())], names=["k", "m"])
    table = open_bytes(data, schema, ["k", "m"])
    for n in range(0, batch.num_rows, 5):
        rows, found = Reader([], [[table]]).get_many(batch.select(["k", "m"]).slice(n, 1))
        assert found.to_pylist() == [True]
        assert rows.column("n").to_pylist() == [n]
        assert Reader([], [[table]]).get_many(absent.slice(n, 1))[1].to_pylist() == [False]


def test_every_flipped_byte_is_found_or_not_needed() -> None:
    data = a_file(40, block_rows_max=20)
    there, chance, refused, first = model(40), random.Random(5), 0, Parts(data).seal["header_bytes"]
    asked = [b"key \0%06d" % n for n in range(0, 80, 5)]
    for at in range(len(data)):
        wrong = bytearray(data)
        wrong[at] ^= 1 << chance.randrange(8)
        with pytest.raises(CorruptionError, match=r"x\.arrow, offset \d+"):
            open_bytes(wrong, SCHEMA, ["k"]).verify()
        if at < first or at >= Parts(data).seal["index"]:
            continue  # That it cannot be opened is shown elsewhere.
        table = open_bytes(wrong, SCHEMA, ["k"])
        for key in chance.sample(asked, 4):
            try:
                assert get(table, key) == there.get(key)
                assert get_many(table, [key]) == [there.get(key)]
            except CorruptionError as error:
                refused += error.path == "x.arrow"
    assert refused > 500


def each_front_number(parts: Parts) -> Iterator[int]:
    """Where each number of the front of a block's message lies, and each offset of its body."""
    entry = parts.entries[0]
    yield from range(entry["offset"] + 8, entry["offset"] + entry["bytes"] - 8, 4)


def test_lies_under_right_checksums_do_no_harm() -> None:
    data = a_file(60, block_rows_max=30)
    chance = random.Random(11)
    asked = [b"key \0%06d" % n for n in range(0, 120, 3)]
    found = 0
    for at in each_front_number(Parts(data)):
        parts = Parts(data)
        lie = chance.choice(
            [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\x01\0\0\0", b"\0\0\0\0", b"\x08\0\0\0"]
        )
        parts.data[at : at + 4] = lie
        table = open_bytes(parts.rebuild(), SCHEMA, ["k"])
        for key in chance.sample(asked, 3):
            for look in (
                lambda key=key, table=table: get(table, key),
                lambda key=key, table=table: get_many(table, [key]),
            ):
                try:
                    look()
                except CorruptionError:
                    found += 1
    assert found > 100


def break_text(parts: Parts) -> None:
    parts.data[parts.data.index("välue 2 ".encode()) + 1] = 0xFF


def swap_keys(parts: Parts) -> None:
    at = parts.data.index(b"key \x00000004")
    parts.data[at : at + 11], parts.data[at + 11 : at + 22] = parts.data[at + 11 : at + 22], parts.data[at : at + 11]


def falsify_words(parts: Parts) -> None:
    first = parts.head_at + parts.head["words_offset"]
    parts.data[first + 8 : first + parts.head["words_bytes"]] = b"\xff" * (parts.head["words_bytes"] - 8)


def falsify_sums(parts: Parts) -> None:
    """All but the one of the front: `rebuild` would mend them."""
    first = parts.head_at + parts.head["parts_offset"]
    parts.data[first + 8 : first + parts.head["parts_bytes"]] = bytes(parts.head["parts_bytes"] - 8)


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        (break_text, 2, "block 0 cannot be read: a text that is not UTF-8"),
        (swap_keys, 2, "keys of block 0 do not ascend"),
        (falsify_words, 200, "block 0 has other keys than the index says"),
        (falsify_sums, 200, "block 0 is damaged"),
    ],
)
def test_what_is_wrong_is_named(change: Callable[[Parts], None], key: int, words: str) -> None:
    parts = Parts(a_file())
    change(parts)
    wrong = parts.seal_again() if change is falsify_sums else parts.rebuild()
    if change is swap_keys:
        with pytest.raises(CorruptionError, match=words):
            open_bytes(wrong, SCHEMA, ["k"]).verify()
        return
    with pytest.raises(CorruptionError, match=words):
        get(open_bytes(wrong, SCHEMA, ["k"]), b"key \0%06d" % (2 * key))
    with pytest.raises(CorruptionError, match="block 0"):
        open_bytes(wrong, SCHEMA, ["k"]).verify()


@pytest.mark.parametrize(
    "changes",
    [{"step": 1}, {"step": -1}, {"step": 1 << 31}],
    ids=str,
)
def test_steps_of_another_index_are_found(changes: dict[str, int]) -> None:
    parts = Parts(a_file())
    for name, by in changes.items():
        parts.entries[0][name] += by
    with pytest.raises(CorruptionError):
        open_bytes(parts.rebuild(), SCHEMA, ["k"]).verify()


@pytest.mark.parametrize("name", ["parts_offset", "parts_bytes", "words_offset", "words_bytes"])
@pytest.mark.parametrize("by", [4, 8, 64, -8, 1 << 62])
def test_parts_of_another_place_are_found(name: str, by: int) -> None:
    parts = Parts(a_file())
    parts.head[name] = (parts.head[name] + by) % 2**64
    sealed = Parts(a_file())
    sealed.head_format.pack_into(sealed.data, sealed.head_at, *parts.head.values())
    with pytest.raises(CorruptionError):
        open_bytes(sealed.seal_again(), SCHEMA, ["k"]).verify()


def test_files_of_the_first_version_stay_readable() -> None:
    data = as_version_1(a_file())
    parts = Parts(data)
    assert parts.seal["version"] == 1
    assert "parts_offset" not in parts.head
    assert parts.rebuild() == data
    table, there = open_bytes(data, SCHEMA, ["k"]), model()
    table.verify()
    assert rows_of(table) == list(there.values())
    assert pa.ipc.open_file(pa.BufferReader(data)).read_all().num_rows == 400
    for n in (0, 3, 5, 798):
        assert get(table, b"key \0%06d" % n) == there.get(b"key \0%06d" % n)
    # An entry with steps is none of that version.
    parts.entries[0]["step"] = 3
    with pytest.raises(CorruptionError, match="parts of other blocks"):
        open_bytes(parts.rebuild(), SCHEMA, ["k"])


def test_threads_that_touch_the_same_rows_first_agree() -> None:
    data, there = a_file(3000), model(3000)
    keys = [b"key \0%06d" % n for n in range(0, 6000, 7)]
    for seed in range(3):
        table, wrong = open_bytes(data, SCHEMA, ["k"], cache_bytes=30_000), []
        start = threading.Barrier(4)

        def read(seed: int, table: SSTable = table, start: threading.Barrier = start, wrong: list[Any] = wrong) -> None:
            mine = keys.copy()
            random.Random(seed).shuffle(mine)
            start.wait(60)
            for i, key in enumerate(mine):
                row = get(table, key) if i % 3 else get_many(table, [key])[0]
                if row != there.get(key):
                    wrong.append((key, row))

        threads = [threading.Thread(target=read, args=(10 * seed + n,), name=f"marble-test-{n}") for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong


def test_what_is_in_memory_is_mapped_ahead(tmp_path: Any) -> None:
    data = write([ints(range(100_000))])[0]
    (tmp_path / "t.arrow").write_bytes(data)
    with pa.memory_map(str(tmp_path / "t.arrow")) as mapped:
        buffer = mapped.read_buffer()
    from marble._core.sstable import BlockCache

    table = SSTable.open(buffer, INT_SCHEMA, ["k"], BlockCache(0))
    assert 0 <= table.map_ahead(1 << 20) <= 1 << 20
    assert table.map_ahead(0) == 0
    assert table.map_ahead(1 << 62) <= len(data)
    assert Reader([], [[table]]).get_row(("k", "v"), (77,)) == {"k": 77, "v": 77}
