"""What a filter says about keys and about blocks of files, so that a scan need not read what cannot pass.

Rule 1: everything here is necessary for a row to pass. Only where `PushedDown.exact` says that it is sufficient, too, need
the filter not be applied to what was read.
Rule 2: a constant counts only if it is exactly a value of the column's type; a comparison that Arrow makes in a wider
type is left to Arrow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from marble._core.expression import key_bounds
from marble._core.key_codec import prefix_end
from marble._core.lsm import conjuncts
from marble.errors import UsageError
from marble.lsm.keyrange import NOTHING, KeyRange, encode_start, prefix_range
from marble.schema import TableInfo

MayMatch = Callable[[pa.RecordBatch], pa.BooleanArray]
"""From the zone maps of a file (`marble._core.sstable.SSTable.zone_maps`) to which of its blocks can hold a row."""

_BYTES = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


@dataclass(frozen=True, slots=True)
class _Demand:
    """``column op value``. Of ``in``, value is a pair: the least and the greatest."""

    column: str
    op: str
    value: Any


class PushedDown(NamedTuple):
    """Where rows that pass a filter can be.

    Attributes
    ----------
    keys
        The range of their keys.
    may_match
        What to ask of blocks, None if nothing is to be gained by it.
    exact
        Whether all rows in ``keys`` pass: the filter says no more than that.
    """

    keys: KeyRange
    may_match: MayMatch | None = None
    exact: bool = False


def push_down(info: TableInfo, filter: pc.Expression) -> PushedDown:  # noqa: A002
    """Say where rows of a table that pass `filter` can be."""
    bounds = key_bounds(filter, info.key_schema)
    if bounds is not None:
        return PushedDown(KeyRange(*bounds), exact=True)
    try:
        said = conjuncts(filter)
    except pa.ArrowNotImplementedError:  # It names columns by number, which Arrow cannot write down.
        return PushedDown(KeyRange())
    demands = [demand for found in said if (demand := _demand(info.schema, *found)) is not None]
    keys = _key_range(info, demands)
    # What the range of keys says already is not asked of blocks again.
    others = [demand for demand in demands if demand.column != info.key[0]]
    return PushedDown(keys, None if not others else lambda zones: _may_match(zones, others))


def living_blocks(info: TableInfo, expired_until: int, also: MayMatch | None = None) -> MayMatch:
    """What to ask of blocks of a table whose rows live for a time: whether any row of them is not over, and what `also` asks.

    A block whose rows are all over may hide older rows of its keys, which live: that it is read then is up to whoever asks.
    """
    column = info.options.ttl_column

    def may_match(zones: pa.RecordBatch) -> pa.BooleanArray:
        result = pa.array([True] * zones.num_rows, pa.bool_()) if also is None else also(zones)
        if f"{column}.max" not in zones.schema.names:
            return result
        latest = zones.column(f"{column}.max")
        times = latest.view(pa.int32() if latest.type.bit_width == 32 else pa.int64())
        # A row without a time stays.
        lives = pc.or_kleene(pc.greater(times, expired_until), pc.greater(zones.column(f"{column}.nulls"), 0))
        return pc.and_kleene(result, lives).fill_null(True)

    return may_match


def _demand(schema: pa.Schema, column: str, op: str, value: pa.Scalar | pa.Array) -> _Demand | None:
    if schema.get_field_index(column) < 0:
        return None
    type_ = schema.field(column).type
    if op == "in":
        values = value.drop_null()
        if len(values) == 0 or len(values) < len(value) or not _has_order(type_):
            return None
        exact = [each for each in (_exact(each, type_) for each in values) if each is not None]
        if len(exact) < len(values):
            return None
        least = pc.min_max(pa.array([each.as_py() for each in exact], type_))
        return _Demand(column, op, (least["min"], least["max"]))
    exact_value = _exact(value, type_)
    if exact_value is None or (op == "starts_with" and type_ not in _BYTES):
        return None
    return _Demand(column, op, exact_value)


def _has_order(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or type_ in _BYTES)


def _exact(value: pa.Scalar, type_: pa.DataType) -> pa.Scalar | None:
    """`value` as one of the column's type, if it is one."""
    # Arrow would compare the column as floats, and so find numbers equal that are not.
    if pa.types.is_floating(value.type) and not pa.types.is_floating(type_):
        return None
    try:
        cast = value.cast(type_)
        same = cast.is_valid and cast.cast(value.type).equals(value)
    except pa.ArrowException:
        return None
    return cast if same else None


def _key_range(info: TableInfo, demands: list[_Demand]) -> KeyRange:
    """Equal values of the first key columns, and bounds of the one behind them."""
    start: list[pa.Scalar] = []
    found = KeyRange()
    for column in info.key:
        equal = None
        for demand in demands:
            if demand.column != column:
                continue
            try:
                found &= _range_of(info, start, demand)
            except UsageError:  # A NaN, to which nothing compares: no row passes, and Arrow knows.
                continue
            if demand.op == "==":
                equal = demand.value
        if equal is None:
            break
        start.append(equal)
    return found


def _range_of(info: TableInfo, start: list[pa.Scalar], demand: _Demand) -> KeyRange:
    """Keys that begin with `start`, and whose next column is as demanded."""
    within = prefix_range(info, start) if start else KeyRange()
    if demand.op == "starts_with":
        return within & prefix_range(info, [*start, demand.value], text=True)
    if demand.op == "in":
        least, greatest = demand.value
        return _range_of(info, start, _Demand(demand.column, ">=", least)) & _range_of(
            info, start, _Demand(demand.column, "<=", greatest)
        )
    first = encode_start(info, [*start, demand.value])
    behind = prefix_end(first)
    if demand.op == "==":
        return KeyRange(first, behind)
    if demand.op == "<":
        return within & KeyRange(upper=first)
    if demand.op == "<=":
        return within & KeyRange(upper=behind)
    if demand.op == ">=":
        return within & KeyRange(first)
    return NOTHING if behind is None else within & KeyRange(behind)


def _may_match(zones: pa.RecordBatch, demands: list[_Demand]) -> pa.BooleanArray:
    result = pa.array([True] * zones.num_rows, pa.bool_())
    for demand in demands:
        low, high = f"{demand.column}.min", f"{demand.column}.max"
        if low in zones.schema.names and high in zones.schema.names:
            result = pc.and_kleene(result, _holds(demand, zones.column(low), zones.column(high)))
    return result.fill_null(True)


def _holds(demand: _Demand, least: pa.Array, greatest: pa.Array) -> pa.BooleanArray:
    """Whether each zone can hold a value as demanded; null where nothing is known of it."""
    op, value = demand.op, demand.value
    if op == "starts_with":
        start = value.cast(pa.binary())
        end = prefix_end(start.as_py())
        above = pc.greater_equal(greatest.cast(pa.binary()), start)
        return above if end is None else pc.and_kleene(above, pc.less(least.cast(pa.binary()), pa.scalar(end)))
    if op == "<":
        return pc.less(least, value)
    if op == "<=":
        return pc.less_equal(least, value)
    if op == ">":
        return pc.greater(greatest, value)
    if op == ">=":
        return pc.greater_equal(greatest, value)
    first, last = value if op == "in" else (value, value)
    return pc.and_kleene(pc.less_equal(least, last), pc.greater_equal(greatest, first))
