"""What a core is made from: its configuration, and what its storage remembers.

Rule 1: everything is checked here, once, with `UsageError` for a caller's mistake and `CorruptionError` for a store
that cannot be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Protocol

from marble._core.term_index import EntrySpan, TermIndex
from marble.errors import UsageError
from marble.raft.membership import members_of
from marble.raft.messages import PRIORITY_MAX
from marble.types import INDEX_MAX, NODE_ID_MAX, HardState, Members, SnapshotMeta


class Random(Protocol):
    """A seeded source of chance (`marble.env.Random`)."""

    def randrange(self, start: int, stop: int) -> int:
        """An integer in ``[start, stop)``."""
        ...


@dataclass(frozen=True, slots=True)
class RaftConfig:
    """How a core behaves. All nodes of a group should have the same, but for ``id`` and ``random``.

    Parameters
    ----------
    id
        This node, 1 to ``NODE_ID_MAX``.
    election_ticks
        A follower that hears nothing for this many ticks, plus a random part (`election_spread_ticks`), campaigns (Raft
        §5.2). A leader that hears from no quorum for this long steps down (`check_quorum`).
    heartbeat_ticks
        A leader sends heartbeats this often; below `election_ticks`, which should be about ten times as large.
    random
        Chance: spreads election timeouts, and makes the contexts of reads differ from those of an earlier life of this
        node.
    pre_vote
        Ask whether an election could be won before raising the term (thesis §9.6).
    check_quorum
        A leader without a quorum steps down, and who hears a leader ignores candidates (thesis §6.2, §4.2.3).
    append_bytes_max
        Entries of one APPEND_ENTRIES, in bytes; a single larger entry still travels, alone. Bounds what a lost message
        costs.
    inflight_messages_max
        APPEND_ENTRIES under way to one peer.
    inflight_bytes_max
        Their entries, in bytes: bounds what a slow peer costs. At least `append_bytes_max`.
    uncommitted_bytes_max
        Entries that this leader has accepted and not yet committed; beyond it `propose` refuses. Bounds the log's
        growth without a quorum.

    priority
        A voter does not vote for a candidate of lower priority than its own whose log is merely as good as its own: the
        node that should lead wins if it can. 0 to ``PRIORITY_MAX``; need not be the same on all nodes.
    lease_reads
        A leader that a quorum answered recently may answer reads without asking again (thesis §6.4.1), and nodes keep
        what this rests upon: who heard a leader, or has just started, neither votes nor campaigns for `election_ticks`.
        Needs `check_quorum`; the same on all nodes.
    tick_us
        Microseconds that lie between two ticks at least, on this node's monotonic clock.
    clock_drift
        By how much, as a fraction, any node's monotonic clock is wrong at most: shortens leases.
    election_spread_ticks
        The random part is below this many ticks. 0: below `election_ticks`, as in etcd. Less of it ends elections sooner
        and splits more votes (Raft §9.3): a message's way and a sync should take a small part of it.
    quiesce_ticks
        A leader whose group had nothing to do for so long lets it sleep: no ticks, no messages. 0: never.

    Raises
    ------
    UsageError
        A value is out of bounds; it says which and why.
    """

    id: int
    election_ticks: int
    heartbeat_ticks: int
    _: KW_ONLY
    random: Random
    pre_vote: bool = True
    check_quorum: bool = True
    append_bytes_max: int = 1 << 20
    inflight_messages_max: int = 256
    inflight_bytes_max: int = 32 << 20
    uncommitted_bytes_max: int = 256 << 20
    priority: int = 0
    lease_reads: bool = False
    tick_us: int = 100_000
    clock_drift: float = 0.01
    election_spread_ticks: int = 0
    quiesce_ticks: int = 0

    @property
    def lease_us(self) -> int:
        """How long after a heartbeat was sent those who answered it keep from electing anybody else, by this clock.

        A follower waits `election_ticks` of its ticks, of which the first may be under way. Its clock may be fast, and
        this one slow.
        """
        return int((self.election_ticks - 1) * self.tick_us * (1 - 2 * self.clock_drift))

    def __post_init__(self) -> None:
        if not 1 <= self.id <= NODE_ID_MAX:
            raise UsageError(f"id {self.id} is not within 1 to {NODE_ID_MAX}")
        for name in (
            "heartbeat_ticks",
            "append_bytes_max",
            "inflight_messages_max",
            "inflight_bytes_max",
            "uncommitted_bytes_max",
            "tick_us",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.election_ticks <= self.heartbeat_ticks:
            raise UsageError(
                f"election_ticks {self.election_ticks} must be greater than heartbeat_ticks {self.heartbeat_ticks}, "
                "or followers campaign against a healthy leader"
            )
        if not 0 <= self.priority <= PRIORITY_MAX:
            raise UsageError(f"priority {self.priority} is not within 0 to {PRIORITY_MAX}")
        if self.lease_reads and not self.check_quorum:
            raise UsageError("lease_reads need check_quorum: without it nobody waits for a lease to end")
        if not 0 <= self.clock_drift < 0.5:
            raise UsageError(f"clock_drift {self.clock_drift} is not a fraction from 0 to below 0.5")
        for name in ("quiesce_ticks", "election_spread_ticks"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} {getattr(self, name)} is negative")
        if self.inflight_bytes_max < self.append_bytes_max:
            raise UsageError(
                f"inflight_bytes_max {self.inflight_bytes_max} is below append_bytes_max {self.append_bytes_max}"
            )


class Storage(Protocol):
    """What a node remembers when it starts. Read once, by `Raft`, which takes `term_index` over and changes it."""

    @property
    def hard_state(self) -> HardState: ...
    @property
    def members(self) -> Members:
        """Who took part as of ``applied_index``; nobody, at a node that waits to be added."""
        ...

    @property
    def snapshot(self) -> SnapshotMeta | None:
        """The newest durable snapshot; None if there is none. Needed once the log is purged."""
        ...

    @property
    def changes(self) -> Sequence[int]:
        """Indexes, ascending, of the entries in the log that change the membership."""
        ...

    @property
    def term_index(self) -> TermIndex:
        """Terms and sizes of all entries that are durable here."""
        ...

    @property
    def applied_index(self) -> int:
        """The state machine holds everything up to here."""
        ...


class MemoryStorage:
    """A `Storage` made by hand, for tests and examiners.

    Parameters
    ----------
    entries
        The durable log: an `EntrySpan`, a `TermIndex`, or one term per entry from index 1 on.
    hard_state
        None: the term of the last entry, no vote, nothing committed.
    voters
        Ids of all voters, where `members` is not given.
    applied_index
        How far the state machine is. None: as far as the snapshot, or to where the log starts.
    members
        Who takes part. None: the snapshot's, or `voters`.
    snapshot
        The newest snapshot; the log, unless given as a `TermIndex` or an `EntrySpan`, starts after it. None: one where
        the log starts, if that is not at index 1.
    changes
        Indexes of the entries that change the membership.
    """

    def __init__(
        self,
        entries: Sequence[int] | EntrySpan | TermIndex = (),
        hard_state: HardState | None = None,
        voters: Sequence[int] = (1,),
        applied_index: int | None = None,
        *,
        members: Members | None = None,
        snapshot: SnapshotMeta | None = None,
        changes: Sequence[int] = (),
    ) -> None:
        start = SnapshotMeta(0, 0, Members()) if snapshot is None else snapshot
        if isinstance(entries, TermIndex):
            self.term_index = entries
        else:
            span = entries if isinstance(entries, EntrySpan) else EntrySpan.of(start.index + 1, list(entries))
            self.term_index = TermIndex(span.first, start.term if span.first == start.index + 1 else 0)
            self.term_index.append(span)
        self.hard_state = HardState(term=self.term_index.last_term) if hard_state is None else hard_state
        if members is None:
            members = snapshot.members if snapshot is not None else members_of(voters)
        self.members = members
        purged = self.term_index.first_index - 1
        if snapshot is None and purged:
            snapshot = SnapshotMeta(purged, self.term_index.term_at(purged), members)
        self.snapshot = snapshot
        self.changes = tuple(changes)
        self.applied_index = max(start.index, purged) if applied_index is None else applied_index


def check_hard_state(hard_state: HardState) -> None:
    """Raise UsageError unless the numbers can be those of a node."""
    if not (
        0 <= hard_state.term <= INDEX_MAX
        and 0 <= hard_state.vote <= NODE_ID_MAX
        and 0 <= hard_state.commit <= INDEX_MAX
    ):
        raise UsageError(f"{hard_state} is out of bounds")
