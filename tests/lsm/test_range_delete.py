"""Ranges that are deleted: files that lie in them go whole, and nobody sees a state in between."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pyarrow as pa
import pytest
from lsm.shelf import TINY, Shelf

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.errors import CorruptionError
from marble.lsm import payload
from marble.lsm.keyrange import KeyRange, between_range, encode_start, prefix_range
from marble.lsm.machine import TableMachine
from marble.lsm.tree import Tree
from marble.machine import Result
from marble.schema import TableInfo
from marble.table_options import TableOptions
from marble.types import EntryKind

SCHEMA = pa.schema([("window", pa.int64()), ("k", pa.int64()), ("at", pa.timestamp("us")), ("v", pa.string())])
KEY = ("window", "k")
TTL_US = 1_000
PLAIN = TableInfo(1, "plain", SCHEMA, KEY, TableOptions())
MORTAL = TableInfo(2, "mortal", SCHEMA, KEY, TableOptions(None, "at", TTL_US))

Operation = payload.Operation


def write(info: TableInfo, window: int, ks: Sequence[int], at: int | None = 0, v: str = "") -> Operation:
    batch = pa.record_batch(
        [
            pa.array([window] * len(ks), pa.int64()),
            pa.array(ks, pa.int64()),
            pa.array([at] * len(ks), pa.timestamp("us")),
            pa.array([f"{v}{k:40}" for k in ks]),
        ],
        schema=SCHEMA,
    )
    return Operation(EntryKind.WRITE, info.id, payload.encode_rows(batch))


def delete(info: TableInfo, window: int, ks: Sequence[int]) -> Operation:
    batch = pa.record_batch(
        [pa.array([window] * len(ks), pa.int64()), pa.array(ks, pa.int64())], schema=info.key_schema
    )
    return Operation(EntryKind.DELETE, info.id, payload.encode_rows(batch))


def delete_range(info: TableInfo, keys: KeyRange) -> Operation:
    return Operation(EntryKind.DELETE_RANGE, info.id, payload.encode_range(keys.lower, keys.upper))


def window(info: TableInfo, number: int) -> Operation:
    return delete_range(info, prefix_range(info, [number]))


def proposal(*operations: Operation) -> Proposal:
    if len(operations) > 1:
        return Proposal(EntryKind.TRANSACTION, 0, payload.encode_transaction(operations))
    return Proposal(operations[0].kind, operations[0].table, operations[0].payload)


def apply(machine: TableMachine, *proposals: Proposal, time_us: int = 0) -> list[Result]:
    return machine.apply(entry_batch.build(7, machine.applied_index + 1, 1, list(proposals), time_us))


def with_tables(machine: TableMachine) -> TableMachine:
    for info in (PLAIN, MORTAL):
        data = payload.encode_create_table(info.name, SCHEMA, KEY, info.options)
        apply(machine, Proposal(EntryKind.CREATE_TABLE, 0, data))
    return machine


def content(machine: TableMachine, table: str = "plain") -> list[tuple[int, int]]:
    rows = machine.read(table).scan(list(KEY)).read_all().to_pylist()
    return [(row["window"], row["k"]) for row in rows]


@pytest.fixture
def shelf() -> Shelf:
    """Ten windows of a hundred rows, each in two files of level 1 at least."""
    shelf = Shelf(policy=TINY, block_rows_max=16)
    with_tables(shelf.machine)
    for number in range(10):
        apply(shelf.machine, proposal(write(PLAIN, number, range(100), v=f"{number}:")))
        shelf.snapshot()
        shelf.compact()
    return shelf


def files_of(shelf: Shelf) -> set[str]:
    return {file.name for file in shelf.machine._trees[1].below.levels}


def test_files_in_the_range_go_without_tombstones(shelf: Shelf) -> None:
    before = files_of(shelf)
    assert apply(shelf.machine, proposal(delete_range(PLAIN, between_range(PLAIN, [2], [7])))) == [Result(600)]
    assert files_of(shelf) < before
    assert content(shelf.machine) == [(w, k) for w in (0, 1, 8, 9) for k in range(100)]
    # Only of files that reach out of the range on one side or the other there are rows to be hidden.
    (snapshot,) = shelf.machine._trees[1].data().reader.memtables
    assert snapshot.entry_count < 200
    shelf.snapshot()
    assert len(shelf.names()) < len(before)
    assert content(shelf.reopened().machine) == content(shelf.machine)


def flip(shelf: Shelf, window: int, k: int) -> None:
    """Flip, or flip back, a bit in the value of a row."""
    value = f"{window}:{k:40}".encode()
    (file,) = (f for f in shelf.machine._trees[1].below.levels if f.first_key <= key(window, k) <= f.last_key)
    path = shelf.store.files.path(file.name)
    at = max(shelf.files.read(path).find(bytes([*value[:-1], value[-1] ^ flipped])) for flipped in (0, 64))
    assert at > 0
    shelf.files.flip_bit(path, 8 * (at + len(value) - 1) + 6)


def key(window: int, k: int) -> bytes:
    return encode_start(PLAIN, [window, k])


def test_files_that_go_whole_are_not_read(shelf: Shelf) -> None:
    shelf = shelf.reopened()
    flip(shelf, 4, 50)
    with pytest.raises(CorruptionError):
        content(shelf.machine)
    assert apply(shelf.machine, proposal(delete_range(PLAIN, KeyRange()))) == [Result(1000)]
    assert content(shelf.machine) == []
    assert files_of(shelf) == set()
    assert shelf.machine.backlog_bytes == 0


@pytest.mark.parametrize("several", [False, True])
def test_a_damaged_file_ends_the_entry_before_anything_was_done(shelf: Shelf, several: bool) -> None:
    before = content(shelf.machine)
    shelf = shelf.reopened()
    flip(shelf, 4, 50)
    entry = proposal(*[write(PLAIN, 1, [1000])] * several, delete_range(PLAIN, between_range(PLAIN, [0], [4, 51])))
    entries = entry_batch.build(7, shelf.machine.applied_index + 1, 1, [entry], 0)
    with pytest.raises(CorruptionError):
        shelf.machine.apply(entries)
    flip(shelf, 4, 50)
    (damaged,) = shelf.machine.damaged()
    shelf.machine.healed(damaged.name)
    assert content(shelf.machine) == before
    assert shelf.machine.apply(entries) == [Result(452 + 2 * several)]
    assert content(shelf.machine) == [row for row in before if row > (4, 51)]


def test_readers_see_the_range_until_the_entry_is_published() -> None:
    seen: list[list[tuple[int, int]]] = []
    shelf = Shelf(policy=TINY, block_rows_max=16, on_command=lambda *_: seen.append(content(shelf.machine)))
    with_tables(shelf.machine)
    apply(shelf.machine, proposal(write(PLAIN, 1, range(100))), proposal(write(PLAIN, 2, range(100))))
    shelf.snapshot()
    before = content(shelf.machine)
    command = Proposal(EntryKind.COMMAND, 0, payload.encode_command(b"look"))
    results = apply(
        shelf.machine, proposal(window(PLAIN, 1)), command, proposal(write(PLAIN, 1, [7])), proposal(window(PLAIN, 1))
    )
    assert [result.value for result in results] == [100, 0, 1, 1]
    assert seen == [before]
    assert content(shelf.machine) == [(2, k) for k in range(100)]


def test_a_compaction_that_ends_before_the_entry_is_published_brings_nothing_back() -> None:
    tasks = []

    def run(*_: object) -> None:
        before = content(shelf.machine)
        tasks.pop().run()
        assert content(shelf.machine) == before

    shelf = Shelf(policy=TINY, block_rows_max=16, on_command=run)
    with_tables(shelf.machine)
    for _ in range(4):
        apply(shelf.machine, proposal(write(PLAIN, 1, range(100))), proposal(write(PLAIN, 2, range(100))))
        shelf.snapshot()
    task = shelf.machine.plan_compaction()
    assert task is not None
    tasks.append(task)
    command = Proposal(EntryKind.COMMAND, 0, payload.encode_command(b"compact"))
    results = apply(shelf.machine, proposal(delete_range(PLAIN, KeyRange())), command, proposal(write(PLAIN, 3, [3])))
    assert [result.value for result in results] == [200, 0, 1]
    assert content(shelf.machine) == [(3, 3)]
    shelf.compact()
    shelf.snapshot()
    assert content(shelf.machine) == [(3, 3)]
    assert content(shelf.reopened().machine) == [(3, 3)]


def test_a_compaction_that_ends_while_the_range_is_looked_at_is_taken_into_account(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shelf = Shelf(policy=TINY, block_rows_max=16)
    with_tables(shelf.machine)
    for _ in range(4):
        apply(shelf.machine, proposal(write(PLAIN, 1, range(100))), proposal(write(PLAIN, 2, range(100))))
        shelf.snapshot()
    empty = Tree._empty
    answers = []

    def late(tree: Tree, files: Sequence[object]) -> bool:
        if not answers:
            assert shelf.compact() > 0
        answers.append(empty(tree, files))  # type: ignore[arg-type]
        return answers[-1]

    monkeypatch.setattr(Tree, "_empty", late)
    assert apply(shelf.machine, proposal(delete_range(PLAIN, KeyRange()))) == [Result(200)]
    assert answers == [False, True]
    assert content(shelf.machine) == []
    shelf.compact()
    assert content(shelf.machine) == []


def test_a_past_state_has_the_range(shelf: Shelf) -> None:
    other = Shelf(policy=TINY, block_rows_max=16, retention=5)
    with_tables(other.machine)
    apply(other.machine, proposal(write(PLAIN, 1, range(100))))
    other.snapshot()
    index = other.machine.applied_index
    apply(other.machine, proposal(window(PLAIN, 1)), proposal(write(PLAIN, 2, [1])))
    other.compact()
    other.snapshot()
    assert other.machine.read("plain", index).row_count == 100
    assert other.machine.read("plain", index + 1).row_count == 0
    assert content(other.machine) == [(2, 1)]


def test_a_transaction_sees_what_it_deleted(shelf: Shelf) -> None:
    steps = [window(PLAIN, 4), write(PLAIN, 4, [1, 2]), window(PLAIN, 4), write(PLAIN, 4, [3]), window(PLAIN, 5)]
    assert apply(shelf.machine, proposal(*steps)) == [Result(100 + 2 + 2 + 1 + 100)]
    assert content(shelf.machine) == sorted(
        [(w, k) for w in range(10) if w not in (4, 5) for k in range(100)] + [(4, 3)]
    )


@pytest.mark.parametrize("seed", range(12))
def test_any_history_is_that_of_a_machine_without_files(seed: int) -> None:
    chance = random.Random(seed)
    shelf, plain = Shelf(policy=TINY, block_rows_max=4), TableMachine()
    for machine in (shelf.machine, plain):
        with_tables(machine)
    time_us = 0
    for _ in range(150):
        draw = chance.random()
        if draw < 0.15:
            shelf.snapshot()
        elif draw < 0.3:
            shelf.compact(chance.randrange(1, 4))
        elif draw < 0.32:
            shelf.snapshot()
            shelf = shelf.reopened()
        else:
            info, first = chance.choice((PLAIN, MORTAL)), chance.randrange(6)
            ks = [chance.randrange(60) for _ in range(chance.randrange(1, 40))]
            time_us += chance.randrange(0, 60)
            operations = chance.choice(
                (
                    [write(info, first, ks, chance.choice((time_us, time_us, None)))],
                    [write(info, first, ks, time_us), write(info, first + 1, ks, time_us)],
                    [delete(info, first, ks[:5])],
                    [window(info, first)],
                    [delete_range(info, between_range(info, [first, 10], [first + 2, 50]))],
                    [window(info, first), write(info, first, ks[:3], time_us), window(info, first + 1)],
                )
            )
            entry = proposal(*operations)
            assert apply(shelf.machine, entry, time_us=time_us) == apply(plain, entry, time_us=time_us)
            if chance.random() < 0.3:
                shelf.snapshot()
        for info in (PLAIN, MORTAL):
            mine, theirs = (m.read(info.name).scan().read_all() for m in (shelf.machine, plain))
            assert mine == theirs


def test_tombstones_of_a_range_count_as_memory() -> None:
    shelf = Shelf()
    with_tables(shelf.machine)
    apply(shelf.machine, proposal(write(PLAIN, 1, range(1000))), proposal(write(PLAIN, 2, [1])))
    before = shelf.machine.memory_bytes
    apply(shelf.machine, proposal(window(PLAIN, 1)))
    assert shelf.machine.memory_bytes >= before + 1000 * 16


def reopened(shelf: Shelf) -> Shelf:
    shelf.snapshot()
    return shelf.reopened()


def active_entries(machine: TableMachine) -> int:
    """Rows and tombstones of the memtable."""
    return int(machine._trees[1].data().reader.memtables[0].entry_count)


def test_a_memtable_that_lies_in_the_range_goes_without_tombstones() -> None:
    shelf = Shelf(retention=9)
    with_tables(shelf.machine)
    apply(shelf.machine, proposal(write(PLAIN, 1, range(1000))))
    begun = shelf.machine.read("plain").scan(["k"], batch_rows_max=100)
    assert next(begun).num_rows == 100
    index = shelf.machine.applied_index
    assert apply(shelf.machine, proposal(window(PLAIN, 1))) == [Result(1000)]
    assert (active_entries(shelf.machine), shelf.machine.memory_bytes) == (0, 0)
    assert content(shelf.machine) == []
    # Who had begun to read goes on, and the past is what it was.
    assert sum(batch.num_rows for batch in begun) == 900
    assert shelf.machine.read("plain", index).row_count == 1000
    assert apply(shelf.machine, proposal(window(PLAIN, 1))) == [Result(0)]
    assert apply(shelf.machine, proposal(write(PLAIN, 1, [7]))) == [Result(1)]
    assert content(shelf.machine) == content(reopened(shelf).machine) == [(1, 7)]


def test_what_such_a_memtable_hid_stays_hidden() -> None:
    shelf = Shelf()
    with_tables(shelf.machine)
    # One file reaches out of the window, so it stays.
    apply(shelf.machine, proposal(write(PLAIN, 0, range(10)), write(PLAIN, 1, range(100))))
    shelf.snapshot()
    apply(shelf.machine, proposal(delete(PLAIN, 1, range(20))), proposal(write(PLAIN, 1, range(50, 150))))
    assert apply(shelf.machine, proposal(window(PLAIN, 1))) == [Result(130)]
    assert active_entries(shelf.machine) == 100
    for _ in range(2):
        assert content(shelf.machine) == [(0, k) for k in range(10)]
        shelf.snapshot()
        shelf = shelf.reopened()
        shelf.compact()


def test_such_a_memtable_stays_if_the_entry_cannot_be_done(shelf: Shelf) -> None:
    shelf = shelf.reopened()
    apply(shelf.machine, proposal(write(PLAIN, 4, [51])))
    flip(shelf, 4, 50)
    entry = entry_batch.build(7, shelf.machine.applied_index + 1, 1, [proposal(window(PLAIN, 4))], 0)
    with pytest.raises(CorruptionError):
        shelf.machine.apply(entry)
    assert active_entries(shelf.machine) == 1
    flip(shelf, 4, 50)
    (damaged,) = shelf.machine.damaged()
    shelf.machine.healed(damaged.name)
    assert shelf.machine.apply(entry) == [Result(100)]
