"""What a user says of keys, order and moments: against a list of rows, on a state machine without Raft."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from reference.machine_backend import MachineBackend

from marble.database import Database, Table, Transaction
from marble.errors import UsageError
from marble.lsm.machine import TableMachine

SCHEMA = pa.schema([("city", pa.string()), ("at", pa.int32()), ("n", pa.int64()), ("v", pa.float64())])


@pytest.fixture
def db() -> Database:
    return Database(MachineBackend())


def trips(count: int, seed: int = 1) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    cities = ["", "a", "ab", "a\0", "b", "éa", "z"]
    keys = {(chance.choice(cities), chance.randrange(-30, 30)) for _ in range(count)}
    return [
        {"city": city, "at": at, "n": chance.randrange(9), "v": chance.choice([None, 0.5, -1.0])}
        for city, at in sorted(keys, key=lambda key: (key[0].encode(), key[1]))
    ]


@pytest.fixture
def table(db: Database) -> Table:
    made = db.create_table("trips", SCHEMA, ["city", "at"])
    made.write(pa.RecordBatch.from_pylist(trips(120), SCHEMA))
    return made


def found(table: Table, *arguments: Any, **options: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.scan(*arguments, **options).to_table().to_pylist()
    return rows


def test_prefix(table: Table) -> None:
    rows = trips(120)
    for city in ("", "a", "ab", "a\0", "éa", "nowhere"):
        assert found(table, prefix=city) == [row for row in rows if row["city"] == city]
    assert found(table, prefix=("a", rows[30]["at"])) == [
        row for row in rows if (row["city"], row["at"]) == ("a", rows[30]["at"])
    ]


def test_between(table: Table) -> None:
    rows = trips(120)
    assert found(table, between=("a", "b")) == [row for row in rows if "a" <= row["city"] <= "b"]
    assert found(table, between=(("a", 3), ("b", -3))) == [
        row for row in rows if ("a", 3) <= (row["city"], row["at"]) <= ("b", -3)
    ]
    assert found(table, between=(None, "a")) == [row for row in rows if row["city"] <= "a"]
    assert found(table, between=(("z", 5), None)) == [row for row in rows if (row["city"], row["at"]) >= ("z", 5)]
    assert found(table, between=("b", "a")) == []
    assert found(table, between=(None, None)) == rows


def test_between_behind_a_prefix(table: Table) -> None:
    rows = trips(120)
    for low, high in ((-5, 5), (None, 0), (0, None), (5, -5)):
        assert found(table, prefix="ab", between=(low, high)) == [
            row
            for row in rows
            if row["city"] == "ab" and (low is None or row["at"] >= low) and (high is None or row["at"] <= high)
        ]


def test_order_and_limit(table: Table) -> None:
    rows = trips(120)
    assert found(table, reverse=True) == rows[::-1]
    for limit in (0, 1, 7, 1000):
        assert found(table, limit=limit) == rows[:limit]
        assert found(table, ["n"], reverse=True, limit=limit) == [{"n": row["n"]} for row in rows[::-1][:limit]]
    odd = [row for row in rows if row["n"] % 2]
    assert found(table, filter=pc.field("n").isin([1, 3, 5, 7]), limit=3) == odd[:3]
    assert found(table, filter=pc.field("n").isin([1, 3, 5, 7]), limit=3, reverse=True) == odd[::-1][:3]


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"limit": 2}, {"reverse": True, "limit": 3}])
def test_a_filter_on_keys_within_other_bounds(table: Table, options: dict[str, Any]) -> None:
    rows, city, at = trips(120), pc.field("city"), pc.field("at")

    def expected(passes: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        passing = [row for row in rows if passes(row)]
        return passing[:: -1 if options.get("reverse") else 1][: options.get("limit")]

    starts = pc.starts_with(city, "a")
    assert found(table, None, starts, between=("ab", None), **options) == expected(
        lambda row: row["city"].startswith("a") and row["city"] >= "ab"
    )
    assert found(table, None, starts, between=(None, "a"), **options) == expected(
        lambda row: row["city"].startswith("a") and row["city"] <= "a"
    )
    assert found(table, None, starts, prefix="b", **options) == []
    assert found(table, None, starts & (pc.field("n") > 4), prefix="ab", **options) == expected(
        lambda row: row["city"] == "ab" and row["n"] > 4
    )
    assert found(table, None, (city == "a") & (at > 0), prefix="a", between=(None, 9), **options) == expected(
        lambda row: row["city"] == "a" and 0 < row["at"] <= 9
    )


def test_a_filter_means_the_keys_of_the_table_that_it_is_given_to(db: Database) -> None:
    text, number = pa.schema([("k", pa.string()), ("v", pa.int8())]), pa.schema([("k", pa.int8()), ("v", pa.string())])
    filters = [pc.field("k") <= "5", pc.field("v") == 5, pc.starts_with(pc.field("k"), "1")]
    for _ in range(2):
        made = db.create_table("changing", text, ["k"])
        made.write(pa.RecordBatch.from_pylist([{"k": str(i), "v": i} for i in range(12)], text))
        assert [[row["v"] for row in found(made, None, each)] for each in filters] == [
            [0, 1, 10, 11, 2, 3, 4, 5],
            [5],
            [1, 10, 11],
        ]
        db.drop_table("changing")
        made = db.create_table("changing", number, ["k"])
        made.write(pa.RecordBatch.from_pylist([{"k": i, "v": str(i)} for i in range(12)], number))
        assert [row["k"] for row in found(made, None, pc.field("k") <= 5)] == [0, 1, 2, 3, 4, 5]
        assert [row["k"] for row in found(made, None, pc.starts_with(pc.field("v"), "1"))] == [1, 10, 11]
        for each in filters:
            with pytest.raises(UsageError, match="does not fit"):
                made.scan(None, each)
        db.drop_table("changing")


FILTERS = [
    (pc.field("city") == "a", lambda row: row["city"] == "a"),
    (pc.field("city") > "a", lambda row: row["city"] > "a"),
    (pc.scalar("ab") >= pc.field("city"), lambda row: row["city"] <= "ab"),
    (
        (pc.field("city") == "b") & (pc.field("at") < 3) & (pc.field("at") >= -7),
        lambda row: row["city"] == "b" and -7 <= row["at"] < 3,
    ),
    (pc.field("city").isin(["a", "z", "q"]), lambda row: row["city"] in "azq" and row["city"]),
    (pc.starts_with(pc.field("city"), "a"), lambda row: row["city"].startswith("a")),
    ((pc.field("city") == "a") | (pc.field("n") == 3), lambda row: row["city"] == "a" or row["n"] == 3),
    (~(pc.field("city") == "a"), lambda row: row["city"] != "a"),
    ((pc.field("city") == "a") & (pc.field("city") == "b"), lambda row: False),
    ((pc.field("city") == "ab") & (pc.field("at") > 2.5), lambda row: row["city"] == "ab" and row["at"] > 2.5),
    ((pc.field("city") == "ab") & (pc.field("at") > 10**12), lambda row: False),
    ((pc.field("city") == "ab") & (pc.field("at") < 10**12), lambda row: row["city"] == "ab"),
    (pc.field("at") == 3, lambda row: row["at"] == 3),
    ((pc.field("city") <= "b") & (pc.field("v") > 0), lambda row: row["city"] <= "b" and (row["v"] or 0) > 0),
]


@pytest.mark.parametrize(("expression", "fits"), FILTERS)
def test_filters_give_what_they_say(table: Table, expression: pc.Expression, fits: Any) -> None:
    rows = [row for row in trips(120) if fits(row)]
    assert found(table, filter=expression) == rows
    assert found(table, filter=expression, reverse=True, limit=4) == rows[::-1][:4]
    inside = [row for row in rows if "a" <= row["city"] <= "b"]
    assert found(table, filter=expression, between=("a", "b")) == inside


@pytest.mark.parametrize(
    ("keys", "expression"),
    [
        (pa.array([2**24 - 1, 2**24]), pc.field("k") >= float(2**24)),
        (pa.array([1, 2, 3]), pc.field("k") > 1.5),
        (pa.array([0.1, 0.5], pa.float32()), pc.field("k") > 0.1),
        (pa.array([0.1, 0.5], pa.float32()), pc.field("k") == 0.1),
        (pa.array([0.1, 0.5], pa.float32()), pc.field("k") <= 0.5),
        (pa.array([0.0, 1.0]), pc.field("k") == -0.0),
        (pa.array([0.0, 2.0**53]), pc.field("k") >= 2**53),
        (pa.array([0.0, 1.0]), pc.field("k") < float("nan")),
        (pa.array([Decimal("0.5"), Decimal("0.50000000000000000001")], pa.decimal128(30, 20)), pc.field("k") == 0.5),
        (pa.array([Decimal("0.5"), Decimal("0.50000000000000000001")], pa.decimal128(30, 20)), pc.field("k") <= 0.5),
        (pa.array([Decimal("0.5"), Decimal("1.5")], pa.decimal128(5, 2)), pc.field("k") > Decimal("0.500")),
        (pa.array([1, 2], pa.int64()).cast(pa.timestamp("ms")), pc.field("k") > pa.scalar(1500, pa.timestamp("us"))),
        (pa.array([1, 2], pa.int32()).cast(pa.date32()), pc.field("k") > pa.scalar(86_400, pa.timestamp("s"))),
        (pa.array([0, 255], pa.uint8()), pc.field("k") > 255),
        (pa.array([0, 255], pa.uint8()), pc.field("k") >= 255),
        (pa.array([-128, 127], pa.int8()), pc.field("k") > -129),
    ],
)
def test_constants_of_other_types_lose_no_rows(db: Database, keys: pa.Array, expression: pc.Expression) -> None:
    batch = pa.record_batch({"k": keys})
    table = db.create_table("t", batch.schema, ["k"])
    table.write(batch)
    assert table.scan(filter=expression).to_table().equals(pa.table(batch).filter(expression))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prefix": 1}, "key column 'city' must be string"),
        ({"prefix": ("a", 1, 2)}, "prefix has more values than the key has columns"),
        ({"prefix": ("a", 2**31)}, "key column 'at' must be int32"),
        ({"prefix": ("a", 1.5)}, "key column 'at' must be int32"),
        ({"between": "ab"}, "between is a pair"),
        ({"between": ("a", "b", "c")}, "between is a pair"),
        ({"between": 3}, "between is a pair"),
        ({"between": (("a", None), None)}, "null"),
        ({"prefix": ("a", 1), "between": (1, 2)}, "more values than the key has columns"),
        ({"limit": -1}, "limit must be a whole number from 0"),
        ({"limit": True}, "limit must be a whole number"),
        ({"at_index": -1}, "at_index must be a whole number"),
        ({"at_index": "1"}, "at_index must be a whole number"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(table: Table, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        table.scan(**options)


def test_delete_range(table: Table) -> None:
    rows = trips(120)
    table.delete_range(prefix="a", between=(0, None))
    rows = [row for row in rows if not (row["city"] == "a" and row["at"] >= 0)]
    assert found(table) == rows
    table.delete_range(between=("b", "z"))
    rows = [row for row in rows if not "b" <= row["city"] <= "z"]
    assert found(table) == rows
    with pytest.raises(UsageError, match="say which keys to delete"):
        table.delete_range()
    table.delete_range(between=(None, None))
    assert table.count_rows() == 0


def test_past_states() -> None:
    backend = MachineBackend()
    backend.machine = TableMachine(retention=3)
    db = Database(backend)
    table = db.create_table("t", pa.schema([("k", pa.int64()), ("v", pa.int64())]), ["k"])
    indexes = [table.write(pa.record_batch({"k": [1], "v": [i]})) for i in range(5)]
    for i in (1, 2, 3, 4):
        assert found(table, at_index=indexes[i]) == [{"k": 1, "v": i}]
        assert table.get(1, at_index=indexes[i]) == {"k": 1, "v": i}
        assert table.get_many([1, 2], at_index=indexes[i])["v"].to_pylist() == [i, None]
    with pytest.raises(UsageError, match="is not kept"):
        table.get(1, at_index=indexes[0])
    with pytest.raises(UsageError, match="has not been applied"):
        table.get(1, at_index=indexes[4] + 1)
    with pytest.raises(UsageError, match="at_index must be"):
        table.get(1, at_index=-5)


class TestTransaction:
    def test_takes_effect_at_one_index(self, db: Database, table: Table) -> None:
        offsets = db.create_table("offsets", pa.schema([("source", pa.string()), ("offset", pa.int64())]), ["source"])
        with db.transaction() as t:
            t.delete_range(table, between=(None, None))
            t.write("trips", pa.table(pa.RecordBatch.from_pylist(trips(5), SCHEMA)))
            t.delete("trips", (trips(5)[0]["city"], trips(5)[0]["at"]))
            t.write(offsets, pa.record_batch({"source": ["x"], "offset": [7]}))
            assert t.index is None
            assert table.count_rows() > 5
        assert found(table) == trips(5)[1:]
        assert found(offsets) == [{"source": "x", "offset": 7}]
        assert t.index == db.status()["applied_index"]

    def test_an_error_in_the_block_changes_nothing(self, db: Database, table: Table) -> None:
        before = db.status()

        def change(last: Callable[[Transaction], object]) -> None:
            with db.transaction() as t:
                t.delete_range(table, between=(None, None))
                last(t)

        with pytest.raises(ZeroDivisionError):
            change(lambda t: 1 / 0)
        with pytest.raises(UsageError, match="column 'x' is not in the table"):
            change(lambda t: t.write(table, pa.record_batch({"x": [1]})))
        with pytest.raises(UsageError, match="no table 'nope'"):
            change(lambda t: t.delete("nope", 1))
        assert db.status() == before

    def test_of_one_change_is_that_change(self, db: Database, table: Table) -> None:
        with db.transaction() as t:
            t.write(table, pa.RecordBatch.from_pylist(trips(1, 9), SCHEMA))
        assert t.index == db.status()["applied_index"]

    def test_without_changes_is_nothing(self, db: Database) -> None:
        before = db.status()
        with db.transaction() as t:
            pass
        assert t.index is None
        assert db.status() == before

    def test_is_used_once_and_inside_of_its_block(self, db: Database, table: Table) -> None:
        t = db.transaction()
        with pytest.raises(UsageError, match="inside of its block"):
            t.delete_range(table, prefix="a")
        with t:
            t.delete_range(table, prefix="a")
            with pytest.raises(UsageError, match="used once"):
                t.__enter__()
        with pytest.raises(UsageError, match="inside of its block"):
            t.delete_range(table, prefix="a")
        with pytest.raises(UsageError, match="used once"):
            t.__enter__()
        assert isinstance(t, Transaction)


class TestOptions:
    STATE = pa.schema(
        [("k", pa.string()), ("n", pa.int64()), ("rows", pa.int64()), ("seen", pa.timestamp("us", "UTC"))]
    )

    def test_a_state_that_accumulates(self, db: Database) -> None:
        operators = {"n": "sum", "rows": "count"}
        table = db.create_table(
            "state", self.STATE, ["k"], merge=operators, ttl=timedelta(days=1), ttl_column="seen", ttl_stamped=True
        )
        table.write(pa.record_batch({"k": ["a", "b", "a"], "n": [1, 2, 3]}))
        table.write_async(pa.record_batch({"k": ["a"], "n": [-1]})).result()
        with db.transaction() as t:
            t.write(table, pa.record_batch({"n": [10], "k": ["b"]}))
        epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
        assert [tuple(row.values()) for row in found(table)] == [("a", 3, 3, epoch), ("b", 12, 2, epoch)]
        assert table.info.options.merge == (("n", "sum"), ("rows", "count"))

    def test_what_a_write_leaves_out_stays_where_it_would_be_merged(self, db: Database) -> None:
        schema = pa.schema(
            [
                ("k", pa.string()),
                ("n", pa.int64()),
                ("tags", pa.list_(pa.string())),
                ("last", pa.string()),
                pa.field("must", pa.int64(), nullable=False),
                ("plain", pa.string()),
            ]
        )
        operators = {"n": "sum", "tags": "append", "last": "last", "must": "max"}
        table = db.create_table("parts", schema, ["k"], merge=operators)
        table.write(
            pa.RecordBatch.from_pylist([dict(zip(schema.names, ("a", 1, ["x"], "l", 7, "p"), strict=True))], schema)
        )
        table.write(pa.record_batch({"k": ["a", "b"], "n": [2, 5], "must": [1, 1], "plain": ["q", None]}))
        left = [tuple(row.values()) for row in found(table)]
        assert left == [("a", 3, ["x"], "l", 7, "q"), ("b", 5, None, None, 1, None)]
        # Without an operator a null would be written, and what may not be null is not made up.
        for missing in ("plain", "must", "k"):
            columns = {"k": ["a"], "must": [1], "plain": ["z"]}
            del columns[missing]
            with pytest.raises(UsageError, match=missing):
                table.write(pa.record_batch(columns))

    def test_definitions_differ_by_their_options(self, db: Database) -> None:
        db.create_table("state", self.STATE, ["k"], merge={"rows": "count", "n": "sum"}, compression="zstd")
        again = db.create_table(
            "state", self.STATE, ["k"], merge={"n": "sum", "rows": "count"}, compression="zstd", exist_ok=True
        )
        assert again.info.options.compression == "zstd"
        with pytest.raises(UsageError, match="differs in schema, key or options"):
            db.create_table("state", self.STATE, ["k"], merge={"n": "max"}, compression="zstd", exist_ok=True)
        with pytest.raises(UsageError, match="differs in schema, key or options"):
            db.create_table("state", self.STATE, ["k"], exist_ok=True)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"merge": {"nope": "sum"}}, "no column 'nope' to merge"),
            ({"merge": {"n": "avg"}}, "'avg' is no merge operator"),
            ({"merge": {"k": "max"}}, "it cannot be merged"),
            ({"merge": {"rows": "append"}}, "'append' cannot merge int64"),
            ({"ttl": 5}, "a ttl needs a ttl_column"),
            ({"ttl_column": "seen"}, "a ttl_column needs a ttl"),
            ({"ttl": "5", "ttl_column": "seen"}, "a ttl is a number of seconds"),
            ({"ttl": float("nan"), "ttl_column": "seen"}, "a ttl is a number of seconds"),
            ({"ttl": 0, "ttl_column": "seen"}, "a time to live is 1 to"),
            ({"ttl": 5, "ttl_column": "k"}, "rows cannot live by a string"),
            ({"ttl": 5, "ttl_column": "n", "ttl_stamped": True, "merge": {"n": "max"}}, "neither key nor merged"),
            ({"compression": "gzip"}, "compression is 'lz4', 'zstd' or None"),
            ({"replicated": False}, "no local tables here"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, db: Database, options: dict[str, Any], says: str) -> None:
        with pytest.raises(UsageError, match=says):
            db.create_table("state", self.STATE, ["k"], **options)
        assert db.tables() == []
