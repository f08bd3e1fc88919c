"""What a filter spares a scan, and that it spares nothing else: any filter over any tree gives what Arrow's own gives."""

from __future__ import annotations

import datetime
import decimal
import random
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from reference.lsm import Tree

from marble._core.memtable import Memtable
from marble.errors import UsageError
from marble.lsm.keyrange import NOTHING, KeyRange, between_range, encode_start, prefix_range
from marble.lsm.pushdown import push_down
from marble.lsm.view import TableView
from marble.schema import TableInfo

SCHEMA = pa.schema(
    [
        pa.field("s", pa.string(), nullable=False),
        pa.field("n", pa.int32(), nullable=False),
        pa.field("f", pa.float64()),
        pa.field("t", pa.timestamp("us", "UTC")),
        pa.field("d", pa.decimal128(9, 2)),
        pa.field("b", pa.binary()),
        pa.field("y", pa.bool_()),
        pa.field("l", pa.list_(pa.int8())),
    ]
)
INFO = TableInfo(1, "things", SCHEMA, ("s", "n"))
NOON = datetime.datetime(2025, 3, 1, 12, tzinfo=datetime.UTC)


def make_row(chance: random.Random) -> dict[str, object]:
    def or_null(value: object) -> object:
        return None if chance.random() < 0.1 else value

    return {
        "s": chance.choice(["", "a", "ab", "abc", "b\0", "é"]),
        "n": chance.randrange(-20, 20),
        "f": or_null(chance.choice([0.0, -0.0, 0.1, 2.5, float("nan"), float("inf"), chance.random()])),
        "t": or_null(NOON + datetime.timedelta(seconds=chance.randrange(100))),
        "d": or_null(decimal.Decimal(chance.randrange(-300, 300)) / 100),
        "b": or_null(bytes([chance.randrange(250, 256)]) * chance.choice([0, 1, 40])),
        "y": or_null(chance.random() < 0.5),
        "l": or_null([1]),
    }


def make_filter(chance: random.Random, depth: int = 0) -> pc.Expression:
    if depth < 3 and chance.random() < 0.6:
        left, right = make_filter(chance, depth + 1), make_filter(chance, depth + 1)
        return chance.choice([left & right, left & right, left & right, left | right, ~left])
    column = chance.choice(["s", "n", "n", "f", "t", "d", "b", "y", "s"])
    row = make_row(chance)
    value: object = row[column]
    if column == "n" and chance.random() < 0.4:
        value = chance.choice([2.5, -3.0, 2**40, pa.scalar(3, pa.int64()), pa.scalar(4, pa.uint8())])
    if column == "f" and chance.random() < 0.4:
        value = chance.choice([pa.scalar(0.1, pa.float32()), 0, 2])
    field = pc.field(column)
    if value is None:
        return field.is_null()
    if column in ("s", "b") and chance.random() < 0.3:
        return pc.starts_with(field, value if column == "s" else value[:1])
    if column in ("s", "n", "t") and chance.random() < 0.3:
        return field.isin(
            [each for each in (make_row(chance)[column] for _ in range(3)) if each is not None] or [value]
        )
    compare: list[Callable[[], pc.Expression]] = [
        lambda: field == value,
        lambda: field < value,
        lambda: field <= value,
        lambda: field > value,
        lambda: field >= value,
        lambda: field != value,
    ]
    return chance.choice(compare)()


def plain(rows: list[dict[str, object]]) -> list[str]:
    return [repr(row) for row in rows]  # NaN equals itself here.


@pytest.mark.parametrize("seed", range(8))
def test_any_filter_over_any_tree_gives_what_arrow_gives(seed: int) -> None:
    chance = random.Random(seed)
    tree = Tree(SCHEMA, list(INFO.key), chance, block_rows_max=chance.choice([1, 4, 30]))
    for _ in range(70):
        tree.step(make_row)
    view = TableView(tree.index, INFO, tree.reader())
    table = view.scan().read_all()
    assert plain(table.to_pylist()) == plain(tree.rows.scan())
    for _ in range(60):
        filter_ = make_filter(chance)
        try:
            expected = table.filter(filter_).to_pylist()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue  # Arrow itself cannot make sense of it.
        reverse, limit = chance.random() < 0.3, chance.choice([None, None, 0, 3, 50])
        found = view.scan(None, filter_, chance.choice([2, 65536]), reverse=reverse, limit=limit).read_all().to_pylist()
        assert plain(found) == plain((expected[::-1] if reverse else expected)[:limit]), filter_
        columns = chance.sample(SCHEMA.names, 2)
        some = view.scan(columns, filter_).read_all().to_pylist()
        assert plain(some) == plain([{name: row[name] for name in columns} for row in expected])


def test_what_a_filter_says_of_keys() -> None:
    s, n = pc.field("s"), pc.field("n")

    def keys(filter_: pc.Expression) -> KeyRange:
        return push_down(INFO, filter_)[0]

    def at(*values: object) -> bytes:
        return encode_start(INFO, values)

    one = prefix_range(INFO, ["a"])
    assert keys(s == "a") == one
    assert keys((s == "a") & (n >= 3)) == KeyRange(at("a", 3), one.upper)
    assert keys((n < 7) & (s == "a") & (n > 3)) == KeyRange(at("a", 4), at("a", 7))
    assert keys((s == "a") & (n == 3)) == KeyRange(at("a", 3), at("a", 4))
    assert keys((s == "a") & n.isin([9, 3, 5])) == KeyRange(at("a", 3), at("a", 10))
    assert keys((s == "a") & (n > 2**31 - 1)).is_empty
    assert keys((s == "a") & (n <= 2**31 - 1)) == one
    assert keys((s == "a") & (s == "b")).is_empty
    assert keys(n > 3) == KeyRange()
    assert keys(pc.starts_with(s, "ab")) == KeyRange(b"ab", b"ac")
    assert keys((s > "a") & (n == 3)) == KeyRange(one.upper, None)
    assert keys(n == 2.5) == keys((s == "a") | (s == "b")) == KeyRange()
    assert keys((s == "a") & (n < 2.5)) == one  # Arrow compares these as float64.


def test_a_filter_that_is_a_range_of_keys_is_known_for_one() -> None:
    s, n, f = pc.field("s"), pc.field("n"), pc.field("f")
    value = pa.scalar("a", pa.large_string())
    for filter_ in (
        s == "a",
        s > "a",
        pc.starts_with(s, "a"),
        (s >= "a") & (s < "b"),
        s == value,
        s == "é",
        (s == "a") & (n == 3),
    ):
        assert push_down(INFO, filter_).exact, filter_
    for filter_ in (
        n == 3,
        f > 0.0,
        s != "a",
        ~(s == "a"),
        s.isin(["a"]),
        s.is_valid(),
        (s > "a") & (n == 3),
        (s == "a") | (s == "b"),
        (s >= "a") & pc.field("y"),
        pc.starts_with(s, "a", ignore_case=True),
        pc.equal(pc.utf8_lower(s), "a"),
        pc.field(0) == "a",
    ):
        assert not push_down(INFO, filter_).exact, filter_
    numbers = TableInfo(2, "numbers", pa.schema([("x", pa.float64()), ("k", pa.int8())]), ("k",))
    assert push_down(numbers, pc.field("k") == pa.scalar(3, pa.int64())).exact
    assert not push_down(numbers, pc.field("k") < 2.5).exact
    assert not push_down(TableInfo(3, "floats", numbers.schema, ("x",)), pc.field("x") < 2.5).exact


@pytest.mark.parametrize("seed", range(4))
def test_what_is_a_range_of_keys_gives_what_arrow_gives(seed: int) -> None:
    chance = random.Random(seed)
    tree = Tree(SCHEMA, list(INFO.key), chance, block_rows_max=4)
    for _ in range(40):
        tree.step(make_row)
    view = TableView(tree.index, INFO, tree.reader())
    table, known = view.scan().read_all(), 0
    while known < 40:
        filter_ = make_filter(chance, chance.choice([2, 3]))
        if push_down(INFO, filter_).exact:
            known += 1
            assert plain(view.scan(None, filter_).read_all().to_pylist()) == plain(table.filter(filter_).to_pylist())


def test_a_filter_on_values_spares_blocks_and_one_on_keys_alone_asks_none() -> None:
    assert push_down(INFO, pc.field("s") == "a")[1] is None
    assert push_down(INFO, pc.field("y"))[1] is None
    may_match = push_down(INFO, (pc.field("f") > 2) & (pc.field("n") < 5)).may_match
    assert may_match is not None
    zones = pa.record_batch(
        {"f.min": [0.0, 0.0, 5.0], "f.max": [1.0, 9.0, None], "n.min": [1, 5, 9], "n.max": [9, 9, 9]}
    )
    assert may_match(zones).to_pylist() == [False, False, False]
    assert may_match(zones.set_column(2, "n.min", pa.array([1, 4, None]))).to_pylist() == [False, True, True]
    assert may_match(pa.record_batch({"x": [1, 2]})).to_pylist() == [True, True]


def test_ranges_of_keys() -> None:
    assert prefix_range(INFO, ["ab"], text=True) == KeyRange(b"ab", b"ac")
    assert prefix_range(INFO, ["ab"]) == KeyRange(b"ab\0\0", b"ab\0\1")
    assert between_range(INFO, ["a"], ["b", 5]) == KeyRange(b"a\0\0", b"b\0\0\x80\0\0\6")
    assert between_range(INFO, None, None) == KeyRange()
    assert between_range(INFO, [pa.scalar("b")], ["a"]).is_empty
    assert (KeyRange(b"a", b"d") & KeyRange(b"b", None) & KeyRange(b"", b"c")) == KeyRange(b"b", b"c")
    assert NOTHING.is_empty
    assert not KeyRange().is_empty
    for values, options in (
        ([], {}),
        (["a", 1, 2], {}),
        ([7], {}),
        ([None], {}),
        (["a", 2**40], {}),
        (["a", 1], {"text": True}),
    ):
        with pytest.raises(UsageError):
            encode_start(INFO, values, **options)


def test_a_view_of_memory_alone_takes_the_same_options() -> None:
    table = Memtable(SCHEMA, INFO.key)
    rows = [make_row(random.Random(i)) | {"s": "x", "n": i} for i in range(30)]
    table.upsert(pa.RecordBatch.from_pylist(rows, SCHEMA), 1)
    view = TableView(1, INFO, table.snapshot())
    keys = between_range(INFO, ["x", 5], ["x", 20])
    assert view.scan(["n"], keys=keys, reverse=True, limit=3).read_all()["n"].to_pylist() == [20, 19, 18]
    found = view.scan(["n"], pc.field("n") > 17, keys=keys, limit=2, batch_rows_max=1).read_all()
    assert found["n"].to_pylist() == [18, 19]
