"""Streams on which a peer owes answers while other things show that it lives: TCP waits there, and to open others is quicker."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator

import pytest
from transport.test_link import DEADLINE_S, append, heartbeat, wait_until

from marble._core.entry_batch import ENTRY_SCHEMA
from marble.env import SystemClock
from marble.metrics import Metrics
from marble.testing.relay import Line, Relay
from marble.transport.carrier import STREAM_ERRORS
from marble.transport.codec import Lane
from marble.transport.flight import FlightTransport
from marble.transport.handshake import ONLY
from marble.transport.options import TransportOptions
from marble.transport.pump import PATIENT_EVERY, UNHURRIED_EVERY, Pump

SILENT = Line(silent=True)
OPTIONS = TransportOptions(
    backoff_min_s=0.01, backoff_max_s=0.05, idle_check_s=0.02, silent_quick_s=600.0, silent_peer_s=6000.0
)
"""Hours pass by the clock that a test sets, not otherwise."""


class Shifted(SystemClock):
    """The machine's clock, ahead by what a test says."""

    ahead_s = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead_s


class Pair:
    """Node 1, whose clock is shifted, reaches node 2 over a relay; 2 reaches 1 directly."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.clock = Shifted()
        self.inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.told: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.metrics = Metrics()
        self.two = two = FlightTransport("127.0.0.1:0", "c", 2, options=OPTIONS)
        stack.callback(two.stop, 5.0)
        self.relay = stack.enter_context(Relay(two.endpoint))
        self.one = FlightTransport("127.0.0.1:0", "c", 1, options=OPTIONS, clock=self.clock, metrics=self.metrics)
        stack.callback(self.one.stop, 5.0)
        two.set_peers({1: self.one.endpoint})
        two.start(lambda envelopes: [self.inbox.put(each) for each in envelopes] and None)
        self.one.set_peers({2: self.relay.endpoint})
        self.one.start(lambda envelopes: None, unreachable=self.told.put)
        self.link = self.one._peers.links[2]
        wait_until(lambda: self.one.connected(2) and two.connected(1))
        wait_until(lambda: self.link.round_trip_s is not None)

    def owes(self, seconds: float) -> None:
        """Node 2 owes an answer for so long, as node 1 sees it."""
        self.relay.set(back=SILENT)
        wait_until(lambda: self.link._pulse.waited_s(self.clock.monotonic()) > 0.1)
        while self.told.qsize():
            self.told.get()
        self.clock.ahead_s = seconds


@pytest.fixture
def pair() -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        yield Pair(stack)


def test_who_is_heard_and_owes_an_answer_gets_other_streams(pair: Pair) -> None:
    """Node 2 goes on to send to node 1 what is no answer."""
    pair.owes(400.0)
    assert pair.told.get(timeout=DEADLINE_S) == 2
    wait_until(lambda: "though it lives" in pair.link.trouble or pair.one.connected(2))
    pair.relay.set(back=Line())
    wait_until(lambda: pair.one.connected(2))
    assert pair.one.send(2, [heartbeat(7)])
    assert pair.inbox.get(timeout=DEADLINE_S).message.commit == 7


def test_who_owes_an_answer_for_a_moment_keeps_its_streams(pair: Pair) -> None:
    opened = pair.metrics.counter("transport_streams_opened", peer=2)
    before = opened.value
    pair.owes(200.0)
    heard = pair.one.metrics.histogram("transport_round_trip_seconds", peer=2)
    seen = heard.spread().total
    pair.relay.set(back=Line())
    wait_until(lambda: heard.spread().total > seen)
    assert opened.value == before
    assert not pair.told.qsize()


def test_an_answer_that_comes_very_late_renews_the_stream_of_entries(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(pair.link), "heard", lambda link: None)
    assert pair.one.send(2, [append(1)])
    assert pair.inbox.get(timeout=DEADLINE_S).message.log_index == 0
    opened = pair.metrics.counter("transport_streams_opened", peer=2)
    before = opened.value
    pair.owes(400.0)
    pair.relay.set(back=Line())
    # The core hears that what was under way may be lost; the stream for control stays.
    assert pair.told.get(timeout=DEADLINE_S) == 2
    assert pair.one.connected(2)

    def arrives() -> bool:
        pair.one.send(2, [append(1)])
        return not pair.inbox.empty()

    wait_until(arrives)
    assert opened.value == before + 1


def test_the_kernel_ends_connections_of_streams_of_entries_sooner() -> None:
    """They carry no pings that would tell that TCP waits there. What is on other streams is pinged, or better late than lost."""
    waits: dict[Lane, float] = {}
    for lane in Lane:
        pump = Pump.__new__(Pump)
        pump._options, pump._lane = OPTIONS, lane
        waits[lane] = pump._silent_s
    assert waits.pop(Lane.LOG) == OPTIONS.silent_quick_s
    assert set(waits.values()) == {OPTIONS.silent_peer_s}


def test_most_attempts_are_quick_and_some_are_patient() -> None:
    pump = Pump.__new__(Pump)
    pump._options = TransportOptions(connect_timeout_s=4.0, connect_quick_s=0.5)
    allowed = [pump._connect_s(attempt) for attempt in range(1, 2 * PATIENT_EVERY + 1)]
    assert allowed[0] == 0.5
    assert allowed[UNHURRIED_EVERY - 1] == 1.0
    assert allowed.count(4.0) == 2
    assert sum(allowed) / len(allowed) < 1.0
    pump._options = TransportOptions(connect_timeout_s=0.1, connect_quick_s=0.5)
    assert {pump._connect_s(attempt) for attempt in range(1, 33)} == {0.1}


def test_what_comes_late_on_an_older_stream_is_of_the_past(pair: Pair) -> None:
    """Here the older stream is one that nobody cancelled. The newer one is the link's, after that was ended by the older one's start."""
    around = pair.one._around
    old = around.carrier.open(pair.two.endpoint, ENTRY_SCHEMA, connect_timeout_s=DEADLINE_S, silent_peer_s=DEADLINE_S)
    try:
        around.handshake.call(2, Lane.CONTROL, old, ONLY)
        old.write(*pair.one._codec.encode(2, ())[0])
        assert old.answer()
        # What the link still sends is taken no more, so it opens another stream, which is then the newest.
        assert pair.told.get(timeout=DEADLINE_S) == 2
        trips = pair.one.metrics.histogram("transport_round_trip_seconds", peer=2)
        wait_until(lambda: pair.one.connected(2))
        before = trips.spread().total
        wait_until(lambda: trips.spread().total > before + 2)
        with contextlib.suppress(*STREAM_ERRORS):
            old.write(*pair.one._codec.encode(2, [heartbeat(5)])[0])
            assert old.answer() is None
    finally:
        old.close()
    assert pair.one.send(2, [heartbeat(6)])
    assert pair.inbox.get(timeout=DEADLINE_S).message.commit == 6


def test_entries_that_come_late_on_a_stream_from_before_the_one_for_control_are_of_the_past(pair: Pair) -> None:
    """As those of a leader that has stepped down meanwhile, and sends no others: followers would go on to wait for it."""
    around = pair.one._around
    before = around.carrier.open(
        pair.two.endpoint, ENTRY_SCHEMA, connect_timeout_s=DEADLINE_S, silent_peer_s=DEADLINE_S
    )
    after = around.carrier.open(pair.two.endpoint, ENTRY_SCHEMA, connect_timeout_s=DEADLINE_S, silent_peer_s=DEADLINE_S)
    with contextlib.closing(before), contextlib.closing(after):
        # It stands, and nothing has come on it when the link opens another stream for control.
        around.handshake.call(2, Lane.LOG, before, ONLY)
        pair.link._break_off(Lane.CONTROL)
        assert pair.told.get(timeout=DEADLINE_S) == 2
        trips = pair.one.metrics.histogram("transport_round_trip_seconds", peer=2)
        wait_until(lambda: pair.one.connected(2))
        seen = trips.spread().total
        wait_until(lambda: trips.spread().total > seen + 2)
        deadline = time.monotonic() + DEADLINE_S
        with contextlib.suppress(*STREAM_ERRORS):
            while True:
                before.write(*pair.one._codec.encode(2, [append(5)])[0])
                assert pair.inbox.empty(), "it was listened to"
                assert time.monotonic() < deadline, "it did not end"
                threading.Event().wait(0.002)
        # One that was opened since is listened to.
        around.handshake.call(2, Lane.LOG, after, ONLY)
        after.write(*pair.one._codec.encode(2, [append(6)])[0])
        assert pair.inbox.get(timeout=DEADLINE_S).message.log_index == 5
