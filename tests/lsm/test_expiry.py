"""Files whose rows have all expired go when their time comes, whatever else happens or does not."""

from __future__ import annotations

from random import Random

import pyarrow as pa
import pyarrow.compute as pc

from marble._core.entry_batch import Proposal, build
from marble._core.sstable import BlockCache
from marble.lsm import payload
from marble.lsm.compaction import CompactionPolicy
from marble.lsm.files import TableFile, TableFiles
from marble.lsm.machine import TableMachine
from marble.lsm.store import StorePolicy
from marble.table_options import TableOptions
from marble.testing.disk import SimulatedFiles
from marble.types import EntryKind

SCHEMA = pa.schema([pa.field("k", pa.int64()), pa.field("at", pa.timestamp("us"))])
LIFE_US = 1_000


class Bench:
    """A machine, and the entries that it is given."""

    def __init__(self, files: TableFiles | None = None, compaction: CompactionPolicy = CompactionPolicy()) -> None:  # noqa: B008 - it is a value
        self.files = SimulatedFiles(Random(1))
        self.machine = TableMachine(files=files or TableFiles(self.files), policy=StorePolicy(compaction, 0, 0))
        self.create("short", TableOptions(ttl_column="at", ttl_us=LIFE_US))
        self.create("other", TableOptions())

    def apply(self, kind: EntryKind, table: int, data: pa.Buffer, time_us: int) -> None:
        index = self.machine.applied_index + 1
        (result,) = self.machine.apply(build(0, index, 1, [Proposal(kind, table, data)], time_us))
        result.raise_for_error()

    def create(self, name: str, options: TableOptions) -> None:
        self.apply(EntryKind.CREATE_TABLE, 0, payload.encode_create_table(name, SCHEMA, ["k"], options), 1)

    def write(self, table: str, keys: range, at: int, time_us: int) -> None:
        batch = pa.record_batch({"k": list(keys), "at": pa.array([at] * len(keys), pa.timestamp("us"))}, SCHEMA)
        self.apply(EntryKind.WRITE, self.machine.table(table).id, payload.encode_rows(batch), time_us)

    def write_each(self, table: str, rows: list[tuple[int, int | None]], time_us: int) -> None:
        keys, times = zip(*rows, strict=True)
        batch = pa.record_batch({"k": list(keys), "at": pa.array(times, pa.timestamp("us"))}, SCHEMA)
        self.apply(EntryKind.WRITE, self.machine.table(table).id, payload.encode_rows(batch), time_us)

    def flush(self) -> None:
        for _ in self.machine.capture().batches():
            continue
        while self.machine.compact():
            continue

    def table_files(self, table: str) -> list[TableFile]:
        return list(self.machine._trees[self.machine.table(table).id].below.levels)

    def file_count(self, table: str) -> int:
        return len(self.table_files(table))


def scanned(bench: Bench, cache: BlockCache) -> tuple[int, int]:
    """How many rows there are, and how many blocks were read to tell."""
    before = cache.misses
    rows = sum(batch.num_rows for batch in bench.machine.read("short").scan(["k"]))
    return rows, cache.misses - before


def test_blocks_of_which_no_row_lives_are_not_read_unless_they_hide_one_that_does() -> None:
    cache = BlockCache(0)
    bench = Bench(TableFiles(SimulatedFiles(Random(1)), cache=cache, block_rows_max=10))
    # Ten blocks: of keys below 50 the rows are over at 7000, the others live.
    bench.write_each("short", [(key, 5_000 if key < 50 else 9_000) for key in range(100)], time_us=5_000)
    bench.flush()
    assert scanned(bench, cache) == (100, 10)
    bench.write("other", range(1), at=0, time_us=7_000)
    assert scanned(bench, cache) == (50, 5)
    assert bench.machine.read("short").row_count == 50
    # A row without a time stays, and its block is read.
    bench.write_each("short", [(7, None)], time_us=7_000)
    bench.flush()
    assert scanned(bench, cache)[0] == 51
    assert bench.machine.read("short").scan(["k"], limit=1).read_all()["k"].to_pylist() == [7]
    # Rows whose time was over when they were written hide those below, which live: they are read.
    bench.write_each("short", [(key, 1) for key in range(60, 70)], time_us=7_000)
    for _ in bench.machine.capture().batches():
        continue
    assert [len(files) for files in bench.machine._trees[1].below.levels.levels][:1] == [1]
    assert scanned(bench, cache)[0] == 41
    assert bench.machine.read("short").scan(["k"], pc.field("k") == 65).read_all().num_rows == 0


def test_files_go_when_their_time_comes_although_their_table_rests() -> None:
    bench = Bench()
    bench.write("short", range(10), at=5_000, time_us=5_000)
    bench.flush()
    bench.write("short", range(20, 30), at=5_500, time_us=5_500)
    bench.flush()
    assert bench.file_count("short") == 2
    assert not bench.machine.compaction_due
    # Only another table is written; its entries carry the time on.
    bench.write("other", range(1), at=0, time_us=5_000 + LIFE_US - 1)
    assert not bench.machine.compaction_due
    bench.write("other", range(1), at=0, time_us=5_000 + LIFE_US)
    assert bench.machine.compaction_due
    while bench.machine.compact():
        continue
    assert bench.file_count("short") == 1
    assert not bench.machine.compaction_due
    bench.write("other", range(1), at=0, time_us=99_000)
    while bench.machine.compact():
        continue
    assert bench.file_count("short") == 0
    assert not bench.machine.compaction_due


def test_half_of_a_file_goes_when_its_time_comes_although_its_table_rests() -> None:
    bench = Bench()
    bench.write_each("short", [(key, 5_000 + key) for key in range(1000)], time_us=5_000)
    bench.flush()
    (whole,) = bench.table_files("short")
    assert whole.rows == 1000
    bench.write("other", range(1), at=0, time_us=5_498 + LIFE_US)
    assert not bench.machine.compaction_due
    bench.write("other", range(1), at=0, time_us=5_499 + LIFE_US)
    assert bench.machine.compaction_due
    bench.flush()
    (half,) = bench.table_files("short")
    assert (half.rows, half.tombstones, half.ttl_min) == (500, 0, 5_500)
    assert half.nbytes < 0.6 * whole.nbytes
    # No snapshot that is kept names the old one: it is gone from the disk.
    bench.machine.collect(lambda: {half.name})
    assert [name for name in bench.files.list("tables") if whole.name in name] == []
    assert not bench.machine.compaction_due
    bench.write("other", range(1), at=0, time_us=5_749 + LIFE_US)
    bench.flush()
    assert [file.rows for file in bench.table_files("short")] == [250]


def test_rows_that_are_over_lose_their_values_where_their_keys_must_stay() -> None:
    bench = Bench(compaction=CompactionPolicy(level0_files=99, level0_overlap_files=99))
    # What lies under them lives much longer.
    bench.write("short", range(100), at=50_000, time_us=5_000)
    bench.flush()
    bench.write_each("short", [(key, 5_000 + key) for key in range(100)], time_us=5_001)
    bench.flush()
    bench.write("other", range(1), at=0, time_us=5_049 + LIFE_US)
    bench.flush()
    assert bench.machine.read("short").row_count == 50
    newer, older = bench.table_files("short")
    assert (newer.rows, newer.tombstones, older.rows, older.tombstones) == (100, 50, 100, 0)
    assert not bench.machine.compaction_due


def test_a_file_that_has_expired_and_must_stay_is_planned_for_once() -> None:
    bench = Bench()
    bench.write("short", range(10), at=50_000, time_us=5_000)
    bench.flush()
    # Newer versions of these rows, which expire long before the older ones: those would come back.
    bench.write("short", range(10), at=5_000, time_us=5_001)
    bench.flush()
    bench.write("other", range(1), at=0, time_us=10_000)
    while bench.machine.compact():
        continue
    assert not bench.machine.compaction_due
    assert bench.machine.read("short").row_count == 0
