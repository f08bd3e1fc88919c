"""Files that are not what was written: every flipped bit is found, and no file makes the process die or answer wrongly."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Callable

import pyarrow as pa
import pytest
from reference.memtable import INT_SCHEMA, int_keys, ints
from reference.sstable import Parts, open_bytes, rows_of, write

from marble._core.sstable import SSTable
from marble.errors import CorruptionError, UsageError

SCHEMA = pa.schema([pa.field("k", pa.string(), False), pa.field("v", pa.string()), pa.field("n", pa.list_(pa.int8()))])
KEYS = [f"key {n}" for n in range(30)]


def small(compression: str | None = None) -> bytes:
    """About as small as a file can be that has two blocks, texts, lists and tombstones."""
    values = [None if n % 7 == 0 else "compressible " * 3 for n in range(30)]
    batch = pa.record_batch(
        [pa.array(sorted(KEYS)), pa.array(values), pa.array([[n] for n in range(30)])], schema=SCHEMA
    )
    flags = [n % 5 == 0 for n in range(30)]
    return write([batch], deleted=[flags], block_rows_max=16, compression=compression)[0]


def answers(table: SSTable) -> list[object]:
    rows, found, indexes = table.get_many(pa.record_batch([pa.array([*KEYS, "none"])], names=["k"]))
    rows.validate(full=True)
    return [rows_of(table), rows.to_pylist(), found.to_pylist(), indexes.to_pylist()]


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_every_flipped_byte_is_found(compression: str | None) -> None:
    data = small(compression)
    right = answers(open_bytes(data, SCHEMA))
    chance = random.Random(compression)
    refused = 0
    for at in range(len(data)):
        wrong = bytearray(data)
        wrong[at] ^= 1 << chance.randrange(8)
        with pytest.raises(CorruptionError, match=r"x\.arrow, offset \d+") as caught:
            open_bytes(wrong, SCHEMA).verify()
        assert caught.value.path == "x.arrow"
        assert caught.value.offset <= at
        # Reading without verifying: either the damage shows, or it lies where nobody looked.
        try:
            assert answers(open_bytes(wrong, SCHEMA)) == right
        except CorruptionError:
            refused += 1
    assert refused == len(data)


def test_every_bit_of_the_ends_is_under_a_checksum() -> None:
    data = small()
    parts = Parts(data)
    for at in [*range(parts.seal["header_bytes"]), *range(parts.footer, len(data))]:
        for bit in range(8):
            wrong = bytearray(data)
            wrong[at] ^= 1 << bit
            with pytest.raises(CorruptionError):
                open_bytes(wrong, SCHEMA)


def test_a_damaged_block_is_named_and_leaves_the_others_readable() -> None:
    data, _ = write([ints(range(100))], block_rows_max=10)
    entry = Parts(data).entries[4]
    wrong = bytearray(data)
    wrong[entry["offset"] + entry["bytes"] - 1] ^= 1
    table = open_bytes(wrong, INT_SCHEMA)
    assert table.get_many(int_keys([39, 50]))[1].true_count == 2
    for _ in range(2):
        with pytest.raises(CorruptionError, match=f"block 4 is damaged .x.arrow, offset {entry['offset']}") as caught:
            table.get_many(int_keys([1, 45]))
        assert caught.value.offset == entry["offset"]
    scan = table.scan()
    assert [next(scan).num_rows for _ in range(4)] == [10] * 4
    for _ in range(2):
        with pytest.raises(CorruptionError, match="block 4"):
            next(scan)


def test_a_file_of_another_length_is_found() -> None:
    data = small()
    for size in range(len(data)):
        with pytest.raises(CorruptionError):
            open_bytes(data[:size], SCHEMA)
    for wrong in (data + b"\0", data + data, b"\0" * 8 + data, data[8:], b"\0" * len(data), data[64:] + data[:64]):
        with pytest.raises(CorruptionError):
            open_bytes(wrong, SCHEMA).verify()


def test_a_newer_version_is_no_damage() -> None:
    parts = Parts(small())
    parts.seal["version"] = 3
    with pytest.raises(UsageError, match=r"x\.arrow is of version 3, this marble reads versions 1 to 2"):
        open_bytes(parts.seal_again(), SCHEMA)


def test_what_is_taken_apart_can_be_put_together() -> None:
    data = small("lz4")
    assert Parts(data).rebuild() == data


def swap_keys(parts: Parts) -> None:
    entry = parts.entries[1]
    first, end = entry["offset"], entry["offset"] + entry["bytes"]
    parts.data[first:end] = parts.data[first:end].replace(b"key 4key 5", b"key 5key 4")


def break_offsets(parts: Parts) -> None:
    """Make a list's offsets in the first block point far outside of it."""
    entry = parts.entries[0]
    body = entry["offset"] + entry["metadata_bytes"]
    offsets = struct.pack("<4i", 0, 1, 2, 3)
    at = parts.data.rindex(offsets, body, entry["offset"] + entry["bytes"])
    struct.pack_into("<i", parts.data, at + 4, 1 << 30)


def break_text(parts: Parts) -> None:
    at = parts.data.index(b"compressible")
    parts.data[at] = 0xFF


def entry_of(**changes: int) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        for name, by in changes.items():
            parts.entries[0][name] += by

    return change


def head_of(**changes: int) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        for name, by in changes.items():
            parts.head[name] = (parts.head[name] + by) % 2**64

    return change


def cross_bloom(parts: Parts) -> None:
    first = parts.head_at + parts.head["bloom_offset"]
    parts.data[first : first + 64] = bytes(64)


def break_zones(parts: Parts) -> None:
    first = parts.head_at + parts.head["zones_offset"]
    parts.data[first + 8 : first + 40] = b"\xff" * 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap_keys, "keys of block 1 do not ascend"),
        (break_offsets, "block 0 cannot be read"),
        (break_text, "block 0 cannot be read"),
        (cross_bloom, "bloom filter lacks"),
        (break_zones, "zone maps cannot be read"),
        (entry_of(rows=1), "does not cover its file"),
        (entry_of(rows=-1, tombstones=0), "does not cover its file"),
        (entry_of(rows=-(16)), "entry 0 of the index is wrong"),
        (entry_of(offset=8), "entry 0 of the index is wrong"),
        (entry_of(bytes=1 << 40), "entry 0 of the index is wrong"),
        (entry_of(metadata_bytes=1 << 30), "entry 0 of the index is wrong"),
        (entry_of(metadata_bytes=8), "block 0 cannot be read"),
        (entry_of(tombstones=1), "block 0 has other writes"),
        (entry_of(first_index=1), "block 0 has other writes"),
        (entry_of(last_index=1), "block 0 has other writes"),
        (entry_of(first_key_bytes=1, last_key_bytes=-1), "keys of block 0|do not ascend|has other keys"),
        (entry_of(key_offset=1), "entry 0 of the index is wrong"),
        (entry_of(first_key_bytes=1 << 31), "entry 0 of the index is wrong"),
        (head_of(blocks=-1), "names parts that are not there"),
        (head_of(blocks=1 << 60), "names parts that are not there"),
        (head_of(rows=1), "does not cover its file"),
        (head_of(bloom_offset=1), "names parts that are not there"),
        (head_of(bloom_bytes=1 << 63), "names parts that are not there"),
        (head_of(keys_offset=-(1 << 20)), "names parts that are not there"),
        (head_of(keys_bytes=-1), "entry 1 of the index is wrong"),
        (head_of(zones_offset=1 << 62), "names parts that are not there"),
    ],
)
def test_lies_under_right_checksums_are_found(change: Callable[[Parts], None], words: str) -> None:
    parts = Parts(small())
    change(parts)
    with pytest.raises(CorruptionError, match=words):
        open_bytes(parts.rebuild(), SCHEMA).verify()


def test_keys_that_do_not_ascend_are_found_wherever_they_begin_to_differ() -> None:
    keys = [b"bb00000000", b"bb00000011", b"bb00000022", b"bb00000033", b"bb00000044"]
    schema = pa.schema([pa.field("k", pa.binary(), False)])
    data, _ = write([pa.record_batch([pa.array(keys)], schema=schema)])
    chance, found = random.Random(5), 0
    for _ in range(400):
        parts, mixed = Parts(data), list(keys)
        for _ in range(chance.choice([1, 1, 2])):
            row, key = chance.randrange(1, 4), bytearray(chance.choice(keys))
            key[chance.choice([0, 1, 8, 9])] = chance.choice(b"abc012")
            mixed[row] = bytes(key)
        at = parts.data.index(b"".join(keys))
        parts.data[at : at + 50] = b"".join(mixed)
        try:
            open_bytes(parts.rebuild(), schema).verify()
            message = ""
        except CorruptionError as error:
            message = str(error)
        ascends = all(a < b for a, b in itertools.pairwise(mixed))
        assert ("do not ascend" in message) == (not ascends), mixed
        found += not ascends
    assert 50 < found < 350


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_random_bytes_under_right_checksums_do_no_harm(compression: str | None) -> None:
    data = small(compression)
    chance = random.Random(7)
    found = 0
    for _ in range(1500):
        parts = Parts(data)
        if chance.random() < 0.7:
            entry = chance.choice(parts.entries)
            first, end = entry["offset"], entry["offset"] + entry["bytes"]
        else:
            first, end = parts.head_at, parts.footer
        for _ in range(chance.choice([1, 1, 3])):
            at = chance.randrange(first, end)
            parts.data[at] = chance.choice([0, 1, 0x7F, 0xFF, chance.randrange(256)])
        # What was changed in the index stays as it was made.
        wrong = parts.rebuild() if end != parts.footer else parts.seal_again()
        try:
            table = open_bytes(wrong, SCHEMA)
            answers(table)
            table.verify()
            table.zone_maps()
        except CorruptionError:
            found += 1
    assert found > 100
