"""Two networks between two nodes, each with a rate of its own: what one group's entries, and one user's messages, make of them.

    pytest bench/test_ways.py --benchmark-enable --benchmark-group-by=group --benchmark-columns=median,rounds

The networks are relays in processes of their own, at rates far below what the machine can do. ``MiB/s`` beside the times is what arrived.
"""

from __future__ import annotations

import contextlib
import queue
import random
import sys
from collections.abc import Iterator
from typing import Any, Final

import pyarrow as pa
import pytest

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.raft.messages import Message, MessageKind
from marble.testing.relay import Line, RelayProcess
from marble.transport.codec import Envelope
from marble.transport.flight import FlightTransport
from marble.types import EntryKind

MIB: Final = 1 << 20
RATE: Final = 30.0 * MIB
"""Of a network, in bytes a second."""
UNDER_WAY: Final = 32
"""Entries of 1 MiB that are sent before the first has arrived: half of what a leader allows itself."""
COUNT: Final = 96
DEADLINE_S: Final = 60.0
NETWORKS: Final = {"one": (RATE,), "two": (RATE, RATE), "two-one-slow": (RATE, RATE / 10)}


class Ways:
    """Node 1 reaches node 2 over a network for each of `rates`."""

    def __init__(self, stack: contextlib.ExitStack, rates: tuple[float, ...]) -> None:
        self.arrived: queue.SimpleQueue[Envelope] = queue.SimpleQueue()
        self.two = FlightTransport("127.0.0.1:0", "c", 2)
        stack.callback(self.two.stop, 5.0)
        self.relays = [
            stack.enter_context(RelayProcess(self.two.endpoint, there=Line(bytes_per_s=rate))) for rate in rates
        ]
        self.one = FlightTransport("127.0.0.1:0", "c", 1)
        stack.callback(self.one.stop, 5.0)
        self.two.set_peers({1: self.one.endpoint})
        self.two.start(lambda envelopes: [self.arrived.put(envelope) for envelope in envelopes] and None)
        self.one.start(lambda envelopes: None)
        self.one.connect_to_peer(2, ",".join(relay.endpoint for relay in self.relays), timeout_s=DEADLINE_S)
        # Noise: nothing of it can be squeezed.
        self.payload = random.Random(1).randbytes(MIB)
        self._index = 0

    def replicate(self, count: int) -> None:
        """Entries of 1 MiB of one group, each as an append, in order."""
        sent = came = 0
        first = self._index
        while came < count:
            while sent < count and sent - came < UNDER_WAY:
                self._index += 1
                proposal = Proposal(EntryKind.WRITE, 1, pa.py_buffer(self.payload), 0, 0)
                batch = entry_batch.build(0, self._index, 1, [proposal])
                span = entry_batch.span(batch)
                message = Message(MessageKind.APPEND_ENTRIES, 1, 2, 1, log_index=self._index - 1, entries=span)
                assert self.one.send(2, [Envelope(0, message, batch)])
                sent += 1
            message = self.arrived.get(timeout=DEADLINE_S).message
            assert message.entries is not None
            came += len(message.entries)
            assert message.entries.end - 1 == first + came

    def talk(self, count: int) -> None:
        """Messages of a user of 1 MiB."""
        for _ in range(count):
            self.one.send_message(2, self.payload, timeout_s=DEADLINE_S)
        for _ in range(count):
            assert self.two.receive_message(DEADLINE_S) is not None


@pytest.fixture(scope="module", params=list(NETWORKS))
def ways(request: pytest.FixtureRequest) -> Iterator[Ways]:
    with contextlib.ExitStack() as stack:
        yield Ways(stack, NETWORKS[request.param])


@pytest.mark.parametrize("what", ["entries", "messages"])
def test_bulk(benchmark: Any, ways: Ways, what: str) -> None:
    count = COUNT if benchmark.enabled else 2
    benchmark.group = f"bulk: {count} {what} of 1 MiB"
    benchmark.pedantic(ways.replicate if what == "entries" else ways.talk, args=(count,), rounds=3, warmup_rounds=1)
    if benchmark.enabled:
        benchmark.extra_info["MiB/s"] = round(count / benchmark.stats.stats.median, 1)
        print(f"\n{benchmark.name}: {benchmark.extra_info}", file=sys.stderr)
