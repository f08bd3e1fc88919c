"""One row by its key, between Python and Arrow without batches: the same as `get_many` says of it, or nothing at all."""

from __future__ import annotations

import datetime
import random
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from core.test_lsm import grown, open_ints, sound_bytes
from core.test_memtable_scan import TABLES
from reference.lsm import write_file
from reference.memtable import INT_SCHEMA, ints

from marble._core.lsm import Reader
from marble._core.memtable import Memtable
from marble._core.sstable import BlockCache
from marble.errors import CorruptionError, UsageError

VALUES: list[tuple[pa.DataType, list[Any]]] = [
    (pa.bool_(), [True, False]),
    (pa.int8(), [-128, 127]),
    (pa.int16(), [-(2**15), 2**15 - 1]),
    (pa.int32(), [-(2**31), 2**31 - 1]),
    (pa.int64(), [-(2**63), 2**63 - 1]),
    (pa.uint8(), [0, 255]),
    (pa.uint16(), [0, 2**16 - 1]),
    (pa.uint32(), [0, 2**32 - 1]),
    (pa.uint64(), [0, 2**64 - 1]),
    (pa.float16(), [0.5, -1.0]),
    (pa.float32(), [0.1, float("-inf")]),
    (pa.float64(), [0.1, -0.0]),
    (pa.string(), ["", "\0ü🙂", "plain"]),
    (pa.large_string(), ["", "\0ü🙂", "plain"]),
    (pa.binary(), [b"", b"\0\0\xff", b"x" * 20_000]),
    (pa.large_binary(), [b"", b"\0\0\xff", b"plain"]),
    (pa.binary(3), [b"\0\0\0", b"abc"]),
    (pa.date32(), [datetime.date(1970, 1, 1), datetime.date(2026, 11, 23)]),
    (pa.timestamp("us"), [datetime.datetime(1970, 1, 1), datetime.datetime(2026, 11, 23, 12)]),
    (pa.duration("ms"), [datetime.timedelta(0), datetime.timedelta(days=1)]),
    (pa.decimal128(9, 2), [Decimal("0.00"), Decimal("-12345.67")]),
    (pa.decimal32(9, 2), [Decimal("0.00"), Decimal("-12345.67")]),
    (pa.decimal64(18, 2), [Decimal("0.00"), Decimal("-12345.67")]),
    (pa.decimal256(70, 2), [Decimal("0.00"), Decimal("-12345.67")]),
    (pa.list_(pa.int8()), [[], [1, None]]),
    (pa.struct([("a", pa.int8())]), [{"a": 1}, {"a": None}]),
]
KEYS = [(type_, values) for type_, values in VALUES if not (pa.types.is_nested(type_) or type_ == pa.float16())]
SHORT_CUTS = (bool, int, str, bytes)
"""Types of key values that need no batch."""


def readers(schema: pa.Schema, key: list[str], batch: pa.RecordBatch) -> list[Reader]:
    """The same rows in a memtable, and in a file of blocks of three rows."""
    table = Memtable(schema, key, keep_tombstones=True)
    table.upsert(batch, 1)
    versions = list(Reader([table.snapshot()], []).scan_versions())
    file = write_file(versions, schema, key, BlockCache(1 << 20), block_rows_max=3)
    empty = Memtable(schema, key, keep_tombstones=True)
    return [Reader([table.snapshot()], []), Reader([empty.snapshot()], [[file]])]


@pytest.mark.parametrize(
    ("type_", "values"), VALUES, ids=lambda each: str(each) if isinstance(each, pa.DataType) else ""
)
def test_any_value_is_what_pyarrow_makes_of_it(type_: pa.DataType, values: list[Any]) -> None:
    schema = pa.schema([("v", type_), ("k", pa.int64()), ("b", pa.bool_())])
    chance = random.Random(3)
    given = [chance.choice([*values, None]) for _ in range(50)]
    rows = [{"v": value, "k": k, "b": chance.choice([True, False, None])} for k, value in enumerate(given)]
    batch = pa.RecordBatch.from_pylist(rows, schema).slice(13, 30)
    for reader in readers(schema, ["k"], batch):
        for row in batch.to_pylist():
            found = reader.get_row(("v", "k", "b"), (row["k"],))
            assert repr(found) == repr(row)
        assert reader.get_row(("v", "k", "b"), (99,)) is None


@pytest.mark.parametrize(("type_", "values"), KEYS, ids=lambda each: str(each) if isinstance(each, pa.DataType) else "")
def test_any_key_is_found_or_left_to_batches(type_: pa.DataType, values: list[Any]) -> None:
    schema = pa.schema([("k", type_), ("n", pa.int32()), ("v", pa.int8())])
    rows = [{"k": value, "n": n, "v": n} for value in values for n in (-7, 0, 3)]
    batch = pa.RecordBatch.from_pylist(rows, schema)
    for reader in readers(schema, ["k", "n"], batch):
        for row in rows:
            found = reader.get_row(("k", "n", "v"), (row["k"], row["n"]))
            if isinstance(row["k"], SHORT_CUTS):
                assert repr(found) == repr(row)
                assert reader.get_row(("k", "n", "v"), (row["k"], 4)) is None
            else:
                assert found is False


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (pa.int8(), 128),
        (pa.int8(), -129),
        (pa.int64(), 2**63),
        (pa.int64(), -(2**70)),
        (pa.int64(), True),
        (pa.int64(), 1.0),
        (pa.int64(), "1"),
        (pa.uint8(), -1),
        (pa.uint8(), 256),
        (pa.uint64(), 2**64),
        (pa.uint64(), -1),
        (pa.bool_(), 1),
        (pa.string(), b"x"),
        (pa.string(), "\ud800"),
        (pa.binary(), "x"),
        (pa.binary(), bytearray(b"x")),
        (pa.binary(3), b"xx"),
        (pa.int64(), None),
    ],
    ids=repr,
)
def test_what_is_not_exactly_of_the_columns_type_is_left_to_batches(type_: pa.DataType, value: object) -> None:
    schema = pa.schema([("k", type_)])
    reader = Reader([Memtable(schema, ["k"]).snapshot()], [])
    assert reader.get_row(("k",), (value,)) is False
    assert reader.get_row(("k",), (value, value)) is False
    assert reader.get_row(("k",), ()) is False


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", TABLES)
def test_any_tree_gives_the_rows_that_it_gives_in_batches(name: str, seed: int) -> None:
    tree = grown(name, seed)
    _, _, make_row = TABLES[name]
    reader, names = tree.reader(), tuple(tree.schema.names)
    asked = pa.RecordBatch.from_pylist([make_row(tree.chance) for _ in range(300)], tree.schema).select(tree.key)
    expected = tree.rows.get_many(asked)
    assert None in expected
    for key, wanted in zip(asked.to_pylist(), expected, strict=True):
        assert reader.get_row(names, tuple(key[column] for column in tree.key)) == wanted


def test_a_damaged_block_is_an_error_and_the_others_are_not() -> None:
    data = bytearray(sound_bytes(ints(range(1000))))
    data[data.find((555).to_bytes(8, "little"))] ^= 1
    reader = Reader([], [[open_ints(bytes(data))]])
    with pytest.raises(CorruptionError, match="some file"):
        reader.get_row(("k", "v"), (550,))
    assert reader.get_row(("k", "v"), (3,)) is not None


def test_names_are_those_of_all_columns() -> None:
    table = Memtable(INT_SCHEMA, ["k"])
    table.upsert(ints([1]), 1)
    with pytest.raises(UsageError, match="2 columns, got 1"):
        Reader([table.snapshot()], []).get_row(("k",), (1,))
