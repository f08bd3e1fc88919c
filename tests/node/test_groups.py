"""Many groups on a node: what they share, and that those which sleep cost nothing."""

from __future__ import annotations

import pytest
from node.ring import ELECTION_TICKS, Ring, expected, write

from marble.errors import UsageError
from marble.raft.messages import Message, MessageKind
from marble.transport.codec import Envelope
from marble.types import Role

GROUPS = (0, 3, 7)
QUIESCE_TICKS = 6


def asleep(ring: Ring) -> bool:
    return not any(peer.groups.awake for peer in ring.peers.values())


def sleeping_ring(**options: object) -> Ring:
    ring = Ring(groups=GROUPS, quiesce_ticks=QUIESCE_TICKS, **options)
    ring.tick(3 * QUIESCE_TICKS)
    assert asleep(ring)
    return ring


def test_groups_are_independent_and_share_one_log() -> None:
    ring = Ring(groups=GROUPS)
    for group in GROUPS:
        ring.create(group=group)
    ring.write(4, group=3)
    ring.write(2, group=7)
    for peer in ring.peers.values():
        assert peer.rows(0) == {}
        assert peer.rows(3) == expected(4)
        assert peer.rows(7) == expected(2)
    ring.kill(2)
    ring.restart(2)
    ring.tick(3)
    assert ring[2].rows(3) == expected(4)


def test_messages_of_all_groups_to_a_peer_travel_together() -> None:
    ring = Ring(groups=GROUPS)
    ring.tick(2)
    ring[1].peer_calls = 0
    ring[1].sent.clear()
    ring.tick(2, only=[1])
    heartbeats = [message for message in ring[1].sent if message.kind is MessageKind.HEARTBEAT]
    assert len(heartbeats) == 2 * len(GROUPS)
    assert ring[1].peer_calls == 2


def test_one_sync_serves_all_groups() -> None:
    ring = Ring(groups=GROUPS)
    for group in GROUPS:
        ring.create(group=group)
    syncs = 0
    sync = ring[1].log.sync

    def counted() -> None:
        nonlocal syncs
        syncs += 1
        sync()

    ring[1].log.sync = counted
    for group in GROUPS:
        ring[1].groups.use(group).propose([write(1)])
    begun, writes = ring[1].groups.begin()
    assert begun
    assert len(writes) == len(GROUPS)
    ring[1].log.sync()
    ring[1].groups.persisted(writes)
    ring[1].turn()
    assert syncs == 1


def test_idle_groups_sleep_and_one_beat_a_peer_stands_for_them_all() -> None:
    ring = sleeping_ring()
    for peer in ring.peers.values():
        peer.sent.clear()
    ring.tick(3 * ELECTION_TICKS)
    assert asleep(ring)
    assert {message.kind for message in ring[1].sent} == {MessageKind.NODE_BEAT}
    assert len(ring[1].sent) == 2 * (3 * ELECTION_TICKS // 2)
    assert not ring[2].sent
    assert not ring[3].sent


def test_a_group_that_sleeps_is_not_touched_by_a_tick() -> None:
    ring = sleeping_ring()
    ring[1].groups.tick()
    assert ring[1].groups.end_turn() == []


def test_a_write_wakes_its_group_alone() -> None:
    ring = sleeping_ring()
    ring.create(group=3)
    assert all(peer.groups.awake == {3} for peer in ring.peers.values())
    ring.tick(3 * QUIESCE_TICKS)
    assert asleep(ring)
    assert all(3 in peer.groups for peer in ring.peers.values())


def test_a_leader_that_falls_silent_wakes_those_who_follow_it() -> None:
    ring = sleeping_ring()
    ring.kill(1)
    ring.tick(ELECTION_TICKS)
    assert asleep_but(ring, 1)
    ring.tick(4 * ELECTION_TICKS)
    for group in GROUPS:
        assert [ring[number].groups.use(group).raft.role for number in (2, 3)].count(Role.LEADER) == 1


def asleep_but(ring: Ring, down: int) -> bool:
    return not any(peer.groups.awake for number, peer in ring.peers.items() if number != down)


def test_a_new_life_of_the_leader_wakes_those_who_follow_it() -> None:
    ring = sleeping_ring()
    ring.tick(4)
    beat = Message(MessageKind.NODE_BEAT, 1, 2, 0, context=ring[1].life)
    assert ring[2].groups.receive(Envelope(0, beat))
    assert not ring[2].groups.awake
    assert ring[2].groups.receive(Envelope(0, Message(MessageKind.NODE_BEAT, 1, 2, 0, context=ring[1].life + 1)))
    assert ring[2].groups.awake == set(GROUPS)


def test_a_leader_that_restarts_finds_its_groups_again() -> None:
    ring = sleeping_ring()
    ring.kill(1)
    ring.restart(1)
    ring.tick(6 * ELECTION_TICKS)
    for group in GROUPS:
        assert [peer.groups.use(group).raft.role for peer in ring.peers.values()].count(Role.LEADER) == 1
        assert len({peer.groups.use(group).raft.term for peer in ring.peers.values()}) == 1


def test_what_is_for_another_node_or_group_is_turned_away() -> None:
    ring = Ring(groups=GROUPS)
    heartbeat = Message(MessageKind.HEARTBEAT, 1, 2, 5)
    assert not ring[3].groups.receive(Envelope(0, heartbeat))
    assert not ring[2].groups.receive(Envelope(1, heartbeat))
    with pytest.raises(UsageError, match="no group 1"):
        ring[2].groups.use(1)
    with pytest.raises(UsageError, match="there already"):
        ring[2].groups.add(ring[2].groups.use(0))


def test_who_could_not_be_sent_to_is_probed() -> None:
    ring = Ring(groups=GROUPS)
    for group in GROUPS:
        ring.create(group=group)
    ring[1].groups.report_unreachable(2)
    states = {ring[1].groups.use(group).raft.progress[2].state.value for group in GROUPS}
    assert states == {"probe"}
