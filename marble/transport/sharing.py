"""How the streams to one peer take part in sending large packets in parts: what a pump's `Dialogue` and `Load` are then.

Rule 1: nothing is decided here: `marble.transport.spreading` does that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from marble.errors import ProtocolError
from marble.metrics import Metrics
from marble.transport.codec import Lane, Packet
from marble.transport.parts import Kind, Notice
from marble.transport.spreading import Flow, Part, Spreader


class OrderDialogue:
    """That of a stream that gives an order: of `lane`, on `way`. A stream is a `Flow`, from its beginning to its end."""

    def __init__(self, spreader: Spreader, lane: Lane, way: int) -> None:
        self._spreader = spreader
        self._lane = lane
        self._way = way
        self._flow: Flow | None = None

    def begin(self) -> Packet | None:
        self._flow = self._spreader.begin(self._lane, self._way)
        return self._flow.opening()

    def replace(self, packet: Packet, going_on: Callable[[], bool]) -> Packet:
        return packet if self._flow is None else self._flow.replace(packet, going_on)

    def wrote(self, packet: Packet, seconds: float) -> None:
        if self._flow is not None:
            self._flow.wrote(packet, seconds)

    def heard(self, answer: bytes) -> None:
        # Nothing is answered before the opening was written.
        if self._flow is not None:
            self._flow.heard(answer)

    def ending(self) -> Packet:
        return self._spreader.codec.encode(self._spreader.peer, Notice(Kind.END, 0))

    def end(self) -> None:
        if self._flow is not None:
            self._flow.end()
            self._flow = None


class PartsLoad:
    """The parts that one way takes: a `marble.transport.pump.Load`, and the `Dialogue` of its stream.

    Parameters
    ----------
    way
        Which of the peer's ways this is, from 0.
    """

    def __init__(self, spreader: Spreader, way: int, metrics: Metrics) -> None:
        self._spreader = spreader
        self._way = way
        self._standing = False
        self._woken = False
        self._refusing = False
        self._part: Part | None = None
        self._sent = metrics.counter("transport_parts_bytes_sent", peer=spreader.peer, way=way)

    # -- Load

    def accept(self) -> None:
        """Whether parts go this way is the spreader's to say."""

    def refuse(self) -> None:
        self._refusing = True

    def wake(self) -> None:
        self._woken = True
        self._spreader.changed()

    def take(self, timeout_s: float) -> bool:
        try:
            if not self._standing:
                return self._spreader.wait_wanted(timeout_s, self._must_return)
            self._part = self._spreader.next(self._way, timeout_s, self._must_return)
            return self._part is not None
        finally:
            self._woken = False

    def _must_return(self) -> bool:
        return self._woken or self._refusing

    def packets(self, features: int) -> Iterable[Packet]:
        part, codec, peer = self._part, self._spreader.codec, self._spreader.peer
        if part is None:
            return [codec.encode(peer, Notice(Kind.PART, 0))]
        return [codec.encode(peer, Notice(Kind.PART, part.flow, part.number, part.offset, part.total), b"", part.body)]

    def written(self, seconds: float) -> None:
        if self._part is not None:
            self._sent.add(self._part.body.size)
            self._part = None

    def give_up(self) -> int:
        # What was sent and not answered is sent by another way: nothing is dropped here.
        return 0

    # -- Dialogue

    def begin(self) -> Packet | None:
        self._part = None
        self._standing = True
        self._spreader.opened(self._way)
        return None

    def replace(self, packet: Packet, going_on: Callable[[], bool]) -> Packet:
        return packet

    def wrote(self, packet: Packet, seconds: float) -> None:
        """What a way takes is seen by its answers."""

    def heard(self, answer: bytes) -> None:
        notice, _, _ = self._spreader.codec.decode(self._spreader.peer, answer)
        if notice.kind is not Kind.ARRIVED:
            raise ProtocolError(f"a {notice.kind.name} as the answer to a part")
        self._spreader.arrived(self._way, notice)

    def ending(self) -> Packet:
        return self._spreader.codec.encode(self._spreader.peer, Notice(Kind.END, 0))

    def end(self) -> None:
        self._standing = False
        self._spreader.broke(self._way)
