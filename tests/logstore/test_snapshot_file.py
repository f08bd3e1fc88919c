"""No bit of a snapshot's file is wrong unnoticed, and nothing in it makes a reader do what it should not."""

from __future__ import annotations

import contextlib
import re

import pyarrow as pa
import pytest
from logstore.snapshot_support import ENDPOINTS, NAME, content, expected, meta, state, write
from logstore.support import disk

from marble.env import SystemRandom
from marble.errors import CorruptionError
from marble.logstore.snapshot_file import FILE_SCHEMA, Encoder, FileReader, decode_meta, encode_meta
from marble.logstore.snapshots import SnapshotStore
from marble.testing.disk import SimulatedFiles


@pytest.fixture
def files() -> SimulatedFiles:
    return disk()


def test_every_flipped_bit_is_found_at_the_start(files: SimulatedFiles) -> None:
    write(SnapshotStore(files, 1), 10, 2, 40)
    random = SystemRandom(5)
    for byte in range(files.size(NAME(10))):
        bit = 8 * byte + random.randrange(0, 8)
        files.flip_bit(NAME(10), bit)
        with pytest.raises(CorruptionError, match="snapshot") as caught:
            SnapshotStore(files, 1)
        assert caught.value.path == "simulated:" + NAME(10)
        assert caught.value.offset is not None
        files.flip_bit(NAME(10), bit)
    assert len(SnapshotStore(files, 1).infos()) == 1


def test_a_bit_that_flips_later_is_found_when_it_is_read(files: SimulatedFiles) -> None:
    store = SnapshotStore(files, 1)
    info = write(store, 10, 2, 40)
    random = SystemRandom(6)
    harmless = 0
    for byte in range(info.nbytes):
        bit = 8 * byte + random.randrange(0, 8)
        files.flip_bit(NAME(10), bit)
        with contextlib.suppress(CorruptionError):
            assert content(store, info) == expected(10, 2, 40)
            harmless += 1
        files.flip_bit(NAME(10), bit)
    assert harmless < info.nbytes // 2


def test_damage_is_named_with_file_and_offset(files: SimulatedFiles) -> None:
    store = SnapshotStore(files, 1)
    info = write(store, 10)
    at = files.read(NAME(10)).index(b"10/2;")
    files.flip_bit(NAME(10), 8 * at)
    with pytest.raises(CorruptionError, match=r"a row is not what was written.*offset \d+") as caught:
        content(store, info)
    assert caught.value.offset is not None
    assert at - 1500 < caught.value.offset < at


def test_every_cut_is_found(files: SimulatedFiles) -> None:
    store = SnapshotStore(files, 1)
    info = write(store, 10, 2, 40)
    whole = files.read(NAME(10))
    for size in range(info.nbytes):
        files.put(NAME(10), whole[:size])
        with pytest.raises(CorruptionError, match="damaged"):
            SnapshotStore(files, 1)
        # The mark at the end of the stream alone says nothing that the end has not said.
        if size < info.nbytes - 8:
            with pytest.raises(CorruptionError, match="damaged"):
                content(store, info)
    for more in (b"\0" * 8, whole):
        files.put(NAME(10), whole + more)
        with pytest.raises(CorruptionError, match="damaged"):
            SnapshotStore(files, 1)


def test_rows_that_were_dropped_repeated_or_swapped(files: SimulatedFiles) -> None:
    store = SnapshotStore(files, 1)
    info = write(store, 10)
    whole = files.read(NAME(10))
    ends = [piece.end for piece in FileReader(files, NAME(10)).pieces()]
    one, two = whole[ends[0] : ends[1]], whole[ends[1] : ends[2]]
    assert len(one) == len(two)
    for middle in (two, one + one + two, two + one, one + one):
        files.put(NAME(10), whole[: ends[0]] + middle + whole[ends[2] :])
        with pytest.raises(CorruptionError, match="damaged"):
            content(store, info)
        with pytest.raises(CorruptionError, match="damaged"):
            SnapshotStore(files, 1)


def test_of_another_group_or_entry_than_its_name_says(files: SimulatedFiles) -> None:
    write(SnapshotStore(files, 1), 10)
    whole = files.read(NAME(10))
    files.put(NAME(11), whole)
    with pytest.raises(CorruptionError, match="of entry 10 of term 2, which its name denies"):
        SnapshotStore(files, 1)
    files.put(NAME(10).replace("/00000001", "/00000007"), whole)
    with pytest.raises(CorruptionError, match="of group 1, not of 7"):
        SnapshotStore(files, 7)


def counterfeit(schema: pa.Schema, options: pa.ipc.IpcWriteOptions | None = None) -> bytes:
    """A stream with rows whose checksums are right."""
    sink = pa.BufferOutputStream()
    encoder = Encoder()
    messages = [*encoder.head(1, meta(10), {})[1:], *(encoder.rows(batch) for batch in state(10)), encoder.tail()[0]]
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        for message in messages:
            writer.write_batch(pa.ipc.read_record_batch(message, FILE_SCHEMA).cast(schema))
    return bytes(sink.getvalue().to_pybytes())


def test_another_schema_or_compression_is_refused(files: SimulatedFiles) -> None:
    store = SnapshotStore(files, 1)
    info = write(store, 10)
    files.put(NAME(10), counterfeit(FILE_SCHEMA))
    assert content(store, info) == expected(10)
    loose = pa.schema([field.with_nullable(True) for field in FILE_SCHEMA])
    files.put(NAME(10), counterfeit(loose))
    with pytest.raises(CorruptionError, match="schema"):
        content(store, info)
    files.put(NAME(10), counterfeit(FILE_SCHEMA, pa.ipc.IpcWriteOptions(compression="zstd")))
    with pytest.raises(CorruptionError, match="cannot be read"):
        content(store, info)


def test_a_message_that_only_claims_to_be_a_schema(files: SimulatedFiles) -> None:
    """With these four bytes wrong pyarrow followed an offset into nowhere, and the process died."""
    store = SnapshotStore(files, 1)
    info = write(store, 10)
    whole = bytearray(files.read(NAME(10)))
    for at, byte in ((29, 0), (127, 36), (139, 127), (257, 107)):
        whole[at] = byte
    files.put(NAME(10), bytes(whole))
    with pytest.raises(CorruptionError, match=r"schema.*offset 0"):
        content(store, info)


def test_lengths_that_lie_take_no_memory(files: SimulatedFiles) -> None:
    store = SnapshotStore(files, 1)
    info = write(store, 10)
    whole = bytearray(files.read(NAME(10)))
    ends = [piece.end for piece in FileReader(files, NAME(10)).pieces()]
    whole[ends[0] + 4 : ends[0] + 8] = (2**31 - 8).to_bytes(4, "little")
    files.put(NAME(10), bytes(whole))
    before = pa.total_allocated_bytes()
    with pytest.raises(CorruptionError, match=f"offset {ends[0]}"):
        content(store, info)
    assert pa.total_allocated_bytes() - before < 1 << 20


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"format": "1"', b'"format": "2"', "it has format '2', this marble reads format 1"),
        (b'"voters": [1, 2, 3]', b'"voters": [2, 1, 3]', "do not ascend"),
        (b'"voters": [1, 2, 3]', b'"voters": [1, 1, 3]', "do not ascend"),
        (b'"voters": [1, 2, 3]', b'"voters": [1, 2, -3]', "no number"),
        (b'"voters": [1, 2, 3]', b'"voters": [true]', "no number"),
        (b'"voters": [1, 2, 3]', b'"voters": 7', "not one"),
        (b'"auto_leave": true', b'"auto_leave": 1', "no boolean"),
        (b'"a:1"', b"5", "no text"),
        (b'{"1": "a:1"', b'{"x": "a:1"', "invalid literal"),
        (b'"index": 10', b'"index": 10.5', "no number"),
        (b'"index": 10', b'"index": 9223372036854775808', "no number"),
        (b'"group": 1, ', b"", "not one"),
        (b'{"format"', b'["format"', "delimiter"),
    ],
)
def test_a_description_that_is_none(old: bytes, new: bytes, message: str) -> None:
    payload = encode_meta(1, meta(10), ENDPOINTS)
    assert decode_meta(payload) == (1, meta(10), ENDPOINTS)
    assert old in payload
    with pytest.raises(ValueError, match=re.escape(message)):
        decode_meta(payload.replace(old, new))
