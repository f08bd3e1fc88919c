"""Tables whose files are damaged or missing: never a wrong answer, and whole again from a peer, while everything else goes on."""

from __future__ import annotations

import pyarrow as pa
import pytest
from node.ring import SCHEMA, Ring, expected, write

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble._core.key_codec import KeyCodec
from marble.errors import CorruptionError, InvariantError
from marble.jobs import Due
from marble.lsm import payload
from marble.lsm.files import TableFiles
from marble.lsm.machine import TableMachine
from marble.lsm.store import StorePolicy
from marble.machine import HealingMachine, StoredMachine
from marble.raft.messages import MessageKind
from marble.testing.disk import SimulatedFiles
from marble.types import EntryKind

POLICY = StorePolicy(inline_table_bytes_max=0, inline_bytes_max=0)


def stored(files: SimulatedFiles, group: int) -> TableMachine:
    return TableMachine(files=TableFiles(files, group), policy=POLICY)


def stored_ring(rows: int, size: int = 3) -> Ring:
    ring = Ring(size, machine=stored)
    ring.create()
    ring.write(rows)
    return ring


def table_paths(ring: Ring, number: int) -> list[str]:
    machine = ring[number].machines[0]
    return [f"tables/00000000-{file.name}.arrow" for file in next(iter(machine._trees.values())).below.levels]


def damage_all(ring: Ring, number: int) -> list[str]:
    paths = table_paths(ring, number)
    for path in paths:
        # In the middle of the first block, which is checked when it is read.
        ring[number].files.flip_bit(path, 8 * 700)
    return paths


def rows_in_time(ring: Ring, number: int) -> dict[int, str]:
    """What a node answers once it is healed: one file after the other, as they are found damaged."""
    for _ in range(len(table_paths(ring, number))):
        try:
            return ring[number].rows()
        except CorruptionError:
            ring.tick(4)
    return ring[number].rows()


def key_of(ring: Ring, key: int) -> bytes:
    info = ring[1].machines[0].tables()[0]
    return KeyCodec(info.key_schema).encode(pa.record_batch({"k": [key]}, info.key_schema)).to_pylist()[0]


def delete(ring: Ring, *keys: int) -> None:
    batch = pa.record_batch({"k": list(keys)}, pa.schema([SCHEMA.field("k")]))
    ring[1].propose(Proposal(EntryKind.DELETE, 1, payload.encode_rows(batch)))
    ring.settle()


def test_the_machine_heals() -> None:
    machine = stored(SimulatedFiles(None), 0)  # type: ignore[arg-type]
    assert isinstance(machine, StoredMachine)
    assert isinstance(machine, HealingMachine)


def test_replicas_that_flush_alike_have_the_same_files() -> None:
    ring = stored_ring(70)
    assert table_paths(ring, 1) == table_paths(ring, 2) == table_paths(ring, 3)
    assert table_paths(ring, 1)


def test_they_flush_alike_however_entries_come_together() -> None:
    ring = Ring(machine=stored)
    ring.create()
    for start in range(0, 90, 13):
        for key in range(start, start + 13):
            ring[1].driver.propose([write(key)])
        ring[1].turn()
        ring.settle()
    ring.tick(3)
    assert ring[1].raft.snapshot.index == 80
    assert table_paths(ring, 1) == table_paths(ring, 2) == table_paths(ring, 3)


def test_a_damaged_file_is_named_and_healed_while_serving() -> None:
    ring = stored_ring(50)
    (path, *_) = damage_all(ring, 2)
    machine = ring[2].machines[0]
    with pytest.raises(CorruptionError) as caught:
        ring[2].rows()
    assert caught.value.path is not None
    assert caught.value.path.endswith(".arrow")
    assert machine.damaged()
    # Others, and writes, go on.
    ring.write(5, first=50)
    assert ring[1].rows() == expected(55)
    assert rows_in_time(ring, 2) == expected(55)
    assert machine.damaged() == []
    assert any(message.kind is MessageKind.SNAPSHOT_FETCH for message in ring[2].sent)
    assert path


def test_an_entry_that_needs_a_damaged_file_waits_for_it() -> None:
    ring = stored_ring(50)
    held = True
    ring.drop = lambda sender, to, envelope: held and envelope.message.kind is MessageKind.SNAPSHOT_PIECE
    damage_all(ring, 2)
    delete(ring, 3, 5, 3, 99)
    ring.write(4, first=50)
    driver = ring[2].driver
    assert driver.snapshots.stalled is not None
    assert driver.raft.applied_index < ring[1].raft.applied_index
    assert driver.raft.commit_index == ring[1].raft.commit_index
    held = False
    ring.tick(60)
    assert driver.snapshots.stalled is None
    assert rows_in_time(ring, 2) == ring[1].rows() == {key: f"value {key}" for key in range(54) if key not in (3, 5)}
    assert ring[2].applied == ring[1].applied


@pytest.mark.parametrize("retention", [0, 8])
def test_entries_that_were_half_applied_come_again_whole(retention: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring(
        3, machine=lambda files, group: TableMachine(files=TableFiles(files, group), policy=POLICY, retention=retention)
    )
    ring.create()
    ring.write(50)
    held = True
    ring.drop = lambda sender, to, envelope: held and envelope.message.kind is MessageKind.SNAPSHOT_PIECE
    damage_all(ring, 2)
    keys = payload.encode_rows(pa.record_batch({"k": [3]}, pa.schema([SCHEMA.field("k")])))
    proposals = [write(50), write(51), Proposal(EntryKind.DELETE, 1, keys), write(52), write(53)]
    first = ring[1].groups.use(0).propose(proposals).index
    ring[1].turn()
    ring.tick(3)
    driver, machine = ring[2].driver, ring[2].machines[0]
    assert driver.snapshots.stalled is not None
    assert driver.raft.applied_index == first - 1
    # A snapshot falls due behind the first of them, of which two are done.
    monkeypatch.setattr(driver.snapshots, "due", lambda: Due(first))
    held = False
    ring.tick(90)
    assert driver.raft.applied_index >= first + 4
    assert rows_in_time(ring, 2) == ring[1].rows() == {key: f"value {key}" for key in range(54) if key != 3}
    assert ring[2].applied == ring[1].applied
    assert machine.applied_index == driver.raft.applied_index


def test_fewer_entries_than_were_half_applied_are_refused() -> None:
    ring = stored_ring(50)
    damage_all(ring, 2)
    machine, index = ring[2].machines[0], ring[2].driver.raft.applied_index
    keys = payload.encode_rows(pa.record_batch({"k": [3]}, pa.schema([SCHEMA.field("k")])))
    batch = entry_batch.build(0, index + 1, 9, [write(50), write(51), Proposal(EntryKind.DELETE, 1, keys)])
    with pytest.raises(CorruptionError):
        machine.apply(batch)
    with pytest.raises(InvariantError, match="more were done than come again"):
        machine.apply(batch.slice(0, 1))


@pytest.mark.parametrize("what", ["range", "transaction"])
def test_what_does_several_things_does_none_of_them_before_the_file_is_there(what: str) -> None:
    ring = stored_ring(50)
    held = True
    ring.drop = lambda sender, to, envelope: held and envelope.message.kind is MessageKind.SNAPSHOT_PIECE
    damage_all(ring, 2)
    other = pa.record_batch({"k": [100, 101], "v": ["a", "b"]}, schema=SCHEMA)
    keys = pa.record_batch({"k": [3, 100]}, pa.schema([SCHEMA.field("k")]))
    bounds = payload.encode_range(key_of(ring, 10), key_of(ring, 45))
    operations = [
        payload.Operation(EntryKind.WRITE, 1, payload.encode_rows(other)),
        payload.Operation(EntryKind.DELETE, 1, payload.encode_rows(keys)),
        payload.Operation(EntryKind.DELETE_RANGE, 1, bounds),
    ]
    proposal = (
        Proposal(EntryKind.DELETE_RANGE, 1, bounds)
        if what == "range"
        else Proposal(EntryKind.TRANSACTION, 0, payload.encode_transaction(operations))
    )
    ring[1].propose(proposal)
    ring.tick(3)
    assert ring[2].driver.snapshots.stalled is not None
    held = False
    ring.tick(90)
    assert ring[2].driver.snapshots.stalled is None
    assert rows_in_time(ring, 2) == ring[1].rows()
    assert len(ring[1].rows()) == 15
    assert ring[2].applied == ring[1].applied


@pytest.mark.parametrize("how", ["missing", "footer", "block", "short"])
def test_a_node_starts_with_files_missing_or_damaged_and_heals_them(how: str) -> None:
    ring = stored_ring(50)
    ring.crash(3)
    files = ring[3].files
    for path in [f"tables/{name}" for name in files.list("tables")]:
        if how == "missing":
            files.delete(path)
        elif how == "short":
            files.cut(path, files.size(path) // 2)
        else:
            files.flip_bit(path, 8 * (700 if how == "block" else files.size(path) - 40))
    delete(ring, 7)
    ring.restart(3)
    if how != "block":
        with pytest.raises(CorruptionError, match=r"tables/.*\.arrow"):
            ring[3].rows()
    ring.tick(60)
    assert rows_in_time(ring, 3) == ring[1].rows()
    assert len(ring[3].rows()) == 49
    assert ring[3].machines[0].damaged() == []
    ring.crash(3)
    ring.restart(3)
    ring.tick(4)
    assert ring[3].rows() == ring[1].rows()


def test_a_node_alone_says_what_is_damaged_and_serves_the_rest() -> None:
    ring = stored_ring(50, size=1)
    paths = damage_all(ring, 1)
    ring[1].propose(Proposal(EntryKind.CREATE_TABLE, 0, payload.encode_create_table("other", SCHEMA, ["k"])))
    ring.tick(30)
    with pytest.raises(CorruptionError, match=paths[0].split("/")[1][:20]):
        ring[1].rows()
    assert ring[1].machines[0].read("other").row_count == 0
    for path in paths:
        ring[1].files.flip_bit(path, 8 * 700)
    # Somebody put the file back.
    ring.crash(1)
    ring.restart(1)
    assert ring[1].rows() == expected(50)
    assert ring[1].machines[0].damaged() == []


def test_an_error_that_names_no_file_of_the_machine_is_not_its_own() -> None:
    machine = stored_ring(50)[1].machines[0]
    assert not machine.blame(CorruptionError("x"))
    assert not machine.blame(CorruptionError("x", "log/0000000000000001.arrows", 5))
    assert machine.damaged() == []
