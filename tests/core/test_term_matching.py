"""The matching kernels as the protocol uses them: logs with one history, a leader that looks for where they part."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from reference.term_index import TermIndex as Twin

from marble._core.term_index import EntrySpan, TermIndex

Terms = list[int]


@st.composite
def histories(draw: st.DrawFn) -> tuple[Terms, Terms]:
    """Terms of two logs that Raft can make: equal up to a point, and from there on no term in common.

    A term has one leader, which never changes its mind: entries of one term at one index are equal, and so is all
    before them (Raft §5.3, log matching).
    """
    common = sorted(draw(st.lists(st.integers(1, 6), max_size=8)))
    base = common[-1] if common else 1
    pool = draw(st.permutations(range(base, base + 8)))
    cut = draw(st.integers(0, len(pool)))
    tails = [
        sorted(draw(st.lists(st.sampled_from(part), max_size=10))) if part else [] for part in (pool[:cut], pool[cut:])
    ]
    return common + tails[0], common + tails[1]


def log_of(terms: Sequence[int], purged: int) -> TermIndex:
    log = TermIndex()
    log.append(EntrySpan.of(1, list(terms)))
    log.purge(purged + 1)
    return log


def first_difference(leader: Terms, follower: Terms) -> int:
    """How many entries they have in common."""
    for index, (one, other) in enumerate(zip(leader, follower, strict=False)):
        if one != other:
            return index
    return min(len(leader), len(follower))


@settings(max_examples=300, deadline=None)
@given(histories(), st.integers(0, 20), st.data())
def test_probing_finds_where_the_logs_part_in_few_rounds(
    logs: tuple[Terms, Terms], start: int, data: st.DataObject
) -> None:
    """A refused probe says the follower's best guess, and the leader's kernel skips what cannot match (Raft §5.3)."""
    ours, theirs = logs
    common = first_difference(ours, theirs)
    # A follower purges what is committed only, and that it has in common with every leader.
    leader, follower = log_of(ours, 0), log_of(theirs, data.draw(st.integers(0, common)))
    probe, rounds = min(start, len(ours)), 0
    begin = probe
    while probe > len(theirs) or (probe >= follower.first_index and follower.term_at(probe) != leader.term_at(probe)):
        rounds += 1
        asked = max(min(probe, follower.last_index), follower.first_index - 1)
        hint = follower.last_index_at_most_term(asked, leader.term_at(probe))
        known = follower.first_index - 1 <= hint <= follower.last_index
        if known and follower.term_at(hint) > 0:
            hint = leader.last_index_at_most_term(hint, follower.term_at(hint))
        following = min(probe - 1, hint)
        # Nothing that matches was ever skipped.
        assert min(common, begin) <= following < probe
        probe = following
    assert probe == min(common, begin)
    # Each round leaves a term of either log behind.
    assert rounds <= len(set(ours[common:])) + len(set(theirs[common:])) + 1


@settings(max_examples=300, deadline=None)
@given(histories(), st.integers(0, 12), st.integers(0, 12))
def test_splicing_at_the_first_conflict_gives_the_leaders_log(
    logs: tuple[Terms, Terms], previous: int, count: int
) -> None:
    """Raft figure 2, AppendEntries 3 and 4: what is equal stays, and what ends early truncates nothing."""
    ours, theirs = logs
    common = first_difference(ours, theirs)
    previous = min(previous, common)
    sent = ours[previous : previous + count]
    log, span = log_of(theirs, 0), EntrySpan.of(previous + 1, sent)
    conflict = log.first_conflict(span)
    assert conflict == min(max(common, previous) + 1, span.end)
    if conflict < span.end:
        log.truncate(conflict)
        log.append(span.slice(conflict, span.end))
        assert log.span(1, log.last_index + 1).terms() == ours[: previous + count]
    else:
        assert log.span(1, log.last_index + 1).terms() == theirs
    assert log.first_conflict(span) == span.end


class IndexModel(RuleBasedStateMachine):
    """A `TermIndex` through a long life, after each step the same as its twin wherever one can ask."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.twin = TermIndex(), Twin()

    @rule(rises=st.lists(st.sampled_from((0, 0, 0, 0, 1, 3)), max_size=6), size=st.integers(0, 20))
    def append(self, rises: list[int], size: int) -> None:
        terms, term = [], max(1, self.twin.last_term)
        for rise in rises:
            term += rise
            terms.append(term)
        sizes = [size + place for place in range(len(terms))]
        self.real.append(EntrySpan.of(self.real.last_index + 1, terms, sizes))
        self.twin.append(terms, sizes)

    @rule(where=st.integers(0, 100))
    def truncate(self, where: int) -> None:
        first = self.twin.last_index + 1 - where % (min(len(self.twin.terms), 5) + 1)
        self.real.truncate(first)
        self.twin.truncate(first)

    @rule(where=st.integers(0, 100))
    def purge(self, where: int) -> None:
        end = self.twin.first_index + where % (min(len(self.twin.terms), 7) + 1)
        self.real.purge(end)
        self.twin.purge(end)

    @rule(back=st.integers(0, 6), rises=st.lists(st.sampled_from((0, 0, 1)), max_size=5))
    def splice(self, back: int, rises: list[int]) -> None:
        """Entries from a leader, after one that matches."""
        first = max(self.twin.first_index, self.twin.last_index + 1 - back)
        terms, term = [], max(1, self.twin.term_at(first - 1))
        for rise in rises:
            term += rise
            terms.append(term)
        span = EntrySpan.of(first, terms)
        conflict = self.twin.first_conflict(first, terms)
        assert self.real.first_conflict(span) == conflict
        if conflict < span.end:
            self.real.truncate(conflict)
            self.real.append(span.slice(conflict, span.end))
            self.twin.truncate(conflict)
            self.twin.append(terms[conflict - first :], [0] * (span.end - conflict))

    @invariant()
    def everything_agrees(self) -> None:
        real, twin = self.real, self.twin
        low, high = twin.first_index, twin.last_index
        assert (real.first_index, real.last_index, real.last_term, len(real)) == (
            low,
            high,
            twin.last_term,
            len(twin.terms),
        )
        assert [real.term_at(i) for i in range(low - 1, high + 1)] == [
            twin.term_at(i) for i in range(low - 1, high + 1)
        ]
        assert real.span(low, high + 1) == EntrySpan.of(low, twin.terms, twin.sizes)
        for first in range(low, high + 2, 3):
            assert real.bytes(first, high + 1) == twin.bytes(first, high + 1)
            assert real.clip(first, high + 1, 25) == twin.clip(first, high + 1, 25)
        for term in range(twin.last_term + 2):
            assert real.last_index_at_most_term(high, term) == twin.last_index_at_most_term(high, term)


IndexModel.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestIndexModel = IndexModel.TestCase
