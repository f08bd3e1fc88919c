"""Snapshots as drivers handle them: taken, purged behind, fetched by who lags, recovered from."""

from __future__ import annotations

import pytest
from node.ring import POLICY, Ring, expected, write

from marble.errors import CorruptionError, InvariantError
from marble.jobs import ApplyJob, RestoreJob
from marble.logstore.log import Log, LogOptions
from marble.raft.messages import Message, MessageKind
from marble.raft.progress import ProgressState
from marble.snapshotting import SnapshotPolicy
from marble.transport.codec import Envelope
from marble.types import Role


def ring_with_rows(count: int, **options: object) -> Ring:
    ring = Ring(**options)
    ring.create()
    ring.write(count)
    return ring


def test_a_snapshot_is_taken_by_distance_and_the_log_is_purged_but_for_its_tail() -> None:
    ring = ring_with_rows(50)
    for peer in ring.peers.values():
        assert peer.raft.snapshot is not None
        assert peer.raft.snapshot.index == 40
        assert peer.raft.log.first_index == 40 - 5 + 1
        assert [info.index for info in peer.stores[0].infos()] == [40]
        with pytest.raises(InvariantError):
            peer.log.read(0, 35, 36)
        assert peer.rows() == expected(50)


def test_segments_that_nothing_needs_are_deleted() -> None:
    ring = ring_with_rows(200)
    for peer in ring.peers.values():
        segments = [name for name in peer.files.list("log") if name.endswith(".arrows")]
        assert len(segments) < 5
        assert peer.log.nbytes < 5 * 8192


def test_a_snapshot_is_taken_by_bytes_and_the_tail_is_bounded_by_them() -> None:
    ring = Ring(policy=SnapshotPolicy(distance=1000, log_bytes=4096))
    ring.create()
    for key in range(10):
        ring[1].propose(write(key, "x" * 1000))
        ring.settle()
    ring.tick()
    for peer in ring.peers.values():
        assert peer.raft.snapshot is not None
        assert peer.raft.log.bytes(peer.raft.log.first_index, peer.raft.snapshot.index + 1) <= 4096


def test_a_node_starts_from_its_snapshot_and_the_log_behind_it() -> None:
    ring = ring_with_rows(50)
    ring.crash(3)
    ring.restart(3)
    assert ring[3].raft.applied_index >= 40
    assert ring[3].raft.snapshot == ring[1].raft.snapshot
    ring.tick(4)
    assert ring[3].rows() == expected(50)


def test_a_follower_that_missed_what_is_purged_fetches_a_snapshot_piece_by_piece() -> None:
    ring = ring_with_rows(10)
    ring.crash(3)
    ring.write(60, first=10)
    assert ring[1].raft.log.first_index > 20
    ring.restart(3)
    ring.tick(6)
    assert ring[3].rows() == expected(70)
    assert ring[3].raft.commit_index == ring[1].raft.commit_index
    assert sum(message.kind is MessageKind.SNAPSHOT_PIECE for message in ring[1].sent) > 3
    assert ring[1].raft.progress[3].state is ProgressState.REPLICATE
    # And it goes on from there after a restart.
    ring.crash(3)
    ring.restart(3)
    ring.tick(4)
    assert ring[3].rows() == expected(70)


def test_a_lost_piece_is_asked_for_again() -> None:
    ring = ring_with_rows(10)
    ring.crash(3)
    ring.write(60, first=10)
    lost = 0

    def lose_every_other(sender: int, to: int, envelope: object) -> bool:
        nonlocal lost
        if envelope.message.kind is not MessageKind.SNAPSHOT_PIECE:
            return False
        lost += 1
        return lost % 2 == 1

    ring.drop = lose_every_other
    ring.restart(3)
    for _ in range(100):
        ring.tick(POLICY.patience_ticks + 1)
        if ring[3].raft.applied_index == ring[1].raft.applied_index:
            break
    assert lost > 5
    assert ring[3].rows() == expected(70)


def test_what_had_arrived_before_a_restart_does_not_come_again() -> None:
    ring = ring_with_rows(10)
    ring.crash(3)
    ring.write(100, first=10)
    pieces: list[int] = []

    def stop_half_way(sender: int, to: int, envelope: object) -> bool:
        if envelope.message.kind is MessageKind.SNAPSHOT_PIECE:
            pieces.append(envelope.message.context)
            return len(pieces) == 8
        return False

    ring.drop = stop_half_way
    ring.restart(3)
    while len(pieces) < 8:
        ring.tick()
    ring.kill(3)
    ring.restart(3)
    # The leader learns by itself that its peer asks for nothing any more, and offers the snapshot again.
    ring.tick(11 * POLICY.patience_ticks + 5)
    assert ring[3].rows() == expected(110)
    assert pieces[8] > 0
    assert len(set(pieces)) < len(pieces) + 2


def test_a_sender_without_the_snapshot_refuses_and_offers_its_newest() -> None:
    ring = ring_with_rows(10)
    ring.crash(3)
    ring.write(60, first=10)
    ring.restart(3)
    stale = ring[1].stores[0].newest()
    seen: list[int] = []

    def forget(sender: int, to: int, envelope: object) -> bool:
        # Between the offer and the first question the sender's snapshot is superseded, and its pin forgotten.
        if envelope.message.kind is MessageKind.SNAPSHOT_FETCH and not seen:
            seen.append(envelope.message.log_index)
            ring[1].driver.snapshots.transfer.release(3)
            for key in range(70, 95):
                ring[1].propose(write(key))
        return False

    ring.drop = forget
    ring.tick(4 * POLICY.patience_ticks)
    assert seen == [stale.index]
    assert MessageKind.INSTALL_SNAPSHOT_RESPONSE in ring.kinds(3)
    assert ring[3].rows() == expected(95)


def test_the_log_behind_a_snapshot_that_is_being_fetched_is_not_purged() -> None:
    ring = ring_with_rows(10)
    ring.crash(3)
    ring.write(60, first=10)
    ring.drop = lambda sender, to, envelope: envelope.message.kind is MessageKind.SNAPSHOT_PIECE
    ring.restart(3)
    ring.tick(6)
    pinned = ring[1].driver.snapshots.transfer.pinned_index
    assert pinned is not None
    ring.write(60, first=70)
    assert ring[1].raft.snapshot.index > pinned + 40
    assert ring[1].raft.log.first_index <= pinned + 1
    ring.drop = lambda sender, to, envelope: False
    ring.tick(2 * POLICY.patience_ticks)
    # It needed no second snapshot.
    assert ring[3].rows() == expected(130)
    ring.write(30, first=130)
    assert ring[1].raft.log.first_index > pinned + 1


def test_a_peer_that_falls_silent_loses_its_pin() -> None:
    ring = ring_with_rows(10)
    ring.crash(3)
    ring.write(60, first=10)
    ring.restart(3)
    ring.drop = lambda sender, to, envelope: envelope.message.kind is MessageKind.SNAPSHOT_PIECE
    ring.tick(6)
    assert ring[1].driver.snapshots.transfer.pinned_index is not None
    ring.crash(3)
    ring.tick(10 * POLICY.patience_ticks + 2)
    assert ring[1].driver.snapshots.transfer.pinned_index is None
    assert ring[1].raft.role is Role.LEADER


def test_an_offer_that_was_lost_is_made_again_soon() -> None:
    """Not after the time that is left to a peer which has begun to fetch."""
    ring = ring_with_rows(10)
    ring.crash(3)
    ring.write(60, first=10)
    lost: list[int] = []

    def lose_one(sender: int, to: int, envelope: Envelope) -> bool:
        first = envelope.message.kind is MessageKind.INSTALL_SNAPSHOT and not lost
        if first:
            lost.append(to)
        return first

    ring.drop = lose_one
    ring.restart(3)
    ring.tick(6)
    assert lost == [3]
    ring.tick(2 * POLICY.patience_ticks)
    assert ring[3].rows() == expected(70)


def test_a_snapshot_is_not_installed_under_a_job_of_the_machine() -> None:
    ring = ring_with_rows(10)
    ring.crash(3)
    ring.write(60, first=10)
    ring.restart(3)
    follower = ring[3].driver
    # A job is out while the pieces arrive.
    follower.request_snapshot()
    out = follower.take_apply()
    assert isinstance(out, ApplyJob)
    ring.tick(6)
    assert follower.snapshots.has_install
    assert follower.raft.log.first_index == 1
    out.run()
    follower.finish_apply(out)
    # The core first, before any other job: its log is about to be thrown away.
    assert follower.take_apply() is None
    number = follower.begin()
    assert follower.raft.log.first_index > 1
    # Nor is it restored before it is durable.
    assert follower.take_apply() is None
    ring[3].log.sync()
    follower.persisted(number)
    job = follower.take_apply()
    assert isinstance(job, RestoreJob)
    job.run()
    follower.finish_apply(job)
    ring[3].turn()
    ring.tick(3)
    assert ring[3].rows() == expected(70)


def bring(ring: Ring) -> int:
    """Put the leader's newest snapshot at node 3, whole, and let the leader's offer of it come; returns its index."""
    leader, follower = ring[1].driver, ring[3].driver
    info = ring[1].stores[0].newest()
    receiver = ring[3].stores[0].receive(info)
    while not receiver.complete:
        receiver.write(receiver.offset, ring[1].stores[0].piece(info, receiver.offset, 4096))
    receiver.finish()
    message = Message(
        MessageKind.INSTALL_SNAPSHOT,
        1,
        3,
        leader.raft.term,
        log_index=info.index,
        log_term=info.term,
        members=info.members,
    )
    follower.receive(leader.snapshots.transfer.offer(message))
    leader.snapshots.transfer.release(3)
    assert follower.snapshots.has_install
    return info.index


def test_a_snapshot_that_takes_the_place_of_one_that_waits_to_be_restored_leaves_nothing_behind() -> None:
    ring = ring_with_rows(10)
    ring.kill(3)
    ring.write(60, first=10)
    first = bring(ring)
    follower = ring[3].driver
    # Its sync is under way, or done and the machine has not come to it, when the next one is here.
    assert follower.begin()
    ring.write(60, first=70)
    second = bring(ring)
    assert second > first
    number = follower.begin()
    ring[3].log.sync()
    follower.persisted(number)
    job = follower.take_apply()
    assert isinstance(job, RestoreJob)
    assert job.info.index == second
    job.run()
    follower.finish_apply(job)
    assert follower.raft.applied_index == second
    ring.down.clear()
    ring.tick(6)
    assert ring[3].rows() == expected(130)
    # Nobody needs the first one any more: it goes with the next that is taken.
    ring.write(30, first=130)
    assert [info.index for info in ring[3].stores[0].infos()] == [ring[3].raft.snapshot.index]
    assert ring[3].raft.snapshot.index > second


def test_an_offer_that_is_of_no_use_is_answered_and_not_fetched() -> None:
    ring = ring_with_rows(50)
    leader, follower = ring[1].driver, ring[2].driver
    offers: list = []
    leader._post = lambda messages, hold=True: offers.extend(messages)
    info = ring[1].stores[0].newest()

    message = Message(
        MessageKind.INSTALL_SNAPSHOT,
        1,
        2,
        leader.raft.term,
        log_index=info.index,
        log_term=info.term,
        members=info.members,
    )
    ring[2].sent.clear()
    follower.receive(leader.snapshots.transfer.offer(message))
    ring[2].turn()
    assert follower.snapshots.transfer.receiving is None
    assert [sent.kind for sent in ring[2].sent] == [MessageKind.APPEND_ENTRIES_RESPONSE]


def test_a_purged_log_without_its_snapshot_is_damage() -> None:
    ring = ring_with_rows(50)
    ring.crash(3)
    for name in ring[3].files.list("snapshots"):
        ring[3].files.remove(f"snapshots/{name}")
    with pytest.raises(CorruptionError, match="no snapshot goes up to there"):
        ring.restart(3)


def test_a_snapshot_ahead_of_the_log_is_left_alone() -> None:
    ring = ring_with_rows(50)
    ring.crash(3)
    # What a node finds that lost its power between the last piece and the sync of its log.
    ring[3].files.make_directory("other")
    files = ring[3].files
    Log.open(ring[2].files, LogOptions(), writable=False)
    for path in [f"log/{name}" for name in files.list("log")]:
        files.remove(path)
    ring.restart(3)
    assert ring[3].raft.applied_index == 0
    assert ring[3].raft.snapshot is None


def test_a_snapshot_on_request_is_taken_at_once() -> None:
    ring = ring_with_rows(3)
    driver = ring[1].driver
    driver.request_snapshot()
    ring[1].turn()
    assert ring[1].raft.snapshot.index == ring[1].raft.applied_index
    driver.request_snapshot()
    assert driver.take_outcome().snapshots == [ring[1].raft.applied_index]


def test_a_full_disk_gives_no_snapshot_and_does_no_harm() -> None:
    ring = ring_with_rows(10)
    driver = ring[1].driver
    store = ring[1].stores[0]

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    store.write = full
    for key in range(10, 25):
        ring[1].propose(write(key))
        ring.settle()
    assert ring[1].raft.snapshot is None
    assert any(isinstance(each, OSError) for each in [*driver.take_outcome().snapshots, OSError()])
    del store.write
    ring.write(20, first=25)
    assert ring[1].raft.snapshot is not None
    assert ring[1].rows() == expected(45)


def test_entries_that_are_purged_before_their_message_leaves_count_as_a_message_that_was_lost() -> None:
    ring = ring_with_rows(15)
    leader = ring[1]
    ring.drop = lambda sender, to, envelope: to == 3
    for key in range(15, 19):
        leader.propose(write(key))
        ring.settle()
    # A capture is written while the follower's answer makes the core send it old entries once more.
    leader.driver.request_snapshot()
    job = leader.driver.take_apply()
    job.run()
    leader.driver.finish_apply(job)
    file_job = leader.driver.take_snapshot()
    file_job.run()
    leader.raft.report_unreachable(3)
    answer = Message(MessageKind.HEARTBEAT_RESPONSE, 3, 1, leader.raft.term)
    leader.groups.receive(Envelope(0, answer))
    leader.driver.snapshots._policy = SnapshotPolicy(distance=20, tail=0, piece_bytes_max=256, patience_ticks=4)
    leader.driver.finish_snapshot(file_job)
    assert leader.raft.log.first_index > 16
    leader.turn()
    ring.drop = lambda sender, to, envelope: False
    ring.tick(10)
    assert ring[3].rows() == expected(19)


def test_what_becomes_due_while_a_snapshot_is_written_is_taken_when_that_is_done() -> None:
    ring = ring_with_rows(3)
    driver = ring[1].driver
    driver.request_snapshot()
    job = driver.take_apply()
    job.run()
    driver.finish_apply(job)
    writing = driver.take_snapshot()
    for key in range(3, 40):
        ring[1].propose(write(key))
        ring.settle()
    assert ring[1].raft.snapshot is None
    writing.run()
    driver.finish_snapshot(writing)
    ring[1].turn()
    assert ring[1].raft.snapshot.index == ring[1].raft.applied_index
