"""Merge operators: each column by its rule, in order, the same however rows came together."""

from __future__ import annotations

import math
import random
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from marble.errors import UsageError
from marble.lsm import merge as merge_module
from marble.lsm.merge import first_places, merge
from marble.schema import _KEYS, TableInfo
from marble.table_options import TableOptions, check_options

Rows = list[dict[str, Any]]


def info(schema: pa.Schema, key: tuple[str, ...] = ("k",), **operators: str) -> TableInfo:
    merge_options = tuple((name, operators[name]) for name in schema.names if name in operators)
    return TableInfo(1, "t", schema, key, check_options("t", schema, key, TableOptions(merge=merge_options)))


def one(type_: pa.DataType, operator: str) -> TableInfo:
    return info(pa.schema([("k", pa.int64()), ("v", type_)]), v=operator)


def merged(table: TableInfo, there: Rows, written: Rows) -> Rows:
    """Rows after a write, by key."""
    left = merge(
        table, pa.RecordBatch.from_pylist(there, table.schema), pa.RecordBatch.from_pylist(written, table.schema)
    )
    left.validate(full=True)
    assert left.schema == table.schema
    return sorted(left.to_pylist(), key=lambda row: str(row[table.key[0]]))


def values(table: TableInfo, there: list[Any], written: list[Any]) -> Any:
    """What becomes of one value, or None, that is there, when several are written."""
    (row,) = merged(table, [{"k": 1, "v": each} for each in there], [{"k": 1, "v": each} for each in written])
    return row["v"]


@pytest.mark.parametrize(
    ("type_", "operator", "there", "written", "left"),
    [
        (pa.int8(), "sum", [100], [20, -1, None], 119),
        (pa.int64(), "sum", [2**62], [2**62 - 1, 2**62, -(2**62)], 2**63 - 1),
        (pa.uint64(), "sum", [2**63], [2**63 - 1], 2**64 - 1),
        (pa.int64(), "sum", [], [None, None], None),
        (pa.int64(), "sum", [None], [3], 3),
        (pa.float64(), "sum", [1e16], [1.0, 1.0, -1e16], 0.0),
        (pa.float32(), "sum", [0.5], [0.25], 0.75),
        (pa.decimal128(4, 1), "sum", [Decimal("999.8")], [Decimal("0.1")], Decimal("999.9")),
        (pa.decimal128(38, 0), "sum", [10**38 - 2], [1], 10**38 - 1),
        (pa.int64(), "min", [3], [5, None, 4], 3),
        (pa.string(), "max", ["b"], ["a", "ba"], "ba"),
        (pa.bool_(), "max", [False], [True, False], True),
        (pa.binary(2), "min", [b"ab"], [b"aa"], b"aa"),
        (pa.float64(), "min", [None], [math.nan, 2.0], 2.0),
        (pa.int64(), "count", [7], [None, 5, 0], 10),
        (pa.uint64(), "count", [], [1000], 1),
        (pa.list_(pa.string()), "append", [["a"]], [["b", None], None, []], ["a", "b", None]),
        (pa.list_(pa.string()), "append", [None], [None], None),
        (pa.list_(pa.int8()), "append", [None], [[]], []),
        (pa.large_list(pa.int8()), "append", [], [[1], [2, 3]], [1, 2, 3]),
        (pa.string(), "last", ["a"], ["b", None], "b"),
        (pa.string(), "last", ["a"], [None], "a"),
        (pa.list_(pa.int8()), "last", [[1]], [[2], None], [2]),
    ],
)
def test_a_value(type_: pa.DataType, operator: str, there: list[Any], written: list[Any], left: Any) -> None:
    assert values(one(type_, operator), there, written) == left


def test_durations_and_times() -> None:
    table = one(pa.duration("us"), "sum")
    columns = [pa.array([1], pa.int64()), pa.array([5], pa.duration("us"))]
    batch = pa.RecordBatch.from_arrays(columns, schema=table.schema)
    assert merge(table, batch, batch).column("v").view(pa.int64()).to_pylist() == [10]
    for operator, left in (("min", 3), ("max", 7)):
        for type_ in (pa.duration("s"), pa.timestamp("ns", "UTC"), pa.date64(), pa.time64("us")):
            unit = 86_400_000 if type_ == pa.date64() else 1
            two = pa.array([7 * unit, 3 * unit], pa.int64()).cast(type_)
            rows = pa.RecordBatch.from_arrays([pa.array([1, 1], pa.int64()), two], schema=one(type_, operator).schema)
            found = merge(one(type_, operator), rows.slice(0, 0), rows)
            assert found.column("v").cast(pa.int64()).to_pylist() == [left * unit]


def test_zeros_and_nans_have_one_form() -> None:
    least = values(one(pa.float64(), "min"), [0.0], [-0.0])
    assert math.copysign(1, least) == 1
    total = values(one(pa.float64(), "sum"), [math.inf], [-math.inf])
    assert math.isnan(total)
    assert math.copysign(1, total) == 1


@pytest.mark.parametrize(
    ("type_", "there", "written"),
    [
        (pa.int8(), [127], [1]),
        (pa.int64(), [2**63 - 1], [1]),
        (pa.int64(), [-(2**63)], [-1]),
        (pa.uint64(), [2**64 - 1], [1]),
        (pa.uint8(), [], [200, 100]),
        (pa.decimal128(4, 1), [Decimal("999.9")], [Decimal("0.1")]),
        (pa.decimal128(38, 0), [10**38 - 1], [1]),
    ],
)
def test_a_sum_that_does_not_fit_is_refused(type_: pa.DataType, there: list[Any], written: list[Any]) -> None:
    with pytest.raises(UsageError, match=r"table 't', column 'v': a sum is too large for"):
        values(one(type_, "sum"), there, written)


def test_lists_end_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    table = one(pa.list_(pa.string()), "append")
    monkeypatch.setattr(merge_module, "LIST_ITEMS_MAX", 3)
    assert values(table, [["a", "b"]], [["c"]]) == ["a", "b", "c"]
    with pytest.raises(UsageError, match="at most 3 items"):
        values(table, [["a", "b"]], [["c", "d"]])
    monkeypatch.setattr(merge_module, "MERGED_BYTES_MAX", 3)
    with pytest.raises(UsageError, match="4 bytes in lists"):
        values(table, [["aaa"]], [["c"]])


def test_columns_without_operator_are_replaced_by_the_last_row() -> None:
    nested = pa.struct([("x", pa.list_(pa.int8()))])
    table = info(pa.schema([("v", pa.int64()), ("k", pa.string()), ("plain", nested)]), v="sum")
    there = [{"k": "a", "v": 1, "plain": {"x": [1]}}]
    written = [
        {"k": "b", "v": 5, "plain": None},
        {"k": "a", "v": 2, "plain": None},
        {"k": "a", "v": 3, "plain": {"x": []}},
    ]
    assert merged(table, there, written) == [
        {"v": 6, "k": "a", "plain": {"x": []}},
        {"v": 5, "k": "b", "plain": None},
    ]


def test_keys_of_every_type_are_grouped() -> None:
    samples = [
        pa.array([True, False, True]),
        *(pa.array([1, 2, 1], type_) for type_ in (pa.int8(), pa.uint64(), pa.float32(), pa.decimal128(5, 2))),
        *(pa.array([1, 2, 1], pa.int32()).cast(type_) for type_ in (pa.date32(), pa.time32("s"))),
        *(pa.array([0, 86_400_000, 0]).cast(type_) for type_ in (pa.date64(), pa.time64("ns"), pa.duration("s"))),
        *(pa.array([1, 2, 1]).cast(pa.timestamp(unit, "UTC")) for unit in ("s", "ms", "us", "ns")),
        *(
            pa.array(["a", "", "a"], type_)
            for type_ in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
        ),
        pa.array([b"ab", b"cd", b"ab"], pa.binary(2)),
        pa.array([0.0, 1.0, -0.0]),
    ]
    assert all(any(accepts(column.type) for column in samples) for accepts in _KEYS)
    for column in samples:
        batch = pa.RecordBatch.from_arrays([pa.array([5, 5, 5]), column], names=["a", "b"])
        assert sorted(first_places(batch).to_pylist()) == [0, 1], column.type


def plainly(rows: dict[tuple[Any, ...], Any], row: dict[str, Any]) -> None:
    """The rules, one row at a time."""
    key = (row["k"], row["f"] + 0.0)
    old = rows.get(key)
    new = {**row, "n": 1}
    if old is not None:
        new["n"] = old["n"] + 1
        for name, combine in (("s", int.__add__), ("lo", min), ("hi", max), ("l", list.__add__)):
            both = [each for each in (old[name], row[name]) if each is not None]
            new[name] = combine(*both) if len(both) == 2 else both[0] if both else None
        new["z"] = old["z"] if row["z"] is None else row["z"]
    rows[key] = new


@pytest.mark.parametrize("seed", range(20))
def test_many_rows_as_one_by_one(seed: int) -> None:
    chance = random.Random(seed)
    types = {
        "f": pa.float64(),
        "k": pa.string(),
        "s": pa.int32(),
        "lo": pa.int64(),
        "hi": pa.string(),
        "n": pa.int64(),
        "l": pa.list_(pa.int64()),
        "z": pa.string(),
        "p": pa.int64(),
    }
    operators = {"s": "sum", "lo": "min", "hi": "max", "n": "count", "l": "append", "z": "last"}
    table = info(pa.schema(types), ("k", "f"), **operators)
    model: dict[tuple[Any, ...], Any] = {}
    state: Rows = []

    def some(value: Any) -> Any:
        return None if chance.random() < 0.3 else value

    for _ in range(6):
        batch = [
            {
                "f": chance.choice([0.0, -0.0, 1.5]),
                "k": chance.choice("abc"),
                "s": some(chance.randrange(-9, 9)),
                "lo": some(chance.randrange(99)),
                "hi": some(chance.choice(["", "x", "yy"])),
                "n": None,
                "l": some([chance.randrange(9) for _ in range(chance.randrange(3))]),
                "z": some(chance.choice("pq")),
                "p": some(chance.randrange(9)),
            }
            for _ in range(chance.choice([1, 2, 30]))
        ]
        touched = {(row["k"], row["f"] + 0.0) for row in batch}
        there = [row for row in state if (row["k"], row["f"] + 0.0) in touched]
        chance.shuffle(there)
        for row in batch:
            plainly(model, row)
        state = [row for row in state if row not in there] + merged(table, there, batch)
        assert {(row["k"], row["f"] + 0.0): row for row in state} == model
