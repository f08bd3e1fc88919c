"""The slow and obvious twin of quorums and membership changes: sets of nodes, and every subset looked at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

from marble.types import Change, ChangeKind, Members, Transition

Nodes = frozenset[int]


def subsets(nodes: Iterable[int]) -> Iterator[Nodes]:
    """All subsets, the empty one first."""
    every = sorted(nodes)
    for count in range(len(every) + 1):
        yield from map(frozenset, combinations(every, count))


def is_quorum(members: Members, nodes: Nodes) -> bool:
    """Whether `nodes` may decide: more than half of the voters, and while joint more than half of the outgoing ones."""
    halves = [half for half in (members.voters, members.outgoing) if half]
    return bool(halves) and all(2 * len(nodes & set(half)) > len(half) for half in halves)


def quorums_meet(first: Members, second: Members) -> bool:
    """Whether every quorum of `first` has a node in common with every quorum of `second`.

    Whoever is in a quorum's company does no harm, so it is enough to look at each quorum and all others.
    """
    every = frozenset({*first.voters, *first.outgoing, *second.voters, *second.outgoing})
    return not any(is_quorum(first, some) and is_quorum(second, every - some) for some in subsets(every))


def roles_after(members: Members, changes: Sequence[Change]) -> dict[int, str] | None:
    """Node -> "voter" or "learner" once everything is over; None if the changes make no sense."""
    if members.outgoing or not changes:
        return None
    roles = dict.fromkeys(members.voters, "voter") | dict.fromkeys(members.learners, "learner")
    if len({change.node for change in changes}) < len(changes):
        return None
    for change in changes:
        wanted = {ChangeKind.ADD_VOTER: "voter", ChangeKind.ADD_LEARNER: "learner"}.get(change.kind)
        if roles.get(change.node) == wanted:
            return None  # It is that already; or it is to go, and is not there.
        if wanted is None:
            del roles[change.node]
        else:
            roles[change.node] = wanted
    return roles if "voter" in roles.values() else None


def change(members: Members, changes: Sequence[Change], transition: Transition) -> Members | None:
    """What `members` become, node by node; None if the changes make no sense."""
    roles = roles_after(members, changes)
    if roles is None:
        return None
    before, after = set(members.voters), {node for node, role in roles.items() if role == "voter"}
    learners = {node for node, role in roles.items() if role == "learner"}
    if transition is Transition.AUTO and (before == after or len(before - after) + len(after - before) == 1):
        return Members(tuple(sorted(after)), (), tuple(sorted(learners)))
    # Who votes in the outgoing half cannot be a learner before that is over.
    return Members(
        tuple(sorted(after)),
        tuple(sorted(before)),
        tuple(sorted(learners - before)),
        tuple(sorted(learners & before)),
        transition is not Transition.EXPLICIT,
    )
