"""Membership changes: against their twin, and every quorum before a step against every quorum after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from reference import membership as twin

from marble.errors import UsageError
from marble.raft.membership import Membership, change, check_members, leave
from marble.types import Change, ChangeKind, Members, Transition

NODES = range(1, 5)
TRANSITIONS = list(Transition)


def groups() -> Iterator[Members]:
    """All groups, not joint, of nodes 1 to 4."""
    for roles in product(("", "voter", "learner"), repeat=len(NODES)):
        voters, learners = (
            tuple(node for node, is_ in zip(NODES, roles, strict=True) if is_ == role) for role in ("voter", "learner")
        )
        if voters:
            yield Members(voters, (), learners)


def steps() -> Iterator[tuple[Change, ...]]:
    """All that may be asked of nodes 1 to 4 in one step, each named at most once."""
    for kinds in product((None, *ChangeKind), repeat=len(NODES)):
        yield tuple(Change(kind, node) for node, kind in zip(NODES, kinds, strict=True) if kind is not None)


def attempt(members: Members, changes: Sequence[Change], transition: Transition) -> Members | None:
    """What `members` become, or None if that was refused."""
    try:
        return change(members, changes, transition)
    except UsageError:
        return None


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_every_step_of_every_small_group_is_the_twins_and_keeps_quorums_together(transition: Transition) -> None:
    """Raft §6: no step may let the old and the new majority decide apart."""
    meet: dict[tuple[Members, Members], bool] = {}

    def quorums_meet(first: Members, second: Members) -> bool:
        pair = (Members(first.voters, first.outgoing), Members(second.voters, second.outgoing))
        if pair not in meet:
            meet[pair] = twin.quorums_meet(*pair)
        return meet[pair]

    taken = 0
    every = list(steps())
    for members in groups():
        for changes in every:
            after = attempt(members, changes, transition)
            assert after == twin.change(members, changes, transition), (members, changes)
            if after is None:
                continue
            taken += 1
            assert quorums_meet(members, after)
            if after.joint:
                left = leave(after)
                assert quorums_meet(after, left)
                assert not left.joint
                after = left
            roles = dict.fromkeys(after.voters, "voter") | dict.fromkeys(after.learners, "learner")
            assert roles == twin.roles_after(members, changes)
    assert taken > 1000


def test_nonsense_is_refused_and_says_which() -> None:
    group = Members((1, 2, 3), (), (4,))
    joint = change(group, [Change(ChangeKind.REMOVE, 1), Change(ChangeKind.ADD_VOTER, 4)], Transition.AUTO)
    assert joint == Members((2, 3, 4), (1, 2, 3), (), (), True)
    for members, changes, words in (
        (group, [Change(ChangeKind.REMOVE, 9)], "node 9 cannot be removed"),
        (group, [Change(ChangeKind.ADD_VOTER, 2)], "node 2 is a voter already"),
        (group, [Change(ChangeKind.ADD_LEARNER, 4)], "node 4 is a learner already"),
        (group, [Change(ChangeKind.ADD_VOTER, 0)], "node id 0"),
        (group, [Change(ChangeKind.ADD_VOTER, 7), Change(ChangeKind.REMOVE, 7)], "named twice"),
        (group, [Change(ChangeKind.REMOVE, node) for node in (1, 2, 3)], "last voter"),
        (group, [Change(ChangeKind.ADD_LEARNER, node) for node in (1, 2, 3)], "last voter"),
        (group, [], "no joint group"),
        (joint, [Change(ChangeKind.ADD_VOTER, 7)], "leave the joint group first"),
    ):
        for transition in Transition:
            with pytest.raises(UsageError, match=words):
                change(members, changes, transition)
    with pytest.raises(UsageError, match="no joint group"):
        leave(group)


nodes = st.integers(1, 12)


@settings(max_examples=300, deadline=None)
@given(
    st.frozensets(nodes, max_size=5),
    st.frozensets(nodes, max_size=5),
    st.frozensets(nodes, max_size=3),
    st.frozensets(nodes, max_size=3),
    st.booleans(),
)
def test_members_are_checked_by_the_rules_in_their_docstring(
    voters: frozenset[int],
    outgoing: frozenset[int],
    learners: frozenset[int],
    learners_next: frozenset[int],
    auto_leave: bool,
) -> None:
    members = Members(*(tuple(sorted(some)) for some in (voters, outgoing, learners, learners_next)), auto_leave)
    good = (
        not learners & (voters | outgoing)
        and learners_next <= outgoing - voters
        and (not outgoing or bool(voters))
        and (bool(outgoing) or not auto_leave)
    )
    if good:
        check_members(members)
        membership = Membership(members)
        assert membership.voters == tuple(sorted(voters | outgoing))
        assert membership.all == tuple(sorted(voters | outgoing | learners | learners_next))
        for node in range(1, 13):
            assert membership.is_voter(node) == (node in voters | outgoing)
            assert membership.is_member(node) == (node in membership.all)
            assert membership.peers(node) == [member for member in membership.all if member != node]
    else:
        with pytest.raises(UsageError):
            check_members(members)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 2**32), min_size=1, max_size=4), st.sampled_from(range(4)))
def test_members_out_of_order_or_bounds_are_refused(named: list[int], place: int) -> None:
    fields: list[tuple[int, ...]] = [(), (), (), ()]
    fields[place] = tuple(named)
    good = named == sorted(set(named)) and named[0] >= 1 and named[-1] < 2**32
    # Outgoing voters need new ones, and who is to become a learner has to be outgoing.
    if good and place in (0, 2):
        check_members(Members(*fields))
    else:
        with pytest.raises(UsageError):
            check_members(Members(*fields))


class Walk(RuleBasedStateMachine):
    """A group that changes again and again, as a leader would have it: each step from where the last one ended."""

    def __init__(self) -> None:
        super().__init__()
        self.members = Members((1,))
        self.before = self.members
        self.expected = {1: "voter"}

    @precondition(lambda self: not self.members.joint)
    @rule(
        kinds=st.dictionaries(st.integers(1, 7), st.sampled_from(ChangeKind), min_size=1, max_size=5),
        transition=st.sampled_from(TRANSITIONS),
    )
    def change(self, kinds: dict[int, ChangeKind], transition: Transition) -> None:
        """What makes no sense is refused and changes nothing."""
        changes = [Change(kind, node) for node, kind in kinds.items()]
        roles = twin.roles_after(self.members, changes)
        after = attempt(self.members, changes, transition)
        assert (after is None) == (roles is None)
        if after is not None and roles is not None:
            assert after == attempt(self.members, changes[::-1], transition), "the order of changes must not matter"
            self.before, self.members, self.expected = self.members, after, roles

    @precondition(lambda self: self.members.joint)
    @rule(transition=st.sampled_from(TRANSITIONS))
    def leave(self, transition: Transition) -> None:
        self.before, self.members = self.members, change(self.members, [], transition)
        assert not self.members.joint

    @invariant()
    def neighbours_meet(self) -> None:
        """Raft §6, safety: no two leaders of one term by the majorities of two neighbouring memberships."""
        assert twin.quorums_meet(self.before, self.members)

    @invariant()
    def nobody_is_lost_on_the_way(self) -> None:
        check_members(self.members)
        voters = {node for node, role in self.expected.items() if role == "voter"}
        assert set(self.members.voters) == voters
        learners = {*self.members.learners, *self.members.learners_next}
        assert learners == set(self.expected) - voters
        if not self.members.joint:
            assert set(self.members.all) == set(self.expected)


Walk.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestWalk = Walk.TestCase
