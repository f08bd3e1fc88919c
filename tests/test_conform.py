"""The rules for rows: what is accepted as it is, what is refused, and that the refusal says what to do."""

from __future__ import annotations

import ctypes
import datetime
import decimal

import numpy as np
import pyarrow as pa
import pytest

from marble.errors import UsageError
from marble.rows import conform, conform_keys
from marble.schema import TableInfo, check_rows, check_table, to_batches

SCHEMA = pa.schema([("id", pa.int64()), ("name", pa.string()), ("score", pa.float64())])


def table(schema: pa.Schema = SCHEMA, key: tuple[str, ...] = ("id",)) -> TableInfo:
    return TableInfo(1, "people", *check_table("people", schema, key))


def rows(**columns: object) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(columns)


PEOPLE = pa.RecordBatch.from_pydict({"id": [1, 2], "name": ["a", None], "score": [0.5, 1.5]}, SCHEMA)


class StreamOnly:
    """What another library hands over: nothing but the PyCapsule protocol."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)


class ArrayOnly:
    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch

    def __arrow_c_array__(self, requested_schema: object = None) -> object:
        return self._batch.__arrow_c_array__(requested_schema)


def test_conform_leaves_a_fitting_batch_alone() -> None:
    conformed = conform(PEOPLE, table())
    assert conformed.equals(PEOPLE)
    assert conformed.column("name").buffers()[2].address == PEOPLE.column("name").buffers()[2].address


def test_conform_reorders_columns_and_drops_metadata() -> None:
    shuffled = PEOPLE.select(["score", "id", "name"]).replace_schema_metadata({"x": "y"})
    conformed = conform(shuffled, table())
    assert conformed.schema.equals(SCHEMA, check_metadata=True)
    assert conformed.equals(PEOPLE)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (PEOPLE.slice(0, 0), "batch is empty"),
        (PEOPLE.select(["id", "name"]), "column 'score' is missing"),
        (PEOPLE.append_column("extra", pa.array([1, 2])), "column 'extra' is not in the table: drop it"),
        (PEOPLE.rename_columns(["id", "nam", "score"]), "'nam' is not in the table: drop it; did you mean 'name'"),
        (PEOPLE.append_column("id", pa.array([1, 2])), "column 'id' stands twice"),
        (
            PEOPLE.set_column(0, "id", pa.array([1, 2], pa.int32())),
            "column 'id' must be int64, got int32: cast it, e.g. with pyarrow.compute.cast",
        ),
        (PEOPLE.set_column(2, "score", pa.array(["1", "2"])), "column 'score' must be double, got string"),
        (
            PEOPLE.set_column(1, "name", pa.array(["a", "b"]).dictionary_encode()),
            "column 'name' must be string, got dictionary",
        ),
        (PEOPLE.set_column(1, "name", pa.nulls(2)), "column 'name' must be string, got null"),
        (
            PEOPLE.set_column(0, "id", pa.array([1, None], pa.int64())),
            "column 'id' is in the key and is null in row 1",
        ),
    ],
)
def test_conform_refuses(batch: pa.RecordBatch, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        conform(batch, table())
    assert "table 'people'" in str(caught.value)


def test_conform_refuses_null_where_the_schema_forbids_it() -> None:
    schema = pa.schema([("id", pa.int64()), pa.field("v", pa.int8(), nullable=False)])
    with pytest.raises(UsageError, match="'v' must not be null, but is in row 2"):
        conform(rows(id=[1, 2, 3], v=pa.array([1, 1, None], pa.int8())), table(schema))


REQUIRED = pa.field("x", pa.int8(), nullable=False)


@pytest.mark.parametrize(
    ("type_", "good", "bad"),
    [
        (pa.struct([REQUIRED]), [None, {"x": 1}], [{"x": 1}, {"x": None}]),
        (pa.list_(REQUIRED), [None, [], [1]], [[1], [None]]),
        (pa.list_(REQUIRED, 2), [None, [1, 2]], [[1, 2], [1, None]]),
        (pa.list_(pa.struct([REQUIRED])), [[None], [{"x": 1}]], [[{"x": None}]]),
        (pa.map_(pa.string(), REQUIRED), [None, [("a", 1)]], [[("a", 1)], [("b", None)]]),
        (pa.map_(pa.string(), REQUIRED), [None, None], [None, [("b", None)]]),
        (
            pa.map_(pa.string(), pa.struct([REQUIRED])),
            [[("a", None), ("b", {"x": 1})]],
            [[], [("b", {"x": None})]],
        ),
    ],
    ids=str,
)
def test_conform_looks_for_nulls_in_nested_fields(type_: pa.DataType, good: list[object], bad: list[object]) -> None:
    info = table(pa.schema([("id", pa.int64()), ("v", type_)]))

    def batch(values: list[object]) -> pa.RecordBatch:
        nullable = pa.array(values, loosened(type_))
        return pa.RecordBatch.from_arrays(
            [pa.array(range(len(values))), tightened(nullable, type_)], schema=info.schema
        )

    conform(batch(good), info)
    conform(batch([*bad, *good]).slice(len(bad)), info)
    with pytest.raises(UsageError, match="must not be null, but is: fill it"):
        conform(batch(bad), info)


def loosened(type_: pa.DataType) -> pa.DataType:
    """`type_` with nested fields nullable, so that pyarrow makes an array with any nulls."""
    if pa.types.is_struct(type_):
        return pa.struct([pa.field(f.name, loosened(f.type)) for f in type_])
    if pa.types.is_map(type_):
        return pa.map_(type_.key_type, pa.field("value", loosened(type_.item_type)))
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(pa.field("x", loosened(type_.value_type)), type_.list_size)
    if pa.types.is_list(type_):
        return pa.list_(pa.field("x", loosened(type_.value_type)))
    return type_


def tightened(array: pa.Array, type_: pa.DataType) -> pa.Array:
    """The buffers of `array` under `type_`, whatever they hold: as a careless producer would send them."""
    if pa.types.is_struct(type_):
        children = [tightened(array.field(i), type_.field(i).type) for i in range(type_.num_fields)]
        return pa.Array.from_buffers(type_, len(array), array.buffers()[:1], array.null_count, 0, children)
    if pa.types.is_map(type_):
        entries = pa.StructArray.from_arrays(
            [array.keys, tightened(array.items, type_.item_type)], fields=[type_.key_field, type_.item_field]
        )
        return pa.Array.from_buffers(type_, len(array), array.buffers()[:2], array.null_count, 0, [entries])
    if pa.types.is_fixed_size_list(type_):
        values = tightened(array.values, type_.value_type)
        return pa.Array.from_buffers(type_, len(array), array.buffers()[:1], array.null_count, 0, [values])
    if pa.types.is_list(type_):
        values = tightened(array.values, type_.value_type)
        return pa.Array.from_buffers(type_, len(array), array.buffers()[:2], array.null_count, 0, [values])
    return array


def test_conform_refuses_nan_in_the_key_only() -> None:
    schema = pa.schema([("id", pa.float64()), ("v", pa.float64())])
    conform(rows(id=[1.0], v=[float("nan")]), table(schema))
    with pytest.raises(UsageError, match="'id' is in the key and is NaN in row 1"):
        conform(rows(id=[1.0, float("nan")], v=[0.0, 0.0]), table(schema))


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (pa.string_view(), pa.string()),
        (pa.large_string(), pa.string()),
        (pa.string(), pa.large_string()),
        (pa.binary_view(), pa.binary()),
        (pa.large_binary(), pa.binary()),
        (pa.large_list(pa.string_view()), pa.list_(pa.string())),
        (pa.list_(pa.string()), pa.large_list(pa.large_string())),
        (pa.struct([("a", pa.string_view())]), pa.struct([("a", pa.string())])),
    ],
    ids=str,
)
def test_conform_casts_between_representations_of_the_same_values(got: pa.DataType, wanted: pa.DataType) -> None:
    samples: dict[bool, object] = {pa.types.is_struct(wanted): {"a": "x"}, "list" in str(wanted): ["x"]}
    value = samples.get(True, b"x" if "binary" in str(wanted) else "x")
    batch = rows(id=[1, 2], v=pa.array([value, None], wanted).cast(got))
    conformed = conform(batch, table(pa.schema([("id", pa.int64()), ("v", wanted)])))
    assert conformed.column("v").type == wanted
    assert conformed.column("v").to_pylist() == [value, None]


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (pa.string(), pa.binary()),
        (pa.list_(pa.int8()), pa.list_(pa.int16())),
        (pa.struct([("a", pa.int8())]), pa.struct([("b", pa.int8())])),
        (pa.list_(pa.int8()), pa.list_(pa.int8(), 2)),
        (pa.timestamp("s"), pa.timestamp("ms")),
        (pa.timestamp("s", "UTC"), pa.timestamp("s")),
        (pa.decimal128(5, 2), pa.decimal128(6, 2)),
    ],
    ids=str,
)
def test_conform_never_changes_values(got: pa.DataType, wanted: pa.DataType) -> None:
    batch = rows(id=[1], v=pa.nulls(1, got))
    with pytest.raises(UsageError, match="column 'v' must be"):
        conform(batch, table(pa.schema([("id", pa.int64()), ("v", wanted)])))


def test_conform_refuses_what_a_cast_cannot_hold() -> None:
    # Pages that nobody touches take no memory, and neither the validation of binary nor the refusal touches them.
    data = pa.py_buffer(np.zeros((2 << 30) + 64, np.uint8))
    offsets = pa.py_buffer(np.array([0, 2 << 30], np.int64))
    batch = rows(id=[1], v=pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data]))
    with pytest.raises(UsageError, match="column 'v' cannot be cast to binary"):
        conform(batch, table(pa.schema([("id", pa.int64()), ("v", pa.binary())])))


def test_conform_refuses_offsets_that_point_outside() -> None:
    offsets = pa.py_buffer((ctypes.c_int32 * 3)(0, 1_000_000, 2))
    broken = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"ab")])
    batch = PEOPLE.set_column(1, "name", broken)
    batch.validate()
    with pytest.raises(UsageError, match="not valid Arrow data"):
        conform(batch, table())


def test_conform_refuses_text_that_is_not_utf8() -> None:
    offsets = pa.py_buffer((ctypes.c_int32 * 3)(0, 1, 2))
    broken = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff")])
    with pytest.raises(UsageError, match="not valid Arrow data"):
        conform(PEOPLE.set_column(1, "name", broken), table())


def test_conform_keys() -> None:
    info = table(pa.schema([("a", pa.int8()), ("b", pa.string()), ("v", pa.int8())]), ("b", "a"))
    keys = conform_keys(rows(a=pa.array([1], pa.int8()), b=["x"]), info)
    assert keys.schema == info.key_schema
    assert keys.to_pylist() == [{"b": "x", "a": 1}]
    with pytest.raises(UsageError, match="column 'v' is not in the key"):
        conform_keys(rows(a=pa.array([1], pa.int8()), b=["x"], v=[1]), info)
    with pytest.raises(UsageError, match="column 'a' is missing: each key needs"):
        conform_keys(rows(b=["x"]), info)
    with pytest.raises(UsageError, match="'b' is in the key and is null in row 0"):
        conform_keys(rows(a=pa.array([1], pa.int8()), b=pa.array([None], pa.string())), info)


def test_check_rows_looks_at_slices_only() -> None:
    batch = pa.RecordBatch.from_arrays(
        [pa.array([None, 1, 2]), pa.nulls(3, pa.string()), pa.nulls(3, pa.float64())], schema=SCHEMA
    )
    check_rows(batch.slice(1), table())
    with pytest.raises(UsageError, match="row 0"):
        check_rows(batch, table())


def test_to_batches_of_everything_arrow() -> None:
    two = pa.Table.from_batches([PEOPLE, PEOPLE.slice(1)])
    for data in (two, two.to_reader(), StreamOnly(two)):
        assert [batch.num_rows for batch in to_batches(data)] == [2, 1]
    for data in (PEOPLE, ArrayOnly(PEOPLE)):
        (batch,) = to_batches(data)
        assert batch.equals(PEOPLE)


@pytest.mark.parametrize("data", [None, 7, [{"id": 1}], {"id": [1]}, "rows", pa.Table], ids=repr)
def test_to_batches_refuses_what_is_not_arrow(data: object) -> None:
    with pytest.raises(UsageError, match=r"pyarrow\.RecordBatch\.from_pylist"):
        list(to_batches(data))


def test_to_batches_refuses_a_column_alone() -> None:
    with pytest.raises(UsageError, match="did not give a stream of rows"):
        list(to_batches(pa.chunked_array([[1, 2]])))
    with pytest.raises(UsageError, match="did not give a stream of rows"):
        list(to_batches(pa.array([1, 2])))


def test_to_batches_reports_a_producer_that_fails() -> None:
    def failing():  # type: ignore[no-untyped-def]
        yield PEOPLE
        raise pa.ArrowInvalid("the query was cancelled")

    stream = to_batches(pa.RecordBatchReader.from_batches(SCHEMA, failing()))
    assert next(stream).equals(PEOPLE)
    with pytest.raises(UsageError, match="the query was cancelled"):
        next(stream)


@pytest.mark.parametrize(
    "value", [decimal.Decimal("1.50"), datetime.date(2013, 1, 1), datetime.timedelta(1), b"\0", True], ids=repr
)
def test_keys_of_any_ordered_type_conform(value: object) -> None:
    column = pa.array([value])
    info = table(pa.schema([("id", column.type), ("v", pa.int64())]))
    assert conform_keys(rows(id=column), info).column("id").to_pylist() == [value]
