"""Who a node is and with which directory: told and checked at both ends of a stream, whoever starts first."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

import pyarrow.flight as fl
import pytest

from marble.errors import InvariantError, ProtocolError
from marble.raft.messages import Message, MessageKind
from marble.transport.codec import Codec, Envelope
from marble.transport.flight import FlightTransport
from marble.transport.options import TransportOptions

QUICK = TransportOptions(backoff_min_s=0.01, backoff_max_s=0.02, idle_check_s=0.05)
DEADLINE_S = 30.0


class Memory:
    """Acquaintances that are kept in memory, and what they refused."""

    def __init__(self, incarnation: int, met: dict[int, int] | None = None) -> None:
        self.incarnation = incarnation
        self.met = {} if met is None else met
        self.refused: queue.SimpleQueue[int] = queue.SimpleQueue()

    def meet(self, node: int, incarnation: int) -> None:
        if self.met.setdefault(node, incarnation) != incarnation:
            self.refused.put(incarnation)
            raise ProtocolError(f"node {node} was replaced")


class Node:
    """A transport, and what it receives."""

    def __init__(self, number: int, acquaintances: Memory, endpoint: str = "127.0.0.1:0") -> None:
        self.number = number
        self.acquaintances = acquaintances
        self.transport = FlightTransport(endpoint, "c", number, options=QUICK)
        self.inbox: queue.SimpleQueue[list[Envelope]] = queue.SimpleQueue()
        self.broken: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.failed: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def start(self, *peers: Node) -> None:
        self.transport.set_peers({peer.number: peer.transport.endpoint for peer in peers})
        self.transport.start(
            self.inbox.put, unreachable=self.broken.put, failed=self.failed.put, acquaintances=self.acquaintances
        )

    def beat(self, to: Node) -> None:
        """Send heartbeats until one is taken by a link that stands."""
        message = Message(MessageKind.HEARTBEAT, self.number, to.number, 1)
        pause = threading.Event()
        while not (self.transport.connected(to.number) and self.transport.send(to.number, [Envelope(0, message)])):
            pause.wait(0.002)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


def node(stack: contextlib.ExitStack, number: int, acquaintances: Memory, endpoint: str = "127.0.0.1:0") -> Node:
    made = Node(number, acquaintances, endpoint)
    stack.callback(made.transport.stop, 5.0)
    return made


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_both_ends_know_each_other_whoever_starts_first(stack: contextlib.ExitStack, order: tuple[int, int]) -> None:
    nodes = [node(stack, 1, Memory(11)), node(stack, 2, Memory(22))]
    first, second = (nodes[at] for at in order)
    first.start(second)
    # It finds nobody who takes messages, and comes again.
    assert first.broken.get(timeout=DEADLINE_S) == second.number
    second.start(first)
    for one, other in (nodes, reversed(nodes)):
        one.beat(other)
        assert other.inbox.get(timeout=DEADLINE_S)[0].message.sender == one.number
    assert [each.acquaintances.met for each in nodes] == [{2: 22}, {1: 11}]


def test_the_one_that_calls_alone_knows_whom_it_has_called(stack: contextlib.ExitStack) -> None:
    """Followers say nothing to each other: their links must be enough to know each other when the leader is gone."""
    one, two = node(stack, 1, Memory(11)), node(stack, 2, Memory(22))
    two.start()
    one.start(two)
    one.beat(two)
    assert one.acquaintances.met == {2: 22}


def test_a_replaced_directory_is_refused_at_both_ends(
    stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = node(stack, 1, Memory(11, {2: 22})), node(stack, 2, Memory(33))
    one.start(two)
    two.start(one)
    message = Message(MessageKind.HEARTBEAT, 2, 1, 1)
    two.transport.send(1, [Envelope(0, message)])
    one.transport.send(2, [Envelope(0, Message(MessageKind.HEARTBEAT, 1, 2, 1))])
    # Many times, as each comes again and again.
    for each in (one, two):
        for _ in range(4):
            assert each.broken.get(timeout=DEADLINE_S) in (1, 2)
    assert [one.acquaintances.refused.get(timeout=DEADLINE_S) for _ in range(4)] == [33] * 4
    assert one.inbox.empty()
    assert two.inbox.empty()
    assert not one.transport.connected(2)
    assert not two.transport.connected(1)
    # It is not known by who was refused itself.
    assert one.acquaintances.met == {2: 22}
    told = [record.getMessage() for record in caplog.records if record.name == "marble.transport"]
    assert sum("node 2 lost node 1" in text and "node 2 was replaced" in text for text in told) == 1
    assert sum("node 1 lost node 2" in text and "node 2 was replaced" in text for text in told) == 1


@pytest.mark.parametrize("failing", ["caller", "called"])
def test_a_disk_that_cannot_keep_whom_it_meets_stops_the_node(stack: contextlib.ExitStack, failing: str) -> None:
    caller, called = node(stack, 1, Memory(11)), node(stack, 2, Memory(22))

    def fail(number: int, incarnation: int) -> None:
        raise InvariantError("the disk is gone")

    broken, well = (caller, called) if failing == "caller" else (called, caller)
    broken.acquaintances.meet = fail  # type: ignore[method-assign]
    called.start()
    caller.start(called)
    assert "the disk is gone" in str(broken.failed.get(timeout=DEADLINE_S))
    assert called.inbox.empty()
    assert well.failed.empty()


ANSWERS = {
    "ends the stream without a hello": [],
    "does not open with a hello": [b"garbage"],
    "node 3 answers at the endpoint of node 2": [Codec("c", 3, 1).hello(1, "", 7)],
    "this is node 1, not 5": [Codec("c", 2, 1).hello(5, "", 7)],
}


@pytest.mark.parametrize("words", ANSWERS)
def test_an_answer_that_is_no_hello_of_that_peer_breaks_the_stream(
    stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture, words: str
) -> None:
    class Impostor(fl.FlightServerBase):  # type: ignore[misc]
        def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
            assert next(reader).app_metadata is not None
            for answer in ANSWERS[words]:
                writer.write_metadata(answer)

    impostor = stack.enter_context(Impostor("grpc://127.0.0.1:0"))
    one = node(stack, 1, Memory(11))
    one.transport.set_peers({2: f"127.0.0.1:{impostor.port}"})
    one.transport.start(one.inbox.put, unreachable=one.broken.put, failed=one.failed.put)
    for _ in range(3):
        assert one.broken.get(timeout=DEADLINE_S) == 2
    assert not one.transport.connected(2)
    assert one.failed.empty()
    # It does not pass by itself, so somebody is to hear of it, once.
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert words in warnings[0]


def test_a_link_stops_while_its_peer_owes_the_answer(stack: contextlib.ExitStack) -> None:
    called, release = threading.Event(), threading.Event()

    class Silent(fl.FlightServerBase):  # type: ignore[misc]
        def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
            next(reader)
            called.set()
            release.wait(DEADLINE_S)

    silent = stack.enter_context(Silent("grpc://127.0.0.1:0"))
    one = node(stack, 1, Memory(11))
    one.transport.set_peers({2: f"127.0.0.1:{silent.port}"})
    one.transport.start(one.inbox.put)
    assert called.wait(DEADLINE_S)
    assert not one.transport.connected(2)
    assert one.transport.stop(DEADLINE_S)
    release.set()
