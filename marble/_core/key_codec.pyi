"""Memcomparable bytes of primary keys. Layout, ownership and invariants: head of ``key_codec.pyx``."""

from collections.abc import Iterable
from typing import Any, Self, final

import pyarrow as pa

@final
class KeyColumn:
    """Encoded keys of a batch, one per row; immutable. Made by `KeyCodec.encode` only."""

    @property
    def width(self) -> int | None:
        """Bytes of every key where all have the same, else None."""
    @property
    def nbytes(self) -> int:
        """Bytes held, offsets included."""
    def __len__(self) -> int: ...
    def to_pylist(self) -> list[bytes]:
        """Return each key as bytes, in row order."""

@final
class KeyCodec:
    """Turns the key columns of a table into bytes that sort (memcmp) as the keys do.

    Parameters
    ----------
    schema
        The key columns in key order, at least one. Types: bool, integers, float32 and float64, date, time, timestamp,
        duration, decimal, string, binary (both also large), fixed_size_binary.

    Raises
    ------
    UsageError
        No column, or a type that cannot be a key.
    """

    def __new__(cls, schema: pa.Schema) -> Self: ...
    @property
    def schema(self) -> pa.Schema:
        """The key columns."""
    @property
    def width(self) -> int | None:
        """Bytes of every encoded key where all have the same, else None."""
    def encode(self, batch: pa.RecordBatch) -> KeyColumn:
        """Encode the rows of `batch`, whose columns are exactly the key columns, in key order.

        Raises
        ------
        UsageError
            Other columns or types than `schema`, a null, or a NaN. The message names column and row.
        """
    def encode_prefix(self, batch: pa.RecordBatch, *, open_end: bool = False) -> list[bytes]:
        """Encode the first columns of keys: every key that begins with these values begins with these bytes.

        Parameters
        ----------
        batch
            Its columns are one or more of the key columns, from the first on, in key order.
        open_end
            The last of them may go on: text or bytes that begin with the value.

        Returns
        -------
        list of bytes
            One for each row. Keys that begin so are those in ``[prefix, prefix_end(prefix))``.

        Raises
        ------
        UsageError
            As `encode`; `open_end` with a last column that is neither string nor binary.
        """
    def encode_values(self, values: tuple[object, ...]) -> bytes | None:
        """Encode Python values of the first key columns, as `encode_prefix` encodes the arrays that pyarrow makes of them.

        None: that must decide, since a value is of another class than its column's, does not fit it, or is of a type
        that is not encoded here; or there are more values than columns.
        """
    def decode(self, keys: Iterable[bytes]) -> pa.RecordBatch:
        """Return the key columns of encoded keys, a row for each. -0.0 comes back as 0.0.

        Raises
        ------
        UsageError
            Bytes that are no key of this codec.
        """

def type_of_all(values: list[Any] | tuple[Any, ...]) -> type | None:
    """Return the type that all of `values` have, exactly; None if there are several, or no values."""

def prefix_end(prefix: bytes) -> bytes | None:
    """Return the smallest bytes that lie above all that begin with `prefix`; None if nothing does."""
