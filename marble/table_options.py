"""How a table is kept: what its owner chooses besides schema and key.

Rule 1: as in `marble.schema`: these rules are part of the replicated state machine and look at nothing but their arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.types as pt

from marble.errors import UsageError

TTL_US_MAX: Final = 2**53
"""285 years: the difference of a time and a time to live then fits every type of time."""


@dataclass(frozen=True, slots=True)
class TableOptions:
    """How a table is kept, alike on all replicas. See `check_options`.

    - ``compression``: of the files that are seldom written anew: ``"lz4"``, ``"zstd"`` or None.
    - ``ttl_column``, ``ttl_us``: a row is gone once the time in that column lies ``ttl_us`` microseconds or more behind the
      highest time of any entry. A row without a time stays. No column: all rows stay.
    """

    compression: str | None = None
    ttl_column: str | None = None
    ttl_us: int = 0


DEFAULT_OPTIONS: Final = TableOptions()


def check_options(name: str, schema: pa.Schema, options: TableOptions) -> TableOptions:
    """Return `options` if a table `name` of this `schema` (as `check_table` returned it) can have them.

    The TTL column is a timestamp, a date, or an int64 of microseconds since 1970 UTC.

    Raises
    ------
    UsageError
        Naming the table and what to do instead.
    """
    where, column = f"table {name!r}", options.ttl_column
    if options.compression not in (None, "lz4", "zstd"):
        raise UsageError(f"{where}: compression is 'lz4', 'zstd' or none, not {options.compression!a}")
    if column is None:
        if options.ttl_us:
            raise UsageError(f"{where}: a time to live needs a column that says since when")
        return options
    if column not in schema.names:
        raise UsageError(f"{where}: there is no column {column!a} for a time to live")
    if not _unit_ns(schema.field(column).type):
        raise UsageError(
            f"{where}, column {column!r}: rows cannot live by a {schema.field(column).type}: use a timestamp, a date, "
            "or an int64 of microseconds"
        )
    if type(options.ttl_us) is not int or not 0 < options.ttl_us <= TTL_US_MAX:
        raise UsageError(f"{where}: a time to live is 1 to {TTL_US_MAX} microseconds, not {options.ttl_us!a}")
    return options


def expired_until(schema: pa.Schema, options: TableOptions, time_us: int) -> int | None:
    """The highest value of the TTL column that is gone at `time_us`, in that column's unit. None: no row ever is."""
    if options.ttl_column is None:
        return None
    return (time_us - options.ttl_us) * 1000 // _unit_ns(schema.field(options.ttl_column).type)


def _unit_ns(type_: pa.DataType) -> int:
    """How many nanoseconds one unit of such a column has; 0 if it cannot be a TTL column."""
    if pt.is_timestamp(type_):
        return {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}[type_.unit]
    if pt.is_date32(type_):
        return 86_400_000_000_000
    if pt.is_date64(type_):
        return 1_000_000
    return 1_000 if type_ == pa.int64() else 0
