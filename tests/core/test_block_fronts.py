"""What a file remembers of its blocks for readers of single rows: where buffers lie, and between which words a key is."""

from __future__ import annotations

import random
import threading
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.sstable import Parts, open_bytes, write

from marble._core.lsm import Reader
from marble._core.sstable import BlockCache, SSTable
from marble.errors import CorruptionError

SCHEMA = pa.schema([pa.field("k", pa.binary(), False), pa.field("v", pa.string())])


def batch_of(keys: list[bytes]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(keys, pa.binary()), pa.array([f"of {key!r}" for key in keys])], schema=SCHEMA)


def get_many(table: SSTable, keys: list[bytes]) -> list[str | None]:
    rows, found = Reader([], [[table]]).get_many(pa.record_batch([pa.array(keys, pa.binary())], names=["k"]))
    rows.validate(full=True)
    values = rows.column("v").to_pylist()
    assert [value is not None for value in values] == found.to_pylist()
    return values


def get(table: SSTable, key: bytes) -> object:
    row = Reader([], [[table]]).get_row(("k", "v"), (key,))
    assert row is not False
    return row and row["v"]


def check(table: SSTable, keys: list[bytes], there: set[bytes]) -> None:
    expected = [f"of {key!r}" if key in there else None for key in keys]
    assert get_many(table, keys) == expected
    for key, value in zip(keys, expected, strict=True):
        assert get(table, key) == value
    assert get_many(table, keys) == expected


# Bytes that are encoded as they are, those that are not, and beginnings of other keys.
KEYS = st.lists(st.sampled_from([b"", b"a", b"b", b"\0", b"\xff", b"\1"]), max_size=5).map(b"".join)


@settings(deadline=None)
@given(st.sets(KEYS, min_size=4, max_size=120), st.lists(KEYS, min_size=1, max_size=40), st.sampled_from([4, 15, 4096]))
def test_keys_are_compared_as_they_are_encoded(there: set[bytes], others: list[bytes], block_rows_max: int) -> None:
    data, _ = write([batch_of(sorted(there))], block_rows_max=block_rows_max)
    check(open_bytes(data, SCHEMA), [*others, *sorted(there)], there)


@pytest.mark.parametrize("words", [1, 2, 7, 8, 9, 10, 17, 18, 64, 100])
@pytest.mark.parametrize("alike", [0, 3, 40])
def test_any_number_of_words_leads_to_every_key(words: int, alike: int) -> None:
    """`alike`: of so many keys in a row the words are the same, since what differs lies behind them."""
    chance = random.Random(words)
    starts = sorted(chance.sample(range(10**6), 30 * words // (alike or 1) + 1))
    there = [b"%07d" % start + b"-" * 9 + b"%02d" % n for start in starts for n in range(alike or 1)][: 30 * words]
    there = [key + b"." * 90 for key in there]
    data, info = write([batch_of(there)], block_bytes_max=1 << 24, block_rows_max=1 << 20)
    assert info.block_count == 1
    assert len(Parts(data).part("words")) >= 8 * words
    asked = chance.sample(there, min(len(there), 150))
    asked += [key[:-1] + b"/" for key in asked] + [key[:-1] + b"-" for key in asked] + [b"0", b"9" * 8]
    check(open_bytes(data, SCHEMA), asked, set(there))


def test_the_front_is_read_once_and_stays_true() -> None:
    keys = [b"key%04d" % n for n in range(40)]
    data, _ = write([batch_of(keys)], block_rows_max=20)
    entry = Parts(data).entries[1]
    fronts = range(entry["offset"], entry["offset"] + entry["metadata_bytes"])
    for at in fronts:
        memory = pa.allocate_buffer(len(data))
        view = memoryview(memory).cast("B")
        view[:] = data
        table = SSTable.open(memory, SCHEMA, ["k"], BlockCache(0), "x.arrow")
        assert get_many(table, [keys[25]]) == [f"of {keys[25]!r}"]
        view[at] ^= 1 << at % 8
        # Where the buffers lie was found under a checksum that was right; what the memory says now, nobody asks.
        assert get(table, keys[21]) == f"of {keys[21]!r}"
        with pytest.raises(CorruptionError, match=r"x\.arrow, offset"):
            table.verify()
        # Who has not read it finds the damage first.
        other = SSTable.open(memory, SCHEMA, ["k"], BlockCache(0), "x.arrow")
        for look in (lambda table=other: get(table, keys[21]), lambda table=other: get_many(table, [keys[21]])):
            with pytest.raises(CorruptionError, match="block 1 is damaged"):
                look()
        assert get(other, keys[3]) == f"of {keys[3]!r}"


def test_threads_that_read_the_same_fronts_first_agree() -> None:
    keys = [b"%06d" % (3 * n) for n in range(4000)]
    data, info = write([batch_of(keys)], block_rows_max=8)
    assert info.block_count == 500
    asked = [*keys, *(b"%06d" % (3 * n + 1) for n in range(0, 4000, 7))]
    expected = {key: f"of {key!r}" if key in set(keys) else None for key in asked}
    table = open_bytes(data, SCHEMA, cache_bytes=0)
    start, wrong = threading.Barrier(4), []

    def read(seed: int) -> None:
        mine = asked.copy()
        if seed > 1:
            random.Random(seed).shuffle(mine)
        start.wait(60)
        for first in range(0, len(mine), 100):
            part: list[Any] = mine[first : first + 100]
            found = get_many(table, part) if seed % 2 else [get(table, key) for key in part]
            wrong.extend(key for key, value in zip(part, found, strict=True) if value != expected[key])

    threads = [threading.Thread(target=read, args=(n,), name=f"marble-test-{n}") for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
