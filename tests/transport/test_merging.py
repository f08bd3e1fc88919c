"""Appends that have gathered: merged they say what they said one by one."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble._core.term_index import EntrySpan
from marble.members import encode_members
from marble.raft.messages import Message, MessageKind
from marble.transport.codec import Codec, Envelope
from marble.transport.merging import MERGED_BYTES_MAX, merge_appends
from marble.types import EntryKind, Members

ONE, TWO = Codec("c", 1, 1 << 30), Codec("c", 2, 1 << 30)


def append(
    before: int, rows: int, *, log_term: int = 1, term: int = 1, group: int = 0, commit: int = 0, size: int = 64
) -> Envelope:
    if not rows:
        message = Message(
            MessageKind.APPEND_ENTRIES, 1, 2, term, before, log_term, commit, EntrySpan.of(before + 1, [])
        )
        return Envelope(group, message)
    proposals = [Proposal(EntryKind.WRITE, 1, pa.py_buffer(bytes(size)), 0, at) for at in range(rows)]
    batch = entry_batch.build(group, before + 1, term, proposals)
    message = Message(MessageKind.APPEND_ENTRIES, 1, 2, term, before, log_term, commit, entry_batch.span(batch))
    return Envelope(group, message, batch)


def beat(commit: int) -> Envelope:
    return Envelope(0, Message(MessageKind.HEARTBEAT, 1, 2, 1, commit=commit))


def test_appends_that_follow_on_one_another_become_one() -> None:
    sent = [append(4, 2, commit=1), append(6, 1, commit=3), append(7, 0, commit=5), append(7, 3, commit=5)]
    (got,) = merge_appends(sent)
    assert got.batch is not None
    assert got.batch.equals(entry_batch.concat([each.batch for each in sent if each.batch is not None]))
    assert got.message.entries == entry_batch.span(got.batch)
    assert (got.message.log_index, got.message.log_term, got.message.commit) == (4, 1, 5)
    # It is a message like any other.
    (packet,) = ONE.encode(2, [got])
    assert TWO.decode(1, *packet)[0].message == got.message


@pytest.mark.parametrize(
    "second",
    [
        append(7, 1),
        append(5, 1),
        append(4, 2),
        append(6, 1, term=2),
        append(6, 1, term=2, log_term=2),
        append(6, 1, group=1),
        append(6, 1, size=MERGED_BYTES_MAX),
        beat(7),
    ],
    ids=["gap", "overlap", "again", "later term", "other entry before", "other group", "large", "other kind"],
)
def test_others_stay_apart(second: Envelope) -> None:
    first = append(4, 2)
    assert merge_appends([first, second]) == [first, second]


def test_groups_and_other_messages_do_not_come_between() -> None:
    sent = [append(0, 1), append(0, 1, group=1), beat(1), append(1, 1), append(1, 1, group=1), beat(2)]
    got = merge_appends(sent)
    assert [(each.group, each.message.kind, len(each.message.entries or ())) for each in got] == [
        (0, MessageKind.APPEND_ENTRIES, 2),
        (1, MessageKind.APPEND_ENTRIES, 2),
        (0, MessageKind.HEARTBEAT, 0),
        (0, MessageKind.HEARTBEAT, 0),
    ]


def test_changes_of_the_membership_are_still_named() -> None:
    members = encode_members(Members((1, 2)), {1: "h:1", 2: "h:2"})
    batch = entry_batch.build(0, 2, 1, [Proposal(EntryKind.MEMBERSHIP, 0, members)])
    span = entry_batch.span(batch)
    change = Envelope(0, Message(MessageKind.APPEND_ENTRIES, 1, 2, 1, 1, 1, 0, span, changes=(2,)), batch)
    (got,) = merge_appends([append(0, 1, log_term=0), change, append(2, 1)])
    assert got.message.changes == (2,)
    (packet,) = ONE.encode(2, [got])
    assert TWO.decode(1, *packet)[0].message == got.message


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.booleans(), st.booleans()), max_size=30))
def test_a_follower_ends_with_the_same_entries_and_commits(steps: list[tuple[int, int, bool, bool]]) -> None:
    """Appends of several groups, each from where the last one ended, or one that starts anew, and terms that rise."""
    places = {group: [0, 0, 1] for group in range(3)}
    sent = []
    for group, rows, anew, rise in steps:
        place = places[group]
        if anew:
            place[:2] = 0, 0
        place[2] += rise
        before, log_term, term = place
        sent.append(append(before, rows, log_term=log_term, term=term, group=group, commit=before))
        if rows:
            place[:2] = before + rows, term
    merged = merge_appends(sent)
    assert len(merged) <= len(sent)
    assert replay(merged) == replay(sent)


def replay(envelopes: list[Envelope]) -> dict[int, tuple[list[tuple[int, int, int]], int]]:
    """Of each group the entries in the order in which they come, with where they go; and the highest commit index."""
    state: dict[int, tuple[list[tuple[int, int, int]], int]] = {}
    for group, message, batch in envelopes:
        rows, commit = state.setdefault(group, ([], 0))
        if batch is not None:
            rows += zip(*(batch.column(name).to_pylist() for name in ("index", "term", "sequence")), strict=True)
        state[group] = rows, max(commit, message.commit)
    return state
