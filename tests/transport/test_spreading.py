"""Which way takes which part: nothing is lost, nothing goes beyond its limits, and who is slow or dead holds nobody up."""

from __future__ import annotations

from collections import deque
from random import Random

import pyarrow as pa
import pytest
from hand_clock import HandClock
from hypothesis import given, settings
from hypothesis import strategies as st

from marble.env import SystemRandom
from marble.errors import ProtocolError, UnavailableError
from marble.metrics import Metrics
from marble.transport import spreading as under_test
from marble.transport.assembly import Assembly
from marble.transport.codec import Codec, Lane, Packet
from marble.transport.parts import HELD_BYTES_MAX, PART_BYTES, SPREAD_BYTES_MIN, Kind, Notice, PartsCodec
from marble.transport.spreading import (
    IDLE_S,
    KNOWN_BYTES,
    QUICK_BYTES_PER_S,
    REST_MIN_S,
    SLOW_FACTOR,
    WAITING_PARTS_MAX,
    Flow,
    Part,
    Spreader,
)

PATIENCE_S = 0.1
NOISE = Random(1).randbytes(9 << 20)
ONE, TWO = (PartsCodec(Codec("c", node, 1 << 30)) for node in (1, 2))


def never() -> bool:
    return False


class Net:
    """A spreader with ways that are queues, and the assembly at their other end."""

    def __init__(self, ways: int = 2) -> None:
        self.clock = HandClock()
        self.metrics = Metrics()
        self.spreader = Spreader(2, ways, ONE, PATIENCE_S, self.clock, SystemRandom(1), self.metrics)
        self.flow = self.spreader.begin(Lane.MESSAGES, 0)
        self.flow.heard(TWO.encode(1, Notice(Kind.OPEN, self.flow.number, 0, 0, HELD_BYTES_MAX)).metadata)
        self.lines: list[deque[Part]] = [deque() for _ in range(ways)]
        self.answers: list[deque[Notice]] = [deque() for _ in range(ways)]
        self.open = [False] * ways
        self.answering = [True] * ways
        self.proof_at = float("inf")
        self.assembly = Assembly()
        self.sent: list[bytes] = []
        self.taken: list[bytes] = []

    def up(self, way: int) -> None:
        if not self.open[way]:
            self.open[way] = True
            self.spreader.opened(way)

    def down(self, way: int) -> None:
        self.open[way] = False
        self.lines[way].clear()
        self.answers[way].clear()
        self.spreader.broke(way)

    def watch(self) -> None:
        self.spreader.watch(self.clock.now, self.answering, self.proof_at)

    def put(self, size: int) -> bool:
        start = 997 * len(self.sent) % (len(NOISE) - size)
        data = NOISE[start : start + size]
        number = self.spreader.put(self.flow, pa.py_buffer(data), never)
        if number is not None:
            assert number == len(self.sent)
            self.sent.append(data)
        return number is not None

    def pull(self, way: int) -> Part | None:
        part = self.spreader.next(way, 0.0, lambda: not self.open[way])
        if part is not None:
            self.lines[way].append(part)
        return part

    def arrive(self, way: int) -> None:
        if self.lines[way]:
            part = self.lines[way].popleft()
            self.assembly.put(part.number, part.offset, part.total, part.body)
            self.answers[way].append(Notice(Kind.ARRIVED, part.flow, part.number, part.offset, part.total))

    def answer(self, way: int) -> None:
        if self.answers[way]:
            self.spreader.arrived(way, self.answers[way].popleft())

    def take(self) -> bool:
        number = len(self.taken)
        if number == len(self.sent):
            return False
        try:
            self.taken.append(self.assembly.take(number, len(self.sent[number]), 0.0).to_pybytes())
        except UnavailableError:
            return False
        self.flow.heard(TWO.encode(1, Notice(Kind.TAKEN, self.flow.number, number + 1)).metadata)
        return True

    def settle(self) -> None:
        """Everything works now: all that was sent comes."""
        self.answering = [True] * len(self.answering)
        self.proof_at = float("inf")
        for way in range(len(self.lines)):
            self.up(way)
        for _ in range(2000):
            for way in range(len(self.lines)):
                self.pull(way)
                self.arrive(way)
                self.answer(way)
            while self.take():
                pass
            if len(self.taken) == len(self.sent):
                return
            self.clock.now += 0.01
            self.watch()
        raise AssertionError(f"{len(self.sent) - len(self.taken)} packets did not come")

    def check(self) -> None:
        """The invariants in the head of the module."""
        spreader, flow = self.spreader, self.flow
        untaken = [len(data) for data in self.sent[len(self.taken) :]]
        assert flow.under_way_bytes == sum(untaken)
        assert len(untaken) <= 1 or sum(untaken) <= HELD_BYTES_MAX
        known = {part.key for part in spreader._todo if not part.done}
        for way in spreader._ways:
            assert way.out_bytes == sum(part.body.size for *_, part in way.out.values())
            assert way.open or not way.out
            known |= {part.key for *_, part in way.out.values() if not part.done}
        held = self.assembly._held
        for number in range(len(self.taken), len(self.sent)):
            for offset in range(0, len(self.sent[number]), PART_BYTES):
                there = number in held and offset // PART_BYTES not in held[number].missing
                assert there or (flow.number, number, offset) in known


steps = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "put",
                "pull",
                "pull",
                "arrive",
                "answer",
                "take",
                "up",
                "up",
                "down",
                "wait",
                "wait long",
                "sign",
                "no sign",
            ]
        ),
        st.integers(0, 2),
    ),
    max_size=150,
)


@given(script=steps)
@settings(max_examples=200, deadline=None)
def test_whatever_happens_all_comes_once_in_order_when_it_ends(script: list[tuple[str, int]]) -> None:
    net = Net(ways=3)
    sizes = Random(len(script))
    for what, way in script:
        if what == "put":
            net.put(sizes.choice([SPREAD_BYTES_MIN, PART_BYTES + 1, 3 * PART_BYTES, HELD_BYTES_MAX // 4]))
        elif what == "take":
            net.take()
        elif what.endswith("sign"):
            net.answering[way] = what == "sign"
        elif what.startswith("wait"):
            net.clock.now += 0.01 if what == "wait" else 1.0
            net.proof_at = net.clock.now - way / 2
            net.watch()
        elif net.open[way] or what == "up":
            getattr(net, what)(way)
        net.check()
    net.settle()
    assert net.taken == net.sent


@pytest.fixture
def net() -> Net:
    made = Net()
    made.up(0)
    made.up(1)
    return made


def test_little_waits_in_parts(net: Net) -> None:
    while net.put(PART_BYTES):
        net.check()
    assert len(net.sent) == 2 * WAITING_PARTS_MAX + 1
    assert net.pull(0) is not None
    assert net.put(PART_BYTES)
    assert not net.put(PART_BYTES)


def test_each_way_takes_what_it_drains(net: Net) -> None:
    got = [0, 0]
    for turn in range(300):
        while net.put(PART_BYTES):
            pass
        for way in (0, 1):
            while net.pull(way) is not None:
                pass
            # The first one drains nine times as much as the second one.
            if way == 0 or turn % 9 == 0:
                net.arrive(way)
                net.answer(way)
                got[way] += 1
        while net.take():
            pass
        net.clock.now += 0.005
        net.watch()
        net.check()
    assert got[0] == 300
    # A slow way has little under way, so that nothing waits long for it.
    assert net.spreader._ways[1].window <= 4 * PART_BYTES
    assert len(net.taken) > 310


def test_window_bounds_what_is_out(net: Net) -> None:
    assert net.put(16 * PART_BYTES)
    state = net.spreader._ways[0]
    while net.pull(0) is not None:
        pass
    assert state.out_bytes == state.window == 2 * PART_BYTES
    net.arrive(0)
    net.answer(0)
    assert state.window == 3 * PART_BYTES


def repeated(net: Net) -> int:
    net.watch()
    again = net.metrics.total("transport_parts_sent_again")
    assert net.metrics.total("transport_ways_rested") == again
    return int(again)


def test_parts_of_a_way_that_falls_silent_go_by_the_other_and_it_rests(net: Net) -> None:
    assert net.put(4 * PART_BYTES)
    assert net.pull(1) is not None
    net.answering[1] = False
    net.clock.now += PATIENCE_S / 2
    assert repeated(net) == 0
    net.clock.now += PATIENCE_S
    assert repeated(net) == 1
    first = net.pull(0)
    assert first is not None
    assert first.offset == 0
    assert net.pull(1) is None
    while len(net.taken) < 1:
        net.pull(0)
        net.arrive(0)
        net.answer(0)
        net.take()
    # It answers after all: it rests for as long as it was late, and is used again.
    net.clock.now += PATIENCE_S / 2
    net.arrive(1)
    net.answer(1)
    assert net.put(2 * PART_BYTES)
    net.clock.now += 1.9 * PATIENCE_S
    assert net.pull(1) is None
    net.clock.now += 0.2 * PATIENCE_S
    assert net.pull(1) is not None


def test_way_that_lives_may_be_slow(net: Net) -> None:
    """To send again what is under way, and to leave the way out for a while, would cost more than to wait."""
    assert net.put(4 * PART_BYTES)
    assert net.pull(1) is not None
    net.clock.now += (SLOW_FACTOR - 0.5) * PATIENCE_S
    assert repeated(net) == 0
    net.clock.now += PATIENCE_S
    assert repeated(net) == 1


def test_long_way_may_be_twice_as_slow_as_usual(net: Net) -> None:
    taken_s = SLOW_FACTOR * PATIENCE_S
    for _ in range(50):
        assert net.put(SPREAD_BYTES_MIN)
        assert net.pull(1) is not None
        net.clock.now += taken_s
        net.arrive(1)
        net.answer(1)
        net.take()
    assert net.put(SPREAD_BYTES_MIN)
    assert net.pull(1) is not None
    net.clock.now += 1.9 * taken_s
    assert repeated(net) == 0
    net.clock.now += 0.2 * taken_s
    assert repeated(net) == 1


def test_peer_that_stands_still_makes_no_way_late(net: Net) -> None:
    assert net.put(4 * PART_BYTES)
    assert net.pull(0) is not None
    assert net.pull(1) is not None
    net.proof_at = net.clock.now
    net.answering = [False, False]
    net.clock.now += 100 * PATIENCE_S
    assert repeated(net) == 0
    # By the first way it is heard that it goes on; the second one may have been about to answer, too, or not.
    net.answering[0] = True
    net.arrive(0)
    net.answer(0)
    assert repeated(net) == 0
    net.proof_at = net.clock.now
    assert repeated(net) == 1


def test_way_that_breaks_rests_longer_each_time(net: Net) -> None:
    for times in range(4):
        assert net.put(SPREAD_BYTES_MIN)
        assert net.pull(1) is not None
        net.down(1)
        net.up(1)
        rest_s = REST_MIN_S * 2**times
        net.clock.now += 0.99 * rest_s
        assert net.pull(1) is None
        assert net.pull(0) is not None
        net.arrive(0)
        net.answer(0)
        net.take()
        assert net.put(SPREAD_BYTES_MIN)
        net.clock.now += 0.02 * rest_s
        assert net.pull(1) is not None
        net.arrive(1)
        net.answer(1)
        net.take()


def test_parts_of_a_way_that_breaks_go_by_the_other_at_once(net: Net) -> None:
    assert net.put(2 * PART_BYTES)
    assert net.pull(1) is not None
    net.down(1)
    first = net.pull(0)
    assert first is not None
    assert first.offset == 0


def test_last_way_is_not_late_and_does_not_rest(net: Net) -> None:
    assert net.put(2 * PART_BYTES)
    net.pull(1)
    net.down(0)
    net.clock.now += 100 * PATIENCE_S
    net.watch()
    net.arrive(1)
    net.answer(1)
    assert net.pull(1) is not None
    assert net.metrics.total("transport_ways_rested") == 0


def test_what_a_stream_that_broke_had_to_send_is_not_sent(net: Net) -> None:
    assert net.put(8 * PART_BYTES)
    net.pull(0)
    net.flow.end()
    net.flow.end()
    assert net.pull(1) is None
    net.down(0)
    assert net.pull(1) is None


def test_answers_that_nothing_was_sent_for_are_refused(net: Net) -> None:
    assert net.put(2 * PART_BYTES)
    part = net.pull(0)
    assert part is not None
    good = Notice(Kind.ARRIVED, part.flow, part.number, part.offset, part.total)
    for bad in (good._replace(number=1), good._replace(offset=PART_BYTES), good._replace(flow=0)):
        with pytest.raises(ProtocolError):
            net.spreader.arrived(0, bad)
    with pytest.raises(ProtocolError):
        net.spreader.arrived(1, good)
    net.spreader.arrived(0, good)
    with pytest.raises(ProtocolError):
        net.spreader.arrived(0, good)
    for notice in (
        Notice(Kind.TAKEN, net.flow.number, 2),
        Notice(Kind.TAKEN, 0),
        Notice(Kind.ARRIVED, net.flow.number),
    ):
        with pytest.raises(ProtocolError):
            net.flow.heard(TWO.encode(1, notice).metadata)


def packet(size: int) -> Packet:
    return Packet(bytes(size), None)


LARGE = packet(KNOWN_BYTES)


def made_slow(flow: Flow) -> None:
    flow._slow()
    flow.wrote(LARGE, 2 * KNOWN_BYTES / QUICK_BYTES_PER_S)


def test_stream_is_spread_where_it_is_slow_and_another_way_stands(net: Net) -> None:
    assert net.flow.replace(LARGE, never) is LARGE
    net.flow.wrote(LARGE, 0.5 * KNOWN_BYTES / QUICK_BYTES_PER_S)
    assert net.flow.replace(LARGE, never) is LARGE
    for _ in range(20):
        made_slow(net.flow)
    stub = net.flow.replace(LARGE, never)
    notice, rest, _ = TWO.decode(1, stub.metadata, stub.batch)
    assert notice == Notice(Kind.METADATA, net.flow.number, 0, 0, KNOWN_BYTES)
    assert rest == b""
    small = packet(SPREAD_BYTES_MIN - 1)
    assert net.flow.replace(small, never) is small
    net.down(1)
    assert net.flow.replace(LARGE, never) is LARGE


def test_receiver_that_gives_no_room_gets_whole_packets(net: Net) -> None:
    flow = net.spreader.begin(Lane.MESSAGES, 0)
    made_slow(flow)
    assert flow.replace(LARGE, never) is LARGE


def test_streams_for_parts_are_wanted_while_somebody_is_slow(net: Net) -> None:
    calls: list[None] = []
    net.spreader.wanted = lambda: calls.append(None)
    assert not net.spreader.wait_wanted(0.0, never)
    made_slow(net.flow)
    net.flow.replace(LARGE, never)
    assert len(calls) == 1
    assert net.spreader.wait_wanted(0.0, never)
    # What is to be sent wants them, however long ago it was given.
    net.clock.now += 2 * IDLE_S
    assert net.spreader.wait_wanted(0.0, never)
    while net.pull(0) is not None or net.pull(1) is not None:
        for way in (0, 1):
            net.arrive(way)
            net.answer(way)
    assert not net.spreader.wait_wanted(0.0, never)


def test_flow_waits_for_room_while_it_is_wanted(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "_LOOK_S", 0.001)
    net.spreader._ways[0].window = 2 * HELD_BYTES_MAX
    for _ in range(8):
        assert net.put(HELD_BYTES_MAX // 8)
        while net.pull(0) is not None:
            pass
    looks = iter([True, True, False])
    made_slow(net.flow)
    assert net.flow.replace(LARGE, lambda: next(looks)) is LARGE
    # One payload that is larger than all that there is room for goes alone.
    net.settle()
    huge = pa.py_buffer(bytes(HELD_BYTES_MAX + 1))
    assert net.spreader.put(net.flow, huge, never) == len(net.sent)
    assert not net.put(SPREAD_BYTES_MIN)
