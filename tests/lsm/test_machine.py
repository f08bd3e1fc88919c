"""The state machine: applied in order, published whole, the same on every replica."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marble._core import entry_batch
from marble._core.entry_batch import Proposal, encode_payload
from marble.errors import CorruptionError, InvariantError, UsageError
from marble.lsm import payload
from marble.lsm.machine import TableMachine
from marble.machine import Result
from marble.schema import ENTRY_SCHEMA
from marble.types import EntryKind

SCHEMA = pa.schema([("id", pa.int64()), ("v", pa.string())])
NOOP = Proposal(EntryKind.NOOP)


def create(name: str = "t", schema: pa.Schema = SCHEMA, key: Sequence[str] = ("id",)) -> Proposal:
    return Proposal(EntryKind.CREATE_TABLE, 0, payload.encode_create_table(name, schema, key))


def drop(name: str = "t") -> Proposal:
    return Proposal(EntryKind.DROP_TABLE, 0, payload.encode_drop_table(name))


def rows(*values: tuple[int | None, str | None]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"id": id_, "v": v} for id_, v in values], SCHEMA)


def write(*values: tuple[int | None, str | None], table: int = 1) -> Proposal:
    return Proposal(EntryKind.WRITE, table, encode_payload(rows(*values)))


def keys(*ids: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"id": pa.array(ids, pa.int64())})


def delete(*ids: int, table: int = 1) -> Proposal:
    return Proposal(EntryKind.DELETE, table, encode_payload(keys(*ids)))


def apply(machine: TableMachine, *proposals: Proposal) -> list[Result]:
    return machine.apply(entry_batch.build(1, machine.applied_index + 1, 1, list(proposals)))


def content(machine: TableMachine, table: str | int = "t") -> list[tuple[int, str | None]]:
    return [(row["id"], row["v"]) for row in machine.read(table).scan().read_all().to_pylist()]


@pytest.fixture
def machine() -> TableMachine:
    machine = TableMachine()
    assert apply(machine, NOOP, create()) == [Result(0), Result(1)]
    return machine


def test_empty() -> None:
    machine = TableMachine()
    assert machine.applied_index == 0
    assert machine.tables() == []
    assert machine.apply(pa.RecordBatch.from_pylist([], ENTRY_SCHEMA)) == []
    with pytest.raises(UsageError, match="there is no table 't'"):
        machine.read("t")


def test_write_and_delete(machine: TableMachine) -> None:
    results = apply(machine, write((2, "b"), (1, "a")), delete(1, 7), write((1, "A"), (1, "B"), (3, None)))
    assert results == [Result(2), Result(1), Result(3)]
    assert content(machine) == [(1, "B"), (2, "b"), (3, None)]
    view = machine.read("t")
    assert (view.index, view.row_count, view.info.id) == (5, 3, 1)
    assert machine.read(1).info is view.info


def test_view_looks_up(machine: TableMachine) -> None:
    apply(machine, write((1, "a"), (2, None)))
    view = machine.read("t")
    got = view.get_many(keys(2, 9, 1))
    assert got.to_pylist() == [{"id": 2, "v": None}, {"id": None, "v": None}, {"id": 1, "v": "a"}]
    assert got.schema == view.info.lookup_schema
    assert view.get_many(keys()).num_rows == 0
    assert view.get_many(keys(1)).schema == got.schema


def test_view_scans_in_batches(machine: TableMachine) -> None:
    apply(machine, write(*((i, "ab"[i % 2]) for i in range(10))))
    view = machine.read("t")
    assert [batch.num_rows for batch in view.scan(batch_rows_max=4)] == [4, 4, 2]
    assert view.scan(["v"], pc.field("id") > 7).read_all().to_pydict() == {"v": ["a", "b"]}
    assert view.scan(filter=pc.field("id") > 7, batch_rows_max=3).read_all().to_pydict() == {
        "id": [8, 9],
        "v": ["a", "b"],
    }
    assert view.scan(["v", "id"]).schema.names == ["v", "id"]


def test_view_does_not_change(machine: TableMachine) -> None:
    apply(machine, write((1, "a")))
    view = machine.read("t")
    reader = view.scan()
    apply(machine, write((1, "b"), (2, "c")), drop())
    assert view.get_many(keys(1, 2)).to_pydict() == {"id": [1, None], "v": ["a", None]}
    assert reader.read_all().to_pydict() == {"id": [1], "v": ["a"]}
    assert view.index == 3


@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        (write((1, "x"), table=9), "no table with id 9"),
        (delete(1, table=9), "no table with id 9"),
        (write((None, "x")), "'id' is in the key and is null in row 0"),
        (Proposal(EntryKind.WRITE, 1, encode_payload(keys(1))), "not a valid record batch"),
        (Proposal(EntryKind.WRITE, 1, encode_payload(rows())), "there are none"),
        (Proposal(EntryKind.WRITE, 1, pa.py_buffer(b"\xff" * 64)), "not a valid record batch"),
        (Proposal(EntryKind.DELETE, 1, encode_payload(rows((1, "a")))), "not a valid record batch"),
        (Proposal(EntryKind.CREATE_TABLE, 0, encode_payload(rows((1, "a")))), "not a valid record batch"),
        (Proposal(EntryKind.COMMAND, 0, encode_payload(rows((1, "a")))), "not a valid record batch"),
        (create("t", SCHEMA, ["v"]), "exists already with another schema, key or options"),
        (drop("tt"), "no table 'tt'; did you mean 't'"),
    ],
)
def test_wrong_content_is_a_result_and_changes_nothing(machine: TableMachine, proposal: Proposal, message: str) -> None:
    apply(machine, write((1, "a")))
    before, wrong, after = apply(machine, write((2, "b")), proposal, write((3, "c")))
    assert (before, after) == (Result(1), Result(1))
    assert wrong.error_code == "usage"
    assert message in wrong.message
    with pytest.raises(UsageError, match=r"table|record batch"):
        wrong.raise_for_error()
    assert machine.applied_index == 6
    assert content(machine) == [(1, "a"), (2, "b"), (3, "c")]
    assert [info.name for info in machine.tables()] == ["t"]


def test_offsets_that_point_outside_are_refused(machine: TableMachine) -> None:
    data = bytearray(encode_payload(rows((1, "abc"), (2, "defg"))).to_pybytes())
    offsets = data.index((0).to_bytes(4, "little") + (3).to_bytes(4, "little") + (7).to_bytes(4, "little"))
    data[offsets + 4 : offsets + 8] = (1 << 30).to_bytes(4, "little")
    (result,) = apply(machine, Proposal(EntryKind.WRITE, 1, pa.py_buffer(bytes(data))))
    assert result.error_code == "usage"
    assert content(machine) == []


def test_create_and_drop(machine: TableMachine) -> None:
    other = pa.schema([("id", pa.int64()), ("w", pa.int8())])
    results = apply(machine, create(), write((1, "a")), drop(), write((1, "a")), create(schema=other), create("a"))
    assert [result.value for result in results] == [1, 1, 1, 0, 2, 3]
    assert results[3].error_code == "usage"
    assert [(info.id, info.name) for info in machine.tables()] == [(3, "a"), (2, "t")]
    assert machine.read("t").row_count == 0
    assert machine.table("t").schema == other
    with pytest.raises(UsageError, match="no table with id 1: it has been dropped"):
        machine.read(1)


def test_a_table_made_and_dropped_in_one_run_leaves_nothing() -> None:
    machine = TableMachine()
    apply(machine, create(), write((1, "a")), drop())
    assert machine.tables() == []
    assert apply(machine, create()) == [Result(2)]
    assert content(machine) == []


def test_commands_are_handed_on_in_order() -> None:
    seen: list[tuple[int, bytes]] = []
    machine = TableMachine(on_command=lambda index, operation: seen.append((index, operation)))
    command = [Proposal(EntryKind.COMMAND, 0, payload.encode_command(each)) for each in (b"", b"\0x")]
    assert apply(machine, command[0], NOOP, command[1]) == [Result(0)] * 3
    assert seen == [(1, b""), (3, b"\0x")]
    assert apply(TableMachine(), *command) == [Result(0)] * 2


def test_a_run_is_published_whole() -> None:
    inside: list[tuple[int, int]] = []
    machine = TableMachine(on_command=lambda *_: inside.append((machine.applied_index, len(machine.tables()))))
    apply(machine, create("a"))
    apply(machine, create("b"), write((1, "a"), table=2), Proposal(EntryKind.COMMAND, 0, payload.encode_command(b"")))
    assert inside == [(1, 1)]
    assert machine.applied_index == 4
    assert content(machine, "b") == [(1, "a")]


def damaged(batch: pa.RecordBatch, row: int) -> pa.RecordBatch:
    """`batch` with one bit of the payload of `row` flipped and its checksum as it was."""
    payloads = batch.column("payload").to_pylist()
    flipped = bytearray(payloads[row])
    flipped[-1] ^= 1
    payloads[row] = bytes(flipped)
    return batch.set_column(
        batch.schema.get_field_index("payload"), ENTRY_SCHEMA.field("payload"), pa.array(payloads, pa.binary())
    )


def test_damage_stops_the_replica_and_nothing_becomes_visible(machine: TableMachine) -> None:
    entries = entry_batch.build(1, 3, 1, [write((1, "a")), write((2, "b"))])
    with pytest.raises(CorruptionError, match="4"):
        machine.apply(damaged(entries, 1))
    assert machine.applied_index == 2
    assert content(machine) == []
    with pytest.raises(InvariantError, match="an earlier apply failed"):
        machine.apply(entries)


def test_a_command_that_raises_stops_the_replica(machine: TableMachine) -> None:
    def refuse(index: int, operation: bytes) -> None:
        raise RuntimeError("no room")

    machine = TableMachine(on_command=refuse)
    with pytest.raises(RuntimeError, match="no room"):
        apply(machine, create(), Proposal(EntryKind.COMMAND, 0, payload.encode_command(b"x")))
    assert (machine.applied_index, machine.tables()) == (0, [])
    with pytest.raises(InvariantError, match="an earlier apply failed"):
        apply(machine, NOOP)


@pytest.mark.parametrize("first", [1, 2, 4])
def test_entries_must_follow(machine: TableMachine, first: int) -> None:
    with pytest.raises(InvariantError, match=f"entries {first} to {first} .1 rows. do not follow applied index 2"):
        machine.apply(entry_batch.build(1, first, 1, [NOOP]))


def test_entries_must_be_consecutive(machine: TableMachine) -> None:
    gap = pa.Table.from_batches([entry_batch.build(1, index, 1, [NOOP]) for index in (3, 5)]).combine_chunks()
    with pytest.raises(InvariantError, match="do not follow"):
        machine.apply(gap.to_batches()[0])


def test_a_kind_of_a_later_version_stops_the_replica(machine: TableMachine) -> None:
    entry = entry_batch.build(1, 3, 1, [NOOP]).to_pylist()[0]
    for kind, checksum in ((99, entry_batch.entry_checksum(99, 0, 0, 0)), (int(EntryKind.HARD_STATE), 0)):
        machine = TableMachine()
        entry |= {"index": 1, "kind": kind, "checksum": checksum or entry_batch.entry_checksum(kind, 0, 0, 0)}
        with pytest.raises(InvariantError, match=f"entry 1 is of kind {kind}, which this version"):
            machine.apply(pa.RecordBatch.from_pylist([entry], ENTRY_SCHEMA))


def test_readers_see_whole_states_while_writes_go_on(machine: TableMachine) -> None:
    """Each entry writes the same text to four rows: no reader may see two texts, nor an index that goes back."""
    rounds = 300
    started = threading.Barrier(3)
    errors: list[str] = []
    done = threading.Event()

    def read() -> None:
        last = 0
        started.wait(timeout=30)
        while not done.is_set():
            view = machine.read("t")
            texts = view.scan().read_all().column("v").to_pylist()
            found = view.get_many(keys(0, 1, 2, 3)).column("v").to_pylist()
            expected = [str(view.index)] * 4 if view.index > 2 else []
            if texts != expected or (expected and found != expected) or view.index < last:
                errors.append(f"at {view.index} after {last}: {texts} {found}")
            last = view.index

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    started.wait(timeout=30)
    for _ in range(rounds):
        index = machine.applied_index + 1
        apply(machine, *(write(*((i, str(index + step)) for i in range(4))) for step in range(2)))
    done.set()
    for reader in readers:
        reader.join(timeout=30)
    assert errors == []
    assert machine.applied_index == 2 + 2 * rounds


ids = st.integers(0, 12)
steps = st.one_of(
    st.tuples(
        st.just("write"), st.integers(1, 3), st.lists(st.tuples(ids, st.text("ab", max_size=2)), min_size=1, max_size=6)
    ),
    st.tuples(st.just("delete"), st.integers(1, 3), st.lists(ids, min_size=1, max_size=4)),
    st.tuples(st.just("create"), st.sampled_from("xyz"), st.sampled_from(["id", "v"])),
    st.tuples(st.just("drop"), st.sampled_from("xyz"), st.just("")),
    st.tuples(st.just("noop"), st.just(0), st.just("")),
)


class Model:
    """Tables as dicts of dicts, the obvious way."""

    def __init__(self) -> None:
        self.tables: dict[int, tuple[str, str, dict[Any, dict[str, Any]]]] = {}
        self.ids = 0

    def step(self, kind: str, first: Any, second: Any) -> int | None:
        """Do one step; the value of its result, or None where it is refused."""
        named = next((id_ for id_, (name, _, _) in self.tables.items() if name == first), None)
        if kind == "noop":
            return 0
        if kind == "create":
            if named is not None:
                return named if self.tables[named][1] == second else None
            self.ids += 1
            self.tables[self.ids] = (first, second, {})
            return self.ids
        if kind == "drop":
            if named is not None:
                del self.tables[named]
            return named
        if first not in self.tables:
            return None
        _, key, content = self.tables[first]
        if kind == "write":
            content |= {row[key]: row for row in ({"id": id_, "v": v} for id_, v in second)}
            return len(second)
        if key != "id":
            return None
        return sum(content.pop(id_, None) is not None for id_ in second)

    def content(self) -> dict[str, list[dict[str, Any]]]:
        return {name: [content[key] for key in sorted(content)] for name, _, content in self.tables.values()}


def proposal(kind: str, first: Any, second: Any) -> Proposal:
    if kind == "write":
        return write(*second, table=first)
    if kind == "delete":
        return delete(*second, table=first)
    if kind == "create":
        return create(first, SCHEMA, [second])
    return drop(first) if kind == "drop" else NOOP


@settings(deadline=None, max_examples=150)
@given(st.lists(steps, max_size=30), st.data())
def test_against_a_dict_and_whatever_the_runs(history: list[tuple[str, Any, Any]], data: st.DataObject) -> None:
    """A machine agrees with the model; one that gets the same entries in runs of other lengths agrees with both."""
    proposals = [proposal(*step) for step in history]
    model, one_by_one, in_runs = Model(), TableMachine(), TableMachine()
    results = []
    for step, each in zip(history, proposals, strict=True):
        expected = model.step(*step)
        (result,) = apply(one_by_one, each)
        assert (result.value if result.error_code is None else None) == expected
        results.append(result)
    rest = proposals
    while rest:
        length = data.draw(st.integers(1, len(rest)))
        assert apply(in_runs, *rest[:length]) == results[len(proposals) - len(rest) :][:length]
        rest = rest[length:]
    for machine in (one_by_one, in_runs):
        assert machine.applied_index == len(history)
        tables = machine.tables()
        assert {info.name: machine.read(info.id).scan().read_all().to_pylist() for info in tables} == model.content()
        for info in tables:
            view = machine.read(info.name)
            assert view.row_count == len(model.content()[info.name])
