"""The comparison of a replica with the source: it must find every difference, and none where there is none."""

from __future__ import annotations

import datetime

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marble.demo.compare import compare

SOURCE = pa.table({"id": [1, 2, 3, 4], "name": ["a", "b", None, ""], "x": [0.5, None, float("nan"), 0.0]})


def test_the_order_and_the_chunks_of_the_replica_do_not_matter() -> None:
    replica = pa.concat_tables([SOURCE.slice(2, 2), SOURCE.slice(0, 1), SOURCE.slice(1, 1)])
    found = compare(SOURCE, replica, ["id"])
    assert (found.identical, found.rows, found.problem) == (True, 4, "")


def test_the_order_of_columns_and_their_nullability_do_not_matter() -> None:
    fields = [pa.field("x", pa.float64()), pa.field("name", pa.string()), pa.field("id", pa.int64(), nullable=False)]
    replica = SOURCE.select(["x", "name", "id"]).cast(pa.schema(fields))
    assert compare(SOURCE, replica, ["id"]).identical


@pytest.mark.parametrize(
    ("column", "values", "rows"),
    [
        ("name", ["a", "b", None, "d"], 1),
        ("name", ["a", "b", "", ""], 1),
        ("name", ["a", None, None, ""], 1),
        ("x", [0.5, None, None, 0.0], 1),
        ("x", [0.5, None, float("nan"), -0.0], 1),
        ("x", [0.5, 0.0, float("nan"), 0.1], 2),
        ("x", [0.5, None, 7.0, 0.0], 1),
    ],
)
def test_a_differing_value_is_found_and_shown(column: str, values: list[object], rows: int) -> None:
    position = SOURCE.column_names.index(column)
    replica = SOURCE.set_column(position, column, pa.array(values, SOURCE.schema.field(column).type))
    found = compare(SOURCE, replica, ["id"])
    assert not found.identical
    assert found.differing == {column: rows}
    assert f"{column} in {rows} rows; first: {column} of the row {{'id':" in found.problem


def test_a_missing_an_extra_and_a_repeated_row_are_counted() -> None:
    extra = pa.table({"id": [9], "name": ["z"], "x": [1.0]})
    replica = pa.concat_tables([SOURCE.slice(1), SOURCE.slice(3), extra])
    found = compare(SOURCE, replica, ["id"])
    assert (found.missing, found.extra, found.repeated) == (1, 1, 1)
    assert "1 rows are missing, e.g. {'id': 1}" in found.problem
    assert "1 rows are not in the source, e.g. {'id': 9}" in found.problem
    assert "1 rows are repeated, e.g. {'id': 4}" in found.problem


def test_one_row_lost_and_one_doubled_is_not_hidden_by_an_equal_count() -> None:
    replica = pa.concat_tables([SOURCE.slice(0, 3), SOURCE.slice(0, 1)])
    found = compare(SOURCE, replica, ["id"])
    assert (found.rows, found.missing, found.repeated, found.identical) == (4, 1, 1, False)


def test_an_empty_replica_is_not_identical() -> None:
    found = compare(SOURCE, SOURCE.slice(0, 0), ["id"])
    assert (found.missing, found.identical) == (4, False)


@pytest.mark.parametrize(
    "replica",
    [
        SOURCE.drop_columns(["x"]),
        SOURCE.append_column("y", [[1] * 4]),
        SOURCE.cast(pa.schema([("id", pa.int32()), ("name", pa.string()), ("x", pa.float64())])),
    ],
)
def test_other_columns_or_types_are_a_difference(replica: pa.Table) -> None:
    found = compare(SOURCE, replica, ["id"])
    assert "the columns differ (" in found.problem


def test_nested_values_are_compared_too() -> None:
    source = pa.table({"id": [1, 2], "v": [[{"a": 1.0}], [{"a": float("nan")}, None]]})
    assert compare(source, source.take([1, 0]), ["id"]).identical
    replica = pa.table({"id": [1, 2], "v": [[{"a": 1.0}], [{"a": None}, None]]})
    assert compare(source, replica, ["id"]).differing == {"v": 1}
    zeros = pa.table({"id": [1], "v": [[0.0]]})
    assert not compare(zeros, pa.table({"id": [1], "v": [[-0.0]]}), ["id"]).identical


def test_keys_of_several_columns_are_compared_whole() -> None:
    when = datetime.datetime(2013, 1, 1, tzinfo=datetime.UTC)
    source = pa.table({"t": pa.array([when, when], pa.timestamp("s", "UTC")), "c": ["A", "B"], "v": [1, 2]})
    assert compare(source, source.take([1, 0]), ["t", "c"]).identical
    swapped = source.set_column(1, "c", [["B", "A"]])
    assert compare(source, swapped, ["t", "c"]).differing == {"v": 2}


@settings(deadline=None, max_examples=50)
@given(
    rows=st.dictionaries(
        st.integers(-5, 5), st.tuples(st.none() | st.floats(width=32), st.none() | st.text(max_size=2)), min_size=1
    ),
    data=st.data(),
)
def test_any_single_change_is_found(rows: dict[int, tuple[float | None, str | None]], data: st.DataObject) -> None:
    def table(contents: dict[int, tuple[float | None, str | None]]) -> pa.Table:
        columns = {
            "k": pa.array(list(contents), pa.int64()),
            "f": pa.array([value[0] for value in contents.values()], pa.float32()),
            "s": pa.array([value[1] for value in contents.values()], pa.string()),
        }
        return pa.table(columns)

    source = table(dict(sorted(rows.items())))
    shuffled = dict(data.draw(st.permutations(list(rows.items()))))
    assert compare(source, table(shuffled), ["k"]).identical
    victim = data.draw(st.sampled_from(list(rows)))
    number, text = rows[victim]
    changed = data.draw(st.sampled_from([(2.5 if number != 2.5 else None, text), (number, "new!"), None]))
    if changed is None:
        del shuffled[victim]
    else:
        shuffled[victim] = changed
    assert not compare(source, table(shuffled), ["k"]).identical
