"""Columns of every type that a table may have come back from the memtable as they went in."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest
from reference.memtable import int_keys

from marble._core.memtable import Memtable

VALUE_TYPES = [
    pa.null(),
    pa.bool_(),
    pa.int8(),
    pa.uint16(),
    pa.float16(),
    pa.int32(),
    pa.int64(),
    pa.decimal128(20, 2),
    pa.decimal256(50, 2),
    pa.month_day_nano_interval(),
    pa.timestamp("us", "UTC"),
    pa.binary(5),
    pa.binary(0),
    pa.string(),
    pa.large_string(),
    pa.binary(),
    pa.string_view(),
    pa.binary_view(),
    pa.list_(pa.field("element", pa.int32(), nullable=False)),
    pa.large_list(pa.string()),
    pa.list_(pa.float32(), 2),
    pa.list_view(pa.int8()),
    pa.map_(pa.string(), pa.int32()),
    pa.struct([pa.field("x", pa.int8(), nullable=False), pa.field("y", pa.list_(pa.struct([("z", pa.string())])))]),
    pa.dense_union([pa.field("i", pa.int32()), pa.field("s", pa.string())]),
    pa.sparse_union([pa.field("i", pa.int32()), pa.field("s", pa.string())]),
]


def value_of(type_: pa.DataType, chance: random.Random) -> object:
    """Make a Python value that pyarrow accepts for `type_`."""
    if chance.random() < 0.25 or pa.types.is_null(type_):
        return None
    if pa.types.is_boolean(type_):
        return chance.random() < 0.5
    if pa.types.is_fixed_size_binary(type_):
        return chance.randbytes(type_.byte_width)
    if pa.types.is_fixed_size_list(type_):
        return [1.5, None]
    if pa.types.is_map(type_):
        return [("a", 1), ("b", None)][: chance.randrange(3)]
    if pa.types.is_struct(type_):
        return {"x": chance.randrange(9), "y": chance.choice([None, [], [{"z": "q"}, None]])}
    if pa.types.is_nested(type_):
        item = "long enough for a buffer" if pa.types.is_string(type_.value_type) else 7
        return [item] * chance.randrange(4)
    if type_ == pa.month_day_nano_interval():
        return (chance.randrange(5), 2, 3)
    text = "x" * chance.randrange(30)
    if any(check(type_) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        return text
    if pa.types.is_binary(type_) or pa.types.is_binary_view(type_):
        return text.encode()
    return np.float16(chance.randrange(9)) if pa.types.is_float16(type_) else chance.randrange(100)


def column_of(type_: pa.DataType, count: int, chance: random.Random) -> pa.Array:
    if pa.types.is_union(type_):
        kinds = pa.array([chance.randrange(2) for _ in range(count)], pa.int8())
        children = [pa.array(range(count), pa.int32()), pa.array([str(i) for i in range(count)])]
        if type_.mode == "sparse":
            return pa.UnionArray.from_sparse(kinds, children, ["i", "s"])
        return pa.UnionArray.from_dense(kinds, pa.array(range(count), pa.int32()), children, ["i", "s"])
    return pa.array([value_of(type_, chance) for _ in range(count)], type_)


@pytest.mark.parametrize("pattern", ["scattered", "stretches", "one_stretch"])
@pytest.mark.parametrize("type_", VALUE_TYPES, ids=str)
def test_columns_of_every_type_come_back(type_: pa.DataType, pattern: str) -> None:
    chance = random.Random(str(type_) + pattern)
    schema = pa.schema([("k", pa.int64()), pa.field("v", type_)], metadata={"a": "b"})
    count = {"scattered": 60, "stretches": 200, "one_stretch": 60}[pattern]
    table = Memtable(schema, ["k"])
    parts = []
    for part in range(1 if pattern == "one_stretch" else 3):
        keys = list(range(part * count, part * count + count))
        if pattern == "scattered":
            keys = [key % count * 3 + part for key in keys]
            chance.shuffle(keys)
        batch = pa.RecordBatch.from_arrays([pa.array(keys), column_of(type_, count, chance)], schema=schema)
        batch = batch.slice(5)
        parts.append(batch)
        table.upsert(batch, part + 1)
    expected = sorted((row for part in parts for row in part.to_pylist()), key=lambda row: row["k"])
    snapshot = table.snapshot()
    scanned = pa.Table.from_batches(list(snapshot.scan()), snapshot.scan().schema)
    scanned.validate(full=True)
    assert scanned.schema.equals(schema, check_metadata=True)
    assert scanned.to_pylist() == expected
    by_key = {row["k"]: row for row in expected}
    asked = [-1, *chance.sample(list(by_key), 40), -2]
    rows, found = snapshot.get_many(int_keys(asked))
    rows.validate(full=True)
    assert rows.schema.equals(table.get_schema, check_metadata=True)
    assert rows.to_pylist() == [by_key.get(key, {"k": key, "v": None}) for key in asked]
    assert found.to_pylist() == [key >= 0 for key in asked]
