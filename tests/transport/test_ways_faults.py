"""Bulk over two ways of limited rate, real sockets: both are used, and whatever happens to one of them, order and content stay."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator

import pyarrow as pa
import pytest
from transport.test_paths import DEADLINE_S, SILENT, Pair, wait_until

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.errors import UnavailableError, UsageError
from marble.raft.messages import Message, MessageKind
from marble.testing.relay import Line
from marble.transport.codec import Envelope
from marble.transport.handshake import FEATURES, SPREAD
from marble.transport.options import TransportOptions
from marble.types import EntryKind

MIB = 1 << 20
RATE = 40.0 * MIB
LIMITED = Line(bytes_per_s=RATE)
OPTIONS = TransportOptions(
    queue_bytes_max=16 * MIB, backoff_min_s=0.01, backoff_max_s=0.05, ping_s=0.02, answer_s=0.3, silent_peer_s=10.0
)
NOISE = random.Random(7).randbytes(3 * MIB)


def numbered(number: int) -> bytes:
    """A message of 1 MiB that nothing can be squeezed of, and that differs from all others."""
    start = 4099 * number % (2 * MIB)
    return number.to_bytes(8, "little") + NOISE[start : start + MIB]


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


@pytest.fixture
def pair(stack: contextlib.ExitStack) -> Pair:
    made = Pair(stack, OPTIONS)
    for relay in made.relays:
        relay.set(there=LIMITED)
    return made


def sent(pair: Pair) -> list[int]:
    return [pair.one.metrics.counter("transport_parts_bytes_sent", peer=2, way=way).value for way in (0, 1)]


class Talk:
    """Node 1 sends numbered messages without a pause, on a thread of its own; `hear` checks each that arrives.

    It is whole, and none that came before comes again or later. None is missing, unless the way that gives the order was left
    meanwhile, with which goes what is under way there. That may happen on any machine that is busy enough.
    """

    def __init__(self, stack: contextlib.ExitStack, pair: Pair) -> None:
        self.pair = pair
        self.heard = 0
        self.left = 0
        """How often users' messages have left a way for another one."""
        for link in pair.paths._links:
            link.reclaim_messages = self._counting(link.reclaim_messages)  # type: ignore[method-assign]
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        stack.callback(self.end)

    def _run(self) -> None:
        with contextlib.suppress(UsageError, UnavailableError):
            for number in itertools.count():
                if self._ending.is_set():
                    return
                self.pair.one.send_message(2, numbered(number), timeout_s=2 * DEADLINE_S)

    def _counting(self, reclaim: Callable[[], list[bytes | pa.Buffer]]) -> Callable[[], list[bytes | pa.Buffer]]:
        def counted() -> list[bytes | pa.Buffer]:
            self.left += 1
            return reclaim()

        return counted

    def hear(self) -> None:
        message = self.pair.two.receive_message(DEADLINE_S)
        assert message is not None
        number = int.from_bytes(bytes(message)[:8], "little")
        assert number >= self.heard, "an earlier message, or one for the second time"
        assert number == self.heard or self.left, "a message is missing"
        assert bytes(message) == numbered(number)
        self.heard = number + 1

    def hear_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 2 * DEADLINE_S
        while not condition():
            self.hear()
            assert time.monotonic() < deadline, f"{what} did not come about"

    def end(self) -> None:
        self._ending.set()
        # A transport that stops would let all that is queued leave first.
        self.pair.one.set_peers({})
        while self._thread.is_alive():
            # What it waits for is room.
            self.pair.two.receive_message(0.01)
        self._thread.join()


def both_used(pair: Pair) -> Callable[[], bool]:
    before = sent(pair)
    return lambda: min(now - was for now, was in zip(sent(pair), before, strict=True)) >= 2 * MIB


def test_messages_of_one_user_go_over_both_ways_in_order(stack: contextlib.ExitStack, pair: Pair) -> None:
    talk = Talk(stack, pair)
    talk.hear_until(both_used(pair), "bulk over both ways")
    assert pair.two.metrics.total("transport_parts_received") > 0


def test_entries_of_one_group_go_over_both_ways_in_order(pair: Pair) -> None:
    used, sent_index, came = both_used(pair), 0, 0
    deadline = time.monotonic() + 2 * DEADLINE_S
    while not used():
        while sent_index - came < 12:
            sent_index += 1
            proposal = Proposal(EntryKind.WRITE, 1, pa.py_buffer(numbered(sent_index)[: MIB - 64]), 0, 0)
            batch = entry_batch.build(0, sent_index, 1, [proposal])
            entries = entry_batch.span(batch)
            message = Message(MessageKind.APPEND_ENTRIES, 1, 2, 1, log_index=sent_index - 1, entries=entries)
            assert pair.one.send(2, [Envelope(0, message, batch)])
        envelope = pair.inbox.get(timeout=DEADLINE_S)
        came += 1
        assert envelope.message.log_index == came - 1
        assert envelope.batch is not None
        assert entry_batch.payload(envelope.batch, 0).to_pybytes() == numbered(came)[: MIB - 64]
        assert time.monotonic() < deadline, "bulk over both ways did not come about"


@pytest.mark.parametrize("other", [True, False], ids=["the other way", "the way of the order"])
@pytest.mark.parametrize("fault", ["silent", "slow", "cut"])
def test_fault_of_one_way_under_bulk(stack: contextlib.ExitStack, pair: Pair, fault: str, other: bool) -> None:
    talk = Talk(stack, pair)
    talk.hear_until(both_used(pair), "bulk over both ways")
    order = pair.paths._message_way
    way = 1 - order if other else order
    if fault == "silent":
        pair.relays[way].set(there=SILENT, back=SILENT)
    elif fault == "slow":
        pair.relays[way].set(there=Line(bytes_per_s=0.2 * MIB))
    else:
        pair.relays[way].refuse()
        pair.relays[way].reset()
    # Much more than what was under way comes while the fault lasts.
    target = talk.heard + 32
    talk.hear_until(lambda: talk.heard >= target, "what comes after it")
    pair.relays[way].refuse(False)
    pair.relays[way].set(there=LIMITED, back=Line())
    talk.hear_until(both_used(pair), "bulk over both ways again")


def test_way_that_turns_bits_under_bulk(stack: contextlib.ExitStack, pair: Pair) -> None:
    talk = Talk(stack, pair)
    talk.hear_until(both_used(pair), "bulk over both ways")
    other = 1 - pair.paths._message_way
    pair.relays[other].set(there=Line(bytes_per_s=RATE, flip_chance=3e-6))
    target = talk.heard + 32
    talk.hear_until(lambda: talk.heard >= target, "what comes meanwhile")
    assert pair.relays[other].counts()["flipped"] > 0
    pair.relays[other].set(there=LIMITED)
    talk.hear_until(both_used(pair), "bulk over both ways again")


def test_heartbeats_pass_bulk(stack: contextlib.ExitStack, pair: Pair) -> None:
    talk = Talk(stack, pair)
    talk.hear_until(both_used(pair), "bulk over both ways")
    for number in range(1, 6):
        before = talk.heard
        pair.beat_through(number)
        # It has not waited for what was under way before it: nothing of that was taken out since.
        assert talk.heard == before


def test_peer_without_parts_gets_whole_messages_by_one_way(stack: contextlib.ExitStack, pair: Pair) -> None:
    pair.two._handshake.features = FEATURES & ~SPREAD
    for relay in pair.relays:
        relay.reset()
    wait_until(
        lambda: all(answers and taken is not None for _, answers, taken in pair.paths.states()), "two ways again"
    )
    wait_until(lambda: all(not link._takes_parts() for link in pair.paths._links), "the peer's word")
    talk = Talk(stack, pair)
    talk.hear_until(lambda: talk.heard >= 32, "messages")
    assert sent(pair) == [0, 0]
    assert pair.two.metrics.total("transport_parts_received") == 0


def test_streams_for_parts_are_there_only_for_bulk(stack: contextlib.ExitStack, pair: Pair) -> None:
    for number in range(20):
        pair.one.send_message(2, numbered(number)[:1000])
    for number in range(20):
        assert bytes(pair.two.receive_message(DEADLINE_S) or b"") == numbered(number)[:1000]
    assert not [thread for thread in threading.enumerate() if "marble-link-1-2-parts" in thread.name]
    talk = Talk(stack, pair)
    talk.hear_until(both_used(pair), "bulk over both ways")
    assert len([thread for thread in threading.enumerate() if "marble-link-1-2-parts" in thread.name]) == 2
    # The peer is removed, and its threads end by themselves.
    talk.end()
    wait_until(
        lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("marble-link-1-")],
        "the end of the threads to a removed peer",
    )


def test_stop_under_bulk_ends_all_threads_in_time(stack: contextlib.ExitStack, pair: Pair) -> None:
    talk = Talk(stack, pair)
    talk.hear_until(both_used(pair), "bulk over both ways")
    assert pair.one.stop(5.0)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("marble-link-1-")] == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("marble-echo-1-")] == []


def test_receiver_that_stops_under_bulk_lets_go_of_it_in_time(stack: contextlib.ExitStack, pair: Pair) -> None:
    talk = Talk(stack, pair)
    talk.hear_until(both_used(pair), "bulk over both ways")
    # What waits for its parts then waits for ever, but for the stop.
    for relay in pair.relays:
        relay.set(there=SILENT)
    assert pair.two.stop(5.0)
