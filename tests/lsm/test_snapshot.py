"""A machine's state taken, written and restored: as if the machine had gone on; and nothing else is taken for one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lsm.test_machine import NOOP, SCHEMA, apply, content, create, delete, drop, keys, proposal, rows, steps, write

from marble._core import entry_batch
from marble._core.entry_batch import Proposal, encode_payload
from marble.env import SystemRandom
from marble.errors import CorruptionError, InvariantError
from marble.logstore.snapshots import SnapshotStore
from marble.lsm import payload
from marble.lsm import snapshot as module
from marble.lsm.machine import TableMachine
from marble.lsm.snapshot import MACHINE_SCHEMA
from marble.machine import SNAPSHOT_SCHEMA, MachineState, Result, StateMachine
from marble.testing.disk import SimulatedFiles
from marble.types import EntryKind, Members, SnapshotMeta

OPEN = Proposal(EntryKind.OPEN_SESSION)


def command(operation: bytes, session: int = 0, sequence: int = 0) -> Proposal:
    return Proposal(EntryKind.COMMAND, 0, payload.encode_command(operation), session, sequence)


def restored(state: MachineState, machine: TableMachine | None = None) -> TableMachine:
    machine = machine or TableMachine()
    machine.restore(state.applied_index, state.batches())
    return machine


def everything(machine: TableMachine) -> dict[str, Any]:
    """All that a machine answers from."""
    return {
        "position": (machine.applied_index, machine.time_us, machine.session_count),
        "tables": [(info.id, info.name, info.schema, info.key) for info in machine.tables()],
        "rows": {info.id: machine.read(info.id).scan().read_all().to_pylist() for info in machine.tables()},
        "sessions": [row for batch in machine.capture().sessions for row in batch.to_pylist()],
    }


@pytest.fixture
def machine() -> TableMachine:
    machine = TableMachine()
    apply(machine, NOOP, create("t"), create("gone"), create("u", SCHEMA, ["v", "id"]), OPEN, drop("gone"))
    apply(machine, write((2, "b"), (1, "a"), (3, None)), write((7, "x"), (5, "x"), table=3), delete(2))
    return machine


def test_is_the_seam(machine: TableMachine) -> None:
    seam: StateMachine = machine
    assert seam.capture().applied_index == seam.applied_index == 9
    assert [batch.schema for batch in seam.capture().batches()] == [SNAPSHOT_SCHEMA] * 6


def test_restored_it_answers_the_same_and_goes_on(machine: TableMachine) -> None:
    other = restored(machine.capture())
    assert everything(other) == everything(machine)
    for each in (machine, other):
        assert apply(each, create("new"), write((1, "z")), delete(3), drop("u")) == [
            Result(4),
            Result(1),
            Result(1),
            Result(3),
        ]
    assert everything(other) == everything(machine)
    assert content(other) == [(1, "z")]


def test_an_empty_machine() -> None:
    other = restored(TableMachine().capture())
    assert everything(other) == everything(TableMachine())
    assert apply(other, create()) == [Result(1)]


def test_a_state_does_not_change_while_the_machine_goes_on(machine: TableMachine) -> None:
    before = everything(machine)
    state = machine.capture()
    apply(machine, write((9, "later")), drop("u"), create("v"), write((1, "w"), table=1), OPEN)
    assert everything(restored(state)) == before


def test_a_restore_replaces_everything_at_once(machine: TableMachine) -> None:
    other = TableMachine()
    apply(other, create("old"), write((4, "old")), OPEN)
    view = other.read("old")
    seen: list[tuple[int, list[str]]] = []

    def watched() -> Iterator[pa.RecordBatch]:
        for batch in machine.capture().batches():
            seen.append((other.applied_index, [info.name for info in other.tables()]))
            yield batch

    other.restore(9, watched())
    assert set(map(str, seen)) == {"(3, ['old'])"}
    assert everything(other) == everything(machine)
    assert view.scan().read_all().num_rows == 1


def test_a_restore_never_goes_back(machine: TableMachine) -> None:
    state = machine.capture()
    apply(machine, NOOP)
    with pytest.raises(InvariantError, match="a snapshot of entry 9 would undo entries up to 10"):
        restored(state, machine)


def test_a_restore_mends_a_machine_that_had_failed(machine: TableMachine) -> None:
    state = machine.capture()
    other = TableMachine(on_command=lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        apply(other, command(b""))
    with pytest.raises(InvariantError, match="an earlier apply failed"):
        other.capture()
    restored(state, other)
    assert apply(other, NOOP) == [Result(0)]


def test_large_rows_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 4096)
    machine = TableMachine()
    apply(machine, create(), *(write((i, "x" * (5000 if i == 70 else 100))) for i in range(100)))
    pieces = [batch for batch in machine.capture().batches() if batch.column("section")[0].as_py() == "rows"]
    sizes = [len(piece.column("payload")[0].as_py()) for piece in pieces]
    assert 3 < len(sizes) < 12
    assert sorted(size > 5000 for size in sizes) == [*[False] * (len(sizes) - 1), True]
    assert everything(restored(machine.capture())) == everything(machine)


def test_rows_are_restored_to_memory_of_their_own() -> None:
    data = pa.py_buffer(bytes(range(200)))
    copy = module._aligned(data.slice(3, 128))
    assert copy.address % 64 == 0
    assert copy.to_pybytes() == bytes(range(3, 131))


def test_through_a_file_and_back(machine: TableMachine) -> None:
    store = SnapshotStore(SimulatedFiles(SystemRandom(1)), 1)
    info = store.write(SnapshotMeta(9, 1, Members((1,))), {}, machine.capture().batches())
    other = TableMachine()
    other.restore(info.index, store.read(info))
    assert everything(other) == everything(machine)


def test_written_on_another_thread_while_entries_are_applied(machine: TableMachine) -> None:
    before = everything(machine)
    apply(machine, *(write((i, str(i))) for i in range(200)))
    middle, state = everything(machine), machine.capture()
    assert before != middle
    found: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: found.append(everything(restored(state))))
    reader.start()
    for i in range(50):
        apply(machine, write((i, "new")), delete(i + 100), OPEN)
    reader.join(timeout=30)
    assert found == [middle]


# -- commands ------------------------------------------------------------------------------------------------------------


class Kept:
    """What a user may build from commands."""

    def __init__(self) -> None:
        self.operations: list[bytes] = []
        self.machine = TableMachine(
            lambda index, operation: self.operations.append(operation),
            lambda: b",".join(self.operations),
            self.restore,
        )

    def restore(self, state: bytes) -> None:
        self.operations = state.split(b",") if state else []


def test_what_commands_built_goes_into_the_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 3)
    one, two = Kept(), Kept()
    apply(one.machine, command(b"first"), command(b"second"))
    apply(two.machine, command(b"else"))
    restored(one.machine.capture(), two.machine)
    assert two.operations == [b"first", b"second"]
    apply(two.machine, command(b"third"))
    assert two.operations == [b"first", b"second", b"third"]


def test_commands_without_a_state_begin_anew() -> None:
    plain, kept = TableMachine(), Kept()
    apply(plain, command(b"x"), NOOP)
    apply(kept.machine, command(b"y"))
    restored(plain.capture(), kept.machine)
    assert kept.operations == []
    assert restored(kept.machine.capture()).applied_index == 2


def test_a_restore_that_the_user_refuses_stops_the_replica(machine: TableMachine) -> None:
    other = TableMachine(on_restore=lambda state: [][1])
    with pytest.raises(IndexError):
        restored(machine.capture(), other)
    with pytest.raises(InvariantError, match="an earlier apply failed"):
        apply(other, NOOP)


# -- what is no state ----------------------------------------------------------------------------------------------------

Pieces = list[dict[str, Any]]


def sections(pieces: Pieces, section: str) -> list[dict[str, Any]]:
    return [piece for piece in pieces if piece["section"] == section]


def head(**numbers: int) -> bytes:
    given = {"applied_index": 9, "time_us": 0, "next_table": 4, "tables": 2} | numbers
    return encode_payload(pa.RecordBatch.from_pylist([given], MACHINE_SCHEMA)).to_pybytes()


def definition(name: str) -> bytes:
    return payload.encode_create_table(name, SCHEMA, ["id"]).to_pybytes()


def swap(pieces: Pieces, one: int, other: int) -> None:
    pieces[one], pieces[other] = pieces[other], pieces[one]


NULL_KEY = encode_payload(rows((None, "x"))).to_pybytes()


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (lambda p: p.clear(), "tables are missing"),
        (lambda p: p.pop(0), "section 'table' follows section ''"),
        (lambda p: p.insert(1, p[0]), "section 'machine' follows section 'machine'"),
        (lambda p: swap(p, 1, 2), "section 'rows' follows section 'machine'"),
        (lambda p: p.append(p[1]), "section 'table' follows section 'sessions'"),
        (lambda p: p.append({**p[0], "section": "new"}), "section 'new' follows"),
        (lambda p: p[0].update(payload=head(applied_index=8)), "of entry 8, not of 9"),
        (lambda p: p[0].update(payload=head(tables=3)), "tables are missing"),
        (lambda p: p[0].update(payload=head(next_table=3)), "above the next id"),
        (lambda p: p[0].update(payload=b"x" * 64), "section 'machine' of table 0"),
        (lambda p: p[0].update(payload=p[1]["payload"]), "section 'machine' of table 0"),
        (lambda p: p[1].update(table=0), "out of order"),
        (lambda p: (p[1].update(table=3), p[2].update(table=3)), "out of order"),
        (lambda p: p[3].update(payload=definition("t")), "stands twice"),
        (lambda p: p[3].update(payload=b""), "section 'table' of table 3"),
        (lambda p: p[4].update(table=1), "rows of table 1 stand with table 3"),
        (lambda p: p[4].update(payload=NULL_KEY), "in the key and is null"),
        (lambda p: p[4].update(payload=p[4]["payload"][:-64]), "not a valid record batch"),
        (lambda p: p[5].update(payload=head()), "section 'sessions' of table 0"),
        (lambda p: p.append(p[5]), "not in order"),
        (lambda p: p.append({**p[0], "section": "commands"}), "not a valid record batch"),
    ],
)
def test_what_is_no_state_is_refused_and_changes_nothing(
    machine: TableMachine, mutate: Callable[[Pieces], object], message: str
) -> None:
    pieces = [row for batch in machine.capture().batches() for row in batch.to_pylist()]
    assert [piece["section"] for piece in pieces] == ["machine", "table", "rows", "table", "rows", "sessions"]
    mutate(pieces)
    other = TableMachine()
    apply(other, create("mine"), write((1, "a")))
    before = everything(other)
    with pytest.raises(CorruptionError, match=message):
        other.restore(9, [pa.RecordBatch.from_pylist(pieces, SNAPSHOT_SCHEMA)])
    assert everything(other) == before
    assert apply(other, NOOP) == [Result(0)]


def test_other_columns_and_nulls_are_refused(machine: TableMachine) -> None:
    batch = next(machine.capture().batches())
    with pytest.raises(CorruptionError, match="other columns"):
        TableMachine().restore(9, [batch.drop_columns(["table"])])
    null = batch.set_column(2, SNAPSHOT_SCHEMA.field(2), pa.array([None], pa.binary()))
    with pytest.raises(CorruptionError, match="nulls"):
        TableMachine().restore(9, [null])


def test_a_source_that_fails_changes_nothing(machine: TableMachine) -> None:
    def torn() -> Iterator[pa.RecordBatch]:
        yield from list(machine.capture().batches())
        raise CorruptionError("it lacks its end", "x", 5)

    other = TableMachine()
    with pytest.raises(CorruptionError, match="lacks its end"):
        other.restore(9, torn())
    assert everything(other) == everything(TableMachine())


# -- sessions ------------------------------------------------------------------------------------------------------------


def once(proposed: Proposal, session: int, sequence: int) -> Proposal:
    return Proposal(proposed.kind, proposed.table, proposed.payload, session, sequence)


def test_a_session_s_number_is_its_index(machine: TableMachine) -> None:
    assert apply(machine, OPEN, NOOP, OPEN) == [Result(10), Result(0), Result(12)]
    assert machine.session_count == 3
    assert apply(machine, Proposal(EntryKind.CLOSE_SESSION, session=10)) == [Result(0)]
    assert machine.session_count == 2
    assert apply(machine, Proposal(EntryKind.CLOSE_SESSION, session=10)) == [Result(0)]


def test_a_repeat_gets_the_first_answer_and_does_nothing(machine: TableMachine) -> None:
    proposed = [once(delete(1, 2), 5, 1), once(write((None, "x")), 5, 2), once(create("w"), 5, 3)]
    first = apply(machine, *proposed)
    assert [result.value for result in first] == [1, 0, 4]
    assert first[1].error_code == "usage"
    apply(machine, write((1, "back")), drop("w"))
    again = apply(machine, *reversed(proposed))
    assert [(result.index, result.value, result.error_code, result.message) for result in reversed(again)] == [
        (10 + i, result.value, result.error_code, result.message) for i, result in enumerate(first)
    ]
    assert content(machine) == [(1, "back"), (3, None)]
    assert [info.name for info in machine.tables()] == ["t", "u"]


def test_a_repeat_in_the_same_run_of_entries(machine: TableMachine) -> None:
    assert apply(machine, once(delete(1), 5, 1), once(delete(1), 5, 1)) == [Result(1), Result(1, index=10)]


def test_a_repeat_after_a_snapshot(machine: TableMachine) -> None:
    proposed = once(delete(1), 5, 1)
    assert apply(machine, proposed) == [Result(1)]
    other = restored(machine.capture())
    assert apply(other, proposed) == [Result(1, index=10)]


def test_a_repeated_command_is_not_handed_on() -> None:
    kept = Kept()
    apply(kept.machine, OPEN, command(b"x", 1, 1), command(b"x", 1, 1), command(b"y", 1, 2), command(b"z"))
    assert kept.operations == [b"x", b"y", b"z"]


def test_a_session_that_is_not_known_executes_nothing(machine: TableMachine) -> None:
    (result,) = apply(machine, once(write((9, "x")), 77, 1))
    assert (result.error_code, result.index) == ("session_expired", 0)
    assert content(machine) == [(1, "a"), (3, None)]


def test_without_a_sequence_it_is_executed_each_time(machine: TableMachine) -> None:
    for session, sequence in ((5, 0), (0, 3), (77, 0)):
        assert apply(machine, *[once(delete(1), session, sequence)] * 2)[1] == Result(0)
        apply(machine, write((1, "a")))


def at(machine: TableMachine, time_us: int, *proposals: Proposal) -> list[Result]:
    return machine.apply(entry_batch.build(1, machine.applied_index + 1, 1, list(proposals), time_us))


def test_time_is_that_of_entries_and_never_goes_back() -> None:
    machine = TableMachine()
    hour = 3_600_000_000
    at(machine, 1000, OPEN, create())
    at(machine, 500, NOOP)
    assert machine.time_us == 1000
    assert at(machine, 1000 + hour, once(write((1, "a")), 1, 1)) == [Result(1)]
    at(machine, 1001 + 2 * hour, NOOP)
    assert machine.time_us == 1001 + 2 * hour
    other = restored(machine.capture())
    for each in (machine, other):
        (result,) = at(each, 5, once(write((2, "b")), 1, 2))
        assert result.error_code == "session_expired"
        assert (each.session_count, each.time_us) == (0, 1001 + 2 * hour)
        assert content(each) == [(1, "a")]


def test_a_membership_changes_no_table(machine: TableMachine) -> None:
    before = everything(machine)["rows"]
    assert apply(machine, Proposal(EntryKind.MEMBERSHIP, 0, encode_payload(keys(1)))) == [Result(0)]
    assert everything(machine)["rows"] == before


HISTORY = st.lists(
    st.tuples(
        steps, st.integers(0, 3), st.integers(0, 4), st.integers(0, 3_000), st.sampled_from(["", "open", "snapshot"])
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=100)
@given(HISTORY, st.data())
def test_any_history_with_runs_and_snapshots_in_any_places(history: list[Any], data: st.DataObject) -> None:
    """One machine gets entries one by one; another in runs, and is restored from snapshots in between."""
    proposals, time_us = [], 0
    for step, session, sequence, passed, extra in history:
        time_us += passed * 1_000_000
        proposals.append((proposal(*step) if step[0] == "noop" else once(proposal(*step), session, sequence), time_us))
        if extra == "open":
            proposals.append((OPEN, time_us))
    one, other = TableMachine(), TableMachine()
    results = [result for each, when in proposals for result in at(one, when, each)]
    found: list[Result] = []
    while len(found) < len(proposals):
        length = data.draw(st.integers(1, len(proposals) - len(found)))
        part = proposals[len(found) : len(found) + length]
        batches = [entry_batch.build(1, len(found) + 1 + i, 1, [each], when) for i, (each, when) in enumerate(part)]
        found += other.apply(entry_batch.concat(batches))
        if data.draw(st.booleans()):
            other = restored(other.capture())
    assert found == results
    assert everything(other) == everything(one)
