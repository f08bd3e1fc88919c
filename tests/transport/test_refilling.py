"""A leader's window over a slow line, after the way that it was under way on is lost: real cores and queues, time by hand.

The follower's answers and the heartbeats take the same short time and pass everything, as they do on streams of their own. So an
acknowledgement, or a commit index, arrives that says more, or less, than what the leader counts on at that moment.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable

import pytest
from hand_clock import HandClock

from marble._core.term_index import EntrySpan, TermIndex
from marble.config import RaftClusterConfig
from marble.metrics import Metrics
from marble.options import options_of
from marble.raft.config import MemoryStorage, RaftConfig
from marble.raft.core import Raft
from marble.raft.messages import Message, MessageKind
from marble.transport.codec import Codec, Envelope, Lane
from marble.transport.options import TransportOptions
from marble.transport.queueing import EnvelopeLoad
from marble.types import HardState, Members, Role

MIB = 1 << 20
LEADER, FOLLOWER, VOTER = 1, 2, 3
STEP_S = 0.01
TICK_STEPS, HEARTBEAT_TICKS = 10, 2
ROUND_TRIP_STEPS = 2
LINE_BYTES_PER_S = 8 * MIB
BUFFERS_BYTES = 3 * MIB
"""What sockets and gRPC take in before a write waits."""
UNDER_WAY = 32
"""Entries of 1 MiB that the client has proposed and were not committed."""


OPTIONS = options_of(RaftClusterConfig("c", ["127.0.0.1:1"]), 1, {}, priority=0, join=False)


def core(node: int) -> Raft:
    config = RaftConfig(
        id=node,
        election_ticks=10,
        heartbeat_ticks=HEARTBEAT_TICKS,
        random=random.Random(node),
        pre_vote=False,
        check_quorum=False,
        append_bytes_max=OPTIONS.append_bytes_max,
        inflight_bytes_max=OPTIONS.inflight_bytes_max,
        uncommitted_bytes_max=512 * MIB,
    )
    return Raft(config, MemoryStorage(TermIndex(), HardState(), applied_index=0, members=Members((1, 2, 3))))


class Scene:
    """Node 1 leads by the vote of node 3, which is away since: what node 2 has is what is committed."""

    def __init__(self, seed: int, under_way: int = UNDER_WAY, another: bool = True, entry_bytes: int = MIB) -> None:
        self.under_way, self.entry_bytes = under_way, entry_bytes
        self.another = another
        """Whether there is another way at once, and the core knows."""
        self.random = random.Random(seed)
        self.clock = HandClock()
        self.metrics = Metrics()
        self.leader, self.follower = core(LEADER), core(FOLLOWER)
        self.now = 0
        self.later: deque[tuple[int, Message]] = deque()
        """Control, and when it arrives."""
        self.straggling: deque[tuple[int, Message]] = deque()
        """What had come over the way that is lost, and when the follower gets to it."""
        self.silent = False
        """Whether the line carries nothing, and nobody knows."""
        self.carried_bytes = 0
        self.open()
        self.leader.campaign()
        self.run_cores()
        self.leader.step(Message(MessageKind.REQUEST_VOTE_RESPONSE, VOTER, LEADER, self.leader.term))
        assert self.leader.role is Role.LEADER

    def open(self) -> None:
        """A way with nothing on it."""
        options = TransportOptions(silent_quick_s=1.0)
        self.load = EnvelopeLoad(FOLLOWER, Lane.LOG, Codec("c", LEADER, 64 * MIB), options, self.clock, self.metrics)
        self.line: deque[Envelope] = deque()
        self.credit = 0.0
        self.writing = self.silent = False

    def lose_way(self) -> None:
        """Of what was written the follower may have had some more, the rest is lost; the core is told. Something of before may still be
        said on the new way: an append that builds on what is lost.
        """
        at = self.now
        for _ in range(self.random.randrange(len(self.line) + 1)):
            at += self.random.randrange(15)
            self.straggling.append((at, self.line.popleft().message))
        self.open()
        if self.random.randrange(2):
            last, term = self.leader.last_index, self.leader.term
            stale = Message(
                MessageKind.APPEND_ENTRIES, LEADER, FOLLOWER, term, last, term, entries=EntrySpan.of(last + 1, [])
            )
            self.load.put([Envelope(0, stale)])
            self.carry()
        (self.leader.report_way_lost if self.another else self.leader.report_unreachable)(FOLLOWER)

    def run_cores(self) -> None:
        """Both drivers, on disks that are fast. What the leader sends in one turn it sends at once."""
        for raft in (self.leader, self.follower):
            sent: list[Message] = []
            while raft.has_ready():
                ready = raft.ready()
                sent += ready.messages
                if ready.number:
                    raft.persisted(ready.number)
                sent += ready.messages_after_persist
                if ready.committed is not None:
                    raft.applied(ready.committed.end - 1)
            self.send(message for message in sent if message.to != VOTER)

    def send(self, messages: Iterable[Message]) -> None:
        appends = []
        for message in messages:
            if message.kind is MessageKind.APPEND_ENTRIES:
                appends.append(Envelope(0, message))
            else:
                self.later.append((self.now + ROUND_TRIP_STEPS // 2, message))
        if appends and not self.load.put(appends):
            self.leader.report_unreachable(FOLLOWER)

    def step(self) -> None:
        self.now += 1
        self.clock.now += STEP_S
        while self.leader.last_index - self.leader.commit_index < self.under_way:
            self.leader.propose([self.entry_bytes])
        if self.now % TICK_STEPS == 0:
            self.leader.tick()
        self.run_cores()
        while self.later and self.later[0][0] <= self.now:
            message = self.later.popleft()[1]
            (self.leader if message.to == LEADER else self.follower).step(message)
            self.run_cores()
        while self.straggling and self.straggling[0][0] <= self.now:
            self.follower.step(self.straggling.popleft()[1])
            self.run_cores()
        self.carry()

    def carry(self) -> None:
        if self.silent:
            return
        self.credit += LINE_BYTES_PER_S * STEP_S
        while True:
            self.write()
            if not self.line:
                self.credit = 0.0
            if not self.line or self.line[0].nbytes > self.credit:
                return
            arrived = self.line.popleft()
            self.credit -= arrived.nbytes
            self.carried_bytes += arrived.nbytes
            self.follower.step(arrived.message)
            self.run_cores()

    def write(self) -> None:
        """Take what there is room for. What is being written counts as queued until the buffers have all of it."""
        while True:
            if self.writing and sum(each.nbytes for each in self.line) <= BUFFERS_BYTES:
                self.load.written(0.0)
                self.writing = False
            if self.writing or self.load.empty:
                return
            if self.load.take(0.0):
                self.line.extend(self.load._unsent)
                self.writing = True

    def committed(self) -> int:
        return self.leader.commit_index

    def run(self, seconds: float) -> float:
        """The longest time in which nothing was committed, in seconds."""
        longest = since = 0
        before = self.committed()
        for _ in range(round(seconds / STEP_S)):
            self.step()
            since = 0 if self.committed() > before else since + 1
            before, longest = self.committed(), max(longest, since)
        return longest * STEP_S


@pytest.mark.parametrize("another", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_of_a_line_that_is_left_what_arrives_is_new(seed: int, another: bool) -> None:
    scene = Scene(seed, another=another)
    scene.run(5.0 + 0.07 * seed)
    scene.lose_way()
    before, carried = scene.committed(), scene.carried_bytes
    gap_s = scene.run(8.0)
    news = (scene.committed() - before) * MIB
    # Its answer, and a first question of 4 MiB, which one that was refused stands before at most; a heartbeat if nobody knows better.
    assert gap_s <= (0.0 if another else 0.2) + 0.02 + 2 * 4 * MIB / LINE_BYTES_PER_S, gap_s
    assert news >= 0.85 * (scene.carried_bytes - carried)
    assert scene.leader.term == 1


@pytest.mark.parametrize("seed", range(4))
def test_ways_that_are_lost_again_and_again_do_not_add_up(seed: int) -> None:
    scene = Scene(seed)
    scene.run(5.0)
    for _ in range(5):
        scene.lose_way()
        scene.run(0.9 + scene.random.random())
    before, carried = scene.committed(), scene.carried_bytes
    assert scene.run(4.0) <= 0.2 + 0.02 + 2 * 4 * MIB / LINE_BYTES_PER_S
    assert (scene.committed() - before) * MIB >= 0.9 * (scene.carried_bytes - carried)


@pytest.mark.parametrize("seed", range(4))
def test_a_follower_that_lags_by_more_than_a_window(seed: int) -> None:
    """All of the window waits in the queue, beside what is being written."""
    scene = Scene(seed, under_way=150)
    scene.run(2.0 + seed)
    scene.lose_way()
    before, carried = scene.committed(), scene.carried_bytes
    assert scene.run(8.0) <= 0.2 + 0.02 + 2 * 4 * MIB / LINE_BYTES_PER_S
    assert (scene.committed() - before) * MIB >= 0.9 * (scene.carried_bytes - carried)
    assert scene.metrics.total("transport_messages_dropped") <= 1


@pytest.mark.parametrize("seed", range(6))
def test_small_writes_go_on_after_a_round_trip(seed: int) -> None:
    """Whenever in the interval of heartbeats the way is left: the core asks at once, on the other one."""
    scene = Scene(seed, under_way=1, entry_bytes=100)
    scene.run(2.0 + 0.03 * seed)
    scene.silent = True
    scene.run(0.15)
    scene.lose_way()
    assert scene.run(2.0) <= 2 * (ROUND_TRIP_STEPS + 2) * STEP_S
    assert scene.leader.term == 1
