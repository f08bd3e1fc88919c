"""The edges of membership, snapshots, transfers and leases: what is refused, and what a Ready promises of them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from raft.paper import accept, append, carry_out, commit_noop, make, make_leader, message, of_kind

from marble._core.term_index import EntrySpan, TermIndex
from marble.errors import CorruptionError, InvariantError, NotLeaderError, ProtocolError, UnavailableError, UsageError
from marble.raft.core import MemoryStorage, Raft, RaftConfig
from marble.raft.messages import PRIORITY_MAX, MembershipProposed, Message, MessageKind, ReadState, Span
from marble.raft.reads import ROUNDS_MAX
from marble.types import MEMBERS_MAX, Change, ChangeKind, HardState, Members, Role, SnapshotMeta, Transition

GROUP = Members((1, 2, 3))


def add(node: int) -> Change:
    return Change(ChangeKind.ADD_VOTER, node)


def learn(node: int) -> Change:
    return Change(ChangeKind.ADD_LEARNER, node)


def remove(node: int) -> Change:
    return Change(ChangeKind.REMOVE, node)


# What a core may be made from.


@pytest.mark.parametrize(
    "options",
    [
        {"priority": -1},
        {"priority": PRIORITY_MAX + 1},
        {"lease_reads": True, "check_quorum": False},
        {"clock_drift": -0.1},
        {"clock_drift": 0.5},
        {"tick_us": 0},
        {"quiesce_ticks": -1},
    ],
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        make(**options)


@pytest.mark.parametrize(
    "members",
    [
        Members((2, 1)),
        Members((1, 1)),
        Members((0, 1)),
        Members((1, 2**32)),
        Members((1, 2), learners=(2,)),
        Members((1,), (1, 2), learners=(2,)),
        Members((1, 2), (1, 2), learners_next=(2,)),
        Members((1, 2), learners_next=(3,)),
        Members((), (1, 2)),
        Members((1, 2), auto_leave=True),
        Members(tuple(range(1, MEMBERS_MAX + 2))),
    ],
    ids=str,
)
def test_members_that_cannot_be_are_refused(members: Members) -> None:
    with pytest.raises(UsageError):
        make(members=members)


def make_config() -> RaftConfig:
    return RaftConfig(1, 10, 1, random=random.Random(1), pre_vote=False)


def test_log_that_no_snapshot_leads_up_to_is_refused() -> None:
    entries = TermIndex(11, 4)
    entries.append(EntrySpan.of(11, [4]))
    storage = MemoryStorage(entries, voters=(1, 2))
    assert (storage.snapshot, storage.applied_index) == (SnapshotMeta(10, 4, Members((1, 2))), 10)
    for snapshot in (None, SnapshotMeta(9, 4, Members((1, 2)))):
        storage.snapshot = snapshot
        with pytest.raises(CorruptionError, match="the log starts at 11"):
            Raft(make_config(), storage)


def test_snapshot_behind_which_the_log_keeps_a_tail() -> None:
    entries = TermIndex(3, 1)
    entries.append(EntrySpan.of(3, [1, 1, 2, 2]))
    meta = SnapshotMeta(4, 1, GROUP)
    storage = MemoryStorage(entries, HardState(2, 0, 5), snapshot=meta, changes=(2, 6))
    assert (storage.applied_index, storage.members) == (4, GROUP)
    raft = Raft(make_config(), storage)
    assert (raft.snapshot, raft.members, raft.applied_index, raft.commit_index) == (meta, GROUP, 4, 5)
    assert raft.ready().committed == Span(5, 6)


def test_node_of_a_group_that_it_does_not_know_yet() -> None:
    raft = make(4, members=Members())
    raft.campaign(force=True)
    assert (raft.role, raft.voters, raft.members) == (Role.FOLLOWER, (), Members())
    with pytest.raises(NotLeaderError):
        raft.propose_membership([add(4)])
    with pytest.raises(NotLeaderError):
        raft.transfer_leadership(4)


# Messages.


def test_priority_of_a_message_is_bounded() -> None:
    for priority in (-1, PRIORITY_MAX + 1):
        with pytest.raises(ProtocolError, match="priority"):
            message(MessageKind.REQUEST_VOTE, 2, 1, priority=priority)


def test_members_come_with_install_snapshot_only_and_always() -> None:
    with pytest.raises(ProtocolError, match="INSTALL_SNAPSHOT with no members"):
        message(MessageKind.INSTALL_SNAPSHOT, 2, 1)
    with pytest.raises(ProtocolError, match="HEARTBEAT with members"):
        message(MessageKind.HEARTBEAT, 2, 1, members=GROUP)


@pytest.mark.parametrize("changes", [(1,), (5,), (3, 3), (4, 3)])
def test_changes_are_ascending_indexes_of_the_entries(changes: tuple[int, ...]) -> None:
    good = append(2, 1, 1, 1, [1, 1, 1])
    assert replace(good, changes=(2, 4)).changes == (2, 4)
    with pytest.raises(ProtocolError, match="changes"):
        replace(good, changes=changes)


@pytest.mark.parametrize(
    "rival",
    [
        message(MessageKind.INSTALL_SNAPSHOT, 3, 1, log_index=9, log_term=1, members=GROUP),
        message(MessageKind.QUIESCE, 3, 1),
        message(MessageKind.SNAPSHOT_FETCH, 2, 1),
        message(MessageKind.SNAPSHOT_PIECE, 2, 1),
        message(MessageKind.INSTALL_SNAPSHOT, 2, 0, log_index=9, members=GROUP),
        message(MessageKind.QUIESCE, 2, 0),
    ],
    ids=lambda rival: f"{rival.kind.name}-{rival.sender}-{rival.term}",
)
def test_message_that_no_correct_member_sends_changes_nothing(rival: Message) -> None:
    raft = make(quiesce_ticks=5)
    raft.step(append(2, 1, 0, 0, [1]))
    carry_out(raft)
    raft.step(message(MessageKind.QUIESCE, 2, 1, log_index=1, log_term=1))
    carry_out(raft)
    assert raft.quiesced
    with pytest.raises(ProtocolError):
        raft.step(rival)
    assert raft.quiesced
    assert (raft.leader, raft.term, raft.last_index, raft.members) == (2, 1, 1, GROUP)
    assert not raft.has_ready()


# Membership.


def test_entry_of_a_change_is_announced_with_its_entries() -> None:
    raft = make_leader()
    commit_noop(raft)
    assert raft.propose_membership([learn(4)]).index == 2
    ready = raft.ready()
    assert ready.append == Span(2, 3)
    assert ready.memberships == (MembershipProposed(2, 1, Members((1, 2, 3), learners=(4,))),)
    assert {m.changes for m in ready.messages} == {(2,)}
    assert raft.ready().memberships == ()


def test_change_that_was_replaced_before_any_ready_is_not_announced() -> None:
    raft = make_leader()
    commit_noop(raft)
    raft.propose_membership([remove(3)])
    raft.step(append(3, 2, 1, 1, [2]))
    ready = raft.ready()
    assert (ready.memberships, ready.append) == ((), Span(2, 3))
    # Nothing of it is left: the next leader's entry at its place changes nothing.
    assert raft.log.changes == []


def test_changes_go_with_the_entries_that_a_truncation_takes() -> None:
    raft = make(log=[1, 1, 1], changes=(2,))
    raft.step(append(2, 2, 1, 1, [2, 2]))
    assert raft.log.changes == []
    raft.step(replace(append(2, 2, 3, 2, [2]), changes=(4,)))
    assert raft.log.changes == [4]


def test_leader_sends_on_which_of_the_entries_change_the_members() -> None:
    raft = make_leader(log=[1, 1, 1, 1], changes=(2, 4))
    sent = []
    raft.step(message(MessageKind.APPEND_ENTRIES_RESPONSE, 2, 2, log_index=4, reject=True, reject_hint=1, log_term=1))
    sent += of_kind(carry_out(raft), MessageKind.APPEND_ENTRIES)
    raft.step(message(MessageKind.APPEND_ENTRIES_RESPONSE, 3, 2, log_index=4, reject=True, reject_hint=2, log_term=1))
    sent += of_kind(carry_out(raft), MessageKind.APPEND_ENTRIES)
    assert [(m.to, m.log_index, m.changes) for m in sent] == [(2, 1, (2, 4)), (3, 2, (4,))]


@pytest.mark.parametrize("transition", list(Transition))
def test_simple_or_joint(transition: Transition) -> None:
    raft = make_leader()
    commit_noop(raft)
    raft.propose_membership([add(4)], transition)
    members = raft.ready().memberships[0].members
    if transition is Transition.AUTO:
        assert members == Members((1, 2, 3, 4))
    else:
        assert members == Members((1, 2, 3, 4), (1, 2, 3), auto_leave=transition is Transition.JOINT)


def test_change_of_two_voters_is_joint_whatever_is_asked() -> None:
    raft = make_leader()
    commit_noop(raft)
    raft.propose_membership([add(4), remove(2)])
    assert raft.ready().memberships[0].members == Members((1, 3, 4), (1, 2, 3), auto_leave=True)


def test_group_is_bounded() -> None:
    raft = make_leader(members=Members((1, 2), learners=tuple(range(3, MEMBERS_MAX + 1))))
    commit_noop(raft)
    with pytest.raises(UsageError, match="at most"):
        raft.propose_membership([learn(MEMBERS_MAX + 1)])
    raft.propose_membership([add(3)])


def test_no_change_during_a_transfer_or_without_the_lead() -> None:
    raft = make_leader()
    commit_noop(raft)
    raft.transfer_leadership(2)
    with pytest.raises(UnavailableError):
        raft.propose_membership([add(4)])
    with pytest.raises(NotLeaderError):
        make().propose_membership([add(4)])


def test_new_member_is_not_taken_for_silent_at_once() -> None:
    raft = make_leader(voters=2)
    commit_noop(raft)
    raft.propose_membership([add(3)])
    carry_out(raft)
    raft.election_elapsed = 9
    raft.step(accept(2, 1, 2))
    carry_out(raft)
    # Of three now; node 2 was heard, too.
    raft.tick()
    assert raft.role is Role.LEADER
    for _ in range(10):
        raft.tick()
    assert raft.role is Role.FOLLOWER


def test_reads_of_who_was_removed_as_leader_are_to_be_asked_again() -> None:
    raft = make_leader()
    commit_noop(raft)
    raft.propose_membership([remove(1)])
    carry_out(raft)
    raft.read_index(7)
    raft.step(message(MessageKind.READ_INDEX, 3, 1, context=9))
    carry_out(raft)
    raft.step(accept(2, 1, 2))
    answers: list[ReadState] = []
    sent: list[Message] = []
    while raft.has_ready():
        ready = raft.ready()
        raft.persisted(ready.number)
        answers += ready.reads
        sent += [*ready.messages, *ready.messages_after_persist]
        if ready.committed:
            raft.apply_membership(Members((2, 3)))
            raft.applied(ready.committed.end - 1)
    assert answers == [ReadState(7, 0)]
    assert [(m.to, m.reject, m.context) for m in of_kind(sent, MessageKind.READ_INDEX_RESPONSE)] == [(3, True, 9)]


def test_candidate_that_is_removed_stops() -> None:
    raft = make()
    raft.campaign()
    raft.apply_membership(Members((2, 3)))
    assert raft.role is Role.FOLLOWER
    raft.step(message(MessageKind.REQUEST_VOTE_RESPONSE, 2, 1))
    assert raft.role is Role.FOLLOWER


def test_change_that_makes_the_quorum_smaller_confirms_reads() -> None:
    raft = make_leader(voters=4)
    commit_noop(raft)
    raft.propose_membership([remove(4)])
    carry_out(raft)
    raft.read_index(1)
    context = of_kind(carry_out(raft), MessageKind.HEARTBEAT)[0].context
    raft.step(message(MessageKind.HEARTBEAT_RESPONSE, 2, 1, context=context))
    assert raft.ready().reads == ()
    raft.step(accept(2, 1, 2))
    raft.step(accept(3, 1, 2))
    ready = raft.ready()
    assert (ready.committed, ready.reads) == (Span(2, 3), ())
    raft.apply_membership(Members((1, 2, 3)))
    raft.applied(2)
    assert raft.ready().reads == (ReadState(1, 1),)


# Snapshots.


def test_snapshot_is_taken_of_what_is_applied() -> None:
    raft = make_leader()
    commit_noop(raft)
    with pytest.raises(InvariantError):
        raft.snapshot_taken(SnapshotMeta(2, 1, GROUP))
    with pytest.raises(InvariantError):
        raft.purge(1)
    raft.snapshot_taken(SnapshotMeta(1, 1, GROUP))
    raft.purge(1)
    assert (raft.log.first_index, raft.log.term_at(1), raft.last_index) == (2, 1, 1)
    # An older one, finished late, does not replace it.
    raft.snapshot_taken(SnapshotMeta(0, 0, GROUP))
    assert raft.snapshot == SnapshotMeta(1, 1, GROUP)
    assert raft.propose([1]).index == 2


def test_ready_of_a_snapshot() -> None:
    raft = make(log=[1, 1, 1], hard_state=HardState(1, 0, 1))
    carry_out(raft)
    meta = SnapshotMeta(6, 2, Members((2, 3), learners=(1,)))
    raft.step(message(MessageKind.INSTALL_SNAPSHOT, 2, 2, log_index=6, log_term=2, members=meta.members))
    ready = raft.ready()
    assert (ready.snapshot, ready.append, ready.must_sync, ready.committed) == (meta, None, True, None)
    # The stored commit index never passes what is durable, and the log is not yet.
    assert ready.hard_state == HardState(2, 0, 1)
    assert raft.ready().snapshot is None
    raft.persisted(ready.number)
    assert raft.hard_state == HardState(2, 0, 6)
    assert raft.applied_index == 1
    raft.applied(6)
    raft.step(append(2, 2, 6, 2, [2], commit=7))
    ready = raft.ready()
    assert ready.append == Span(7, 8)
    raft.persisted(ready.number)
    assert raft.ready().committed == Span(7, 8)


def test_second_snapshot_before_the_first_is_durable() -> None:
    raft = make()
    for index in (5, 9):
        raft.step(message(MessageKind.INSTALL_SNAPSHOT, 2, 1, log_index=index, log_term=1, members=GROUP))
    ready = raft.ready()
    assert ready.snapshot == SnapshotMeta(9, 1, GROUP)
    raft.step(message(MessageKind.INSTALL_SNAPSHOT, 2, 1, log_index=12, log_term=1, members=GROUP))
    later = raft.ready()
    raft.persisted(ready.number)
    assert (raft.persisted_index, raft.commit_index) == (0, 12)
    raft.persisted(later.number)
    assert (raft.persisted_index, raft.commit_index, raft.hard_state.commit) == (12, 12, 12)


def test_applied_before_a_snapshot_is_no_news_after_it() -> None:
    raft = make(log=[1, 1], hard_state=HardState(1, 0, 2))
    assert raft.ready().committed == Span(1, 3)
    raft.step(message(MessageKind.INSTALL_SNAPSHOT, 2, 1, log_index=9, log_term=1, members=GROUP))
    raft.persisted(raft.ready().number)
    raft.applied(2)
    assert raft.applied_index == 2
    raft.applied(9)
    raft.applied(2)
    assert raft.applied_index == 9


def test_reports_of_snapshots_that_nobody_waits_for_change_nothing() -> None:
    raft = make_leader()
    commit_noop(raft)
    before = repr(raft.progress)
    for peer in (1, 2, 3, 9):
        raft.report_snapshot(peer, ok=True)
        raft.report_snapshot(peer, ok=False)
    raft.step(message(MessageKind.INSTALL_SNAPSHOT_RESPONSE, 2, 1, reject=True))
    assert repr(raft.progress) == before
    follower = make(2)
    follower.report_snapshot(1, ok=False)
    assert not follower.has_ready()


def test_acknowledgement_that_does_not_reach_the_log_leaves_a_snapshot_under_way() -> None:
    raft = make_leader(log=[2], snapshot=SnapshotMeta(7, 2, GROUP))
    refusal = {"log_index": 8, "reject": True, "reject_hint": 3, "log_term": 1}
    raft.step(message(MessageKind.APPEND_ENTRIES_RESPONSE, 3, 3, **refusal))
    assert [m.log_index for m in of_kind(carry_out(raft), MessageKind.INSTALL_SNAPSHOT)] == [7]
    raft.step(accept(3, 3, 5))
    assert of_kind(carry_out(raft), MessageKind.INSTALL_SNAPSHOT) == []
    assert repr(raft.progress[3]) == "snapshot match=5 next=6 snapshot=7"
    raft.step(accept(3, 3, 6))
    assert repr(raft.progress[3]) == "snapshot match=6 next=7 snapshot=7"
    raft.step(accept(3, 3, 7))
    assert of_kind(carry_out(raft), MessageKind.APPEND_ENTRIES)[0].log_index == 7


def test_rounds_that_nobody_answers_are_bounded() -> None:
    raft = make(lease_reads=True)
    raft.randomized_election_timeout = 10
    for _ in range(10):
        raft.tick()
    carry_out(raft)
    raft.step(message(MessageKind.REQUEST_VOTE_RESPONSE, 2, 1))
    carry_out(raft)
    commit_noop(raft)
    contexts = []
    for now_us in range(1, ROUNDS_MAX + 2):
        raft.read_index(now_us, now_us)
        contexts.append(of_kind(carry_out(raft), MessageKind.HEARTBEAT)[0].context)
    assert contexts == sorted(set(contexts))
    # The oldest is forgotten: its answer confirms a read, and gives no lease.
    raft.step(message(MessageKind.HEARTBEAT_RESPONSE, 2, 1, context=contexts[0]))
    assert raft.ready().reads == (ReadState(1, 1),)
    assert raft.lease_until_us == 0
    raft.step(message(MessageKind.HEARTBEAT_RESPONSE, 2, 1, context=contexts[1]))
    assert raft.lease_until_us > 0
