"""What an all-knowing witness writes down of one simulated group: the material of the invariants.

Rule 1: it knows only what some node did. It never decides anything for a node, and no node can read it.
Rule 2: it grows by what is new, so that a check costs the same at the end of a history as at its beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from marble.types import NO_NODE, HardState, Members, Role


class Violation(AssertionError):
    """A property does not hold: there is a bug in marble, or in the simulator."""


@dataclass(slots=True)
class Shelf:
    """One group's part of one node's disk, as the node's log was told to write it.

    - ``written[i]`` is the term of entry ``i + 1`` as last appended, synced or not; ``terms`` the same for what a sync has covered.
      What a snapshot covers counts as written: the witness knows what was committed there.
    - ``waiting`` are the changes since the last sync, in order: (hard state or None, first index, terms from there on).
    """

    hard_state: HardState = field(default_factory=HardState)
    terms: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    waiting: list[tuple[HardState | None, int, list[int]]] = field(default_factory=list)

    def append(self, hard_state: HardState | None, first: int, terms: list[int]) -> None:
        """The log took this over."""
        _splice(self.written, first, terms)
        self.waiting.append((hard_state, first, terms))

    def start_after(self, hard_state: HardState | None, covered: list[int]) -> None:
        """The log goes on behind a snapshot of entries with these terms. What it has beyond stays if it has the last of them."""
        end = len(covered)
        if len(self.written) >= end and self.written[end - 1] == covered[-1]:
            self.waiting.append((hard_state, 0, []))
        else:
            self.append(hard_state, 1, covered)

    def settle(self) -> None:
        """A sync has covered everything that waited."""
        for hard_state, first, terms in self.waiting:
            if hard_state is not None:
                self.hard_state = hard_state
            _splice(self.terms, first, terms)
        self.waiting.clear()

    def possible(self) -> list[tuple[HardState, list[int]]]:
        """What may be on the disk after a crash: what was durable, or that and a first part of what waited."""
        hard_state, terms = self.hard_state, list(self.terms)
        states = [(hard_state, list(terms))]
        for new, first, more in self.waiting:
            hard_state = new or hard_state
            _splice(terms, first, more)
            states.append((hard_state, list(terms)))
        return states

    def term_at(self, index: int) -> int:
        """Term of the durable entry `index`; 0 if there is none."""
        return self.terms[index - 1] if 1 <= index <= len(self.terms) else 0


def _splice(terms: list[int], first: int, more: list[int]) -> None:
    if more:
        del terms[first - 1 :]
        terms.extend(more)


@dataclass(slots=True)
class Seen:
    """What was last seen of a core in this life of its node."""

    role: Role = Role.FOLLOWER
    term: int = 0
    commit: int = 0
    applied: int = 0
    persisted: int = 0
    last: int = 0
    last_term: int = 0


@dataclass(slots=True)
class Ledger:
    """All that ever happened in one group.

    Attributes
    ----------
    leaders
        Term -> who led in it.
    before
        (index, term) of every entry ever appended anywhere -> (term of the entry before it, checksum of its content).
    committed
        ``committed[i]`` is the term of entry ``i + 1``.
    committed_in
        Term of a leader -> the last index that it committed.
    applied
        Index -> (term, checksum, what applying it gave).
    handed_over
        Terms whose leader has told somebody to campaign.
    clock_us
        Reads the monotonic clock of a node.
    votes
        (node, term) -> whom it granted its vote.
    memberships
        Who took part from which applied entry on, ascending.
    executed
        (session, sequence) -> index of the entry that was executed for it.
    reads
        (node, request) -> how many entries were committed anywhere when the read began.
    """

    group: int
    leaders: dict[int, int] = field(default_factory=dict)
    before: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    committed: list[int] = field(default_factory=list)
    committed_in: dict[int, int] = field(default_factory=dict)
    applied: dict[int, tuple[int, int, int, str | None]] = field(default_factory=dict)
    handed_over: set[int] = field(default_factory=set)
    clock_us: Callable[[int], int] = lambda node: 0
    votes: dict[tuple[int, int], int] = field(default_factory=dict)
    executed: dict[tuple[int, int], int] = field(default_factory=dict)
    memberships: list[tuple[int, Members]] = field(default_factory=list)
    reads: dict[tuple[int, int], int] = field(default_factory=dict)
    shelves: dict[int, Shelf] = field(default_factory=dict)
    """Node -> its disk."""
    seen: dict[int, Seen] = field(default_factory=dict)
    reads_answered: int = 0
    last_leader: tuple[int, int] = (0, NO_NODE)
    """The highest term that anybody led, and who; zeros if nobody did yet."""

    def note_membership(self, index: int, members: Members) -> None:
        """Entry `index`, which changes the membership, is being applied somewhere."""
        if not self.memberships or self.memberships[-1][0] < index:
            self.memberships.append((index, members))

    def forget_life(self, node: int) -> None:
        """`node` crashed: what was seen of its memory, and who waited at it, is gone."""
        self.seen.pop(node, None)
        for key in [key for key in self.reads if key[0] == node]:
            del self.reads[key]
