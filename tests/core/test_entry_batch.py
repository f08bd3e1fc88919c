"""Entries as rows: against the slow twin, and against everything a peer may send."""

from __future__ import annotations

import datetime
import decimal
import struct

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import entry_batch as reference

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.errors import CorruptionError, InvariantError, ProtocolError, UsageError
from marble.schema import ENTRY_SCHEMA
from marble.types import INDEX_MAX, EntryKind

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
PAYLOAD = st.integers(1, 5).flatmap(lambda units: st.binary(min_size=64 * units, max_size=64 * units))
TIME = st.integers(0, INDEX_MAX)
ROW = st.one_of(
    st.tuples(st.sampled_from([2, 9]), U32, U64, U64, st.just(b"")),
    st.tuples(st.just(10), U32, st.integers(1, 2**64 - 1), U64, st.just(b"")),
    st.tuples(st.sampled_from([3, 4, 5, 6, 7, 8]), U32, U64, U64, PAYLOAD),
)


def proposal(row: reference.Row) -> Proposal:
    kind, table, session, sequence, payload = row
    return Proposal(kind, table, pa.py_buffer(payload) if payload else None, session, sequence)


def entries(count: int = 3, term: int = 2, first: int = 5) -> pa.RecordBatch:
    payload = entry_batch.encode_payload(pa.record_batch({"a": [1, 2]}))
    return entry_batch.build(1, first, term, [Proposal(EntryKind.WRITE, 7, payload, 9, at) for at in range(count)])


def changed(batch: pa.RecordBatch, name: str, values: list[object]) -> pa.RecordBatch:
    at = batch.schema.get_field_index(name)
    columns = list(batch.columns)
    columns[at] = pa.array(values, batch.schema.field(at).type)
    return pa.record_batch(columns, schema=batch.schema)


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, max_size=6), U32, st.integers(1, 2**40), st.integers(1, 2**40), TIME)
def test_build_agrees_with_twin(rows: list[reference.Row], group: int, first: int, term: int, time_us: int) -> None:
    proposals = [proposal(row) for row in rows]
    batch = entry_batch.build(group, first, term, proposals, time_us)
    batch.validate(full=True)
    assert batch.equals(reference.build(group, first, term, rows, time_us))
    entry_batch.verify(batch)
    entry_batch.check_contiguous(batch)
    assert entry_batch.places_checksum(batch, 3) == reference.places_checksum(batch, 3)
    assert entry_batch.changes(batch) == reference.changes(batch)
    assert entry_batch.heads(batch) == reference.heads(batch)
    for at, (row, made) in enumerate(zip(rows, proposals, strict=True)):
        assert entry_batch.payload(batch, at).to_pybytes() == row[4]
        assert made.checksum == reference.entry_checksum(row[0], row[2], row[3], row[1], row[4])
        assert made.nbytes == len(row[4])
    if rows:
        span = entry_batch.span(batch)
        assert (span.first, span.end) == (first, first + len(rows))
        assert span.terms() == [term] * len(rows)
        assert span.sizes() == [len(row[4]) for row in rows]


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=8), st.data())
def test_slices_are_read_at_their_offset(rows: list[reference.Row], data: st.DataObject) -> None:
    whole = entry_batch.build(1, 10, 4, [proposal(row) for row in rows])
    first = data.draw(st.integers(0, len(rows) - 1))
    part = whole.slice(first, data.draw(st.integers(1, len(rows) - first)))
    entry_batch.verify(part)
    entry_batch.check_contiguous(part)
    assert entry_batch.span(part).first == 10 + first
    assert entry_batch.span(part).sizes() == [len(row[4]) for row in rows[first : first + part.num_rows]]
    assert entry_batch.payload(part, 0).to_pybytes() == rows[first][4]
    assert entry_batch.places_checksum(part) == reference.places_checksum(part)
    assert entry_batch.changes(part) == reference.changes(part)
    assert entry_batch.heads(part) == reference.heads(part)
    assert entry_batch.concat([whole.slice(0, first), whole.slice(first)]).equals(whole)


def test_one_proposal_is_not_copied_and_many_start_aligned() -> None:
    payload = entry_batch.encode_payload(pa.record_batch({"a": [1, 2]}))
    one = entry_batch.build(1, 1, 1, [Proposal(EntryKind.WRITE, 1, payload)])
    assert entry_batch.payload(one, 0).address == payload.address
    many = entry_batch.build(1, 1, 1, [Proposal(EntryKind.WRITE, 1, payload)] * 3)
    assert [entry_batch.payload(many, row).address % 64 for row in range(3)] == [0, 0, 0]


def test_known_checksum() -> None:
    # Fixed for ever, because it is on disk.
    assert entry_batch.entry_checksum(EntryKind.NOOP, 0, 0, 0) == 804390249423707709
    assert entry_batch.entry_checksum(3, 0, 1, 0) != entry_batch.entry_checksum(3, 1, 0, 0)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [(kind, None) for kind in (-1, 0, 1, 3, 8, 11, 12, 13, 14, 256 + 2)]
    + [(kind, bytes(64)) for kind in (1, 2, 9, 10, 11, 14)]
    + [(3, b""), (3, bytes(63))],
)
def test_proposal_refuses(kind: int, payload: bytes | None) -> None:
    with pytest.raises(UsageError):
        Proposal(kind, 1, None if payload is None else pa.py_buffer(payload), 5)


def test_a_session_to_close_must_be_named() -> None:
    with pytest.raises(UsageError, match="must name it"):
        Proposal(EntryKind.CLOSE_SESSION)
    assert Proposal(EntryKind.CLOSE_SESSION, session=4).payload is None
    assert Proposal(EntryKind.OPEN_SESSION).nbytes == 0


def test_proposal_refuses_bytes() -> None:
    with pytest.raises(UsageError, match=r"expected a pyarrow\.Buffer, got bytes"):
        Proposal(3, 1, bytes(64))  # type: ignore[arg-type]


def test_build_refuses_places_outside_the_log() -> None:
    noop = Proposal(EntryKind.NOOP)
    for first, term in ((0, 1), (1, 0), (INDEX_MAX, 1)):
        with pytest.raises(InvariantError):
            entry_batch.build(1, first, term, [noop, noop])
    with pytest.raises(InvariantError, match="taken in at"):
        entry_batch.build(1, 1, 1, [noop], INDEX_MAX + 1)
    with pytest.raises(TypeError):
        entry_batch.build(1, 1, 1, ["noop"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("group", [1, 1, 2], "of group 2, not 1"),
        ("index", [5, 6, 8], "entry 8 follows entry 6"),
        ("index", [5, 6, 6], "entry 6 follows entry 6"),
        ("index", [0, 1, 2], "index 0 is out of range"),
        ("index", [2**63, 2**63 + 1, 2**63 + 2], "out of range"),
        ("term", [2, 3, 2], "term falls from 3 to 2 at entry 7"),
        ("term", [0, 1, 1], "term 0 of entry 5"),
        ("term", [1, 1, 2**63], "out of range"),
        ("kind", [3, 1, 3], "unknown kind 1"),
        ("kind", [3, 0, 3], "unknown kind 0"),
        ("kind", [3, 11, 3], "unknown kind 11"),
        ("kind", [3, 14, 3], "unknown kind 14"),
        ("kind", [3, 9, 3], "entry 6 of kind 9 has a payload"),
        ("kind", [3, 10, 3], "entry 6 of kind 10 has a payload"),
        ("time_us", [0, 2**63, 0], "time 9223372036854775808 of entry 6 is out of range"),
        ("kind", [3, 2, 3], "entry 6 of kind 2 has a payload"),
        ("payload", [bytes(64), b"", bytes(64)], "payload of 0 bytes"),
        ("payload", [bytes(64), bytes(65), bytes(64)], "payload of 65 bytes"),
    ],
)
def test_check_contiguous_refuses(name: str, values: list[object], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        entry_batch.check_contiguous(changed(entries(), name, values))


def test_an_entry_that_closes_no_session_is_refused() -> None:
    batch = entry_batch.build(1, 5, 2, [Proposal(EntryKind.CLOSE_SESSION, session=4)])
    entry_batch.check_contiguous(batch)
    with pytest.raises(ProtocolError, match="entry 5 closes no session"):
        entry_batch.check_contiguous(changed(batch, "session", [0]))


def test_time_may_go_back_and_is_not_the_proposers() -> None:
    batch = changed(entries(), "time_us", [9, 3, 5])
    entry_batch.check_contiguous(batch)
    entry_batch.verify(batch)
    assert entry_batch.places_checksum(batch) != entry_batch.places_checksum(entries())


@settings(max_examples=40, deadline=None)
@given(U32, st.integers(1, INDEX_MAX), st.integers(1, INDEX_MAX), U64, U64, st.one_of(st.just(b""), PAYLOAD))
def test_snapshot_row_agrees_with_twin_and_is_no_entry(
    group: int, index: int, term: int, session: int, sequence: int, payload: bytes
) -> None:
    buffer = pa.py_buffer(payload) if payload else None
    batch = entry_batch.snapshot_row(group, index, term, session, sequence, buffer)
    batch.validate(full=True)
    assert batch.equals(reference.snapshot_row(group, index, term, session, sequence, payload))
    entry_batch.verify(batch)
    assert entry_batch.admit(batch, 1 << 20, snapshot=True).equals(batch)
    assert entry_batch.changes(batch) == ()
    with pytest.raises(ProtocolError, match="unknown kind 11"):
        entry_batch.check_contiguous(batch)
    with pytest.raises(ProtocolError, match="unknown kind 11"):
        entry_batch.admit(batch, 1 << 20)


def test_snapshot_row_refuses_what_cannot_be() -> None:
    for index, term, payload in ((0, 1, None), (1, 0, None), (INDEX_MAX + 1, 1, None), (1, INDEX_MAX + 1, None)):
        with pytest.raises(InvariantError):
            entry_batch.snapshot_row(1, index, term, 0, 0, payload)
    for size in (0, 63, 65):
        with pytest.raises(InvariantError, match="with a payload of"):
            entry_batch.snapshot_row(1, 1, 1, 0, 0, pa.py_buffer(bytes(size)))
    with pytest.raises(UsageError):
        entry_batch.snapshot_row(1, 1, 1, 0, 0, bytes(64))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kind", 3, "kind 3 is no snapshot"),
        ("kind", 1, "kind 1 is no snapshot"),
        ("index", 0, "index 0"),
        ("term", 0, "term 0"),
        ("term", 2**63, "out of range"),
        ("time_us", 1, "a time or a table"),
        ("table", 1, "a time or a table"),
        ("payload", bytes(65), "payload of 65 bytes"),
        ("session", 8, "does not match its checksum"),
    ],
)
def test_admit_of_a_snapshot_refuses(name: str, value: object, message: str) -> None:
    batch = entry_batch.snapshot_row(1, 5, 2, 7, 9, pa.py_buffer(bytes(64)))
    with pytest.raises(ProtocolError, match=message):
        entry_batch.admit(changed(batch, name, [value]), 1 << 20, snapshot=True)
    two = entry_batch.concat([batch, batch])
    with pytest.raises(ProtocolError, match="2 rows"):
        entry_batch.admit(two, 1 << 20, snapshot=True)


def test_nulls_and_other_schemas_are_refused() -> None:
    nullable = pa.schema([field.with_nullable(True) for field in ENTRY_SCHEMA])
    for batch in (
        pa.record_batch({"a": [1]}),
        pa.RecordBatch.from_arrays(entries().columns, schema=nullable),
        changed(entries(), "term", [1, None, 2]),
    ):
        with pytest.raises(ProtocolError):
            entry_batch.check_contiguous(batch)
        with pytest.raises(CorruptionError):
            entry_batch.verify(batch)
        with pytest.raises(UsageError):
            entry_batch.span(batch)
    with pytest.raises(UsageError, match=r"expected a pyarrow\.RecordBatch"):
        entry_batch.verify(pa.table({"a": [1]}))
    with pytest.raises(UsageError):
        entry_batch.span(entries().slice(0, 0))
    with pytest.raises(IndexError):
        entry_batch.payload(entries(), 3)
    with pytest.raises(UsageError):
        entry_batch.concat([])
    entry_batch.check_contiguous(entries().slice(0, 0))
    entry_batch.verify(entries().slice(3))


def test_verify_names_the_damaged_entry() -> None:
    batch = entries()
    payloads = [bytearray(entry_batch.payload(batch, row).to_pybytes()) for row in range(3)]
    payloads[1][-1] ^= 1
    for name, values in (
        ("payload", [bytes(payload) for payload in payloads]),
        ("kind", [3, 4, 3]),
        ("table", [7, 8, 7]),
        ("session", [9, 8, 9]),
        ("sequence", [0, 0, 2]),
        ("checksum", [batch["checksum"][0].as_py(), 1, batch["checksum"][2].as_py()]),
    ):
        with pytest.raises(CorruptionError, match="entry 6 of term 2, group 1"):
            entry_batch.verify(changed(batch, name, values))


def wide_batch() -> pa.RecordBatch:
    return pa.record_batch(
        {
            "key": pa.array([1, 2, 3], pa.int64()),
            "text": pa.array(["a", None, "ccc"]),
            "flag": pa.array([True, None, False]),
            "when": pa.array([datetime.datetime(2013, 1, 1)] * 3, pa.timestamp("us", "UTC")),
            "cash": pa.array([decimal.Decimal("1.5"), None, None], pa.decimal128(10, 2)),
            "list": pa.array([[1], [], None], pa.list_(pa.int32())),
            "pair": pa.array([{"x": 1, "y": "q"}, None, {"x": None, "y": None}]),
            "view": pa.array(["short", "long enough to be out of line", None], pa.string_view()),
            "none": pa.nulls(3),
        }
    )


@pytest.mark.parametrize("batch", [wide_batch(), wide_batch().slice(1, 1), wide_batch().slice(0, 0)])
def test_payload_round_trip_shares_memory_if_aligned(batch: pa.RecordBatch) -> None:
    payload = entry_batch.encode_payload(batch)
    assert payload.size % 64 == 0
    assert payload.address % 64 == 0
    decoded = entry_batch.decode_payload(payload, batch.schema)
    decoded.validate(full=True)
    assert decoded.equals(batch)
    if batch.num_rows:
        start = decoded.column(0).buffers()[1].address
        assert payload.address <= start < payload.address + payload.size
        assert start % 64 == 0
    moved = pa.allocate_buffer(payload.size + 64)
    memoryview(moved)[1 : 1 + payload.size] = memoryview(payload)
    again = entry_batch.decode_payload(moved.slice(1, payload.size), batch.schema)
    assert again.equals(batch)
    if batch.num_rows:
        assert again.column(0).buffers()[1].address % 8 == 0


def test_payload_of_any_ipc_writer_is_taken() -> None:
    batch = wide_batch()
    assert entry_batch.decode_payload(pa.py_buffer(reference.encode_payload(batch)), batch.schema).equals(batch)


def padded(buffer: pa.Buffer) -> pa.Buffer:
    data = buffer.to_pybytes()
    return pa.py_buffer(data + bytes(-len(data) % 64))


def test_compressed_payload_is_refused() -> None:
    batch = pa.record_batch({"a": pa.array([0] * 100_000)})
    for codec in ("zstd", "lz4"):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as stream:
            stream.write_batch(batch)
        messages = list(pa.ipc.MessageReader.open_stream(sink.getvalue()))
        with pytest.raises(ProtocolError, match="compressed"):
            entry_batch.decode_payload(padded(messages[1].serialize()), batch.schema)


def test_what_is_not_a_payload_is_refused() -> None:
    batch = pa.record_batch({"a": [1, 2], "b": ["x", "y"]})
    payload = entry_batch.encode_payload(batch)
    data = payload.to_pybytes()
    only_a = batch.schema.remove(1)
    wider = batch.schema.append(pa.field("c", pa.int64()))
    for buffer, schema in (
        (pa.py_buffer(b""), batch.schema),
        (pa.py_buffer(bytes(64)), batch.schema),
        (pa.py_buffer(data[:-64]), batch.schema),
        (pa.py_buffer(data + bytes(64)), batch.schema),
        (pa.py_buffer(data[:-1] + b"x"), batch.schema),
        (padded(batch.schema.serialize()), batch.schema),
        (payload, only_a),
        (payload, wider),
        (pa.py_buffer(b"\xff\xff\xff\xff" + struct.pack("<i", -8) + data[8:]), batch.schema),
        (pa.py_buffer(b"\xff\xff\xff\xff" + struct.pack("<i", 2**31 - 1) + data[8:]), batch.schema),
    ):
        with pytest.raises(ProtocolError):
            entry_batch.decode_payload(buffer, schema)
    with pytest.raises(UsageError):
        entry_batch.decode_payload(data, batch.schema)
    with pytest.raises(UsageError):
        entry_batch.decode_payload(payload, "a: int64")


def test_no_damaged_payload_crashes() -> None:
    """Every byte of a small payload damaged three ways: refused, or a batch that full validation can judge."""
    batch = pa.record_batch({"key": [1, 2, 3], "text": ["a", None, "ccc"], "list": [[1], [], None]})
    good = entry_batch.encode_payload(batch).to_pybytes()
    outcomes = set()
    for at in range(len(good)):
        for flip in (0x01, 0x80, 0xFF):
            bad = bytearray(good)
            bad[at] ^= flip
            try:
                entry_batch.decode_payload(pa.py_buffer(bytes(bad)), batch.schema).validate(full=True)
                outcomes.add("valid")
            except ProtocolError:
                outcomes.add("refused")
            except pa.ArrowInvalid:
                outcomes.add("invalid")
    assert {"valid", "refused", "invalid"} <= outcomes


def test_encode_refuses_what_arrow_cannot_write() -> None:
    nested = pa.array([1])
    for _ in range(70):
        nested = pa.ListArray.from_arrays([0, 1], nested)
    with pytest.raises(UsageError):
        entry_batch.encode_payload(pa.record_batch({"deep": nested}))
    with pytest.raises(UsageError):
        entry_batch.encode_payload({"a": [1]})


def test_admit_copies_into_one_aligned_allocation() -> None:
    batch = entries()
    admitted = entry_batch.admit(batch, 1 << 20)
    assert admitted.equals(batch)
    assert entry_batch.group_of(admitted) == 1
    starts = [buffer.address for column in admitted.columns for buffer in column.buffers() if buffer is not None]
    assert all(start % 64 == 0 for start in starts)
    assert entry_batch.payload(admitted, 0).address != entry_batch.payload(batch, 0).address


def test_admit_refuses_what_a_peer_may_not_send() -> None:
    batch = entries()
    for bad in (
        batch.slice(0, 0),
        pa.record_batch({"a": [1]}),
        changed(batch, "index", [5, 6, 8]),
        changed(batch, "sequence", [0, 1, 9]),
        changed(batch, "term", [2, None, 2]),
    ):
        with pytest.raises(ProtocolError):
            entry_batch.admit(bad, 1 << 20)
    with pytest.raises(ProtocolError, match="are allowed"):
        entry_batch.admit(batch, 64)
    with pytest.raises(UsageError):
        entry_batch.group_of(batch.slice(0, 0))
