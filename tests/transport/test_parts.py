"""What is said about packets in parts: it comes back as it was, and nothing else is believed."""

from __future__ import annotations

import struct

import pyarrow as pa
import pytest

from marble._core import entry_batch
from marble._core.checksum import xxh3_64
from marble._core.entry_batch import Proposal
from marble.errors import ProtocolError
from marble.raft.messages import Message, MessageKind
from marble.transport.codec import Codec, Envelope, Lane, Packet
from marble.transport.messages import MessageCodec
from marble.transport.parts import (
    PART_BYTES,
    SPREAD_BYTES_MIN,
    Kind,
    Notice,
    PartsCodec,
    is_notice,
    payload_bytes,
    put_together,
    take_apart,
)
from marble.types import EntryKind

MOST = 1 << 20
RAFT = {node: Codec("c", node, MOST) for node in (1, 2)}
ONE, TWO = PartsCodec(RAFT[1]), PartsCodec(RAFT[2])
WHOLE = pa.py_buffer(bytes(range(256)) * (PART_BYTES // 256))
TOTAL = PART_BYTES + 10

GOOD = {
    "open": (Notice(Kind.OPEN, 2**64 - 1), b"", None),
    "open-answer": (Notice(Kind.OPEN, 5, 0, 0, 32 << 20), b"", None),
    "stub": (Notice(Kind.BYTES, 5, 9, 0, TOTAL), b"metadata", None),
    "stub-batch": (Notice(Kind.BATCH, 5, 9, 0, ONE.payload_bytes_max), b"metadata", None),
    "stub-metadata": (Notice(Kind.METADATA, 5, 9, 0, SPREAD_BYTES_MIN), b"", None),
    "part": (Notice(Kind.PART, 5, 9, 0, TOTAL), b"", WHOLE),
    "last-part": (Notice(Kind.PART, 5, 9, PART_BYTES, TOTAL), b"", WHOLE.slice(0, 10)),
    "no-part": (Notice(Kind.PART, 0), b"", None),
    "end": (Notice(Kind.END, 0), b"", None),
    "taken": (Notice(Kind.TAKEN, 5, 10), b"", None),
    "arrived": (Notice(Kind.ARRIVED, 5, 9, PART_BYTES, TOTAL), b"", None),
}
BAD = {
    "stub too small": (Notice(Kind.BYTES, 5, 9, 0, SPREAD_BYTES_MIN - 1), b"m", None),
    "stub too large": (Notice(Kind.BATCH, 5, 9, 0, ONE.payload_bytes_max + 1), b"m", None),
    "stub of a place": (Notice(Kind.BYTES, 5, 9, PART_BYTES, TOTAL), b"m", None),
    "part too small": (Notice(Kind.PART, 5, 9, 0, TOTAL), b"", WHOLE.slice(0, 10)),
    "part too large": (Notice(Kind.PART, 5, 9, PART_BYTES, TOTAL), b"", WHOLE),
    "part of none": (Notice(Kind.PART, 5, 9, 0, 0), b"", WHOLE),
    "part beyond": (Notice(Kind.PART, 5, 9, 2 * PART_BYTES, TOTAL), b"", None),
    "part far beyond": (Notice(Kind.PART, 5, 9, 2**64 - PART_BYTES, TOTAL), b"", WHOLE),
    "part without bytes": (Notice(Kind.PART, 5, 9, 0, TOTAL), b"", None),
    "part askew": (Notice(Kind.PART, 5, 9, 1, PART_BYTES + 1), b"", WHOLE),
    "part of a huge payload": (Notice(Kind.PART, 5, 9, 0, 2**63), b"", WHOLE),
    "opening with more": (Notice(Kind.OPEN, 5), b"m", None),
    "part with more": (Notice(Kind.PART, 5, 9, 0, TOTAL), b"m", WHOLE),
}


def packet(what: tuple[Notice, bytes, pa.Buffer | None]) -> Packet:
    notice, rest, part = what
    return ONE.encode(2, notice, rest) if part is None else ONE.encode(2, notice, rest, part)


@pytest.mark.parametrize("what", GOOD.values(), ids=list(GOOD))
def test_notice_comes_back(what: tuple[Notice, bytes, pa.Buffer | None]) -> None:
    made = packet(what)
    assert is_notice(pa.py_buffer(made.metadata))
    notice, rest, part = TWO.decode(1, pa.py_buffer(made.metadata), made.batch)
    assert (notice, rest) == what[:2]
    assert part.to_pybytes() == (b"" if what[2] is None else what[2].to_pybytes())


@pytest.mark.parametrize("what", BAD.values(), ids=list(BAD))
def test_what_cannot_be_is_refused(what: tuple[Notice, bytes, pa.Buffer | None]) -> None:
    made = packet(what)
    with pytest.raises(ProtocolError):
        TWO.decode(1, made.metadata, made.batch)


def test_bytes_beside_anything_but_a_part_are_refused() -> None:
    stub = packet(GOOD["stub"])
    with pytest.raises(ProtocolError):
        TWO.decode(1, stub.metadata, packet(GOOD["part"]).batch)


@pytest.mark.parametrize("name", ["stub", "last-part", "taken"])
def test_every_flipped_bit_is_noticed(name: str) -> None:
    made = packet(GOOD[name])
    for at in range(8 * len(made.metadata)):
        turned = bytearray(made.metadata)
        turned[at // 8] ^= 1 << at % 8
        with pytest.raises(ProtocolError):
            TWO.decode(1, bytes(turned), made.batch)
    if made.batch is not None:
        other = ONE.encode(2, Notice(Kind.PART, 5, 9, PART_BYTES, TOTAL), b"", WHOLE.slice(1, 10))
        with pytest.raises(ProtocolError, match="checksum"):
            TWO.decode(1, made.metadata, other.batch)


def test_strangers_are_refused() -> None:
    made = packet(GOOD["taken"])
    for sender, codec in ((3, TWO), (1, ONE), (1, PartsCodec(Codec("other", 2, MOST)))):
        with pytest.raises(ProtocolError):
            codec.decode(sender, made.metadata)
    for metadata in (None, b"", made.metadata[:-1], made.metadata + b"x"):
        with pytest.raises(ProtocolError):
            TWO.decode(1, metadata)


@pytest.mark.parametrize("kind", [0, 9, 2**32 - 1])
def test_unknown_kinds_are_refused(kind: int) -> None:
    metadata = bytearray(packet(GOOD["taken"]).metadata)
    metadata[32:36] = struct.pack("<I", kind)
    metadata[8:16] = struct.pack("<Q", xxh3_64(metadata[16:]))
    with pytest.raises(ProtocolError, match="nothing that is said"):
        TWO.decode(1, bytes(metadata))


def entries() -> Packet:
    batch = entry_batch.build(
        7, 5, 3, [Proposal(EntryKind.WRITE, 1, WHOLE, 0, 0), Proposal(EntryKind.NOOP, 0, None, 0, 0)]
    )
    message = Message(MessageKind.APPEND_ENTRIES, 1, 2, 4, log_index=4, log_term=2, entries=entry_batch.span(batch))
    (made,) = RAFT[1].encode(2, [Envelope(7, message, batch)])
    return made


def test_packet_of_entries_comes_back() -> None:
    made = entries()
    assert payload_bytes(made) >= SPREAD_BYTES_MIN
    kind, metadata, payload = take_apart(Lane.LOG, made)
    assert kind is Kind.BATCH
    again, batch = put_together(kind, metadata, payload)
    (envelope,) = RAFT[2].decode(1, again.to_pybytes(), batch)
    assert envelope.batch is not None
    assert made.batch is not None
    assert envelope.batch.equals(made.batch)


def test_packet_of_messages_comes_back() -> None:
    (made,) = MessageCodec(RAFT[1], MOST).encode(2, 7, 3, [WHOLE])
    kind, metadata, payload = take_apart(Lane.MESSAGES, made)
    assert (kind, payload.address) == (Kind.BYTES, WHOLE.address)
    header, body = MessageCodec(RAFT[2], MOST).decode(1, *put_together(kind, metadata, payload))
    assert (header.epoch, header.first, body.to_pybytes()) == (7, 3, WHOLE.to_pybytes())


def test_packet_of_metadata_comes_back() -> None:
    made = Packet(WHOLE.to_pybytes(), None)
    kind, metadata, payload = take_apart(Lane.LOG, made)
    assert (kind, metadata, payload_bytes(made)) == (Kind.METADATA, b"", PART_BYTES)
    again, batch = put_together(kind, metadata, payload)
    assert (again.to_pybytes(), batch) == made


def test_payload_that_is_no_batch_is_refused() -> None:
    with pytest.raises(ProtocolError):
        put_together(Kind.BATCH, b"", WHOLE)
