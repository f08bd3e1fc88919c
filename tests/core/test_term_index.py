"""EntrySpan and TermIndex against their twin, and at their edges."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.term_index import TermIndex as Twin

from marble._core.term_index import EntrySpan, TermIndex
from marble.errors import ProtocolError
from marble.types import INDEX_MAX


def test_span_of_tells_what_it_was_made_from() -> None:
    span = EntrySpan.of(5, [1, 1, 3], [10, 0, 7])
    assert (span.first, span.end, len(span), span.first_term, span.last_term, span.bytes) == (5, 8, 3, 1, 3, 17)
    assert [span.term_at(i) for i in range(5, 8)] == span.terms() == [1, 1, 3]
    assert [span.size_at(i) for i in range(5, 8)] == span.sizes() == [10, 0, 7]
    assert repr(span) == "EntrySpan([5, 8): term 1 x 2, term 3 x 1; 17 bytes)"


def test_span_sizes_default_to_nothing() -> None:
    assert EntrySpan.of(1, [2, 2]).sizes() == [0, 0]


def test_span_empty_is_false_and_has_no_terms() -> None:
    span = EntrySpan.of(9, [])
    assert not span
    assert (span.first, span.end, span.bytes) == (9, 9, 0)
    with pytest.raises(IndexError):
        _ = span.first_term
    with pytest.raises(IndexError):
        _ = span.last_term


def test_span_from_buffers_copies() -> None:
    terms, sizes = np.array([1, 2], dtype=np.uint64), np.array([3, 4], dtype=np.uint64)
    span = EntrySpan.from_buffers(7, terms, sizes)
    terms[0] = 9
    assert span == EntrySpan.of(7, [1, 2], [3, 4])
    unaligned = b"x" + struct.pack("<2Q", 5, 6)
    assert EntrySpan.from_buffers(7, memoryview(unaligned)[1:], bytes(16)).terms() == [5, 6]


@pytest.mark.parametrize(
    ("first", "terms", "sizes"),
    [
        (1, [2, 1], None),
        (1, [0], None),
        (1, [INDEX_MAX + 1], None),
        (1, [2**64], None),
        (1, [-1], None),
        (0, [1], None),
        (-1, [1], None),
        (2**64, [1], None),
        (INDEX_MAX, [1, 1], None),
        (1, [1], [1, 2]),
        (1, [1], [-1]),
        (1, [1, 1], [2**63, 2**63]),
    ],
)
def test_span_refuses_what_no_log_can_hold(first: int, terms: list[int], sizes: list[int] | None) -> None:
    with pytest.raises(ProtocolError):
        EntrySpan.of(first, terms, sizes)


def test_span_from_buffers_refuses_broken_lengths_and_falling_terms() -> None:
    with pytest.raises(ProtocolError, match="whole uint64"):
        EntrySpan.from_buffers(1, b"1234567", b"")
    with pytest.raises(ProtocolError, match="1 terms but 2 sizes"):
        EntrySpan.from_buffers(1, struct.pack("<Q", 1), bytes(16))
    with pytest.raises(ProtocolError, match="fall"):
        EntrySpan.from_buffers(1, struct.pack("<2Q", 2, 1), bytes(16))


def test_span_cannot_be_made_half() -> None:
    with pytest.raises(TypeError):
        EntrySpan()


def test_span_slices_within_its_bounds_only() -> None:
    span = EntrySpan.of(5, [1, 2, 3], [4, 5, 6])
    assert span.slice(6, 8) == EntrySpan.of(6, [2, 3], [5, 6])
    assert span.slice(8, 8) == EntrySpan.of(8, [])
    assert span.slice(5, 8) is span
    for first, end in [(4, 6), (5, 9), (7, 6)]:
        with pytest.raises(IndexError):
            span.slice(first, end)


def test_span_equality_is_by_value() -> None:
    assert EntrySpan.of(1, [1]) == EntrySpan.of(1, [1])
    assert hash(EntrySpan.of(1, [1])) == hash(EntrySpan.of(1, [1]))
    assert EntrySpan.of(1, [1]) != EntrySpan.of(2, [1])
    assert EntrySpan.of(1, [1]) != EntrySpan.of(1, [1], [1])
    assert EntrySpan.of(1, [1]) != "span"


def test_index_empty_knows_the_term_before_it() -> None:
    log = TermIndex(11, 4)
    assert (log.first_index, log.last_index, log.last_term, len(log)) == (11, 10, 4, 0)
    assert log.term_at(10) == 4
    for index in (9, 11):
        with pytest.raises(IndexError):
            log.term_at(index)


def test_index_refuses_gaps_and_falling_terms() -> None:
    log = TermIndex()
    log.append(EntrySpan.of(1, [2, 2]))
    with pytest.raises(IndexError):
        log.append(EntrySpan.of(4, [2]))
    with pytest.raises(IndexError):
        log.append(EntrySpan.of(2, [2]))
    with pytest.raises(ProtocolError):
        log.append(EntrySpan.of(3, [1]))
    with pytest.raises(IndexError):
        log.first_conflict(EntrySpan.of(4, [2]))
    with pytest.raises(IndexError):
        log.truncate(4)
    with pytest.raises(IndexError):
        log.purge(4)
    assert log.last_index == 2


def test_index_purged_entries_count_as_equal() -> None:
    log = TermIndex()
    log.append(EntrySpan.of(1, [1, 1, 2, 2]))
    log.purge(3)
    assert log.first_conflict(EntrySpan.of(1, [1, 1, 2, 2])) == 5
    assert log.first_conflict(EntrySpan.of(1, [1, 1])) == 3
    assert log.first_conflict(EntrySpan.of(1, [1, 1, 2, 3])) == 4


def test_index_back_tracking_example_of_etcd() -> None:
    leader, follower = TermIndex(), TermIndex()
    leader.append(EntrySpan.of(1, [1, 3, 3, 3, 5, 5, 5, 5, 5]))
    follower.append(EntrySpan.of(1, [1, 1, 1, 1, 2, 2]))
    assert follower.last_index_at_most_term(6, 5) == 6
    assert leader.last_index_at_most_term(6, 2) == 1


def test_index_back_tracking_below_what_is_known() -> None:
    log = TermIndex(5, 3)
    log.append(EntrySpan.of(5, [4]))
    assert log.last_index_at_most_term(5, 2) == 3
    assert log.last_index_at_most_term(5, 3) == 4
    assert log.last_index_at_most_term(99, 9) == 5
    with pytest.raises(IndexError):
        log.last_index_at_most_term(3, 1)


def test_index_clip_gives_at_least_one_entry() -> None:
    log = TermIndex()
    log.append(EntrySpan.of(1, [1, 1, 1, 1], [10, 0, 10, 1]))
    assert log.clip(1, 5, 0) == 2
    assert log.clip(1, 5, 10) == 3
    assert log.clip(1, 5, 20) == 4
    assert log.clip(1, 5, 2**70) == 5
    assert log.clip(3, 3, 0) == 3
    assert log.clip(2, 5, 0) == 3


def test_index_sizes_must_fit() -> None:
    log = TermIndex()
    log.append(EntrySpan.of(1, [1], [2**63]))
    with pytest.raises(ProtocolError):
        log.append(EntrySpan.of(2, [1], [2**63]))
    assert log.last_index == 1


@st.composite
def operations(draw: st.DrawFn) -> list[tuple[str, int, list[int], list[int]]]:
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        name = draw(st.sampled_from(["append", "append", "truncate", "purge"]))
        rises = draw(st.lists(st.sampled_from([0, 0, 0, 1, 2]), max_size=8))
        sizes = draw(st.lists(st.integers(0, 20), min_size=len(rises), max_size=len(rises)))
        steps.append((name, draw(st.integers(0, 1000)), rises, sizes))
    return steps


@settings(max_examples=150, deadline=None)
@given(operations(), st.data())
def test_index_agrees_with_its_twin(steps: list[tuple[str, int, list[int], list[int]]], data: st.DataObject) -> None:
    first = data.draw(st.integers(1, 5))
    previous = data.draw(st.integers(0, 2)) if first > 1 else 0
    log, twin = TermIndex(first, previous), Twin(first, previous)
    for name, where, rises, sizes in steps:
        position = twin.first_index + where % (len(twin.terms) + 1)
        if name == "append":
            terms, term = [], max(1, twin.last_term)
            for rise in rises:
                term += rise
                terms.append(term)
            log.append(EntrySpan.of(log.last_index + 1, terms, sizes))
            twin.append(terms, sizes)
        elif name == "truncate":
            log.truncate(position)
            twin.truncate(position)
        else:
            log.purge(position)
            twin.purge(position)
        assert (log.first_index, log.last_index, log.last_term) == (twin.first_index, twin.last_index, twin.last_term)
    low, high = twin.first_index, twin.last_index
    assert [log.term_at(i) for i in range(low - 1, high + 1)] == [twin.term_at(i) for i in range(low - 1, high + 1)]
    a = data.draw(st.integers(low, high + 1))
    b = data.draw(st.integers(a, high + 1))
    limit = data.draw(st.integers(0, 60))
    assert log.span(a, b) == EntrySpan.of(a, twin.terms[a - low : b - low], twin.sizes[a - low : b - low])
    assert log.bytes(a, b) == twin.bytes(a, b)
    assert log.clip(a, b, limit) == twin.clip(a, b, limit)
    for term in range(twin.last_term + 2):
        for index in range(low - 1, high + 3):
            assert log.last_index_at_most_term(index, term) == twin.last_index_at_most_term(index, term)
    other_first = data.draw(st.integers(max(1, low - 2), high + 1))
    other = sorted(data.draw(st.lists(st.integers(1, 6), max_size=8)))
    assert log.first_conflict(EntrySpan.of(other_first, other)) == twin.first_conflict(other_first, other)
