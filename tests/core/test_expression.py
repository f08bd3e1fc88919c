"""Filters that are ranges of keys, against what Arrow finds with them, and what type an expression has."""

from __future__ import annotations

import random

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from reference import key_codec

from marble._core.expression import expression_type, key_bounds
from marble.errors import UsageError

TEXTS = ["", "a", "a\0", "a\0b", "ab", "abc", "b", "\x7f", "é", "\U0010ffff"]
BYTES = [b"", b"\0", b"a", b"a\0", b"a\xff", b"\xfe", b"\xff", b"\xff\xff"]
VALUES: dict[pa.DataType, list[object]] = {
    pa.string(): [*TEXTS],
    pa.large_string(): [*TEXTS],
    pa.binary(): [*BYTES],
    pa.large_binary(): [*BYTES],
    pa.int8(): [-128, -1, 0, 1, 127],
    pa.int32(): [-(2**31), -5, 0, 5, 2**31 - 1],
    pa.int64(): [-(2**63), -1, 0, 1, 2**63 - 1],
    pa.uint8(): [0, 1, 254, 255],
    pa.uint16(): [0, 3, 2**16 - 1],
}


def make_conjunct(chance: random.Random, column: str, type_: pa.DataType) -> pc.Expression:
    field, value = pc.field(column), chance.choice(VALUES[type_])
    if isinstance(value, str | bytes) and chance.random() < 0.3:
        return pc.starts_with(field, value)
    near = [other for other in VALUES if isinstance(VALUES[other][0], type(value))]
    try:
        constant = pa.scalar(value, chance.choice([type_, *near]))
    except (pa.ArrowInvalid, OverflowError):
        constant = pa.scalar(value, type_)
    left, right = (field, constant) if chance.random() < 0.7 else (pc.scalar(constant), field)
    compare = chance.choice([pc.equal, pc.less, pc.less_equal, pc.greater, pc.greater_equal])
    return compare(left, right)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_a_range_of_keys_holds_just_the_rows_that_pass(seed: int) -> None:
    chance = random.Random(seed)
    types = [chance.choice(list(VALUES)) for _ in range(3)]
    names = ["x", "y", "z"]
    schema = pa.schema(list(zip(names, types, strict=True)))
    rows = [[chance.choice(VALUES[type_]) for type_ in types] for _ in range(120)]
    batch = pa.RecordBatch.from_arrays(
        [pa.array(column, type_) for column, type_ in zip(zip(*rows, strict=True), types, strict=True)], schema=schema
    )
    encoded = key_codec.encode(batch)
    places = pa.array(range(batch.num_rows))
    known = 0
    while known < 60:
        used = chance.choices(range(3), weights=[4, 2, 1], k=chance.randrange(1, 5))
        conjuncts = [make_conjunct(chance, names[i], types[i]) for i in used]
        filter_ = conjuncts[0]
        for conjunct in conjuncts[1:]:
            filter_ &= conjunct
        bounds = key_bounds(filter_, schema)
        if bounds is None:
            assert len(used) > 1 or used[0] > 0, filter_
            continue
        known += 1
        lower, upper = bounds
        found = [i for i, key in enumerate(encoded) if lower <= key and (upper is None or key < upper)]
        assert found == batch.append_column("place", places).filter(filter_).column("place").to_pylist(), filter_


def test_columns_behind_one_that_is_equal_to_a_constant() -> None:
    schema = pa.schema([("a", pa.uint8()), ("b", pa.binary()), ("c", pa.int8())])
    a, b, c = pc.field("a"), pc.field("b"), pc.field("c")
    assert key_bounds((a == 1) & (b == b"x") & (c > 2), schema) == (b"\1x\0\0\x83", b"\1x\0\1")
    assert key_bounds((c > 2) & (a == 1) & (b == b"x"), schema) == (b"\1x\0\0\x83", b"\1x\0\1")
    assert key_bounds((a == 1) & pc.starts_with(b, b"x\0"), schema) == (b"\1x\0\xff", b"\1x\1")
    assert key_bounds((a == 255) & pc.starts_with(b, b"\xff"), schema) == (b"\xff\xff", None)
    assert key_bounds(a > 255, schema) == (b"", b"")
    assert key_bounds(pc.starts_with(b, b""), pa.schema([schema.field("b")])) == (b"", None)


def test_what_is_left_to_others() -> None:
    schema = pa.schema(
        [("s", pa.string()), ("n", pa.int32()), ("f", pa.float64()), ("t", pa.timestamp("us")), ("y", pa.bool_())]
    )
    s, n = pc.field("s"), pc.field("n")
    deep = s == "a"
    for _ in range(150):
        deep = (s == "a") & deep
    for filter_ in (
        s != "a",
        ~(s == "a"),
        s.isin(["a"]),
        s.is_valid(),
        n == 3,
        (s > "a") & (n == 3),
        (s == "a") | (s == "b"),
        (s == "a") & (n == 2.5),
        (s == "a") & (n == 2**31),
        (s == "a") & (n < pa.scalar(None, pa.int32())),
        (s == "a") & (n < n),
        (s == "a") & (pc.field("v") > 1),
        s == pc.field("v"),
        pc.starts_with(s, "a", ignore_case=True),
        pc.starts_with(pc.utf8_lower(s), "a"),
        pc.starts_with(n, "a"),
        pc.Expression._call("starts_with", [s], pc.SplitPatternOptions("a")),
        pc.equal(pc.utf8_lower(s), "a"),
        pc.field(0) == "a",
        pc.field("s", "s") == "a",
        pc.scalar(True),
        s,
        deep,
    ):
        assert key_bounds(filter_, schema) is None, filter_
    for name, value in (("f", 1.0), ("t", pa.scalar(3, pa.timestamp("ms"))), ("t", 3), ("y", True)):
        assert key_bounds(pc.field(name) == value, pa.schema([schema.field(name)])) is None


def test_what_an_expression_gives() -> None:
    schema = pa.schema([("n", pa.int32()), ("s", pa.string())])
    n, s = pc.field("n"), pc.field("s")
    assert expression_type(n > 1, schema) == pa.bool_()
    assert expression_type(pc.scalar(True), schema) == pa.bool_()
    assert expression_type(n + n, schema) == pa.int32()
    assert expression_type(pc.field(1), schema) == pa.string()
    for wrong in (pc.field("m") > 1, s > 1, pc.starts_with(n, "a"), pc.field(2) == 1, pc.field("n", "x") == 1):
        with pytest.raises(UsageError):
            expression_type(wrong, schema)


def test_what_is_no_expression_is_refused() -> None:
    schema = pa.schema([("n", pa.int32())])
    for call in (key_bounds, expression_type):
        for wrong in (None, "n", 3):
            with pytest.raises(TypeError):
                call(wrong, schema)  # type: ignore[operator]
        with pytest.raises(UsageError):
            call(pc.field("n") == 1, "n")  # type: ignore[operator]
