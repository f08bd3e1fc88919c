"""Databases and tables as called by a user, on a state machine without Raft; streams on a scripted backend."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from reference.machine_backend import MachineBackend

from marble.database import Database, Table, check_scan, columns_read, filter_batches
from marble.errors import InvariantError, UsageError
from marble.schema import TableInfo, check_table

SCHEMA = pa.schema([("id", pa.int64()), ("name", pa.string()), ("score", pa.float64())])


def people(*rows: tuple[int, str | None, float | None]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], SCHEMA)


@pytest.fixture
def backend() -> MachineBackend:
    return MachineBackend()


@pytest.fixture
def db(backend: MachineBackend) -> Database:
    return Database(backend)


@pytest.fixture
def table(db: Database) -> Table:
    return db.create_table("people", SCHEMA, ["id"])


@pytest.fixture
def pairs(db: Database) -> Table:
    table = db.create_table("pairs", pa.schema([("b", pa.int32()), ("a", pa.string()), ("v", pa.int8())]), ["a", "b"])
    table.write(pa.RecordBatch.from_pylist([{"a": "x", "b": i, "v": i} for i in range(3)], table.schema))
    return table


class TestDatabase:
    def test_create_and_find(self, db: Database) -> None:
        created = db.create_table("b", SCHEMA, ["id"])
        db.create_table("a", SCHEMA, ("name", "id"))
        assert [info.name for info in db.tables()] == ["a", "b"]
        found = db.table("b")
        assert found.info == created.info
        assert (found.name, found.schema, found.key) == ("b", SCHEMA, ("id",))
        assert db.table("a").key == ("name", "id")
        assert repr(found) == "<marble.Table 'b' key=['id'] columns=['id', 'name', 'score']>"

    def test_create_again(self, db: Database, table: Table) -> None:
        with pytest.raises(UsageError, match=r"exists already: open it with table\(\), or pass exist_ok=True"):
            db.create_table("people", SCHEMA, ["id"])
        assert db.create_table("people", SCHEMA, ["id"], exist_ok=True).info == table.info
        assert db.create_table("people", SCHEMA.with_metadata({"a": "b"}), ["id"], exist_ok=True).info == table.info
        with pytest.raises(UsageError, match="exists already: it differs in schema, key or options"):
            db.create_table("people", SCHEMA, ["name"], exist_ok=True)

    def test_create_takes_any_arrow_schema(self, db: Database) -> None:
        class SchemaOnly:
            def __arrow_c_schema__(self) -> object:
                return SCHEMA.__arrow_c_schema__()

        assert db.create_table("t", SchemaOnly(), ["id"]).schema == SCHEMA

    @pytest.mark.parametrize(
        ("name", "schema", "key", "message"),
        [
            ("../x", SCHEMA, ["id"], "cannot be the name of a table"),
            ("t", SCHEMA, ["idd"], "did you mean 'id'"),
            ("t", pa.schema([]), ["id"], "1 to 1024 columns"),
            ("t", "no schema", ["id"], r"must be a pyarrow\.Schema"),
            ("t", pa.schema([("id", pa.list_(pa.int8()))]), ["id"], "cannot be in the key"),
        ],
    )
    def test_create_refuses_before_anything_is_proposed(
        self, db: Database, backend: MachineBackend, name: str, schema: Any, key: list[str], message: str
    ) -> None:
        with pytest.raises(UsageError, match=message):
            db.create_table(name, schema, key)
        assert backend.entries == []

    def test_table_unknown_names_the_nearest(self, db: Database, table: Table) -> None:
        with pytest.raises(UsageError, match="no table 'poeple'; did you mean 'people'"):
            db.table("poeple")
        with pytest.raises(UsageError, match="cannot be the name of a table"):
            db.table("../x")

    def test_drop(self, db: Database, table: Table) -> None:
        table.write(people((1, "a", 1.0)))
        assert db.drop_table("people") == 3
        assert db.tables() == []
        with pytest.raises(UsageError, match="there is no table 'people'"):
            db.drop_table("people")
        with pytest.raises(UsageError, match="no table with id 1: it has been dropped"):
            table.write(people((1, "a", 1.0)))
        with pytest.raises(UsageError, match="no table with id 1"):
            table.get(1)
        again = db.create_table("people", SCHEMA, ["id"])
        assert again.info.id == 2
        assert again.get(1) is None

    def test_close(self, backend: MachineBackend) -> None:
        with Database(backend) as db:
            table = db.create_table("t", SCHEMA, ["id"])
            assert db.status() == {"applied_index": 1}
        assert backend.closed
        for call in (
            lambda: table.write(people((1, "a", 0.0))),
            lambda: table.get(1),
            db.tables,
            table.scan().to_table,
        ):
            with pytest.raises(UsageError, match="closed"):
                call()


class TestWrite:
    def test_upserts_and_returns_the_index(self, table: Table) -> None:
        assert table.write(people((1, "a", 1.0), (2, "b", 2.0))) == 2
        assert table.write(people((2, "B", None), (3, "c", 3.0), (3, "C", 3.5))) == 3
        assert table.scan().to_table().to_pylist() == people((1, "a", 1.0), (2, "B", None), (3, "C", 3.5)).to_pylist()

    def test_stream_becomes_one_entry_for_each_batch(self, table: Table, backend: MachineBackend) -> None:
        batches = [people((i, "x", 0.0)) for i in range(5)]
        empty = people((0, "", 0.0)).slice(0, 0)
        data = pa.Table.from_batches([empty, *batches[:3], empty, *batches[3:]])

        class StreamOnly:
            def __arrow_c_stream__(self, requested_schema: object = None) -> object:
                return data.__arrow_c_stream__(requested_schema)

        assert table.write(StreamOnly()) == 6
        assert len(backend.entries) == 6
        assert table.count_rows() == 5

    @pytest.mark.parametrize(
        "data",
        [people((0, "", 0.0)).slice(0, 0), pa.Table.from_batches([], SCHEMA)],
        ids=["batch", "stream"],
    )
    def test_refuses_no_rows(self, table: Table, data: object) -> None:
        with pytest.raises(UsageError, match="give at least one"):
            table.write(data)
        with pytest.raises(UsageError, match="give at least one"):
            table.write_async(data)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (people((1, "a", 0.0)).drop_columns(["name"]), "'name' is missing"),
            (people((1, "a", 0.0)).append_column("x", pa.array([1])), "'x' is not in the table"),
            (pa.RecordBatch.from_pydict({"id": ["1"], "name": ["a"], "score": [0.0]}), "must be int64, got string"),
            (pa.RecordBatch.from_pydict({"id": pa.nulls(1, pa.int64()), "name": ["a"], "score": [0.0]}), "is null"),
            ([{"id": 1}], "cannot take a list as rows"),
        ],
    )
    def test_refuses_before_anything_is_proposed(
        self, table: Table, backend: MachineBackend, data: object, message: str
    ) -> None:
        for write in (table.write, table.write_async):
            with pytest.raises(UsageError, match=message):
                write(data)
        assert backend.machine.applied_index == 1

    def test_refuses_a_batch_above_the_limit(self, table: Table, backend: MachineBackend) -> None:
        backend.entry_bytes_max = 10_000
        with pytest.raises(UsageError, match=r"above max_entry_size=10,000: split it into smaller batches"):
            table.write(people(*((i, "x" * 100, 0.0) for i in range(100))))
        assert table.write(people(*((i, "x" * 10, 0.0) for i in range(100)))) == 2

    def test_async_is_one_entry(self, table: Table, backend: MachineBackend) -> None:
        data = pa.Table.from_batches([people((1, "a", 0.0)), people((2, "b", 0.0))])
        assert table.write_async(data).result(timeout=0) == 2
        assert len(backend.entries) == 2
        assert table.count_rows() == 2

    def test_reads_back_a_slice(self, table: Table) -> None:
        rows = people(*((i, f"n{i}", i / 2) for i in range(100)))
        table.write(rows.slice(37, 20))
        assert table.scan().to_table().to_batches() == [rows.slice(37, 20)]


class TestGet:
    def test_get(self, table: Table) -> None:
        table.write(people((1, "a", None), (2, None, None)))
        assert table.get(1) == {"id": 1, "name": "a", "score": None}
        assert table.get((2,)) == {"id": 2, "name": None, "score": None}
        assert table.get({"id": 2}) == table.get(2)
        assert table.get(3) is None

    def test_get_mistrusts_its_backend(
        self, table: Table, backend: MachineBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backend, "get_many", lambda *_: pa.RecordBatch.from_pylist([], table.info.lookup_schema))
        with pytest.raises(InvariantError, match="asked for one key, got 0 rows"):
            table.get(1)

    def test_get_by_several_columns(self, pairs: Table) -> None:
        assert pairs.get(("x", 2)) == {"a": "x", "b": 2, "v": 2}
        assert pairs.get({"b": 2, "a": "x"}) == pairs.get(("x", 2))
        assert pairs.get(("y", 2)) is None

    def test_get_many_keeps_order_and_marks_what_is_missing(self, pairs: Table) -> None:
        got = pairs.get_many([("x", 2), ("y", 0), {"b": 0, "a": "x"}, ("x", 2)])
        row = {"b": 2, "a": "x", "v": 2}
        assert got.to_pylist() == [row, {"b": None, "a": None, "v": None}, {"b": 0, "a": "x", "v": 0}, row]
        assert got.schema == pairs.info.lookup_schema
        got.validate(full=True)

    def test_get_many_takes_arrow(self, pairs: Table) -> None:
        keys = pa.table({"b": pa.array([1, 9], pa.int32()), "a": ["x", "x"]})
        assert pairs.get_many(keys).column("v").to_pylist() == [1, None]
        assert pairs.get_many(pairs.scan(["a", "b"])).column("v").to_pylist() == [0, 1, 2]
        with pytest.raises(UsageError, match="'v' is not in the key"):
            pairs.get_many(pairs.scan())

    def test_get_many_of_no_keys(self, pairs: Table) -> None:
        got = pairs.get_many([])
        assert (got.num_rows, got.schema) == (0, pairs.info.lookup_schema)

    def test_get_many_of_a_required_column(self, db: Database) -> None:
        schema = pa.schema([pa.field("id", pa.int8(), nullable=False), pa.field("v", pa.int8(), nullable=False)])
        table = db.create_table("t", schema, ["id"])
        table.write(pa.RecordBatch.from_pylist([{"id": 1, "v": 1}], schema))
        assert table.get_many([1, 2]).to_pylist() == [{"id": 1, "v": 1}, {"id": None, "v": None}]
        assert table.get_many([1]).schema == table.info.lookup_schema
        assert table.scan().to_table().schema == schema

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("x", "has 2 values"),
            (("x",), "has 2 values, for \\['a', 'b'\\], got 1"),
            (("x", 1, 2), "got 3"),
            ({"a": "x"}, "a key has the columns \\['a', 'b'\\], got \\['a'\\]"),
            (("x", "1"), "key column 'b' must be int32"),
            (("x", 2**40), "key column 'b' must be int32"),
            ((1, 1), "key column 'a' must be string"),
            (("x", None), "'b' is in the key and is null"),
        ],
    )
    def test_get_refuses(self, pairs: Table, backend: MachineBackend, key: object, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            pairs.get(key)
        with pytest.raises(UsageError, match=message):
            pairs.get_many([key])
        with pytest.raises(UsageError, match=message):
            pairs.delete([key])
        assert backend.machine.applied_index == 2

    @pytest.mark.parametrize("keys", [7, "abc", b"abc", {"id": 1}, None], ids=repr)
    def test_get_many_refuses_what_is_no_list(self, table: Table, keys: object) -> None:
        with pytest.raises(UsageError, match="keys must be a list of keys or Arrow data"):
            table.get_many(keys)

    def test_consistency(self, table: Table, backend: MachineBackend) -> None:
        table.get(1)
        table.get_many([1], consistency="local")
        table.scan(consistency="local").to_table()
        table.count_rows()
        assert backend.reads == ["linearizable", "local", "local", "linearizable"]
        message = "consistency must be one of 'linearizable', 'local', got 'eventual'"
        with pytest.raises(UsageError, match=message):
            table.get(1, consistency="eventual")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=message):
            table.get_many([1], consistency="eventual")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=message):
            table.scan(consistency="eventual")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("type_", "key"),
        [
            (pa.int64(), 1.5),
            (pa.int8(), Decimal("1.5")),
            (pa.date32(), datetime(2020, 1, 1, 5)),
            (pa.timestamp("s"), datetime(2020, 1, 1, microsecond=5)),
            (pa.timestamp("ms", "UTC"), datetime(2020, 1, 1, microsecond=5, tzinfo=UTC)),
            (pa.time32("s"), time(1, 1, 1, 5)),
            (pa.duration("ms"), timedelta(microseconds=5)),
        ],
    )
    def test_a_key_is_never_rounded_to_another(self, db: Database, type_: pa.DataType, key: object) -> None:
        schema = pa.schema([("k", type_), ("v", pa.int8())])
        table = db.create_table("t", schema, ["k"])
        table.write(pa.RecordBatch.from_arrays([pa.array([key], type_), pa.array([1], pa.int8())], schema=schema))
        for call in (table.get, lambda key: table.get_many([key]), lambda key: table.delete([key])):
            with pytest.raises(UsageError, match="key column 'k' must be"):
                call(key)
        (stored,) = table.scan().to_table()["k"].to_pylist()
        assert table.get(stored) == {"k": stored, "v": 1}

    @pytest.mark.parametrize(
        ("type_", "key"), [(pa.int64(), 2.0), (pa.uint64(), 2**64 - 1), (pa.date32(), datetime(2020, 1, 1))]
    )
    def test_a_key_of_another_type_that_means_the_same_is_taken(
        self, db: Database, type_: pa.DataType, key: object
    ) -> None:
        schema = pa.schema([("k", type_)])
        table = db.create_table("t", schema, ["k"])
        table.write(pa.RecordBatch.from_arrays([pa.array([key], type_)], schema=schema))
        assert table.get(key) is not None


class TestDelete:
    @pytest.mark.parametrize(
        ("keys", "left"),
        [
            ([("x", 0), ("x", 7)], [1, 2]),
            ([{"a": "x", "b": 1}], [0, 2]),
            (("x", 2), [0, 1]),
            ({"a": "x", "b": 2}, [0, 1]),
            (pa.table({"a": ["x", "x"], "b": pa.array([2, 0], pa.int32())}), [1]),
        ],
        ids=repr,
    )
    def test_delete(self, pairs: Table, keys: object, left: list[int]) -> None:
        assert pairs.delete(keys) == 3
        assert pairs.scan().to_table().column("b").to_pylist() == left

    def test_delete_by_one_column(self, table: Table) -> None:
        table.write(people(*((i, "x", 0.0) for i in range(5))))
        table.delete([1, 2])
        table.delete({"id": 3})
        table.delete(4)
        assert table.scan(["id"]).to_table().column("id").to_pylist() == [0]

    def test_delete_by_text(self, db: Database) -> None:
        table = db.create_table("t", pa.schema([("id", pa.string())]), ["id"])
        table.write(pa.RecordBatch.from_pydict({"id": ["a", "b", "ab"]}))
        table.delete("ab")
        assert table.scan().to_table().column("id").to_pylist() == ["a", "b"]

    def test_delete_refuses_no_keys(self, table: Table) -> None:
        with pytest.raises(UsageError, match="give at least one key"):
            table.delete([])


class TestScan:
    @pytest.fixture(autouse=True)
    def _rows(self, table: Table) -> None:
        table.write(people(*((i, "ab"[i % 2], i / 2) for i in (3, 1, 2, 0))))

    def test_gives_rows_in_key_order(self, table: Table) -> None:
        scan = table.scan()
        assert scan.schema == SCHEMA
        assert scan.to_table().column("id").to_pylist() == [0, 1, 2, 3]
        assert scan.count_rows() == 4
        assert pa.Table.from_batches(scan) == scan.to_table() == scan.to_reader().read_all()

    def test_each_use_begins_anew(self, table: Table) -> None:
        scan = table.scan(["id"])
        before = scan.to_reader()
        table.delete([0])
        assert before.read_all().num_rows == 4
        assert scan.to_table().num_rows == 3

    def test_projects_and_filters(self, table: Table) -> None:
        scan = table.scan(["score", "id"], (pc.field("name") == "b") & (pc.field("id") > 1))
        assert scan.schema == pa.schema([SCHEMA.field("score"), SCHEMA.field("id")])
        assert scan.to_table().to_pylist() == [{"score": 1.5, "id": 3}]
        assert scan.to_table().schema == scan.schema
        assert table.scan(filter=pc.field("id") > 100).to_table().schema == SCHEMA
        assert table.scan(["name"], pc.field(0) == 2).to_table().to_pylist() == [{"name": "a"}]

    def test_speaks_the_capsule_protocol(self, table: Table) -> None:
        scan = table.scan(["id"])
        assert pa.table(scan).column("id").to_pylist() == [0, 1, 2, 3]
        assert pa.RecordBatchReader.from_stream(scan).schema == scan.schema

    @pytest.mark.parametrize(
        ("columns", "expression", "message"),
        [
            (["nam"], None, "no column 'nam'; did you mean 'name'"),
            (["id", "id"], None, "stands twice"),
            ([], None, "at least one name"),
            ("id", None, "must be a list"),
            (None, "id > 1", r"must be a pyarrow\.compute\.Expression such as .*got str"),
            (None, pc.field("x") > 1, "the filter does not fit the table: No match"),
            (None, pc.field("id") == "x", "the filter does not fit the table"),
            (None, pc.field("id") + 1, "the filter does not fit the table"),
        ],
    )
    def test_refuses(self, table: Table, backend: MachineBackend, columns: Any, expression: Any, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            table.scan(columns, expression)
        assert backend.reads == []


WIDE = pa.schema([(f"c{i}", pa.int64()) for i in range(40)])


@pytest.mark.parametrize(
    ("wanted", "expression", "read"),
    [
        (["c3"], pc.field("c3") > 1, ["c3"]),
        (["c3"], pc.field("c39") + pc.field("c0") > pc.field("c20"), ["c0", "c3", "c20", "c39"]),
        (["c5", "c3"], pc.scalar(True), ["c3", "c5"]),
        (["c3"], pc.field(7) > 1, WIDE.names),
        (["c3"], pc.field("c4").is_null() | pc.field("c5").isin([1, 2]), ["c3", "c4", "c5"]),
    ],
    ids=str,
)
def test_columns_read(wanted: list[str], expression: pc.Expression, read: Sequence[str]) -> None:
    assert columns_read(WIDE, wanted, expression) == read


def test_filter_batches_streams() -> None:
    taken: list[int] = []

    def source():  # type: ignore[no-untyped-def]
        for i in range(3):
            taken.append(i)
            yield pa.RecordBatch.from_pydict(
                {"a": [i, i + 10], "b": [None, i]}, pa.schema([("a", "int64"), ("b", "int64")])
            )

    schema = pa.schema([("a", pa.int64()), ("b", pa.int64())])
    reader = filter_batches(pa.RecordBatchReader.from_batches(schema, source()), ["b"], pc.field("a") > 10)
    assert taken == []
    assert reader.read_next_batch().to_pydict() == {"b": [1]}
    assert taken == [0, 1]
    assert reader.read_all().to_pydict() == {"b": [2]}


def test_check_scan_gives_the_result_schema() -> None:
    info = TableInfo(1, "people", *check_table("people", SCHEMA, ["id"]))
    assert check_scan(info, None, None) == SCHEMA
    assert check_scan(info, ("score", "id"), pc.field("name") == "a").names == ["score", "id"]
