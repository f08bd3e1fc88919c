"""Users' own messages: opaque bytes that travel between two nodes beside those of Raft, on a lane of their own.

A packet is one Flight chunk: a header and the lengths of the messages as ``app_metadata``, their bytes as a record batch of one
column of bytes. A message that is larger than `PIECE_BYTES_MAX` comes in pieces, a packet each. ``docs/transport.md`` has the bytes.

Rule 1: nothing that arrives is trusted. What is wrong in any way is a `ProtocolError`, raised before any of it is used.
Rule 2: whoever does not take messages out is not sent more: the mailbox fills, then the stream, then the sender's queue.

Invariants:
- A message arrives whole or not at all, at most once, and in the order in which it was sent to this node. It gets lost only with
  its stream, if it had been written and not been read yet, or with one of the two transports.
- Memory is bounded: by the sender's queue, by what gRPC keeps under way, by one message in pieces per sender, by the mailbox.
- Of several streams from one sender only the newest delivers.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

import pyarrow as pa

from marble._core.checksum import xxh3_64
from marble._core.packing import FULL, WAKE, Outbox, ReceivedMessage, batch_of_bytes, bytes_of_batch, pack, unpack
from marble.env import Clock
from marble.errors import ProtocolError, UnavailableError
from marble.metrics import Counter, Metrics
from marble.transport.codec import PROTOCOL_VERSION, Codec, Packet
from marble.transport.compression import Compression, Squeezer, unsqueeze
from marble.transport.handshake import Chunk
from marble.transport.options import TransportOptions

PIECE_BYTES_MAX: Final = 2 << 20
"""Bytes of messages in one packet. Half of what gRPC's implementations accept in one message unless told otherwise."""
PACKET_BYTES_MAX: Final = 1 << 20
"""Messages are put together up to here: enough that a packet's own cost no longer counts."""
COUNT_MAX: Final = 16384
"""Messages in one packet."""
SENDERS_MAX: Final = 4096
"""Nodes of which it is known how far their messages have come: enough for every node that a cluster ever has."""

_HEADER: Final = struct.Struct("<4sHHQQIIQQIIQQ")
"""magic, version, zero, checksum; cluster, sender, to, epoch, first, count, codec, offset, total. Lengths as uint32 follow."""
_COVERED: Final = 16
_MAGIC: Final = b"MBLM"
_NOTHING: Final = pa.py_buffer(b"")


class Header(NamedTuple):
    """What the head of a packet says of the messages in it."""

    epoch: int
    """Drawn anew by each sender's queue; numbers of messages count from 0 in it."""
    first: int
    messages: int
    offset: int
    total: int
    """Bytes of all messages in the packet; of the one message that a piece belongs to, if it is one."""
    lengths: bytes


class MessageCodec:
    """Packs for and unpacks from the peers of one node. Immutable; any thread may use it."""

    def __init__(self, codec: Codec, message_bytes_max: int) -> None:
        self.node_id = codec.node_id
        self.message_bytes_max = message_bytes_max
        self._cluster = codec.cluster_hash

    def encode(
        self,
        to: int,
        epoch: int,
        first: int,
        messages: list[bytes | pa.Buffer],
        squeezer: Squeezer | None = None,
        features: int = 0,
    ) -> Iterator[Packet]:
        """Pack `messages`, of which the first has the number `first`; none at all give one packet without messages.

        With a `squeezer` what is large may be compressed in a way that the peer's `features` name.
        """
        if len(messages) == 1:
            body = pa.py_buffer(messages[0])
            total = body.size
            for offset in range(0, total, PIECE_BYTES_MAX) or (0,):
                piece = body.slice(offset, min(PIECE_BYTES_MAX, total - offset))
                lengths = piece.size.to_bytes(4, "little")
                yield self._packet(to, Header(epoch, first, 1, offset, total, lengths), piece, squeezer, features)
            return
        total = sum(map(len, messages))
        body = pa.allocate_buffer(total)
        lengths = pack(messages, body)
        yield self._packet(to, Header(epoch, first, len(messages), 0, total, lengths), body, squeezer, features)

    def _packet(self, to: int, header: Header, body: pa.Buffer, squeezer: Squeezer | None, features: int) -> Packet:
        epoch, first, count, offset, total, lengths = header
        seed = xxh3_64(body)
        codec = Compression.NONE
        if squeezer is not None:
            codec, body = squeezer.squeeze(body, features)
        fields = (self._cluster, self.node_id, to, epoch, first, count, codec, offset, total)
        covered = _HEADER.pack(_MAGIC, PROTOCOL_VERSION, 0, 0, *fields)[_COVERED:] + lengths
        digest = xxh3_64(covered, seed)
        batch = batch_of_bytes(body) if body.size else None
        return Packet(_HEADER.pack(_MAGIC, PROTOCOL_VERSION, 0, digest, *fields) + lengths, batch)

    def decode(
        self, sender: int, metadata: pa.Buffer | bytes, batch: pa.RecordBatch | None
    ) -> tuple[Header, pa.Buffer]:
        """What one packet from `sender` says, and the bytes of its messages.

        Raises
        ------
        ProtocolError
            Anything at all is wrong with the packet; nothing of it may be used.
        """
        head = memoryview(metadata)
        if len(head) < _HEADER.size:
            raise ProtocolError(f"a packet with {len(head)} bytes of metadata")
        magic, version, zero, digest, cluster, from_, to, *rest = _HEADER.unpack_from(head)
        epoch, first, count, codec, offset, total = rest
        if magic != _MAGIC or version != PROTOCOL_VERSION or zero != 0:
            raise ProtocolError("not a packet of messages of this protocol")
        if cluster != self._cluster or from_ != sender or to != self.node_id:
            raise ProtocolError(f"a packet from {from_} to {to} on the stream from {sender} to {self.node_id}")
        if count > COUNT_MAX or len(head) != _HEADER.size + 4 * count:
            raise ProtocolError(f"a packet with {count} messages in {len(head)} bytes")
        body = _NOTHING if batch is None else bytes_of_batch(batch)
        if codec != Compression.NONE:
            body = unsqueeze(codec, body, sum(_numbers(bytes(head[_HEADER.size :]))), PIECE_BYTES_MAX)
        if xxh3_64(head[_COVERED:], xxh3_64(body)) != digest:
            raise ProtocolError(f"a packet from node {sender} does not match its checksum")
        lengths = bytes(head[_HEADER.size :])
        header = Header(epoch, first, count, offset, total, lengths)
        # All that follows is the sender's word: it fits its own checksum.
        piece = offset != 0 or total != body.size
        if piece and (count != 1 or not 0 <= offset < total or body.size == 0 or body.size > total - offset):
            raise ProtocolError(f"a piece of {body.size} bytes at {offset} of a message of {total}")
        if (total if count == 1 else max(_numbers(lengths), default=0)) > self.message_bytes_max:
            raise ProtocolError(f"a message of node {sender} exceeds {self.message_bytes_max} bytes")
        if body.size > PIECE_BYTES_MAX:
            raise ProtocolError(f"a packet of {body.size} bytes of messages, {PIECE_BYTES_MAX} are the most")
        return header, body


def _numbers(lengths: bytes) -> memoryview:
    return memoryview(lengths).cast("I")


class MessageLoad:
    """A queue of messages to one peer: a `marble.transport.pump.Load`. It keeps what it has while the peer is away."""

    def __init__(
        self,
        peer: int,
        codec: MessageCodec,
        epoch: int,
        options: TransportOptions,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._peer = peer
        self._squeezer = Squeezer(options.compression, clock, metrics)
        self._codec = codec
        self._epoch = epoch
        self._outbox = Outbox(options.queue_bytes_max, options.message_count_max)
        # Held while there is nothing to do: whoever lets it go wakes the pump.
        self._nothing = threading.Lock()
        self._nothing.acquire()
        self._room = threading.Condition()
        self._refusing = False
        self._away = False
        """Messages go another way: nothing is taken before `use`."""
        self._unsent: list[bytes | pa.Buffer] = []
        self._reclaimed = 0
        """How often; and when `_unsent` was taken."""
        self._taken_at = 0
        self._next = 0
        self._sent = metrics.counter("transport_messages_sent", peer=peer)
        self._users = metrics.counter("transport_user_messages_sent", peer=peer)
        self._bytes = metrics.counter("transport_user_bytes_sent", peer=peer)
        self._dropped = metrics.counter("transport_messages_dropped", peer=peer)

    @property
    def refusing(self) -> bool:
        """Whether nothing is taken any more, for good."""
        return self._refusing

    def put(self, data: bytes | pa.Buffer) -> bool:
        """Queue `data` if there is room now. Whether it was queued."""
        state = self._outbox.put(data)
        if state == WAKE:
            self._nothing.release()
        return state < FULL

    def put_all(self, messages: list[bytes | pa.Buffer], timeout_s: float) -> int:
        """Queue `messages`, in order; wait up to `timeout_s` seconds for room. How many were queued."""
        queued = 0

        def decided() -> bool:
            nonlocal queued
            more, wake, refused = self._outbox.put_many(messages, queued)
            queued += more
            if wake:
                self._nothing.release()
            return not refused or self._refusing or self._away

        if not decided() and timeout_s > 0:
            with self._room:
                # `written` gives room before it looks whether somebody waits, and wakes under this lock.
                self._room.wait_for(decided, timeout_s)
        return queued

    def accept(self) -> None:
        if not self._refusing and not self._away and not self._outbox.accepting:
            self._outbox.open()
            with self._room:
                self._room.notify_all()

    def refuse(self) -> None:
        self._refusing = True
        self._outbox.close()
        with self._room:
            self._room.notify_all()

    def wake(self) -> None:
        if self._outbox.interrupt():
            self._nothing.release()

    def take(self, timeout_s: float) -> bool:
        if self._unsent:
            if self._taken_at == self._reclaimed:
                return True
            # What came after it went another way.
            self._dropped.add(len(self._unsent))
            self._outbox.release(self._unsent)
            self._unsent = []
        self._taken_at = self._reclaimed
        if self._outbox.begin_wait() and not self._nothing.acquire(timeout=timeout_s) and not self._outbox.end_wait():
            # Somebody was just about to wake this thread.
            self._nothing.acquire()
        self._unsent = self._outbox.take(PACKET_BYTES_MAX, COUNT_MAX)
        return bool(self._unsent)

    def packets(self, features: int) -> Iterable[Packet]:
        return self._codec.encode(self._peer, self._epoch, self._next, self._unsent, self._squeezer, features)

    def written(self, seconds: float) -> None:
        count = len(self._unsent)
        if not count:
            return
        self._next += count
        size = self._outbox.release(self._unsent)
        if self._outbox.fed():
            with self._room:
                self._room.notify_all()
        self._unsent = []
        self._sent.add(count)
        self._users.add(count)
        self._bytes.add(size)
        self._squeezer.wrote(size, seconds)

    def give_up(self) -> int:
        """Take no more until `accept`. Nothing is dropped: it is the user's to say when a message is of no use any more."""
        self._outbox.close()
        return 0

    def reclaim(self) -> list[bytes | pa.Buffer]:
        """What is queued and was not taken by the pump: it is not queued here any more. From any thread.

        What was taken and is not written yet is not written any more, if the stream breaks. Nothing more is taken before `use`: who
        waits for room would put what comes next where what came before is not any more.
        """
        self._reclaimed += 1
        self._away = True
        self._outbox.close()
        left = self._outbox.drain()
        self._outbox.release(left)
        with self._room:
            self._room.notify_all()
        return left

    def use(self) -> None:
        """Take messages again after `reclaim`. From any thread."""
        self._away = False
        self.accept()

    def drop(self) -> None:
        """Drop everything, for good."""
        self.refuse()
        left = self._outbox.drain()
        self._dropped.add(len(left))
        self._outbox.release(left)


class Mailbox:
    """What has come and was not taken out yet: bounded by bytes and messages. An empty one takes any one packet."""

    def __init__(self, bytes_max: int, count_max: int) -> None:
        self._bytes_max = bytes_max
        self._count_max = count_max
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._packets: deque[tuple[list[ReceivedMessage], int]] = deque()
        self._current: list[ReceivedMessage] = []
        """Of one packet, the next message last."""
        self._current_bytes = 0
        self._bytes = 0
        self._count = 0
        self._closed = False

    def put(self, messages: list[ReceivedMessage], nbytes: int, wanted: Callable[[], bool]) -> bool:
        """Wait for room and keep `messages`, unless `wanted` comes to say no (`look_again`); whether they were kept."""
        count = len(messages)
        with self._lock:
            while wanted() and not self._closed:
                fits = self._bytes + nbytes <= self._bytes_max and self._count + count <= self._count_max
                if fits or not self._bytes + self._count:
                    messages.reverse()
                    self._packets.append((messages, nbytes))
                    self._bytes += nbytes
                    self._count += count
                    self._arrived.notify()
                    return True
                self._room.wait()
        return False

    def get(self, timeout_s: float | None) -> ReceivedMessage | None:
        """The next message; None if none has come within `timeout_s` seconds, or ever will."""
        with self._lock:
            return self._current.pop() if self._current or self._turn(timeout_s) else None

    def get_many(self, count_max: int, timeout_s: float | None) -> list[ReceivedMessage]:
        """The next messages, `count_max` at most; empty if none has come within `timeout_s` seconds, or ever will."""
        with self._lock:
            taken: list[ReceivedMessage] = []
            while len(taken) < count_max and (self._current or self._turn(0.0 if taken else timeout_s)):
                rest = len(self._current) - (count_max - len(taken))
                more = self._current[max(0, rest) :]
                more.reverse()
                taken.extend(more)
                del self._current[max(0, rest) :]
            return taken

    def _turn(self, timeout_s: float | None) -> bool:
        """Go on to the next packet; whether there is one."""
        self._bytes -= self._current_bytes
        self._current_bytes = 0
        self._room.notify_all()
        if not self._packets and (
            timeout_s == 0.0
            or not self._arrived.wait_for(lambda: self._current or self._packets or self._closed, timeout_s)
        ):
            return False
        if self._current:
            return True  # Another thread has turned to it meanwhile.
        if not self._packets:
            return False
        self._current, self._current_bytes = self._packets.popleft()
        self._count -= len(self._current)
        if self._packets:
            self._arrived.notify()
        return True

    def look_again(self) -> None:
        """Let those who wait for room ask anew whether they are wanted."""
        with self._lock:
            self._room.notify_all()

    def close(self) -> None:
        """Take no more, and let nobody wait. What is there can still be taken out."""
        with self._lock:
            self._closed = True
            self._arrived.notify_all()
            self._room.notify_all()


class _Sender:
    """How far the messages of one node have come."""

    def __init__(self, received: Counter) -> None:
        self.received = received
        self.delivering = threading.Lock()
        self.stream = 0
        """Number of its newest stream."""
        self.epoch = 0
        self.next = 0


class MessageIntake:
    """Takes streams of messages in, and hands on what comes to `deliver`. Thread-safe."""

    def __init__(
        self,
        codec: MessageCodec,
        deliver: Callable[[list[ReceivedMessage], int, Callable[[], bool]], bool],
        superseded: Callable[[], None],
        metrics: Metrics,
    ) -> None:
        self._codec = codec
        self._deliver = deliver
        self._superseded = superseded
        self._lock = threading.Lock()
        self._senders: dict[int, _Sender] = {}
        self._metrics = metrics
        self._users = metrics.counter("transport_user_messages_received")
        self._bytes = metrics.counter("transport_user_bytes_received")
        self._missed = metrics.counter("transport_user_messages_missed")

    def take(self, node: int, chunks: Iterator[Chunk]) -> None:
        """Take one stream of `node` in until it ends. Raises ProtocolError, and what the stream raises."""
        with self._lock:
            # The one whose stream is the newest comes last, so that the first is the one to forget.
            sender = self._senders.pop(node, None)
            if sender is None:
                sender = _Sender(self._metrics.counter("transport_messages_received", peer=node))
            if len(self._senders) >= SENDERS_MAX:
                del self._senders[next(iter(self._senders))]
            self._senders[node] = sender
            sender.stream += 1
            stream = sender.stream
        # An older stream may wait for room with what this one brings again.
        self._superseded()
        pieces = _Pieces()
        for metadata, batch in chunks:
            if metadata is None:
                raise ProtocolError(f"bytes without messages from node {node}")
            header, body = self._codec.decode(node, metadata, batch)
            if not header.messages:
                continue
            if header.total != body.size:
                if not pieces.add(header, body):
                    continue
                body, header = pieces.take(), header._replace(lengths=header.total.to_bytes(4, "little"))
            elif pieces.filled:
                raise ProtocolError(f"a message of node {node} breaks off")
            self._hand_on(node, sender, stream, header, body)

    def _hand_on(self, node: int, sender: _Sender, stream: int, header: Header, body: pa.Buffer) -> None:
        with sender.delivering:
            known = sender.next if sender.epoch == header.epoch else header.first
            skip = max(0, known - header.first)
            if skip < header.messages:
                messages = unpack(body, header.lengths, node, skip)
                if not self._deliver(messages, body.size, lambda: sender.stream == stream):
                    raise UnavailableError("a newer stream has taken the place of this one, or the node stops")
                self._missed.add(max(0, header.first - known))
                sender.received.add(len(messages))
                self._users.add(len(messages))
                self._bytes.add(body.size)
                sender.epoch, sender.next = header.epoch, header.first + header.messages


class _Pieces:
    """One message that comes in pieces."""

    def __init__(self) -> None:
        self._whole: pa.Buffer = _NOTHING
        self._first = 0
        self.filled = 0

    def add(self, header: Header, piece: pa.Buffer) -> bool:
        """Add the next piece; whether the message is whole. Raises ProtocolError if it is not the next one."""
        if self.filled == 0:
            # Its size is within the limit; memory that is not written to is not used either.
            self._whole, self._first = pa.allocate_buffer(header.total), header.first
        if header.offset != self.filled or header.total != self._whole.size or header.first != self._first:
            raise ProtocolError(f"a piece at {header.offset} of a message of which there are {self.filled} bytes")
        memoryview(self._whole)[header.offset : header.offset + piece.size] = memoryview(piece)
        self.filled += piece.size
        return self.filled == header.total

    def take(self) -> pa.Buffer:
        """The whole message."""
        whole, self._whole, self.filled = self._whole, _NOTHING, 0
        return whole
