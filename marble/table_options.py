"""How a table is kept: what its owner chooses besides schema and key.

Rule 1: as in `marble.schema`: these rules are part of the replicated state machine and look at nothing but their arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.types as pt

from marble.errors import UsageError

TTL_US_MAX: Final = 2**53
"""285 years: the difference of a time and a time to live then fits every type of time."""

MERGE_OPERATORS: Final = ("sum", "min", "max", "count", "append", "last")
"""What a write does to a value that is there already; see `marble.lsm.merge`."""

_COMPRESSIONS: Final = (None, "lz4", "zstd")
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True, slots=True)
class TableOptions:
    """How a table is kept, alike on all replicas. See `check_options`.

    - ``compression``: of the files that are seldom written anew: ``"lz4"``, ``"zstd"`` or None.
    - ``ttl_column``, ``ttl_us``: a row is gone once the time in that column lies ``ttl_us`` microseconds or more behind the
      highest time of any entry. A row without a time stays. No column: all rows stay.
    - ``ttl_stamped``: that column is set to the time of the entry that writes the row, whatever the writer gave.
    - ``merge``: pairs of column and one of `MERGE_OPERATORS`, in the order of the columns. None at all: a row replaces the one
      with its key.
    """

    compression: str | None = None
    ttl_column: str | None = None
    ttl_us: int = 0
    ttl_stamped: bool = False
    merge: tuple[tuple[str, str], ...] = ()

    @property
    def filled(self) -> tuple[str, ...]:
        """The columns whose values apply makes: what a writer gives for them does not count."""
        counted = tuple(column for column, operator in self.merge if operator == "count")
        return (*counted, self.ttl_column) if self.ttl_stamped and self.ttl_column is not None else counted


DEFAULT_OPTIONS: Final = TableOptions()


def check_options(name: str, schema: pa.Schema, key: Sequence[str], options: TableOptions) -> TableOptions:
    """Return `options` if a table `name` of this `schema` and `key` (as `check_table` returned them) can have them.

    The TTL column is a timestamp, a date, or an int64 of microseconds since 1970 UTC.

    Raises
    ------
    UsageError
        Naming the table and what to do instead.
    """
    where = f"table {name!r}"
    if options.compression not in _COMPRESSIONS:
        raise UsageError(f"{where}: compression is 'lz4', 'zstd' or None, not {options.compression!a}")
    _check_merge(where, schema, key, options.merge)
    _check_ttl(where, schema, key, options)
    return options


def _check_ttl(where: str, schema: pa.Schema, key: Sequence[str], options: TableOptions) -> None:
    column = options.ttl_column
    if column is None:
        if options.ttl_us or options.ttl_stamped:
            raise UsageError(f"{where}: a time to live needs a column that says since when")
        return
    if column not in schema.names:
        raise UsageError(f"{where}: there is no column {column!a} for a time to live")
    if not _unit_ns(schema.field(column).type):
        raise UsageError(
            f"{where}, column {column!r}: rows cannot live by a {schema.field(column).type}: use a timestamp, a date, "
            "or an int64 of microseconds"
        )
    if type(options.ttl_us) is not int or not 0 < options.ttl_us <= TTL_US_MAX:
        raise UsageError(f"{where}: a time to live is 1 to {TTL_US_MAX} microseconds, not {options.ttl_us!a}")
    if options.ttl_stamped and (column in key or column in dict(options.merge)):
        raise UsageError(f"{where}, column {column!r}: what is stamped with the entry's time is neither key nor merged")


def _check_merge(where: str, schema: pa.Schema, key: Sequence[str], merge: Sequence[tuple[str, str]]) -> None:
    if [column for column, _ in merge] != [column for column in schema.names if column in dict(merge)]:
        unknown = [column for column, _ in merge if column not in schema.names]
        what = (
            f"there is no column {unknown[0]!a}" if unknown else "its columns stand in another order than the schema's"
        )
        raise UsageError(f"{where}: merge operators: {what}")
    for column, operator in merge:
        if operator not in MERGE_OPERATORS:
            known = ", ".join(repr(each) for each in MERGE_OPERATORS)
            raise UsageError(f"{where}, column {column!r}: {operator!a} is no merge operator; there is {known}")
        if column in key:
            raise UsageError(f"{where}, column {column!r}: the key says which row it is: it cannot be merged")
        type_ = schema.field(column).type
        advice = _merge_advice(operator, type_)
        if advice:
            raise UsageError(f"{where}, column {column!r}: {operator!r} cannot merge {type_}: {advice}")


def _merge_advice(operator: str, type_: pa.DataType) -> str:
    """What to use instead, if `operator` cannot merge values of `type_`."""
    if operator == "sum":
        number = pt.is_integer(type_) or pt.is_float32(type_) or pt.is_float64(type_)
        fits = number or pt.is_decimal128(type_) or pt.is_duration(type_)
        return "" if fits else "use an integer, float32, float64, decimal128 or duration"
    if operator == "count":
        return "" if type_ in (pa.int64(), pa.uint64()) else "use int64 or uint64"
    if operator == "append":
        flat = (pt.is_list(type_) or pt.is_large_list(type_)) and not pt.is_nested(type_.value_type)
        return "" if flat else "use a list or large_list of values that are no lists or structs themselves"
    if operator in ("min", "max"):
        unordered = pt.is_nested(type_) or pt.is_float16(type_) or pt.is_interval(type_)
        return "use a type that has an order, e.g. a number, a time or a string" if unordered else ""
    return ""


def fill(batch: pa.RecordBatch, schema: pa.Schema, options: TableOptions) -> pa.RecordBatch:
    """`batch` with columns of the table that it lacks: those that apply makes anyhow (`TableOptions.filled`), and those with a merge
    operator, in which nulls change nothing. Without any other column it stays, and is refused."""
    for name, _ in options.merge:
        if name not in (*batch.schema.names, *options.filled) and schema.field(name).nullable:
            batch = batch.append_column(schema.field(name), pa.nulls(batch.num_rows, schema.field(name).type))
    for name in options.filled:
        if name not in batch.schema.names:
            type_ = schema.field(name).type
            zeros = pa.repeat(pa.scalar(0, pa.int64()), batch.num_rows)
            zeros = zeros.cast(pa.int32()) if pt.is_date32(type_) else zeros
            batch = batch.append_column(schema.field(name), zeros.cast(type_))
    return batch


def expired_until(schema: pa.Schema, options: TableOptions, time_us: int) -> int | None:
    """The highest value of the TTL column that is gone at `time_us`, in that column's unit. None: no row ever is."""
    if options.ttl_column is None:
        return None
    value = (time_us - options.ttl_us) * 1000 // _unit_ns(schema.field(options.ttl_column).type)
    return max(_INT64_MIN, min(value, _INT64_MAX))


def time_value(type_: pa.DataType, time_us: int) -> pa.Scalar:
    """`time_us` as a value of a TTL column of `type_`: rounded down, and the latest that fits if it does not."""
    bits = 32 if pt.is_date32(type_) else 64
    value = min(time_us * 1000 // _unit_ns(type_), 2 ** (bits - 1) - 1)
    if pt.is_date64(type_):
        value -= value % 86_400_000
    return pa.scalar(value, pa.int32() if bits == 32 else pa.int64()).cast(type_)


def _unit_ns(type_: pa.DataType) -> int:
    """How many nanoseconds one unit of such a column has; 0 if it cannot be a TTL column."""
    if pt.is_timestamp(type_):
        return {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}[type_.unit]
    if pt.is_date32(type_):
        return 86_400_000_000_000
    if pt.is_date64(type_):
        return 1_000_000
    return 1_000 if type_ == pa.int64() else 0
