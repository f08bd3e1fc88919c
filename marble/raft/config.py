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
from marble.types import INDEX_MAX, NODE_ID_MAX, HardState


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
        A follower that hears nothing for this many ticks, plus a random part of as many again, campaigns (Raft §5.2). A
        leader that hears from no quorum for this long steps down (`check_quorum`).
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

    def __post_init__(self) -> None:
        if not 1 <= self.id <= NODE_ID_MAX:
            raise UsageError(f"id {self.id} is not within 1 to {NODE_ID_MAX}")
        for name in (
            "heartbeat_ticks",
            "append_bytes_max",
            "inflight_messages_max",
            "inflight_bytes_max",
            "uncommitted_bytes_max",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.election_ticks <= self.heartbeat_ticks:
            raise UsageError(
                f"election_ticks {self.election_ticks} must be greater than heartbeat_ticks {self.heartbeat_ticks}, "
                "or followers campaign against a healthy leader"
            )
        if self.inflight_bytes_max < self.append_bytes_max:
            raise UsageError(
                f"inflight_bytes_max {self.inflight_bytes_max} is below append_bytes_max {self.append_bytes_max}"
            )


class Storage(Protocol):
    """What a node remembers when it starts. Read once, by `Raft`, which takes `term_index` over and changes it."""

    @property
    def hard_state(self) -> HardState: ...
    @property
    def voters(self) -> Sequence[int]: ...
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
        Ids of all voters.
    applied_index
        How far the state machine is.
    """

    def __init__(
        self,
        entries: Sequence[int] | EntrySpan | TermIndex = (),
        hard_state: HardState | None = None,
        voters: Sequence[int] = (1,),
        applied_index: int = 0,
    ) -> None:
        if isinstance(entries, TermIndex):
            self.term_index = entries
        else:
            span = entries if isinstance(entries, EntrySpan) else EntrySpan.of(1, list(entries))
            self.term_index = TermIndex(span.first)
            self.term_index.append(span)
        self.hard_state = HardState(term=self.term_index.last_term) if hard_state is None else hard_state
        self.voters: Sequence[int] = list(voters)
        self.applied_index = applied_index


def check_hard_state(hard_state: HardState) -> None:
    """Raise UsageError unless the numbers can be those of a node."""
    if not (
        0 <= hard_state.term <= INDEX_MAX
        and 0 <= hard_state.vote <= NODE_ID_MAX
        and 0 <= hard_state.commit <= INDEX_MAX
    ):
        raise UsageError(f"{hard_state} is out of bounds")
