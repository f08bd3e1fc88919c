"""Large packets in parts over all ways to a peer, where one way alone is what everything waits for.

A *flow* is one stream that gives an order: that of entries, or of users' messages, on one way. Where its writes are slow it has the
payloads of large packets cut into parts, and writes stubs in their place (`marble.transport.parts`). Each way has a stream for parts, and
takes the next part when it has room: so each gets as much as it drains.

Rule 1: small packets, and all packets while the flow's own way is quick, go as if there was no other way.
Rule 2: a way has room while fewer bytes than its window are out without an answer. The window grows while little waits in front of the
line, and shrinks when more does, to less than the line holds: so the quickest answer is measured anew. What waits there is what the way
delivers in the time that answers take longer than the quickest: a part has to be sent whole before it can be answered, so on a slow
line one alone takes much longer than a few bytes.
Rule 3: a part is late if it has no answer for longer than answers take on that way, at least `patience_s`, and the way gives no other
sign of life; on one that does, for much longer (`SLOW_FACTOR`). A peer that stands still for a moment makes nothing late. What is
late, and whatever else is out there, is sent again by the others, and the way rests until it has answered for all, and then for as
long again. So a way that was only thought to be late is soon back. One that breaks rests longer each time.
Rule 4: what is sent again is sent first.

Invariants:
- The payloads of a flow that its receiver has not taken are at most what the receiver allows, together, or a single one.
- Every part of a flow that is open is to be sent, or out on a way that is open, or answered: nothing is forgotten while a way is left.
- Thread-safe; no thread of its own. `watch` is called every now and then.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa

from marble.env import Clock, Random
from marble.errors import ProtocolError
from marble.metrics import Metrics
from marble.transport.codec import Lane, Packet
from marble.transport.parts import (
    HELD_BYTES_MAX,
    PART_BYTES,
    SPREAD_BYTES_MIN,
    Kind,
    Notice,
    PartsCodec,
    payload_bytes,
    take_apart,
)

QUICK_BYTES_PER_S: Final = 512.0 * (1 << 20)
"""A way that takes so much is not what anything waits for: to cut packets would cost more than it wins."""
KNOWN_BYTES: Final = 1 << 20
"""A flow has written so much before it is known how quick its way is."""
WINDOW_BYTES_MAX: Final = 16 << 20
"""Out on one way without an answer: 160 MB/s at 100 ms."""
AHEAD_BYTES: Final = PART_BYTES * 3 // 2
"""What may wait in front of a line that is slow: enough that it never stands idle."""
WAITING_PARTS_MAX: Final = 4
"""Parts that wait for each way when the next packet is cut: enough that no way stands idle while that is done."""
SLOW_FACTOR: Final = 4.0
"""Parts may take so many times as long on a way that lives, and twice as long as is usual there. Processes on a busy machine answer
unevenly, and to send again what is under way costs more than to wait for it, while the receiver has room for what comes meanwhile."""
REST_MIN_S: Final = 0.5
REST_MAX_S: Final = 30.0
"""How long a way rests that broke, at first and at most: it doubles each time, until so many answers in a row have come as `_PARDON` says.
30 s is also the most that one rests that was late."""
IDLE_S: Final = 1.0
"""A flow that has had nothing under way for so long finds out anew how quick its way is; ways' streams are wanted no longer."""

_DRAINING: Final = 0.85
"""Of what a line holds, while what waits in front of it drains."""
_LOOK_S: Final = 0.05
"""Between two looks of a flow that waits for room whether its stream is still wanted."""
_PARDON: Final = 256
"""Answers after which it counts no more that a way has broken."""


@dataclass(eq=False, slots=True)
class Part:
    """One part: where it belongs, its bytes, and on which ways it was late."""

    flow: int
    number: int
    offset: int
    total: int
    body: pa.Buffer
    avoid: set[int] = field(default_factory=set)
    done: bool = False

    @property
    def key(self) -> tuple[int, int, int]:
        return self.flow, self.number, self.offset


class _Way:
    """What is known of one way. ``0 <= out_bytes``, the sum of the parts in `out`."""

    def __init__(self) -> None:
        self.open = False
        self.out: dict[tuple[int, int, int], tuple[float, int, Part]] = {}
        """Parts without an answer, since when, and how many bytes had been answered by then; the oldest first."""
        self.out_bytes = 0
        self.answered_bytes = 0
        self.window = 2 * PART_BYTES
        self.least_s: float | None = None
        self.smoothed_s = 0.0
        self.variation_s = 0.0
        self.shrunk_at = 0.0
        self.late = False
        """Something that is out was late: nothing more is sent before all of it is answered."""
        self.late_since = 0.0
        """When the oldest of it was sent."""
        self.rest_s = REST_MIN_S
        self.rests_until = 0.0
        self.in_time = 0

    def fit(self, now: float) -> bool:
        return self.open and not self.late and now >= self.rests_until

    def clear(self) -> list[Part]:
        """Nothing is out any more; what was and is still wanted."""
        lost = [part for *_, part in self.out.values() if not part.done]
        self.out.clear()
        self.out_bytes = 0
        self.late = False
        return lost

    def rest(self, now: float) -> None:
        """It broke."""
        self.rests_until = now + self.rest_s
        self.rest_s = min(REST_MAX_S, 2 * self.rest_s)
        self.window = PART_BYTES
        self.in_time = 0

    def wait_for_all(self, since: float) -> None:
        """What was sent at `since`, and came after it, is late."""
        self.late, self.late_since = True, since
        self.window = max(PART_BYTES, self.window // 2)

    def all_came(self, now: float) -> None:
        """Nothing is out any more."""
        if self.late:
            self.late = False
            self.rests_until = now + min(REST_MAX_S, now - self.late_since)

    def learn(self, taken_s: float, size: int, meanwhile: int, now: float, slack_s: float) -> None:
        """An answer for `size` bytes has come after `taken_s`, when `meanwhile` had been answered since they were sent; it may take
        `slack_s` longer than the quickest.
        """
        if self.least_s is None:
            self.least_s, self.smoothed_s, self.variation_s = taken_s, taken_s, taken_s / 2
        else:
            # What once was the quickest is forgotten slowly: a way may have become longer.
            self.least_s = min(taken_s, self.least_s + (taken_s - self.least_s) / 1024)
            self.variation_s += (abs(self.smoothed_s - taken_s) - self.variation_s) / 4
            self.smoothed_s += (taken_s - self.smoothed_s) / 8
        longer_s = taken_s - self.least_s
        if longer_s <= slack_s or meanwhile * longer_s <= AHEAD_BYTES * taken_s:
            self.window = min(WINDOW_BYTES_MAX, self.window + size)
        elif now - self.shrunk_at > taken_s:
            fits = int(_DRAINING * meanwhile * self.least_s / taken_s)
            self.window = max(PART_BYTES, self.window // 2, fits)
            self.shrunk_at = now
        self.in_time += 1
        if self.in_time >= _PARDON:
            self.rest_s = REST_MIN_S


class Spreader:
    """The ways to one peer, and the parts that are to go there.

    Parameters
    ----------
    ways
        How many there are.
    patience_s
        What a part may take at least before it is late.
    wanted
        Called when parts are to be sent and streams for them may be needed; must not block.
    """

    def __init__(
        self, peer: int, ways: int, codec: PartsCodec, patience_s: float, clock: Clock, random: Random, metrics: Metrics
    ) -> None:
        self.peer = peer
        self.codec = codec
        self.clock = clock
        self.wanted: Callable[[], None] = lambda: None
        self._patience_s = patience_s
        self._random = random
        self._changed = threading.Condition()
        self._ways = [_Way() for _ in range(ways)]
        self._todo: deque[Part] = deque()
        self._flows: dict[int, Flow] = {}
        self._asked_at: float | None = None
        self._again = metrics.counter("transport_parts_sent_again")
        self._late = metrics.counter("transport_ways_rested")

    # -- for streams that give an order

    def begin(self, lane: Lane, way: int) -> Flow:
        """A stream of `lane` stands, on `way`."""
        with self._changed:
            number = self._random.randrange(0, 2**64)
            flow = self._flows[number] = Flow(self, number, lane, way)
            return flow

    def end(self, flow: Flow) -> None:
        """It is gone: what was to be sent for it is not. Idempotent."""
        with self._changed:
            if self._flows.pop(flow.number, None) is None:
                return
            kept = []
            for part in self._todo:
                part.done = part.flow == flow.number
                if not part.done:
                    kept.append(part)
            self._todo = deque(kept)
            for way in self._ways:
                for *_, part in way.out.values():
                    part.done |= part.flow == flow.number
            self._changed.notify_all()

    def ask(self, home: int) -> bool:
        """Parts would be of use to a stream on the way `home`: whether another one takes them now."""
        now = self.clock.monotonic()
        with self._changed:
            fresh = self._asked_at is None or now - self._asked_at > IDLE_S / 2
            if fresh:
                self._asked_at = now
                self._changed.notify_all()
            usable = any(way.fit(now) for at, way in enumerate(self._ways) if at != home)
        if fresh:
            self.wanted()
        return usable

    def put(self, flow: Flow, payload: pa.Buffer, going_on: Callable[[], bool]) -> int | None:
        """Wait until there is room for `payload`, and have it sent in parts: its number. None if `going_on` says no before."""
        size = payload.size
        with self._changed:
            while not self._room(flow, size):
                if not going_on():
                    return None
                self._changed.wait(_LOOK_S)
            number, flow.next = flow.next, flow.next + 1
            flow.under_way.append((number, size))
            flow.under_way_bytes += size
            self._todo.extend(
                Part(flow.number, number, offset, size, payload.slice(offset, min(PART_BYTES, size - offset)))
                for offset in range(0, size, PART_BYTES)
            )
            self._changed.notify_all()
            return number

    def _room(self, flow: Flow, size: int) -> bool:
        # What waits in the flow's own queue may yet go another way; what is in parts is lost with the flow's stream.
        full = len(self._todo) > WAITING_PARTS_MAX * len(self._ways)
        return not full and (not flow.under_way or flow.under_way_bytes + size <= flow.room_bytes)

    def settle(self, flow: Flow, number: int) -> None:
        """The receiver has taken all payloads of `flow` before `number`. Raises ProtocolError if there are not so many."""
        with self._changed:
            if number > flow.next:
                raise ProtocolError(f"packet {number - 1} in parts is said to be taken, and was not sent")
            while flow.under_way and flow.under_way[0][0] < number:
                flow.under_way_bytes -= flow.under_way.popleft()[1]
            self._changed.notify_all()

    def changed(self) -> None:
        """Let those who wait look again."""
        with self._changed:
            self._changed.notify_all()

    # -- for streams of parts

    def wait_wanted(self, timeout_s: float, woken: Callable[[], bool]) -> bool:
        """Wait up to `timeout_s` seconds, or until `woken`, for streams of parts to be wanted; whether they are."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted() or woken(), timeout_s)
            return self._wanted()

    def _wanted(self) -> bool:
        return bool(self._todo) or (self._asked_at is not None and self.clock.monotonic() - self._asked_at <= IDLE_S)

    def opened(self, way: int) -> None:
        """The stream for parts of `way` stands."""
        with self._changed:
            self._ways[way].open = True
            self._changed.notify_all()

    def broke(self, way: int) -> None:
        """It is gone. Idempotent."""
        with self._changed:
            state = self._ways[way]
            state.open = False
            if lost := state.clear():
                state.rest(self.clock.monotonic())
            self._repeat(lost, way)

    def next(self, way: int, timeout_s: float, woken: Callable[[], bool]) -> Part | None:
        """What `way` is to send next, which counts as sent now; None if that is nothing for `timeout_s` seconds, or until `woken`."""
        state = self._ways[way]
        end = self.clock.monotonic() + timeout_s
        with self._changed:
            while not woken():
                now = self.clock.monotonic()
                if (part := self._pick(way, now)) is not None:
                    state.out[part.key] = (now, state.answered_bytes, part)
                    state.out_bytes += part.body.size
                    self._changed.notify_all()
                    return part
                left_s = end - now
                if left_s <= 0 or not state.open:
                    return None
                if self._todo and not state.late and state.rests_until > now:
                    left_s = min(left_s, state.rests_until - now)
                self._changed.wait(left_s)
        return None

    def _pick(self, way: int, now: float) -> Part | None:
        state = self._ways[way]
        others = [other for other in self._ways if other is not state and other.fit(now)]
        # Who is the last one left does not rest.
        if not state.open or (others and not state.fit(now)):
            return None
        for at, part in enumerate(self._todo):
            if part.key in state.out or (others and way in part.avoid):
                continue
            if state.out_bytes and state.out_bytes + part.body.size > state.window:
                return None
            del self._todo[at]
            return part
        return None

    def arrived(self, way: int, notice: Notice) -> int:
        """The answer to a part; how many bytes that was. Raises ProtocolError if nothing is out that it could be for."""
        now = self.clock.monotonic()
        with self._changed:
            state = self._ways[way]
            sent_at, before, part = state.out.pop((notice.flow, notice.number, notice.offset), (0.0, 0, None))
            if part is None or part.total != notice.total:
                raise ProtocolError("the answer to a part that was not sent on this stream")
            state.out_bytes -= part.body.size
            state.answered_bytes += part.body.size
            if not part.done:
                part.done = True
                if part.avoid and part in self._todo:
                    self._todo.remove(part)
            state.learn(now - sent_at, part.body.size, state.answered_bytes - before, now, self._patience_s / 4)
            if not state.out:
                state.all_came(now)
            self._changed.notify_all()
            return int(part.body.size)

    # -- for the watch

    def watch(self, now: float, answering: Sequence[bool], proof_at: float) -> None:
        """See to it that parts that are late are sent by other ways.

        Parameters
        ----------
        answering
            Of each way whether it answers, by the questions that are asked on it beside the parts.
        proof_at
            When the latest of those questions was sent, of any way, that has been answered: then, at least, the peer was there.
        """
        with self._changed:
            for at, state in enumerate(self._ways):
                if state.late or not state.out:
                    continue
                sent_at, *_ = next(iter(state.out.values()))
                others = any(other.fit(now) for other in self._ways if other is not state)
                if others and sent_at < proof_at and now - sent_at > self._most_s(state, answering[at]):
                    state.wait_for_all(sent_at)
                    self._late.add()
                    self._repeat([part for *_, part in state.out.values() if not part.done], at)

    def _most_s(self, way: _Way, answering: bool) -> float:
        """How long the answer to a part may take."""
        usual_s = 0.0 if way.least_s is None else way.smoothed_s + 4 * way.variation_s
        return max(SLOW_FACTOR * self._patience_s, 2 * usual_s) if answering else max(self._patience_s, usual_s)

    def _repeat(self, parts: list[Part], way: int) -> None:
        for part in reversed(parts):
            part.avoid.add(way)
            if part not in self._todo:
                self._todo.appendleft(part)
                self._again.add()
        self._changed.notify_all()


class Flow:
    """The packets of one stream that gives an order. One thread writes, another hears what is answered.

    - ``room_bytes``: what may be under way; 0 until the receiver has said it.
    - ``under_way``, ``under_way_bytes``: number and bytes of each payload that the receiver has not taken, and their sum. With `next`,
      the number of the next one, they are the spreader's, and under its lock.
    """

    def __init__(self, spreader: Spreader, number: int, lane: Lane, way: int) -> None:
        self.number = number
        self.room_bytes = 0
        self.under_way: deque[tuple[int, int]] = deque()
        self.under_way_bytes = 0
        self.next = 0
        self._spreader = spreader
        self._lane = lane
        self._way = way
        self._written_bytes = 0.0
        self._written_s = 0.0
        self._used_at = 0.0

    def opening(self) -> Packet:
        """What is to be written first."""
        return self._spreader.codec.encode(self._spreader.peer, Notice(Kind.OPEN, self.number))

    def heard(self, answer: bytes) -> None:
        """What the receiver answers. Raises ProtocolError if that is nothing that it could."""
        notice, _, _ = self._spreader.codec.decode(self._spreader.peer, answer)
        if notice.flow == self.number and notice.kind is Kind.OPEN:
            self.room_bytes = min(notice.total, HELD_BYTES_MAX)
        elif notice.flow == self.number and notice.kind is Kind.TAKEN:
            self._spreader.settle(self, notice.number)
        else:
            raise ProtocolError(f"a {notice.kind.name} as the answer on a stream that gives an order")

    def wrote(self, packet: Packet, seconds: float) -> None:
        """`packet` was written as it is, and the stream had to be waited for so long."""
        if (size := payload_bytes(packet)) >= SPREAD_BYTES_MIN:
            self._written_bytes = self._written_bytes * 3 / 4 + size
            self._written_s = self._written_s * 3 / 4 + seconds

    def replace(self, packet: Packet, going_on: Callable[[], bool]) -> Packet:
        """What to write in the place of `packet`: itself, or its stub, and then its parts are on their way. Waits for room.

        If `going_on` comes to say no meanwhile it is the packet itself.
        """
        if (
            payload_bytes(packet) < SPREAD_BYTES_MIN
            or not self.room_bytes
            or not self._slow()
            or not self._spreader.ask(self._way)
        ):
            return packet
        kind, metadata, payload = take_apart(self._lane, packet)
        if not SPREAD_BYTES_MIN <= payload.size <= self._spreader.codec.payload_bytes_max:
            return packet
        number = self._spreader.put(self, payload, going_on)
        if number is None:
            return packet
        return self._spreader.codec.encode(
            self._spreader.peer, Notice(kind, self.number, number, 0, payload.size), metadata
        )

    def _slow(self) -> bool:
        """Whether this stream's way is what its packets wait for, by what the last ones took."""
        now = self._spreader.clock.monotonic()
        if now - self._used_at > IDLE_S and not self.under_way:
            self._written_bytes = self._written_s = 0.0
        self._used_at = now
        return KNOWN_BYTES <= self._written_bytes < self._written_s * QUICK_BYTES_PER_S

    def end(self) -> None:
        """The stream is gone. Idempotent."""
        self._spreader.end(self)
