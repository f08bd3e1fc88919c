"""Reads at a past index, and rows that live for a time only: with files and without the same."""

from __future__ import annotations

import contextlib
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lsm.shelf import Shelf
from lsm.test_machine import NOOP, apply, content, create, delete, drop, keys, proposal, steps, write

from marble._core import entry_batch
from marble._core.entry_batch import Proposal, encode_payload
from marble.errors import UsageError
from marble.lsm import payload
from marble.lsm.machine import TableMachine
from marble.lsm.view import TableView
from marble.machine import Result
from marble.table_options import TableOptions
from marble.types import EntryKind

Rows = dict[str, list[dict[str, Any]]]


def everything_at(machine: TableMachine, index: int | None = None) -> Rows:
    found = {}
    for name in ("x", "y", "z"):
        with contextlib.suppress(NoTable):
            found[name] = read(machine, name, index).scan().read_all().to_pylist()
    return found


class NoTable(Exception):
    """There is none of that name."""


def read(machine: TableMachine, name: str, index: int | None) -> TableView:
    try:
        return machine.read(name, at_index=index)
    except UsageError as error:
        raise (NoTable() if "no table" in str(error) else error) from None


def test_a_past_state_is_read_while_it_is_kept() -> None:
    machine = TableMachine(retention=3)
    apply(machine, NOOP, create(), write((1, "a")), write((1, "b"), (2, "c")), drop())
    assert machine.applied_index == 5
    assert [(view.index, view.row_count) for view in (machine.read("t", 3), machine.read("t", 4))] == [(3, 1), (4, 2)]
    assert machine.read("t", 3).get_many(keys(1)).to_pylist() == [{"id": 1, "v": "a"}]
    with pytest.raises(UsageError, match="no table 't'"):
        machine.read("t", 5)
    with pytest.raises(UsageError, match="entry 1 is not kept: the oldest is that of entry 2"):
        machine.read("t", 1)
    with pytest.raises(UsageError, match="entry 6 has not been applied here: the last one is 5"):
        machine.read("t", 6)
    apply(machine, NOOP, NOOP)
    with pytest.raises(UsageError, match="entry 3 is not kept: the oldest is that of entry 4"):
        machine.read("t", 3)


def test_without_retention_only_the_present_is_kept() -> None:
    machine = TableMachine()
    apply(machine, NOOP, create(), write((1, "a")))
    apply(machine, write((2, "b")))
    assert machine.read("t", 4).row_count == 2
    with pytest.raises(UsageError, match="entry 3 is not kept: the oldest is that of entry 4"):
        machine.read("t", 3)


def test_a_restored_machine_has_no_past() -> None:
    shelf = Shelf(retention=10)
    apply(shelf.machine, NOOP, create(), write((1, "a")))
    shelf.snapshot()
    other = Shelf(shelf.files, retention=10)
    assert content(other.machine) == [(1, "a")]
    with pytest.raises(UsageError, match="entry 2 is not kept: the oldest is that of entry 3"):
        other.machine.read("t", 2)
    apply(other.machine, delete(1))
    assert other.machine.read("t", 3).row_count == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(steps, min_size=1, max_size=8), max_size=8))
def test_any_past_is_what_the_present_was(runs: list[list[Any]]) -> None:
    shelf = Shelf(retention=12)
    seen: dict[int, Rows] = {}
    twin = TableMachine()
    for run in runs:
        for step in run:
            apply(twin, proposal(*step))
            seen[twin.applied_index] = everything_at(twin)
        apply(shelf.machine, *(proposal(*step) for step in run))
        shelf.snapshot()
        shelf.compact()
        for index in range(max(1, twin.applied_index - 12), twin.applied_index + 1):
            assert everything_at(shelf.machine, index) == seen[index]


# -- time to live ------------------------------------------------------------------------------------------------------

TIMED = pa.schema([("id", pa.int64()), ("at", pa.timestamp("ms")), ("tags", pa.list_(pa.string()))])
TTL = TableOptions(None, "at", 1_000_000)


def create_timed(key: tuple[str, ...] = ("id",)) -> Proposal:
    return Proposal(EntryKind.CREATE_TABLE, 0, payload.encode_create_table("t", TIMED, key, TTL))


def timed(*values: tuple[int, int | None]) -> Proposal:
    """Rows of id and milliseconds."""
    table = [{"id": id_, "at": at, "tags": [str(id_)]} for id_, at in values]
    return Proposal(EntryKind.WRITE, 1, encode_payload(pa.RecordBatch.from_pylist(table, TIMED)))


def at(machine: TableMachine, time_us: int, *proposals: Proposal) -> list[Result]:
    return machine.apply(entry_batch.build(1, machine.applied_index + 1, 1, list(proposals), time_us))


def ids_of(machine: TableMachine, index: int | None = None) -> list[int]:
    return [row["id"] for row in machine.read("t", index).scan(["id"]).read_all().to_pylist()]


@pytest.mark.parametrize("stored", [False, True])
def test_rows_are_gone_when_their_time_is_over(stored: bool) -> None:
    shelf = Shelf(retention=20)
    machine = shelf.machine if stored else TableMachine(retention=20)
    at(machine, 5_000_000, create_timed(), timed((1, 4_500), (2, 5_000), (3, None), (4, 6_000)))
    assert ids_of(machine) == [1, 2, 3, 4]
    if stored:
        shelf.snapshot()
    at(machine, 5_500_000, NOOP)
    assert ids_of(machine) == [2, 3, 4]
    # What is gone cannot be deleted; and time does not go back.
    assert at(machine, 5_400_000, Proposal(EntryKind.DELETE, 1, encode_payload(keys(1, 2, 3, 3)))) == [Result(2)]
    assert ids_of(machine) == [4]
    got = machine.read("t").get_many(keys(4, 1, 9)).to_pylist()
    nothing = {"id": None, "at": None, "tags": None}
    assert [row["tags"] for row in got] == [["4"], None, None]
    assert got[1:] == [nothing, nothing]
    assert machine.read("t").row_count == 1
    at(machine, 9_000_000, NOOP)
    assert machine.read("t").get_many(keys(4, 1)).to_pylist() == [nothing, nothing]
    assert machine.read("t").row_count == 0
    # A past state is read at its own time.
    assert ids_of(machine, 2) == [1, 2, 3, 4]
    assert ids_of(machine, 3) == [2, 3, 4]


def test_a_file_goes_when_all_in_it_is_over() -> None:
    shelf = Shelf()
    at(shelf.machine, 1_000_000, create_timed())
    for window in range(1, 5):
        at(shelf.machine, window * 1_000_000, timed(*((10 * window + i, 1000 * window + i) for i in range(10))))
        shelf.snapshot()
        while (task := shelf.machine.plan_compaction()) is not None and not task.plan.rewrite:
            task.run()
    assert ids_of(shelf.machine)[-10:] == list(range(40, 50))
    at(shelf.machine, 10_000_000, NOOP)
    shelf.snapshot()
    task = shelf.machine.plan_compaction()
    assert task is not None
    assert task.plan.level is None
    shelf.compact()
    at(shelf.machine, 10_000_000, NOOP)
    shelf.snapshot()
    assert (shelf.names(), ids_of(shelf.machine)) == ([], [])


def test_an_older_version_does_not_come_back_when_the_newer_is_over() -> None:
    shelf = Shelf()
    at(shelf.machine, 1_000_000, create_timed(), timed((1, 9_000), (2, 9_000)))
    shelf.snapshot()
    at(shelf.machine, 1_000_000, timed((1, 1_000)))
    shelf.snapshot()
    at(shelf.machine, 3_000_000, NOOP)
    assert ids_of(shelf.machine) == [2]
    assert shelf.compact() > 0
    assert ids_of(shelf.machine) == [2]
    at(shelf.machine, 3_000_000, NOOP)
    shelf.snapshot()
    assert ids_of(shelf.reopened().machine) == [2]
    (last,) = list(shelf.machine._trees[1].below.levels)
    assert last.rows == 1


timed_steps = st.one_of(
    st.tuples(
        st.just("write"),
        st.lists(st.tuples(st.integers(0, 5), st.none() | st.integers(0, 9_000)), min_size=1, max_size=4),
    ),
    st.tuples(st.just("delete"), st.lists(st.integers(0, 5), min_size=1, max_size=3)),
    st.tuples(st.sampled_from(["snapshot", "compact", "reopen"]), st.just([])),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(timed_steps, st.integers(0, 10_000_000)), max_size=25))
def test_any_times_with_files_and_without(history: list[tuple[Any, int]]) -> None:
    shelf, twin = Shelf(), TableMachine()
    for machine in (shelf.machine, twin):
        at(machine, 0, create_timed())
    for (kind, values), time_us in history:
        if kind in ("write", "delete"):
            entry = timed(*values) if kind == "write" else Proposal(EntryKind.DELETE, 1, encode_payload(keys(*values)))
            assert at(shelf.machine, time_us, entry) == at(twin, time_us, entry)
        elif kind == "compact":
            shelf.compact(1)
        else:
            shelf.snapshot()
            shelf = shelf if kind == "snapshot" else shelf.reopened()
        found, expected = shelf.machine.read("t"), twin.read("t")
        assert found.scan().read_all() == expected.scan().read_all()
        assert found.get_many(keys(0, 1, 2, 3, 4, 5)) == expected.get_many(keys(0, 1, 2, 3, 4, 5))
        assert found.row_count == expected.row_count
