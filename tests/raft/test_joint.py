"""Joint consensus against counting: who decides in a group of two halves, for every set of nodes that say yes.

§6 of the paper: "Agreement (for elections and entry commitment) requires separate majorities from both the old and new
configurations." So do reads, leases and the check of the quorum.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, combinations

import pytest
from raft.paper import accept, carry_out, elect, make, message, of_kind

from marble.raft.messages import MessageKind, ReadState
from marble.types import HardState, Members, Role

JOINT_GROUPS = [
    Members((1, 2, 3), (1, 4, 5)),
    Members((2, 3), (1, 2, 3)),
    Members((1,), (1, 2, 3, 4)),
    Members((1, 2, 3, 4), (1,), learners=(6,)),
    Members((4, 5), (1, 2, 3), learners=(6,), learners_next=(3,)),
    Members((1, 2, 3), learners=(4, 5)),
]


def subsets(nodes: Iterable[int]) -> list[tuple[int, ...]]:
    found = list(nodes)
    return list(chain.from_iterable(combinations(found, size) for size in range(len(found) + 1)))


def decides(members: Members, nodes: set[int]) -> bool:
    """The oracle: a majority of either half, by counting."""
    halves = [half for half in (members.voters, members.outgoing) if half]
    return all(2 * sum(node in nodes for node in half) > len(half) for half in halves)


@pytest.mark.parametrize("members", JOINT_GROUPS, ids=str)
def test_agreement_requires_separate_majorities(members: Members) -> None:
    """§6: Agreement (for elections and entry commitment) requires separate majorities from both the old and new
    configurations: every set of acknowledgements, against counting.
    """
    for acceptors in subsets(node for node in members.all if node != 1):
        raft = elect(make(members=members))
        for acceptor in acceptors:
            raft.step(accept(acceptor, 1, 1))
        assert (raft.commit_index == 1) is decides(members, {1, *acceptors}), acceptors


@pytest.mark.parametrize("members", JOINT_GROUPS, ids=str)
def test_elections_require_separate_majorities(members: Members) -> None:
    """§6: The same of elections: every set of voters that grant, and the others refuse."""
    for granting in subsets(node for node in members.all if node != 1):
        raft = make(members=members)
        raft.campaign()
        carry_out(raft)
        for voter in members.all:
            if voter != 1:
                raft.step(message(MessageKind.REQUEST_VOTE_RESPONSE, voter, 1, reject=voter not in granting))
        expected = Role.LEADER if decides(members, {1, *granting}) else Role.FOLLOWER
        assert raft.role is expected, granting


@pytest.mark.parametrize("members", JOINT_GROUPS, ids=str)
def test_reads_require_separate_majorities(members: Members) -> None:
    """Thesis §6.4: A round of heartbeats confirms a read, and (§6.4.1) gives a lease, if a quorum answers it."""
    for answering in subsets(node for node in members.all if node != 1):
        raft = make(members=members, lease_reads=True)
        for _ in range(10):
            raft.tick()
        raft = elect(raft)
        for peer in members.all:
            if peer != 1:
                raft.step(accept(peer, raft.term, 1))
        carry_out(raft)
        raft.read_index(7, now_us=1)
        context = of_kind(carry_out(raft), MessageKind.HEARTBEAT)[0].context
        for peer in answering:
            raft.step(message(MessageKind.HEARTBEAT_RESPONSE, peer, raft.term, context=context))
        confirmed = decides(members, {1, *answering})
        assert (ReadState(7, 1) in raft.ready().reads) is confirmed, answering
        assert (raft.lease_until_us > 0) is confirmed, answering


@pytest.mark.parametrize("members", JOINT_GROUPS, ids=str)
def test_check_of_the_quorum_requires_separate_majorities(members: Members) -> None:
    """Thesis §6.2: A leader steps down if an election timeout elapses without a successful round of heartbeats."""
    for answering in subsets(node for node in members.all if node != 1):
        raft = elect(make(members=members))
        for peer in members.all:
            if peer != 1:
                raft.step(accept(peer, 1, 1))
        for _ in range(10):
            raft.tick()
        assert raft.role is Role.LEADER
        for peer in answering:
            raft.step(message(MessageKind.HEARTBEAT_RESPONSE, peer, 1))
        for _ in range(10):
            raft.tick()
        assert (raft.role is Role.LEADER) is decides(members, {1, *answering}), answering


def test_who_refuses_a_vote_tells_what_is_committed() -> None:
    """A demoted leader with a longer log refuses the one voter that is left, which does not know that it is alone.

    Its refusal says how far the log is committed, and that ends the joint group (raft-rs: commit by vote).
    """
    joint = Members((2,), (1,), learners_next=(1,), auto_leave=True)
    left = Members((2,), learners=(1,))
    candidate = make(2, log=[1, 1], hard_state=HardState(1, 0, 1), members=joint, changes=[2])
    demoted = make(1, log=[1, 1, 1], hard_state=HardState(1, 0, 2), members=joint, changes=[2])
    demoted.ready()
    demoted.apply_membership(left)
    demoted.applied(2)
    carry_out(candidate)
    candidate.campaign()
    (request,) = carry_out(candidate)
    demoted.step(request)
    (refusal,) = carry_out(demoted)
    assert (refusal.reject, refusal.commit, refusal.reject_hint) == (True, 2, 1)
    candidate.step(refusal)
    assert (candidate.role, candidate.commit_index) == (Role.FOLLOWER, 2)
    candidate.ready()
    candidate.apply_membership(left)
    candidate.applied(2)
    candidate.campaign()
    carry_out(candidate)
    assert candidate.role is Role.LEADER


def test_a_commit_index_of_another_log_is_not_believed() -> None:
    raft = make(log=[1, 1, 2], hard_state=HardState(2, 0, 1))
    raft.step(message(MessageKind.REQUEST_VOTE, 2, 3, log_index=3, log_term=3, commit=3, reject_hint=3))
    assert raft.commit_index == 1
    raft.step(message(MessageKind.REQUEST_VOTE, 3, 4, log_index=3, log_term=2, commit=2, reject_hint=1))
    assert raft.commit_index == 2
