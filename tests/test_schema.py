"""The rules for tables: what is accepted, what is refused, and that the refusal says what to do."""

from __future__ import annotations

import pyarrow as pa
import pytest

from marble._core.key_codec import KeyCodec
from marble.errors import UsageError
from marble.schema import (
    COLUMNS_MAX,
    FIELDS_MAX,
    NESTING_LEVELS_MAX,
    TableInfo,
    check_table,
    check_table_name,
    nearest,
)

SCHEMA = pa.schema([("id", pa.int64()), ("name", pa.string()), ("score", pa.float64())])


def table(schema: pa.Schema = SCHEMA, key: tuple[str, ...] = ("id",)) -> TableInfo:
    return TableInfo(1, "people", *check_table("people", schema, key))


@pytest.mark.parametrize("name", ["a", "_", "Flights_2013", "a.b", "a-b", "x" * 128, "a.b.c"])
def test_table_name_accepted(name: str) -> None:
    assert check_table_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../x",
        "a..b",
        "1a",
        ".a",
        "-a",
        "a/b",
        "a b",
        "a\n",
        "a\0",
        "é",
        "x" * 129,
        "a\\b",
        "\u0661a",
        "aé",
        None,
        7,
    ],
)
def test_table_name_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a table"):
        check_table_name(name)


def test_message_shows_a_hostile_name_escaped_and_cut() -> None:
    with pytest.raises(UsageError) as caught:
        check_table_name("\x1b[2J" + "x" * 10_000)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 300


STORED = [
    pa.bool_(),
    *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
    *(pa.float16(), pa.float32(), pa.float64()),
    *(pa.decimal32(5), pa.decimal64(10), pa.decimal128(20, 3), pa.decimal256(50, 3)),
    *(pa.date32(), pa.date64(), pa.time32("ms"), pa.time64("ns"), pa.duration("us"), pa.month_day_nano_interval()),
    *(pa.timestamp("s"), pa.timestamp("ns", "Europe/Berlin")),
    *(pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.binary(16)),
    *(pa.list_(pa.int8()), pa.large_list(pa.string()), pa.list_(pa.float32(), 3)),
    pa.struct([("a", pa.int8()), ("b", pa.list_(pa.struct([("c", pa.string())])))]),
    pa.map_(pa.string(), pa.list_(pa.int32())),
]


@pytest.mark.parametrize("type_", STORED, ids=str)
def test_type_stored(type_: pa.DataType) -> None:
    schema = pa.schema([("id", pa.int64()), ("value", type_)])
    assert check_table("t", schema, ["id"]) == (schema, ("id",))


@pytest.mark.parametrize(
    ("type_", "advice"),
    [
        (pa.dictionary(pa.int8(), pa.string()), "cast to string"),
        (pa.run_end_encoded(pa.int32(), pa.int64()), "cast to int64"),
        (pa.uuid(), r"cast to fixed_size_binary\[16\]"),
        (pa.json_(), "cast to string"),
        (pa.string_view(), "cast to string or large_string"),
        (pa.binary_view(), "cast to binary or large_binary"),
        (pa.list_view(pa.int8()), "cast to list or large_list"),
        (pa.large_list_view(pa.int8()), "cast to list or large_list"),
        (pa.dense_union([pa.field("a", pa.int8())]), "struct with one nullable field"),
        (pa.sparse_union([pa.field("a", pa.int8())]), "struct with one nullable field"),
        (pa.null(), "give the column a type"),
        (pa.binary(0), "use another type"),
        (pa.list_(pa.int8(), 0), "use another type"),
        (pa.struct([]), "at least one field"),
        (pa.struct([("a", pa.int8()), ("a", pa.int8())]), "stands twice"),
        (pa.list_(pa.struct([("x", pa.dictionary(pa.int8(), pa.string()))])), "cast to string"),
        (pa.map_(pa.string(), pa.string_view()), "cast to string or large_string"),
    ],
    ids=str,
)
def test_type_refused_with_advice(type_: pa.DataType, advice: str) -> None:
    with pytest.raises(UsageError, match=f"'t', column 'value'.*{advice}"):
        check_table("t", pa.schema([("id", pa.int64()), ("value", type_)]), ["id"])


def nested(levels: int) -> pa.DataType:
    type_ = pa.int8()
    for _ in range(levels - 1):
        type_ = pa.list_(type_)
    return type_


def test_nesting_is_limited() -> None:
    check_table("t", pa.schema([("id", pa.int64()), ("v", nested(NESTING_LEVELS_MAX))]), ["id"])
    with pytest.raises(UsageError, match=f"at most {NESTING_LEVELS_MAX} levels"):
        check_table("t", pa.schema([("id", pa.int64()), ("v", nested(NESTING_LEVELS_MAX + 1))]), ["id"])


def test_number_of_columns_is_limited() -> None:
    check_table("t", pa.schema([(f"c{i}", pa.int8()) for i in range(COLUMNS_MAX)]), ["c0"])
    with pytest.raises(UsageError, match=f"1 to {COLUMNS_MAX} columns, this schema has {COLUMNS_MAX + 1}"):
        check_table("t", pa.schema([(f"c{i}", pa.int8()) for i in range(COLUMNS_MAX + 1)]), ["c0"])
    with pytest.raises(UsageError, match="has 0"):
        check_table("t", pa.schema([]), ["c0"])
    wide = pa.struct([(f"f{i}", pa.int8()) for i in range(FIELDS_MAX)])
    with pytest.raises(UsageError, match=f"at most {FIELDS_MAX} columns and nested fields"):
        check_table("t", pa.schema([("id", pa.int8()), ("w", wide)]), ["id"])


@pytest.mark.parametrize("name", ["", "a\nb", "a\0", "\x85", "\u2028", "é" * 129, "_marble_index"], ids=ascii)
def test_column_name_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a column"):
        check_table("t", pa.schema([("id", pa.int64()), (name, pa.int8())]), ["id"])


@pytest.mark.parametrize("name", ["a b", "größe", "é" * 128, "日本", "\U0001f600", "a.b", "ORDER", "_marble"])
def test_column_name_accepted(name: str) -> None:
    assert check_table("t", pa.schema([(name, pa.int64())]), [name])[1] == (name,)


def test_column_names_differ() -> None:
    with pytest.raises(UsageError, match="'a' stands twice"):
        check_table("t", pa.schema([("a", pa.int64()), ("a", pa.int8())]), ["a"])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ([], "at least one key column, e.g. key=\\['id'\\]"),
        ("id", "must be a list of column names"),
        ([1], "must be a list of column names"),
        (None, "must be a list of column names"),
        (["id", "id"], "stands twice in the key"),
        (["idd"], "'idd' is not in the schema; did you mean 'id'"),
    ],
)
def test_key_refused(key: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_table("t", SCHEMA, key)


@pytest.mark.parametrize("type_", STORED, ids=str)
def test_key_types_are_those_that_the_codec_encodes(type_: pa.DataType) -> None:
    schema = pa.schema([("id", type_)])
    try:
        KeyCodec(schema)
    except UsageError:
        with pytest.raises(UsageError, match="cannot be in the key"):
            check_table("t", schema, ["id"])
    else:
        assert check_table("t", schema, ["id"]) == (schema, ("id",))


def test_schema_must_be_one() -> None:
    with pytest.raises(UsageError, match=r"must be a pyarrow\.Schema, got dict"):
        check_table("t", {"id": "int64"}, ["id"])


def test_metadata_is_dropped_everywhere() -> None:
    inner = pa.field("i", pa.int8(), nullable=False, metadata={"m": "1"})
    schema = pa.schema(
        [pa.field("id", pa.int64(), metadata={"m": "2"}), ("s", pa.struct([inner])), ("l", pa.list_(inner))],
        metadata={"pandas": "{}"},
    )
    stored, _ = check_table("t", schema, ["id"])
    assert stored.equals(schema)
    assert stored.metadata is None
    assert stored.field("id").metadata is None
    assert stored.field("s").type.field(0).metadata is None
    assert stored.field("l").type.value_field.metadata is None
    assert not stored.field("s").type.field(0).nullable


def test_nearest() -> None:
    assert nearest("flihgts", ["flights", "planes"]) == "; did you mean 'flights'?"
    assert nearest("zzz", ["b", "a"]) == "; there is 'b', 'a'"
    assert nearest("zzz", []) == ""
    assert nearest("zzz", [f"column_{i}" for i in range(20)]) == ""


def test_table_info_derives_schemas() -> None:
    info = table(pa.schema([("a", pa.int8()), pa.field("b", pa.string(), nullable=False)]), ("b", "a"))
    assert info.key_schema.names == ["b", "a"]
    assert info.lookup_schema == pa.schema([("a", pa.int8()), ("b", pa.string())])
    assert info == TableInfo(1, "people", info.schema, ("b", "a"))
    assert info != TableInfo(2, "people", info.schema, ("b", "a"))
    assert info.same_definition(info.schema, ["b", "a"])
    assert not info.same_definition(info.schema, ["a", "b"])
    assert not info.same_definition(SCHEMA, ["b", "a"])
