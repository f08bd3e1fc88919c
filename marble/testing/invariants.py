"""What must hold in every history: one function for each property, with its place in the paper.

Rule 1: a function looks, and raises Violation if the property does not hold. It never changes a node.
Rule 2: each is asked at the moment at which its property could first be broken: an append, a message that leaves, a change of role or
        commit index, an answer. So a violation is found in the step that made it, not where it does its harm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from marble.errors import SessionExpiredError
from marble.machine import Result
from marble.raft.core import Raft
from marble.raft.messages import Message, MessageKind
from marble.testing.ledger import Ledger, Seen, Shelf, Violation
from marble.types import HardState, Members, Role

_SPEAKS_FOR_ITS_TERM: Final = frozenset(
    {
        MessageKind.REQUEST_VOTE,
        MessageKind.REQUEST_VOTE_RESPONSE,
        MessageKind.APPEND_ENTRIES,
        MessageKind.APPEND_ENTRIES_RESPONSE,
        MessageKind.HEARTBEAT,
        MessageKind.HEARTBEAT_RESPONSE,
    }
)


def hold(condition: bool, message: str) -> None:
    """Raise Violation with `message` unless `condition`."""
    if not condition:
        raise Violation(message)


def after_input(ledger: Ledger, raft: Raft, cores: Mapping[int, Raft]) -> None:
    """All properties that one input to one core can break. `cores` are those that live."""
    seen = ledger.seen.get(raft.id)
    if seen is None:
        seen = ledger.seen[raft.id] = Seen(commit=raft.commit_index, applied=raft.applied_index)
        who_takes_part_is_applied(ledger, raft)
    role, term = raft.role, raft.term
    if role is Role.LEADER:
        if seen.role is not role or seen.term != term:
            election_safety(ledger, raft)
            elected_by_a_quorum(ledger, raft)
            for core in cores.values():
                if core.role is Role.LEADER and core.term < term:
                    no_lease_beside_a_later_leader(ledger, core)
            leader_completeness(ledger, raft)
        else:
            leader_append_only(raft, seen)
        if raft.lease_until_us and term < ledger.last_leader[0]:
            no_lease_beside_a_later_leader(ledger, raft)
        seen.last = raft.last_index
        seen.last_term = raft.log.last_term
    if raft.commit_index != seen.commit:
        committed_means_committed(ledger, raft, seen, cores)
    elif raft.applied_index != seen.applied:
        positions_are_in_order(raft, seen)
    if raft.applied_index != seen.applied:
        who_takes_part_is_applied(ledger, raft)
    if raft.persisted_index != seen.persisted:
        persisted_is_durable(ledger, raft)
        seen.persisted = raft.persisted_index
    if term < seen.term:
        raise Violation(f"node {raft.id} went back from term {seen.term} to {term}")
    seen.role, seen.term, seen.commit, seen.applied = role, term, raft.commit_index, raft.applied_index


def election_safety(ledger: Ledger, raft: Raft) -> None:
    """At most one leader can be elected in a given term (Raft §5.2, figure 3)."""
    first = ledger.leaders.setdefault(raft.term, raft.id)
    hold(first == raft.id, f"nodes {first} and {raft.id} both led in term {raft.term}")
    ledger.last_leader = max(ledger.last_leader, (raft.term, raft.id))


def elected_by_a_quorum(ledger: Ledger, raft: Raft) -> None:
    """A candidate wins an election if it receives votes from a majority of the servers for the same term (Raft §5.2); while two
    memberships are in use, from a majority of either (Raft §6)."""
    votes = {node for (node, term), candidate in ledger.votes.items() if (term, candidate) == (raft.term, raft.id)}
    votes.add(raft.id)
    for majority in _majorities(raft):
        hold(
            len(votes.intersection(majority)) * 2 > len(majority),
            f"node {raft.id} leads term {raft.term} by the votes of {sorted(votes)}, which are no majority of {majority}",
        )


def no_lease_beside_a_later_leader(ledger: Ledger, raft: Raft) -> None:
    """While a leader holds a lease, no other is elected (thesis §6.4.1), unless the leader itself has told somebody to campaign, and then
    it reads by no lease any more (thesis §3.10). So beside a later leader nobody holds one."""
    left = raft.lease_until_us - ledger.clock_us(raft.id)
    hold(
        left <= 0 or raft.term in ledger.handed_over,
        f"node {raft.id} holds a lease of term {raft.term} for {left} us, and node {ledger.last_leader[1]} leads term "
        f"{ledger.last_leader[0]}",
    )


def who_takes_part_is_applied(ledger: Ledger, raft: Raft) -> None:
    """A node acts on the latest membership that it has applied, whether by an entry or by a snapshot (Raft §6, §7)."""
    expected = [members for index, members in ledger.memberships if index <= raft.applied_index]
    hold(
        not expected or raft.members == expected[-1],
        f"node {raft.id} has applied {raft.applied_index} and takes {raft.members} for the members, not {expected[-1:]}",
    )


def persisted_is_durable(ledger: Ledger, raft: Raft) -> None:
    """What a core takes for durable here is on this disk, and not what stood there before (the ABA case of asynchronous writes)."""
    index = raft.persisted_index
    shelf = ledger.shelves[raft.id]
    if index >= raft.log.first_index and shelf.term_at(index) != raft.log.term_at(index):
        raise Violation(
            f"node {raft.id} takes entry {index} of term {raft.log.term_at(index)} for durable; its disk has one of term "
            f"{shelf.term_at(index)}"
        )


def leader_append_only(raft: Raft, seen: Seen) -> None:
    """A leader never overwrites or deletes entries in its log; it only appends new entries (Raft §5.3, figure 3)."""
    if raft.last_index < seen.last or not raft.log.matches(seen.last, seen.last_term):
        raise Violation(
            f"node {raft.id} leads term {raft.term} and no longer has its entry {seen.last} of term {seen.last_term}"
        )


def log_matching(
    ledger: Ledger, shelf: Shelf, node: int, first: int, terms: Sequence[int], checksums: Sequence[int]
) -> None:
    """If two logs contain an entry with the same index and term, then the logs are identical in all entries up through the given index
    (Raft §5.3, figure 3).

    Since an entry's index and term always come with the same content and the same term before it, identity of all that is before follows by
    induction.
    """
    before = shelf.written[first - 2] if first > 1 else 0
    known = ledger.before
    for index, (term, checksum) in enumerate(zip(terms, checksums, strict=True), first):
        what = known.setdefault((index, term), (before, checksum))
        if what != (before, checksum):
            raise Violation(
                f"node {node} has entry {index} of term {term} after one of term {before}; elsewhere it is another "
                f"entry, or after one of term {what[0]}"
            )
        before = term


def leader_completeness(ledger: Ledger, raft: Raft) -> None:
    """If a log entry is committed in a given term, then that entry will be present in the logs of the leaders for all higher-numbered terms
    (Raft §5.4, figure 3).

    Asked of each new leader. It is enough that it has the last such entry: what is before is then the same by Log Matching.
    """
    index = max((last for term, last in ledger.committed_in.items() if term < raft.term), default=0)
    hold(
        index < raft.log.first_index - 1 or raft.log.matches(index, ledger.committed[index - 1] if index else 0),
        f"node {raft.id} leads term {raft.term} without entry {index}, which was committed before",
    )


def committed_means_committed(ledger: Ledger, raft: Raft, seen: Seen, cores: Mapping[int, Raft]) -> None:
    """A node's commit index rises over entries that are committed, and never falls (Raft §5.3).

    Whoever takes an entry for committed before any leader has committed it may be wrong about it later.
    """
    index = raft.commit_index
    hold(index >= seen.commit, f"node {raft.id} went back from commit index {seen.commit} to {index}")
    known = len(ledger.committed)
    if index > known:
        only_a_leader_commits_by_counting(raft, index)
        committed_is_durable_on_a_quorum(ledger, raft, index)
        ledger.committed.extend(raft.log.term_at(each) for each in range(known + 1, index + 1))
        ledger.committed_in[raft.term] = index
        later, leader = ledger.last_leader
        core = cores.get(leader)
        if later > raft.term and core is not None and core.role is Role.LEADER and core.term == later:
            leader_completeness(ledger, core)
    hold(
        raft.log.term_at(index) == ledger.committed[index - 1],
        f"node {raft.id} takes entry {index} of term {raft.log.term_at(index)} for committed; the one of term "
        f"{ledger.committed[index - 1]} is",
    )
    positions_are_in_order(raft, seen)


def only_a_leader_commits_by_counting(raft: Raft, index: int) -> None:
    """Only log entries from the leader's current term are committed by counting replicas (Raft §5.4.2, figure 8)."""
    hold(
        raft.role is Role.LEADER,
        f"node {raft.id}, a {raft.role.value}, takes entry {index} for committed before any leader does",
    )
    hold(
        raft.log.term_at(index) == raft.term,
        f"node {raft.id} commits entry {index} of term {raft.log.term_at(index)} in term {raft.term}",
    )


def committed_is_durable_on_a_quorum(ledger: Ledger, raft: Raft, index: int) -> None:
    """An entry is committed once the leader that created it has replicated it on a majority of the servers (Raft §5.3): on their disks,
    synced, or a power loss takes it back."""
    term = raft.log.term_at(index)
    having = {node for node, shelf in ledger.shelves.items() if shelf.term_at(index) == term}
    for majority in _majorities(raft):
        count = len(having.intersection(majority))
        hold(
            count > len(majority) // 2,
            f"entry {index} of term {term} is committed, but only {sorted(having)} of {majority} have it on disk",
        )


def _majorities(raft: Raft) -> list[tuple[int, ...]]:
    """The sets of voters of each of which more than half decide."""
    members = raft.members
    return [members.voters, members.outgoing] if members.outgoing else [members.voters]


def positions_are_in_order(raft: Raft, seen: Seen) -> None:
    """applied <= commit <= last and applied <= persisted <= last, and nothing is unapplied (Raft figure 2)."""
    applied = raft.applied_index
    hold(seen.applied <= applied <= raft.commit_index <= raft.last_index, f"node {raft.id}: positions out of order")
    hold(applied <= raft.persisted_index <= raft.last_index, f"node {raft.id} applied what is not durable here")


def state_machine_safety(
    ledger: Ledger,
    node: int,
    first: int,
    terms: Sequence[int],
    checksums: Sequence[int],
    results: Sequence[Result],
) -> None:
    """If a server has applied a log entry at a given index to its state machine, no other server will ever apply a different
    log entry for the same index (Raft §5.4.3, figure 3); nor does the same entry give another answer there."""
    for index, (term, checksum, result) in enumerate(zip(terms, checksums, results, strict=True), first):
        if index > len(ledger.committed) or ledger.committed[index - 1] != term:
            raise Violation(f"node {node} applied entry {index} of term {term}, which is not committed")
        what = (term, checksum, result.value, result.error_code)
        if ledger.applied.setdefault(index, what) != what:
            raise Violation(
                f"nodes applied different entries at {index}, or with different results: {ledger.applied[index]}, "
                f"and {what} at node {node}"
            )


def message_is_true(ledger: Ledger, raft: Raft, message: Message, cores: Mapping[int, Raft]) -> None:
    """Before responding to RPCs, a server has updated on stable storage what its answer asserts (Raft figure 2): its term, its vote, and
    the entries that it acknowledges. And what it acknowledges is what the leader has (Raft §5.3).
    """
    kind, term = message.kind, message.term
    if kind is MessageKind.TIMEOUT_NOW:
        ledger.handed_over.add(term)
    if kind not in _SPEAKS_FOR_ITS_TERM:
        return
    shelf = ledger.shelves[raft.id]
    durable = shelf.hard_state
    if durable.term < term:
        raise Violation(
            f"node {raft.id} sends a {kind.name} of term {term}, but its disk still says term {durable.term}"
        )
    if message.reject:
        return
    if kind is MessageKind.REQUEST_VOTE_RESPONSE:
        one_vote_in_a_term(ledger, durable, raft.id, term, message.to)
    elif kind is MessageKind.REQUEST_VOTE:
        one_vote_in_a_term(ledger, durable, raft.id, term, raft.id)
    elif kind is MessageKind.APPEND_ENTRIES_RESPONSE and term == raft.term and message.log_index:
        index = message.log_index
        having = shelf.term_at(index)
        hold(having > 0, f"node {raft.id} acknowledges entry {index}, which is not on its disk")
        leader = cores.get(message.to)
        leads = leader is not None and leader.role is Role.LEADER and leader.term == term
        if leader is not None and leads and not _has(ledger, leader, index, having):
            raise Violation(
                f"node {raft.id} acknowledges its entry {index} of term {having}, and the leader's is of term "
                f"{leader.log.term_or_zero(index)}"
            )


def _has(ledger: Ledger, raft: Raft, index: int, term: int) -> bool:
    """Whether a core has the entry, in its log or in the snapshot before it."""
    if index < raft.log.first_index - 1:
        return ledger.committed[index - 1] == term
    return raft.log.matches(index, term)


def one_vote_in_a_term(ledger: Ledger, durable: HardState, node: int, term: int, candidate: int) -> None:
    """Each server will vote for at most one candidate in a given term (Raft §5.2), whatever it forgets in a crash."""
    hold(
        durable.term > term or durable.vote == candidate,
        f"node {node} votes for {candidate} in term {term}; its disk says {durable}",
    )
    first = ledger.votes.setdefault((node, term), candidate)
    hold(first == candidate, f"node {node} voted for {first} and for {candidate} in term {term}")


def durable_survives(shelf: Shelf, node: int, found: HardState, terms: Sequence[int]) -> None:
    """What a sync has covered is there after any crash: term, vote, and entries that nothing was to replace (docs/log-format.md).

    Of what no sync had covered there may be a first part, and nothing else.
    """
    possible = [((state.term, state.vote), entries) for state, entries in shelf.possible()]
    if ((found.term, found.vote), list(terms)) not in possible:
        raise Violation(
            f"node {node} came back with {found} and {len(terms)} entries; durable were {shelf.hard_state} and "
            f"{len(shelf.terms)} entries, and {len(shelf.waiting)} changes waited"
        )


def snapshot_is_committed(ledger: Ledger, node: int, index: int, term: int) -> None:
    """The last included index and term of a snapshot name a committed entry (Raft §7), and so does everything that is purged."""
    hold(
        0 < index <= len(ledger.committed) and ledger.committed[index - 1] == term,
        f"node {node} starts its log after entry {index} of term {term}, which is not committed",
    )


def membership_changes_one_at_a_time(ledger: Ledger, raft: Raft, index: int, term: int, members: Members) -> None:
    """A leader changes the membership only when all earlier changes, and its own no-op, are applied (thesis §4.1; Ongaro's correction of
    2015), and only so that any majority of the old and any of the new share a server (Raft §6).

    Asked when the entry reaches the leader's log.
    """
    if raft.role is not Role.LEADER or term != raft.term:
        return
    earlier = [change for change in raft.log.changes if change < index]
    hold(
        (not earlier or earlier[-1] <= raft.applied_index) and raft.log.term_at(raft.applied_index) == raft.term,
        f"node {raft.id} changes the membership at {index} before what came earlier is applied",
    )
    old = raft.members
    if members.outgoing:
        neighbours = not old.outgoing and members.outgoing == old.voters
    elif old.outgoing:
        neighbours = members.voters == old.voters
    else:
        neighbours = len(set(old.voters) ^ set(members.voters)) <= 1
    hold(neighbours, f"node {raft.id} goes from {old} to {members}: they have majorities without a common server")


def exactly_once(
    ledger: Ledger, first: int, sessions: Sequence[int], sequences: Sequence[int], results: Sequence[Result]
) -> None:
    """If a command with a session's serial number was executed, it is not executed again (Raft §8, thesis §6.3)."""
    for index, (session, sequence, result) in enumerate(zip(sessions, sequences, results, strict=True), first):
        if not (session and sequence) or result.index or result.error_code == SessionExpiredError.code:
            continue
        known = ledger.executed.setdefault((session, sequence), index)
        if known != index:
            raise Violation(f"write {sequence} of session {session} was executed at {known} and at {index}")


def read_is_current(ledger: Ledger, node: int, request: int, index: int) -> None:
    """A read sees everything that was committed before it began (Raft §8, thesis §6.4)."""
    began = ledger.reads.pop((node, request), None)
    if began is None or not index:
        return
    ledger.reads_answered += 1
    hold(
        index >= began, f"node {node} answers a read with index {index}; {began} entries were committed before it began"
    )
