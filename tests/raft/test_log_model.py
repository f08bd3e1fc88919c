"""`RaftLog` against its twin, which has a disk and knows every entry by itself: what is persisted is really there."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference.raft_log import Entry
from reference.raft_log import RaftLog as Twin

from marble._core.term_index import EntrySpan, TermIndex
from marble.errors import InvariantError
from marble.raft.log import RaftLog
from marble.types import Members, SnapshotMeta

rises = st.lists(st.sampled_from((0, 0, 0, 1, 2)), max_size=5)
sizes = st.integers(0, 9)
fraction = st.integers(0, 1000)


def within(first: int, last: int, where: int) -> int:
    """One of `first` to `last`, by a number drawn before these were known."""
    return first + where % (last - first + 1)


def terms_from(term: int, some: list[int]) -> list[int]:
    found = []
    for rise in some:
        term = max(1, term + rise)
        found.append(term)
    return found


class LogModel(RuleBasedStateMachine):
    """Everything that a leader, a follower and a disk may do to a log, in any order that Raft allows."""

    log: RaftLog
    twin: Twin

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    @initialize(first=st.integers(1, 4), some=rises, changes=st.sets(st.integers(0, 4)), commit=fraction)
    def start(self, first: int, some: list[int], changes: set[int], commit: int) -> None:
        """A node that comes back with what was durable, and with an older idea of what was committed."""
        previous = 1 if first > 1 else 0
        terms = terms_from(max(1, previous), some)
        entries = [Entry(term, 0, place in changes) for place, term in enumerate(terms)]
        index = TermIndex(first, previous)
        index.append(EntrySpan.of(first, [entry.term for entry in entries]))
        commit = within(0, first + len(entries) - 1, commit)
        # Of a snapshot's part of the log the storage may still know changes.
        self.log = RaftLog(
            index,
            commit,
            first - 1,
            [*range(1, first), *(first + place for place in sorted(changes) if place < len(terms))],
        )
        self.twin = Twin(first, previous, entries, commit)

    @rule(some=rises, size=sizes)
    def append(self, some: list[int], size: int) -> None:
        """As leader."""
        entries = [Entry(term, size) for term in terms_from(self.twin.last_term, some)]
        self.log.append(EntrySpan.of(self.log.last_index + 1, [e.term for e in entries], [size] * len(entries)))
        self.twin.append(entries)

    @precondition(lambda self: all(index <= self.twin.applied_index for index in self.twin.changes))
    @rule(rise=st.integers(0, 1))
    def append_change(self, rise: int) -> None:
        """As leader, which has applied all changes before."""
        entry = Entry(max(1, self.twin.last_term + rise), 0, True)
        index = self.log.last_index + 1
        self.log.append(EntrySpan.of(index, [entry.term]), (index,))
        self.twin.append([entry])

    @rule(where=fraction, same=st.integers(0, 4), some=rises, size=sizes, change=st.integers(0, 6))
    def splice(self, where: int, same: int, some: list[int], size: int, change: int) -> None:
        """As follower: after an entry that matches, some that are here already, then some that may be others."""
        previous = within(max(self.twin.commit_index, self.twin.first_index - 1), self.twin.last_index, where)
        kept = [
            self.twin.entries[index] for index in range(previous + 1, min(previous + same, self.twin.last_index) + 1)
        ]
        entries = list(kept)
        for term in terms_from(self.twin.term_at(previous + len(kept)), some):
            here = self.twin.entries.get(previous + 1 + len(entries))
            # Where index and term are equal, so is the entry (Raft §5.3, log matching).
            equal = here is not None and here.term == term and entries == [*self._run(previous, len(entries))]
            entries.append(here if equal and here is not None else Entry(term, size, change == len(entries)))
        span = EntrySpan.of(previous + 1, [entry.term for entry in entries], [entry.size for entry in entries])
        changes = [index for index, entry in enumerate(entries, previous + 1) if entry.is_change]
        self.log.splice(span, changes)
        self.twin.splice(previous + 1, entries)

    def _run(self, previous: int, count: int) -> list[Entry]:
        return [self.twin.entries[index] for index in range(previous + 1, previous + 1 + count)]

    @precondition(lambda self: self.twin.first_index <= self.twin.commit_index)
    @rule(where=fraction)
    def splice_over_what_is_committed(self, where: int) -> None:
        """Two histories cannot be committed: refused, and nothing changed."""
        index = within(self.twin.first_index, self.twin.commit_index, where)
        with pytest.raises(InvariantError, match="two histories"):
            self.log.splice(EntrySpan.of(index, [self.twin.last_term + 1]))

    @rule(where=fraction)
    def commit(self, where: int) -> None:
        index = within(0, self.twin.last_index, where)
        assert self.log.commit_to(index) == (index > self.twin.commit_index)
        self.twin.commit_index = max(self.twin.commit_index, index)

    @rule(beyond=st.integers(1, 3))
    def commit_what_is_not_there(self, beyond: int) -> None:
        with pytest.raises(InvariantError, match="this log"):
            self.log.commit_to(self.twin.last_index + beyond)

    @rule()
    def announce(self) -> None:
        self.number += 1
        span = self.log.announce(self.number)
        assert (None if span is None else (span.first, span.end)) == self.twin.announce(self.number)

    @precondition(lambda self: self.twin.writes)
    @rule(where=fraction)
    def persisted(self, where: int) -> None:
        """The disk reports some of the writes under way, in their order, however late."""
        number = self.twin.writes[within(0, len(self.twin.writes) - 1, where)].number
        self.log.persisted(number)
        self.twin.persisted(number)

    @rule()
    def take_committed(self) -> None:
        span = self.log.take_committed()
        assert (None if span is None else (span.first, span.end)) == self.twin.take_committed()

    @precondition(lambda self: min(self.twin.applying_index, self.twin.persisted_index) > self.twin.applied_index)
    @rule(where=fraction)
    def applied(self, where: int) -> None:
        """What was handed out is applied: a snapshot as a whole, or still some entries from before one that arrived."""
        first, last = self.twin.applied_index + 1, min(self.twin.applying_index, self.twin.persisted_index)
        if last >= self.twin.first_index - 1:
            first = max(first, self.twin.first_index - 1)
        index = within(first, last, where)
        self.log.applied(index)
        self.twin.applied_index = index

    @rule()
    def apply_what_was_not_handed_out(self) -> None:
        with pytest.raises(InvariantError, match="handed out"):
            self.log.applied(self.twin.applying_index + 1)

    @rule(where=fraction)
    def go_on(self, where: int) -> None:
        """The usual way: all is written, some of it is committed, handed out and applied."""
        for step in (self.announce, self.take_committed):
            step()
            if self.twin.writes:
                self.persisted(len(self.twin.writes) - 1)
            self.commit(where)
        if min(self.twin.applying_index, self.twin.persisted_index) > self.twin.applied_index:
            self.applied(where)

    @rule(where=fraction)
    def purge(self, where: int) -> None:
        index = within(0, self.twin.applied_index, where)
        self.log.purge(index)
        self.twin.purge(index)

    @rule(beyond=st.integers(1, 4), rise=st.integers(0, 2))
    def restore(self, beyond: int, rise: int) -> None:
        """A snapshot arrives that this log does not lead up to."""
        index, term = self.twin.commit_index + beyond, self.twin.last_term + rise
        if index <= self.twin.last_index and self.twin.term_at(index) == term:
            term += 1
        meta = SnapshotMeta(index, max(1, term), Members((1, 2, 3)))
        self.log.restore(meta)
        self.twin.restore(meta)

    @invariant()
    def everything_agrees(self) -> None:
        if not hasattr(self, "log"):
            return
        log, twin = self.log, self.twin
        assert log.terms() == [entry.term for _, entry in sorted(twin.entries.items())]
        for name in ("first_index", "last_index", "last_term", "changes", "has_change_to_apply", "installing"):
            assert getattr(log, name) == getattr(twin, name), name
        for name in ("commit_index", "announced_index", "persisted_index", "applying_index", "applied_index"):
            assert getattr(log, name) == getattr(twin, name), name
        assert log.has_unannounced == (twin.announced_index < twin.last_index or twin.installing is not None)
        assert log.bytes(log.first_index, log.last_index + 1) == sum(entry.size for entry in twin.entries.values())
        middle = (log.first_index + log.last_index) // 2
        assert log.changes_within(middle, log.last_index + 1) == tuple(i for i in twin.changes if i >= middle)
        for index in range(log.first_index - 2, log.last_index + 3):
            known = log.first_index - 1 <= index <= log.last_index
            assert log.term_or_zero(index) == (twin.term_at(index) if known else 0)
            assert log.matches(index, log.term_or_zero(index)) == known
            assert not log.matches(index, twin.last_term + 1)

    @invariant()
    def positions_are_in_order(self) -> None:
        """The invariants in the docstring of `RaftLog`."""
        if not hasattr(self, "log"):
            return
        log = self.log
        assert log.persisted_index <= log.announced_index <= log.last_index
        assert log.applied_index <= log.applying_index <= log.commit_index <= log.last_index
        if log.applied_index + 1 >= log.first_index:
            assert log.applied_index <= log.persisted_index
        assert all(index <= log.commit_index for index in log.changes[:-1])


LogModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLogModel = LogModel.TestCase
