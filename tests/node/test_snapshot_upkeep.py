"""What a snapshot keeps is kept for somebody: the log behind it, replaced files, and what its peers could not get of it."""

from __future__ import annotations

import dataclasses

import pytest
from node.ring import POLICY, Ring, expected, write
from node.test_healing import damage_all, table_paths
from node.test_rebuilding import TICKS, apart, compacted_alone, eager

from marble import snapshotting
from marble.errors import CorruptionError
from marble.jobs import ScrubJob
from marble.raft.messages import MessageKind
from marble.snapshotting import GARBAGE_TICKS, SnapshotPolicy


def test_a_node_alone_keeps_no_log_behind_its_snapshot() -> None:
    ring = Ring(1, policy=SnapshotPolicy(distance=20))
    ring.create()
    ring.write(30)
    assert ring[1].raft.log.first_index == ring[1].raft.snapshot.index + 1
    # As soon as somebody else takes part, he may lag.
    several = Ring(2, policy=SnapshotPolicy(distance=20))
    several.create()
    several.write(30)
    assert several[1].raft.log.first_index < several[1].raft.snapshot.index


def test_the_log_behind_a_snapshot_is_no_larger_than_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshotting, "TAIL_BYTES_MIN", 2000)
    ring = Ring(machine=eager, policy=SnapshotPolicy(distance=50))
    ring.create()
    for number in range(120):
        ring[1].propose(write(number % 3, f"{number}" * 100))  # Three rows, written again and again.
        ring.settle()
    ring.tick()
    for peer in ring.peers.values():
        store, log = peer.stores[0], peer.raft.log
        newest = store.newest()
        state = newest.nbytes + sum(ref.nbytes for ref in store.files(newest))
        kept = log.bytes(log.first_index, newest.index + 1)
        assert 2000 < state < log.bytes(newest.index + 1, log.last_index + 1) * 10
        assert 0 < kept <= state
        # One entry more would be too much.
        assert kept + 400 > state


def test_files_that_only_a_snapshot_needs_go_although_nobody_writes() -> None:
    ring = Ring(machine=eager, policy=dataclasses.replace(POLICY, garbage_bytes=1))
    ring.create()
    ring.write(25)
    ring.write(30)
    ring[2].driver.snapshots.want()
    ring.tick(2)
    assert ring[2].raft.snapshot.index == ring[2].raft.applied_index
    compacted_alone(ring, 2)
    kept = {path.split("/")[1] for path in table_paths(ring, 2)}
    assert set(ring[2].files.list("tables")) > kept
    ring.tick(2 * GARBAGE_TICKS)
    assert ring[2].raft.snapshot.index == ring[2].raft.applied_index
    assert set(ring[2].files.list("tables")) == kept
    ring.crash(2)
    ring.restart(2)
    assert ring[2].rows() == expected(30)


def lagging() -> Ring:
    """Nodes 1 and 2 have a snapshot of what they have applied, which node 3 needs; nobody writes."""
    ring = Ring(machine=eager)
    ring.create()
    ring.crash(3)
    ring.write(25)
    ring.write(40)
    for number in (1, 2):
        ring[number].driver.snapshots.want()
    ring.tick(2)
    assert ring[1].raft.snapshot.index == ring[1].raft.applied_index
    assert ring[1].raft.log.first_index > 3
    return ring


def compact(ring: Ring, number: int) -> None:
    while ring[number].machines[0].compact():
        continue


def test_a_snapshot_that_nobody_can_fetch_is_made_anew() -> None:
    ring = lagging()
    paths = table_paths(ring, 1)
    compact(ring, 1)
    before = ring[1].stores[0].newest()
    assert not set(table_paths(ring, 1)) & set(paths)
    for number in (1, 2):
        for path in paths:
            ring[number].files.flip_bit(path, 8 * 700)
    ring.restart(3)
    ring.tick(TICKS)
    assert ring[3].rows() == expected(40)
    assert MessageKind.INSTALL_SNAPSHOT_RESPONSE in ring.kinds(3)
    after = ring[1].stores[0].newest()
    assert after.meta == before.meta
    assert after != before


def test_a_damaged_file_that_nobody_read_is_found_when_a_peer_cannot_get_it() -> None:
    ring = lagging()
    compact(ring, 1)
    ring[1].driver.snapshots.want(renew=True)
    ring.tick(2)
    assert {ref.name for ref in ring[1].machines[0].live()} == ring[1].stores[0].kept()
    damage_all(ring, 1)
    assert ring[1].machines[0].damaged() == []
    ring.restart(3)
    compactor, checked = ring[1].driver.compactor, 0
    for _ in range(TICKS // 10):
        ring.tick(10)
        while (job := compactor.take_job()) is not None:
            job.run()
            compactor.finish_job(job)
            checked += isinstance(job, ScrubJob) and bool(job.name)
        if checked and ring[3].raft.applied_index == ring[1].raft.applied_index and not ring[1].machines[0].damaged():
            break
    assert ring[1].rows() == ring[3].rows() == expected(40)
    # Once, and not again and again: there is no time set for that here.
    assert 0 < checked <= 2 * len(table_paths(ring, 1))


def test_a_peer_whose_snapshot_is_too_old_takes_one_for_who_is_built_anew() -> None:
    ring = apart(57, 2)
    # Node 2 has a snapshot, and a log, that begin behind those of the others; and then nobody writes.
    ring[2].driver.snapshots.want()
    ring.tick(2)
    ring[2].driver.snapshots.purge(tailless=True)
    assert ring[2].raft.log.first_index > ring[1].raft.snapshot.index + 1
    with pytest.raises(CorruptionError):
        ring[2].rows()
    ring.tick(2 * TICKS)
    assert ring[2].rows() == expected(57)


def leftover(ring: Ring, number: int) -> str:
    """A file of the newest snapshot of node 1 lies at node `number`, too, where nobody needs it, and it is damaged."""
    name = table_paths(ring, 1)[0]
    data = bytearray(ring[1].files.read(name))
    data[-20] ^= 1  # In what is read when the file is opened.
    ring[number].files.put(name, bytes(data))
    return name


def test_a_damaged_file_that_was_here_before_keeps_nobody_from_taking_a_snapshot() -> None:
    ring = lagging()
    ring.restart(3)
    path = leftover(ring, 3)
    ring.tick(TICKS)
    assert ring[3].raft.applied_index == ring[1].raft.applied_index
    assert ring[3].rows() == expected(40)
    assert ring[3].machines[0].damaged() == []
    assert ring[3].files.read(path) == ring[1].files.read(path)


def test_a_damaged_file_that_was_here_before_keeps_nobody_from_being_built_anew() -> None:
    ring = apart(57, 2)
    path = leftover(ring, 2)
    with pytest.raises(CorruptionError):
        ring[2].rows()
    ring.tick(2 * TICKS)
    assert ring[2].rows() == expected(57)
    assert ring[2].files.read(path) == ring[1].files.read(path)
