"""Between two transports lies a line that takes a few MiB a second: what is urgent passes, and what shrinks is made to shrink."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator

import pyarrow as pa
import pytest

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.raft.messages import Message, MessageKind
from marble.testing.relay import Line, Relay
from marble.transport.codec import Envelope
from marble.transport.flight import FlightTransport
from marble.transport.options import TransportOptions
from marble.types import EntryKind
from tests.reference.noise import noise

DEADLINE_S = 30.0
MIB = 1 << 20


class Pair:
    """Node 1 sends to node 2 over a slow line."""

    def __init__(self, stack: contextlib.ExitStack, bytes_per_s: float, options: TransportOptions) -> None:
        self.inbox: queue.SimpleQueue[Envelope] = queue.SimpleQueue()
        self.one, self.two = (FlightTransport("127.0.0.1:0", "c", node, options=options) for node in (1, 2))
        relay = stack.enter_context(Relay(self.two.endpoint, there=Line(bytes_per_s=bytes_per_s)))
        for transport in (self.one, self.two):
            stack.callback(transport.stop, 5.0)
        self.two.start(lambda envelopes: [self.inbox.put(each) for each in envelopes] and None)
        self.one.start(lambda envelopes: None)
        self.one.connect_to_peer(2, relay.endpoint, timeout_s=DEADLINE_S)

    def take(self) -> Message:
        return self.inbox.get(timeout=DEADLINE_S).message


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


def append(before: int, payload: bytes) -> Envelope:
    batch = entry_batch.build(0, before + 1, 1, [Proposal(EntryKind.WRITE, 1, pa.py_buffer(payload))])
    span = entry_batch.span(batch)
    return Envelope(0, Message(MessageKind.APPEND_ENTRIES, 1, 2, 1, before, min(before, 1), entries=span), batch)


def beat(number: int) -> Envelope:
    return Envelope(0, Message(MessageKind.HEARTBEAT, 1, 2, 1, commit=number))


def test_heartbeats_pass_a_large_batch_on_a_slow_line(stack: contextlib.ExitStack) -> None:
    pair = Pair(stack, 8 * MIB, TransportOptions(compression="off"))
    # The lane is open, so that only the batch itself is ahead.
    assert pair.one.send(2, [append(0, bytes(64))])
    assert pair.take().kind is MessageKind.APPEND_ENTRIES
    assert pair.one.send(2, [append(1, noise(8 * MIB))])
    for number in range(20):
        assert pair.one.send(2, [beat(number)])
        # The batch takes a second; each of these is there before it.
        message = pair.take()
        assert (message.kind, message.commit) == (MessageKind.HEARTBEAT, number)
    assert pair.take().log_index == 1


def test_what_shrinks_is_compressed_on_a_slow_line_without_being_told(stack: contextlib.ExitStack) -> None:
    pair = Pair(stack, 8 * MIB, TransportOptions())
    counter = pair.one.get_metrics_collector().get_counter
    assert pair.one.send(2, [append(0, noise(4 * MIB))])
    assert pair.take().log_index == 0
    assert counter("bytes_before_compression") == 0
    payload = (b"the same again and again " * MIB)[:MIB]
    deadline = time.monotonic() + DEADLINE_S
    before = 1
    while not counter("bytes_before_compression"):
        assert time.monotonic() < deadline, "it was never tried"
        assert pair.one.send(2, [append(before, payload)])
        assert pair.take().log_index == before
        before += 1
    assert counter("bytes_after_compression") < counter("bytes_before_compression") / 10
