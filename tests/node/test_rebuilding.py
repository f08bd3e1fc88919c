"""A node whose damaged files nobody else has builds its tables anew from a peer's snapshot and its own log."""

from __future__ import annotations

import dataclasses

import pytest
from node.ring import ELECTION_TICKS, Ring, expected, write
from node.ring import POLICY as RING_POLICY
from node.test_healing import damage_all, delete, rows_in_time, stored_ring, table_paths

from marble.errors import CorruptionError, ProtocolError
from marble.lsm.compaction import CompactionPolicy
from marble.lsm.files import TableFiles
from marble.lsm.machine import TableMachine
from marble.lsm.store import StorePolicy
from marble.raft.messages import Message, MessageKind
from marble.rebuilding import ASK_AGAIN_FACTOR, DESCRIPTION, describe, described
from marble.snapshotting import GARBAGE_TICKS
from marble.testing.disk import SimulatedFiles
from marble.transport.codec import Envelope
from marble.transport.snapshot_rows import piece_row
from marble.types import Position, Role

TICKS = 400
"""More than the files, the wait after the last peer, and a snapshot take."""


EAGER = StorePolicy(CompactionPolicy(level0_files=2, level0_files_max=2), 0, 0)


def eager(files: SimulatedFiles, group: int) -> TableMachine:
    return TableMachine(files=TableFiles(files, group), policy=EAGER)


def compacted_alone(ring: Ring, number: int) -> None:
    """Let one node compact, so that its files are its own."""
    machine = ring[number].machines[0]
    while machine.compact():
        continue
    others = {path for other in ring.peers if other != number for path in table_paths(ring, other)}
    assert not others & set(table_paths(ring, number))


def apart(rows: int, number: int) -> Ring:
    """A ring in which node `number` has files of its own, all of them damaged."""
    ring = Ring(machine=eager)
    ring.create()
    ring.write(25)  # What is written again: the ranges of files have keys in common, and compaction has work.
    ring.write(rows)
    compacted_alone(ring, number)
    damage_all(ring, number)
    return ring


def test_tables_are_built_anew_when_no_peer_has_the_file() -> None:
    ring = apart(57, 2)
    machine, before = ring[2].machines[0], ring[2].raft.applied_index
    with pytest.raises(CorruptionError):
        ring[2].rows()
    ring.tick(TICKS)
    assert machine.damaged() == []
    assert ring[2].rows() == expected(57)
    assert (machine.applied_index, ring[2].raft.applied_index) == (before, before)
    # All goes on, and what was rebuilt is in a snapshot of its own: a start needs no peer.
    ring.write(8, first=57)
    ring.tick(5)
    assert ring[2].raft.snapshot.index >= before
    for other in (1, 3):
        ring.kill(other)
    ring.crash(2)
    ring.restart(2)
    assert ring[2].machines[0].damaged() == []


def test_what_was_deleted_or_written_since_the_snapshot_is_not_lost() -> None:
    ring = apart(55, 2)
    with pytest.raises(CorruptionError):
        ring[2].rows()
    ring[1].propose(write(54, "newer"))
    ring.settle()
    ring.tick(TICKS)
    assert ring[2].rows() == ring[1].rows() == {**expected(55), 54: "newer"}


def test_who_cannot_apply_is_built_anew_too_and_takes_a_newer_snapshot() -> None:
    ring = apart(50, 2)
    held = True
    ring.drop = lambda sender, to, envelope: held and envelope.message.kind is MessageKind.SNAPSHOT_PIECE
    delete(ring, 3, 5)
    ring.write(40, first=50)
    stuck = ring[2].raft.applied_index
    assert ring[2].driver.snapshots.stalled is not None
    assert ring[1].raft.snapshot.index > stuck
    held = False
    ring.tick(TICKS)
    assert ring[2].driver.snapshots.stalled is None
    assert ring[2].raft.applied_index == ring[1].raft.applied_index
    assert ring[2].rows() == ring[1].rows() == {k: v for k, v in expected(90).items() if k not in (3, 5)}


def test_a_leader_that_cannot_apply_hands_over_and_heals() -> None:
    ring = apart(50, 1)
    held = True
    ring.drop = lambda sender, to, envelope: held and envelope.message.kind is MessageKind.SNAPSHOT_PIECE
    delete(ring, 3)
    assert ring[1].driver.snapshots.stalled is not None
    ring.tick(3 * ELECTION_TICKS)
    assert ring[1].raft.role is Role.FOLLOWER
    held = False
    ring.tick(TICKS)
    (leader,) = (number for number in (2, 3) if ring[number].raft.role is Role.LEADER)
    assert ring[1].driver.snapshots.stalled is None
    ring.write(3, first=50, leader=leader)
    assert ring[1].rows() == ring[leader].rows() == {k: v for k, v in expected(53).items() if k != 3}


def test_a_leader_alone_has_nobody_to_hand_over_to() -> None:
    ring = stored_ring(50, size=1)
    damage_all(ring, 1)
    delete(ring, 3)
    ring.tick(TICKS)
    assert ring[1].raft.role is Role.LEADER
    assert ring[1].driver.snapshots.stalled is not None


def test_a_crash_at_any_time_leaves_it_damaged_or_whole_and_it_heals() -> None:
    ring = apart(57, 2)
    with pytest.raises(CorruptionError):
        ring[2].rows()
    for ticks in (40, 80, 120, 3, 1, 1, 1, 1, 1, 1):
        ring.tick(ticks)
        ring.crash(2)
        ring.restart(2)
        try:
            assert ring[2].rows() == expected(57)
        except CorruptionError:
            assert ring[2].machines[0].damaged()
    ring.tick(TICKS)
    assert rows_in_time(ring, 2) == expected(57)


def test_a_peer_that_is_silent_is_passed_over() -> None:
    ring = apart(57, 2)
    with pytest.raises(CorruptionError):
        ring[2].rows()
    ring.drop = lambda sender, to, envelope: sender == 1 and envelope.message.kind is MessageKind.SNAPSHOT_PIECE
    ring.tick(TICKS)
    assert ring[2].rows() == expected(57)
    assert {message.to for message in ring[2].sent if message.context == DESCRIPTION} == {1, 3}


def test_nobody_to_ask_costs_a_question_now_and_then() -> None:
    ring = apart(57, 2)
    with pytest.raises(CorruptionError):
        ring[2].rows()
    ring.drop = lambda sender, to, envelope: envelope.message.kind is MessageKind.SNAPSHOT_PIECE
    ring.tick(TICKS)
    questions = [message for message in ring[2].sent if message.context == DESCRIPTION]
    assert 2 <= len(questions) <= 2 * (1 + TICKS // (ASK_AGAIN_FACTOR * 10))
    assert ring[2].machines[0].damaged()


def test_a_description_is_what_was_described_or_refused() -> None:
    ring = stored_ring(30)
    info = ring[1].stores[0].newest()
    fetch = Message(MessageKind.SNAPSHOT_FETCH, 2, 1, 1, context=DESCRIPTION)
    ring[1].sent.clear()
    sent: list[Envelope] = []
    transfer = ring[1].driver.snapshots.transfer
    transfer._post = sent.append
    transfer.serve(fetch, 1)
    (answer,) = sent
    assert described(0, answer) == info
    assert describe(info)
    for data in (b"", b"x" * 16, b"x" * 64):
        with pytest.raises(ProtocolError):
            described(0, forged(answer, data))


def forged(answer: Envelope, data: bytes) -> Envelope:
    position = Position(answer.message.log_index, answer.message.log_term)
    return Envelope(0, answer.message, piece_row(0, position, DESCRIPTION, data) if data else None)


def test_files_that_only_an_old_snapshot_needs_do_not_pile_up() -> None:
    for bound, goes in ((1, True), (2**40, False)):
        ring = Ring(machine=eager, policy=dataclasses.replace(RING_POLICY, garbage_bytes=bound))
        ring.create()
        ring.write(25)
        ring.write(30)
        before = ring[2].raft.snapshot.index
        compacted_alone(ring, 2)
        ring.tick(2 * GARBAGE_TICKS)
        assert (ring[2].raft.snapshot.index > before) is goes
        there = {path for path in ring[2].files.list("tables") if path.endswith(".arrow")}
        assert (there == {path.split("/")[1] for path in table_paths(ring, 2)}) is goes
        assert ring[2].rows() == expected(30)


def test_what_is_lent_is_kept_while_it_is_asked_for() -> None:
    ring = stored_ring(30)
    store = ring[1].stores[0]
    transfer = ring[1].driver.snapshots.transfer
    lent = store.newest()
    transfer.serve(Message(MessageKind.SNAPSHOT_FETCH, 2, 1, 1, context=DESCRIPTION), 1)
    ring.write(40, first=30)
    assert lent in store.infos()
    assert ring[1].raft.log.first_index > lent.index  # The log behind it need not stay.
    ring.tick(200)
    ring.write(20, first=70)
    assert lent not in store.infos()
