"""A leader and one follower on a network that loses, doubles and reorders: flow control as a whole (Raft §5.3, §7).

Any two logs that Raft can make to begin with; the leader's may be purged, so that only a snapshot helps. After each step
what the leader believes of the follower is true; and once the network is well, the logs are soon the same.
"""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from marble._core.term_index import EntrySpan, TermIndex
from marble.errors import UnavailableError
from marble.raft.config import MemoryStorage, RaftConfig
from marble.raft.core import Raft
from marble.raft.messages import Message, MessageKind
from marble.raft.progress import ProgressState
from marble.types import HardState, Members, Role, SnapshotMeta

LEADER, FOLLOWER, VOTER = 1, 2, 3
MEMBERS = Members((LEADER, FOLLOWER, VOTER))
APPEND_BYTES = 20
WINDOW, WINDOW_BYTES = 3, 50
TERM = 20
"""The term before the leader's: no log has a later one."""

HEARTBEATS_TO_HEAL = 40
SILENCE = 3
"""After so many heartbeats without news the leader's driver gives up on a snapshot under way."""


def core(node: int, terms: list[int], size: int, purged: int, commit: int) -> Raft:
    index = TermIndex()
    index.append(EntrySpan.of(1, terms, [size] * len(terms)))
    snapshot = SnapshotMeta(purged, index.term_at(purged), MEMBERS) if purged else None
    index.purge(purged + 1)
    config = RaftConfig(
        id=node,
        election_ticks=10,
        heartbeat_ticks=1,
        random=random.Random(node),
        pre_vote=False,
        check_quorum=False,
        append_bytes_max=APPEND_BYTES,
        inflight_messages_max=WINDOW,
        inflight_bytes_max=WINDOW_BYTES,
    )
    storage = MemoryStorage(index, HardState(TERM, 0, commit), applied_index=purged, members=MEMBERS, snapshot=snapshot)
    return Raft(config, storage)


class FlowModel(RuleBasedStateMachine):
    """Node 1 leads by the vote of node 3, which has a perfect line to it; node 2 follows on the bad network."""

    leader: Raft
    follower: Raft

    def __init__(self) -> None:
        super().__init__()
        self.wire: list[Message] = []
        # What was committed before anybody said anything.
        self.begin = 0
        # What node 3 has.
        self.third = 0

    @initialize(
        common=st.integers(0, 5),
        ours=st.lists(st.integers(2, 9), max_size=8),
        theirs=st.lists(st.integers(10, 19), max_size=8),
        swap=st.booleans(),
        size=st.sampled_from((0, 7, 25)),
        purged=st.integers(0, 5),
        length=st.integers(0, 20),
        commit=st.integers(0, 5),
    )
    def start(
        self,
        common: int,
        ours: list[int],
        theirs: list[int],
        swap: bool,
        size: int,
        purged: int,
        length: int,
        commit: int,
    ) -> None:
        tails = (theirs, ours) if swap else (ours, theirs)
        first, second = ([1] * common + sorted(tail) for tail in tails)
        # The follower may have less than what is purged, or know of more that is committed than the leader does.
        purged, second = min(purged, common), second[:length]
        commit = min(commit, common, length)
        self.begin = max(purged, commit)
        self.leader = core(LEADER, first, size, purged, purged)
        self.follower = core(FOLLOWER, second, size, 0, commit)
        self.leader.campaign()
        self.run()
        self.leader.step(Message(MessageKind.REQUEST_VOTE_RESPONSE, VOTER, LEADER, self.leader.term))
        assert self.leader.role is Role.LEADER
        self.wire.clear()
        self.run()

    def run(self) -> None:
        """Both drivers, on disks that are fast."""
        for raft in (self.leader, self.follower):
            while raft.has_ready():
                ready = raft.ready()
                self.send(ready.messages)
                if ready.number:
                    raft.persisted(ready.number)
                self.send(ready.messages_after_persist)
                if ready.snapshot is not None:
                    raft.applied(ready.snapshot.index)
                if ready.committed is not None:
                    raft.applied(ready.committed.end - 1)

    def send(self, messages: tuple[Message, ...]) -> None:
        for message in messages:
            if message.entries is not None and message.to == FOLLOWER:
                assert len(message.entries) <= 1 or message.entries.bytes <= APPEND_BYTES
            self.wire += [message] if message.to != VOTER else []

    def deliver(self, message: Message) -> None:
        (self.leader if message.to == LEADER else self.follower).step(message)
        self.run()

    # -- what may happen ---------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 4), size=st.sampled_from((0, 7, 25)))
    def propose(self, count: int, size: int) -> None:
        try:
            self.leader.propose([size] * count)
        except UnavailableError:
            return
        self.run()

    @precondition(lambda self: self.wire)
    @rule(place=st.integers(0, 50), then=st.sampled_from(("once", "once", "once", "again", "never")))
    def one_message(self, place: int, then: str) -> None:
        """Any of those under way arrives, perhaps not for the last time, or is lost."""
        place %= len(self.wire)
        message = self.wire[place]
        if then != "again":
            del self.wire[place]
        if then != "never":
            self.deliver(message)

    @rule()
    def all_messages(self) -> None:
        """Some good fortune: all that is under way arrives in order."""
        messages, self.wire = self.wire, []
        for message in messages:
            self.deliver(message)

    @rule()
    def tick(self) -> None:
        self.leader.tick()
        self.run()

    @rule()
    def unreachable(self) -> None:
        self.leader.report_unreachable(FOLLOWER)
        self.run()

    @rule()
    def way_is_lost(self) -> None:
        self.leader.report_way_lost(FOLLOWER)
        self.run()

    @precondition(lambda self: self.wire)
    @rule()
    def snapshot_is_refused(self) -> None:
        """The follower cannot take it: a full disk, say."""
        for message in [m for m in self.wire if m.kind is MessageKind.INSTALL_SNAPSHOT]:
            self.wire.remove(message)
            kind = MessageKind.INSTALL_SNAPSHOT_RESPONSE
            self.deliver(Message(kind, FOLLOWER, LEADER, message.term, message.log_index, reject=True))

    @rule(ok=st.booleans())
    def snapshot_is_reported(self, ok: bool) -> None:
        self.leader.report_snapshot(FOLLOWER, ok)
        self.run()

    @rule(keep=st.integers(0, 3))
    def purge(self, keep: int) -> None:
        """Node 3 has everything, so the leader may take a snapshot and purge its log, wherever the follower is."""
        self.third = self.leader.last_index
        kind = MessageKind.APPEND_ENTRIES_RESPONSE
        self.leader.step(Message(kind, VOTER, LEADER, self.leader.term, self.third))
        self.run()
        index = self.leader.applied_index
        self.leader.snapshot_taken(SnapshotMeta(index, self.leader.log.term_at(index), MEMBERS))
        if index - keep >= self.leader.log.first_index:
            self.leader.purge(index - keep)
        self.run()

    # -- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def what_the_leader_believes_is_true(self) -> None:
        """Leader completeness rests on it: an entry counts for the follower only if it is durable there (Raft §5.4)."""
        if not hasattr(self, "leader"):
            return
        progress, theirs = self.leader.progress[FOLLOWER], self.follower.log
        assert progress.match_index <= theirs.persisted_index
        known = max(progress.match_index, self.follower.commit_index)
        for index in range(max(self.leader.log.first_index, theirs.first_index), known + 1):
            assert theirs.term_at(index) == self.leader.log.term_at(index)
        assert self.leader.commit_index <= max(progress.match_index, self.third, self.begin)
        assert self.follower.commit_index <= max(self.leader.commit_index, self.begin)

    @invariant()
    def no_more_is_under_way_than_the_window_holds(self) -> None:
        if not hasattr(self, "leader"):
            return
        progress = self.leader.progress[FOLLOWER]
        assert progress.match_index < progress.next_index <= self.leader.last_index + 1
        assert progress.inflights.count <= WINDOW
        # By one message at most, and that only if what was under way before it left room.
        assert progress.inflights.bytes < WINDOW_BYTES + max(APPEND_BYTES, 25)
        if progress.state is ProgressState.SNAPSHOT:
            # Where the log was purged beyond the snapshot meanwhile, that it arrived does not end its state.
            assert max(progress.pending_snapshot, self.leader.log.first_index - 2) >= progress.match_index
            assert progress.pending_snapshot > 0
        else:
            assert progress.pending_snapshot == 0

    def teardown(self) -> None:
        """All is well from now on, but what was under way is lost: the follower has everything within a bound."""
        if not hasattr(self, "leader"):
            return
        self.wire.clear()
        waited = 0
        for _ in range(HEARTBEATS_TO_HEAL):
            progress = self.leader.progress[FOLLOWER]
            waited = waited + 1 if progress.state is ProgressState.SNAPSHOT else 0
            if waited > SILENCE:
                self.leader.report_snapshot(FOLLOWER, ok=False)
            self.leader.tick()
            self.run()
            while self.wire:
                self.deliver(self.wire.pop(0))
                self.what_the_leader_believes_is_true()
                self.no_more_is_under_way_than_the_window_holds()
            last = self.leader.last_index
            if self.follower.commit_index == self.leader.commit_index == last == progress.match_index:
                break
        assert self.leader.role is Role.LEADER
        progress = self.leader.progress[FOLLOWER]
        assert progress.match_index == self.leader.last_index == self.follower.last_index
        assert progress.state is ProgressState.REPLICATE
        assert self.follower.commit_index == self.leader.commit_index == self.leader.last_index
        first = max(self.leader.log.first_index, self.follower.log.first_index)
        ends = [raft.log.span(first, raft.last_index + 1).terms() for raft in (self.leader, self.follower)]
        assert ends[0] == ends[1]


FlowModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestFlowModel = FlowModel.TestCase
