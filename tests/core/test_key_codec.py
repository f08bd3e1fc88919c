"""Encoded keys: equal to the twin's, and in the order of the keys."""

from __future__ import annotations

import datetime
import decimal
import itertools
import math
import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import key_codec as twin

from marble._core.key_codec import KeyCodec, KeyColumn
from marble.errors import UsageError


def integers(bits: int, signed: bool) -> st.SearchStrategy[int]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return st.integers(low, high) | st.sampled_from([low, low + 1, 0, 1, high - 1, high])


def floats(width: int) -> st.SearchStrategy[float]:
    edges = [0.0, -0.0, math.inf, -math.inf, 2.0**-126, -(2.0**-126), 2.0**-149, 1.0, -1.0]
    return st.floats(width=width, allow_nan=False) | st.sampled_from(edges)


def decimals(digits: int, scale: int) -> st.SearchStrategy[decimal.Decimal]:
    largest = 10**digits - 1
    unscaled = st.integers(-largest, largest) | st.sampled_from([-largest, -1, 0, 1, largest])
    return unscaled.map(lambda number: decimal.Decimal(number).scaleb(-scale, decimal.Context(prec=80)))


BYTES = st.lists(st.sampled_from([0, 0, 1, 0x7F, 0x80, 0xFE, 0xFF]), max_size=12).map(bytes)
TEXT = st.text(alphabet="\x00\x01aé\uffff\U0001f600", max_size=8)
TYPES: dict[pa.DataType, st.SearchStrategy[object]] = {
    pa.bool_(): st.booleans(),
    **{getattr(pa, f"int{bits}")(): integers(bits, True) for bits in (8, 16, 32, 64)},
    **{getattr(pa, f"uint{bits}")(): integers(bits, False) for bits in (8, 16, 32, 64)},
    pa.float32(): floats(32),
    pa.float64(): floats(64),
    pa.date32(): integers(32, True),
    pa.date64(): st.integers(-(10**6), 10**6).map(lambda days: days * 86_400_000),
    pa.time32("s"): st.integers(0, 86_399),
    pa.time32("ms"): st.integers(0, 86_399_999),
    pa.time64("us"): st.integers(0, 86_399_999_999),
    pa.time64("ns"): st.integers(0, 86_399_999_999_999),
    pa.timestamp("s"): integers(64, True),
    pa.timestamp("ns", "Europe/Berlin"): integers(64, True),
    pa.duration("ms"): integers(64, True),
    pa.decimal32(9, 2): decimals(9, 2),
    pa.decimal64(18, 3): decimals(18, 3),
    pa.decimal128(38, 4): decimals(38, 4),
    pa.decimal256(76, 7): decimals(76, 7),
    pa.string(): TEXT,
    pa.large_string(): TEXT,
    pa.binary(): BYTES,
    pa.large_binary(): BYTES,
    pa.binary(3): st.binary(min_size=3, max_size=3),
}


def column_of(values: list[object], type_: pa.DataType) -> pa.Array:
    """Times are given as integers: pyarrow's conversion knows a smaller range."""
    if pa.types.is_temporal(type_):
        return pa.array(values, pa.int32() if type_.bit_width == 32 else pa.int64()).view(type_)
    return pa.array(values, type_)


@pytest.mark.parametrize("type_", TYPES, ids=str)
def test_bytes_are_the_twins_and_sort_as_the_values(type_: pa.DataType) -> None:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(TYPES[type_], max_size=12), st.integers(0, 3))
    def check(values: list[object], cut: int) -> None:
        column = column_of(values, type_)[min(cut, len(values)) :]
        values = values[min(cut, len(values)) :]
        batch = pa.record_batch([column], names=["k"])
        encoded = KeyCodec(batch.schema).encode(batch).to_pylist()
        assert encoded == twin.encode(batch)
        for (a, a_bytes), (b, b_bytes) in itertools.combinations(zip(values, encoded, strict=True), 2):
            assert (a < b, a == b) == (a_bytes < b_bytes, a_bytes == b_bytes)

    check()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_several_columns_sort_as_tuples_and_no_key_is_a_prefix_of_another(data: st.DataObject) -> None:
    types = data.draw(st.lists(st.sampled_from(list(TYPES)), min_size=1, max_size=4))
    rows = data.draw(st.lists(st.tuples(*(TYPES[type_] for type_ in types)), max_size=8))
    columns = [column_of([row[i] for row in rows], type_) for i, type_ in enumerate(types)]
    batch = pa.record_batch(columns, names=[f"c{i}" for i in range(len(types))])
    codec = KeyCodec(batch.schema)
    column = codec.encode(batch)
    encoded = column.to_pylist()
    assert encoded == twin.encode(batch)
    lengths = {len(key) for key in encoded}
    assert column.width == (lengths.pop() if len(lengths) == 1 else codec.width)
    assert codec.width is None or {len(key) for key in encoded} <= {codec.width}
    for (a, a_bytes), (b, b_bytes) in itertools.permutations(zip(rows, encoded, strict=True), 2):
        assert (a < b, a == b) == (a_bytes < b_bytes, a_bytes == b_bytes)
        assert a == b or not a_bytes.startswith(b_bytes)


def test_leading_columns_are_a_prefix_of_the_key() -> None:
    batch = pa.record_batch({"s": ["a\x00b"], "n": pa.array([7], pa.int16())})
    whole = KeyCodec(batch.schema).encode(batch).to_pylist()[0]
    leading = batch.select(["s"])
    assert whole.startswith(KeyCodec(leading.schema).encode(leading).to_pylist()[0])


def test_bits_of_a_slice_start_where_the_slice_starts() -> None:
    values = [random.Random(3).random() < 0.5 for _ in range(50)]
    batch = pa.record_batch({"b": values}).slice(11, 21)
    assert KeyCodec(batch.schema).encode(batch).to_pylist() == [bytes([value]) for value in values[11:32]]


def test_negative_zero_is_zero() -> None:
    batch = pa.record_batch({"f": [-0.0, 0.0]})
    assert len(set(KeyCodec(batch.schema).encode(batch).to_pylist())) == 1


def test_an_empty_batch_has_no_keys() -> None:
    for type_ in TYPES:
        batch = pa.record_batch([pa.array([], type_)], names=["k"])
        column = KeyCodec(batch.schema).encode(batch)
        assert len(column) == 0
        assert column.to_pylist() == []


def test_a_null_is_refused_by_column_and_row() -> None:
    schema = pa.schema([("a", pa.int64()), ("b", pa.string())])
    batch = pa.record_batch([pa.array([1, 2, 3]), pa.array(["x", "y", None])], schema=schema)
    with pytest.raises(UsageError, match=r"key column 'b' is null in row 2"):
        KeyCodec(schema).encode(batch)
    with pytest.raises(UsageError, match=r"key column 'b' is null in row 1"):
        KeyCodec(schema).encode(batch.slice(1))
    assert len(KeyCodec(schema).encode(batch.slice(0, 2))) == 2


@pytest.mark.parametrize("type_", [pa.float32(), pa.float64()], ids=str)
def test_nan_is_refused_by_column_and_row(type_: pa.DataType) -> None:
    batch = pa.record_batch([pa.array([1.0, math.nan], type_)], names=["f"])
    with pytest.raises(UsageError, match=r"key column 'f' is NaN in row 1"):
        KeyCodec(batch.schema).encode(batch)


@pytest.mark.parametrize(
    "type_",
    [
        pa.null(),
        pa.float16(),
        pa.list_(pa.int8()),
        pa.struct([("x", pa.int8())]),
        pa.dictionary(pa.int8(), pa.string()),
        pa.string_view(),
        pa.month_day_nano_interval(),
        pa.binary(0),
    ],
    ids=str,
)
def test_other_types_are_refused(type_: pa.DataType) -> None:
    with pytest.raises(UsageError, match="key column 'k' has type"):
        KeyCodec(pa.schema([("k", type_)]))


def test_a_key_needs_a_column() -> None:
    with pytest.raises(UsageError, match="at least one column"):
        KeyCodec(pa.schema([]))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (pa.record_batch({"a": [1]}), "a key has 2 columns"),
        (pa.record_batch({"b": ["x"], "a": [1]}), "got 'b' for 'a'"),
        (pa.record_batch({"a": [1.5], "b": ["x"]}), "'a' has type int64, got double"),
        (pa.table({"a": [1], "b": ["x"]}), "expected a pyarrow.RecordBatch, got Table"),
        (None, "expected a pyarrow.RecordBatch, got NoneType"),
    ],
)
def test_other_batches_are_refused(batch: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        KeyCodec(pa.schema([("a", pa.int64()), ("b", pa.string())])).encode(batch)


@pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [0, 100, 2, 3], [0, -1, 2, 3], [0, 1, 2, 99], [-5, 1, 2, 3]])
@pytest.mark.parametrize("large", [False, True])
def test_broken_offsets_are_refused_and_not_followed(offsets: list[int], large: bool) -> None:
    memory = np.array([0, 1, 2, 3], np.int64 if large else np.int32)
    buffers = [None, pa.py_buffer(memory), pa.py_buffer(b"abc")]
    array = pa.Array.from_buffers(pa.large_binary() if large else pa.binary(), 3, buffers)
    batch = pa.record_batch([array], names=["k"])
    memory[:] = offsets  # Arrow itself would refuse some of these from the start.
    with pytest.raises(UsageError):
        KeyCodec(batch.schema).encode(batch)


def test_objects_are_made_by_the_codec_only() -> None:
    with pytest.raises(TypeError, match=r"comes from KeyCodec\.encode"):
        KeyColumn()
    with pytest.raises(TypeError, match=r"comes from KeyCodec\.encode"):
        KeyColumn.__new__(KeyColumn)
    with pytest.raises(UsageError, match=r"expected a pyarrow\.Schema"):
        KeyCodec([("a", pa.int64())])


def test_keys_outlive_batch_and_codec() -> None:
    batch = pa.record_batch({"d": [datetime.date(2013, 1, 1)]})
    codec = KeyCodec(batch.schema)
    column = codec.encode(batch)
    expected = twin.encode(batch)
    del batch, codec
    assert column.to_pylist() == expected


def test_values_are_encoded_as_arrow_would_or_not_at_all() -> None:
    schema = pa.schema([("s", pa.string()), ("n", pa.int16()), ("b", pa.binary()), ("y", pa.bool_())])
    codec = KeyCodec(schema)
    values = ("a\0é", -3, b"\xff\0", True)
    for count in range(1, 5):
        batch = pa.RecordBatch.from_pylist([dict(zip(schema.names, values, strict=True))], schema).select(
            schema.names[:count]
        )
        assert codec.encode_values(values[:count]) == codec.encode_prefix(batch)[0]
    assert codec.encode_values(()) == b""
    for wrong in ((3,), (b"a",), (None,), ("a", 2**15), ("a", 1.0), ("a", True), ("\ud800",), (*values, 1)):
        assert codec.encode_values(wrong) is None, wrong
