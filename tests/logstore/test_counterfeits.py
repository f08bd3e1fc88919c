"""Sound frames that are not the ones that belong there, and files that change under a log that is open."""

from __future__ import annotations

import struct

import pyarrow as pa
import pytest
from logstore.support import SEGMENT, SMALL, contents, disk, entries, reopened
from reference import frame as twin

from marble._core import frame
from marble._core.checksum import xxh3_64
from marble.errors import CorruptionError, InvariantError
from marble.logstore.log import Log, LogOptions
from marble.logstore.segment import Window
from marble.schema import ENTRY_SCHEMA
from marble.testing.disk import SimulatedFiles

UNCACHED = LogOptions(cache_bytes_max=0)


def encoded(batch: pa.RecordBatch, position: int, synced: int, chain: int) -> bytes:
    return frame.encode([], [(batch, 0, batch.num_rows)], 1, position, synced, chain)[0].to_pybytes()


def ipc_header(schema: pa.Schema) -> bytes:
    """The header of segment 1 with the columns of `schema`, sealed."""
    empty = twin.MAGIC + b"0" * 96
    message = schema.with_metadata({"marble.format": "1", "marble.seal": empty}).serialize().to_pybytes()
    header = bytearray(b"\xff\xff\xff\xff" + struct.pack("<i", len(twin.padded(message)) - 8) + message[8:])
    header += bytes(-len(header) % 64)
    seal = header.index(twin.MAGIC) + len(twin.MAGIC)
    header[seal : seal + 32] = f"{len(header):016x}{1:016x}".encode()
    header[seal + 80 : seal + 96] = f"{xxh3_64(bytes(header)):016x}".encode()
    return bytes(header)


def resealed(data: bytes, offset: int, layout: str, number: int) -> bytes:
    """The frame `data` with `number` written at `offset`, and sealed again as if it had been meant."""
    forged = bytearray(data)
    struct.pack_into("<" + layout, forged, offset, number)
    digits = slice(twin.SEAL_AT + 92, twin.SEAL_AT + 108)
    forged[digits] = b"0" * 16
    forged[digits] = f"{xxh3_64(bytes(forged)):016x}".encode()
    return bytes(forged)


def test_log_with_other_columns_is_refused() -> None:
    """As the marble before ``time_us`` wrote it: the same format number, a sound seal, one column less."""
    at = ENTRY_SCHEMA.get_field_index("time_us")
    header = ipc_header(ENTRY_SCHEMA.remove(at))
    files = disk()
    files.put(SEGMENT(1), header)
    with pytest.raises(
        CorruptionError, match=r"has the columns .*sequence, table.*reads .*sequence, time_us"
    ) as caught:
        Log.open(files)
    assert (caught.value.path, caught.value.offset) == ("simulated:" + SEGMENT(1), 0)
    # The forgery itself is right: with our columns the same bytes are an empty log.
    files.put(SEGMENT(1), ipc_header(ENTRY_SCHEMA))
    assert contents(Log.open(files)) == {}


@pytest.mark.parametrize(("wrong_chain", "wrong_synced"), [(1, 0), (0, 64)])
def test_frame_sealed_for_another_log_is_damage(wrong_chain: int, wrong_synced: int) -> None:
    """Its seal is sound, but it was made behind other frames, or by a writer that knew more to be durable."""
    header, chain = frame.encode_header("1", 1, 0)
    files = disk()
    counterfeit = encoded(entries(1, [1]), header.size, header.size + wrong_synced, chain + wrong_chain)
    files.put(SEGMENT(1), header.to_pybytes() + counterfeit)
    with pytest.raises(CorruptionError, match="does not follow") as caught:
        Log.open(files)
    assert (caught.value.path, caught.value.offset) == ("simulated:" + SEGMENT(1), header.size)


@pytest.mark.parametrize(
    ("offset", "layout", "number"),
    [
        pytest.param(8 + 64 + 12, "q", 3, id="more rows than the columns have"),
        pytest.param(8 + 92 + 4 + 8, "q", 1, id="a null"),
        pytest.param(8 + 260 + 4 + 24, "q", 2**40, id="a buffer beyond the body"),
        pytest.param(twin.FRONT_BYTES + 9 * 64, "i", -64, id="payloads before their buffer"),
        pytest.param(twin.FRONT_BYTES + 9 * 64 + 4, "i", 1000, id="payload offsets that fall"),
    ],
)
def test_frame_that_is_sealed_but_holds_no_entries_is_damage(offset: int, layout: str, number: int) -> None:
    header, chain = frame.encode_header("1", 1, 0)
    data = resealed(encoded(entries(1, [1, 1]), header.size, header.size, chain), offset, layout, number)
    assert twin.is_sound(data)
    files = disk()
    files.put(SEGMENT(1), header.to_pybytes() + data)
    with pytest.raises(CorruptionError, match="keep its files") as caught:
        Log.open(files)
    assert (caught.value.path, caught.value.offset) == ("simulated:" + SEGMENT(1), header.size)


def other_frames(position: int) -> dict[str, bytes]:
    """Sound frames, each as long as that of ``entries(1, [1, 1, 1])`` and none with what it holds."""
    own = encoded(entries(1, [1, 1, 1]), position, position, 0)
    return {
        "other indexes": encoded(entries(2, [1, 1, 1]), position, position, 0),
        "another group": encoded(entries(1, [1, 1, 1], group=2), position, position, 0),
        "fewer entries": encoded(entries(1, [1, 1], size=96), position, position, 0),
        "payload offsets fall": resealed(own, twin.FRONT_BYTES + 9 * 64 + 4, "i", 1000),
    }


@pytest.mark.parametrize("what", ["other indexes", "another group", "fewer entries", "payload offsets fall"])
def test_read_finds_a_sound_frame_with_something_else_in_the_place_of_its_own(what: str) -> None:
    files = disk()
    log = Log.open(files, UNCACHED)
    header = files.size(SEGMENT(1))
    log.append(1, None, entries(1, [1, 1, 1]))
    log.sync()
    assert log.read(1, 1, 4).num_rows == 3
    files.put(SEGMENT(1), files.read(SEGMENT(1), 0, header) + other_frames(header)[what])
    assert files.size(SEGMENT(1)) == log.nbytes
    with pytest.raises(CorruptionError, match=f"had held .*{what}") as caught:
        log.read(1, 1, 4)
    assert (caught.value.path, caught.value.offset) == ("simulated:" + SEGMENT(1), header)


def test_read_from_a_disk_that_fails_says_that_the_disk_must_be_mended() -> None:
    files = disk()
    log = Log.open(files, UNCACHED)
    log.append(1, None, entries(1, [1]))
    log.sync()
    files.delete(SEGMENT(1))
    with pytest.raises(InvariantError, match="mend the disk"):
        log.read(1, 1, 2)


def test_segment_that_shrinks_before_its_repair_is_not_replaced_by_a_shorter_one() -> None:
    """The log is read, and mended only when it goes on: between the two somebody cuts it."""
    files = disk()
    log = Log.open(files, SMALL)
    for index in range(1, 4):
        log.append(1, None, entries(index, [1]))
        log.sync()
    log.close()
    # Durable bytes were lost, so nothing is repaired before the first sync.
    files.cut(SEGMENT(1), files.size(SEGMENT(1)) - 64)
    log = Log.open(files, SMALL)
    assert log.report.lost_durable_bytes > 0
    found = contents(log)
    before = files.read(SEGMENT(1))
    files.cut(SEGMENT(1), 1024)
    log.append(1, None, entries(3, [2]))
    with pytest.raises(InvariantError, match="became shorter"):
        log.sync()
    assert files.read(SEGMENT(1)) == before[:1024]
    # Nothing that was still there has been made worse: put back, the log opens as before.
    files.put(SEGMENT(1), before)
    assert reopened(files) == found


@pytest.mark.parametrize("kept", [0, 3, 100])
def test_search_ends_where_a_file_that_shrinks_ends(kept: int) -> None:
    files: SimulatedFiles = disk()
    files.put("a", bytes(kept) + b"needle" * 100)
    window = Window(files, "a", files.size("a"), window_bytes=64)
    assert window.find(b"needle", 0) == kept
    files.cut("a", kept)
    assert Window(files, "a", kept + 600, window_bytes=64).find(b"needle", 0) is None
