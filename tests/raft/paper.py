"""What the paper's tests are told with: cores made by hand, and one message at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from marble._core.term_index import EntrySpan
from marble.raft.core import MemoryStorage, Raft, RaftConfig
from marble.raft.membership import members_of
from marble.raft.messages import Message, MessageKind
from marble.types import HardState, Members, Role, SnapshotMeta

# What the entries say that change the membership of a core: the payloads of its driver.
_proposed: WeakKeyDictionary[Raft, dict[int, Members]] = WeakKeyDictionary()


def make(
    node: int = 1,
    voters: int = 3,
    log: Sequence[int] = (),
    hard_state: HardState | None = None,
    *,
    members: Members | None = None,
    snapshot: SnapshotMeta | None = None,
    changes: Sequence[int] = (),
    **options: object,
) -> Raft:
    """A core of a group of `voters`, or of `members`, whose log has these terms, after `snapshot` if there is one."""
    settings: dict[str, object] = {"pre_vote": False, "random": random.Random(node), **options}
    config = RaftConfig(node, 10, 1, **settings)  # type: ignore[arg-type]
    group = members if members is not None or snapshot is not None else members_of(range(1, voters + 1))
    return Raft(config, MemoryStorage(log, hard_state, members=group, snapshot=snapshot, changes=changes))


def carry_out(raft: Raft) -> list[Message]:
    """Do all that the core wants, and return what it sends. What it proposes of the members it also applies."""
    messages: list[Message] = []
    proposed = _proposed.setdefault(raft, {})
    while raft.has_ready():
        ready = raft.ready()
        messages += ready.messages
        proposed |= {each.index: each.members for each in ready.memberships}
        raft.persisted(ready.number)
        messages += ready.messages_after_persist
        if ready.snapshot is not None:
            raft.applied(ready.snapshot.index)
        if ready.committed is not None:
            for index in range(ready.committed.first, ready.committed.end):
                if index in proposed:
                    raft.apply_membership(proposed[index])
            raft.applied(ready.committed.end - 1)
    return messages


def message(kind: MessageKind, sender: int, term: int, to: int = 1, **fields: object) -> Message:
    return Message(kind=kind, sender=sender, to=to, term=term, **fields)  # type: ignore[arg-type]


def append(sender: int, term: int, index: int, log_term: int, terms: Sequence[int] = (), to: int = 1, commit: int = 0):
    entries = EntrySpan.of(index + 1, terms)
    return message(
        MessageKind.APPEND_ENTRIES, sender, term, to, log_index=index, log_term=log_term, entries=entries, commit=commit
    )


def accept(sender: int, term: int, index: int) -> Message:
    return message(MessageKind.APPEND_ENTRIES_RESPONSE, sender, term, log_index=index)


def elect(raft: Raft) -> Raft:
    """Let all others vote for it."""
    raft.campaign()
    carry_out(raft)
    for voter in raft.voters:
        if voter != raft.id and raft.role is Role.CANDIDATE:
            raft.step(message(MessageKind.REQUEST_VOTE_RESPONSE, voter, raft.term, to=raft.id))
    assert raft.role is Role.LEADER
    carry_out(raft)
    return raft


def make_leader(voters: int = 3, log: Sequence[int] = (), **options: object) -> Raft:
    """Node 1, elected and with its no-op durable at itself only."""
    raft = make(1, voters, log, **options)
    carry_out(raft)
    raft.campaign()
    carry_out(raft)
    for voter in range(2, voters // 2 + 2):
        raft.step(message(MessageKind.REQUEST_VOTE_RESPONSE, voter, raft.term))
    assert raft.role is Role.LEADER
    carry_out(raft)
    return raft


def commit_noop(raft: Raft) -> None:
    for voter in raft.voters[1 : len(raft.voters) // 2 + 1]:
        raft.step(accept(voter, raft.term, raft.last_index))
    carry_out(raft)
    assert raft.commit_index == raft.last_index


def of_kind(messages: Sequence[Message], kind: MessageKind) -> list[Message]:
    return [m for m in messages if m.kind is kind]
