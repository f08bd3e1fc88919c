"""Links between real transports on loopback: order, loss, restart, and stopping whatever the peer does."""

from __future__ import annotations

import itertools
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pyarrow as pa
import pytest

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.env import SystemClock, SystemRandom
from marble.errors import InvariantError, UsageError
from marble.metrics import Metrics
from marble.raft.messages import Message, MessageKind
from marble.transport.carrier import FlightCarrier
from marble.transport.codec import Codec, Envelope, Lane, Packet
from marble.transport.flight import FlightTransport
from marble.transport.handshake import Handshake
from marble.transport.link import Link
from marble.transport.options import TransportOptions
from marble.transport.pump import Surroundings
from marble.transport.queueing import TAKEN_BYTES_MAX
from marble.types import EntryKind

DEADLINE_S = 30.0
QUICK = TransportOptions(connect_timeout_s=0.5, backoff_min_s=0.01, backoff_max_s=0.05, idle_check_s=0.05)


def heartbeat(number: int, sender: int = 1, to: int = 2) -> Envelope:
    return Envelope(0, Message(MessageKind.HEARTBEAT, sender, to, 1, commit=number))


def append(first: int, rows: int = 1, bytes_: int = 64) -> Envelope:
    payload = pa.py_buffer(bytes(bytes_))
    batch = entry_batch.build(0, first, 1, [Proposal(EntryKind.WRITE, 1, payload, 0, at) for at in range(rows)])
    message = Message(MessageKind.APPEND_ENTRIES, 1, 2, 1, log_index=first - 1, entries=entry_batch.span(batch))
    return Envelope(0, message, batch)


def wait_until(condition: Callable[[], bool]) -> None:
    """For states that nobody announces: look again until it is so, or fail at the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        threading.Event().wait(0.002)


class Inbox:
    """A receiver that keeps what comes."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Envelope] = queue.SimpleQueue()

    def __call__(self, envelopes: list[Envelope]) -> None:
        for envelope in envelopes:
            self.queue.put(envelope)

    def take(self) -> Envelope:
        return self.queue.get(timeout=DEADLINE_S)


class Pair:
    """Nodes 1 and 2; what 2 receives is in `inbox`, what broke for 1 in `broken`."""

    def __init__(
        self, options: TransportOptions = QUICK, receiver: Callable[[list[Envelope]], None] | None = None
    ) -> None:
        self.options = options
        self.inbox = Inbox()
        self.broken: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.one = FlightTransport("127.0.0.1:0", "c", 1, options=options)
        self.two = FlightTransport("127.0.0.1:0", "c", 2, options=options)
        self.endpoints = {1: self.one.endpoint, 2: self.two.endpoint}
        self.one.set_peers(self.endpoints)
        self.two.set_peers(self.endpoints)
        # Who is called first takes calls first: node 1 reaches it at its first attempt.
        self.two.start(receiver or self.inbox)
        self.one.start(Inbox(), unreachable=self.broken.put)
        # The first attempt may have come before the other took messages.
        wait_until(lambda: self.one.connected(2) and self.two.connected(1))

    def restart_two(self) -> None:
        self.two = FlightTransport(self.endpoints[2], "c", 2, options=self.options)
        self.two.set_peers(self.endpoints)
        self.two.start(self.inbox)

    def stop(self) -> None:
        assert self.one.stop(5.0)
        assert self.two.stop(5.0)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.stop()


def test_messages_and_entries_arrive_in_order(pair: Pair) -> None:
    sent = [append(at, rows=2) if at % 3 == 0 else heartbeat(at) for at in range(1, 200)]
    for at in range(0, len(sent), 7):
        assert pair.one.send(2, sent[at : at + 7])
    got = [pair.inbox.take() for _ in sent]
    for kind in (MessageKind.HEARTBEAT, MessageKind.APPEND_ENTRIES):
        theirs = [envelope for envelope in got if envelope.message.kind is kind]
        ours = [envelope for envelope in sent if envelope.message.kind is kind]
        assert [envelope.message for envelope in theirs] == [envelope.message for envelope in ours]
        for one, other in zip(theirs, ours, strict=True):
            assert (one.batch is None) == (other.batch is None)
            assert one.batch is None or one.batch.equals(other.batch)
    assert pair.one.connected(2)
    assert pair.two.metrics.total("transport_messages_received") == len(sent)


def test_both_ways(pair: Pair) -> None:
    assert pair.one.send(2, [heartbeat(1)])
    assert pair.inbox.take().message.commit == 1
    wait_until(lambda: pair.two.send(1, [heartbeat(2, sender=2, to=1)]))
    wait_until(lambda: pair.one.metrics.total("transport_messages_received") == 1)


def test_unknown_peers_get_nothing(pair: Pair) -> None:
    assert not pair.one.send(3, [heartbeat(1, to=3)])
    assert not pair.one.connected(3)


def test_restarted_peer_is_found_again_without_traffic(pair: Pair) -> None:
    assert pair.one.send(2, [heartbeat(1)])
    pair.inbox.take()
    assert pair.two.stop(5.0)
    # Nothing is sent: the idle check alone must notice.
    assert pair.broken.get(timeout=DEADLINE_S) == 2
    wait_until(lambda: not pair.one.send(2, [heartbeat(2)]))
    pair.restart_two()
    wait_until(lambda: pair.one.send(2, [heartbeat(3)]))
    while pair.inbox.take().message.commit != 3:
        pass


def test_link_to_a_restarted_peer_is_mended_before_there_is_anything_to_send() -> None:
    """A candidate's link to another follower may have been idle since that one was restarted."""
    pair = Pair(TransportOptions(backoff_min_s=0.01, backoff_max_s=0.02, idle_check_s=60.0))
    assert pair.one.send(2, [heartbeat(1)])
    pair.inbox.take()
    assert pair.two.stop(5.0)
    assert pair.broken.get(timeout=DEADLINE_S) == 2
    wait_until(lambda: not pair.one.connected(2))
    pair.restart_two()
    wait_until(lambda: pair.one.connected(2))
    assert pair.one.send(2, [heartbeat(2)])
    assert pair.inbox.take().message.commit == 2
    pair.stop()


def test_peer_that_changes_its_endpoint(pair: Pair) -> None:
    assert pair.two.stop(5.0)
    pair.two = FlightTransport("127.0.0.1:0", "c", 2, options=QUICK)
    pair.endpoints[2] = pair.two.endpoint
    pair.two.set_peers(pair.endpoints)
    pair.two.start(pair.inbox)
    pair.one.set_peers(pair.endpoints)
    wait_until(lambda: pair.one.send(2, [heartbeat(5)]))
    assert pair.inbox.take().message.commit == 5
    pair.one.set_peers({})
    # It was removed, so it is no visitor though it still has a stream to here.
    assert not pair.one.send(2, [heartbeat(6)])


def test_peer_that_refuses_is_unreachable() -> None:
    one = FlightTransport("127.0.0.1:0", "c", 1, options=QUICK)
    other = FlightTransport("127.0.0.1:0", "another", 2, options=QUICK)
    other.set_peers({1: one.endpoint})
    other.start(Inbox())
    broken: queue.SimpleQueue[int] = queue.SimpleQueue()
    one.set_peers({2: other.endpoint})
    one.start(Inbox(), unreachable=broken.put)
    assert [broken.get(timeout=DEADLINE_S) for _ in range(3)] == [2, 2, 2]
    assert other.metrics.counter("transport_protocol_errors").value >= 2
    assert one.stop(5.0)
    assert other.stop(5.0)


def link_to(endpoint: str, options: TransportOptions, metrics: Metrics) -> tuple[Link, queue.SimpleQueue[int]]:
    broken: queue.SimpleQueue[int] = queue.SimpleQueue()
    failures: list[BaseException] = []
    codec = Codec("c", 1, 1 << 20)
    around = Surroundings(
        FlightCarrier(),
        Handshake(codec, "127.0.0.1:1", 1, metrics),
        options,
        SystemRandom(1),
        SystemClock(),
        metrics,
        unreachable=broken.put,
        way_lost=lambda peer, carried: broken.put(peer),
        failed=failures.append,
    )
    link = Link(2, endpoint, codec, around)
    return link, broken


def test_queue_is_bounded_by_messages_and_by_bytes() -> None:
    # A link that is not started takes what fits and nothing more.
    metrics = Metrics()
    link, _ = link_to("127.0.0.1:1", TransportOptions(queue_messages_max=3), metrics)
    assert link.send([heartbeat(1), heartbeat(2)])
    assert not link.send([heartbeat(3), heartbeat(4)])
    assert link.send([heartbeat(5)])
    assert not link.send([heartbeat(6)])
    assert metrics.total("transport_messages_dropped") == 3
    link, _ = link_to("127.0.0.1:1", TransportOptions(queue_bytes_max=10_000), metrics)
    # An empty queue takes any one send, or a large entry could never leave.
    assert link.send([append(1, bytes_=64_000)])
    assert not link.send([append(2)])
    # What is full keeps nothing else from being sent.
    assert link.send([append(1, bytes_=64_000)])
    assert link.send([heartbeat(1)])
    assert not link.send([heartbeat(2), append(2)])
    link, _ = link_to("127.0.0.1:1", TransportOptions(queue_bytes_max=10_000), metrics)
    assert link.send([append(1, rows=100)])
    assert not link.send([append(101, rows=100)])
    assert link.send([append(101, rows=20)])


def test_what_waits_already_is_not_queued_again() -> None:
    """A leader repeats its question with each heartbeat that is answered; on a slow line it would send nothing else any more."""
    metrics = Metrics()
    link, _ = link_to("127.0.0.1:1", TransportOptions(queue_bytes_max=10_000), metrics)
    for _ in range(100):
        assert link.send([append(1, bytes_=4_096)])
    assert link.queued_bytes(Lane.LOG) < 5_000
    assert link.send([append(2, bytes_=4_096)])
    assert link.queued_bytes(Lane.LOG) > 8_000
    # Once it was taken it may have been lost.
    load = link._loads[Lane.LOG]
    load.put([append(3)])
    assert load.take(0.0)
    load.written(0.0)
    before = load.queued_bytes
    assert load.put([append(3)])
    assert load.queued_bytes > before
    assert metrics.total("transport_messages_dropped") == 0


def test_entries_that_wait_behind_one_that_was_dropped_are_dropped_too() -> None:
    """The core sends all of them again."""
    metrics = Metrics()
    link, _ = link_to("127.0.0.1:1", TransportOptions(queue_bytes_max=10_000), metrics)
    assert link.send([append(1, bytes_=4_096)])
    assert link.send([append(2, bytes_=4_096)])
    assert not link.send([append(3, bytes_=4_096)])
    assert link.queued_bytes(Lane.LOG) == 0
    assert metrics.total("transport_messages_dropped") == 3
    load = link._loads[Lane.LOG]
    assert not load.take(0.0)
    assert link.send([append(1, bytes_=4_096)])
    assert load.take(0.0)


@pytest.mark.parametrize("together", [False, True])
def test_little_is_taken_at_once(together: bool) -> None:
    """However much the core sends at once: what is taken cannot be dropped when the core begins anew."""
    link, _ = link_to("127.0.0.1:1", TransportOptions(), Metrics())
    load = link._loads[Lane.LOG]
    appends = [append(number, bytes_=TAKEN_BYTES_MAX // 2) for number in range(1, 9)]
    for sent in [appends] if together else [[each] for each in appends]:
        assert load.put(sent)
    taken = 0
    while load.queued_bytes:
        assert load.take(0.0)
        before = load.queued_bytes
        load.written(0.0)
        assert before - load.queued_bytes <= 2 * TAKEN_BYTES_MAX
        taken += 1
    assert taken == 4


def test_nothing_is_queued_for_a_peer_that_is_away() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        metrics = Metrics()
        link, broken = link_to(endpoint, QUICK, metrics)
        assert link.send([heartbeat(1)])
        link.start()
        assert broken.get(timeout=DEADLINE_S) == 2
        wait_until(lambda: not link.send([heartbeat(2)]))
        assert metrics.total("transport_messages_dropped") >= 2
        link.request_stop()
        assert link.join(DEADLINE_S)


def test_link_to_a_listener_that_says_nothing_stops() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        link, _ = link_to(f"127.0.0.1:{silent.getsockname()[1]}", QUICK, Metrics())
        link.start()
        connection, _ = silent.accept()
        with connection:
            assert link.send([heartbeat(1)])
            assert not link.connected
            link.request_stop()
            assert link.join(DEADLINE_S)


def test_link_whose_peer_does_not_read_stops_and_drops() -> None:
    """The peer's receiver blocks, so that flow control stops the writer in the middle of a write."""
    entered = threading.Event()
    release = threading.Event()

    def block(envelopes: list[Envelope]) -> None:
        entered.set()
        release.wait(DEADLINE_S)

    pair = Pair(TransportOptions(queue_bytes_max=1 << 20, compression="off"), block)
    large = append(1, bytes_=1 << 20)
    numbers = itertools.count(2)
    assert pair.one.send(2, [large])
    assert entered.wait(DEADLINE_S)
    wait_until(lambda: not pair.one.send(2, [append(next(numbers), bytes_=1 << 20)]))
    assert pair.one.stop(5.0)
    release.set()
    assert pair.two.stop(5.0)


def test_large_batches_delay_no_heartbeat() -> None:
    """The peer takes no entries any more, and all that lies between is full: what is small and urgent passes them."""
    entered, release = threading.Event(), threading.Event()
    beats: queue.SimpleQueue[int] = queue.SimpleQueue()

    def receive(envelopes: list[Envelope]) -> None:
        for envelope in envelopes:
            if envelope.message.kind is MessageKind.HEARTBEAT:
                beats.put(envelope.message.commit)
            else:
                entered.set()
                release.wait(DEADLINE_S)

    pair = Pair(TransportOptions(queue_bytes_max=1 << 20, compression="off"), receive)
    large = append(1, bytes_=1 << 20)
    numbers = itertools.count(2)
    assert pair.one.send(2, [large])
    assert entered.wait(DEADLINE_S)
    wait_until(lambda: not pair.one.send(2, [append(next(numbers), bytes_=1 << 20)]))
    for number in range(10):
        # Together with more of what does not get through, queued or dropped.
        pair.one.send(2, [large, heartbeat(number)])
        assert beats.get(timeout=DEADLINE_S) == number
    assert not release.is_set()
    release.set()
    pair.stop()


def test_streams_for_entries_are_opened_when_needed_and_closed_when_idle() -> None:
    pair = Pair(TransportOptions(backoff_min_s=0.01, idle_check_s=0.01, idle_close_s=0.02))
    opened = pair.one.metrics.counter("transport_streams_opened", peer=2)
    assert pair.one.send(2, [heartbeat(1)])
    pair.inbox.take()
    assert opened.value == 1
    for at in (1, 2):
        assert pair.one.send(2, [append(at)])
        assert pair.inbox.take().message.log_index == at - 1
        assert opened.value == 1 + at
        wait_until(lambda: pair.two._peers.visitors == {1: 1})
    # Closing one is no news about the peer.
    assert pair.broken.empty()
    assert pair.one.connected(2)
    pair.stop()


def test_error_of_our_own_is_reported() -> None:
    one = FlightTransport("127.0.0.1:0", "c", 1, options=QUICK)
    two = FlightTransport("127.0.0.1:0", "c", 2, options=QUICK)
    failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    two.set_peers({1: one.endpoint})
    two.start(Inbox())
    one.set_peers({2: two.endpoint})
    one.start(Inbox(), failed=failures.put)
    one.send(2, [heartbeat(1, to=3)])
    assert "not for the stream to 2" in str(failures.get(timeout=DEADLINE_S))
    assert one.stop(5.0)
    assert two.stop(5.0)


@pytest.mark.parametrize("wrong", [{"queue_bytes_max": 0}, {"backoff_min_s": 2.0}, {"idle_check_s": -1.0}])
def test_options_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        TransportOptions(**wrong)  # type: ignore[arg-type]


def test_packets_that_cannot_be_made_are_no_fault_of_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: queue.Queue[BaseException] = queue.Queue()
    one, two = FlightTransport("127.0.0.1:0", "c", 1), FlightTransport("127.0.0.1:0", "c", 2)
    try:
        two.start(Inbox())
        one.start(Inbox(), failed=failures.put)
        one.set_peers({2: two.endpoint})
        wait_until(lambda: one.connected(2))

        def encode(*_: object) -> list[Packet]:
            raise pa.ArrowIndexError("beyond the end")

        monkeypatch.setattr(one._codec, "encode", encode)
        one.send(2, [heartbeat(1)])
        failure = failures.get(timeout=DEADLINE_S)
        assert isinstance(failure, InvariantError)
        assert "node 2 cannot be made into packets: beyond the end" in str(failure)
    finally:
        one.stop()
        two.stop()
