"""What `test_any_life` leaves out, held to dicts of its own: keys of several columns, every merge operator, compressed files, a time
to live by a column, transactions that are refused, and every way to read; with restarts, crashes, flushes and compactions between.

Rule 1: the model is one dict a table, and a function for each operator that says what the documentation does.
Rule 2: what an entry answered when it was applied first, it answers in every life that applies it again.

``MARBLE_TEST_LIVES`` plays more lives than the few that every run plays, ``MARBLE_TEST_SEED`` the same ones again.
"""

from __future__ import annotations

import copy
import datetime
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from lsm.shelf import TINY, Shelf

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.database.ranges import key_range
from marble.env import SystemRandom
from marble.lsm import payload
from marble.lsm.keyrange import KeyRange
from marble.machine import Result
from marble.schema import TableInfo
from marble.table_options import TableOptions
from marble.testing.disk import DiskCrash, SimulatedFiles
from marble.types import EntryKind

FRESH_SEED = int(os.environ.get("MARBLE_TEST_SEED", "0")) or int.from_bytes(os.urandom(4), "big")
LIVES = int(os.environ.get("MARBLE_TEST_LIVES", "3"))
STEPS: Final = 90
RETENTION: Final = 5
TTL_US: Final = 30_000_000
POLICY: Final = replace(
    TINY, compaction=replace(TINY.compaction, level1_bytes=6000, file_bytes_max=3000, compressed_level=1)
)
"""Level 1 is compressed already, so that most of what is read was."""

BLOCK_ROWS_MAX: Final = 3
"""So that zone maps leave blocks out."""

Row = dict[str, Any]
Key = tuple[Any, ...]

MERGED: Final = pa.schema(
    [
        pa.field("region", pa.string(), nullable=False),
        pa.field("day", pa.date32(), nullable=False),
        pa.field("id", pa.int16(), nullable=False),
        pa.field("total", pa.int64()),
        pa.field("weight", pa.float64()),
        pa.field("low", pa.float64()),
        pa.field("high", pa.string()),
        pa.field("writes", pa.int64()),
        pa.field("tags", pa.list_(pa.string())),
        pa.field("seen", pa.string()),
        pa.field("plain", pa.int32()),
    ]
)
OPERATORS: Final = {
    "total": "sum",
    "weight": "sum",
    "low": "min",
    "high": "max",
    "writes": "count",
    "tags": "append",
    "seen": "last",
}
TIMED: Final = pa.schema(
    [
        pa.field("kind", pa.binary(), nullable=False),
        pa.field("flag", pa.bool_(), nullable=False),
        pa.field("at", pa.timestamp("us")),
        pa.field("text", pa.string()),
    ]
)
TABLES: Final = {
    1: ("merged", MERGED, ["region", "day", "id"], TableOptions("lz4", merge=tuple(OPERATORS.items()))),
    2: ("timed", TIMED, ["kind", "flag"], TableOptions("zstd", "at", TTL_US)),
}
REGIONS: Final = ("", "a", "a\0", "a\0b", "ab", "b")
DAYS: Final = tuple(datetime.date(1969, 12, 30) + datetime.timedelta(n) for n in range(4))
KINDS: Final = (b"", b"\0", b"k", b"k\0\xff", b"\xff", b"\xff\xff")
EPOCH: Final = datetime.datetime(1970, 1, 1)


class Refused(Exception):
    """The entry is wrong, and changes nothing."""


def microseconds(at: datetime.datetime) -> int:
    return (at - EPOCH) // datetime.timedelta(microseconds=1)


# -- the model ---------------------------------------------------------------------------------------------------------


def key_of(table: int, row: Row) -> Key:
    return tuple(row[name] for name in TABLES[table][2])


def merge_values(operator: str, values: list[Any]) -> Any:
    """What `operator` makes of the values of one row, the first of which was there before."""
    if operator == "":
        return values[-1]
    given = [value for value in values if value is not None]
    if not given:
        return None
    if operator == "sum":
        total = given[0]
        for value in given[1:]:
            total = total + value
        if isinstance(total, int) and not -(2**63) <= total < 2**63:
            raise Refused
        return total
    if operator == "append":
        return [item for value in given for item in value]
    return {"min": min, "max": max, "count": sum, "last": lambda each: each[-1]}[operator](given)


class Model:
    def __init__(self) -> None:
        self.time_us = 0
        self.tables: dict[int, dict[Key, Row]] = {1: {}, 2: {}}
        self.states: dict[int, dict[int, dict[Key, Row]]] = {}
        self.results: list[Result] = []

    def lives(self, table: int, row: Row | None) -> bool:
        if row is None or table != 2 or row["at"] is None:
            return row is not None
        return microseconds(row["at"]) > self.time_us - TTL_US

    def rows(self, table: int) -> list[Row]:
        found = self.tables[table]
        return [found[key] for key in sorted(found) if self.lives(table, found[key])]

    def do(self, operations: Sequence[Callable[[], int]]) -> int | None:
        """All of them, or none: then None."""
        before = copy.deepcopy(self.tables)
        try:
            return sum(operation() for operation in operations)
        except Refused:
            self.tables = before
            return None

    def write(self, table: int, rows: list[Row]) -> int:
        groups: dict[Key, list[Row]] = {}
        for row in rows:
            groups.setdefault(key_of(table, row), []).append(row)
        written = {}
        for key, group in groups.items():
            before = self.tables[table].get(key)
            given = [{**row, "writes": 1} if table == 1 else row for row in group]
            if table == 1 and before is not None:
                given.insert(0, before)
            merged = TABLES[table][3].merge
            operators = dict(merged)
            written[key] = {
                name: merge_values(operators.get(name, ""), [row[name] for row in given]) for name in given[-1]
            }
        self.tables[table].update(written)
        return len(rows)

    def delete(self, table: int, keys: Sequence[Key]) -> int:
        gone = 0
        for key in dict.fromkeys(keys):
            gone += self.lives(table, self.tables[table].pop(key, None))
        return gone

    def delete_range(self, table: int, inside: Callable[[Key], bool]) -> int:
        return self.delete(table, [key for key in self.tables[table] if inside(key)])


# -- a life ------------------------------------------------------------------------------------------------------------


class Life:
    """A machine with files on a disk that loses power, the log that it replays, and the model."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.files = SimulatedFiles(SystemRandom(seed))
        self.log: list[tuple[Proposal, int]] = []
        self.model = Model()
        self.now_us = 1_700_000_000_000_000
        self.shelf = Shelf(self.files, POLICY, block_rows_max=BLOCK_ROWS_MAX, retention=RETENTION)
        for name, schema, key, options in TABLES.values():
            data = payload.encode_create_table(name, schema, key, options)
            self.apply(Proposal(EntryKind.CREATE_TABLE, 0, data), [])

    def apply(self, proposal: Proposal, effects: list[Callable[[], int]] | None) -> None:
        # The clock of a leader may be behind the last one's; the tables' time never goes back.
        self.now_us += self.chance.randrange(-500_000, 4_000_000)
        self.log.append((proposal, self.now_us))
        self.model.time_us = max(self.model.time_us, self.now_us)
        expected = self.model.do(effects or ())
        self.model.states[len(self.log)] = {
            table: {key: row for key, row in rows.items() if self.model.lives(table, row)}
            for table, rows in copy.deepcopy(self.model.tables).items()
        }
        self.replay()
        result = self.model.results[-1]
        if proposal.kind is not EntryKind.CREATE_TABLE:
            assert (result.value if result.error_code is None else None) == expected

    def replay(self) -> None:
        machine, results = self.shelf.machine, self.model.results
        for index in range(machine.applied_index + 1, len(self.log) + 1):
            proposal, time_us = self.log[index - 1]
            (result,) = machine.apply(entry_batch.build(1, index, 1, [proposal], time_us))
            if index <= len(results):
                assert result == results[index - 1], "Rule 2"
            else:
                results.append(result)

    # -- what is drawn

    def key(self, table: int) -> Key:
        chance = self.chance
        if table == 1:
            return chance.choice(REGIONS), chance.choice(DAYS), chance.randrange(-2, 3)
        return chance.choice(KINDS), chance.random() < 0.5

    def row(self, table: int) -> Row:
        chance = self.chance
        row = dict(zip(TABLES[table][2], self.key(table), strict=True))
        maybe: Callable[[Any], Any] = lambda value: None if chance.random() < 0.2 else value  # noqa: E731
        if table == 1:
            return {
                **row,
                "total": maybe(chance.choice((*range(-9, 9), 2**62, -(2**62)))),
                "weight": maybe(chance.uniform(-1, 1)),
                "low": maybe(chance.uniform(-1, 1)),
                "high": maybe(f"{chance.random()}" * chance.randrange(1, 9)),
                "writes": maybe(chance.randrange(99)),
                "tags": maybe([maybe(f"{chance.randrange(9)}") for _ in range(chance.randrange(3))]),
                "seen": maybe(f"{chance.random()}"),
                "plain": maybe(chance.randrange(99)),
            }
        lag = chance.randrange(-TTL_US, 2 * TTL_US)
        at = EPOCH + datetime.timedelta(microseconds=self.now_us - lag)
        return {**row, "at": maybe(at), "text": maybe(f"{chance.random()}" * chance.randrange(1, 20))}

    def bounds(self, table: int) -> tuple[KeyRange, Callable[[Key], bool]]:
        """Keys by what a user gives, and whether a key is among them."""
        chance, first, last = self.chance, self.key(table), self.key(table)
        width = chance.randrange(len(first) + 1)
        prefix = first[:width]
        if width == len(first) or chance.random() < 0.4:
            between = None
        else:
            ends = chance.randrange(1, len(first) - width + 1)
            low, high = sorted((self.key(table)[width : width + ends], last[width : width + ends]))
            between = (None if chance.random() < 0.2 else low, None if chance.random() < 0.2 else high)
        info = self.shelf.machine.table(table)
        lower, upper = key_range(info, prefix or None, between)

        def inside(key: Key) -> bool:
            rest = key[width:]
            low, high = between or (None, None)
            above = low is None or rest[: len(low)] >= low
            return key[:width] == prefix and above and (high is None or rest[: len(high)] <= high)

        return KeyRange(lower or b"", upper), inside

    def operation(self) -> tuple[payload.Operation, Callable[[], int]]:
        chance, model = self.chance, self.model
        table = chance.choice((1, 1, 2))
        schema, draw = TABLES[table][1], chance.random()
        if draw < 0.7:
            rows = [self.row(table) for _ in range(chance.randrange(1, 12))]
            data = payload.encode_rows(pa.RecordBatch.from_pylist(rows, schema))
            return payload.Operation(EntryKind.WRITE, table, data), lambda: model.write(table, rows)
        if draw < 0.9:
            keys = [self.key(table) for _ in range(chance.randrange(1, 8))]
            data = payload.encode_rows(self.keys(table, keys))
            return payload.Operation(EntryKind.DELETE, table, data), lambda: model.delete(table, keys)
        given, inside = self.bounds(table)
        data = payload.encode_range(given.lower, given.upper)
        return payload.Operation(EntryKind.DELETE_RANGE, table, data), lambda: model.delete_range(table, inside)

    def keys(self, table: int, keys: Sequence[Key]) -> pa.RecordBatch:
        info = self.shelf.machine.table(table)
        return pa.RecordBatch.from_pylist([dict(zip(info.key, key, strict=True)) for key in keys], info.key_schema)

    # -- steps

    def entry(self) -> None:
        operation, effect = self.operation()
        self.apply(Proposal(operation.kind, operation.table, operation.payload), [effect])

    def transaction(self) -> None:
        several = [self.operation() for _ in range(self.chance.randrange(2, 5))]
        data = payload.encode_transaction([operation for operation, _ in several])
        self.apply(Proposal(EntryKind.TRANSACTION, 0, data), [effect for _, effect in several])

    def snapshot(self) -> None:
        self.shelf.snapshot()

    def compact(self) -> None:
        self.shelf.compact(self.chance.randrange(1, 5))

    def restart(self) -> None:
        self.shelf = Shelf(self.files, POLICY, block_rows_max=BLOCK_ROWS_MAX, retention=RETENTION)
        self.replay()

    def crash(self) -> None:
        self.files.lose_power_at = self.files.operations + self.chance.randrange(1, 25)

    def step(self, action: str) -> None:
        try:
            getattr(self, action)()
        except DiskCrash:
            self.files.crash()
            self.restart()

    # -- what must hold

    def check(self) -> None:
        machine, end = self.shelf.machine, len(self.log)
        assert machine.applied_index == end
        back = self.chance.randint(max(len(TABLES), machine._past[0].applied_index), end)
        for table in TABLES:
            for index in {end, back}:
                known = self.model.states[index][table]
                self.check_view(machine.read(table, index), table, [known[key] for key in sorted(known)])

    def check_view(self, view: Any, table: int, rows: list[Row]) -> None:
        chance, info = self.chance, view.info
        assert scanned(view) == rows
        assert view.row_count == len(rows)
        columns = chance.sample(info.schema.names, chance.randrange(1, len(info.schema.names) + 1))
        given, inside = self.bounds(table)
        expected = [row for row in rows if inside(key_of(table, row))]
        assert scanned(view, columns, keys=given) == cut(expected, columns)
        limit = chance.randrange(1, 6)
        found = scanned(view, columns, keys=given, reverse=True, limit=limit, batch_rows_max=3)
        assert found == cut(expected[::-1][:limit], columns)
        condition, passes = self.filter(table)
        expected = [row for row in expected if passes(row)]
        assert scanned(view, columns, condition, keys=given, limit=limit) == cut(expected[:limit], columns)
        assert scanned(view, columns, condition, keys=given, reverse=True) == cut(expected[::-1], columns)
        self.check_gets(view, table, {key_of(table, row): row for row in rows})

    def filter(self, table: int) -> tuple[pc.Expression, Callable[[Row], bool]]:
        chance, field = self.chance, pc.field
        region, day, number = self.key(1)
        kind, _ = self.key(2)
        at = EPOCH + datetime.timedelta(microseconds=self.now_us - chance.randrange(TTL_US))
        offers: list[tuple[pc.Expression, Callable[[Row], bool]]]
        if table == 1:
            offers = [
                (field("total") > number, lambda row: row["total"] is not None and row["total"] > number),
                (
                    (field("region") >= region) & (field("day") == day),
                    lambda row: row["region"] >= region and row["day"] == day,
                ),
                (field("region").isin([region, "b"]), lambda row: row["region"] in (region, "b")),
                (pc.starts_with(field("region"), "a"), lambda row: row["region"].startswith("a")),
                (
                    field("seen").is_null() | (field("plain") < 50),
                    lambda row: row["seen"] is None or (row["plain"] is not None and row["plain"] < 50),
                ),
            ]
        else:
            offers = [
                (field("kind") == kind, lambda row: row["kind"] == kind),
                (field("at") >= at, lambda row: row["at"] is not None and row["at"] >= at),
                (field("flag") & (field("kind") < b"l"), lambda row: row["flag"] and row["kind"] < b"l"),
            ]
        return chance.choice(offers)

    def check_gets(self, view: Any, table: int, there: dict[Key, Row]) -> None:
        asked = [self.key(table) for _ in range(9)]
        found = view.get_many(self.keys(table, asked)).to_pylist()
        nothing = dict.fromkeys(view.info.schema.names)
        assert found == [there.get(key, nothing) for key in asked]
        for key in asked[:3]:
            row = view.get_row(tuple(view.info.schema.names), key)
            assert row is False or row == there.get(key)

    def check_files(self) -> None:
        """Behind a snapshot all rows are in files: pyarrow alone finds them there, and some of them are compressed."""
        self.shelf.snapshot()
        for table in TABLES:
            info: TableInfo = self.shelf.machine.table(table)
            newest: dict[Key, tuple[int, bool, Row]] = {}
            for file in self.shelf.machine._trees[table].below.levels:
                data = pa.py_buffer(self.files.read(self.shelf.store.files.path(file.name)))
                for row in pa.ipc.open_file(data).read_all().to_pylist():
                    key, index = key_of(table, row), row["_marble_index"]
                    if key not in newest or newest[key][0] < index:
                        newest[key] = index, row["_marble_deleted"], {name: row[name] for name in info.schema.names}
            living = [newest[key][2] for key in sorted(newest) if not newest[key][1]]
            assert [row for row in living if self.model.lives(table, row)] == self.model.rows(table)


def scanned(
    view: Any, columns: list[str] | None = None, condition: pc.Expression | None = None, **more: Any
) -> list[Row]:
    rows: list[Row] = view.scan(columns, condition, **more).read_all().to_pylist()
    return rows


def cut(rows: list[Row], columns: list[str]) -> list[Row]:
    return [{name: row[name] for name in columns} for row in rows]


ACTIONS: Final = (
    ("entry",) * 8 + ("transaction",) * 3 + ("snapshot",) * 3 + ("compact",) * 3 + ("restart", "crash", "crash")
)


@pytest.mark.parametrize("offset", range(LIVES))
def test_any_table(offset: int) -> None:
    print(f"repeat with MARBLE_TEST_SEED={FRESH_SEED} MARBLE_TEST_LIVES={LIVES}")
    life = Life(FRESH_SEED + offset)
    for count in range(STEPS):
        life.step(life.chance.choice(ACTIONS))
        if count % 3 == 0:
            life.check()
    life.files.lose_power_at = None
    life.check()
    life.check_files()


def test_the_lives_are_full_of_what_they_are_for() -> None:
    """Of one that is always the same, so that nothing is tested of which nothing ever happens."""
    life, deepest, refused = Life(1), 0, 0
    for _ in range(3 * STEPS):
        life.step(life.chance.choice(ACTIONS))
        deepest = max(deepest, *(len(life.shelf.levels(table)) for table in TABLES))
    refused = sum(result.error_code is not None for result in life.model.results)
    names = {path for table in TABLES for path in life.shelf.machine._trees[table].below.levels.levels[-1]}
    assert deepest >= 3
    assert refused >= 3
    assert any(len(row["tags"] or ()) > 3 for row in life.model.rows(1))
    assert len(life.model.rows(2)) < len(life.model.tables[2])
    assert names
