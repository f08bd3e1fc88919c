"""All operations on tables in files, with restarts, crashes, flushes and compactions between, held to dicts (`marble.testing.model`).

And the files to pyarrow alone: merged by index, newest first, they are what the model says.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from lsm.shelf import Shelf

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble._core.key_codec import KeyCodec
from marble.env import SystemRandom
from marble.lsm import payload
from marble.lsm.keyrange import KeyRange
from marble.table_options import TableOptions
from marble.testing.bulk import KEY_SCHEMA, PLAIN_SCHEMA, SUMS_SCHEMA, TTL_US
from marble.testing.disk import DiskCrash, SimulatedFiles
from marble.testing.model import Model
from marble.types import EntryKind

FRESH_SEED = int(os.environ.get("MARBLE_TEST_SEED", "0")) or int.from_bytes(os.urandom(4), "big")
KEYS = 60
RETENTION = 6
CREATES = [
    Proposal(EntryKind.CREATE_TABLE, 0, payload.encode_create_table("plain", PLAIN_SCHEMA, ["k"])),
    Proposal(
        EntryKind.CREATE_TABLE,
        0,
        payload.encode_create_table(
            "sums", SUMS_SCHEMA, ["k"], TableOptions(None, "at", TTL_US, True, (("total", "sum"),))
        ),
    ),
]


class Life:
    """A machine with files on a disk that loses power, the log that it replays, and the model."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.files = SimulatedFiles(SystemRandom(seed))
        self.log: list[tuple[Proposal, int]] = []
        self.time_us = 1_700_000_000_000_000
        self.model = Model()
        self.shelf = Shelf(self.files, retention=RETENTION)
        self.apply(*CREATES)

    def apply(self, *proposals: Proposal) -> None:
        for proposal in proposals:
            self.time_us += self.chance.randrange(2_000_000)
            self.log.append((proposal, self.time_us))
        self.replay()

    def replay(self) -> None:
        machine = self.shelf.machine
        for index in range(machine.applied_index + 1, len(self.log) + 1):
            proposal, time_us = self.log[index - 1]
            entries = entry_batch.build(1, index, 1, [proposal], time_us)
            (result,) = machine.apply(entries)
            if index > self.model.index:
                self.model.apply(
                    proposal.kind, proposal.table, entry_batch.payload(entries, 0), time_us, result, machine
                )

    def operation(self) -> payload.Operation:
        chance, table = self.chance, self.chance.choice((1, 2))
        first = chance.randrange(KEYS)
        keys = [chance.choice((first + i, chance.randrange(KEYS))) for i in range(chance.randrange(1, 10))]
        draw = chance.random()
        if draw < 0.65:
            columns = (
                [pa.array([f"{chance.random()}" * chance.randrange(1, 20) for _ in keys])]
                if table == 1
                else [pa.array([chance.randrange(-9, 9) for _ in keys]), pa.nulls(len(keys), pa.timestamp("us"))]
            )
            batch = pa.record_batch([pa.array(keys), *columns], schema=PLAIN_SCHEMA if table == 1 else SUMS_SCHEMA)
            return payload.Operation(EntryKind.WRITE, table, payload.encode_rows(batch))
        if draw < 0.9:
            batch = pa.record_batch([pa.array(keys)], schema=KEY_SCHEMA)
            return payload.Operation(EntryKind.DELETE, table, payload.encode_rows(batch))
        return payload.Operation(EntryKind.DELETE_RANGE, table, payload.encode_range(*bounds(first, first + 9)))

    def entry(self) -> None:
        if self.chance.random() < 0.2:
            several = [self.operation() for _ in range(3)]
            self.apply(Proposal(EntryKind.TRANSACTION, 0, payload.encode_transaction(several)))
        else:
            one = self.operation()
            self.apply(Proposal(one.kind, one.table, one.payload))

    def snapshot(self) -> None:
        self.shelf.snapshot()

    def compact(self) -> None:
        self.shelf.compact(self.chance.randrange(1, 4))

    def restart(self) -> None:
        self.shelf = Shelf(self.files, retention=RETENTION)
        self.replay()

    def crash(self) -> None:
        """Power is lost in the middle of what comes next; perhaps again while the node starts."""
        self.files.lose_power_at = self.files.operations + self.chance.randrange(1, 25)

    def step(self, action: str) -> None:
        try:
            getattr(self, action)()
        except DiskCrash:
            while True:
                self.files.crash()
                if self.chance.random() < 0.3:
                    self.files.lose_power_at = self.files.operations + self.chance.randrange(1, 4)
                try:
                    self.restart()
                    break
                except DiskCrash:
                    continue

    def check(self) -> None:
        machine, model = self.shelf.machine, self.model
        index = machine.applied_index
        assert index == len(self.log) == model.index
        model.check(machine, "it")
        oldest = machine._past[0].applied_index
        model.check(machine, "it, back then,", self.chance.randint(oldest, index))
        for table in (1, 2):
            rows = [list(row) for row in model.rows(table, index)]
            self.check_reads(machine.read(table), rows)

    def check_reads(self, view: Any, rows: list[list[Any]]) -> None:
        low = self.chance.randrange(KEYS)
        names = view.info.schema.names[:2]
        inside = [row[:2] for row in rows if low <= row[0] <= low + 20]
        keys = KeyRange(*bounds(low, low + 21))
        assert plain(view.scan(names, None, keys=keys)) == inside
        assert plain(view.scan(names, None, keys=keys, reverse=True, limit=3)) == inside[::-1][:3]
        assert plain(view.scan(names, pc.field("k") > low, 7)) == [row[:2] for row in rows if row[0] > low]
        asked = self.chance.sample(range(KEYS), 12)
        found = view.get_many(pa.record_batch([pa.array(asked)], schema=KEY_SCHEMA)).select(names)
        there = {row[0]: row[:2] for row in rows}
        assert [list(row.values()) for row in found.to_pylist()] == [there.get(key, [None, None]) for key in asked]

    def check_files(self) -> None:
        """Behind a snapshot all rows are in files: pyarrow alone finds them there."""
        self.shelf.snapshot()
        machine = self.shelf.machine
        for table in (1, 2):
            newest: dict[int, tuple[int, bool, list[Any]]] = {}
            for file in machine._trees[table].below.levels:
                read = pa.ipc.open_file(
                    pa.py_buffer(self.files.read(self.shelf.store.files.path(file.name)))
                ).read_all()
                keys = read.column("k").to_pylist()
                assert keys == sorted(set(keys))
                assert len(keys) == file.rows
                values = zip(
                    *(as_numbers(read.column(name)) for name in machine.table(table).schema.names), strict=True
                )
                indexes, gone = read.column("_marble_index").to_pylist(), read.column("_marble_deleted").to_pylist()
                for key, index, deleted, row in zip(keys, indexes, gone, values, strict=True):
                    if key not in newest or newest[key][0] < index:
                        newest[key] = index, deleted, list(row)
            until = self.time_us - TTL_US
            living = [newest[key][2] for key in sorted(newest) if not newest[key][1]]
            living = [row for row in living if table == 1 or row[2] > until]
            assert living == [list(row) for row in self.model.rows(table, machine.applied_index)]


def bounds(first: int, end: int) -> list[bytes]:
    return KeyCodec(KEY_SCHEMA).encode(pa.record_batch([pa.array([first, end])], schema=KEY_SCHEMA)).to_pylist()


def as_numbers(column: pa.ChunkedArray) -> list[Any]:
    return (column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column).to_pylist()


def plain(reader: pa.RecordBatchReader) -> list[list[Any]]:
    return [list(row.values()) for row in reader.read_all().to_pylist()]


ACTIONS = ("entry",) * 10 + ("snapshot",) * 3 + ("compact",) * 3 + ("restart", "crash", "crash")


@pytest.mark.parametrize("offset", range(8))
def test_any_life(offset: int) -> None:
    print(f"repeat with MARBLE_TEST_SEED={FRESH_SEED}")
    life = Life(FRESH_SEED + offset)
    for count in range(120):
        life.step(life.chance.choice(ACTIONS))
        if count % 4 == 0:
            life.check()
    life.files.lose_power_at = None
    life.check()
    life.check_files()
