"""Packets: what is encoded comes back; what is changed in any way is refused."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble._core.term_index import EntrySpan
from marble.errors import InvariantError, ProtocolError, UsageError
from marble.raft.messages import Message, MessageKind
from marble.transport.codec import MESSAGES_PER_PACKET_MAX, Codec, Envelope, Packet
from marble.types import INDEX_MAX, EntryKind

ONE = Codec("cluster", 1, 1 << 20)
TWO = Codec("cluster", 2, 1 << 20)
PAYLOAD = entry_batch.encode_payload(pa.record_batch({"a": [1, 2, 3]}))
NUMBER = st.integers(0, INDEX_MAX)


def append(group: int = 7, first: int = 5, rows: int = 2, term: int = 3) -> Envelope:
    batch = entry_batch.build(group, first, term, [Proposal(EntryKind.WRITE, 1, PAYLOAD, 0, at) for at in range(rows)])
    message = Message(
        MessageKind.APPEND_ENTRIES, 1, 2, 4, log_index=first - 1, log_term=2, commit=3, entries=entry_batch.span(batch)
    )
    return Envelope(group, message, batch)


def heartbeat(group: int = 0, commit: int = 0) -> Envelope:
    return Envelope(group, Message(MessageKind.HEARTBEAT, 1, 2, 4, commit=commit))


def decode(packet: Packet) -> list[Envelope]:
    return TWO.decode(1, packet.metadata, packet.batch)


@st.composite
def messages(draw: st.DrawFn) -> Envelope:
    kind = draw(st.sampled_from(list(MessageKind)))
    log_index = draw(st.integers(0, INDEX_MAX - 1))
    entries = EntrySpan.of(log_index + 1, []) if kind is MessageKind.APPEND_ENTRIES else None
    message = Message(
        kind,
        1,
        2,
        draw(NUMBER),
        log_index,
        draw(NUMBER),
        draw(NUMBER),
        entries,
        draw(st.booleans()),
        draw(NUMBER),
        draw(NUMBER),
    )
    return Envelope(draw(st.integers(0, 2**32 - 1)), message)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(messages(), st.builds(append, st.integers(0, 3), st.integers(1, 9), st.integers(1, 3)))))
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
    packet = ONE.encode(2, [heartbeat(commit=9), append()])[0]
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
    for envelope in (append()._replace(batch=None), heartbeat()._replace(batch=append().batch)):
        with pytest.raises(InvariantError):
            ONE.encode(2, [envelope])
    with pytest.raises(InvariantError):
        ONE.encode(3, [heartbeat()])


def test_hello_names_sender_and_is_for_one_node_of_one_cluster() -> None:
    hello = ONE.hello(2)
    assert TWO.check_hello(hello) == 1
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
