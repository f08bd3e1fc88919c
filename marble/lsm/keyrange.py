"""Parts of a table by key: from values of the leading key columns to bounds in bytes.

Bounds are in the encoding of `marble._core.key_codec`, and half open: a key lies in a range if ``lower <= key < upper``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from marble._core.key_codec import KeyCodec, prefix_end
from marble.errors import UsageError
from marble.schema import TableInfo


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Keys from `lower` up to, and without, `upper`; None: to the end."""

    lower: bytes = b""
    upper: bytes | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no bytes lie in it."""
        return self.upper is not None and self.upper <= self.lower

    def __contains__(self, key: bytes) -> bool:
        return self.lower <= key and (self.upper is None or key < self.upper)

    def __and__(self, other: KeyRange) -> KeyRange:
        """What lies in both."""
        uppers = [upper for upper in (self.upper, other.upper) if upper is not None]
        return KeyRange(max(self.lower, other.lower), min(uppers, default=None))


NOTHING = KeyRange(b"", b"")
"""A range without keys."""


def encode_start(info: TableInfo, values: Sequence[object], *, text: bool = False) -> bytes:
    """Encode values of the first key columns of a table.

    Parameters
    ----------
    info
        The table.
    values
        Of the key columns, from the first on; not all need to be there.
    text
        The last value is the beginning of a text, or of bytes, which may go on.

    Raises
    ------
    UsageError
        Too many or too few values, a value that is not of its column's type, a null or a NaN; `text` and the last column
        is neither text nor bytes.
    """
    if not 1 <= len(values) <= len(info.key):
        raise UsageError(f"a key of table {info.name!r} has 1 to {len(info.key)} columns {info.key}, got {len(values)}")
    fields = [info.key_schema.field(i) for i in range(len(values))]
    columns: list[pa.Array] = []
    for field, value in zip(fields, values, strict=True):
        try:
            if isinstance(value, pa.Scalar):
                columns.append(pa.repeat(value.cast(field.type), 1))
            else:
                columns.append(pa.array([value], field.type))
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise UsageError(f"{value!r} is no value of key column {field.name!r}, {field.type}: {error}") from None
    batch = pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))
    return KeyCodec(info.key_schema).encode_prefix(batch, open_end=text)[0]


def prefix_range(info: TableInfo, values: Sequence[object], *, text: bool = False) -> KeyRange:
    """Keys whose first columns have these values; parameters and errors as `encode_start`."""
    start = encode_start(info, values, text=text)
    return KeyRange(start, prefix_end(start))


def between_range(info: TableInfo, low: Sequence[object] | None, high: Sequence[object] | None) -> KeyRange:
    """Keys whose first columns are at least `low` and at most `high`, each compared as far as it goes.

    Parameters
    ----------
    info
        The table.
    low, high
        Values as in `encode_start`; None: from the first key, to the last.
    """
    lower = b"" if low is None else encode_start(info, low)
    upper = None if high is None else prefix_end(encode_start(info, high))
    return KeyRange(lower, upper)
