"""Quorums, joint ones too, against the definition: every subset of up to five voters and five outgoing ones."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.membership import is_quorum, quorums_meet, subsets

from marble.raft.membership import Membership
from marble.raft.quorum import VoteResult
from marble.types import Members

HALF_MAX = 5


def shapes() -> Iterator[Members]:
    """One group of each size, and one joint group of each two sizes and each number of nodes in both halves.

    Which nodes these are makes no difference to a majority.
    """
    for count in range(1, HALF_MAX + 1):
        yield Members(tuple(range(1, count + 1)))
        for outgoing in range(1, HALF_MAX + 1):
            for both in range(min(count, outgoing) + 1):
                first = count - both + 1
                yield Members(tuple(range(1, count + 1)), tuple(range(first, first + outgoing)))


SHAPES = list(shapes())


def name(members: Members) -> str:
    return f"{len(members.voters)}+{len(members.outgoing)}-{len(members.all)}"


def test_the_shapes_are_all_there_are() -> None:
    assert len(SHAPES) == 5 + sum(min(a, b) + 1 for a in range(1, 6) for b in range(1, 6))
    assert all(len({*members.voters, *members.outgoing}) <= 10 for members in SHAPES)


@pytest.mark.parametrize("members", SHAPES, ids=name)
def test_exactly_the_quorums_commit_and_elect(members: Members) -> None:
    membership = Membership(members)
    for some in subsets(members.all):
        quorum = is_quorum(members, some)
        assert membership.majority_index(dict.fromkeys(some, 7)) == (7 if quorum else 0)
        granted = dict.fromkeys(some, True)
        # The others say nothing; or they all say no; or what these said was no.
        could_win = VoteResult.WON if quorum else VoteResult.PENDING
        assert membership.vote_result(granted) is could_win
        refused = dict.fromkeys(set(members.all) - some, False)
        assert membership.vote_result(granted | refused) is (VoteResult.WON if quorum else VoteResult.LOST)


@pytest.mark.parametrize("members", SHAPES, ids=name)
def test_any_two_quorums_of_a_group_meet(members: Members) -> None:
    assert quorums_meet(members, members)


@pytest.mark.parametrize("members", [members for members in SHAPES if members.joint], ids=name)
def test_a_joint_group_meets_the_groups_before_and_after_it(members: Members) -> None:
    assert quorums_meet(Members(members.outgoing), members)
    assert quorums_meet(members, Members(members.voters))


def test_the_oracle_sees_two_quorums_that_do_not_meet() -> None:
    assert not quorums_meet(Members((1, 2, 3)), Members((3, 4, 5)))
    assert not quorums_meet(Members((1, 2, 3)), Members((1, 4, 5)))
    assert not quorums_meet(Members((1,)), Members((1, 2, 3)))
    # One voter more or less is safe, whatever the number was.
    for count in range(1, 8):
        assert quorums_meet(Members(tuple(range(1, count + 1))), Members(tuple(range(1, count + 2))))


@pytest.mark.parametrize("members", [members for members in SHAPES if len(members.all) <= 5], ids=name)
def test_a_vote_is_decided_exactly_when_no_answer_could_change_it(members: Members) -> None:
    membership = Membership(members)
    for said in product((True, False, None), repeat=len(members.all)):
        votes = {node: vote for node, vote in zip(members.all, said, strict=True) if vote is not None}
        silent = [node for node in members.all if node not in votes]
        ends = {
            membership.vote_result(votes | dict.fromkeys(some, True) | dict.fromkeys(set(silent) - some, False))
            for some in subsets(silent)
        }
        assert VoteResult.PENDING not in ends
        assert membership.vote_result(votes) is (ends.pop() if len(ends) == 1 else VoteResult.PENDING)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SHAPES), st.dictionaries(st.integers(1, 12), st.integers(0, 4)))
def test_the_committed_index_is_the_largest_that_a_quorum_reached(members: Members, indexes: dict[int, int]) -> None:
    def reached(index: int) -> frozenset[int]:
        return frozenset(node for node in members.all if indexes.get(node, 0) >= index)

    index = Membership(members).majority_index(indexes)
    assert index == max(index for index in range(5) if is_quorum(members, reached(index)))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SHAPES), st.dictionaries(st.integers(1, 12), st.booleans()), st.integers(1, 12), st.booleans())
def test_one_more_answer_never_takes_a_decision_back(
    members: Members, votes: dict[int, bool], node: int, vote: bool
) -> None:
    membership = Membership(members)
    before = membership.vote_result(votes)
    after = membership.vote_result({node: vote} | votes)
    assert before is VoteResult.PENDING or after is before
