"""What entries do to rows: ranges, merges, times to live and transactions, against a dict, in memory and in files."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import pytest
from lsm.shelf import Shelf

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble._core.key_codec import KeyCodec, prefix_end
from marble.errors import UsageError
from marble.lsm import payload
from marble.lsm.machine import TableMachine
from marble.lsm.payload import Operation
from marble.machine import Result
from marble.schema import TableInfo
from marble.table_options import TableOptions
from marble.types import EntryKind

SCHEMA = pa.schema(
    [("a", pa.string()), ("b", pa.int32()), ("n", pa.int64()), ("at", pa.timestamp("ms")), ("v", pa.string())]
)
KEY = ("a", "b")
OPTIONS = {
    "plain": TableOptions(),
    "summed": TableOptions(merge=(("n", "sum"), ("v", "last"))),
    "mortal": TableOptions(None, "at", 50_000),
    "both": TableOptions(None, "at", 50_000, True, (("n", "sum"),)),
}
INFOS = {name: TableInfo(id_, name, SCHEMA, KEY, OPTIONS[name]) for id_, name in enumerate(OPTIONS, 1)}

Row = dict[str, Any]
Model = dict[str, dict[tuple[str, int], Row]]


def create(name: str) -> Proposal:
    data = payload.encode_create_table(name, SCHEMA, KEY, OPTIONS[name])
    return Proposal(EntryKind.CREATE_TABLE, 0, data)


def write(table: str, *rows: Row) -> Operation:
    batch = pa.RecordBatch.from_pylist(list(rows), SCHEMA)
    return Operation(EntryKind.WRITE, INFOS[table].id, payload.encode_rows(batch))


def delete(table: str, *keys: tuple[str, int]) -> Operation:
    batch = pa.RecordBatch.from_pylist([dict(zip(KEY, key, strict=True)) for key in keys], INFOS[table].key_schema)
    return Operation(EntryKind.DELETE, INFOS[table].id, payload.encode_rows(batch))


def delete_range(table: str, low: tuple[str, int] | None, high: tuple[str, int] | None) -> Operation:
    """From `low` to `high`, both included."""
    codec = KeyCodec(INFOS[table].key_schema)

    def encoded(key: tuple[str, int]) -> bytes:
        row = pa.RecordBatch.from_pylist([dict(zip(KEY, key, strict=True))], codec.schema)
        return codec.encode(row).to_pylist()[0]

    upper = None if high is None else prefix_end(encoded(high))
    data = payload.encode_range(b"" if low is None else encoded(low), upper)
    return Operation(EntryKind.DELETE_RANGE, INFOS[table].id, data)


def proposal(*operations: Operation) -> Proposal:
    if len(operations) > 1:
        return Proposal(EntryKind.TRANSACTION, 0, payload.encode_transaction(operations))
    return Proposal(operations[0].kind, operations[0].table, operations[0].payload)


def apply(machine: TableMachine, *proposals: Proposal, time_us: int = 0) -> list[Result]:
    return machine.apply(entry_batch.build(7, machine.applied_index + 1, 1, list(proposals), time_us))


def content(machine: TableMachine, table: str) -> list[Row]:
    rows: list[Row] = machine.read(table).scan().read_all().to_pylist()
    return rows


def row(a: str, b: int, n: int | None = 0, v: str | None = None) -> Row:
    return {"a": a, "b": b, "n": n, "at": None, "v": v}


@pytest.fixture(params=["memory", "files"])
def machine(request: pytest.FixtureRequest) -> TableMachine:
    made = Shelf().machine if request.param == "files" else TableMachine()
    assert [each.value for each in apply(made, *map(create, OPTIONS))] == [1, 2, 3, 4]
    return made


def test_a_range_goes(machine: TableMachine) -> None:
    rows = [row(a, b) for a in "xyz" for b in range(3)]
    apply(machine, proposal(write("plain", *rows)))
    (result,) = apply(machine, proposal(delete_range("plain", ("x", 2), ("z", 0))))
    assert result == Result(5)
    assert content(machine, "plain") == [row("x", 0), row("x", 1), row("z", 1), row("z", 2)]
    assert apply(machine, proposal(delete_range("plain", ("x", 2), ("z", 0)))) == [Result(0)]
    assert apply(machine, proposal(delete_range("plain", None, None))) == [Result(4)]
    assert content(machine, "plain") == []


def test_a_write_merges_and_says_how_many_rows_were_given(machine: TableMachine) -> None:
    assert apply(machine, proposal(write("summed", row("x", 1, 5, "p"), row("x", 1, 6)))) == [Result(2)]
    assert apply(machine, proposal(write("summed", row("x", 1, -1), row("y", 1, 3)))) == [Result(2)]
    assert content(machine, "summed") == [row("x", 1, 10, "p"), row("y", 1, 3)]


def test_a_transaction_is_done_in_order(machine: TableMachine) -> None:
    apply(machine, proposal(write("summed", row("x", 1, 5), row("y", 1, 5), row("z", 1, 5))))
    steps = [
        write("summed", row("x", 1, 1)),
        delete("summed", ("x", 1), ("w", 9)),
        write("summed", row("x", 1, 2), row("y", 1, 2)),
        delete_range("summed", ("y", 0), ("y", 9)),
        write("summed", row("y", 1, 3), row("z", 1, 3)),
        write("plain", row("offsets", 0, 77)),
        write("summed", row("z", 1, 4)),
    ]
    assert apply(machine, proposal(*steps)) == [Result(1 + 1 + 2 + 1 + 2 + 1 + 1)]
    assert content(machine, "summed") == [row("x", 1, 2), row("y", 1, 3), row("z", 1, 12)]
    assert content(machine, "plain") == [row("offsets", 0, 77)]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (write("summed", row("x", 1, 2**63 - 1)), "column 'n': a sum is too large for int64"),
        (Operation(EntryKind.WRITE, 9, write("plain", row("x", 1)).payload), "no table with id 9"),
        (Operation(EntryKind.WRITE, 1, delete("plain", ("x", 1)).payload), "not a valid record batch"),
        (Operation(EntryKind.DELETE_RANGE, 1, delete("plain", ("x", 1)).payload), "not a valid record batch"),
    ],
)
def test_a_transaction_is_done_as_a_whole_or_not_at_all(machine: TableMachine, wrong: Operation, says: str) -> None:
    apply(machine, proposal(write("summed", row("x", 1, 1)), write("plain", row("k", 1, 1))))
    steps = [write("plain", row("new", 1)), delete_range("plain", None, None), delete("summed", ("q", 1)), wrong]
    (result,) = apply(machine, proposal(*steps))
    assert result.error_code == UsageError.code
    assert result.message.startswith("operation 3 of the transaction: ")
    assert says in result.message
    assert content(machine, "plain") == [row("k", 1, 1)]
    assert content(machine, "summed") == [row("x", 1, 1)]


def test_a_transaction_within_a_transaction_and_other_nonsense_is_refused(machine: TableMachine) -> None:
    inner = proposal(write("plain", row("x", 1)), write("plain", row("y", 1)))
    assert inner.payload is not None
    for kind in (EntryKind.TRANSACTION, EntryKind.CREATE_TABLE, EntryKind.COMMAND, EntryKind.NOOP):
        nested = payload.encode_transaction([Operation(kind, 0, inner.payload)])
        (result,) = apply(machine, Proposal(EntryKind.TRANSACTION, 0, nested))
        assert "operation 0 is not one that a transaction may have" in result.message
    (result,) = apply(machine, Proposal(EntryKind.TRANSACTION, 0, write("plain", row("x", 1)).payload))
    assert result.message == "a transaction: the payload is not a valid record batch of the schema expected"
    with pytest.raises(UsageError, match="1 to 4,096 operations"):
        payload.encode_transaction([])


def test_rows_of_a_transaction_stay_where_they_arrived() -> None:
    operations = [write("plain", row("x", 1)), delete_range("plain", None, None), write("plain", row("y", 1))]
    data = payload.encode_transaction(operations)
    for operation in payload.decode_transaction(data):
        assert data.address < operation.payload.address < data.address + data.size
        assert operation.payload.address % 8 == 0
    found = payload.decode_rows(payload.decode_transaction(data)[2].payload, INFOS["plain"])
    assert data.address < found.column("n").buffers()[1].address < data.address + data.size


def test_what_has_expired_is_not_there_for_merges_and_counts(machine: TableMachine) -> None:
    apply(machine, proposal(write("both", row("x", 1, 5))), time_us=1_000_000)
    (mine,) = content(machine, "both")
    assert machine.read("both").scan(["at"]).read_all()["at"].cast(pa.int64()).to_pylist() == [1000]
    apply(machine, proposal(write("both", row("x", 1, 1))), time_us=1_049_999)
    assert [each["n"] for each in content(machine, "both")] == [6]
    # The time of the entry before counts on: it never goes back.
    assert apply(machine, proposal(delete("plain", ("q", 0))), time_us=0) == [Result(0)]
    apply(machine, proposal(write("both", row("x", 1, 1))), time_us=1_099_999)
    assert [each["n"] for each in content(machine, "both")] == [1]
    assert apply(machine, proposal(delete_range("both", None, None)), time_us=1_200_000) == [Result(0)]
    assert mine["v"] is None


class Replay:
    """The rules of this module's head, one row at a time."""

    def __init__(self) -> None:
        self.rows: Model = {name: {} for name in OPTIONS}
        self.time_us = 0

    def living(self, table: str) -> dict[tuple[str, int], Row]:
        rows = self.rows[table]
        if OPTIONS[table].ttl_column is None:
            return rows
        until = (self.time_us - 50_000) // 1000
        return {key: each for key, each in rows.items() if each["at"] is None or each["at"] > until}

    def write(self, table: str, rows: list[Row]) -> int:
        for each in rows:
            key, new = (each["a"], each["b"]), dict(each)
            old = self.living(table).get(key)
            if OPTIONS[table].ttl_stamped:
                new["at"] = self.time_us // 1000
            if old is not None and OPTIONS[table].merge:
                both = [n for n in (old["n"], new["n"]) if n is not None]
                new["n"] = sum(both) if both else None
                if table == "summed" and new["v"] is None:
                    new["v"] = old["v"]
            self.rows[table][key] = new
        return len(rows)

    def delete(self, table: str, keys: set[tuple[str, int]]) -> int:
        gone = keys & self.living(table).keys()
        for key in keys:
            self.rows[table].pop(key, None)
        return len(gone)

    def step(self, chance: random.Random) -> tuple[Operation, int]:
        table = chance.choice(list(OPTIONS))
        kind = chance.random()

        def key() -> tuple[str, int]:
            return chance.choice("abc"), chance.randrange(4)

        if kind < 0.6:
            rows = []
            for _ in range(chance.choice([1, 1, 3, 20])):
                a, b = key()
                at = chance.choice([None, self.time_us // 1000 + chance.randrange(-60, 20)])
                n, v = chance.choice([None, chance.randrange(-5, 9)]), chance.choice([None, "p", "q"])
                rows.append({"a": a, "b": b, "n": n, "at": None if OPTIONS[table].ttl_stamped else at, "v": v})
            typed = [{**each, "at": None if each["at"] is None else max(0, each["at"])} for each in rows]
            return write(table, *typed), self.write(table, typed)
        if kind < 0.8:
            keys = [key() for _ in range(chance.choice([1, 2, 5]))]
            return delete(table, *keys), self.delete(table, set(keys))
        low, high = sorted([key(), key()])
        first, last = chance.choice([None, low]), chance.choice([None, high])
        inside = {
            each for each in self.rows[table] if (first is None or each >= first) and (last is None or each <= last)
        }
        return delete_range(table, first, last), self.delete(table, inside)


@pytest.mark.parametrize("seed", range(15))
def test_any_history_is_what_a_dict_says(seed: int) -> None:
    chance = random.Random(seed)
    shelf, twin, replay = Shelf(), TableMachine(), Replay()
    for each in (shelf.machine, twin):
        apply(each, *map(create, OPTIONS))
    for _ in range(40):
        # A leader whose clock is behind does not set time back.
        sent = max(0, replay.time_us + chance.choice([-40_000, 0, 1, 10_000, 30_000]))
        replay.time_us = max(replay.time_us, sent)
        steps = [replay.step(chance) for _ in range(chance.choice([1, 1, 2, 5]))]
        entry, changed = proposal(*(step for step, _ in steps)), sum(count for _, count in steps)
        for each in (shelf.machine, twin):
            assert apply(each, entry, time_us=sent) == [Result(changed)]
        if chance.random() < 0.2:
            shelf.snapshot()
        if chance.random() < 0.2:
            shelf.compact()
        if chance.random() < 0.1:
            shelf.snapshot()
            shelf = shelf.reopened()
        for table in OPTIONS:
            expected = [each for _, each in sorted(replay.living(table).items())]
            for each in (shelf.machine, twin):
                found = each.read(table).scan().read_all()
                numbers = found.set_column(3, "at", found["at"].cast(pa.int64()))
                assert numbers.to_pylist() == expected, table
