"""The state of a node: role, term, vote, leader, and the timers and tallies that live and die with a role.

Rule 1: ``role``, ``term``, ``vote`` and ``leader`` are written in this file only, by the ``become_*`` methods, `grant`
and `follow`. Rule 2: every message leaves through `send`, which decides what it must wait for.

This file knows what a role is made of; what a role does is in `follower`, `candidate` and `leader`.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from marble._core.term_index import EntrySpan
from marble.errors import CorruptionError, check
from marble.raft.config import RaftConfig, Storage, check_hard_state
from marble.raft.log import RaftLog
from marble.raft.membership import Membership
from marble.raft.messages import MembershipProposed, Message, MessageKind
from marble.raft.outbox import Outbox
from marble.raft.progress import Inflights, Progress
from marble.raft.reads import Reads
from marble.types import NO_NODE, HardState, Members, Role, SnapshotMeta

_ASSERTS_LOG_OR_VOTE: Final = frozenset(
    {
        # A vote, and an acknowledgement, must survive a crash of who gave it (Raft figure 2, thesis §3.8).
        MessageKind.REQUEST_VOTE_RESPONSE,
        MessageKind.REQUEST_PRE_VOTE_RESPONSE,
        MessageKind.APPEND_ENTRIES_RESPONSE,
        # A refused snapshot says that the log here is as short as it was.
        MessageKind.INSTALL_SNAPSHOT_RESPONSE,
        # A candidate asserts its last entry, and that it campaigns once in this term. Were the request to leave before
        # both are durable, a crash could bring the candidate back in the same term with a shorter log, and a late vote
        # would elect it (docs/raft.md).
        MessageKind.REQUEST_VOTE,
    }
)


class State:
    """All that a node knows.

    - ``term`` never falls; ``vote`` changes at most once in a term, from ``NO_NODE``.
    - ``leader`` is ``id`` exactly when ``role`` is LEADER, and ``NO_NODE`` for both kinds of candidate.
    - A LEADER's term and its vote for itself are durable.
    - ``progress`` has all members when ``role`` is LEADER and is empty otherwise.
    """

    def __init__(self, config: RaftConfig, storage: Storage) -> None:
        hard_state = storage.hard_state
        check_hard_state(hard_state)
        self.config: Final = config
        self.id: Final = config.id
        self.membership = Membership(storage.members)
        self.log: Final = RaftLog(storage.term_index, hard_state.commit, storage.applied_index, storage.changes)
        # The newest snapshot that is durable here: what a peer gets that lacks entries which are gone.
        self.snapshot = storage.snapshot
        if self.log.first_index > 1 and (self.snapshot is None or self.snapshot.index + 1 < self.log.first_index):
            raise CorruptionError(
                f"the log starts at {self.log.first_index}, and no snapshot leads up to it: restore this node from its peers"
            )
        if self.log.last_term > hard_state.term:
            raise CorruptionError(
                f"the log ends in term {self.log.last_term}, after the stored term {hard_state.term}: "
                "term and vote were lost, and with them the promise not to vote twice; restore this node from its peers"
            )
        self.role = Role.FOLLOWER
        self.term = hard_state.term
        self.vote = hard_state.vote
        self.leader = NO_NODE
        # Ticks since this follower heard its leader, or since this leader last checked its quorum.
        self.election_elapsed = 0
        # Ticks since this leader last sent heartbeats.
        self.heartbeat_elapsed = 0
        # How many of them this node waits before it campaigns: election_ticks <= this < election_ticks + the random part's
        # width, drawn anew with every role.
        self.randomized_election_timeout = 0
        # Answers to the (pre-)vote under way. Only the first answer of a node counts.
        self.votes: dict[int, bool] = {}
        self.progress: dict[int, Progress] = {}
        # Where in the log the no-op of this leadership stands; 0 unless leading.
        self.noop_index = 0
        # No further change of the membership before this is applied: the last one, or this leader's own no-op (a change
        # before it may take effect beside another leader's, as Ongaro found in 2015).
        self.pending_change_index = 0
        # Entries that change the membership, which the driver has to make.
        self.proposed: list[MembershipProposed] = []
        # Whom the leadership is being handed to; nothing is proposed meanwhile (thesis §3.10).
        self.transferee = NO_NODE
        # The leader told this node to campaign at once, and it has yet to apply the members that it would lead.
        self.summoned = False
        # Ticks since a leader was last heard, whoever it was, or since the start: what leases rest upon.
        self.since_leader = 0
        # The driver's monotonic clock when it last told: never ahead of the truth.
        self.clock_us = 0
        # Until when a quorum keeps from electing anybody else, by that clock.
        self.lease_until_us = 0
        # TIMEOUT_NOW was sent in this term and may arrive at any time in it: no lease is worth anything any more.
        self.lease_void = False
        # Nothing to do until something comes: ticks are not counted.
        self.quiesced = False
        # For how many ticks a leader's group has had nothing to do.
        self.idle_ticks = 0
        # For how many ticks the oldest write under way has not been reported.
        self.hanging_ticks = 0
        self.outbox: Final = Outbox()
        # Half of the numbers are left to count through.
        self.reads: Final = Reads(config.random.randrange(1, 1 << 62))
        # The last term and vote that a Ready has carried, those that are durable, and those on their way there.
        self.announced = HardState(self.term, self.vote, hard_state.commit)
        self.durable_term = self.term
        self.durable_vote = self.vote
        self._announcements: deque[tuple[int, int, int]] = deque()
        self.last_write = 0
        self.last_persisted = 0
        self._draw_timeout()

    # What is durable.

    @property
    def hard_state(self) -> HardState:
        """What this node must remember: `announced` itself while that says it. Its commit index never passes what is durable.

        Otherwise a write that is torn after the hard state could leave a commit index that covers entries which the
        lost part of that same write was to replace: a restart would take those for committed.
        """
        commit = min(self.log.commit_index, self.log.persisted_index)
        told = self.announced
        if told.commit == commit and told.term == self.term and told.vote == self.vote:
            return told
        return HardState(self.term, self.vote, commit)

    @property
    def unfinished_write(self) -> int:
        """Number of the last write that was handed out and not reported; 0 if there is none."""
        return self.last_write if self.last_write > self.last_persisted else 0

    @property
    def must_sync(self) -> bool:
        """Whether something in memory must become durable and no Ready has carried it."""
        return self.log.has_unannounced or (self.term, self.vote) != (self.announced.term, self.announced.vote)

    def announce(self, number: int) -> None:
        """The Ready `number` carries term and vote as they are."""
        self.last_write = number
        self._announcements.append((number, self.term, self.vote))

    def persisted(self, number: int) -> None:
        """Writes up to `number` are durable."""
        check(number <= self.last_write, f"write {number} persisted, but only {self.last_write} was handed out")
        if number > self.last_persisted:
            self.hanging_ticks = 0
        self.last_persisted = max(self.last_persisted, number)
        while self._announcements and self._announcements[0][0] <= number:
            _, self.durable_term, self.durable_vote = self._announcements.popleft()
        self.log.persisted(number)
        self.outbox.persisted(number)

    # Messages.

    def send(
        self,
        kind: MessageKind,
        to: int,
        *,
        term: int | None = None,
        log_index: int = 0,
        log_term: int = 0,
        commit: int = 0,
        entries: EntrySpan | None = None,
        reject: bool = False,
        reject_hint: int = 0,
        context: int = 0,
        priority: int = 0,
        members: Members | None = None,
    ) -> None:
        """Queue a message; its term is this node's unless given."""
        message = Message(
            kind=kind,
            sender=self.id,
            to=to,
            term=self.term if term is None else term,
            log_index=log_index,
            log_term=log_term,
            commit=commit,
            entries=entries,
            reject=reject,
            reject_hint=reject_hint,
            context=context,
            priority=priority,
            members=members,
            changes=() if entries is None else self.log.changes_within(entries.first, entries.end),
        )
        # Whatever speaks for a term waits until that term is durable: else a crash could make this node say the
        # opposite in an older one. A request for a pre-vote speaks for a term that nobody has entered yet.
        unstable_term = self.term != self.durable_term and kind is not MessageKind.REQUEST_PRE_VOTE
        self.outbox.put(message, unstable_term or kind in _ASSERTS_LOG_OR_VOTE)

    # Roles.

    def become_follower(self, term: int, leader: int) -> None:
        """Follow `leader` (``NO_NODE``: nobody yet) in `term`."""
        self._reset(term)
        self.role = Role.FOLLOWER
        self.leader = leader

    def become_pre_candidate(self) -> None:
        """Ask around. Term and vote stay as they are (thesis §9.6)."""
        check(self.role is not Role.LEADER, "a leader does not campaign")
        self.role = Role.PRE_CANDIDATE
        self.votes = {}
        self._set_no_leader()

    def become_candidate(self) -> None:
        """Enter the next term and vote for oneself (Raft §5.2)."""
        check(self.role is not Role.LEADER, "a leader does not campaign")
        self._reset(self.term + 1)
        self.role = Role.CANDIDATE
        self.vote = self.id

    def become_leader(self) -> None:
        """Lead the term that was won. The no-op is `leader`'s to append."""
        check(self.role is Role.CANDIDATE, f"a {self.role.value} does not become leader")
        check(self.own_vote_durable, f"term {self.term} is not durable here")
        self._reset(self.term)
        self.role = Role.LEADER
        self.leader = self.id
        for member in self.membership.all:
            self.add_progress(member)
        own = self.progress[self.id]
        own.match_index = self.log.persisted_index
        own.become_replicate()
        own.next_index = self.log.last_index + 1
        own.recent_active = True
        self.noop_index = self.log.last_index + 1
        self.pending_change_index = self.noop_index

    def add_progress(self, member: int) -> None:
        """Begin to look after `member` as its leader."""
        inflights = Inflights(self.config.inflight_messages_max, self.config.inflight_bytes_max)
        self.progress[member] = Progress(self.log.last_index + 1, inflights)

    def follow(self, leader: int) -> None:
        """A message of this term's leader came: the lease runs anew (Raft §5.2)."""
        check(self.role is Role.FOLLOWER, f"a {self.role.value} does not follow")
        self.leader = leader
        self.election_elapsed = 0
        self.since_leader = 0

    def wake(self) -> None:
        """Something came, or the leader's node may be gone: time counts again, from now on."""
        if not self.quiesced:
            return
        self.quiesced = False
        self.idle_ticks = 0
        self.election_elapsed = 0
        # The next tick shows the peers that the leader is there.
        self.heartbeat_elapsed = self.config.heartbeat_ticks
        for progress in self.progress.values():
            # They had nothing to say since.
            progress.recent_active = True

    def forget_leader(self) -> None:
        """Follow nobody, in the same term: free to vote at once."""
        check(self.role is Role.FOLLOWER, f"a {self.role.value} has no leader to forget")
        self._set_no_leader()

    def grant(self, candidate: int) -> None:
        """Vote for `candidate` in this term, and give it time to win."""
        check(self.vote in (NO_NODE, candidate), f"node {self.id} voted for {self.vote} in term {self.term} already")
        self.vote = candidate
        self.election_elapsed = 0

    @property
    def own_vote_durable(self) -> bool:
        """Whether this candidate's vote for itself would survive a crash; only then does it count."""
        return (self.durable_term, self.durable_vote) == (self.term, self.id)

    @property
    def in_lease(self) -> bool:
        """Whether this node has promised a leader not to elect anybody else yet (Raft §6, thesis §4.2.3, §6.4.1).

        With lease reads the promise outlives a change of role or term, and a restart, which may have forgotten it.
        """
        if not self.config.check_quorum:
            return False
        if self.promised:
            return True
        return self.leader != NO_NODE and self.election_elapsed < self.config.election_ticks

    @property
    def promised(self) -> bool:
        """Whether a leader may hold a lease that rests on this node's patience (thesis §6.4.1).

        It outlives a change of role or term, and a restart, which may have forgotten it; and it ends by time alone, so
        that the group can elect another when its leader is gone.
        """
        return self.config.lease_reads and self.since_leader < self.config.election_ticks

    def restore(self, meta: SnapshotMeta) -> None:
        """Take over `meta` in the place of this log and membership."""
        self.log.restore(meta)
        self.membership = Membership(meta.members)
        self.snapshot = meta

    @property
    def committed_in_term(self) -> bool:
        """Whether an entry of this very term is committed: the leader then knows all that is committed (Raft §8)."""
        return self.log.term_or_zero(self.log.commit_index) == self.term

    def _reset(self, term: int) -> None:
        """Leave the present role for good."""
        check(term >= self.term, f"term {term} after term {self.term}")
        if term != self.term:
            self.term = term
            self.vote = NO_NODE
        self._set_no_leader()
        self.election_elapsed = 0
        self.heartbeat_elapsed = 0
        self._draw_timeout()
        self.votes = {}
        if self.role is Role.LEADER:
            self.outbox.drop_appends()
            for read in self.reads.drop_leading(self.id):
                self.send(MessageKind.READ_INDEX_RESPONSE, read.requester, reject=True, context=read.request)
        self.progress = {}
        self.noop_index = 0
        self.pending_change_index = 0
        self.transferee = NO_NODE
        self.summoned = False
        self.lease_until_us = 0
        self.lease_void = False
        self.reads.rounds.clear()
        self.quiesced = False
        self.idle_ticks = 0

    def _set_no_leader(self) -> None:
        """Whom this node followed it no longer follows; what it asked that leader is void."""
        self.leader = NO_NODE
        self.reads.drop_forwarded()

    def _draw_timeout(self) -> None:
        least = self.config.election_ticks
        spread = self.config.election_spread_ticks or least
        self.randomized_election_timeout = self.config.random.randrange(least, least + spread)
