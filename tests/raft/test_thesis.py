"""One test for each sentence on membership, snapshots, transfers and leases that makes a promise which this core keeps.

"The paper" is the extended version of "In Search of an Understandable Consensus Algorithm", "thesis" Ongaro's. Where the
core takes etcd's way instead, the test says so; ``docs/raft.md`` says why.
"""

from __future__ import annotations

import pytest
from raft.paper import accept, append, carry_out, commit_noop, elect, make, make_leader, message, of_kind

from marble.errors import NotLeaderError, UnavailableError
from marble.raft.core import Raft
from marble.raft.messages import MessageKind, ReadState
from marble.types import Change, ChangeKind, HardState, Members, Role, SnapshotMeta

GROUP = Members((1, 2, 3))


def add(node: int) -> Change:
    return Change(ChangeKind.ADD_VOTER, node)


def remove(node: int) -> Change:
    return Change(ChangeKind.REMOVE, node)


# §6 Cluster membership changes


def test_log_entries_are_replicated_to_all_servers_in_both_configurations() -> None:
    """§6: Log entries are replicated to all servers in both configurations."""
    raft = elect(make(members=Members((1, 4), (1, 2, 3), learners=(6,))))
    for peer in raft.members.all:
        if peer != 1:
            raft.step(accept(peer, 1, 1))
    carry_out(raft)
    raft.propose([1])
    assert [m.to for m in of_kind(carry_out(raft), MessageKind.APPEND_ENTRIES)] == [2, 3, 4, 6]


def test_any_server_from_either_configuration_may_serve_as_leader() -> None:
    """§6: Any server from either configuration may serve as leader."""
    assert elect(make(1, members=Members((2, 3), (1, 2, 3)))).role is Role.LEADER
    assert elect(make(4, members=Members((3, 4), (1, 2, 3)))).role is Role.LEADER


def test_leader_steps_down_once_its_removal_is_committed() -> None:
    """§6: The leader steps down (returns to follower state) once it has committed the Cnew log entry."""
    raft = make_leader()
    commit_noop(raft)
    raft.propose_membership([remove(1)])
    carry_out(raft)
    assert raft.role is Role.LEADER
    raft.step(accept(2, 1, 2))
    sent = carry_out(raft)
    assert (raft.role, raft.leader, raft.members) == (Role.FOLLOWER, 0, Members((2, 3)))
    # The rest is told that it is committed before.
    assert (2, 2) in [(m.to, m.commit) for m in of_kind(sent, MessageKind.APPEND_ENTRIES)]


@pytest.mark.parametrize("kind", [MessageKind.REQUEST_VOTE, MessageKind.REQUEST_PRE_VOTE])
@pytest.mark.parametrize("silent_ticks", [0, 9, 10])
def test_requests_within_the_minimum_election_timeout_are_disregarded(kind: MessageKind, silent_ticks: int) -> None:
    """§6, thesis §4.2.3: If a server receives a RequestVote within the minimum election timeout of hearing from a current
    leader, it does not update its term or grant its vote.
    """
    raft = make()
    raft.step(append(2, 1, 0, 0))
    carry_out(raft)
    raft.randomized_election_timeout = 15
    for _ in range(silent_ticks):
        raft.tick()
    raft.step(message(kind, 3, 9))
    answers = carry_out(raft)
    assert [m.reject for m in answers] == ([False] if silent_ticks == 10 else [])
    assert raft.term == (9 if silent_ticks == 10 and kind is MessageKind.REQUEST_VOTE else 1)


# Thesis §4.1, §4.2


def test_one_change_at_a_time() -> None:
    """Thesis §4.1: The leader may not begin the next change before the previous one has committed; here: before it is
    applied, which is when it takes effect.
    """
    raft = make_leader()
    commit_noop(raft)
    raft.propose_membership([add(4)])
    with pytest.raises(UnavailableError):
        raft.propose_membership([add(5)])
    carry_out(raft)
    raft.step(accept(2, 1, 2))
    with pytest.raises(UnavailableError):
        raft.propose_membership([add(5)])
    carry_out(raft)
    assert raft.propose_membership([add(5)]).index == 3


@pytest.mark.parametrize("committed", [False, True])
def test_no_change_before_an_entry_of_the_own_term(committed: bool) -> None:
    """Ongaro, raft-dev, 10 July 2015: A leader may not append a configuration until it has committed an entry of its
    own term.
    """
    raft = make_leader(log=[1], hard_state=HardState(1, 0, 1))
    if committed:
        raft.step(accept(2, raft.term, 2))
        carry_out(raft)
        assert raft.propose_membership([remove(3)]).index == 3
    else:
        with pytest.raises(UnavailableError):
            raft.propose_membership([remove(3)])
        assert raft.last_index == 2


def test_change_takes_effect_when_applied() -> None:
    """Thesis §4.1 lets each server use the latest configuration in its log; etcd and this core the latest applied."""
    raft = make_leader()
    commit_noop(raft)
    raft.propose_membership([add(4)])
    carry_out(raft)
    assert raft.voters == (1, 2, 3)
    raft.step(accept(2, 1, 2))
    assert raft.voters == (1, 2, 3)
    carry_out(raft)
    assert raft.voters == (1, 2, 3, 4)


def test_new_server_joins_without_a_vote() -> None:
    """Thesis §4.2.1: The leader replicates log entries to it, but it is not counted towards majorities."""
    raft = elect(make(members=Members((1, 2), learners=(3, 4))))
    for learner in (3, 4):
        raft.step(accept(learner, 1, 1))
        raft.step(message(MessageKind.REQUEST_VOTE_RESPONSE, learner, 1))
    assert raft.commit_index == 0
    raft.step(accept(2, 1, 1))
    assert raft.commit_index == 1


def test_server_grants_votes_though_it_is_not_in_its_own_configuration() -> None:
    """§6: A server accepts requests whatever its configuration says of it or of the sender (etcd#10998)."""
    raft = make(4, members=Members((1, 2, 3)), log=[1])
    raft.step(message(MessageKind.REQUEST_VOTE, 9, 2, to=4, log_index=1, log_term=1))
    assert [m.reject for m in carry_out(raft)] == [False]
    raft.step(append(9, 2, 1, 1, [2], to=4))
    assert [m.log_index for m in carry_out(raft)] == [2]


def test_server_that_is_not_a_voter_starts_no_election() -> None:
    """Thesis §4.2.2: A server that is not part of its own latest configuration does not start elections (here, where
    that is committed by then, unlike in the thesis).
    """
    raft = make(4, members=Members((1, 2, 3), learners=(4,)))
    for _ in range(50):
        raft.tick()
    assert (raft.role, raft.term) == (Role.FOLLOWER, 0)


# §7 Log compaction


def install(index: int, term: int, members: Members = GROUP, leader_term: int = 5) -> Raft:
    raft = make(log=[1, 1, 2, 2], hard_state=HardState(4, 0, 1))
    carry_out(raft)
    raft.step(
        message(MessageKind.INSTALL_SNAPSHOT, 2, leader_term, log_index=index, log_term=term, members=members),
    )
    return raft


def test_snapshot_of_an_old_leader_is_refused() -> None:
    """§7, figure 13: 1. Reply immediately if term < currentTerm."""
    raft = install(9, 3, leader_term=3)
    assert (raft.commit_index, raft.log.terms()) == (1, [1, 1, 2, 2])
    assert [m.term for m in carry_out(raft)] == [4]


@pytest.mark.parametrize(("index", "term"), [(2, 1), (3, 2), (4, 2)])
def test_entries_after_a_snapshot_that_matches_are_retained(index: int, term: int) -> None:
    """§7, figure 13: 6. If existing log entry has same index and term as snapshot's last included entry, retain log
    entries following it and reply.
    """
    raft = install(index, term)
    assert raft.log.terms() == [1, 1, 2, 2]
    assert raft.commit_index == index
    assert [m.log_index for m in carry_out(raft)] == [index]


@pytest.mark.parametrize(("index", "term"), [(2, 2), (4, 3), (5, 2), (9, 5)])
def test_log_is_discarded_for_a_snapshot_that_does_not_match(index: int, term: int) -> None:
    """§7, figure 13: 7. Discard the entire log. 8. Reset state machine, and load snapshot's cluster configuration."""
    members = Members((1, 2, 4), learners=(3,))
    raft = install(index, term, members)
    assert (raft.log.terms(), raft.log.first_index, raft.members) == ([], index + 1, members)
    ready = raft.ready()
    assert ready.snapshot == SnapshotMeta(index, term, members)
    assert (ready.must_sync, ready.append, ready.messages) == (True, None, ())
    # What it acknowledges is durable only with this Ready.
    assert [(m.kind, m.log_index) for m in ready.messages_after_persist] == [
        (MessageKind.APPEND_ENTRIES_RESPONSE, index)
    ]


def test_committed_entries_are_never_discarded_for_a_snapshot() -> None:
    """§7: If the follower receives a snapshot that describes a prefix of its log, entries covered by it are kept when
    they are committed; it could only repeat what this node has.
    """
    raft = make(log=[1, 1], hard_state=HardState(1, 0, 2))
    raft.step(message(MessageKind.INSTALL_SNAPSHOT, 2, 1, log_index=1, log_term=1, members=Members((1, 2, 3))))
    assert (raft.commit_index, raft.log.terms()) == (2, [1, 1])


def test_leader_sends_a_snapshot_when_it_has_discarded_the_next_entry() -> None:
    """§7: The leader must occasionally send snapshots to followers that lag behind: when it has already discarded the
    next log entry that it needs to send.
    """
    members = Members((1, 2, 3))
    raft = elect(make(log=[2], snapshot=SnapshotMeta(7, 2, members)))
    raft.step(message(MessageKind.APPEND_ENTRIES_RESPONSE, 3, 3, log_index=8, reject=True, reject_hint=6, log_term=1))
    (offer,) = of_kind(carry_out(raft), MessageKind.INSTALL_SNAPSHOT)
    assert (offer.to, offer.log_index, offer.log_term, offer.members) == (3, 7, 2, members)
    raft.step(message(MessageKind.APPEND_ENTRIES_RESPONSE, 2, 3, log_index=8, reject=True, reject_hint=7, log_term=2))
    (entries,) = of_kind(carry_out(raft), MessageKind.APPEND_ENTRIES)
    assert (entries.to, entries.log_index, entries.log_term) == (2, 7, 2)


# Thesis §3.10 Leadership transfer


def test_prior_leader_stops_accepting_requests() -> None:
    """Thesis §3.10: 1. The prior leader stops accepting new client requests."""
    raft = make_leader()
    commit_noop(raft)
    raft.transfer_leadership(3)
    with pytest.raises(UnavailableError, match="handed to node 3"):
        raft.propose([1])
    with pytest.raises(UnavailableError, match="handed to node 3"):
        raft.propose_membership([add(4)])


def test_prior_leader_brings_the_target_up_to_date_first() -> None:
    """Thesis §3.10: 2. The prior leader fully updates the target server's log to match its own. 3. It sends a TimeoutNow
    request to the target server.
    """
    raft = make_leader()
    commit_noop(raft)
    raft.transfer_leadership(3)
    assert of_kind(carry_out(raft), MessageKind.TIMEOUT_NOW) == []
    raft.step(accept(3, 1, 1))
    assert [m.to for m in of_kind(carry_out(raft), MessageKind.TIMEOUT_NOW)] == [3]


def test_target_starts_an_election_at_once() -> None:
    """Thesis §3.10: This has the same effect as the target server's election timer firing; without a pre-vote, and with a
    mark that lets it disrupt a live leader.
    """
    raft = make(pre_vote=True)
    raft.step(append(2, 1, 0, 0, [1]))
    carry_out(raft)
    raft.step(message(MessageKind.TIMEOUT_NOW, 2, 1))
    assert (raft.role, raft.term) == (Role.CANDIDATE, 2)
    assert [(m.to, m.term, m.context) for m in of_kind(carry_out(raft), MessageKind.REQUEST_VOTE)] == [
        (2, 2, 1),
        (3, 2, 1),
    ]
    # When that fails the next election is one like any other.
    raft.randomized_election_timeout = 10
    for _ in range(10):
        raft.tick()
    assert raft.role is Role.PRE_CANDIDATE


def test_vote_is_granted_within_the_lease_when_the_leader_wishes_it() -> None:
    """Thesis §4.2.3: The leadership transfer extension is the exception: servers process its vote requests even when they
    believe a leader exists.
    """
    raft = make()
    raft.step(append(2, 1, 0, 0))
    carry_out(raft)
    raft.step(message(MessageKind.REQUEST_VOTE, 3, 2, context=1))
    assert [m.reject for m in carry_out(raft)] == [False]


def test_transfer_is_aborted_after_an_election_timeout() -> None:
    """Thesis §3.10: If leadership transfer does not complete after about an election timeout, the prior leader aborts the
    transfer and resumes accepting client requests.
    """
    raft = make_leader(check_quorum=False)
    commit_noop(raft)
    raft.transfer_leadership(3)
    for _ in range(9):
        raft.tick()
    assert raft.transferee == 3
    raft.tick()
    assert raft.transferee == 0
    assert raft.propose([1]).index == 2


def test_only_the_leader_hands_over() -> None:
    with pytest.raises(NotLeaderError):
        make().transfer_leadership(2)


# Thesis §6.4.1 Using clocks to reduce messaging for read-only queries

LEASE = {"lease_reads": True, "tick_us": 1000, "clock_drift": 0.05}
LEASE_US = int(9 * 1000 * 0.9)


def make_leaseholder() -> Raft:
    raft = make(**LEASE)
    for _ in range(9):
        raft.tick()
    raft.randomized_election_timeout = 10
    raft.tick()
    carry_out(raft)
    raft.step(message(MessageKind.REQUEST_VOTE_RESPONSE, 2, 1))
    assert raft.role is Role.LEADER
    carry_out(raft)
    commit_noop(raft)
    return raft


def beat(raft: Raft, now_us: int) -> int:
    raft.tick(now_us)
    return of_kind(carry_out(raft), MessageKind.HEARTBEAT)[0].context


def answers(raft: Raft) -> list[ReadState]:
    return list(raft.ready().reads)


def test_lease_extends_from_the_start_of_the_round() -> None:
    """Thesis §6.4.1: Once the leader's heartbeats were acknowledged by a majority, it would extend its lease to start +
    election timeout / clock drift bound, where start is before it sent them.
    """
    raft = make_leaseholder()
    context = beat(raft, 50_000)
    assert raft.lease_until_us == 0
    raft.step(message(MessageKind.HEARTBEAT_RESPONSE, 2, 1, context=context))
    assert raft.lease_until_us == 50_000 + LEASE_US
    raft.read_index(1, now_us=50_000 + LEASE_US - 1, lease=True)
    assert answers(raft) == [ReadState(1, 1)]
    raft.read_index(2, now_us=50_000 + LEASE_US, lease=True)
    assert answers(raft) == []


def test_late_answers_to_old_rounds_never_shorten_a_lease() -> None:
    raft = make_leaseholder()
    first = beat(raft, 50_000)
    second = beat(raft, 51_000)
    raft.step(message(MessageKind.HEARTBEAT_RESPONSE, 2, 1, context=second))
    raft.step(message(MessageKind.HEARTBEAT_RESPONSE, 3, 1, context=first))
    assert raft.lease_until_us == 51_000 + LEASE_US


def test_answers_confirm_the_round_that_they_answer_and_no_later_one() -> None:
    raft = make_leaseholder()
    first = beat(raft, 50_000)
    beat(raft, 51_000)
    raft.step(message(MessageKind.HEARTBEAT_RESPONSE, 2, 1, context=first))
    assert raft.lease_until_us == 50_000 + LEASE_US


def test_lease_is_void_for_the_rest_of_the_term_when_it_was_handed_over() -> None:
    """Thesis §6.4.1: A leader must expire its lease before transferring leadership."""
    raft = make_leaseholder()
    raft.step(message(MessageKind.HEARTBEAT_RESPONSE, 2, 1, context=beat(raft, 50_000)))
    raft.transfer_leadership(2)
    raft.transfer_leadership(1)
    assert raft.transferee == 0
    raft.read_index(1, now_us=50_001, lease=True)
    assert answers(raft) == []
    raft.step(message(MessageKind.HEARTBEAT_RESPONSE, 2, 1, context=beat(raft, 52_000)))
    assert answers(raft) == [ReadState(1, 1)]
    raft.read_index(2, now_us=52_001, lease=True)
    assert answers(raft) == []


@pytest.mark.parametrize("ticks", [9, 10])
def test_who_gave_a_lease_waits_before_it_votes_or_campaigns(ticks: int) -> None:
    """Thesis §6.4.1: Followers wait at least an election timeout before they elect another, also after a restart."""
    for heard in (False, True):
        raft = make(hard_state=HardState(1, 0, 0), **LEASE)
        if heard:
            for _ in range(20):
                raft.tick()
            raft.step(append(2, 9, 0, 0))
        raft.randomized_election_timeout = 19
        for _ in range(ticks):
            raft.tick()
        raft.campaign(force=True)
        assert (raft.role is Role.CANDIDATE) is (ticks == 10)


def test_group_with_leases_elects_again_when_its_leader_is_gone() -> None:
    raft = make(pre_vote=True, **LEASE)
    raft.step(append(2, 1, 0, 0))
    carry_out(raft)
    for _ in range(raft.randomized_election_timeout):
        raft.tick()
    assert raft.role is Role.PRE_CANDIDATE


# Thesis §9.6 Preventing disruptions when a server rejoins the cluster


def test_rejoining_server_with_a_later_term_frees_itself() -> None:
    """Thesis §9.6, etcd#8501: with pre-vote and the check of the quorum together a server of a later term is told of by
    its answers, also where it may not ask for votes.
    """
    raft = make(hard_state=HardState(7, 0, 0), pre_vote=True)
    for kind in (MessageKind.HEARTBEAT, MessageKind.APPEND_ENTRIES, MessageKind.INSTALL_SNAPSHOT, MessageKind.QUIESCE):
        sent = append(2, 3, 0, 0) if kind is MessageKind.APPEND_ENTRIES else None
        members = Members((1, 2, 3)) if kind is MessageKind.INSTALL_SNAPSHOT else None
        raft.step(sent or message(kind, 2, 3, members=members))
        assert [(m.kind, m.term) for m in carry_out(raft)] == [(MessageKind.APPEND_ENTRIES_RESPONSE, 7)], kind
    assert raft.commit_index == 0
