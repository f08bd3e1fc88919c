"""Which keys a call means: ranges of encoded keys (`marble._core.key_codec`) out of prefixes and bounds.

Values become keys by the rules by which keys of look-ups do: what its column cannot hold as it is, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from marble._core.key_codec import KeyCodec, prefix_end
from marble.database.arguments import key_columns
from marble.errors import UsageError
from marble.schema import TableInfo

Range = tuple[bytes | None, bytes | None]
"""Keys with ``lower <= key < upper``; None is no bound."""


def key_range(table: TableInfo, prefix: object, between: object) -> Range:
    """The keys that begin with `prefix` and whose next columns lie in `between`.

    Parameters
    ----------
    table
        The table.
    prefix
        Values of the first key columns: one value, or a tuple of values. None: any.
    between
        A pair of bounds of the key columns that follow, each a value, a tuple of values, or None for no bound. Both belong
        to the range, and so do all keys that begin with them. None: any.

    Raises
    ------
    UsageError
        A value does not fit its column, or there are more values than key columns.
    """
    first = () if prefix is None else _values(prefix)
    common = _encode(table, first, "prefix")
    lower, upper = common or None, prefix_end(common) if common else None
    if between is None:
        return lower, upper
    if isinstance(between, str | bytes) or not isinstance(between, Sequence) or len(between) != 2:
        raise UsageError(f"table {table.name!r}: between is a pair (from, to), each may be None, not {between!r}")
    low, high = between
    if low is not None:
        lower = _encode(table, first + _values(low), "between")
    if high is not None:
        upper = prefix_end(_encode(table, first + _values(high), "between"))
    return lower, upper


def within(keys: Range, others: tuple[bytes, bytes | None] | None) -> Range:
    """The keys of `keys` that lie in `others` too; None means all."""
    if others is None:
        return keys
    lower, upper = max(keys[0] or b"", others[0]), [end for end in (keys[1], others[1]) if end is not None]
    return lower or None, min(upper, default=None)


def _values(given: object) -> tuple[object, ...]:
    return given if isinstance(given, tuple) else (given,)


def _encode(table: TableInfo, values: tuple[object, ...], what: str) -> bytes:
    if not values:
        return b""
    if len(values) > len(table.key):
        raise UsageError(f"table {table.name!r}: {what} has more values than the key has columns, {list(table.key)}")
    codec = KeyCodec(table.key_schema)
    encoded = codec.encode_values(values)
    if encoded is not None:
        return encoded
    batch = pa.RecordBatch.from_arrays(key_columns(table, [values]), names=list(table.key[: len(values)]))
    try:
        return codec.encode_prefix(batch)[0]
    except UsageError as error:
        raise UsageError(f"table {table.name!r}: {what}: {error}") from None
