"""A replica held against the source, value by value.

Rule 1: "identical" is said only when every key and every value was compared; a null equals only a null, a NaN only a
NaN, and 0.0 is not -0.0 except in a key, where the table itself makes them one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs between the source and a replica.

    - ``missing``: keys of the source that the replica lacks; ``extra``: keys that only the replica has;
      ``repeated``: rows of the replica beyond the first of their key.
    - ``differing``: column name to the number of rows whose value differs; counted only where the keys agree.
    - ``problem`` is empty or says the first difference in words.
    """

    rows: int
    missing: int = 0
    extra: int = 0
    repeated: int = 0
    differing: dict[str, int] = field(default_factory=dict)
    problem: str = ""

    @property
    def identical(self) -> bool:
        """Whether nothing differs."""
        return not self.problem


def compare(source: pa.Table, replica: pa.Table, key: Sequence[str]) -> Comparison:
    """Compare `replica`, whose rows may be in any order, with `source`, which is sorted by the unique `key`.

    Returns
    -------
    Comparison
        ``identical`` if both hold the same columns of the same types, the same keys once each, and the same values.
    """
    expected, got = _types(source), _types(replica)
    if expected != got:
        columns = [name for name in expected | got if expected.get(name) != got.get(name)]
        lines = ", ".join(f"{name}: {expected.get(name, 'none')} became {got.get(name, 'none')}" for name in columns)
        return Comparison(replica.num_rows, problem=f"the columns differ ({lines})")
    order = pc.sort_indices(replica, sort_keys=[(column, "ascending") for column in key])
    replica = replica.take(order)
    same_length = source.num_rows == replica.num_rows
    if not same_length or not all(_differing(source[column], replica[column], True) is None for column in key):
        return _compare_keys(source, replica, key)
    differing: dict[str, int] = {}
    problem = ""
    for column in source.column_names:
        if column in key:
            continue
        mask = _differing(source[column], replica[column], False)
        if mask is None:
            continue
        differing[column] = pc.sum(mask).as_py()
        if not problem:
            row = pc.index(mask, True).as_py()
            where = {name: source[name][row].as_py() for name in key}
            was, now = source[column][row].as_py(), replica[column][row].as_py()
            problem = f"{column} of the row {where} is {now!r}, not {was!r}"
    if differing:
        counts = ", ".join(f"{column} in {count:,} rows" for column, count in differing.items())
        problem = f"values differ: {counts}; first: {problem}"
    return Comparison(replica.num_rows, differing=differing, problem=problem)


def _types(table: pa.Table) -> dict[str, str]:
    # Nullability is left out on purpose: a table makes its key columns non-nullable.
    return {f.name: str(f.type) for f in table.schema}


def _differing(expected: pa.ChunkedArray, got: pa.ChunkedArray, in_key: bool) -> pa.ChunkedArray | None:
    """None if both columns hold the same; otherwise a boolean for each row, true where they differ."""
    # Arrow's equality finds NaN unequal to itself and the two zeros equal, so it decides only where no float is.
    if expected.equals(got) and (in_key or not _holds_floats(expected.type)):
        return None
    try:
        if pa.types.is_floating(expected.type) and not in_key:
            expected, got = _bits(expected), _bits(got)
        unequal = pc.not_equal(expected, got)
        null = pc.xor(pc.is_null(expected), pc.is_null(got))
        mask = pc.or_(pc.fill_null(unequal, False), null)
    except pa.ArrowNotImplementedError:
        # Nested types have no comparison of their own. `repr` tells NaN from null and the two zeros apart.
        pairs = zip(expected.to_pylist(), got.to_pylist(), strict=True)
        mask = pa.chunked_array([pa.array([repr(one) != repr(other) for one, other in pairs], pa.bool_())])
    return mask if pc.any(mask).as_py() else None


def _holds_floats(type_: pa.DataType) -> bool:
    children = (type_.field(position).type for position in range(type_.num_fields))
    return pa.types.is_floating(type_) or any(_holds_floats(child) for child in children)


def _bits(column: pa.ChunkedArray) -> pa.ChunkedArray:
    # All NaN are made one; every other value is told apart by its bits.
    nan = pa.scalar(float("nan"), column.type)
    normal = pc.if_else(pc.is_nan(column), nan, column)
    width = {16: pa.uint16(), 32: pa.uint32(), 64: pa.uint64()}[column.type.bit_width]
    return pa.chunked_array([chunk.view(width) for chunk in normal.chunks], width)


def _compare_keys(source: pa.Table, replica: pa.Table, key: Sequence[str]) -> Comparison:
    """The slow path, only taken when keys are known to differ."""
    expected, got = _count_keys(source, key), _count_keys(replica, key)
    missing = expected.keys() - got.keys()
    extra = got.keys() - expected.keys()
    repeated = sum(count - 1 for count in got.values())
    words = []
    for number, what, which in (
        (len(missing), "missing", min(missing, key=repr, default=None)),
        (len(extra), "not in the source", min(extra, key=repr, default=None)),
        (repeated, "repeated", next((one for one, count in got.items() if count > 1), None)),
    ):
        if number:
            words.append(f"{number:,} rows are {what}, e.g. {dict(zip(key, which or (), strict=True))}")
    return Comparison(
        replica.num_rows, len(missing), len(extra), repeated, problem="; ".join(words) or "the keys differ"
    )


def _count_keys(table: pa.Table, key: Sequence[str]) -> Counter[tuple[Any, ...]]:
    return Counter(zip(*(table[column].to_pylist() for column in key), strict=True))
