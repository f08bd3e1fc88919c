"""Parts of a memtable in key order: bounds of any bytes, from either end, up to a limit; tombstones that are kept."""

from __future__ import annotations

import random
from collections.abc import Callable

import pyarrow as pa
import pytest
from reference import key_codec
from reference.memtable import INT_SCHEMA, int_keys, ints, rows_of
from reference.memtable import Memtable as Twin

from marble._core.memtable import Memtable
from marble.errors import UsageError

Row = dict[str, object]

TABLES: dict[str, tuple[pa.Schema, list[str], Callable[[random.Random], Row]]] = {
    "whole": (INT_SCHEMA, ["k"], lambda r: {"k": r.randrange(-300, 300), "v": r.randrange(9)}),
    "whole_but_short": (
        pa.schema([("v", pa.string()), ("k", pa.uint16())]),
        ["k"],
        lambda r: {"k": r.randrange(2**16) if r.random() < 0.5 else r.randrange(99), "v": "x" * r.randrange(3)},
    ),
    "text": (
        pa.schema([("s", pa.string()), ("v", pa.int64())]),
        ["s"],
        lambda r: {"s": "same start " * r.randrange(2) + "".join(r.choices("ab\0", k=r.randrange(9))), "v": 1},
    ),
    "text_and_number": (
        pa.schema([("s", pa.binary()), ("n", pa.int64()), ("v", pa.list_(pa.int8()))]),
        ["s", "n"],
        lambda r: {"s": r.choice([b"", b"\xff", b"long and common"]), "n": r.randrange(80), "v": [1, None]},
    ),
}


def any_bound(chance: random.Random, keys: list[bytes]) -> bytes | None:
    """A key, a part of one, one with something behind it, something else, or none."""
    if not keys or chance.random() < 0.15:
        return None
    key = chance.choice(keys)
    more = [key, key[: chance.randrange(len(key) + 1)], key + b"\0", key + b"\0" * 9, key + b"x", key[:-1] + b"\xff"]
    return chance.choice([*more, b"", b"\0", b"\xff", b"\xff" * 9, bytes(chance.randrange(256) for _ in range(3))])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", TABLES)
def test_any_part_in_any_direction_reads_as_the_dict_does(name: str, seed: int) -> None:
    schema, key, make_row = TABLES[name]
    chance = random.Random(seed)
    table, twin = Memtable(schema, key), Twin(schema, key)
    for index in range(1, 60):
        batch = pa.RecordBatch.from_pylist([make_row(chance) for _ in range(chance.choice([1, 3, 80]))], schema)
        if chance.random() < 0.25:
            table.delete(batch.select(key), index)
            twin.delete(batch.select(key), index)
        else:
            table.upsert(batch, index)
            twin.upsert(batch, index)
    snapshot = table.snapshot()
    keys = sorted(twin.rows)
    for _ in range(120):
        lower, upper = any_bound(chance, keys), any_bound(chance, keys)
        wanted = [k for k in keys if (lower is None or k >= lower) and (upper is None or k < upper)]
        reverse = chance.random() < 0.5
        limit = chance.choice([None, None, 0, 1, 5, 40, 10_000])
        if reverse:
            wanted.reverse()
        found = rows_of(
            snapshot,
            batch_rows_max=chance.choice([3, 50, 65536]),
            lower=lower,
            upper=upper,
            reverse=reverse,
            limit=limit,
        )
        assert found == [twin.rows[k] for k in wanted[:limit]]


def test_many_rows_in_reverse() -> None:
    table = Memtable(INT_SCHEMA, ["k"])
    for index, step in enumerate((1, 2, 3, 5, 7), 1):
        table.upsert(ints(range(0, 150_000, step), value=index), index)
    forward = pa.Table.from_batches(table.snapshot().scan())
    backward = pa.Table.from_batches(table.snapshot().scan(reverse=True))
    assert forward.num_rows == 150_000
    assert backward["k"].to_pylist() == forward["k"].to_pylist()[::-1]
    assert backward["v"].to_pylist() == forward["v"].to_pylist()[::-1]


def test_a_limit_reaches_behind_what_was_deleted() -> None:
    table = Memtable(INT_SCHEMA, ["k"])
    table.upsert(ints(range(100_000)), 1)
    table.delete(int_keys(range(40_000)), 2)
    table.delete(int_keys(range(41_000, 99_999)), 3)
    assert [row["k"] for row in rows_of(table.snapshot(), limit=1)] == [40_000]
    assert [row["k"] for row in rows_of(table.snapshot(), limit=2, reverse=True)] == [99_999, 40_999]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": -1}, "limit must be at least 0"),
        ({"lower": "a"}, "lower is an encoded key"),
        ({"upper": 3}, "upper is an encoded key"),
    ],
)
def test_wrong_parts_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Memtable(INT_SCHEMA, ["k"]).snapshot().scan(**options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TABLES)
def test_tombstones_that_are_kept_hide_as_well(name: str, seed: int) -> None:
    schema, key, make_row = TABLES[name]
    chance = random.Random(seed)
    table, twin = Memtable(schema, key, keep_tombstones=True), Twin(schema, key)
    for index in range(1, 150):
        batch = pa.RecordBatch.from_pylist([make_row(chance) for _ in range(chance.choice([1, 1, 2, 60]))], schema)
        if chance.random() < 0.5:
            distinct = len(set(key_codec.encode(batch.select(key))))
            assert table.delete(batch.select(key), index) == distinct
            twin.delete(batch.select(key), index)
        else:
            table.upsert(batch, index)
            twin.upsert(batch, index)
        if index % 10 == 0:
            snapshot = table.snapshot()
            assert snapshot.row_count == len(twin.rows)
            assert rows_of(snapshot) == twin.scan()
            assert snapshot.entry_count >= len(twin.rows)


def test_many_small_deletes_cost_little_memory() -> None:
    table = Memtable(INT_SCHEMA, ["k"], keep_tombstones=True)
    for index in range(1, 5001):
        table.delete(int_keys([index * 7919 % 5003]), index)
    assert table.snapshot().entry_count == 5000
    assert table.snapshot().nbytes < 5000 * 40
    assert table.snapshot().row_count == 0
    assert table.snapshot().bytes_about >= 5000 * 16
