"""The slow, obvious twin of ``marble._core.frame``: a frame from its documented bytes, without Arrow's help."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from marble._core.checksum import xxh3_64

COLUMNS = ("group", "index", "term", "kind", "session", "sequence", "time_us", "table", "checksum")
FORMATS = ("I", "Q", "Q", "B", "Q", "Q", "Q", "I", "Q")
FRONT_BYTES = 768
SEAL_AT = 656
MAGIC = b"marble-seal:"


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 64)


def encode(rows: Sequence[dict[str, Any]], segment: int, position: int, synced: int, chain: int) -> bytes:
    """The frame of `rows`, each a dict of the columns of ENTRY_SCHEMA."""
    buffers = [
        struct.pack(f"<{len(rows)}{f}", *(row[c] for row in rows)) for c, f in zip(COLUMNS, FORMATS, strict=True)
    ]
    payloads = [row["payload"] for row in rows]
    offsets = [sum(len(p) for p in payloads[:i]) for i in range(len(rows) + 1)]
    buffers += [struct.pack(f"<{len(offsets)}i", *offsets), b"".join(payloads)]
    body = b"".join(padded(buffer) for buffer in buffers)

    starts, at = [], 0
    for buffer in buffers:
        starts.append(at)
        at += len(padded(buffer))

    flat = bytearray(FRONT_BYTES - 8)

    def put(offset: int, layout: str, *values: int) -> None:
        struct.pack_into("<" + layout, flat, offset, *values)

    put(0, "I", 24)
    put(4, "7H", 14, 24, 12, 14, 4, 16, 8)
    put(24, "iIIhBxq", 20, 64 - 28, 600 - 32, 4, 3, len(body))
    put(48, "5H", 10, 24, 16, 4, 8)
    put(64, "iII4xq", 16, 92 - 68, 260 - 72, len(rows))
    put(92, "I20q", 10, *[len(rows), 0] * 10)
    places = []
    for i in range(10):
        places += [starts[i], 0, starts[i], len(buffers[i])]
    places += [starts[10], len(buffers[10])]
    put(260, "I42q", 21, *places)
    put(600, "II", 1, 616 - 604)
    put(608, "4H", 8, 12, 4, 8)
    put(616, "iII", 8, 628 - 620, 644 - 624)
    put(628, "I11s", 11, b"marble.seal")
    put(644, "I12s", 108, MAGIC)

    frame = bytearray(struct.pack("<iI", -1, FRONT_BYTES - 8) + flat + body)
    numbers = [len(frame), segment, position, synced, chain]
    text = "".join(f"{number:016x}" for number in numbers).encode() + b"0" * 16
    frame[SEAL_AT + 12 : SEAL_AT + 108] = text
    frame[SEAL_AT + 92 : SEAL_AT + 108] = f"{xxh3_64(frame):016x}".encode()
    return bytes(frame)


def is_sound(frame: bytes) -> bool:
    """Whether `frame` is exactly one record batch frame whose checksum is right."""
    if len(frame) < FRONT_BYTES or frame[SEAL_AT : SEAL_AT + 12] != MAGIC:
        return False
    zeroed = frame[: SEAL_AT + 92] + b"0" * 16 + frame[SEAL_AT + 108 :]
    return frame[SEAL_AT + 92 : SEAL_AT + 108] == f"{xxh3_64(zeroed):016x}".encode()


def clip(sizes: Sequence[int], row: int, end: int, bytes_max: int) -> tuple[int, int]:
    """Twin of ``frame.clip`` over payload sizes."""
    stop = row + 1
    while stop < end and sum(sizes[row : stop + 1]) <= max(bytes_max, 0):
        stop += 1
    return stop, sum(sizes[row:stop])
