"""Snapshots that refer to files: what a follower lacks is fetched, what is damaged is healed, and nothing else travels."""

from __future__ import annotations

from collections import Counter

import pytest
from node.file_machine import FileMachine
from node.ring import POLICY, Ring, expected, write

from marble.errors import CorruptionError
from marble.machine import FileRef, HealingMachine, StoredMachine
from marble.raft.messages import Message, MessageKind
from marble.raft.progress import ProgressState
from marble.transport.codec import Envelope


def file_ring(rows: int, **options: object) -> Ring:
    ring = Ring(machine=FileMachine, **options)
    ring.create()
    ring.write(rows)
    return ring


def table_files(ring: Ring, number: int) -> set[str]:
    files = ring[number].files
    return set(files.list("tables")) if files.exists("tables") else set()


def pieces(ring: Ring, number: int) -> Counter[int]:
    """How many pieces of each file a node has sent, by the file's key."""
    return Counter(
        message.reject_hint
        for message in ring[number].sent
        if message.kind is MessageKind.SNAPSHOT_PIECE and not message.reject
    )


def test_the_machine_of_these_tests_is_one_with_files() -> None:
    machine = file_ring(1)[1].machines[0]
    assert isinstance(machine, StoredMachine)
    assert isinstance(machine, HealingMachine)


def test_a_follower_fetches_the_files_that_it_lacks_and_no_others() -> None:
    ring = file_ring(50)
    ring.crash(3)
    ring.write(60, first=50)
    had = {ref.key for ref in ring[3].machines[0].refs}
    ring.restart(3)
    ring[1].sent.clear()
    ring.tick(8)
    assert ring[3].rows() == expected(110)
    sent = pieces(ring, 1)
    refs = {ref.key: ref for ref in ring[1].stores[0].files(ring[3].stores[0].newest())}
    assert len(had & refs.keys()) > 3
    assert sent.keys() - {0} == refs.keys() - had
    for key in sent.keys() - {0}:
        assert sent[key] == -(-refs[key].nbytes // POLICY.piece_bytes_max)
    assert ring[1].raft.progress[3].state is ProgressState.REPLICATE
    # And it goes on from these files after a restart.
    ring.crash(3)
    ring.restart(3)
    ring.tick(4)
    assert ring[3].rows() == expected(110)
    assert not any(name.endswith((".part", ".tmp")) for name in table_files(ring, 3))


def test_files_that_nothing_needs_go() -> None:
    ring = file_ring(20)
    for version in range(1, 8):
        for key in range(20):
            ring[1].propose(write(key, f"version {version}"))
            ring.settle()
    ring.tick()
    for number, peer in ring.peers.items():
        machine = peer.machines[0]
        kept = {ref.name for info in peer.stores[0].infos() for ref in peer.stores[0].files(info)}
        assert table_files(ring, number) == {machine.path(name).split("/")[1] for name in kept}
        assert machine.collected > 3


def test_what_had_arrived_before_a_restart_does_not_come_again() -> None:
    ring = file_ring(10)
    ring.crash(3)
    ring.write(100, first=10)
    arrived: list[tuple[int, int]] = []

    def stop_later(sender: int, to: int, envelope: object) -> bool:
        message = envelope.message
        if message.kind is MessageKind.SNAPSHOT_PIECE:
            arrived.append((message.reject_hint, message.context))
            return len(arrived) == 60
        return False

    ring.drop = stop_later
    ring.restart(3)
    while len(arrived) < 60:
        ring.tick()
    assert len({key for key, _ in arrived}) > 4
    # What came after the piece that was lost waited for it in memory.
    written = set(arrived[:59])
    ring.kill(3)
    ring.restart(3)
    ring.tick(11 * POLICY.patience_ticks + 5)
    assert ring[3].rows() == expected(110)
    again = [piece for piece, count in Counter(arrived).items() if count > 1 and piece in written]
    # The end of the snapshot's own file, which is read anew.
    assert len(again) <= 1


def test_another_leader_goes_on_where_the_first_one_ended() -> None:
    ring = file_ring(10)
    ring.crash(3)
    ring.write(100, first=10)
    arrived: list[tuple[int, int, int]] = []

    def note(sender: int, to: int, envelope: object) -> bool:
        message = envelope.message
        if message.kind is MessageKind.SNAPSHOT_PIECE and not message.reject:
            if len(arrived) >= 60 and sender == 1:
                return True
            arrived.append((message.reject_hint, message.context, sender))
        return False

    ring.drop = note
    ring.restart(3)
    while len(arrived) < 60:
        ring.tick()
    ring.crash(1)
    ring[2].raft.forget_leader()
    ring[3].raft.forget_leader()
    ring.elect(2)
    ring.tick(11 * POLICY.patience_ticks + 5)
    assert ring[3].rows() == expected(110)
    files = [(key, offset) for key, offset, _ in arrived if key]
    assert len(files) <= len(set(files)) + 1
    assert {sender for _, _, sender in arrived} == {1, 2}


def test_a_damaged_file_of_the_leader_comes_from_another_peer() -> None:
    ring = file_ring(10)
    ring.crash(3)
    ring.write(100, first=10)
    info = ring[1].stores[0].newest()
    ref = ring[1].stores[0].files(info)[5]
    ring[1].files.flip_bit(ring[1].machines[0].path(ref.name), 800)
    ring.restart(3)
    ring.tick(8)
    assert ring[3].rows() == expected(110)
    assert pieces(ring, 2)[ref.key] > 0
    assert 0 not in pieces(ring, 2)


def test_a_file_that_is_nowhere_to_be_had_refuses_the_snapshot() -> None:
    ring = file_ring(10)
    ring.crash(3)
    ring.write(100, first=10)
    for number in (1, 2):
        ref = ring[1].stores[0].files(ring[1].stores[0].newest())[5]
        ring[number].files.flip_bit(ring[number].machines[0].path(ref.name), 800)
    ring.restart(3)
    ring.tick(8)
    assert MessageKind.INSTALL_SNAPSHOT_RESPONSE in ring.kinds(3)
    assert ring[3].raft.applied_index < ring[1].raft.log.first_index
    assert ring[3].stores[0].newest() is None or ring[3].stores[0].newest().index < ring[1].raft.log.first_index
    # A newer snapshot without that file is fetched, with what came already.
    for key in range(110):
        ring[1].propose(write(key, f"value {key}"[::-1]))
        ring.settle()
    ring.tick(8)
    assert ring[3].rows() == ring[1].rows()


@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_file_is_healed_from_a_peer_while_serving(missing: bool) -> None:
    ring = file_ring(50)
    machine = ring[2].machines[0]
    ref = machine.refs[2]
    if missing:
        ring[2].files.remove(machine.path(ref.name))
    else:
        ring[2].files.flip_bit(machine.path(ref.name), 999)
    with pytest.raises(CorruptionError, match=ref.name):
        machine.read_all()
    ring.write(3, first=50)
    ring.tick(6)
    assert machine.damaged() == []
    machine.read_all()
    assert ring[2].rows() == expected(53)
    assert pieces(ring, 1)[ref.key] > 0
    assert not ring[2].stores[0].contents.damaged


def test_a_leader_is_healed_too_and_by_whoever_has_the_file() -> None:
    ring = file_ring(50)
    ref = ring[1].machines[0].refs[2]
    for number in (1, 2):
        ring[number].files.flip_bit(ring[number].machines[0].path(ref.name), 999)
        with pytest.raises(CorruptionError):
            ring[number].machines[0].read_all()
    # A node that knows of its own damage does not hand it out.
    ring.tick(6)
    for number in (1, 2):
        ring[number].machines[0].read_all()
        assert ring[number].machines[0].damaged() == []
    assert pieces(ring, 3)[ref.key] > 0


def test_a_file_that_nobody_has_is_asked_for_again_later() -> None:
    ring = file_ring(50)
    ring.drop = lambda sender, to, envelope: envelope.message.kind is MessageKind.SNAPSHOT_PIECE
    machine = ring[2].machines[0]
    ref = machine.refs[2]
    ring[2].files.flip_bit(machine.path(ref.name), 999)
    with pytest.raises(CorruptionError):
        machine.read_all()
    ring.tick(12 * POLICY.patience_ticks)
    assert machine.damaged() == [ref]
    ring.drop = lambda sender, to, envelope: False
    ring.tick(12 * POLICY.patience_ticks)
    assert machine.damaged() == []


def test_a_snapshot_is_more_urgent_than_a_damaged_file() -> None:
    ring = file_ring(20)
    ring.crash(3)
    ring.write(100, first=20)
    ring.restart(3)
    machine = ring[3].machines[0]
    machine.bad.append(FileRef("0" * 31 + "1", 100))
    ring.tick(8)
    assert ring[3].rows() == expected(120)


def test_what_peers_ask_for_and_is_not_there_is_refused() -> None:
    ring = file_ring(50)
    transfer = ring[1].driver.snapshots.transfer
    ring[1].sent.clear()
    known = ring[1].machines[0].refs[0]
    cases = [FileRef("0" * 31 + "1", 100).key, known.key]
    ring[1].stores[0].contents.blame([known.name])
    for key in cases:
        fetch = Message(MessageKind.SNAPSHOT_FETCH, 2, 1, 1, log_index=9, log_term=1, reject_hint=key)
        transfer.serve(fetch, 1)
    ring[1].groups.flush()
    assert [message.reject for message in ring[1].sent] == [True, True]


def test_many_pieces_are_under_way_at_once() -> None:
    """Over a long way each wait for an answer costs a round trip: there are far fewer of them than pieces."""
    ring = file_ring(50)
    ring.crash(3)
    ring.write(100, first=50)
    ring[1].sent.clear()
    under_way, most = 0, 0

    def count(sender: int, to: int, envelope: Envelope) -> bool:
        nonlocal under_way, most
        under_way += (envelope.message.kind is MessageKind.SNAPSHOT_FETCH) - (
            envelope.message.kind is MessageKind.SNAPSHOT_PIECE
        )
        most = max(most, under_way)
        return False

    ring.drop = count
    ring.restart(3)
    ring.tick(8)
    assert ring[3].rows() == expected(150)
    assert most > 8
    assert under_way == 0
