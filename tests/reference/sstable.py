"""The slow, obvious twin of marble._core.sstable: a file's bytes taken apart by what docs/lsm.md says; and small files."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import pyarrow as pa

from marble._core.checksum import xxh3_64
from marble._core.sstable import BlockCache, SSTable, SSTableInfo, SSTableWriter

MAGIC = b"marble-sstable:"
SEAL = (
    "version",
    "size",
    "header_bytes",
    "header_checksum",
    "index",
    "index_bytes",
    "index_checksum",
    "footer_checksum",
)
FIRST_PARTS = ("entries", "keys", "bloom", "zones")
INDEX_PARTS = (*FIRST_PARTS, "parts", "words")
"""Of the index section; version 1 had the first four."""
HEAD = (
    *("blocks", "rows", "tombstones", "first_index", "last_index", "has_ttl", "ttl_min", "ttl_max"),
    *(f"{part}_{what}" for part in INDEX_PARTS for what in ("offset", "bytes")),
)
ENTRY = (
    *("offset", "bytes", "checksum", "decoded_bytes", "first_index", "last_index", "key_offset"),
    *("first_key_bytes", "last_key_bytes", "metadata_bytes", "rows", "tombstones", "step"),
)
HEAD_FORMATS = {1: struct.Struct("<6Q2q8Q"), 2: struct.Struct("<6Q2q12Q")}
PART_BYTES = 512
ENTRY_FORMAT = struct.Struct("<7Q6I")


class Parts:
    """A file taken apart; `rebuild` puts changed numbers back, with every checksum right."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        (footer_bytes,) = struct.unpack_from("<I", data, len(data) - 10)
        self.footer = len(data) - 10 - footer_bytes
        self.seal_at = data.index(MAGIC, self.footer) + len(MAGIC)
        digits = [data[self.seal_at + 16 * i : self.seal_at + 16 * i + 16] for i in range(len(SEAL))]
        self.seal = dict(zip(SEAL, (int(each, 16) for each in digits), strict=True))
        self.head_at = (self.seal["index"] + 8 + 63) // 64 * 64
        self.head_format = HEAD_FORMATS.get(self.seal["version"], HEAD_FORMATS[2])
        self.head = dict(zip(HEAD, self.head_format.unpack_from(data, self.head_at), strict=False))
        self.entries_at = self.head_at + self.head["entries_offset"]
        self.entries = [
            dict(zip(ENTRY, ENTRY_FORMAT.unpack_from(data, self.entries_at + i * ENTRY_FORMAT.size), strict=True))
            for i in range(self.head["blocks"])
        ]

    def part(self, name: str) -> bytes:
        first = self.head_at + self.head[f"{name}_offset"]
        return bytes(self.data[first : first + self.head[f"{name}_bytes"]])

    def keys(self) -> list[tuple[bytes, bytes]]:
        found = []
        keys = self.part("keys")
        for entry in self.entries:
            middle = entry["key_offset"] + entry["first_key_bytes"]
            found.append((keys[entry["key_offset"] : middle], keys[middle : middle + entry["last_key_bytes"]]))
        return found

    def checksums(self) -> list[int]:
        """Those of the parts of all blocks that have parts."""
        found = []
        for entry in self.entries:
            block = self.data[entry["offset"] : entry["offset"] + entry["bytes"]]
            if entry["step"]:
                found += [xxh3_64(block[at : at + PART_BYTES]) & 0xFFFFFFFF for at in range(0, len(block), PART_BYTES)]
        return found

    def rebuild(self) -> bytes:
        if "parts_offset" in self.head:
            room = self.head["parts_bytes"] // 4
            struct.pack_into(f"<{room}I", self.data, self.head_at + self.head["parts_offset"], *self.checksums()[:room])
        for i, entry in enumerate(self.entries):
            entry["checksum"] = xxh3_64(self.data[entry["offset"] : entry["offset"] + entry["bytes"]])
            ENTRY_FORMAT.pack_into(self.data, self.entries_at + i * ENTRY_FORMAT.size, *entry.values())
        self.head_format.pack_into(self.data, self.head_at, *self.head.values())
        return self.seal_again()

    def seal_again(self) -> bytes:
        """Only what the footer says: the checksums of header, index section and footer."""
        index = self.seal["index"]
        self.seal["header_checksum"] = xxh3_64(self.data[: self.seal["header_bytes"]])
        self.seal["index_checksum"] = xxh3_64(self.data[index : index + self.seal["index_bytes"]])
        for number in (0, None):
            self.seal["footer_checksum"] = xxh3_64(self.data[self.footer :]) if number is None else number
            text = "".join(f"{each:016x}" for each in self.seal.values()).encode()
            self.data[self.seal_at : self.seal_at + len(text)] = text
        return bytes(self.data)


def as_version_1(data: bytes) -> bytes:
    """The file as marble wrote it before blocks had parts."""
    old = Parts(data)
    for i, entry in enumerate(old.entries):
        ENTRY_FORMAT.pack_into(old.data, old.entries_at + i * ENTRY_FORMAT.size, *{**entry, "step": 0}.values())
    numbers = {name: old.head[name] for name in HEAD[:8]}
    section = b""
    for name in FIRST_PARTS:
        numbers |= {f"{name}_offset": HEAD_FORMATS[1].size + len(section), f"{name}_bytes": old.head[f"{name}_bytes"]}
        section += old.part(name) + bytes(-len(old.part(name)) % 64)
    section = HEAD_FORMATS[1].pack(*numbers.values()) + section
    section = bytes(old.data[old.seal["index"] : old.head_at]) + section
    footer = bytes(old.data[old.footer :])
    size = old.seal["index"] + len(section) + len(footer)
    seal = {**old.seal, "version": 1, "size": size, "index_bytes": len(section)}
    text = "".join(f"{each:016x}" for each in seal.values()).encode()
    at = old.seal_at - old.footer
    footer = footer[:at] + text + footer[at + len(text) :]
    return Parts(bytes(old.data[: old.seal["index"]]) + section + footer).seal_again()


def bloom_has(bloom: bytes, key: bytes) -> bool:
    """Whether `key` may be in a filter."""
    hashed = xxh3_64(key)
    line = (hashed >> 32) * (len(bloom) // 64) >> 32
    bits = hashed & 0xFFFFFFFF
    for _ in range(6):
        bit = bits >> 23
        if not bloom[line * 64 + bit // 8] >> (bit % 8) & 1:
            return False
        bits = bits * 0x9E3779B9 & 0xFFFFFFFF
    return True


def write(
    batches: Iterable[pa.RecordBatch],
    key: Sequence[str] = ("k",),
    deleted: Iterable[Sequence[bool]] | None = None,
    first_index: int = 1,
    **options: object,
) -> tuple[bytes, SSTableInfo]:
    """Write batches of rows by key into a file; the indexes of their writes count up."""
    batches = list(batches)
    writer = SSTableWriter(batches[0].schema, list(key), **options)
    pieces = []
    for batch, flags in zip(batches, deleted or [None] * len(batches), strict=True):
        indexes = pa.array(range(first_index + writer.rows, first_index + writer.rows + batch.num_rows), pa.uint64())
        pieces += writer.add(batch, indexes, None if flags is None else pa.array(flags, pa.bool_()))
        assert writer.nbytes == sum(piece.size for piece in pieces)
    rest, info = writer.finish()
    data = b"".join(piece.to_pybytes() for piece in [*pieces, rest])
    assert len(data) == writer.nbytes == info.nbytes
    return data, info


def open_bytes(
    data: bytes, schema: pa.Schema, key: Sequence[str] = ("k",), cache_bytes: int = 1 << 24, name: str = "x.arrow"
) -> SSTable:
    buffer = pa.allocate_buffer(len(data))
    memoryview(buffer).cast("B")[:] = data
    return SSTable.open(buffer, schema, list(key), BlockCache(cache_bytes), name)


def rows_of(table: SSTable, *args: object, **options: object) -> list[dict[str, object]]:
    rows = []
    for batch in table.scan(*args, **options):
        batch.validate(full=True)
        assert batch.num_rows > 0
        rows += batch.to_pylist()
    return rows
