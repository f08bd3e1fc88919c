"""The slow, obvious twin of marble._core.lsm, a dict of versions, and trees of memtables and files to hold it against."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
from reference import key_codec
from reference.memtable import Memtable as Rows

from marble._core.lsm import Reader
from marble._core.memtable import Memtable, Snapshot
from marble._core.sstable import BlockCache, SSTable, SSTableWriter

Row = dict[str, object]


def write_file(
    versions: Sequence[tuple[pa.RecordBatch, pa.UInt64Array, pa.BooleanArray]],
    schema: pa.Schema,
    key: Sequence[str],
    cache: BlockCache,
    **options: object,
) -> SSTable:
    """One file of what a scan of versions gave."""
    writer = SSTableWriter(schema, key, **options)
    parts = [bytes(part) for version in versions for part in writer.add(*version)]
    last, info = writer.finish()
    return SSTable.open(pa.py_buffer(b"".join([*parts, bytes(last)])), schema, key, cache, info.name)


@dataclass
class Tree:
    """A table that is flushed and compacted by hand. ``versions`` has the newest version of each key ever written."""

    schema: pa.Schema
    key: list[str]
    chance: random.Random
    cache: BlockCache = field(default_factory=lambda: BlockCache(1 << 20))
    block_rows_max: int = 7
    index: int = 0

    def __post_init__(self) -> None:
        self.active = Memtable(self.schema, self.key, keep_tombstones=True)
        self.frozen: list[Snapshot] = []
        self.levels: list[list[SSTable]] = []
        self.rows = Rows(self.schema, self.key)
        self.versions: dict[bytes, tuple[int, bool]] = {}

    def write(self, batch: pa.RecordBatch, *, delete: bool) -> None:
        self.index += self.chance.choice([0, 1, 1, 5]) if self.index else 1
        if delete:
            batch = batch.select(self.key)
            self.active.delete(batch, self.index)
            self.rows.delete(batch, self.index)
        else:
            self.active.upsert(batch, self.index)
            self.rows.upsert(batch, self.index)
        for key in key_codec.encode(batch.select(self.key)):
            self.versions[key] = (self.index, delete)

    def freeze(self) -> None:
        self.frozen.insert(0, self.active.snapshot())
        self.active = Memtable(self.schema, self.key, keep_tombstones=True)

    def flush(self) -> None:
        """The oldest frozen memtable becomes a file, which is a level."""
        if self.frozen:
            self.compact_into(Reader([self.frozen.pop()], []), 0)

    def compact(self) -> None:
        """Two or more neighbouring levels become one."""
        if len(self.levels) < 2:
            return
        first = self.chance.randrange(len(self.levels) - 1)
        end = self.chance.randrange(first + 2, len(self.levels) + 1)
        merged = self.levels[first:end]
        del self.levels[first:end]
        self.compact_into(Reader([], merged), first)

    def compact_into(self, reader: Reader, level: int) -> None:
        bottom = level == len(self.levels)
        scan = reader.scan_versions(
            self.chance.choice([1, 10, 65536]), drop_tombstones=bottom and self.chance.random() < 0.8
        )
        files: list[SSTable] = []
        versions = []
        for version in scan:
            for column in version:
                column.validate(full=True)
            versions.append(version)
            if self.chance.random() < 0.2:
                files.append(self.write_file(versions))
                versions = []
        if versions:
            files.append(self.write_file(versions))
        if files:
            self.levels.insert(level, files)

    def write_file(self, versions: list[tuple[pa.RecordBatch, pa.UInt64Array, pa.BooleanArray]]) -> SSTable:
        compression = self.chance.choice([None, None, "lz4", "zstd"])
        return write_file(
            versions, self.schema, self.key, self.cache, block_rows_max=self.block_rows_max, compression=compression
        )

    def reader(self) -> Reader:
        return Reader([self.active.snapshot(), *self.frozen], self.levels)

    def step(self, make_row: Callable[[random.Random], Row]) -> None:
        """A write, mostly, or anything else that happens to a table."""
        chance = self.chance.random()
        if chance < 0.12:
            self.freeze()
        elif chance < 0.22:
            self.flush()
        elif chance < 0.28:
            self.compact()
        else:
            rows = [make_row(self.chance) for _ in range(self.chance.choice([0, 1, 1, 3, 40]))]
            self.write(pa.RecordBatch.from_pylist(rows, self.schema), delete=self.chance.random() < 0.3)
