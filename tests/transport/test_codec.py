"""Packets: what is encoded comes back; what is changed in any way is refused."""

from __future__ import annotations

import struct

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marble._core import entry_batch
from marble._core.checksum import xxh3_64
from marble._core.entry_batch import Proposal
from marble._core.term_index import EntrySpan
from marble.errors import InvariantError, ProtocolError, UsageError
from marble.members import encode_members
from marble.raft.messages import PRIORITY_MAX, Message, MessageKind
from marble.schema import ENTRY_SCHEMA
from marble.transport.codec import MESSAGES_PER_PACKET_MAX, Codec, Envelope, Lane, Packet
from marble.transport.snapshot_rows import Offer, Piece, offer_of, offer_row, piece_of, piece_row
from marble.types import INDEX_MAX, EntryKind, Members, Position, SnapshotMeta

ONE = Codec("cluster", 1, 1 << 20)
TWO = Codec("cluster", 2, 1 << 20)
META = SnapshotMeta(9, 3, Members((1, 2), (2, 3), (4,), (3,), True))
ENDPOINTS = {1: "a:7001", 4: "d:7004"}
PAYLOAD = entry_batch.encode_payload(pa.record_batch({"a": [1, 2, 3]}))
NUMBER = st.integers(0, INDEX_MAX)


def append(group: int = 7, first: int = 5, rows: int = 2, term: int = 3) -> Envelope:
    kinds = [EntryKind.MEMBERSHIP if at % 2 else EntryKind.WRITE for at in range(rows)]
    proposals = [Proposal(kind, 1, PAYLOAD, 0, at) for at, kind in enumerate(kinds)]
    batch = entry_batch.build(group, first, term, proposals, 77)
    message = Message(
        MessageKind.APPEND_ENTRIES,
        1,
        2,
        4,
        log_index=first - 1,
        log_term=2,
        commit=3,
        entries=entry_batch.span(batch),
        changes=entry_batch.changes(batch),
    )
    return Envelope(group, message, batch)


def offer(group: int = 7, nbytes: int = 1000) -> Envelope:
    message = Message(MessageKind.INSTALL_SNAPSHOT, 1, 2, 4, log_index=9, log_term=3, members=META.members)
    return Envelope(group, message, offer_row(group, META, ENDPOINTS, nbytes, 2**64 - 1))


def piece(group: int = 7, offset: int = 64, data: bytes = b"some bytes") -> Envelope:
    message = Message(MessageKind.SNAPSHOT_PIECE, 1, 2, 4, log_index=9, log_term=3, context=offset)
    return Envelope(group, message, piece_row(group, Position(9, 3), offset, data))


def refused_piece() -> Message:
    return Message(MessageKind.SNAPSHOT_PIECE, 1, 2, 4, log_index=9, log_term=3, reject=True)


def replaced(batch: pa.RecordBatch, name: str, value: object) -> pa.RecordBatch:
    """The one row `batch` with another value in the column `name`."""
    at = batch.schema.get_field_index(name)
    columns = [pa.array([value], field.type) if i == at else batch.column(i) for i, field in enumerate(batch.schema)]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def forged(envelope: Envelope) -> Packet:
    """The packet of `envelope`, whose parts need not fit each other, with the right checksum."""
    message, batch = envelope.message, envelope.batch
    flags = (1 if message.reject else 0) | (0 if batch is None else 2)
    numbers = (message.term, message.log_index, message.log_term, message.commit, message.reject_hint, message.context)
    body = struct.pack("<IBBH6Q", envelope.group, message.kind, flags, message.priority, *numbers)
    rows, seed = (0, 0) if batch is None else (batch.num_rows, entry_batch.places_checksum(batch))
    rest = struct.pack("<QIIII", xxh3_64(b"cluster"), 1, 2, 1, rows) + body
    return Packet(struct.pack("<4sHHQ", b"MBLP", 1, 0, xxh3_64(rest, seed)) + rest, batch)


def heartbeat(group: int = 0, commit: int = 0) -> Envelope:
    return Envelope(group, Message(MessageKind.HEARTBEAT, 1, 2, 4, commit=commit))


def decode(packet: Packet) -> list[Envelope]:
    return TWO.decode(1, packet.metadata, packet.batch)


@st.composite
def messages(draw: st.DrawFn) -> Envelope:
    kind = draw(st.sampled_from([kind for kind in MessageKind if kind is not MessageKind.INSTALL_SNAPSHOT]))
    log_index = draw(st.integers(0, INDEX_MAX - 1))
    entries = EntrySpan.of(log_index + 1, []) if kind is MessageKind.APPEND_ENTRIES else None
    # A piece that is not refused brings a row, as `piece` does.
    reject = kind is MessageKind.SNAPSHOT_PIECE or draw(st.booleans())
    message = Message(
        kind,
        1,
        2,
        draw(NUMBER),
        log_index,
        draw(NUMBER),
        draw(NUMBER),
        entries,
        reject,
        draw(NUMBER),
        draw(NUMBER),
        draw(st.integers(0, PRIORITY_MAX)),
    )
    return Envelope(draw(st.integers(0, 2**32 - 1)), message)


GROUP = st.integers(0, 3)
BRINGING = st.one_of(
    st.builds(append, GROUP, st.integers(1, 9), st.integers(1, 3)),
    st.builds(offer, GROUP, st.integers(1, INDEX_MAX)),
    st.builds(piece, GROUP, st.integers(0, 2**40), st.binary(min_size=1, max_size=200)),
)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.one_of(messages(), BRINGING)))
def test_round_trip_keeps_messages_rows_and_order(envelopes: list[Envelope]) -> None:
    packets = ONE.encode(2, envelopes)
    back = [envelope for packet in packets for envelope in decode(packet)]
    assert [(e.group, e.message) for e in back] == [(e.group, e.message) for e in envelopes]
    for got, sent in zip(back, envelopes, strict=True):
        assert (got.batch is None) == (sent.batch is None)
        assert got.batch is None or got.batch.equals(sent.batch)


def test_each_packet_brings_entries_once() -> None:
    packets = ONE.encode(2, [heartbeat(), append(first=5), append(first=7), heartbeat(), append(first=9)])
    assert [(len(decode(packet)), packet.batch.num_rows) for packet in packets] == [(2, 2), (2, 2), (1, 2)]
    assert [len(decode(packet)) for packet in ONE.encode(2, [heartbeat()] * (MESSAGES_PER_PACKET_MAX + 1))] == [
        MESSAGES_PER_PACKET_MAX,
        1,
    ]
    assert decode(ONE.encode(2, [])[0]) == []


def test_rows_arrive_aligned_and_unshared() -> None:
    packet = ONE.encode(2, [append()])[0]
    envelope = decode(packet)[0]
    assert envelope.batch is not None
    address = entry_batch.payload(envelope.batch, 1).address
    assert address % 64 == 0
    assert address != entry_batch.payload(packet.batch, 1).address


def test_any_changed_byte_of_the_metadata_is_refused() -> None:
    for bringing in (append(), offer(), piece()):
        flip_and_cut(ONE.encode(2, [heartbeat(commit=9), bringing])[0])


def flip_and_cut(packet: Packet) -> None:
    for at in range(len(packet.metadata)):
        changed = bytearray(packet.metadata)
        changed[at] ^= 0x10
        with pytest.raises(ProtocolError):
            TWO.decode(1, bytes(changed), packet.batch)
    for size in range(len(packet.metadata)):
        with pytest.raises(ProtocolError):
            TWO.decode(1, packet.metadata[:size], packet.batch)
    with pytest.raises(ProtocolError):
        TWO.decode(1, packet.metadata + bytes(56), packet.batch)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("group", [8, 8]),
        ("index", [6, 7]),
        ("index", [5, 5]),
        ("term", [2, 3]),
        ("term", [3, 4]),
        ("kind", [3, 4]),
        ("session", [0, 1]),
        ("sequence", [0, 2]),
        ("time_us", [77, 78]),
        ("table", [1, 2]),
        ("checksum", [1, 2]),
        ("payload", [PAYLOAD.to_pybytes(), PAYLOAD.to_pybytes()[:-1] + b"x"]),
        ("payload", [PAYLOAD.to_pybytes(), None]),
    ],
)
def test_any_changed_column_of_the_entries_is_refused(name: str, values: list[object]) -> None:
    packet = ONE.encode(2, [append()])[0]
    at = packet.batch.schema.get_field_index(name)
    column = pa.array(values, packet.batch.schema.field(at).type)
    columns = [column if i == at else packet.batch.column(i) for i in range(packet.batch.num_columns)]
    with pytest.raises(ProtocolError):
        TWO.decode(1, packet.metadata, pa.RecordBatch.from_arrays(columns, schema=packet.batch.schema))


@pytest.mark.parametrize("bringing", [offer(), piece()], ids=["offer", "piece"])
@pytest.mark.parametrize("name", ENTRY_SCHEMA.names)
def test_any_changed_column_of_a_snapshots_row_is_refused(bringing: Envelope, name: str) -> None:
    packet = ONE.encode(2, [bringing])[0]
    assert packet.batch is not None
    value = packet.batch.column(name)[0].as_py()
    for other in (None, value + bytes(64), b"") if isinstance(value, bytes) else (None, value ^ 1):
        batch = replaced(packet.batch, name, other)
        with pytest.raises(ProtocolError):
            TWO.decode(1, packet.metadata, batch)


def test_wrong_batches_are_refused() -> None:
    packet = ONE.encode(2, [append()])[0]
    for batch in (None, packet.batch.slice(0, 1), packet.batch.slice(0, 0), pa.record_batch({"a": [1, 2]})):
        with pytest.raises(ProtocolError):
            TWO.decode(1, packet.metadata, batch)
    empty = ONE.encode(2, [heartbeat()])[0]
    for batch in (packet.batch, packet.batch.slice(0, 0)):
        with pytest.raises(ProtocolError):
            TWO.decode(1, empty.metadata, batch)


def test_offsets_that_lead_outside_the_payloads_are_refused() -> None:
    packet = ONE.encode(2, [append()])[0]
    for offsets in ([0, PAYLOAD.size, 2**30], [0, 2 * PAYLOAD.size, PAYLOAD.size], [-64, 0, 64]):
        # pyarrow makes no such array itself: change the offsets in the bytes of a good message.
        good = packet.batch.serialize().to_pybytes()
        true = pa.array([0, PAYLOAD.size, 2 * PAYLOAD.size], pa.int32()).buffers()[1].to_pybytes()[:12]
        assert good.count(true) == 1
        forged = good.replace(true, pa.array(offsets, pa.int32()).buffers()[1].to_pybytes()[:12])
        batch = pa.ipc.read_record_batch(pa.py_buffer(forged), packet.batch.schema)
        with pytest.raises(ProtocolError):
            TWO.decode(1, packet.metadata, batch)


def test_more_bytes_than_allowed_are_refused() -> None:
    small = Codec("cluster", 2, 4 * PAYLOAD.size)
    assert small.decode(1, *ONE.encode(2, [append(rows=1)])[0])
    with pytest.raises(ProtocolError, match="are allowed"):
        small.decode(1, *ONE.encode(2, [append(rows=5)])[0])


def test_packets_for_others_are_refused() -> None:
    packet = ONE.encode(2, [heartbeat()])[0]
    for codec, sender in ((Codec("other", 2, 1), 1), (Codec("cluster", 3, 1), 1), (TWO, 3)):
        with pytest.raises(ProtocolError, match="on the stream from"):
            codec.decode(sender, packet.metadata, None)


def test_a_packet_without_its_entries_is_our_fault() -> None:
    for envelope in (
        append()._replace(batch=None),
        heartbeat()._replace(batch=append().batch),
        offer()._replace(batch=None),
        piece()._replace(batch=None),
        piece()._replace(message=refused_piece()),
        append()._replace(batch=entry_batch.concat([piece().batch, piece().batch, piece().batch])),
    ):
        with pytest.raises(InvariantError):
            ONE.encode(2, [envelope])
    with pytest.raises(InvariantError):
        ONE.encode(3, [heartbeat()])


def test_hello_names_sender_and_is_for_one_node_of_one_cluster() -> None:
    hello = ONE.hello(2)
    assert TWO.check_hello(hello) == (1, "", 0, Lane.CONTROL, 0, False)
    full = ONE.hello(2, "h:1", 2**64 - 1, Lane.BULK, 2**32 - 1)
    assert TWO.check_hello(full) == (1, "h:1", 2**64 - 1, Lane.BULK, 2**32 - 1, False)
    assert TWO.check_hello(ONE.hello(0)).question
    unknown = bytearray(full)
    unknown[36] = 200
    unknown[8:16] = xxh3_64(bytes(unknown[16:])).to_bytes(8, "little")
    with pytest.raises(ProtocolError, match="unknown purpose, 200"):
        TWO.check_hello(bytes(unknown))
    for codec, message in (
        (Codec("other", 2, 1), "of cluster 'other', not 'cluster'"),
        (Codec("cluster", 3, 1), "this is node 3, not 2"),
    ):
        with pytest.raises(ProtocolError, match=message):
            codec.check_hello(hello)
    with pytest.raises(ProtocolError, match="cannot be the id of a peer"):
        TWO.check_hello(TWO.hello(2))
    for at in range(len(hello)):
        changed = bytearray(hello)
        changed[at] ^= 1
        with pytest.raises(ProtocolError):
            TWO.check_hello(bytes(changed))
        with pytest.raises(ProtocolError):
            TWO.check_hello(hello[:at])


@pytest.mark.parametrize(("cluster_id", "node_id"), [("", 1), ("x" * 256, 1), ("c", 0), ("c", 2**32)])
def test_codec_refuses_names_that_do_not_fit(cluster_id: str, node_id: int) -> None:
    with pytest.raises(UsageError):
        Codec(cluster_id, node_id, 1)


def test_rows_of_a_snapshot_tell_what_was_put_in() -> None:
    envelope = decode(ONE.encode(2, [offer()])[0])[0]
    assert envelope.message.members == META.members
    assert envelope.batch is not None
    assert offer_of(envelope.batch) == Offer(META, ENDPOINTS, 1000, 2**64 - 1)
    for data in (b"x", bytes(63), bytes(range(64)), bytes(65)):
        envelope = decode(ONE.encode(2, [piece(offset=5, data=data)])[0])[0]
        assert envelope.batch is not None
        assert piece_of(envelope.batch) == Piece(Position(9, 3), 5, pa.py_buffer(data))
        assert envelope.nbytes - heartbeat().nbytes == (len(data) + 63) // 64 * 64
    assert piece_row(7, Position(9, 3), 5, memoryview(b"abc")).equals(piece_row(7, Position(9, 3), 5, b"abc"))


def test_each_packet_brings_one_snapshot_row() -> None:
    packets = ONE.encode(2, [piece(offset=0), append(), piece(offset=64), heartbeat(), offer()])
    assert [[e.message.kind.name for e in decode(packet)] for packet in packets] == [
        ["SNAPSHOT_PIECE"],
        ["APPEND_ENTRIES"],
        ["SNAPSHOT_PIECE", "HEARTBEAT"],
        ["INSTALL_SNAPSHOT"],
    ]


def row_like(kind: int = 11, session: int = 10, sequence: int = 10, payload: bytes = bytes(64)) -> pa.RecordBatch:
    """A row at index 9, term 3 of group 7, with the checksum of its content."""
    checksum = entry_batch.entry_checksum(kind, session, sequence, 0, pa.py_buffer(payload))
    values = (7, 9, 3, kind, session, sequence, 0, 0, checksum, payload)
    return pa.record_batch(
        [pa.array([value], field.type) for value, field in zip(values, ENTRY_SCHEMA, strict=True)], schema=ENTRY_SCHEMA
    )


def test_a_forged_packet_is_as_a_true_one() -> None:
    for envelope in (heartbeat(), append(), offer(), piece()):
        packet = ONE.encode(2, [envelope])[0]
        assert forged(envelope).metadata == packet.metadata
        assert decode(forged(envelope))[0].message == envelope.message
    assert decode(forged(piece()._replace(batch=row_like())))


MEMBERS = encode_members(META.members, ENDPOINTS).to_pybytes()
OFFER = offer().message
PIECE = piece().message


@pytest.mark.parametrize(
    ("message", "batch", "words"),
    [
        pytest.param(PIECE, row_like(kind=3), "kind 3 is no snapshot", id="an entry as a piece"),
        pytest.param(PIECE, row_like(sequence=0), "a piece of 0 bytes", id="an empty piece"),
        pytest.param(PIECE, row_like(sequence=65), "a piece of 65 bytes", id="a piece longer than its payload"),
        pytest.param(PIECE, row_like(payload=bytes(128)), "in a payload of 128", id="a payload longer than its piece"),
        pytest.param(PIECE, row_like(payload=b""), "in a payload of 0", id="a piece without payload"),
        pytest.param(PIECE, row_like(payload=bytes(63) + b"x"), "behind its end", id="bytes after the piece"),
        pytest.param(PIECE, row_like(session=INDEX_MAX), "a piece of 10 bytes at", id="a piece beyond all files"),
        pytest.param(PIECE, piece_row(7, Position(8, 3), 0, b"x"), "index=9, term=3", id="a piece of another index"),
        pytest.param(PIECE, piece_row(7, Position(9, 2), 0, b"x"), "index=9, term=3", id="a piece of another term"),
        pytest.param(
            PIECE, piece_row(6, Position(9, 3), 0, b"x"), "of group 7 with rows of group 6", id="another group"
        ),
        pytest.param(PIECE, None, "with 0 rows", id="no piece"),
        pytest.param(refused_piece(), row_like(), "with 1 rows", id="a piece that is refused and brought"),
        pytest.param(OFFER, None, "with no members", id="no offer"),
        pytest.param(OFFER, row_like(), "a payload", id="an offer without members"),
        pytest.param(OFFER, row_like(payload=b""), "a payload", id="an offer without payload"),
        pytest.param(OFFER, row_like(session=0, payload=MEMBERS), "snapshot of 0 bytes", id="an offer of nothing"),
        pytest.param(OFFER, row_like(session=2**63, payload=MEMBERS), "snapshot of 9223", id="an offer of too much"),
        pytest.param(OFFER, append(7, 10, 1).batch, "kind 3 is no snapshot", id="an entry as an offer"),
        pytest.param(append(7, 9, 1).message, row_like(), "unknown kind 11", id="a snapshot as an entry"),
        pytest.param(heartbeat(7).message, row_like(), "unknown kind 11", id="a heartbeat with a snapshot"),
        pytest.param(
            heartbeat(7).message, append(7, 9, 1).batch, "HEARTBEAT cannot bring", id="a heartbeat with entries"
        ),
        pytest.param(
            Message(MessageKind.INSTALL_SNAPSHOT, 1, 2, 2, log_index=9, log_term=3, members=META.members),
            row_like(payload=MEMBERS),
            "of term 3 by a leader of term 2",
            id="an offer from the past",
        ),
        pytest.param(
            Message(MessageKind.SNAPSHOT_FETCH, 1, 2, 4, log_index=9, log_term=3),
            append(7, 9, 1).batch,
            "SNAPSHOT_FETCH cannot bring",
            id="a request with entries",
        ),
    ],
)
def test_rows_that_do_not_fit_their_message_are_refused(
    message: Message, batch: pa.RecordBatch | None, words: str
) -> None:
    with pytest.raises(ProtocolError, match=words):
        decode(forged(Envelope(7, message, batch)))


def test_rows_that_several_messages_claim_are_refused() -> None:
    for first, second in ((append(), append()), (piece(), append()), (piece(), piece())):
        packets = [forged(first), forged(second)]
        rest = packets[0].metadata[16:32] + struct.pack("<II", 2, first.batch.num_rows)
        rest += b"".join(packet.metadata[40:] for packet in packets)
        digest = xxh3_64(rest, entry_batch.places_checksum(first.batch))
        with pytest.raises(ProtocolError, match="2 messages of a packet bring"):
            TWO.decode(1, packets[0].metadata[:8] + struct.pack("<Q", digest) + rest, first.batch)


def test_rows_of_a_snapshot_are_not_made_of_nonsense() -> None:
    for offset, data in ((0, b""), (-1, b"x"), (INDEX_MAX, b"x")):
        with pytest.raises(InvariantError, match="a piece of"):
            piece_row(7, Position(9, 3), offset, data)
    for nbytes in (0, INDEX_MAX + 1):
        with pytest.raises(InvariantError, match="a snapshot of"):
            offer_row(7, META, {}, nbytes, 0)
    with pytest.raises(InvariantError, match="no members"):
        offer_row(7, META, {9: "z:1"}, 1, 0)
    for batch in (append(rows=1).batch, append(rows=2).batch):
        for read in (offer_of, piece_of):
            with pytest.raises(InvariantError):
                read(batch)


@settings(deadline=None, max_examples=150)
@given(BRINGING, st.data())
def test_no_written_over_packet_gets_by(envelope: Envelope, data: st.DataObject) -> None:
    """Whatever is written over a packet, and sealed again as if it had been meant, is refused or a message that can be."""
    packet = ONE.encode(2, [envelope])[0]
    metadata = bytearray(packet.metadata)
    for _ in range(data.draw(st.integers(1, 4))):
        metadata[data.draw(st.integers(16, len(metadata) - 1))] = data.draw(st.integers(0, 255))
    metadata[8:16] = struct.pack("<Q", xxh3_64(bytes(metadata[16:]), entry_batch.places_checksum(packet.batch)))
    try:
        (found,) = TWO.decode(1, bytes(metadata), packet.batch)
    except ProtocolError:
        return
    assert found.batch is not None
    assert found.batch.equals(packet.batch)
    assert ONE.encode(2, [found])[0].metadata == bytes(metadata)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200))
def test_garbage_is_no_packet_and_no_hello(data: bytes) -> None:
    for batch in (None, append().batch):
        with pytest.raises(ProtocolError):
            TWO.decode(1, data, batch)
    with pytest.raises(ProtocolError):
        TWO.check_hello(data)
