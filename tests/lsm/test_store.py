"""Tables in files: flushed, compacted, adopted, removed, and never another content than a machine without files has."""

from __future__ import annotations

import struct
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lsm.shelf import TINY, Shelf
from lsm.test_machine import NOOP, apply, content, create, delete, drop, keys, proposal, steps, write
from lsm.test_snapshot import everything

from marble.errors import CorruptionError
from marble.lsm.files import TableFiles
from marble.lsm.machine import TableMachine
from marble.lsm.store import StorePolicy
from marble.machine import StoredMachine


@pytest.fixture
def shelf() -> Shelf:
    shelf = Shelf()
    apply(shelf.machine, NOOP, create())
    return shelf


def test_is_the_seam(shelf: Shelf) -> None:
    seam: StoredMachine = shelf.machine
    assert isinstance(seam, StoredMachine)
    assert (seam.memory_bytes, seam.backlog_bytes, seam.compact()) == (0, 0, False)


def test_rows_go_into_files_and_come_back_by_name(shelf: Shelf) -> None:
    apply(shelf.machine, write((2, "b"), (1, "a"), (3, None)))
    assert shelf.machine.memory_bytes > 0
    shelf.snapshot()
    assert (shelf.levels(), shelf.machine.memory_bytes) == ([1], 0)
    (info,) = shelf.snapshots.infos()
    (ref,) = shelf.snapshots.files(info)
    assert shelf.names() == [f"00000007-{ref.name}.arrow"]
    data = shelf.files.read(f"tables/{shelf.names()[0]}")
    assert len(data) == ref.nbytes
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    assert table.select(["id", "v"]).to_pylist() == [{"id": 1, "v": "a"}, {"id": 2, "v": "b"}, {"id": 3, "v": None}]
    assert table.column("_marble_index").to_pylist() == [3, 3, 3]
    other = shelf.reopened()
    assert everything(other.machine) == everything(shelf.machine)
    assert content(other.machine) == [(1, "a"), (2, "b"), (3, None)]
    assert shelf.snapshots.read(info) is not None
    assert "rows" not in [row["section"] for batch in shelf.snapshots.read(info) for row in batch.to_pylist()]


def test_a_delete_counts_rows_that_are_in_files(shelf: Shelf) -> None:
    apply(shelf.machine, write((1, "a"), (2, "b"), (3, "c")))
    shelf.snapshot()
    assert [each.value for each in apply(shelf.machine, delete(1, 1, 9), delete(1), write((1, "z")), delete(1, 2))] == [
        1,
        0,
        1,
        2,
    ]
    assert content(shelf.machine) == [(3, "c")]
    shelf.snapshot()
    assert [each.value for each in apply(shelf.machine, delete(1, 2, 3))] == [1]
    assert shelf.machine.read("t").get_many(keys(1, 3)).to_pylist() == [{"id": None, "v": None}] * 2
    assert shelf.machine.read("t").row_count == 0
    shelf.snapshot()
    assert content(shelf.reopened().machine) == []


def test_what_is_deleted_ends_in_no_file_at_all(shelf: Shelf) -> None:
    apply(shelf.machine, write((1, "a"), (2, "b")))
    shelf.snapshot()
    apply(shelf.machine, delete(1, 2))
    shelf.snapshot()
    assert (shelf.levels(), shelf.compact(), shelf.levels()) == ([2], 1, [0])
    # The files go when the snapshot does that needs them.
    assert len(shelf.names()) == 2
    apply(shelf.machine, NOOP)
    shelf.snapshot()
    assert shelf.names() == []


def test_readers_keep_what_they_read(shelf: Shelf) -> None:
    apply(shelf.machine, write(*((i, "x") for i in range(100))))
    shelf.snapshot()
    view = shelf.machine.read("t")
    reader = view.scan(batch_rows_max=10)
    reader.read_next_batch()
    apply(shelf.machine, delete(*range(100)))
    shelf.snapshot()
    shelf.compact()
    apply(shelf.machine, drop(), NOOP)
    shelf.snapshot()
    assert shelf.names() == []
    assert sum(batch.num_rows for batch in reader) == 90
    assert view.row_count == 100


def test_a_small_table_stays_in_the_snapshot() -> None:
    shelf = Shelf(policy=StorePolicy(inline_table_bytes_max=1000, inline_bytes_max=2000))
    apply(shelf.machine, NOOP, create(), write((1, "a"), (2, "b")))
    shelf.snapshot()
    assert shelf.names() == []
    apply(shelf.machine, write((3, "c" * 2000)))
    shelf.snapshot()
    assert len(shelf.names()) == 1
    # A file below, rows and tombstones above.
    apply(shelf.machine, write((4, "d"), (1, "A")), delete(2, 4))
    shelf.snapshot()
    assert len(shelf.names()) == 1
    for _ in range(2):
        shelf = Shelf(shelf.files, policy=shelf.store.policy)
        assert [row[0] for row in content(shelf.machine)] == [1, 3]
        assert [each.value for each in apply(shelf.machine, delete(1, 2))] == [1]
    # Many small tables are not small together.
    apply(shelf.machine, *(create(f"t{i}") for i in range(9)))
    apply(shelf.machine, *(write((1, "x" * 300), table=table) for table in range(2, 11)))
    shelf.snapshot()
    assert len(shelf.names()) == 11


def test_a_state_that_somebody_holds_keeps_its_files(shelf: Shelf) -> None:
    apply(shelf.machine, write((1, "a")))
    shelf.snapshot()
    state = shelf.machine.capture()
    before = everything(shelf.machine)
    for i in range(3):
        apply(shelf.machine, delete(1), write((2, f"{i}")))
        shelf.snapshot()
        shelf.compact()
    shelf.snapshots.prune(shelf.machine.applied_index)
    shelf.machine.collect(set)
    other = TableMachine(files=TableFiles(shelf.files, 7))
    other.restore(state.applied_index, state.batches())
    assert everything(other) == before
    del state
    kept = set(shelf.names())
    shelf.machine.collect(set)
    assert set(shelf.names()) < kept


def test_frozen_rows_of_a_flush_that_failed_go_with_the_next(shelf: Shelf) -> None:
    apply(shelf.machine, write((1, "a"), (2, "b")))
    shelf.files.full = True
    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            shelf.snapshot()
        apply(shelf.machine, delete(1), write((3, "c")))
        assert content(shelf.machine) == [(2, "b"), (3, "c")]
    assert shelf.machine.backlog_bytes == shelf.machine.memory_bytes > 0
    assert [name for name in shelf.files.list("tables") if name.endswith(".tmp")] == []
    shelf.files.full = False
    shelf.snapshot()
    assert (shelf.levels(), shelf.machine.memory_bytes) == ([1], 0)
    assert content(shelf.reopened().machine) == [(2, "b"), (3, "c")]


def test_two_states_at_once_flush_each_what_it_has(shelf: Shelf) -> None:
    """A flush takes its place only if all that it was made from is there: a tombstone that hid nothing then hides now."""
    apply(shelf.machine, write((1, "a")))
    first = shelf.machine.capture()
    apply(shelf.machine, delete(1), write((2, "b")))
    second = shelf.machine.capture()
    for state, expected in ((first, [(1, "a")]), (second, [(2, "b")])):
        other = TableMachine(files=TableFiles(shelf.files, 7))
        other.restore(state.applied_index, state.batches())
        assert content(other) == expected
        assert content(shelf.machine) == [(2, "b")]
    shelf.snapshot()
    shelf.compact()
    assert content(shelf.machine) == content(shelf.reopened().machine) == [(2, "b")]


def test_a_compaction_that_comes_too_late_changes_nothing(shelf: Shelf) -> None:
    for i in range(3):
        apply(shelf.machine, write((i, "x")))
        shelf.snapshot()
    task, twin = shelf.machine.plan_compaction(), shelf.machine.plan_compaction()
    assert task is not None
    assert twin is not None
    task.run()
    levels = shelf.levels()
    twin.run()
    assert shelf.levels() == levels
    (newest,) = shelf.snapshots.infos()
    late = TableMachine(files=TableFiles(shelf.files, 7), policy=TINY)
    late.restore(newest.index, shelf.snapshots.read(newest))
    again = late.plan_compaction()
    assert again is not None
    apply(late, drop(), create())
    again.run()
    assert content(late) == []


def test_a_disk_that_fails_in_a_compaction_changes_nothing(shelf: Shelf) -> None:
    for i in range(3):
        apply(shelf.machine, write((i, "x" * 1000), (9, f"{i}")))
        shelf.snapshot()
    before = everything(shelf.machine)
    for operation in range(1, 10):
        task = shelf.machine.plan_compaction()
        assert task is not None
        shelf.files.fail_at = shelf.files.operations + operation
        try:
            task.run()
        except OSError:
            assert shelf.levels() == [3]
            assert everything(shelf.machine) == before
            continue
        break
    assert operation > 4
    assert shelf.levels() != [3]
    assert everything(shelf.machine) == before
    shelf.files.fail_at = None
    assert everything(shelf.reopened().machine) == before


@pytest.mark.parametrize("how", ["missing", "shorter", "another"])
def test_a_file_that_is_not_the_one_is_named(shelf: Shelf, how: str) -> None:
    for i in range(2):
        apply(shelf.machine, write((i, "x" * (i + 1))))
        shelf.snapshot()
    first, second = (f"tables/{name}" for name in shelf.names())
    if how == "missing":
        shelf.files.delete(first)
    elif how == "shorter":
        shelf.files.cut(first, shelf.files.size(first) - 1)
    else:
        shelf.files.put(first, shelf.files.read(second))
    with pytest.raises(CorruptionError) as caught:
        shelf.reopened()
    assert caught.value.path == f"simulated:{first}"


def test_a_damaged_file_is_left_alone(shelf: Shelf) -> None:
    for i in range(2):
        apply(shelf.machine, write(*((j, f"{i}") for j in range(i, 100, 2))))
        shelf.snapshot()
    name = shelf.names()[0]
    path = f"tables/{name}"
    # In the keys of its only block: 0 to 98 or 1 to 99.
    data = shelf.files.read(path)
    found = [data.find(struct.pack("<qq", key, key + 2)) for key in (50, 51)]
    at = max(found)
    assert at > 0
    shelf.files.flip_bit(path, 8 * at)
    task = shelf.machine.plan_compaction()
    assert task is not None
    with pytest.raises(CorruptionError):
        task.run()
    assert [name] == [f"00000007-{name}.arrow" for name in shelf.store.damaged]
    assert shelf.machine.plan_compaction() is None
    with pytest.raises(CorruptionError):
        content(shelf.machine)


def test_a_machine_without_files_takes_none(shelf: Shelf) -> None:
    apply(shelf.machine, write((1, "a")))
    state = shelf.machine.capture()
    with pytest.raises(CorruptionError, match="table 't' has files, and this machine keeps none"):
        TableMachine().restore(state.applied_index, state.batches())
    # But the other way round.
    memory = TableMachine()
    apply(memory, NOOP, create(), write((1, "a")))
    state = memory.capture()
    other = Shelf()
    other.machine.restore(state.applied_index, state.batches())
    other.snapshot()
    assert content(other.reopened().machine) == [(1, "a")]


def test_files_of_other_groups_are_left_alone(shelf: Shelf) -> None:
    shelf.files.put("tables/00000008-" + "0" * 32 + ".arrow", b"theirs")
    shelf.files.put("tables/00000008-0.tmp", b"theirs")
    shelf.files.put("tables/00000007-" + "0" * 32 + ".arrow", b"ours")
    shelf.files.put("tables/00000007-0.tmp", b"ours")
    shelf.reopened()
    assert shelf.files.list("tables") == ["00000008-0.tmp", "00000008-" + "0" * 32 + ".arrow"]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("apply"), st.lists(steps, min_size=1, max_size=6)),
        st.tuples(st.sampled_from(["snapshot", "compact", "reopen", "capture", "full"]), st.just([])),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(ACTIONS)
def test_any_history_is_that_of_a_machine_without_files(actions: list[tuple[str, list[Any]]]) -> None:
    shelf, twin = Shelf(), TableMachine()
    for action, entries in actions:
        if action == "apply":
            proposals = [proposal(*entry) for entry in entries]
            assert apply(shelf.machine, *proposals) == apply(twin, *proposals)
        elif action == "reopen":
            # A node replays the log from there: the snapshot of just now stands for it.
            shelf.snapshot() if shelf.machine.applied_index else None
            shelf = shelf.reopened()
        elif action == "compact":
            shelf.compact(1)
        elif shelf.machine.applied_index and action == "snapshot":
            shelf.snapshot()
        elif action == "capture":
            shelf.machine.capture()
        elif shelf.machine.applied_index:
            shelf.files.full = True
            shelf.machine.capture()
            shelf.files.full = False
        assert everything(shelf.machine) == everything(twin)
        for info in twin.tables():
            # A newer version that does not pass hides an older one that does, wherever each is stored.
            for accepted in (pc.field("v") == "a", pc.field("id") > 2, (pc.field("id") == 1) & (pc.field("v") < "b")):
                found, expected = (each.read(info.id).scan(filter=accepted) for each in (shelf.machine, twin))
                assert found.read_all() == expected.read_all()
    shelf.compact()
    assert everything(shelf.machine) == everything(twin)
