"""Replicas of one log that flush, compact, restart and take each other's files at times of their own, held to one model.

Rule 1: what a replica shows at an index, and answers for an entry, is a function of the log: not of when rows left its memory, of what
its merges took away since their time was over, of another replica's files that it took over, or of a copy of its disk that it goes on from.
Rule 2: a past index within retention, and a scan that is open, show what was there, whatever has been merged since.
Rule 3: no older version of a key comes back when a newer one is over or deleted and its bytes go. So times are drawn anyhow: the newer
version is as often over first as not.
Rule 4: when nothing is left to be done, what is over has left the disk, also of tables that rest.

``MARBLE_TEST_LIVES`` plays more lives than the few that every run plays, ``MARBLE_TEST_SEED`` the same ones again.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from typing import Any, Final

import pyarrow as pa
import pytest
from lsm.shelf import TINY, Shelf
from lsm.test_any_life import bounds

from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.env import SystemRandom
from marble.lsm import payload
from marble.lsm.compaction import CompactionPolicy
from marble.lsm.machine import TableMachine
from marble.lsm.store import StorePolicy
from marble.machine import Result
from marble.table_options import TableOptions
from marble.testing.bulk import KEY_SCHEMA, SUMS_SCHEMA
from marble.testing.disk import SimulatedFiles
from marble.testing.model import Model
from marble.types import EntryKind

FRESH_SEED = int(os.environ.get("MARBLE_TEST_SEED", "0")) or int.from_bytes(os.urandom(4), "big")
LIVES = int(os.environ.get("MARBLE_TEST_LIVES", "4"))
STEPS: Final = 220
KEYS: Final = 40
RETENTION: Final = 8
TTL_US: Final = 20_000_000
BLOCK_ROWS_MAX: Final = 4

EAGER: Final = TINY
DEEP: Final = StorePolicy(
    replace(TINY.compaction, level0_files=2, level1_bytes=1500, ratio=2, file_bytes_max=1500, compressed_level=1),
    inline_table_bytes_max=-1,
)
IDLE: Final = StorePolicy(CompactionPolicy(level0_files=99, level0_files_max=99, level0_overlap_files=99), -1)
"""Files are never merged with others: they go, or are written anew, by their time alone."""
LAZY: Final = StorePolicy(inline_table_bytes_max=400, inline_bytes_max=10_000)
"""What is small stays in memory, and in snapshots."""
POLICIES: Final = (EAGER, DEEP, IDLE, LAZY)

TIMED: Final = pa.schema(
    [pa.field("k", pa.int64(), nullable=False), pa.field("at", pa.timestamp("us")), pa.field("text", pa.string())]
)
CREATES: Final = [
    Proposal(EntryKind.CREATE_TABLE, 0, payload.encode_create_table(name, schema, ["k"], options))
    for name, schema, options in (
        ("timed", TIMED, TableOptions("lz4", "at", TTL_US)),
        ("sums", SUMS_SCHEMA, TableOptions(None, "at", TTL_US, True, (("total", "sum"),))),
    )
]
TABLES: Final = (1, 2)


class Log:
    """What is written, by chance, and what must come of it."""

    def __init__(self, chance: random.Random, timeless: bool) -> None:
        self.chance, self._timeless = chance, timeless
        self.now_us = 1_700_000_000_000_000
        self.entries: list[tuple[Proposal, int]] = []
        self.results: list[Result] = []
        self.model = Model()
        self._machine = TableMachine()
        for proposal in CREATES:
            self.add(proposal)

    def add(self, proposal: Proposal, later_us: int = 0) -> None:
        # Another leader's clock may be behind; the tables' time never goes back.
        self.now_us += later_us or self.chance.randrange(-500_000, 2_000_000)
        self.entries.append((proposal, self.now_us))
        index = len(self.entries)
        built = entry_batch.build(1, index, 1, [proposal], self.now_us)
        (result,) = self._machine.apply(built)
        self.results.append(result)
        data = entry_batch.payload(built, 0)
        self.model.apply(proposal.kind, proposal.table, data, self.now_us, result, self._machine)

    def draw(self) -> None:
        if self.chance.random() < 0.15:
            several = [self._operation() for _ in range(3)]
            self.add(Proposal(EntryKind.TRANSACTION, 0, payload.encode_transaction(several)))
        else:
            one = self._operation()
            self.add(Proposal(one.kind, one.table, one.payload))

    def _operation(self) -> payload.Operation:
        chance, table = self.chance, self.chance.choice((1, 1, 2))
        first, draw = chance.randrange(KEYS), chance.random()
        keys = [chance.choice((first + i, chance.randrange(KEYS))) for i in range(chance.randrange(1, 9))]
        if draw < 0.75:
            times = [self.now_us + chance.randrange(-TTL_US, 2 * TTL_US) for _ in keys]
            given = [None if self._timeless and chance.random() < 0.05 else time for time in times]
            at = pa.array(given, pa.timestamp("us"))
            texts = pa.array([f"{chance.random()}" * chance.randrange(1, 9) for _ in keys])
            columns = [at, texts] if table == 1 else [pa.array([chance.randrange(9) for _ in keys]), at]
            batch = pa.record_batch([pa.array(keys), *columns], schema=TIMED if table == 1 else SUMS_SCHEMA)
            return payload.Operation(EntryKind.WRITE, table, payload.encode_rows(batch))
        if draw < 0.92:
            batch = pa.record_batch([pa.array(keys)], schema=KEY_SCHEMA)
            return payload.Operation(EntryKind.DELETE, table, payload.encode_rows(batch))
        # All of it, too, so that whole memtables and files go.
        ends = (first, first + chance.randrange(2, 16)) if chance.random() < 0.7 else (0, KEYS + 9)
        data = payload.encode_range(*bounds(*ends))
        return payload.Operation(EntryKind.DELETE_RANGE, table, data)


class Replica:
    """One machine with its disk, its policy, and scans that somebody has begun and not ended."""

    def __init__(self, number: int, log: Log, files: SimulatedFiles | None = None) -> None:
        self.name = f"replica {number}"
        self._log, self._policy = log, POLICIES[number % len(POLICIES)]
        self._begun: list[tuple[int, int, list[tuple[Any, ...]], pa.RecordBatchReader]] = []
        self._open(files or SimulatedFiles(SystemRandom(number)))

    def _open(self, files: SimulatedFiles) -> None:
        self.shelf = Shelf(files, self._policy, block_rows_max=BLOCK_ROWS_MAX, retention=RETENTION)

    def apply(self, most: int) -> None:
        """The next `most` entries; each answers what it answered elsewhere."""
        machine, log = self.shelf.machine, self._log
        for _ in range(most):
            index = machine.applied_index + 1
            if index > len(log.entries):
                return
            proposal, time_us = log.entries[index - 1]
            assert machine.apply(entry_batch.build(1, index, 1, [proposal], time_us)) == [log.results[index - 1]]

    def restart(self) -> None:
        self._open(self.shelf.files)

    def take_over(self, other: Replica) -> bool:
        """Install the newest snapshot of another replica, with those files of it that are not here."""
        mine, theirs = self.shelf, other.shelf
        info = theirs.snapshots.newest()
        if info is None or info.index <= mine.machine.applied_index:
            return False
        mine.store.files.prepare()
        for name in theirs.snapshots.kept():
            path = theirs.store.files.path(name)
            if not mine.files.exists(path):
                mine.files.put(path, theirs.files.read(path))
        mine.machine.restore(info.index, theirs.snapshots.read(info))
        return True

    def begin(self) -> None:
        """Begin a scan of some past, and read its first rows."""
        machine, chance = self.shelf.machine, self._log.chance
        index, table = chance.randint(self.oldest, machine.applied_index), chance.choice(TABLES)
        scan = machine.read(table, index).scan(batch_rows_max=3)
        first = next(scan, None)
        self._begun.append((index, table, plain(first) if first is not None else [], scan))

    def end(self) -> None:
        """Read on to their ends what was begun."""
        for index, table, rows, scan in self._begun:
            rows = [*rows, *(row for batch in scan for row in plain(batch))]
            assert rows == self._log.model.rows(table, index), f"{self.name}, a scan of table {table} at {index}"
        self._begun.clear()

    @property
    def oldest(self) -> int:
        """The oldest state in which there are tables."""
        return max(len(CREATES), self.shelf.machine._past[0].applied_index)

    def check(self) -> None:
        machine, model = self.shelf.machine, self._log.model
        if machine.applied_index < len(CREATES):
            return
        model.check(machine, self.name)
        for index in {self.oldest, self._log.chance.randint(self.oldest, machine.applied_index)}:
            model.check(machine, f"{self.name}, back then,", index)


def plain(batch: pa.RecordBatch) -> list[tuple[Any, ...]]:
    columns = (c.cast(pa.int64()) if pa.types.is_timestamp(c.type) else c for c in batch.columns)
    return list(zip(*(column.to_pylist() for column in columns), strict=True))


class World:
    """Replicas, and the log that they have in common."""

    def __init__(self, seed: int, timeless: bool) -> None:
        self.chance = random.Random(seed)
        self.log = Log(self.chance, timeless)
        self.replicas = [Replica(number, self.log) for number in range(len(POLICIES))]
        self.taken = 0

    def step(self) -> None:
        chance = self.chance
        number = chance.randrange(len(self.replicas))
        replica, draw = self.replicas[number], chance.random()
        if draw < 0.35:
            self.log.draw()
        elif draw < 0.6:
            replica.apply(chance.randrange(1, 12))
        elif draw < 0.72:
            replica.shelf.snapshot()
        elif draw < 0.86:
            replica.shelf.compact(chance.randrange(1, 4))
        elif draw < 0.89:
            replica.end()
            replica.restart()
        elif draw < 0.93:
            self.taken += replica.take_over(chance.choice(self.replicas))
        elif draw < 0.95:
            other = chance.choice(self.replicas)
            replica.end()
            # As a backup that is made a node of again: its disk, as it is, under another policy.
            self.replicas[number] = Replica(number, self.log, other.shelf.files.copy())
        elif replica.shelf.machine.applied_index >= len(CREATES):
            replica.begin()
        if chance.random() < 0.1:
            self.replicas[number].end()

    def rest(self, later_us: int) -> None:
        """Time goes on by an entry of no consequence, and all replicas do what there is to do."""
        self.log.add(Proposal(EntryKind.NOOP, 0, None), later_us)
        for replica in self.replicas:
            replica.apply(len(self.log.entries))
            replica.shelf.snapshot()
            assert replica.shelf.compact(500) < 500, "it comes to an end"
            replica.shelf.snapshot()
            replica.end()
            replica.check()


@pytest.mark.parametrize("offset", range(LIVES))
def test_any_replicas(offset: int) -> None:
    print(f"repeat with MARBLE_TEST_SEED={FRESH_SEED} MARBLE_TEST_LIVES={LIVES}")
    world = World(FRESH_SEED + offset, timeless=offset % 2 == 1)
    for count in range(STEPS):
        world.step()
        if count % 5 == 0:
            for replica in world.replicas:
                replica.check()
    for later_us in (1, TTL_US // 2, TTL_US):
        world.rest(later_us)
    world.rest(4 * TTL_US)
    if offset % 2 == 0:
        # All rows have a time, and it is over: Rule 4.
        for replica in world.replicas:
            levels = [replica.shelf.machine._trees[table].below.levels for table in TABLES]
            assert [list(each) for each in levels] == [[], []], replica.name
