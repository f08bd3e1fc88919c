"""One table's rows: a memtable, frozen ones on their way to files, and the files.

Rule 1: `Tree.write`, `Tree.delete` and `Tree.freeze` on the applying thread only. What lies below the memtable is one
immutable value, `Below`, replaced as a whole under the machine's lock.
Rule 2: where a row is stored changes nothing that a reader can see: a flush puts a file in the place of frozen memtables,
a compaction files in the place of files.
Rule 3: a tombstone is kept for as long as something below may have its key.
Rule 4: a range that is deleted takes the files that lie in it whole along, without tombstones. Until the entry that did it is
published they stay in `Below`, for readers, and only the applying thread passes them over; nothing is made from them any more.
Rule 5: nor does the memtable get any if all of it lies in the range: it is begun anew. States that were published, and scans of them,
keep the old one. What its tombstones hid is read without it, and gets tombstones of its own.

A table without files (`TableFiles` is None) is its memtable, and nothing lies below.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from marble._core.lsm import Reader
from marble._core.memtable import Memtable, Snapshot
from marble.lsm.compaction import Plan
from marble.lsm.files import TableFile, Versions
from marble.lsm.keyrange import KeyRange
from marble.lsm.levels import Levels
from marble.lsm.view import TableView, expired_rows
from marble.schema import TableInfo
from marble.table_options import expired_until

RANGE_ROWS: Final = 65536
"""Rows that a range delete takes at a time."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """A memtable that takes no more writes, and about how much memory it holds."""

    snapshot: Snapshot
    nbytes: int


@dataclass(frozen=True, slots=True)
class Below:
    """What lies below the memtable, newest first."""

    frozen: tuple[Frozen, ...] = ()
    levels: Levels = field(default_factory=Levels)
    _files: list[Reader] = field(default_factory=list, compare=False, repr=False)
    """What reads ``levels`` alone, once somebody has asked: it is not made anew for every write."""

    def behind(self, active: Snapshot) -> Reader:
        """All of this behind a memtable, merged."""
        memtables = [active, *(frozen.snapshot for frozen in self.frozen)]
        if not self.levels:
            return Reader(memtables, [])
        if not self._files:
            # Two threads may make two, which are alike.
            self._files.append(files_reader(self.levels))
        return self._files[0].with_memtables(memtables)

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.frozen) or bool(self.levels)

    def flushed(self, frozen: tuple[Frozen, ...], files: Sequence[TableFile]) -> Below | None:
        """With `files` in the place of `frozen`; None if those are not its oldest ones, and nothing may change."""
        kept = len(self.frozen) - len(frozen)
        if kept < 0 or not frozen or any(a is not b for a, b in zip(self.frozen[kept:], frozen, strict=True)):
            return None
        return Below(self.frozen[:kept], self.levels.flushed(files))

    def reopened(self, level: int, file: TableFile) -> Below | None:
        """With `file` in the place of the one in `level` that has its name; None if there is none any more."""
        if not any(each.name == file.name for each in self.levels[level]):
            return None
        # Made anew, so that nobody goes on with the reader of the old file.
        return Below(self.frozen, self.levels.replaced({file.name}, level, [file]))

    def compacted(self, plan: Plan, files: Sequence[TableFile]) -> Below | None:
        """With `files` in the place of those of `plan`; None if these are not all here."""
        if not plan.names <= {file.name for file in self.levels}:
            return None
        return Below(self.frozen, self.levels.replaced(plan.names, plan.level or 0, files))

    def without(self, names: Collection[str]) -> Below:
        """Without the files of these names, and with what was in them."""
        return Below(self.frozen, self.levels.without(names))


class TableData:
    """What a table with files held at one moment.

    Attributes
    ----------
    active
        The memtable's content.
    below
        What lay below it.
    """

    __slots__ = ("_reader", "active", "below")

    def __init__(self, active: Snapshot, below: Below) -> None:
        self.active = active
        self.below = below
        self._reader: Reader | None = None

    @property
    def reader(self) -> Reader:
        """All of it merged. Made when first asked for; two threads may make two, which are alike."""
        if self._reader is None:
            self._reader = self.below.behind(self.active)
        return self._reader


def files_reader(levels: Levels) -> Reader:
    """All files merged, of which there is at least one; each of level 0 is a run of its own."""
    runs = [[file.opened] for file in levels[0]]
    runs += [[file.opened for file in files] for files in levels.levels[1:] if files]
    return Reader([], runs)


def memtable_versions(memtables: Sequence[Snapshot], drop_tombstones: bool) -> Iterator[Versions]:
    """What these memtables, newest first, hold together, by key."""
    return Reader(list(memtables), []).scan_versions(drop_tombstones=drop_tombstones)


class Tree:
    """The rows of one table, as the applying thread has them.

    Parameters
    ----------
    info
        The table.
    stored
        Whether it has files.
    levels
        Those that it has.

    Attributes
    ----------
    below
        What lies below the memtable; assigned under the machine's lock, by `edit`, `freeze` and `settle`.
    memory_bytes
        About how much the memtable holds.
    """

    def __init__(self, info: TableInfo, stored: bool, levels: Levels | None = None) -> None:
        self.info = info
        self.below = Below(levels=levels or Levels())
        self.memory_bytes = 0
        self._stored = stored
        self._memtable = self._new_memtable()
        self._lock = threading.Lock()
        """Held while ``below`` or ``_emptied`` is assigned."""
        self._emptied: frozenset[str] = frozenset()
        """Files whose rows an entry has deleted that is not published yet: see rule 4."""
        self._rest: tuple[Below, Below] | None = None
        """``below`` as it was, and what of it is not emptied."""

    def _new_memtable(self) -> Memtable:
        info = self.info
        return (
            Memtable(info.schema, info.key, keep_tombstones=True) if self._stored else Memtable(info.schema, info.key)
        )

    def data(self) -> Snapshot | TableData:
        """The rows as of now."""
        snapshot = self._memtable.snapshot()
        return TableData(snapshot, self._below_now()) if self._stored else snapshot

    def _below_now(self) -> Below:
        """``below`` without the files that are emptied."""
        below = self.below
        if not self._emptied:
            return below
        if self._rest is None or self._rest[0] is not below:
            self._rest = below, below.without(self._emptied)
        return self._rest[1]

    def view(self, index: int, time_us: int | None) -> TableView:
        """The rows as of now, called the state after entry `index`, that live at `time_us`; None: all."""
        data = self.data()
        until = None if time_us is None else expired_until(self.info.schema, self.info.options, time_us)
        return TableView(index, self.info, data.reader if isinstance(data, TableData) else data, until)

    def write(self, rows: pa.RecordBatch, index: int) -> int:
        """Insert or replace `rows`. Returns how many they are."""
        if self._stored:
            self.memory_bytes += rows.get_total_buffer_size()
        return self._memtable.upsert(rows, index)

    def delete(self, keys: pa.RecordBatch, index: int, time_us: int) -> int:
        """Delete by `keys`. Returns how many rows were there, at `time_us`, and are no longer."""
        if not self._stored and self.info.options.ttl_column is None:
            return self._memtable.delete(keys, index)
        found = self._found(keys, expired_until(self.info.schema, self.info.options, time_us))
        gone = found.true_count
        if gone > 1:
            # A key that stands twice counts once.
            distinct = Memtable(self.info.key_schema, self.info.key)
            distinct.upsert(keys.filter(found), index)
            gone = distinct.snapshot().row_count
        self.memory_bytes += keys.get_total_buffer_size()
        self._memtable.delete(keys, index)
        return int(gone)

    def touch(self, keys: pa.RecordBatch) -> None:
        """Read what `delete` would, and change nothing: raises CorruptionError for a damaged file before anything was done."""
        if self.below.levels:
            self._found(keys, None)

    def _found(self, keys: pa.RecordBatch, until: int | None) -> pa.BooleanArray:
        """Which of `keys` have a row whose time to live is not over."""
        data = self.data()
        reader = data.reader if isinstance(data, TableData) else Reader([data], [])
        if until is None:
            return reader.get_many(keys, ())[1]
        rows, found = reader.get_many(keys, [self.info.options.ttl_column or ""])
        return pc.and_not(found, expired_rows(rows, self.info, until))

    def delete_range(self, keys: KeyRange, index: int, time_us: int) -> int:
        """Delete all rows whose keys lie in `keys`. Returns how many were there, at `time_us`, and are no longer.

        Raises CorruptionError before anything was done: a file that would have to be read is damaged.
        """
        while True:
            below = self._below_now()
            inside = [file for file in below.levels if file.first_key in keys and file.last_key in keys]
            gone, parts = self._count(below, inside, keys, time_us)
            memtable = self._new_memtable() if self._holds_only(keys) else self._memtable
            if inside or memtable is not self._memtable:
                kept = below.without({file.name for file in inside}) if inside else below
                active = memtable.snapshot()
                parts = list(self._keys_in(kept, keys, active)) if self._meets(kept, keys, active) else []
            if not inside or self._empty(inside):
                break
        if memtable is not self._memtable:
            self._memtable, self.memory_bytes = memtable, 0
        for part in parts:
            self.bury(part, index)
        return gone

    def _holds_only(self, keys: KeyRange) -> bool:
        """Whether all that the memtable has lies in `keys`, tombstones too."""
        memory = Reader([self._memtable.snapshot()], [])
        outside = [KeyRange(b"", keys.lower), *([] if keys.upper is None else [KeyRange(keys.upper)])]
        return all(next(memory.scan_versions(1, each.lower, each.upper), None) is None for each in outside)

    def _count(
        self, below: Below, inside: Sequence[TableFile], keys: KeyRange, time_us: int
    ) -> tuple[int, list[pa.RecordBatch]]:
        """How many rows with `keys` live at `time_us`; and the keys of those that had to be read to tell.

        A file of `inside` whose keys nothing else has tells it of itself.
        """
        until, active = expired_until(self.info.schema, self.info.options, time_us), self._memtable.snapshot()
        alone = {file.name: living for file in inside if (living := self._told(below, file, until)) is not None}
        gone, parts = sum(alone.values()), []
        left = below.without(alone)
        if self._meets(left, keys, active):
            columns = [*self.info.key, *([] if until is None else [self.info.options.ttl_column or ""])]
            for batch in self._keys_in(left, keys, active, columns):
                expired = 0 if until is None else expired_rows(batch, self.info, until).true_count
                gone += batch.num_rows - expired
                parts.append(batch.select(list(self.info.key)))
        return gone, parts

    def _told(self, below: Below, file: TableFile, until: int | None) -> int | None:
        """How many rows of `file` live, if it alone has keys where it lies, and all of them live or none; else None."""
        levels, ends = below.levels, (file.first_key, file.last_key)
        met = sum(len(levels.overlapping(level, *ends)) for level in range(len(levels.levels)))
        if met > 1 or self._in_memory(
            below, KeyRange(file.first_key, file.last_key + b"\0"), self._memtable.snapshot()
        ):
            return None
        if until is None:
            return file.rows - file.tombstones
        if file.ttl_min is None or file.ttl_max is None or file.ttl_min <= until < file.ttl_max:
            return None
        return 0 if file.ttl_max <= until else file.rows - file.tombstones

    def _meets(self, below: Below, keys: KeyRange, active: Snapshot) -> bool:
        """Whether `active`, a memtable, or `below` has anything in `keys`, be it a tombstone. Of files only the ends are looked at."""
        if any(
            file.first_key < (keys.upper or file.last_key + b"\0") and file.last_key >= keys.lower
            for file in below.levels
        ):
            return True
        return self._in_memory(below, keys, active)

    def _in_memory(self, below: Below, keys: KeyRange, active: Snapshot) -> bool:
        """Whether a memtable has anything in `keys`, be it a tombstone."""
        memory = [active, *(frozen.snapshot for frozen in below.frozen)]
        return next(Reader(memory, []).scan_versions(1, keys.lower, keys.upper), None) is not None

    def _keys_in(
        self, below: Below, keys: KeyRange, active: Snapshot, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        return below.behind(active).scan(RANGE_ROWS, list(columns or self.info.key), keys.lower, keys.upper)

    def _empty(self, files: Sequence[TableFile]) -> bool:
        """Pass `files` over from now on; False if one of them is not here any more, and nothing changed."""
        names = {file.name for file in files}
        with self._lock:
            if not names <= {file.name for file in self.below.levels}:
                return False
            self._emptied |= names
            self._rest = None
        return True

    def edit(self, change: Callable[[Below], Below | None]) -> Below | None:
        """Replace ``below``, and return it. None if there is nothing to be replaced any more, or from files that are emptied."""
        with self._lock:
            below = change(self.below)
            if below is None or not self._emptied <= {file.name for file in below.levels}:
                return None
            self.below = below
        return below

    def settle(self) -> bool:
        """Let go of files that are emptied. False if there are none. Under the machine's lock, with what readers see."""
        with self._lock:
            if not self._emptied:
                return False
            self.below = self._below_now()
            self._emptied, self._rest = frozenset(), None
        return True

    def bury(self, keys: pa.RecordBatch, index: int) -> None:
        """Delete by `keys`, of which none is in the memtable, without looking whether there are such rows."""
        self.memory_bytes += keys.get_total_buffer_size()
        self._memtable.delete(keys, index)

    def freeze(self) -> None:
        """Begin another memtable, if there is anything in this one. Under the machine's lock."""
        if self.memory_bytes:
            frozen = Frozen(self._memtable.snapshot(), self.memory_bytes)
            with self._lock:
                self.below = replace(self.below, frozen=(frozen, *self.below.frozen))
            self._memtable, self.memory_bytes = self._new_memtable(), 0
