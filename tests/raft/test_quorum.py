"""Majorities, against the definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marble.errors import InvariantError, UsageError
from marble.raft.membership import Membership, members_of
from marble.raft.quorum import VoteResult, majority_index, quorum_size, vote_result

voters_and_indexes = st.integers(1, 7).flatmap(
    lambda count: st.tuples(
        st.just(range(1, count + 1)), st.dictionaries(st.integers(1, count + 2), st.integers(0, 9), max_size=count + 2)
    )
)


@given(voters_and_indexes)
def test_majority_index_is_the_largest_that_a_majority_reached(case: tuple[range, dict[int, int]]) -> None:
    voters, indexes = case

    def reached(index: int) -> int:
        return sum(1 for voter in voters if indexes.get(voter, 0) >= index)

    index = majority_index(voters, indexes)
    assert reached(index) >= quorum_size(len(voters))
    assert reached(index + 1) < quorum_size(len(voters))


@given(st.integers(1, 7), st.dictionaries(st.integers(1, 9), st.booleans()))
def test_vote_is_decided_exactly_when_no_answer_could_change_it(count: int, votes: dict[int, bool]) -> None:
    voters = range(1, count + 1)
    silent = [voter for voter in voters if voter not in votes]
    granted = sum(1 for voter in voters if votes.get(voter))
    could_win = granted + len(silent) > count // 2
    has_won = granted > count // 2
    expected = VoteResult.WON if has_won else VoteResult.PENDING if could_win else VoteResult.LOST
    assert vote_result(voters, votes) is expected


def test_any_two_quorums_meet() -> None:
    for count in range(1, 10):
        assert 2 * quorum_size(count) > count


def test_nobody_is_no_quorum() -> None:
    with pytest.raises(InvariantError):
        majority_index((), {})
    with pytest.raises(InvariantError):
        vote_result((), {})


def test_membership_is_ordered_and_checked() -> None:
    membership = Membership(members_of([3, 1, 2]))
    assert membership.voters == (1, 2, 3)
    assert membership.peers(2) == [1, 3]
    for voters in ([1, 1], [0, 1], [2**32]):
        with pytest.raises(UsageError):
            Membership(members_of(voters))
