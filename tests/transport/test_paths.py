"""A peer with two addresses: each behind a relay, so that either way can die, fall silent or be slow."""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pyarrow as pa
import pytest

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.config import ADDRESSES_MAX
from marble.errors import UsageError
from marble.raft.messages import Message, MessageKind
from marble.testing.relay import Line, Relay
from marble.transport.codec import Envelope, Lane
from marble.transport.flight import FlightTransport
from marble.transport.options import TransportOptions
from marble.transport.paths import Paths, addresses_of
from marble.transport.snapshot_rows import piece_row
from marble.types import EntryKind, Position

DEADLINE_S = 30.0
SILENT = Line(silent=True)
OPTIONS = TransportOptions(backoff_min_s=0.01, backoff_max_s=0.05, ping_s=0.02, answer_s=0.3, silent_peer_s=2.0)


def beat(number: int) -> Envelope:
    return Envelope(0, Message(MessageKind.HEARTBEAT, 1, 2, 1, commit=number))


def append(group: int, index: int) -> Envelope:
    batch = entry_batch.build(group, index, 1, [Proposal(EntryKind.WRITE, 1, pa.py_buffer(bytes(64)), 0, 0)])
    span = entry_batch.span(batch)
    return Envelope(group, Message(MessageKind.APPEND_ENTRIES, 1, 2, 1, log_index=index - 1, entries=span), batch)


def piece(offset: int, nbytes: int) -> Envelope:
    message = Message(MessageKind.SNAPSHOT_PIECE, 1, 2, 1, log_index=9, log_term=1, context=offset)
    return Envelope(0, message, piece_row(0, Position(9, 1), offset, bytes(nbytes)))


def wait_until(condition: Callable[[], bool], what: str = "it") -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come about"
        threading.Event().wait(0.002)


class Pair:
    """Node 1 reaches node 2 over two relays; what 2 receives is in `inbox`, what 1's core would be told in `told`."""

    def __init__(self, stack: contextlib.ExitStack, options: TransportOptions = OPTIONS) -> None:
        self.inbox: queue.SimpleQueue[Envelope] = queue.SimpleQueue()
        self.told: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.two = FlightTransport("127.0.0.1:0", "c", 2, options=options)
        stack.callback(self.two.stop, 5.0)
        self.relays = [stack.enter_context(Relay(self.two.endpoint)) for _ in range(2)]
        self.one = FlightTransport("127.0.0.1:0", "c", 1, options=options)
        stack.callback(self.one.stop, 5.0)
        self.two.set_peers({1: self.one.endpoint})
        self.two.start(lambda envelopes: [self.inbox.put(envelope) for envelope in envelopes] and None)
        self.one.set_peers({2: ",".join(relay.endpoint for relay in self.relays)})
        self.one.start(lambda envelopes: None, unreachable=self.told.put)
        wait_until(lambda: all(answers and taken is not None for _, answers, taken in self.paths.states()), "two ways")

    @property
    def paths(self) -> Paths:
        link = self.one._peers.links[2]
        assert isinstance(link, Paths)
        return link

    def answering(self) -> list[bool]:
        return [answers for _, answers, _ in self.paths.states()]

    def passed(self) -> list[int]:
        return [relay.counts()["passed_there"] for relay in self.relays]

    def beat_through(self, number: int) -> None:
        """Send heartbeats until one arrives: as a leader does, which repeats them."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            self.one.send(2, [beat(number)])
            with contextlib.suppress(queue.Empty):
                while self.inbox.get(timeout=0.05).message.commit != number:
                    pass
                return
            assert time.monotonic() < deadline, "no heartbeat arrived"


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


@pytest.fixture
def pair(stack: contextlib.ExitStack) -> Pair:
    return Pair(stack)


def test_both_ways_stand_before_anything_is_sent(pair: Pair) -> None:
    assert pair.one.connected(2)
    assert [relay.counts()["accepted"] for relay in pair.relays] == [1, 1]
    pair.beat_through(1)


@pytest.mark.parametrize("first", [0, 1])
def test_a_way_that_falls_silent_is_left_for_the_other_without_connecting(pair: Pair, first: int) -> None:
    # Control is made to run over `first`.
    pair.relays[1 - first].set(there=Line(delay_s=0.05))
    wait_until(lambda: pair.paths._live(time.monotonic()) and pair.paths._first == first, "the quicker way")
    pair.relays[1 - first].set(there=Line())
    accepted = pair.relays[1 - first].counts()["accepted"]
    pair.relays[first].set(there=SILENT, back=SILENT)
    wait_until(lambda: not pair.answering()[first], "silence")
    assert pair.answering()[1 - first]
    # The core hears of it, for what was under way there is lost.
    while pair.told.qsize():
        pair.told.get()
    assert pair.one.send(2, [beat(7)])
    while pair.inbox.get(timeout=DEADLINE_S).message.commit != 7:
        pass
    assert pair.relays[1 - first].counts()["accepted"] == accepted


def test_the_core_is_told_when_a_way_that_was_used_falls_silent_and_not_again_while_it_stays_so(pair: Pair) -> None:
    assert pair.one.send(2, [append(0, 1)])
    assert pair.inbox.get(timeout=DEADLINE_S).message.kind is MessageKind.APPEND_ENTRIES
    pair.relays[0].set(there=SILENT, back=SILENT)
    assert pair.told.get(timeout=DEADLINE_S) == 2
    # It is given up and tried again, several times, while the other one carries everything.
    refused = pair.one.metrics.counter("transport_streams_broken", peer=2)
    broken = refused.value
    pair.relays[0].refuse()
    pair.relays[0].reset()
    wait_until(lambda: refused.value >= broken + 3, "three attempts")
    assert pair.one.send(2, [append(0, 2)])
    assert pair.inbox.get(timeout=DEADLINE_S).message.log_index == 1
    assert pair.told.empty()


def test_a_way_that_is_reset_is_left_and_comes_back(pair: Pair) -> None:
    for number in range(1, 4):
        for at, relay in enumerate(pair.relays):
            relay.refuse()
            relay.reset()
            wait_until(lambda at=at: not pair.answering()[at], "the break")
            pair.beat_through(10 * number + at)
            relay.refuse(False)
            wait_until(lambda: all(pair.answering()), "its return")


def test_entries_of_a_group_keep_their_order_and_groups_share_the_ways(stack: contextlib.ExitStack) -> None:
    # On a busy machine an answer may be late, and then all take the other way.
    pair = Pair(stack, replace(OPTIONS, answer_s=DEADLINE_S))
    before = pair.passed()
    for index in range(1, 200):
        for group in (0, 1):
            assert pair.one.send(2, [append(group, index)])
    indexes: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(398):
        envelope = pair.inbox.get(timeout=DEADLINE_S)
        indexes[envelope.group].append(envelope.message.log_index)
    assert indexes == {0: list(range(199)), 1: list(range(199))}
    grown = [after - was for after, was in zip(pair.passed(), before, strict=True)]
    assert min(grown) > 100 * 64


def test_pieces_of_snapshots_go_over_all_ways_at_once(
    stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes the way on which less waits. Here all wait until the last one has its way, however threads take turns."""
    pair = Pair(stack, replace(OPTIONS, answer_s=DEADLINE_S))
    before = pair.passed()
    pumps = [link._pumps[Lane.BULK] for link in pair.paths._links]
    for pump in pumps:
        monkeypatch.setattr(pump, "start", lambda: None)
    for at in range(32):
        assert pair.one.send(2, [piece(at << 16, 1 << 16)])
    monkeypatch.undo()
    for pump in pumps:
        pump.start()
    offsets = {pair.inbox.get(timeout=DEADLINE_S).message.context for _ in range(32)}
    assert offsets == {at << 16 for at in range(32)}
    grown = [after - was for after, was in zip(pair.passed(), before, strict=True)]
    assert min(grown) > 16 << 16


def test_a_much_quicker_way_takes_the_control_over(pair: Pair) -> None:
    pair.relays[0].set(there=Line(delay_s=0.03))
    wait_until(lambda: pair.paths._live(time.monotonic()) and pair.paths._first == 1, "the change")
    pair.relays[0].set(there=Line())
    pair.relays[1].set(there=Line(delay_s=0.03))
    wait_until(lambda: pair.paths._live(time.monotonic()) and pair.paths._first == 0, "the change back")


def test_when_nobody_answers_the_core_is_told_and_everything_mends(pair: Pair) -> None:
    for relay in pair.relays:
        relay.set(there=SILENT, back=SILENT)
    assert pair.told.get(timeout=DEADLINE_S) == 2
    wait_until(lambda: not pair.one.connected(2), "the end of both")
    wait_until(lambda: not pair.one.send(2, [beat(1)]), "a refusal")
    for relay in pair.relays:
        relay.set(there=Line(), back=Line())
    wait_until(lambda: all(pair.answering()), "their return")
    pair.beat_through(3)


def test_stop_ends_all_threads_while_one_way_hangs(pair: Pair) -> None:
    pair.relays[0].set(there=SILENT, back=SILENT)
    assert pair.one.stop(5.0)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("marble-link-1-")] == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("marble-echo-1-")] == []


def test_a_single_way_to_a_peer_that_takes_all_and_answers_nothing_is_given_up(stack: contextlib.ExitStack) -> None:
    options = TransportOptions(backoff_min_s=0.01, backoff_max_s=0.05, idle_check_s=0.05, silent_peer_s=0.5)
    two = FlightTransport("127.0.0.1:0", "c", 2, options=options)
    stack.callback(two.stop, 5.0)
    relay = stack.enter_context(Relay(two.endpoint))
    one = FlightTransport("127.0.0.1:0", "c", 1, options=options)
    stack.callback(one.stop, 5.0)
    told: queue.SimpleQueue[int] = queue.SimpleQueue()
    two.set_peers({1: one.endpoint})
    two.start(lambda envelopes: None)
    one.set_peers({2: relay.endpoint})
    one.start(lambda envelopes: None, unreachable=told.put)
    wait_until(lambda: one.connected(2), "the link")
    while told.qsize():
        told.get()
    relay.set(back=SILENT)
    assert told.get(timeout=DEADLINE_S) == 2
    wait_until(lambda: not one.connected(2), "the end")
    assert "no answer" in one._peers.links[2].trouble
    relay.set(back=Line())
    wait_until(lambda: one.connected(2), "the link again")


@pytest.mark.parametrize(
    ("endpoint", "addresses"),
    [("a:1", ("a:1",)), ("a:1,b:2", ("a:1", "b:2")), ("[::1]:7,10.0.0.1:7", ("[::1]:7", "10.0.0.1:7"))],
)
def test_addresses(endpoint: str, addresses: tuple[str, ...]) -> None:
    assert addresses_of(endpoint) == addresses


@pytest.mark.parametrize(
    "endpoint", ["", "a", "a:1,", ",a:1", "a:1,a:1", "a:1,b", ",".join(f"h:{n}" for n in range(1, ADDRESSES_MAX + 2))]
)
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(UsageError):
        addresses_of(endpoint)


def test_messages_of_users_keep_their_order_and_change_their_way_when_it_dies(pair: Pair) -> None:
    for number in range(100):
        pair.one.send_message(2, b"%d" % number)
    assert [bytes(pair.two.receive_message(DEADLINE_S)) for _ in range(100)] == [b"%d" % n for n in range(100)]
    way = pair.paths._message_way
    pair.relays[way].set(there=SILENT, back=SILENT)
    wait_until(lambda: pair.paths._message_way != way, "the change")
    for number in range(100):
        pair.one.send_message(2, b"%d" % number)
    assert [bytes(pair.two.receive_message(DEADLINE_S)) for _ in range(100)] == [b"%d" % n for n in range(100)]


def test_messages_that_wait_on_a_dead_way_come_along(pair: Pair) -> None:
    way = pair.paths._message_way
    pair.one.send_message(2, b"first")
    assert bytes(pair.two.receive_message(DEADLINE_S)) == b"first"
    pair.relays[way].set(there=SILENT, back=SILENT)
    # More than fits what is under way, and noise, which cannot be squeezed to less: the rest waits in the queue.
    large = random.Random(1).randbytes(1 << 20)
    for _ in range(40):
        pair.one.send_message(2, large)
    pair.one.send_message(2, b"last")
    while bytes(pair.two.receive_message(DEADLINE_S)) != b"last":
        pass
    assert pair.paths._message_way != way
