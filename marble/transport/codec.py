"""Messages between nodes as bytes. The layout is documented to the byte in ``docs/transport.md``.

A packet is what one Flight chunk carries: ``app_metadata`` (a header and fixed-size message structs, little-endian)
and, if one of the messages brings rows, those as the chunk's record batch: entries, or the row of a snapshot.

Rule 1: nothing that arrives is trusted. What is wrong in any way is a `ProtocolError`, raised before any of it is used.

Invariants:
- At most one message of a packet brings rows, and it brings all rows of the packet's batch.
- APPEND_ENTRIES brings its entries, INSTALL_SNAPSHOT and SNAPSHOT_PIECE one row (`marble.transport.snapshot_rows`; a
  piece that is refused, none), and no other kind brings any.
- The order of messages is kept, within a packet and from packet to packet.
- The header's checksum covers every byte of the metadata and the index, term, time and checksum of every row; the
  row's checksum covers the rest of the row. So no flipped bit goes unnoticed.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import pyarrow as pa

from marble._core import entry_batch
from marble._core.checksum import xxh3_64
from marble._core.term_index import EntrySpan
from marble.errors import ProtocolError, UsageError, check
from marble.raft.messages import Message, MessageKind
from marble.transport.snapshot_rows import offer_of, piece_of
from marble.types import NO_NODE, NODE_ID_MAX, Members, Position

PROTOCOL_VERSION: Final = 1
CLUSTER_ID_BYTES_MAX: Final = 255
ENDPOINT_BYTES_MAX: Final = 512
MESSAGES_PER_PACKET_MAX: Final = 4096
"""Bounds the metadata of a packet to about 224 KiB."""

_HEADER: Final = struct.Struct("<4sHHQQIIII")
"""magic, version, zero, checksum; cluster, sender, to, messages, rows. The checksum covers what follows it."""
_COVERED: Final = 16
_MESSAGE: Final = struct.Struct("<IBBHQQQQQQ")
"""group, kind, flags, priority, term, log_index, log_term, commit, reject_hint, context."""
_HELLO: Final = struct.Struct("<4sHHQIIQIHHH")
"""magic, version, zero, checksum; sender, to, incarnation, features, lane, lengths of cluster id and sender's endpoint: UTF-8,
which follow."""
_PACKET_MAGIC: Final = b"MBLP"
_HELLO_MAGIC: Final = b"MBLH"
_REJECT: Final = 1
_ROWS: Final = 2
_KINDS: Final = {int(kind): kind for kind in MessageKind}
_SNAPSHOTS: Final = frozenset({MessageKind.INSTALL_SNAPSHOT, MessageKind.SNAPSHOT_PIECE})
MESSAGE_BYTES: Final = _MESSAGE.size


class Lane(enum.IntEnum):
    """What a stream between nodes is for. The numbers are on the wire: never reuse one."""

    CONTROL = 0
    LOG = 1
    BULK = 2
    MESSAGES = 3
    PARTS = 4


_LANES: Final = {int(lane): lane for lane in Lane}


class Envelope(NamedTuple):
    """A message, the group it belongs to, and the rows that it brings, if any."""

    group: int
    message: Message
    batch: pa.RecordBatch | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that count against the limits of a queue."""
        if self.message.entries is not None:
            return MESSAGE_BYTES + self.message.entries.bytes
        return MESSAGE_BYTES + (0 if self.batch is None else entry_batch.payload(self.batch, 0).size)


class Hello(NamedTuple):
    """What a node says of itself before anything else."""

    sender: int
    endpoint: str
    """Where it takes answers; may be empty."""
    incarnation: int
    """Of its data directory (`marble.identity`); 0 if it has none."""
    lane: Lane
    features: int
    """What it understands beyond what every node does, a bit each."""
    question: bool = False
    """It is for whoever is there, and wants nothing but the answer."""


class Packet(NamedTuple):
    """One Flight chunk."""

    metadata: bytes
    batch: pa.RecordBatch | None


class Codec:
    """Encodes for and decodes from the peers of one node. Immutable; any thread may use it.

    Parameters
    ----------
    cluster_id
        Name that all nodes of the cluster share, at most 255 bytes of UTF-8.
    node_id
        This node.
    entry_bytes_max
        What the buffers of one packet's batch may add up to, in bytes.
    """

    def __init__(self, cluster_id: str, node_id: int, entry_bytes_max: int) -> None:
        name = cluster_id.encode()
        if not 1 <= len(name) <= CLUSTER_ID_BYTES_MAX:
            raise UsageError(
                f"the cluster id must have 1 to {CLUSTER_ID_BYTES_MAX} bytes, {cluster_id!r} has {len(name)}"
            )
        if not 1 <= node_id <= NODE_ID_MAX:
            raise UsageError(f"node id {node_id} is not within 1 to {NODE_ID_MAX}")
        self.cluster_id = cluster_id
        self.node_id = node_id
        self.entry_bytes_max = entry_bytes_max
        self.cluster_hash = int(xxh3_64(name))

    def hello(
        self, to: int, endpoint: str = "", incarnation: int = 0, lane: Lane = Lane.CONTROL, features: int = 0
    ) -> bytes:
        """The metadata that opens a stream with `to`, or answers the one that did; the rest as in `Hello`."""
        name, place = self.cluster_id.encode(), endpoint.encode()
        if len(place) > ENDPOINT_BYTES_MAX:
            raise UsageError(f"the endpoint {endpoint[:80]!r}... has more than {ENDPOINT_BYTES_MAX} bytes")
        fields = (self.node_id, to, incarnation, features, lane, len(name), len(place))
        head = _HELLO.pack(_HELLO_MAGIC, PROTOCOL_VERSION, 0, 0, *fields)
        digest = int(xxh3_64(head[_COVERED:] + name + place))
        return _HELLO.pack(_HELLO_MAGIC, PROTOCOL_VERSION, 0, digest, *fields) + name + place

    def check_hello(self, metadata: bytes) -> Hello:
        """What a hello says that is meant for this node of this cluster. Raises ProtocolError for any other hello."""
        if len(metadata) < _HELLO.size:
            raise ProtocolError("the stream does not open with a hello")
        magic, version, zero, digest, *fields = _HELLO.unpack_from(metadata)
        sender, to, incarnation, features, lane, length, place_length = fields
        if magic != _HELLO_MAGIC:
            raise ProtocolError("the stream does not open with a hello")
        if version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the peer speaks version {version} of the protocol, this node speaks {PROTOCOL_VERSION}"
            )
        name, place = metadata[_HELLO.size :][:length], metadata[_HELLO.size + length :]
        whole = len(name) == length and len(place) == place_length <= ENDPOINT_BYTES_MAX
        if zero != 0 or not whole or xxh3_64(metadata[_COVERED:]) != digest:
            raise ProtocolError("a damaged hello")
        if name != self.cluster_id.encode():
            theirs = name.decode(errors="replace")
            raise ProtocolError(f"this node is of cluster {self.cluster_id!r}, not {theirs!r}")
        if to != self.node_id and to != NO_NODE:
            raise ProtocolError(f"this is node {self.node_id}, not {to}: two nodes have each other's endpoint")
        if sender == self.node_id or not 1 <= sender <= NODE_ID_MAX:
            raise ProtocolError(f"{sender} cannot be the id of a peer of node {self.node_id}")
        if lane not in _LANES:
            raise ProtocolError(f"node {sender} opens a stream for an unknown purpose, {lane}")
        return Hello(sender, place.decode(errors="replace"), incarnation, _LANES[lane], features, to == NO_NODE)

    def encode(self, to: int, envelopes: Sequence[Envelope]) -> list[Packet]:
        """Pack `envelopes`, all from this node to `to`, in order. None at all give one packet without messages."""
        packets: list[Packet] = []
        structs: list[bytes] = []
        batch: pa.RecordBatch | None = None
        for envelope in envelopes:
            message = envelope.message
            check(message.sender == self.node_id and message.to == to, f"{message} is not for the stream to {to}")
            rows = _rows_of(message)
            check(rows == (0 if envelope.batch is None else envelope.batch.num_rows), f"{message} lacks its rows")
            if len(structs) >= MESSAGES_PER_PACKET_MAX or (rows and batch is not None):
                packets.append(self._packet(to, structs, batch))
                structs, batch = [], None
            if rows:
                batch = envelope.batch
            structs.append(
                _MESSAGE.pack(
                    envelope.group,
                    message.kind,
                    (_REJECT if message.reject else 0) | (_ROWS if rows else 0),
                    message.priority,
                    message.term,
                    message.log_index,
                    message.log_term,
                    message.commit,
                    message.reject_hint,
                    message.context,
                )
            )
        packets.append(self._packet(to, structs, batch))
        return packets

    def _packet(self, to: int, structs: list[bytes], batch: pa.RecordBatch | None) -> Packet:
        rows = 0 if batch is None else batch.num_rows
        seed = 0 if batch is None else entry_batch.places_checksum(batch)
        fields = (self.cluster_hash, self.node_id, to, len(structs), rows)
        body = b"".join(structs)
        digest = xxh3_64(_HEADER.pack(_PACKET_MAGIC, PROTOCOL_VERSION, 0, 0, *fields)[_COVERED:] + body, seed)
        return Packet(_HEADER.pack(_PACKET_MAGIC, PROTOCOL_VERSION, 0, digest, *fields) + body, batch)

    def decode(self, sender: int, metadata: bytes, batch: pa.RecordBatch | None) -> list[Envelope]:
        """The envelopes of one packet from `sender`.

        Raises
        ------
        ProtocolError
            Anything at all is wrong with the packet; nothing of it may be used.
        """
        self._check_header(sender, metadata, batch)
        structs = memoryview(metadata)[_HEADER.size :]
        if batch is not None:
            # Nothing is believed of these kinds yet: the checksum and each message's own check come below.
            bringing = [fields[1] for fields in _MESSAGE.iter_unpack(structs) if fields[2] & _ROWS]
            if len(bringing) != 1:
                raise ProtocolError(f"{len(bringing)} messages of a packet bring its {batch.num_rows} rows")
            batch = entry_batch.admit(batch, self.entry_bytes_max, snapshot=bringing[0] in _SNAPSHOTS)
        seed = 0 if batch is None else entry_batch.places_checksum(batch)
        if xxh3_64(memoryview(metadata)[_COVERED:], seed) != _HEADER.unpack_from(metadata)[3]:
            raise ProtocolError(f"a packet from node {sender} does not match its checksum")
        return [self._message(sender, fields, batch) for fields in _MESSAGE.iter_unpack(structs)]

    def _check_header(self, sender: int, metadata: bytes, batch: pa.RecordBatch | None) -> None:
        """Check lengths and names."""
        if len(metadata) < _HEADER.size:
            raise ProtocolError(f"a packet with {len(metadata)} bytes of metadata")
        magic, version, zero, _, cluster, from_, to, count, rows = _HEADER.unpack_from(metadata)
        if magic != _PACKET_MAGIC or version != PROTOCOL_VERSION or zero != 0:
            raise ProtocolError("not a packet of this protocol")
        if cluster != self.cluster_hash or from_ != sender or to != self.node_id:
            raise ProtocolError(f"a packet from {from_} to {to} on the stream from {sender} to {self.node_id}")
        if count > MESSAGES_PER_PACKET_MAX or len(metadata) != _HEADER.size + count * _MESSAGE.size:
            raise ProtocolError(f"a packet with {count} messages in {len(metadata)} bytes")
        if rows != (0 if batch is None else batch.num_rows) or (rows == 0) != (batch is None):
            raise ProtocolError(f"a packet announces {rows} rows and brings others")

    def _message(self, sender: int, fields: tuple[int, ...], batch: pa.RecordBatch | None) -> Envelope:
        group, number, flags, priority, term, log_index, log_term, commit, reject_hint, context = fields
        kind = _KINDS.get(number)
        if kind is None or flags & ~(_REJECT | _ROWS):
            raise ProtocolError(f"a message of unknown kind {number} or flags {flags}")
        rows: pa.RecordBatch | None = None
        entries: EntrySpan | None = None
        members: Members | None = None
        changes: tuple[int, ...] = ()
        if flags & _ROWS:
            if batch is None or (kind is not MessageKind.APPEND_ENTRIES and kind not in _SNAPSHOTS):
                raise ProtocolError(f"a {kind.name} cannot bring rows")
            if entry_batch.group_of(batch) != group:
                raise ProtocolError(f"a message of group {group} with rows of group {entry_batch.group_of(batch)}")
            rows = batch
            if kind is MessageKind.APPEND_ENTRIES:
                entries, changes = entry_batch.span(batch), entry_batch.changes(batch)
            else:
                members = _check_snapshot(kind, batch, Position(log_index, log_term), term)
        elif kind is MessageKind.APPEND_ENTRIES:
            entries = EntrySpan.of(log_index + 1, [])
        message = Message(
            kind,
            sender,
            self.node_id,
            term,
            log_index,
            log_term,
            commit,
            entries,
            bool(flags & _REJECT),
            reject_hint,
            context,
            priority,
            members,
            changes,
        )
        if _rows_of(message) != (0 if rows is None else rows.num_rows):
            raise ProtocolError(f"{message} with {0 if rows is None else rows.num_rows} rows")
        return Envelope(group, message, rows)


def _rows_of(message: Message) -> int:
    """How many rows `message` brings."""
    if message.entries is not None:
        return len(message.entries)
    if message.kind is MessageKind.SNAPSHOT_PIECE:
        return 0 if message.reject else 1
    return 1 if message.kind is MessageKind.INSTALL_SNAPSHOT else 0


def _check_snapshot(kind: MessageKind, batch: pa.RecordBatch, position: Position, term: int) -> Members | None:
    """Check that `batch` fits a message about the snapshot at `position`; the members that an offer brings."""
    if kind is MessageKind.INSTALL_SNAPSHOT:
        meta = offer_of(batch).meta
        found, members = Position(meta.index, meta.term), meta.members
        if meta.term > term:
            raise ProtocolError(f"the offer of a snapshot of term {meta.term} by a leader of term {term}")
    else:
        found, members = piece_of(batch).position, None
    if found != position:
        raise ProtocolError(f"a {kind.name} of {position} with a row of {found}")
    return members
