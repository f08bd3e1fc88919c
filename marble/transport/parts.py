"""Large packets in parts, as bytes: what is said on streams between nodes that are joined by several ways.

The stream that gives the order carries a *stub* in the place of a packet: all of it but its payload. The payload is cut into parts of
`PART_BYTES`, which travel on streams of `Lane.PARTS`, of any way. Both ends answer for what has come. ``docs/transport.md`` has the
bytes; `marble.transport.spreading` cuts and sends, `marble.transport.assembly` puts together.

Rule 1: nothing that arrives is trusted. What is wrong in any way is a `ProtocolError`, raised before any of it is used.
Rule 2: a part has a checksum of its own, so that a way that turns bits breaks its own stream and no other. That the whole is right is
said, and checked, by the packet's own checksum, which covers its payload as it does without parts.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple

import pyarrow as pa

from marble._core import entry_batch
from marble._core.checksum import xxh3_64
from marble._core.entry_batch import ENTRY_SCHEMA
from marble._core.packing import batch_of_bytes, bytes_of_batch
from marble.errors import ProtocolError
from marble.transport.codec import PROTOCOL_VERSION, Codec, Lane, Packet

PART_BYTES: Final = 256 << 10
"""Of each part of a payload but its last. On the wire: the receiver counts on it."""
SPREAD_BYTES_MIN: Final = 256 << 10
"""A packet with less payload is never cut: it costs less than the parts' heads."""
HELD_BYTES_MAX: Final = 32 << 20
"""Of payloads that are under way in parts for one stream: 320 MB/s at 100 ms."""
FRAME_BYTES_MAX: Final = 64 << 10
"""What a payload may have beyond the largest batch: its frame as an Arrow message, generously."""

_HEADER: Final = struct.Struct("<4sHHQQIIIIQQQQ")
"""magic, version, zero, checksum; cluster, sender, to, kind, zero, flow, number, offset, total."""
_COVERED: Final = 16
_MAGIC: Final = b"MBLS"
_NOTHING: Final = pa.py_buffer(b"")


class Kind(enum.IntEnum):
    """What a chunk says. The numbers are on the wire: never reuse one."""

    OPEN = 1
    """On a stream that gives an order: there may be stubs on it. In answer: there may, and `total` bytes may be under way."""
    BYTES = 2
    """A stub: the payload is the bytes of the packet's only column."""
    BATCH = 3
    """A stub: the payload is the packet's batch as an Arrow message."""
    METADATA = 4
    """A stub: the payload is the packet's metadata, and it has no batch."""
    PART = 5
    """A part, on a stream of `Lane.PARTS`; of no bytes: only the stream is to be looked at."""
    TAKEN = 6
    """In answer to stubs: all packets before `number` are taken."""
    ARRIVED = 7
    """In answer to a part: it has come."""
    END = 8
    """Nothing more comes on this stream: who is told so ends it."""


STUBS: Final = frozenset({Kind.BYTES, Kind.BATCH, Kind.METADATA})
_KINDS: Final = {int(kind): kind for kind in Kind}


class Notice(NamedTuple):
    """What the head of a chunk says."""

    kind: Kind
    flow: int
    """Which stream that gives an order it is about: a number that its sender has drawn."""
    number: int = 0
    """Of the packet among those in parts of that stream, from 0."""
    offset: int = 0
    """Of the part in the payload."""
    total: int = 0
    """Bytes of the payload."""


def is_notice(metadata: pa.Buffer) -> bool:
    """Whether a chunk with this metadata is one of these, and not a packet."""
    return bytes(memoryview(metadata)[:4]) == _MAGIC


class PartsCodec:
    """Packs for and unpacks from the peers of one node. Immutable; any thread may use it.

    Parameters
    ----------
    codec
        Of this node.
    """

    def __init__(self, codec: Codec) -> None:
        self.node_id = codec.node_id
        self.payload_bytes_max = codec.entry_bytes_max + FRAME_BYTES_MAX
        """The largest payload that is taken."""
        self._cluster = codec.cluster_hash

    def encode(self, to: int, notice: Notice, rest: bytes = b"", part: pa.Buffer = _NOTHING) -> Packet:
        """The chunk that says `notice`, with the packet's metadata behind it (a stub) or with a part's bytes."""
        kind, *place = notice
        fields = (self._cluster, self.node_id, to, kind, 0, *place)
        covered = _HEADER.pack(_MAGIC, PROTOCOL_VERSION, 0, 0, *fields)[_COVERED:] + rest
        head = _HEADER.pack(_MAGIC, PROTOCOL_VERSION, 0, xxh3_64(covered, xxh3_64(part)), *fields)
        return Packet(head + rest, batch_of_bytes(part) if part.size else None)

    def decode(
        self, sender: int, metadata: pa.Buffer | bytes | None, batch: pa.RecordBatch | None = None
    ) -> tuple[Notice, bytes, pa.Buffer]:
        """What a chunk of `sender` says; the metadata behind it, and the bytes of the part.

        Raises
        ------
        ProtocolError
            Anything at all is wrong with it; nothing of it may be used.
        """
        head = memoryview(b"" if metadata is None else metadata)
        if len(head) < _HEADER.size:
            raise ProtocolError(f"{len(head)} bytes of metadata where a packet in parts was expected")
        magic, version, zero, digest, cluster, from_, to, number, zeros, *place = _HEADER.unpack_from(head)
        kind = _KINDS.get(number)
        if magic != _MAGIC or version != PROTOCOL_VERSION or kind is None or zero or zeros:
            raise ProtocolError("nothing that is said about a packet in parts of this protocol")
        if cluster != self._cluster or from_ != sender or to != self.node_id:
            raise ProtocolError(f"a packet in parts from {from_} to {to} on the stream from {sender} to {self.node_id}")
        part = _NOTHING if batch is None else bytes_of_batch(batch)
        if xxh3_64(head[_COVERED:], xxh3_64(part)) != digest:
            raise ProtocolError(f"a part of node {sender} does not match its checksum")
        notice, behind = Notice(kind, *place), bytes(head[_HEADER.size :])
        self._check(notice, behind, part.size)
        return notice, behind, part

    def _check(self, notice: Notice, behind: bytes, size: int) -> None:
        """What follows is the sender's word: it fits its own checksum."""
        kind, _, _, offset, total = notice
        if (behind and kind not in STUBS) or (size and kind is not Kind.PART):
            raise ProtocolError(f"a {kind.name} that brings what it cannot bring")
        is_part = kind is Kind.PART and (size or total)
        if not is_part and kind not in STUBS:
            return
        if not SPREAD_BYTES_MIN <= total <= self.payload_bytes_max:
            raise ProtocolError(
                f"a payload of {total} bytes in parts; it can have {SPREAD_BYTES_MIN} to {self.payload_bytes_max}"
            )
        if not is_part and offset:
            raise ProtocolError(f"a whole packet at {offset} of itself")
        if is_part and (offset >= total or offset % PART_BYTES or size != min(PART_BYTES, total - offset)):
            raise ProtocolError(f"a part of {size} bytes at {offset} of {total}")


def payload_bytes(packet: Packet) -> int:
    """About how many bytes `take_apart` would find."""
    return len(packet.metadata) if packet.batch is None else int(packet.batch.nbytes)


def take_apart(lane: Lane, packet: Packet) -> tuple[Kind, bytes, pa.Buffer]:
    """A packet of `lane` as the kind of its stub, the metadata in it, and the payload."""
    if packet.batch is None:
        return Kind.METADATA, b"", pa.py_buffer(packet.metadata)
    if lane is Lane.MESSAGES:
        return Kind.BYTES, packet.metadata, bytes_of_batch(packet.batch)
    return Kind.BATCH, packet.metadata, entry_batch.encode_payload(packet.batch)


def put_together(kind: Kind, metadata: bytes, payload: pa.Buffer) -> tuple[pa.Buffer, pa.RecordBatch | None]:
    """The chunk that `take_apart` took apart. It is to be checked as any other. Raises ProtocolError if the payload is none."""
    if kind is Kind.METADATA:
        return payload, None
    if kind is Kind.BYTES:
        return pa.py_buffer(metadata), batch_of_bytes(payload)
    return pa.py_buffer(metadata), entry_batch.decode_payload(payload, ENTRY_SCHEMA)
