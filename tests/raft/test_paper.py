"""One test for each sentence of the Raft paper (and Ongaro's thesis) that makes a promise which this core keeps.

The paper: "In Search of an Understandable Consensus Algorithm", extended version. The name of each test says the
promise, its docstring the section.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from raft.paper import accept, append, carry_out, commit_noop, make, make_leader, message, of_kind

from marble._core.term_index import EntrySpan
from marble.errors import NotLeaderError
from marble.raft.core import Raft
from marble.raft.messages import MessageKind, ReadState, Ready
from marble.types import HardState, Role

# §5.1 Raft basics


@pytest.mark.parametrize("role", [Role.FOLLOWER, Role.CANDIDATE, Role.LEADER])
def test_smaller_term_is_updated_from_message(role: Role) -> None:
    """§5.1: If one server's current term is smaller than the other's, then it updates its current term to the larger
    value.
    """
    raft = make_leader() if role is Role.LEADER else make()
    if role is Role.CANDIDATE:
        raft.campaign()
    assert raft.role is role
    larger = raft.term + 5
    raft.step(append(2, larger, 0, 0))
    assert (raft.term, raft.role, raft.leader) == (larger, Role.FOLLOWER, 2)


@pytest.mark.parametrize("kind", [MessageKind.APPEND_ENTRIES_RESPONSE, MessageKind.HEARTBEAT_RESPONSE])
def test_leader_with_stale_term_reverts_to_follower(kind: MessageKind) -> None:
    """§5.1: If a candidate or leader discovers that its term is out of date, it reverts to follower state."""
    raft = make_leader()
    raft.step(message(kind, 2, raft.term + 1))
    assert (raft.role, raft.term, raft.leader, raft.vote) == (Role.FOLLOWER, 2, 0, 0)


def test_request_with_stale_term_is_rejected() -> None:
    """§5.1: If a server receives a request with a stale term number, it rejects the request."""
    raft = make(hard_state=HardState(term=5), pre_vote=True)
    raft.step(append(2, 4, 0, 0, [4]))
    raft.step(message(MessageKind.REQUEST_VOTE, 2, 4))
    assert raft.last_index == 0
    assert raft.vote == 0
    # The leader of the old term is told of the new one (a departure of etcd from silence); the candidate is not
    # answered.
    assert [(m.kind, m.term) for m in carry_out(raft)] == [(MessageKind.APPEND_ENTRIES_RESPONSE, 5)]


# §5.2 Leader election


def test_server_starts_as_follower() -> None:
    """§5.2: When servers start up, they begin as followers."""
    assert make(hard_state=HardState(term=3, vote=1)).role is Role.FOLLOWER


def test_server_remains_follower_while_it_hears_a_leader() -> None:
    """§5.2: A server remains in follower state as long as it receives valid RPCs from a leader or candidate."""
    raft = make()
    for _ in range(10):
        for _ in range(9):
            raft.tick()
        raft.step(message(MessageKind.HEARTBEAT, 2, 1))
    assert raft.role is Role.FOLLOWER


def test_leader_sends_periodic_heartbeats() -> None:
    """§5.2: Leaders send periodic heartbeats to all followers in order to maintain their authority."""
    raft = make_leader()
    raft.tick()
    beats = of_kind(carry_out(raft), MessageKind.HEARTBEAT)
    assert [m.to for m in beats] == [2, 3]


def test_silence_starts_an_election() -> None:
    """§5.2: To begin an election, a follower increments its current term, votes for itself and sends RequestVote to all
    others.
    """
    raft = make()
    raft.randomized_election_timeout = 13
    for _ in range(12):
        raft.tick()
    assert raft.role is Role.FOLLOWER
    raft.tick()
    assert (raft.role, raft.term, raft.vote) == (Role.CANDIDATE, 1, 1)
    assert [(m.to, m.term) for m in of_kind(carry_out(raft), MessageKind.REQUEST_VOTE)] == [(2, 1), (3, 1)]


@pytest.mark.parametrize(
    ("voters", "answers", "role"),
    [
        (1, {}, Role.LEADER),
        (3, {2: True}, Role.LEADER),
        (3, {2: True, 3: False}, Role.LEADER),
        (3, {}, Role.CANDIDATE),
        (3, {2: False}, Role.CANDIDATE),
        (3, {2: False, 3: False}, Role.FOLLOWER),
        (4, {2: True}, Role.CANDIDATE),
        (4, {2: False, 3: False}, Role.FOLLOWER),
        (5, {2: True, 3: True}, Role.LEADER),
        (5, {2: True}, Role.CANDIDATE),
        (5, {2: False, 3: False, 4: True}, Role.CANDIDATE),
        (5, {2: False, 3: False, 4: False}, Role.FOLLOWER),
    ],
)
def test_candidate_wins_with_a_majority(voters: int, answers: dict[int, bool], role: Role) -> None:
    """§5.2: A candidate wins an election if it receives votes from a majority of the servers in the full cluster."""
    raft = make(voters=voters)
    raft.campaign()
    carry_out(raft)
    for voter, granted in answers.items():
        raft.step(message(MessageKind.REQUEST_VOTE_RESPONSE, voter, 1, reject=not granted))
    assert (raft.role, raft.term) == (role, 1)


def test_same_voter_counts_once() -> None:
    """§5.2: Each server will vote for at most one candidate in a given term: its answer counts once, the first one."""
    raft = make(voters=5)
    raft.campaign()
    carry_out(raft)
    for _ in range(3):
        raft.step(message(MessageKind.REQUEST_VOTE_RESPONSE, 2, 1))
    assert raft.role is Role.CANDIDATE
    assert raft.votes == {1: True, 2: True}


@pytest.mark.parametrize(("vote", "candidate", "granted"), [(0, 2, True), (2, 2, True), (3, 2, False), (2, 3, False)])
def test_first_come_first_served(vote: int, candidate: int, granted: bool) -> None:
    """§5.2: Each server will vote for at most one candidate in a given term, on a first-come-first-served basis."""
    raft = make(hard_state=HardState(term=1, vote=vote))
    raft.step(message(MessageKind.REQUEST_VOTE, candidate, 1))
    assert [m.reject for m in carry_out(raft)] == [not granted]
    assert raft.vote == (candidate if granted else vote)


@pytest.mark.parametrize("term_offset", [0, 1])
def test_candidate_recognizes_a_leader(term_offset: int) -> None:
    """§5.2: If the leader's term is at least as large as the candidate's, the candidate returns to follower state."""
    raft = make()
    raft.campaign()
    term = raft.term + term_offset
    raft.step(append(2, term, 0, 0))
    assert (raft.role, raft.term, raft.leader) == (Role.FOLLOWER, term, 2)


def test_candidate_ignores_a_leader_of_the_past() -> None:
    """§5.2: If the term in the RPC is smaller, the candidate rejects the RPC and continues in candidate state."""
    raft = make(hard_state=HardState(term=4))
    raft.campaign()
    raft.step(append(2, 4, 0, 0))
    assert (raft.role, raft.term) == (Role.CANDIDATE, 5)


def test_candidate_starts_a_new_election_after_a_split_vote() -> None:
    """§5.2: Each candidate will time out and start a new election by incrementing its term."""
    raft = make()
    raft.campaign()
    raft.randomized_election_timeout = 10
    for _ in range(10):
        raft.tick()
    assert (raft.role, raft.term) == (Role.CANDIDATE, 2)


def test_election_timeouts_are_randomized() -> None:
    """§5.2: Election timeouts are chosen randomly from a fixed interval to prevent split votes."""
    raft = make()
    seen = set()
    for _ in range(200):
        raft.campaign()
        seen.add(raft.randomized_election_timeout)
    assert seen == set(range(10, 20))


def test_the_random_part_of_election_timeouts_may_be_narrower() -> None:
    """§9.3: how much of it there is decides how long elections take, and how many votes are split."""
    raft = make(election_spread_ticks=4)
    seen = set()
    for _ in range(200):
        raft.campaign()
        seen.add(raft.randomized_election_timeout)
    assert seen == set(range(10, 14))


def test_votes_are_durable_before_the_answer() -> None:
    """§5, figure 2: Persistent state is updated on stable storage before responding to RPCs."""
    raft = make()
    raft.step(message(MessageKind.REQUEST_VOTE, 2, 1))
    ready = raft.ready()
    assert ready.hard_state == HardState(term=1, vote=2)
    assert ready.must_sync
    assert ready.messages == ()
    assert [m.kind for m in ready.messages_after_persist] == [MessageKind.REQUEST_VOTE_RESPONSE]


# §5.3 Log replication


def test_leader_starts_replication() -> None:
    """§5.3: The leader appends the command to its log as a new entry, then issues AppendEntries to each of the other
    servers.
    """
    raft = make_leader()
    commit_noop(raft)
    raft.step(accept(3, 1, 1))
    carry_out(raft)
    position = raft.propose([9])
    assert (position.index, position.term, raft.last_index) == (2, 1, 2)
    sent = of_kind(carry_out(raft), MessageKind.APPEND_ENTRIES)
    assert [(m.to, m.log_index, m.log_term, m.entries) for m in sent] == [
        (peer, 1, 1, EntrySpan.of(2, [1], [9])) for peer in (2, 3)
    ]


@pytest.mark.parametrize(
    ("voters", "acceptors", "committed"),
    [
        (1, (), True),
        (3, (), False),
        (3, (2,), True),
        (3, (2, 3), True),
        (5, (2,), False),
        (5, (2, 3), True),
        (5, (2, 3, 4, 5), True),
    ],
)
def test_entry_is_committed_once_a_majority_has_it(voters: int, acceptors: Sequence[int], committed: bool) -> None:
    """§5.3: A log entry is committed once the leader that created the entry has replicated it on a majority of the
    servers.
    """
    raft = make_leader(voters)
    commit_noop(raft)
    first = raft.propose([1]).index
    carry_out(raft)
    for acceptor in acceptors:
        raft.step(accept(acceptor, 1, first))
    assert (raft.commit_index >= first) is committed


@pytest.mark.parametrize("log", [[], [2], [1, 2], [1]])
def test_commit_includes_preceding_entries(log: list[int]) -> None:
    """§5.3: This also commits all preceding entries in the leader's log, including earlier leaders' entries."""
    raft = make_leader(log=log)
    raft.step(accept(2, raft.term, raft.last_index))
    ready = raft.ready()
    assert ready.committed is not None
    assert (ready.committed.first, ready.committed.end) == (1, len(log) + 2)


def test_follower_applies_once_it_learns_of_the_commit() -> None:
    """§5.3: Once a follower learns that a log entry is committed, it applies the entry to its local state machine (in
    log order).
    """
    raft = make()
    raft.step(append(2, 1, 0, 0, [1, 1, 1], commit=2))
    applied = []
    while raft.has_ready():
        ready = raft.ready()
        raft.persisted(ready.number)
        if ready.committed:
            applied.append((ready.committed.first, ready.committed.end))
    assert applied == [(1, 3)]


@pytest.mark.parametrize(
    ("index", "term", "rejected"),
    [(0, 0, False), (1, 1, False), (2, 2, False), (1, 2, True), (2, 1, True), (3, 2, True), (3, 3, True)],
)
def test_follower_checks_consistency(index: int, term: int, rejected: bool) -> None:
    """§5.3: If the follower does not find an entry with the same index and term, it refuses the new entries."""
    raft = make(log=[1, 2])
    raft.step(append(2, 3, index, term))
    (answer,) = carry_out(raft)
    assert answer.reject is rejected
    assert answer.log_index == index
    if rejected:
        assert answer.reject_hint <= 2
        assert raft.log.term_or_zero(answer.reject_hint) == answer.log_term


@pytest.mark.parametrize(
    ("index", "term", "entries", "log"),
    [
        (2, 2, [3], [1, 2, 3]),
        (1, 1, [3, 4], [1, 3, 4]),
        (0, 0, [1], [1, 2]),
        (0, 0, [3], [3]),
        (2, 2, [], [1, 2]),
        (1, 1, [2, 2], [1, 2, 2]),
    ],
)
def test_follower_appends_and_overwrites(index: int, term: int, entries: list[int], log: list[int]) -> None:
    """§5.3: If an existing entry conflicts with a new one, delete it and all that follow; append what is not in the log
    yet.
    """
    raft = make(log=[1, 2])
    raft.step(append(2, 4, index, term, entries))
    assert raft.log.terms() == log
    ready = raft.ready()
    assert (ready.append is None) is (log == [1, 2])


@pytest.mark.parametrize(
    "log",
    [
        [1, 1, 1, 4, 4, 5, 5, 6, 6],
        [1, 1, 1, 4],
        [1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 6],
        [1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 7, 7],
        [1, 1, 1, 4, 4, 4, 4],
        [1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3],
    ],
    ids="abcdef",
)
def test_leader_brings_any_follower_into_line(log: list[int]) -> None:
    """§5.3, figure 7: The leader brings the follower's log into consistency with its own."""
    leader = make_leader(log=[1, 1, 1, 4, 4, 5, 5, 6, 6, 6], hard_state=HardState(term=7))
    follower = make(2, log=log, hard_state=HardState(term=7))
    follower.step(message(MessageKind.HEARTBEAT, 1, leader.term, to=2))
    exchange = 0
    pending = carry_out(follower)
    while pending:
        exchange += 1
        assert exchange < 50
        for answer in pending:
            leader.step(answer)
        for sent in carry_out(leader):
            if sent.to == 2:
                follower.step(sent)
        pending = carry_out(follower)
    assert follower.log.terms() == leader.log.terms()
    assert follower.commit_index == leader.commit_index == leader.last_index


def test_leader_never_overwrites_its_own_log() -> None:
    """§5.3: A leader never overwrites or deletes entries in its own log (Leader Append-Only)."""
    raft = make_leader(log=[1, 1])
    before = raft.log.terms()
    raft.step(message(MessageKind.APPEND_ENTRIES_RESPONSE, 2, raft.term, log_index=2, reject=True, reject_hint=0))
    raft.propose([1])
    assert raft.log.terms()[: len(before)] == before


# §5.4 Safety


@pytest.mark.parametrize(
    ("log", "last_index", "last_term", "granted"),
    [
        ([1], 1, 1, True),
        ([1], 2, 1, True),
        ([1, 1], 1, 1, False),
        ([1], 1, 2, True),
        ([1, 1], 1, 2, True),
        ([2], 1, 1, False),
        ([2], 9, 1, False),
        ([], 0, 0, True),
    ],
)
def test_voter_denies_a_less_complete_log(log: list[int], last_index: int, last_term: int, granted: bool) -> None:
    """§5.4.1: The voter denies its vote if its own log is more up-to-date than that of the candidate."""
    raft = make(log=log)
    raft.step(message(MessageKind.REQUEST_VOTE, 2, 3, log_index=last_index, log_term=last_term))
    (answer,) = carry_out(raft)
    assert answer.reject is not granted


def test_only_entries_of_the_current_term_are_committed_by_counting() -> None:
    """§5.4.2: Only log entries from the leader's current term are committed by counting replicas."""
    raft = make_leader(log=[1, 2])
    raft.step(accept(2, raft.term, 1))
    raft.step(accept(3, raft.term, 2))
    assert raft.commit_index == 0
    raft.step(accept(2, raft.term, 3))
    assert raft.commit_index == 3


def test_commit_index_never_falls() -> None:
    """§5.4.3, figure 2: commitIndex increases monotonically, and what is committed is never replaced."""
    raft = make(log=[1, 1], hard_state=HardState(term=1, commit=2))
    raft.step(append(2, 2, 0, 0, [1], commit=1))
    raft.step(message(MessageKind.HEARTBEAT, 2, 2, commit=1))
    assert raft.commit_index == 2
    assert raft.log.terms() == [1, 1]


# §8 Client interaction; thesis §6


def test_new_leader_commits_a_noop() -> None:
    """§8: Raft handles this by having each leader commit a blank no-op entry into the log at the start of its term."""
    raft = make(log=[1], voters=1)
    raft.campaign()
    raft.persisted(raft.ready().number)
    ready = raft.ready()
    assert ready.append is not None
    assert (ready.append.first, ready.append.end) == (2, 3)
    assert ready.events[-1].noop_index == 2


def read_answers(raft: Raft) -> tuple[list[ReadState], Ready]:
    ready = raft.ready()
    return list(ready.reads), ready


def test_read_needs_a_round_of_heartbeats() -> None:
    """§8, thesis §6.4: The leader exchanges heartbeats with a majority before it answers a read-only request."""
    raft = make_leader()
    commit_noop(raft)
    raft.read_index(1)
    answers, ready = read_answers(raft)
    assert answers == []
    context = of_kind(ready.messages, MessageKind.HEARTBEAT)[0].context
    raft.step(message(MessageKind.HEARTBEAT_RESPONSE, 2, 1, context=context))
    assert read_answers(raft)[0] == [ReadState(1, 1)]


def test_read_needs_a_commit_in_the_leaders_own_term() -> None:
    """§8: A leader must have the latest information on which entries are committed; the no-op of its term gives it."""
    raft = make_leader(log=[1], hard_state=HardState(term=1, commit=1))
    raft.read_index(1)
    assert not raft.has_ready() or of_kind(raft.ready().messages, MessageKind.HEARTBEAT) == []
    raft.step(accept(2, 2, 2))
    ready = raft.ready()
    context = of_kind(ready.messages, MessageKind.HEARTBEAT)[0].context
    raft.step(message(MessageKind.HEARTBEAT_RESPONSE, 3, 2, context=context))
    assert read_answers(raft)[0] == [ReadState(1, 2)]


def test_only_the_leader_accepts_requests() -> None:
    """§8: If the client's first choice is not the leader, that server will reject the request."""
    raft = make()
    with pytest.raises(NotLeaderError):
        raft.propose([1])


def test_leader_steps_down_without_a_quorum() -> None:
    """Thesis §6.2: A leader steps down if an election timeout elapses without a successful round of heartbeats to a
    majority.
    """
    raft = make_leader()
    for _ in range(20):
        raft.tick()
    assert raft.role is Role.FOLLOWER


def test_pre_vote_does_not_raise_the_term() -> None:
    """Thesis §9.6: A candidate only increments its term if it first learns that a majority would be willing to vote for
    it.
    """
    raft = make(pre_vote=True)
    raft.campaign()
    assert (raft.role, raft.term, raft.vote) == (Role.PRE_CANDIDATE, 0, 0)
    assert [(m.kind, m.term) for m in carry_out(raft)] == [(MessageKind.REQUEST_PRE_VOTE, 1)] * 2
    raft.step(message(MessageKind.REQUEST_PRE_VOTE_RESPONSE, 2, 1))
    assert (raft.role, raft.term, raft.vote) == (Role.CANDIDATE, 1, 1)
