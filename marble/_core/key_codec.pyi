"""Memcomparable bytes of primary keys. Layout, ownership and invariants: head of ``key_codec.pyx``."""

from typing import Self, final

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
        duration, decimal128, string, binary (both also large), fixed_size_binary.

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
