"""The slow, obvious twin of marble._core.key_codec: one value at a time, by the layout written in key_codec.hpp."""

from __future__ import annotations

import decimal
import struct

import pyarrow as pa


def encode_value(value: object, type_: pa.DataType) -> bytes:
    """Encode what ``pa.Array.cast`` to integers, ``as_py`` or ``as_buffer`` gave for one value of `type_`."""
    if pa.types.is_boolean(type_):
        return bytes([bool(value)])
    if pa.types.is_floating(type_):
        value += 0.0  # -0.0 + 0.0 is 0.0
        letter, bits = (("f", 32), ("d", 64))[type_.bit_width == 64]
        number = int.from_bytes(struct.pack(f">{letter}", value), "big")
        number = number ^ (2**bits - 1) if number >> (bits - 1) else number | 1 << (bits - 1)
        return number.to_bytes(bits // 8, "big")
    if pa.types.is_decimal(type_):
        unscaled = int(value.scaleb(type_.scale, decimal.Context(prec=80)))
        return (unscaled + 2 ** (type_.bit_width - 1)).to_bytes(type_.bit_width // 8, "big")
    if pa.types.is_unsigned_integer(type_):
        return value.to_bytes(type_.bit_width // 8, "big")
    if pa.types.is_fixed_size_binary(type_):
        return value
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        return value.replace(b"\x00", b"\x00\xff") + b"\x00\x00"
    return (value + 2 ** (type_.bit_width - 1)).to_bytes(type_.bit_width // 8, "big")


def plain_values(column: pa.Array) -> list[object]:
    """Return Python values: integers for every type of time, whose Python classes know less than Arrow's."""
    type_ = column.type
    if pa.types.is_temporal(type_):
        return column.view(pa.int32() if type_.bit_width == 32 else pa.int64()).to_pylist()
    return column.to_pylist()


def encode(batch: pa.RecordBatch) -> list[bytes]:
    """Encode the rows of a batch of key columns."""
    columns = [[encode_value(v, c.type) for v in plain_values(c)] for c in batch.columns]
    return [b"".join(parts) for parts in zip(*columns, strict=True)]
