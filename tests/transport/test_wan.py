"""A line of 100 ms and a few MB/s: what the windows let through is at least 80 % of it, for all that nodes send in bulk.

Its rate is low, so that it, and not a busy machine, is what bounds; still, an attempt
that the machine has spoilt is repeated. A window that held one piece, one message or 64 KiB would fail each of them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pyarrow as pa
import pytest
from transport.wan_support import FarCluster, wait_until

from marble._core.entry_batch import Proposal
from marble.lsm import payload
from marble.testing.relay import Line, Relay
from marble.transport.flight import FlightTransport
from marble.transport.options import TransportOptions
from marble.types import EntryKind

RATE = 12e6
LINE = Line(delay_s=0.05, bytes_per_s=RATE)
SHARE = 0.8
ATTEMPTS = 4


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


class Meter:
    """When how many bytes had arrived: from those between the first and the last tenth comes a rate."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def add(self, total: int) -> None:
        self.seen.append((time.monotonic(), total))

    @property
    def bytes_per_s(self) -> float:
        whole = self.seen[-1][1]
        middle = [(at, total) for at, total in self.seen if whole / 10 <= total <= whole * 9 / 10]
        (first_at, first), (last_at, last) = middle[0], middle[-1]
        return (last - first) / (last_at - first_at)


def reach(attempt: Callable[[], Meter]) -> None:
    """Some attempt brings `SHARE` of the line's rate."""
    rates = []
    for _ in range(ATTEMPTS):
        rates.append(attempt().bytes_per_s)
        if rates[-1] >= SHARE * RATE:
            return
    raise AssertionError(f"bytes per second were {rates}, of {RATE}")


def test_messages_of_users_fill_a_long_line(stack: contextlib.ExitStack) -> None:
    two = FlightTransport("127.0.0.1:0", "c", 2)
    stack.callback(two.stop, 5.0)
    relay = stack.enter_context(Relay(two.endpoint, there=LINE, back=LINE))
    one = FlightTransport("127.0.0.1:0", "c", 1)
    stack.callback(one.stop, 5.0)
    two.set_peers({1: one.endpoint})
    two.start()
    one.set_peers({2: relay.endpoint})
    one.start()
    wait_until(lambda: one.connected(2), "the link")
    # Random, so that nothing compresses it.
    message = Random(1).randbytes(64 << 10)
    count = int(2 * RATE) // len(message)

    def attempt() -> Meter:
        meter = Meter()
        sender = threading.Thread(target=lambda: [one.send_message(2, message, timeout_s=30.0) for _ in range(count)])
        sender.start()
        for number in range(1, count + 1):
            assert two.receive_message(30.0) is not None
            meter.add(number * len(message))
        sender.join(30.0)
        return meter

    reach(attempt)
    taken_s = one._peers.links[2].round_trip_s
    assert taken_s is not None
    assert taken_s > 0.1


def test_replication_fills_a_long_line(stack: contextlib.ExitStack, tmp_path: Path) -> None:
    cluster = FarCluster(stack, tmp_path, LINE)
    data = Random(1).randbytes(256 << 10)
    count = int(2 * RATE) // len(data)

    def attempt() -> Meter:
        node = cluster.servers[wait_until(lambda: cluster.leader, "a leader")]._node
        assert node is not None
        meter, open_ = Meter(), deque()
        for number in range(count):
            open_.append(node.propose(Proposal(EntryKind.COMMAND, 0, payload.encode_command(data))))
            if len(open_) > 64:
                open_.popleft().result(30.0)
                meter.add((number - 63) * len(data))
        while open_:
            open_.popleft().result(30.0)
            meter.add((count - len(open_)) * len(data))
        return meter

    reach(attempt)


SCHEMA = pa.schema([pa.field("k", pa.int64(), nullable=False), pa.field("v", pa.binary())])


def test_snapshot_fills_a_long_line(stack: contextlib.ExitStack, tmp_path: Path) -> None:
    cluster = FarCluster(stack, tmp_path, Line(), snapshot_distance=10)
    leader = wait_until(lambda: cluster.leader, "a leader")
    away = 3 if leader != 3 else 2
    server = cluster.servers[leader]
    table = server.database.create_table("t", SCHEMA, key=["k"])
    random = Random(1)
    relay = cluster.relays[away][0]

    def attempt() -> Meter:
        cluster.servers.pop(away).stop()
        for part in range(24):
            rows = {"k": list(range(part * 100, part * 100 + 100)), "v": [random.randbytes(10_000) for _ in range(100)]}
            table.write(pa.record_batch(rows, schema=SCHEMA))
        server.take_snapshot()
        for relays in cluster.relays.values():
            relays[0].set(there=LINE, back=LINE)
        meter = Meter()
        before = relay.counts()["passed_there"]
        behind = cluster.start(away)

        def there() -> bool:
            meter.add(relay.counts()["passed_there"] - before)
            return behind._machine.applied_index >= server._machine.applied_index

        wait_until(there, "the snapshot")
        for relays in cluster.relays.values():
            relays[0].set(there=Line(), back=Line())
        assert meter.seen[-1][1] > 20e6
        return meter

    reach(attempt)


def test_a_round_trip_that_elections_do_not_fit_is_logged_once(
    stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    options = TransportOptions(idle_check_s=0.02, round_trip_max_s=0.02)
    # The way back is short, but a busy machine may make it long, too, which is not to be told here.
    two = FlightTransport("127.0.0.1:0", "c", 2)
    stack.callback(two.stop, 5.0)
    relay = stack.enter_context(Relay(two.endpoint, there=Line(delay_s=0.03)))
    one = FlightTransport("127.0.0.1:0", "c", 1, options=options)
    stack.callback(one.stop, 5.0)
    two.set_peers({1: one.endpoint})
    two.start()
    one.set_peers({2: relay.endpoint})
    one.start()

    def advice() -> list[str]:
        return [record.getMessage() for record in caplog.records if "election_timeout_ms" in record.getMessage()]

    wait_until(advice, "a warning")
    histogram = one.metrics.histogram("transport_round_trip_seconds", peer=2)
    seen = histogram.spread().total
    wait_until(lambda: histogram.spread().total > seen + 20, "more round trips")
    assert len(advice()) == 1
    assert "node 2" in advice()[0]
