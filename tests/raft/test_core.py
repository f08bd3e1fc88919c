"""The edges of the core: what it refuses, what it promises of a Ready, and races that a transcript would hide."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import pytest

import marble.raft
from marble._core.term_index import EntrySpan, TermIndex
from marble.errors import CorruptionError, InvariantError, ProtocolError, UsageError
from marble.raft.core import MemoryStorage, Raft, RaftConfig
from marble.raft.log import RaftLog
from marble.raft.messages import Message, MessageKind, ReadState, Span
from marble.raft.reads import READS_MAX
from marble.types import HardState, Role


def make(node: int = 1, voters: int = 3, seed: int = 1, **options: object) -> Raft:
    log, hard_state = options.pop("log", ()), options.pop("hard_state", None)
    storage = MemoryStorage(log, hard_state, range(1, voters + 1))  # type: ignore[arg-type]
    settings: dict[str, object] = {"pre_vote": False, "random": random.Random(seed), **options}
    return Raft(RaftConfig(node, 10, 1, **settings), storage)  # type: ignore[arg-type]


def append(sender: int, to: int, term: int, index: int, log_term: int, *terms: int, commit: int = 0) -> Message:
    entries = EntrySpan.of(index + 1, terms)
    return Message(
        kind=MessageKind.APPEND_ENTRIES,
        sender=sender,
        to=to,
        term=term,
        log_index=index,
        log_term=log_term,
        commit=commit,
        entries=entries,
    )


def response(kind: MessageKind, sender: int, term: int, **fields: object) -> Message:
    return Message(kind=kind, sender=sender, to=1, term=term, **fields)  # type: ignore[arg-type]


def settle(raft: Raft) -> None:
    while raft.has_ready():
        raft.persisted(raft.ready().number)


def make_leader(**options: object) -> Raft:
    raft = make(**options)  # type: ignore[arg-type]
    raft.campaign()
    settle(raft)
    raft.step(response(MessageKind.REQUEST_VOTE_RESPONSE, 2, raft.term))
    settle(raft)
    raft.step(response(MessageKind.APPEND_ENTRIES_RESPONSE, 2, raft.term, log_index=raft.last_index))
    settle(raft)
    assert raft.role is Role.LEADER
    return raft


def test_new_core_wants_nothing() -> None:
    assert not make(log=[1, 1], hard_state=HardState(1, 2, 0)).has_ready()


def test_restarted_core_applies_what_was_known_to_be_committed() -> None:
    ready = make(log=[1, 1, 1], hard_state=HardState(1, 2, 2)).ready()
    assert ready.committed == Span(1, 3)
    assert ready.hard_state is None
    assert ready.number == 0


@pytest.mark.parametrize(
    "options",
    [
        {"id": 0},
        {"id": 2**32},
        {"heartbeat_ticks": 0},
        {"election_ticks": 1},
        {"append_bytes_max": 0},
        {"inflight_messages_max": 0},
        {"inflight_bytes_max": 10, "append_bytes_max": 11},
        {"uncommitted_bytes_max": 0},
        {"election_spread_ticks": -1},
    ],
)
def test_config_is_checked(options: dict[str, int]) -> None:
    settings = {"id": 1, "election_ticks": 10, "heartbeat_ticks": 1, "random": random.Random(1), **options}
    with pytest.raises(UsageError):
        RaftConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "hard_state",
    [
        HardState(-1, 0, 0),
        HardState(2**63, 0, 0),
        HardState(1, -1, 0),
        HardState(1, 2**32, 0),
        HardState(1, 0, -1),
        HardState(1, 0, 2**63),
    ],
)
def test_hard_state_that_no_node_can_have_is_refused(hard_state: HardState) -> None:
    with pytest.raises(UsageError, match="out of bounds"):
        make(hard_state=hard_state)


@pytest.mark.parametrize(
    ("log", "hard_state", "applied"),
    [
        ([1, 2], HardState(1, 0, 0), 0),
        ([1, 2], HardState(2, 0, 3), 0),
        ([1, 2], HardState(2, 0, 0), 3),
    ],
)
def test_storage_that_lost_something_is_refused(log: list[int], hard_state: HardState, applied: int) -> None:
    config = RaftConfig(1, 10, 1, random=random.Random(1))
    with pytest.raises(CorruptionError):
        Raft(config, MemoryStorage(log, hard_state, applied_index=applied))


def test_message_to_another_node_is_refused() -> None:
    with pytest.raises(ProtocolError):
        make(2).step(append(1, 3, 1, 0, 0))
    with pytest.raises(ProtocolError):
        make(2).step(append(2, 2, 1, 0, 0))
    with pytest.raises(ProtocolError):
        make(2).step(append(1, 2, 0, 0, 0))
    with pytest.raises(ProtocolError):
        make(1).step(response(MessageKind.REQUEST_VOTE, 2, 0))


def test_refused_message_changes_nothing() -> None:
    raft = make_leader()
    before = (raft.term, raft.role, raft.log.terms(), repr(raft.progress))
    bad = [
        response(MessageKind.APPEND_ENTRIES_RESPONSE, 2, 1, log_index=99),
        Message(kind=MessageKind.NODE_BEAT, sender=2, to=1, term=1),
        append(2, 1, 1, 1, 1, 1),
    ]
    for refused in bad:
        with pytest.raises(ProtocolError):
            raft.step(refused)
    assert (raft.term, raft.role, raft.log.terms(), repr(raft.progress)) == before
    assert not raft.has_ready()


def test_committed_entries_are_never_truncated() -> None:
    entries = TermIndex()
    entries.append(EntrySpan.of(1, [1, 1, 1]))
    log = RaftLog(entries, 2, 0)
    with pytest.raises(InvariantError):
        log.splice(EntrySpan.of(2, [2]))
    assert log.terms() == [1, 1, 1]


def test_persisted_takes_only_numbers_that_were_given_out() -> None:
    raft = make()
    raft.persisted(0)
    with pytest.raises(InvariantError):
        raft.persisted(1)


def test_applied_takes_only_what_was_given_out() -> None:
    raft = make(log=[1, 1], hard_state=HardState(1, 0, 2))
    with pytest.raises(InvariantError):
        raft.applied(1)
    raft.ready()
    raft.applied(2)
    raft.applied(1)
    assert raft.applied_index == 2


def test_pipelined_readys_hand_out_every_entry_once() -> None:
    raft = make_leader()
    spans = []
    numbers = []
    for _ in range(3):
        raft.propose([1, 1])
        ready = raft.ready()
        spans.append(ready.append)
        numbers.append(ready.number)
    assert spans == [Span(2, 4), Span(4, 6), Span(6, 8)]
    assert numbers == sorted(set(numbers))
    assert raft.persisted_index == 1
    raft.persisted(numbers[1])
    assert raft.persisted_index == 5
    assert raft.progress[1].match_index == 5
    raft.persisted(numbers[2])
    assert raft.persisted_index == 7


def test_new_leader_counts_only_its_durable_entries() -> None:
    raft = make(1)
    raft.step(append(2, 1, 1, 0, 0, 1, 1))
    first = raft.ready()
    raft.persisted(first.number)
    raft.step(append(2, 1, 1, 2, 1, 1, 1))
    raft.ready()
    raft.campaign()
    ready = raft.ready()
    assert raft.persisted_index == 2
    # Votes cannot come before the request has left, and it leaves when everything before it is durable.
    assert ready.messages == ()
    raft.persisted(ready.number)
    raft.step(response(MessageKind.REQUEST_VOTE_RESPONSE, 3, 2))
    assert raft.role is Role.LEADER
    assert (raft.progress[1].match_index, raft.last_index) == (4, 5)


def test_number_is_given_exactly_when_a_sync_is_due() -> None:
    raft = make(2)
    raft.step(append(1, 2, 1, 0, 0, 1))
    ready = raft.ready()
    assert (ready.number, ready.must_sync, ready.hard_state) == (1, True, HardState(1, 0, 0))
    raft.persisted(1)
    raft.step(append(1, 2, 1, 1, 1, commit=1))
    ready = raft.ready()
    # A commit index alone is worth writing and not worth a sync.
    assert (ready.number, ready.must_sync, ready.hard_state) == (0, False, HardState(1, 0, 1))
    assert ready.committed == Span(1, 2)


def test_committed_entries_wait_for_this_disk() -> None:
    raft = make(2)
    raft.step(append(1, 2, 1, 0, 0, 1, 1, commit=2))
    ready = raft.ready()
    assert raft.commit_index == 2
    assert ready.committed is None
    assert ready.hard_state == HardState(1, 0, 0)
    raft.persisted(ready.number)
    ready = raft.ready()
    assert ready.committed == Span(1, 3)
    assert ready.hard_state == HardState(1, 0, 2)


def test_heartbeat_response_of_an_unstable_term_waits() -> None:
    raft = make(2)
    raft.step(Message(kind=MessageKind.HEARTBEAT, sender=1, to=2, term=3))
    ready = raft.ready()
    assert ready.messages == ()
    assert [m.kind for m in ready.messages_after_persist] == [MessageKind.HEARTBEAT_RESPONSE]
    raft.step(Message(kind=MessageKind.HEARTBEAT, sender=1, to=2, term=3))
    ready = raft.ready()
    # The write is still under way, and this Ready has none of its own: the answer is held back.
    assert (ready.number, ready.messages, ready.messages_after_persist) == (0, (), ())
    raft.persisted(1)
    assert [m.kind for m in raft.ready().messages] == [MessageKind.HEARTBEAT_RESPONSE]
    raft.step(Message(kind=MessageKind.HEARTBEAT, sender=1, to=2, term=3))
    assert [m.kind for m in raft.ready().messages] == [MessageKind.HEARTBEAT_RESPONSE]


def test_acknowledgement_held_back_is_not_given_out_by_a_later_ready_without_a_write() -> None:
    raft = make(2)
    raft.step(append(1, 2, 1, 0, 0, 1, 1))
    first = raft.ready()
    raft.step(append(1, 2, 1, 2, 1))
    assert raft.ready().messages_after_persist == ()
    raft.step(append(1, 2, 1, 2, 1, 1))
    third = raft.ready()
    assert [m.log_index for m in third.messages_after_persist] == [3]
    raft.persisted(first.number)
    assert [m.log_index for m in raft.ready().messages] == [2]
    raft.persisted(third.number)
    assert not raft.has_ready()


def test_noop_that_was_replaced_before_any_ready_is_not_announced() -> None:
    raft = make(voters=1, log=[1])
    raft.campaign()
    raft.persisted(raft.ready().number)
    assert raft.role is Role.LEADER
    raft.step(append(2, 1, 9, 1, 1, 9))
    ready = raft.ready()
    assert [(event.role, event.noop_index) for event in ready.events] == [(Role.LEADER, 0), (Role.FOLLOWER, 0)]
    assert ready.append == Span(2, 3)


def test_leader_drops_what_it_had_not_sent_when_it_is_deposed() -> None:
    raft = make_leader()
    raft.propose([5])
    raft.step(append(3, 1, 2, 1, 1, 2))
    ready = raft.ready()
    assert all(m.kind is not MessageKind.APPEND_ENTRIES for m in ready.messages)


def test_contexts_of_two_lives_differ() -> None:
    contexts = set()
    for seed in range(3):
        raft = make(2, seed=seed)
        raft.step(append(1, 2, 1, 0, 0))
        settle(raft)
        raft.read_index(1)
        (message,) = raft.ready().messages
        contexts.add(message.context)
        # An answer to another life's context is nobody's.
        raft.step(
            Message(
                kind=MessageKind.READ_INDEX_RESPONSE, sender=1, to=2, term=1, log_index=5, context=message.context + 1
            )
        )
        assert not raft.has_ready()
    assert len(contexts) == 3


def test_read_confirmed_by_a_context_that_was_never_sent_is_not() -> None:
    raft = make_leader()
    raft.read_index(1)
    raft.ready()
    raft.step(response(MessageKind.HEARTBEAT_RESPONSE, 2, 1, context=2**62 + 2**61))
    assert not raft.has_ready()
    raft.step(response(MessageKind.HEARTBEAT_RESPONSE, 2, 1, context=0))
    assert not raft.has_ready()


def test_reads_are_bounded() -> None:
    raft = make_leader()
    for request in range(READS_MAX + 1):
        raft.read_index(request)
    assert raft.ready().reads == (ReadState(READS_MAX, 0),)


def test_read_is_answered_with_the_commit_index_at_its_time() -> None:
    raft = make_leader()
    raft.read_index(1)
    raft.propose([1])
    raft.step(response(MessageKind.APPEND_ENTRIES_RESPONSE, 2, 1, log_index=2))
    settle(raft)
    assert raft.commit_index == 2
    raft.read_index(2)
    context = next(m.context for m in raft.ready().messages if m.context)
    raft.step(response(MessageKind.HEARTBEAT_RESPONSE, 2, 1, context=context))
    assert raft.ready().reads == (ReadState(1, 1), ReadState(2, 2))


def test_uncommitted_entries_inherited_from_earlier_terms_do_not_count() -> None:
    storage_log = EntrySpan.of(1, [1], [1000])
    raft = make(log=storage_log, uncommitted_bytes_max=100)
    raft.campaign()
    settle(raft)
    raft.step(response(MessageKind.REQUEST_VOTE_RESPONSE, 2, 2))
    assert raft.propose([100]).index == 3


def test_propose_refuses_nonsense() -> None:
    raft = make_leader()
    for sizes in ([], [-1], [2**64]):
        with pytest.raises(UsageError):
            raft.propose(sizes)
    assert raft.last_index == 1


def test_node_without_a_vote_does_not_campaign() -> None:
    raft = make(node=9)
    for _ in range(100):
        raft.tick()
    raft.campaign(force=True)
    assert (raft.role, raft.term) == (Role.FOLLOWER, 0)
    raft.step(append(1, 9, 1, 0, 0, 1))
    assert raft.last_index == 1


def test_force_skips_the_pre_vote() -> None:
    raft = make(pre_vote=True)
    raft.campaign(force=True)
    assert (raft.role, raft.term) == (Role.CANDIDATE, 1)


def test_follower_put_on_the_brink_of_its_timeout_campaigns_at_the_next_tick() -> None:
    raft = make(2)
    raft.randomized_election_timeout = 15
    raft.election_elapsed = 13
    raft.tick()
    assert (raft.role, raft.election_elapsed) == (Role.FOLLOWER, 14)
    raft.tick()
    assert (raft.role, raft.term, raft.vote) == (Role.CANDIDATE, 1, raft.id)
    assert raft.hard_state == raft.ready().hard_state == HardState(1, 2, 0)


def test_leader_of_a_log_that_starts_late_offers_its_snapshot_to_a_peer_that_needs_more() -> None:
    entries = TermIndex(11, 4)
    entries.append(EntrySpan.of(11, [4, 4]))
    storage = MemoryStorage(entries, HardState(4, 0, 10), range(1, 4), applied_index=10)
    raft = Raft(RaftConfig(1, 10, 1, pre_vote=False, random=random.Random(1)), storage)
    raft.campaign()
    settle(raft)
    raft.step(response(MessageKind.REQUEST_VOTE_RESPONSE, 2, 5))
    settle(raft)
    raft.step(response(MessageKind.APPEND_ENTRIES_RESPONSE, 3, 5, log_index=12, reject=True, reject_hint=3, log_term=1))
    (offer,) = raft.ready().messages
    assert (offer.kind, offer.to, offer.log_index, offer.log_term) == (MessageKind.INSTALL_SNAPSHOT, 3, 10, 4)
    raft.step(response(MessageKind.HEARTBEAT_RESPONSE, 3, 5))
    assert not raft.has_ready()
    assert raft.role is Role.LEADER


def test_follower_of_a_log_that_starts_late_names_no_term_before_its_start() -> None:
    entries = TermIndex(11, 4)
    entries.append(EntrySpan.of(11, [4, 4]))
    storage = MemoryStorage(entries, HardState(4, 0, 10), range(1, 4), applied_index=10)
    raft = Raft(RaftConfig(2, 10, 1, random=random.Random(1)), storage)
    # All that is known here is of term 4: a log with term 3 at 12 can agree with this one only where it is forgotten.
    raft.step(append(1, 2, 5, 12, 3))
    (answer,) = raft.ready().messages_after_persist
    assert (answer.reject, answer.log_index, answer.reject_hint, answer.log_term) == (True, 12, 9, 0)


def test_the_core_is_pure() -> None:
    allowed = (
        "__future__",
        "bisect",
        "itertools",
        "typing",
        "collections",
        "dataclasses",
        "enum",
        "marble.types",
        "marble.errors",
        "marble.raft",
    )
    package = Path(marble.raft.__file__).parent
    for path in sorted(package.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name == "marble._core.term_index" or name.startswith(allowed), f"{path.name} imports {name}"
