"""Sleep: when a leader lets its group sleep, and what wakes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from raft.paper import accept, carry_out, commit_noop, make_leader, message, of_kind

from marble.raft.core import Raft
from marble.raft.messages import MessageKind
from marble.types import Change, ChangeKind, Role


def add(node: int) -> Change:
    return Change(ChangeKind.ADD_VOTER, node)


def learn(node: int) -> Change:
    return Change(ChangeKind.ADD_LEARNER, node)


def make_asleep(quiesce_ticks: int = 3) -> Raft:
    raft = make_leader(quiesce_ticks=quiesce_ticks)
    commit_noop(raft)
    raft.step(accept(3, 1, 1))
    while not raft.quiesced:
        raft.tick()
        for beat in of_kind(carry_out(raft), MessageKind.HEARTBEAT):
            raft.step(message(MessageKind.HEARTBEAT_RESPONSE, beat.to, 1))
    carry_out(raft)
    return raft


def test_who_sleeps_wants_nothing() -> None:
    raft = make_asleep()
    for _ in range(100):
        raft.tick()
    assert raft.quiesced
    assert not raft.has_ready()


def test_who_sleeps_has_nothing_on_a_way_that_is_lost() -> None:
    """Thousands of groups may sleep: an append would wake the followers of each."""
    raft = make_asleep()
    raft.report_way_lost(2)
    assert raft.quiesced
    assert not raft.has_ready()
    raft.wake()
    carry_out(raft)
    raft.report_way_lost(2)
    assert [m.to for m in of_kind(carry_out(raft), MessageKind.APPEND_ENTRIES)] == [2]


def test_leader_that_wakes_gives_its_peers_time() -> None:
    raft = make_asleep(quiesce_ticks=15)
    raft.wake()
    for _ in range(10):
        raft.tick()
    assert raft.role is Role.LEADER
    for _ in range(10):
        raft.tick()
    assert raft.role is Role.FOLLOWER


@pytest.mark.parametrize(
    "wake",
    [
        lambda raft: raft.propose([1]),
        lambda raft: raft.propose_membership([add(4)]),
        lambda raft: raft.transfer_leadership(2),
        lambda raft: raft.read_index(1),
        lambda raft: raft.step(message(MessageKind.HEARTBEAT_RESPONSE, 3, 1)),
        lambda raft: raft.step(message(MessageKind.REQUEST_PRE_VOTE, 3, 2)),
        lambda raft: raft.step(message(MessageKind.READ_INDEX, 3, 1, context=5)),
        lambda raft: raft.wake(),
    ],
)
def test_anything_wakes_a_leader(wake: Callable[[Raft], object]) -> None:
    raft = make_asleep()
    wake(raft)
    assert not raft.quiesced
    carry_out(raft)
    raft.tick()
    assert {m.to for m in of_kind(carry_out(raft), MessageKind.HEARTBEAT)} == {2, 3}


@pytest.mark.parametrize(
    "busy",
    [
        lambda raft: raft.propose([1]),
        lambda raft: raft.propose_membership([learn(4)]),
        lambda raft: raft.transfer_leadership(2),
        lambda raft: raft.read_index(1),
    ],
)
def test_busy_leader_does_not_sleep(busy: Callable[[Raft], object]) -> None:
    raft = make_asleep()
    busy(raft)
    for _ in range(8):
        raft.tick()
        for beat in of_kind(carry_out(raft), MessageKind.HEARTBEAT):
            raft.step(message(MessageKind.HEARTBEAT_RESPONSE, beat.to, 1))
    assert not raft.quiesced


def test_leader_that_has_not_applied_everything_does_not_sleep() -> None:
    raft = make_leader(voters=1, quiesce_ticks=1)
    raft.propose([1])
    ready = raft.ready()
    raft.persisted(ready.number)
    raft.ready()
    for _ in range(5):
        raft.tick()
    assert not raft.quiesced
    raft.applied(2)
    raft.tick()
    assert raft.quiesced
