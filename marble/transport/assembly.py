"""Packets that come in parts over several ways, put together again and handed on in their order.

An *assembly* belongs to one stream that gives an order, from the notice that opens it to the stream's end. Handlers of that stream wait
in it for what a stub stands for; handlers of streams of parts, of any way, fill it.

Rule 1: nothing is kept but for a stream that is open: with it goes all that came for it.
Rule 2: whoever sends more than it was told it may, or what contradicts what came before, breaks its own stream and nothing else.

Invariants:
- What comes out of `Assemblies.ordered` is what would have come on that stream without parts, in the same order, each once; or the
  stream ends with an error before it.
- The payloads of which an assembly has any part, together, are at most `HELD_BYTES_MAX` bytes, or a single one; a node has at most
  `FLOWS_MAX` assemblies here.
- A stream whose packet does not come whole ends: no part of it for `patience_s` is enough.
- Thread-safe, no thread of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Final

import pyarrow as pa

from marble.errors import ProtocolError, UnavailableError
from marble.metrics import Metrics
from marble.transport.handshake import Chunk
from marble.transport.parts import HELD_BYTES_MAX, PART_BYTES, STUBS, Kind, Notice, PartsCodec, is_notice, put_together

FLOWS_MAX: Final = 16
"""Assemblies of one node: two lanes on each of four ways, and as many that break only now."""

_AHEAD_MAX: Final = 1 << 20
"""Numbers of packets that may be ahead of the one whose turn it is; the bytes allow for far fewer."""

Answer = Callable[[bytes], bool]


class _Payload:
    """One that is under way."""

    def __init__(self, total: int) -> None:
        self.total = total
        # Memory that is not written to is not used either.
        self.whole = pa.allocate_buffer(total)
        self.missing = set(range(-(-total // PART_BYTES)))


class Assembly:
    """Payloads of one stream that gives an order."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: dict[int, _Payload] = {}
        self._held_bytes = 0
        self._next = 0
        self._parts = 0
        self._closed = False

    @property
    def held_bytes(self) -> int:
        """Of all payloads of which there is any part, whole."""
        return self._held_bytes

    def put(self, number: int, offset: int, total: int, part: pa.Buffer) -> bool:
        """Keep a part that `PartsCodec` has found well-formed; whether it was not there, and wanted, before.

        Raises ProtocolError if it is of another payload than the parts before it, or of one that there is no room for.
        """
        with self._changed:
            if self._closed or number < self._next:
                return False
            payload = self._held.get(number)
            if payload is None:
                if number - self._next > _AHEAD_MAX or (self._held and self._held_bytes + total > HELD_BYTES_MAX):
                    raise ProtocolError(
                        f"a part of packet {number} of {total} bytes beside {self._held_bytes} bytes: too much is under way"
                    )
                payload = self._held[number] = _Payload(total)
                self._held_bytes += total
            if total != payload.total:
                raise ProtocolError(f"a packet of {payload.total} bytes in parts has {total} by another part")
            at = offset // PART_BYTES
            if at not in payload.missing:
                return False
            memoryview(payload.whole)[offset : offset + part.size] = memoryview(part)
            payload.missing.discard(at)
            self._parts += 1
            self._changed.notify_all()
            return True

    def take(self, number: int, total: int, patience_s: float) -> pa.Buffer:
        """Wait for the payload of the packet `number`, whose turn it is, and give it away.

        Raises
        ------
        ProtocolError
            It is not the turn of `number`, or its parts are of a payload of another size.
        UnavailableError
            No part of anything has come for `patience_s` seconds, or `close` was called.
        """
        with self._changed:
            if number != self._next:
                raise ProtocolError(f"the packet {number} in parts follows on packet {self._next - 1}")
            while True:
                payload = self._held.get(number)
                if payload is not None and payload.total != total:
                    raise ProtocolError(f"a packet of {total} bytes has {payload.total} by its parts")
                if payload is not None and not payload.missing:
                    del self._held[number]
                    self._held_bytes -= total
                    self._next += 1
                    return payload.whole
                seen = self._parts
                if not self._changed.wait_for(partial(self._moved, seen), patience_s) or self._closed:
                    why = "the node stops" if self._closed else f"no part has come for {patience_s} s"
                    raise UnavailableError(f"a packet did not come whole: {why}")

    def _moved(self, seen: int) -> bool:
        return self._closed or self._parts != seen

    def close(self) -> None:
        """Take nothing more, and let nobody wait. Idempotent."""
        with self._changed:
            self._closed = True
            self._held.clear()
            self._held_bytes = 0
            self._changed.notify_all()


class Assemblies:
    """Those of one node.

    Parameters
    ----------
    codec
        Of this node.
    patience_s
        How long a stream waits for the next part.
    metrics
        Where parts are counted.
    """

    def __init__(self, codec: PartsCodec, patience_s: float, metrics: Metrics) -> None:
        self._codec = codec
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._open: dict[int, dict[int, Assembly]] = {}
        """By node, then by flow."""
        self._closed = False
        self._received = metrics.counter("transport_parts_received")
        self._dropped = metrics.counter("transport_parts_dropped")

    def ordered(self, node: int, chunks: Iterator[Chunk], answer: Answer) -> Generator[Chunk]:
        """The `chunks` of a stream from `node`, with packets in the place of their stubs. Raises what reading a stream raises."""
        assembly: Assembly | None = None
        flow = 0
        try:
            for metadata, batch in chunks:
                if metadata is None or not is_notice(metadata):
                    yield metadata, batch
                    continue
                notice, behind, _ = self._codec.decode(node, metadata, batch)
                if notice.kind is Kind.END:
                    return
                if notice.kind is Kind.OPEN and assembly is None:
                    flow = notice.flow
                    assembly = self._begin(node, flow)
                    if assembly is not None and not self._say(
                        node, answer, Notice(Kind.OPEN, flow, 0, 0, HELD_BYTES_MAX)
                    ):
                        return
                    continue
                if notice.kind not in STUBS or assembly is None or notice.flow != flow:
                    raise ProtocolError(f"a {notice.kind.name} on a stream of node {node} where it has no place")
                payload = assembly.take(notice.number, notice.total, self._patience_s)
                yield put_together(notice.kind, behind, payload)
                # Who asks for the next chunk has done with this one.
                if not self._say(node, answer, Notice(Kind.TAKEN, flow, notice.number + 1)):
                    return
        finally:
            if assembly is not None:
                self._end(node, flow, assembly)

    def fill(self, node: int, chunks: Iterator[Chunk], answer: Answer) -> None:
        """Take one stream of parts of `node` in until it ends. Raises ProtocolError, and what the stream raises."""
        for metadata, batch in chunks:
            notice, _, part = self._codec.decode(node, metadata, batch)
            if notice.kind is Kind.END:
                return
            if notice.kind is not Kind.PART:
                raise ProtocolError(f"a {notice.kind.name} on a stream of parts of node {node}")
            if not notice.total:
                continue
            with self._lock:
                assembly = self._open.get(node, {}).get(notice.flow)
            kept = assembly is not None and assembly.put(notice.number, notice.offset, notice.total, part)
            # One that comes twice, or after its stream has ended, is nobody's fault.
            (self._received if kept else self._dropped).add()
            if not self._say(node, answer, notice._replace(kind=Kind.ARRIVED)):
                return

    def close(self) -> None:
        """Let nobody wait, and begin nothing. Idempotent."""
        with self._lock:
            self._closed = True
            assemblies = [assembly for flows in self._open.values() for assembly in flows.values()]
        for assembly in assemblies:
            assembly.close()

    def _say(self, node: int, answer: Answer, notice: Notice) -> bool:
        return answer(self._codec.encode(node, notice).metadata)

    def _begin(self, node: int, flow: int) -> Assembly | None:
        """None if there are too many: then the stream is used without parts."""
        with self._lock:
            flows = self._open.get(node, {})
            if flow in flows:
                raise ProtocolError(f"node {node} has two streams under one number")
            if self._closed or len(flows) >= FLOWS_MAX:
                return None
            flows[flow] = Assembly()
            self._open[node] = flows
            return flows[flow]

    def _end(self, node: int, flow: int, assembly: Assembly) -> None:
        assembly.close()
        with self._lock:
            flows = self._open[node]
            del flows[flow]
            if not flows:
                del self._open[node]
