"""Frames: their bytes are the documented ones, Arrow reads them, and no flipped bit or missing byte passes."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logstore.support import entries
from reference import frame as twin

from marble._core import entry_batch, frame
from marble.errors import CorruptionError, InvariantError
from marble.schema import ENTRY_SCHEMA
from marble.types import EntryKind

LIMIT = 1 << 30


def hard_state_row(group: int, term: int, vote: int, commit: int) -> dict[str, Any]:
    row = {"group": group, "index": commit, "term": term, "kind": 1, "session": vote, "sequence": 0}
    return {**row, "time_us": 0, "table": 0, "checksum": entry_batch.entry_checksum(1, vote, 0, 0), "payload": b""}


def snapshot_row(group: int, index: int, term: int, last: int) -> dict[str, Any]:
    return entry_batch.snapshot_row(group, index, term, 0, last).to_pylist()[0]


def sound(data: bytes, segment: int = 3, position: int = 768, offset: int = 0) -> frame.Seal:
    seal = frame.check(data, offset, segment, position, LIMIT)
    assert isinstance(seal, frame.Seal)
    return seal


States = list[tuple[int, int, int, int]]


@st.composite
def parts(draw: st.DrawFn) -> tuple[States, States, list[tuple[pa.RecordBatch, int, int]]]:
    number = st.integers(0, 2**63 - 1)
    start = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 2**40), st.integers(1, 2**40), number)
    starts = draw(st.lists(start, max_size=2))
    states = draw(st.lists(st.tuples(st.integers(0, 2**32 - 1), number, st.integers(0, 2**32 - 1), number), max_size=3))
    ranges = []
    for _ in range(draw(st.integers(0 if states or starts else 1, 3))):
        first, count = draw(st.integers(1, 2**40)), draw(st.integers(1, 40))
        terms = sorted(draw(st.lists(st.integers(1, 2**40), min_size=count, max_size=count)))
        size = draw(st.sampled_from([0, 64, 128, 1000]))
        row = draw(st.integers(0, count - 1))
        batch = entries(first, terms, draw(st.integers(0, 5)), size)
        # A slice has offsets of its own in every column, which the copy must respect.
        start = draw(st.integers(0, row))
        ranges.append((batch.slice(start), row - start, draw(st.integers(row - start + 1, count - start))))
    return states, starts, ranges


@given(parts(), st.integers(0, 2**63), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_frame_has_exactly_the_documented_bytes(drawn: Any, position: int, chain: int) -> None:
    states, starts, ranges = drawn
    rows = [hard_state_row(*state) for state in states] + [snapshot_row(*start) for start in starts]
    for batch, row, end in ranges:
        rows += batch.slice(row, end - row).to_pylist()
    data, batch, checksum = frame.encode(states, ranges, 7, position, position // 2, chain, starts)
    assert data.to_pybytes() == twin.encode(rows, 7, position, position // 2, chain)
    assert twin.is_sound(data.to_pybytes())
    assert batch.to_pylist() == rows
    batch.validate(full=True)
    seal = sound(data, 7, position)
    assert (seal.length, seal.chain, seal.checksum, seal.synced) == (data.size, chain, checksum, position // 2)
    decoded = frame.decode(data, 0, seal)
    decoded.validate(full=True)
    assert decoded.to_pylist() == rows
    assert decoded.schema == ENTRY_SCHEMA


def test_arrow_reads_header_and_frames_as_one_stream() -> None:
    header, chain = frame.encode_header("1", 3, 99)
    batches = [entries(1, [1] * 5), entries(6, [2] * 3, size=0), entries(9, [2], size=100_000)]
    stream, position = header.to_pybytes(), header.size
    for batch in batches:
        data, _, chain = frame.encode([], [(batch, 0, batch.num_rows)], 3, position, 0, chain)
        stream += data.to_pybytes()
        position += data.size
    reader = pa.ipc.open_stream(io.BytesIO(stream))
    assert reader.schema.equals(ENTRY_SCHEMA)
    assert reader.read_all().to_pylist() == [row for batch in batches for row in batch.to_pylist()]
    # What follows the last frame when a file system has put zeros there ends the stream, as Arrow's own marker does.
    assert pa.ipc.open_stream(io.BytesIO(stream + bytes(64))).read_all().num_rows == 9


def test_payloads_are_aligned_in_the_file_and_in_memory() -> None:
    data, batch, checksum = frame.encode([(1, 1, 0, 0)], [(entries(1, [1] * 7, size=192), 0, 7)], 1, 768, 0, 0)
    decoded = frame.decode(b"\0" * 8 + data.to_pybytes(), 8, sound(data, 1))
    for rows in (batch, decoded):
        for row in range(1, 8):
            assert entry_batch.payload(rows, row).address % 64 == 0
    assert data.size % 64 == 0
    assert data.to_pybytes().index(b"1/1/1/0;") % 64 == 0
    assert checksum


def test_every_flipped_bit_is_found() -> None:
    header, chain = frame.encode_header("1", 1, 0)
    data, _, _ = frame.encode([(1, 1, 1, 0)], [(entries(1, [1, 1]), 0, 2)], 1, 768, 768, chain)
    for original, position in ((header.to_pybytes(), 0), (data.to_pybytes(), 768)):
        assert isinstance(frame.check(original, 0, 1, position, LIMIT), frame.Seal)
        damaged = bytearray(original)
        for bit in range(8 * len(damaged)):
            damaged[bit // 8] ^= 1 << bit % 8
            found = frame.check(damaged, 0, 1, position, LIMIT)
            # Either it is no frame, or it claims to be longer than what there is.
            assert not isinstance(found, frame.Seal)
            assert found == 0 or found > len(damaged)
            damaged[bit // 8] ^= 1 << bit % 8


def test_every_missing_tail_is_asked_for() -> None:
    data = frame.encode([], [(entries(1, [1]), 0, 1)], 3, 768, 0, 0)[0].to_pybytes()
    for size in range(len(data)):
        found = frame.check(data[:size], 0, 3, 768, LIMIT)
        assert isinstance(found, int)
        assert size < found <= len(data)
    assert isinstance(frame.check(data + b"more", 0, 3, 768, LIMIT), frame.Seal)


def test_frame_is_sound_at_its_own_place_only() -> None:
    data = frame.encode([], [(entries(1, [1]), 0, 1)], 3, 768, 0, 0)[0].to_pybytes()
    assert frame.check(data, 0, 3, 832, LIMIT) == 0
    assert frame.check(data, 0, 4, 768, LIMIT) == 0
    assert frame.check(data, 0, 3, 768, len(data) - 1) == 0
    assert isinstance(frame.check(data, 0, 3, 768, len(data)), frame.Seal)
    with pytest.raises(IndexError):
        frame.check(data, len(data) + 1, 3, 768, LIMIT)
    with pytest.raises(IndexError):
        frame.check(data, -1, 3, 768, LIMIT)


def test_seal_does_not_open_another_buffer() -> None:
    data = frame.encode([], [(entries(1, [1]), 0, 1)], 3, 768, 0, 0)[0].to_pybytes()
    seal = sound(data)
    with pytest.raises(IndexError):
        frame.decode(data[:-1], 0, seal)
    with pytest.raises(CorruptionError):
        frame.decode(bytes(len(data)), 0, seal)
    header = frame.encode_header("1", 3, 0)[0]
    with pytest.raises(CorruptionError):
        frame.decode(header, 0, sound(header, 3, 0))


@given(st.binary(max_size=2000))
@settings(max_examples=200, deadline=None)
def test_garbage_is_no_frame(data: bytes) -> None:
    for text in (data, b"\xff\xff\xff\xff\xf8\x02\x00\x00" + data):
        assert not isinstance(frame.check(text, 0, 1, 0, LIMIT), frame.Seal)


def replaced(batch: pa.RecordBatch, column: str, values: list[Any]) -> pa.RecordBatch:
    at = ENTRY_SCHEMA.get_field_index(column)
    return batch.set_column(at, ENTRY_SCHEMA.field(at), pa.array(values, ENTRY_SCHEMA.field(at).type))


def test_check_entries_accepts_a_run() -> None:
    assert frame.check_entries(entries(5, [2, 2, 3], group=4, size=64), 4) == (5, 2, 3, 192, 64)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (entries(1, [1, 1], group=2), "another group"),
        (replaced(entries(1, [1, 1]), "index", [1, 3]), "do not follow"),
        (replaced(entries(1, [1, 1]), "index", [2, 1]), "do not follow"),
        (replaced(entries(1, [1, 1]), "index", [0, 1]), "index"),
        (replaced(entries(1, [1, 1]), "index", [2**63, 2**63 + 1]), "index"),
        (entries(1, [2, 1]), "terms fall"),
        (replaced(entries(1, [1, 1]), "term", [0, 1]), "term"),
        (replaced(entries(1, [1, 1]), "kind", [1, 3]), "kind"),
        (replaced(entries(1, [1, 1]), "kind", [3, 0]), "kind"),
        (replaced(entries(1, [1, 1]), "kind", [3, 11]), "kind"),
        (entries(1, [1]).slice(1), "no entries"),
        (entries(1, [1]).drop_columns(["table"]), "schema"),
        (replaced(entries(1, [1, 1]), "payload", [b"", None]), "nulls"),
    ],
)
def test_check_entries_refuses(batch: pa.RecordBatch, words: str) -> None:
    with pytest.raises(InvariantError, match=words):
        frame.check_entries(batch, 1)


def test_check_entries_refuses_offsets_that_validate_lets_pass() -> None:
    good = entries(1, [1, 1])
    for offsets in ([0, 129, 128], [64, 0, 128], [0, -64, 128]):
        buffers = [None, pa.array(offsets, pa.int32()).buffers()[1], good.column("payload").buffers()[2]]
        payload = pa.Array.from_buffers(pa.binary(), 2, buffers)
        bad = pa.RecordBatch.from_arrays([*good.columns[:-1], payload], schema=ENTRY_SCHEMA)
        with pytest.raises(InvariantError, match="offsets"):
            frame.check_entries(bad, 1)


def test_runs_split_by_group_gap_and_rows_that_are_no_entries() -> None:
    ranges = [
        (entries(4, [1, 1]), 0, 2),
        (entries(6, [2]), 0, 1),
        (entries(5, [3]), 0, 1),
        (entries(6, [1], group=2), 0, 1),
    ]
    starts = [(1, 8, 2, 8), (1, 9, 2, 9)]
    _, batch, _ = frame.encode([(1, 1, 2, 9), (2, 1, 0, 0)], ranges, 1, 0, 0, 0, starts)
    assert frame.runs(batch) == [
        (1, EntryKind.HARD_STATE, 0, 1, 9),
        (2, EntryKind.HARD_STATE, 1, 2, 0),
        (1, EntryKind.SNAPSHOT, 2, 3, 8),
        (1, EntryKind.SNAPSHOT, 3, 4, 9),
        (1, 0, 4, 7, 4),
        (1, 0, 7, 8, 5),
        (2, 0, 8, 9, 6),
    ]


@given(st.lists(st.sampled_from([0, 1, 64, 1000]), min_size=1, max_size=20), st.data())
@settings(max_examples=100, deadline=None)
def test_clip_and_sizes_are_as_their_twin(sizes: list[int], data: st.DataObject) -> None:
    batch = replaced(entries(1, [1] * len(sizes)), "payload", [bytes(size) for size in sizes])
    skip = data.draw(st.integers(0, len(sizes) - 1))
    batch, sizes = batch.slice(skip), sizes[skip:]
    row = data.draw(st.integers(0, len(sizes) - 1))
    end = data.draw(st.integers(row + 1, len(sizes)))
    bytes_max = data.draw(st.sampled_from([-1, 0, 1, 63, 64, 65, 1000, 2**63 - 1]))
    assert frame.clip(batch, row, end, bytes_max) == twin.clip(sizes, row, end, bytes_max)
    terms, found = frame.terms_and_sizes(batch, row, end)
    assert list(memoryview(found).cast("Q")) == sizes[row:end]
    assert list(memoryview(terms).cast("Q")) == [1] * (end - row)


def test_ranges_outside_a_batch_are_refused() -> None:
    batch = entries(1, [1, 1])
    for row, end in ((0, 3), (1, 1), (-1, 1), (2, 3)):
        with pytest.raises(InvariantError):
            frame.encode([], [(batch, row, end)], 1, 0, 0, 0)
        with pytest.raises(IndexError):
            frame.clip(batch, row, end, 10)
        with pytest.raises(IndexError):
            frame.terms_and_sizes(batch, row, end)
    with pytest.raises(InvariantError, match="without rows"):
        frame.encode([], [], 1, 0, 0, 0)
    with pytest.raises(TypeError):
        frame.runs("not a batch")  # type: ignore[arg-type]
