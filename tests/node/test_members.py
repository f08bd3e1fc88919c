"""Members that come and go, as drivers handle them: entries of the log that say who takes part and where they are reached."""

from __future__ import annotations

import pytest
from node.ring import Ring, expected

from marble.errors import NotLeaderError, UnavailableError, UsageError
from marble.snapshotting import SnapshotPolicy
from marble.types import Change, ChangeKind, Members, Role, Transition

ADD, LEARN, REMOVE = ChangeKind.ADD_VOTER, ChangeKind.ADD_LEARNER, ChangeKind.REMOVE


def change(ring: Ring, *changes: tuple[ChangeKind, int], leader: int = 1, **options: object) -> None:
    endpoints = {node: f"host{node}:1" for kind, node in changes if kind is not REMOVE}
    ring[leader].driver.propose_membership([Change(*each) for each in changes], endpoints, **options)
    ring[leader].turn()
    ring.settle()
    ring.tick(4)


def test_an_empty_node_becomes_a_learner_and_then_a_voter() -> None:
    ring = Ring()
    ring.create()
    ring.write(10)
    ring.add_empty(4)
    ring.tick(30)
    assert ring[4].raft.role is Role.FOLLOWER
    assert ring[4].raft.term == 0
    change(ring, (LEARN, 4))
    assert ring[4].rows() == expected(10)
    assert {peer.raft.members for peer in ring.peers.values()} == {Members((1, 2, 3), (), (4,))}
    change(ring, (ADD, 4))
    assert {peer.raft.members for peer in ring.peers.values()} == {Members((1, 2, 3, 4))}
    assert ring[2].driver.endpoints == {1: "host1:1", 2: "host2:1", 4: "host4:1"}


def test_an_empty_node_is_brought_there_by_a_snapshot_and_knows_who_is_who() -> None:
    ring = Ring()
    ring.create()
    change(ring, (LEARN, 9), (REMOVE, 3))
    ring.write(60)
    assert ring[1].raft.log.first_index > 20
    ring.add_empty(4)
    change(ring, (ADD, 4))
    ring.tick(4)
    assert ring[4].rows() == expected(60)
    assert ring[4].raft.members == Members((1, 2, 4), (), (9,))
    assert ring[4].driver.endpoints == {1: "host1:1", 4: "host4:1", 9: "host9:1"}
    ring.kill(4)
    ring.restart(4)
    ring.tick(4)
    assert ring[4].raft.members == Members((1, 2, 4), (), (9,))


def test_an_empty_node_takes_no_snapshot_before_it_knows_the_members() -> None:
    ring = Ring(policy=SnapshotPolicy(distance=1000))
    ring.create()
    ring.write(60)
    ring.add_empty(4, SnapshotPolicy(distance=10, tail=5))
    taken = []
    ring.drop = lambda sender, to, envelope: bool(taken.extend(ring[4].stores[0].infos()))
    change(ring, (LEARN, 4))
    ring.tick(4)
    assert ring[4].rows() == expected(60)
    assert ring[4].raft.snapshot is not None
    assert all(info.members == Members((1, 2, 3), (), (4,)) for info in [*taken, *ring[4].stores[0].infos()])


def test_members_and_endpoints_outlive_the_log_in_a_snapshot() -> None:
    ring = Ring()
    ring.create()
    change(ring, (LEARN, 4))
    ring.write(60)
    assert not ring[2].raft.log.changes
    ring.kill(2)
    ring.restart(2)
    assert ring[2].raft.members == Members((1, 2, 3), (), (4,))
    assert ring[2].driver.endpoints[4] == "host4:1"


def test_several_changes_go_through_a_joint_group_that_is_left_by_itself() -> None:
    ring = Ring()
    ring.create()
    for node in (4, 5):
        ring.add_empty(node)
    change(ring, (ADD, 4), (ADD, 5), (REMOVE, 3))
    assert ring[1].raft.members == Members((1, 2, 4, 5))
    assert len(ring[1].raft.log.changes) == 2
    # Both entries carry where everybody is: the second one was the leader's own idea.
    assert ring[5].driver.endpoints == {1: "host1:1", 4: "host4:1", 5: "host5:1"}


def test_an_explicit_joint_group_stays_until_it_is_left() -> None:
    ring = Ring()
    ring.add_empty(4)
    change(ring, (ADD, 4), (REMOVE, 2), transition=Transition.EXPLICIT)
    assert ring[1].raft.members.joint
    change(ring)
    assert ring[1].raft.members == Members((1, 3, 4))


def test_a_leader_that_is_removed_steps_down_and_the_others_go_on() -> None:
    ring = Ring()
    ring.create()
    ring.write(5)
    change(ring, (REMOVE, 1))
    assert ring[1].raft.role is Role.FOLLOWER
    ring.down.add(1)
    ring.tick(40)
    leader = next(number for number in (2, 3) if ring[number].raft.role is Role.LEADER)
    ring.write(5, first=5, leader=leader)
    assert ring[leader].rows() == expected(10)


def test_what_cannot_be_changed_is_refused_and_leaves_nothing_behind() -> None:
    ring = Ring()
    driver = ring[1].driver
    last = ring[1].raft.last_index
    for changes, endpoints, match in (
        ([Change(REMOVE, 9)], {}, "9"),
        ([Change(ADD, 4)], {4: ""}, "host:port"),
        ([Change(ADD, 4)], {5: "host:1"}, "neither take part"),
        ([], {}, "joint"),
    ):
        with pytest.raises(UsageError, match=match):
            driver.propose_membership(changes, endpoints)
    with pytest.raises(NotLeaderError):
        ring[2].driver.propose_membership([Change(ADD, 4)])
    assert ring[1].raft.last_index == last
    driver.propose_membership([Change(ADD, 4)], {4: "host4:1"})
    with pytest.raises(UnavailableError, match="under way"):
        driver.propose_membership([Change(ADD, 5)], {5: "host5:1"})


def test_a_node_that_is_no_member_talks_to_all_that_it_knows_of() -> None:
    ring = Ring()
    waiting = ring.add_empty(4)
    assert waiting.driver.peers == {4: "host4:1"}
    change(ring, (ADD, 4))
    assert 9 not in ring[1].driver.peers
    assert waiting.driver.peers == waiting.driver.endpoints
    change(ring, (REMOVE, 4))
    assert 4 not in ring[1].driver.peers


@pytest.mark.parametrize("size", [2, 3])
def test_a_leader_that_removed_itself_leaves_behind_a_group_that_knows(size: int) -> None:
    ring = Ring(size)
    ring[1].driver.propose_membership([Change(REMOVE, 1)])
    ring[1].turn()
    ring.settle()
    # It is stopped as soon as it knows: of two, the other could not be elected by what it knew before.
    ring.kill(1)
    assert {ring[node].raft.members.voters for node in range(2, size + 1)} == {tuple(range(2, size + 1))}
    ring.tick(30)
    assert [node for node in range(2, size + 1) if ring[node].raft.role is Role.LEADER] != []


def test_the_leader_that_takes_an_entry_in_stamps_its_time() -> None:
    ring = Ring()
    ring.create()
    change(ring, (LEARN, 4))
    raft = ring[2].raft
    times = ring[2].log.read(0, 1, raft.last_index + 1)["time_us"].to_pylist()
    assert set(times) == {7}
