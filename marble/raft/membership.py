"""Who takes part, and how that changes (Raft §6; thesis §4).

Every question about the group ("who votes", "whom do we replicate to", "what is committed") is asked here and nowhere
else. A change takes effect when it is applied, as in etcd, and one at a time, so at any moment two configurations at
most are in use, and any two neighbours share a node in every pair of quorums: `change` makes no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from marble.errors import UsageError
from marble.raft import quorum
from marble.raft.quorum import VoteResult
from marble.types import MEMBERS_MAX, NODE_ID_MAX, Change, ChangeKind, Members, Transition


class Membership:
    """Decisions of one group's members. Never changes once made.

    Without voters (a node that waits to be added to a group) nobody is elected and nothing is decided.
    """

    __slots__ = ("_all", "_voting", "members")

    def __init__(self, members: Members) -> None:
        check_members(members)
        self.members = members
        self._all = members.all
        self._voting = tuple(sorted({*members.voters, *members.outgoing}))

    @property
    def voters(self) -> tuple[int, ...]:
        """All who vote, in whichever half of a joint group, ascending."""
        return self._voting

    def is_voter(self, node: int) -> bool:
        """Whether `node` votes and may lead."""
        return node in self._voting

    def is_member(self, node: int) -> bool:
        """Whether `node` belongs to the group in any capacity."""
        return node in self._all

    @property
    def all(self) -> tuple[int, ...]:
        """Every member, ascending: the order in which peers are always visited."""
        return self._all

    def peers(self, node: int) -> list[int]:
        """All to whom `node` replicates when it leads."""
        return [member for member in self._all if member != node]

    def majority_index(self, indexes: Mapping[int, int]) -> int:
        """The largest index that a quorum has reached: of a joint group, a majority of either half."""
        return quorum.joint_index(self.members.voters, self.members.outgoing, indexes)

    def vote_result(self, votes: Mapping[int, bool]) -> VoteResult:
        """How `votes` stand."""
        return quorum.joint_vote(self.members.voters, self.members.outgoing, votes)


def members_of(voters: Iterable[int]) -> Members:
    """A group of these voters alone. Raises UsageError if one is named twice."""
    given = list(voters)
    if len(set(given)) != len(given):
        raise UsageError(f"a voter is named twice in {given}")
    return Members(tuple(sorted(given)))


def check_members(members: Members) -> None:
    """Raise UsageError unless `members` keeps to the rules in the docstring of `Members`."""
    for name in ("voters", "outgoing", "learners", "learners_next"):
        nodes = getattr(members, name)
        if any(first >= second for first, second in pairwise(nodes)):
            raise UsageError(f"{name} {nodes} does not ascend, or names a node twice")
        if nodes and not 1 <= nodes[0] <= nodes[-1] <= NODE_ID_MAX:
            raise UsageError(f"{name} {nodes} are not all within 1 to {NODE_ID_MAX}")
    voters, outgoing = set(members.voters), set(members.outgoing)
    if set(members.learners) & (voters | outgoing):
        raise UsageError(f"a learner of {members} votes")
    if set(members.learners_next) - (outgoing - voters):
        raise UsageError(f"a learner to be of {members} is not one that leaves the voters")
    if members.joint and not voters:
        raise UsageError("a joint group needs voters to go on with")
    if members.auto_leave and not members.joint:
        raise UsageError("only a joint group can be left")
    if len(members.all) > MEMBERS_MAX:
        raise UsageError(f"a group of {len(members.all)}: at most {MEMBERS_MAX} nodes may take part")


def change(members: Members, changes: Sequence[Change], transition: Transition) -> Members:
    """What `members` become by `changes`; by none at all, a joint group is left.

    Raises
    ------
    UsageError
        The changes make no sense for these members: it says which and why.
    """
    if not changes:
        return leave(members)
    if members.joint:
        raise UsageError("the group is between two memberships: leave the joint group first")
    named = [each.node for each in changes]
    if len(set(named)) != len(named):
        raise UsageError(f"a node is named twice in the changes of {sorted(named)}")
    for each in changes:
        _check_change(members, each)
    voters = {*members.voters, *(c.node for c in changes if c.kind is ChangeKind.ADD_VOTER)}
    voters -= {c.node for c in changes if c.kind is not ChangeKind.ADD_VOTER}
    if not voters:
        raise UsageError("the last voter cannot go: nobody could add another")
    learners = set(members.learners) - set(named)
    becoming = {c.node for c in changes if c.kind is ChangeKind.ADD_LEARNER}
    if transition is Transition.AUTO and len(voters ^ set(members.voters)) <= 1:
        result = Members(tuple(sorted(voters)), (), tuple(sorted(learners | becoming)))
    else:
        # A voter that is to become a learner still votes in the outgoing half.
        result = Members(
            voters=tuple(sorted(voters)),
            outgoing=members.voters,
            learners=tuple(sorted(learners | (becoming - set(members.voters)))),
            learners_next=tuple(sorted(becoming & set(members.voters))),
            auto_leave=transition is not Transition.EXPLICIT,
        )
    check_members(result)
    return result


def leave(members: Members) -> Members:
    """The second half of a joint group alone. Raises UsageError if it is not joint."""
    if not members.joint:
        raise UsageError("no changes, and no joint group to be left")
    return Members(members.voters, (), tuple(sorted({*members.learners, *members.learners_next})))


def _check_change(members: Members, each: Change) -> None:
    if not 1 <= each.node <= NODE_ID_MAX:
        raise UsageError(f"node id {each.node} is not within 1 to {NODE_ID_MAX}")
    if each.kind is ChangeKind.REMOVE and each.node not in members.all:
        raise UsageError(f"node {each.node} cannot be removed: the members are {list(members.all)}")
    if each.kind is ChangeKind.ADD_VOTER and each.node in members.voters:
        raise UsageError(f"node {each.node} is a voter already")
    if each.kind is ChangeKind.ADD_LEARNER and each.node in members.learners:
        raise UsageError(f"node {each.node} is a learner already")
