"""How the tables of a machine get into files, and the files fewer: flush, compaction, removal.

Rule 1: entries are applied while all of this goes on. What a flush or a compaction has made takes its place by one
assignment under the machine's lock (`Edit`), and only if what it was made from is still there.
Rule 2: a file goes only when neither the state nor one that somebody holds, nor a snapshot refers to it.
Rule 3: a file that turned out to be damaged is left alone: nothing is made from it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from marble.errors import CorruptionError
from marble.lsm.compaction import CompactionPolicy, Plan, backlog_bytes, merged, next_change, plan_compaction
from marble.lsm.files import TableFile, TableFiles
from marble.lsm.levels import Levels
from marble.lsm.snapshot import TableState
from marble.lsm.tree import Below, TableData, Tree, memtable_versions
from marble.machine import Pace
from marble.schema import TableInfo
from marble.table_options import expired_until

INLINE_TABLE_BYTES_MAX: Final = 64 * 1024
"""A table with less in memory is not worth a file: its rows go into the snapshot, and stay in memory."""

INLINE_BYTES_MAX: Final = 4 * 1024 * 1024
"""Of all tables together: snapshots stay small."""

Edit = Callable[[Tree, Callable[[Below], Below | None]], bool]
"""Replaces what lies below a table's memtable, and publishes it; False if there is nothing to be replaced any more."""


@dataclass(frozen=True, slots=True)
class StorePolicy:
    """How a machine keeps its tables. Local to a replica."""

    compaction: CompactionPolicy = CompactionPolicy()  # noqa: RUF009 - it is a value
    inline_table_bytes_max: int = INLINE_TABLE_BYTES_MAX
    inline_bytes_max: int = INLINE_BYTES_MAX


class Store:
    """The files of a machine's tables, and what is done with them.

    Thread safety: `freeze` on the applying thread; `flush` and `collect` on the thread for files of snapshots;
    `plan` and what it returns on one.

    Parameters
    ----------
    files
        Where they are.
    policy
        See there.
    edit
        See there; the machine's.
    """

    def __init__(self, files: TableFiles, policy: StorePolicy, edit: Edit) -> None:
        self.files = files
        self.policy = policy
        self.damaged: dict[str, CorruptionError] = {}
        """What is wrong with files that could not be read, by name. See `marble.lsm.damage`."""
        self.edit = edit
        self._lock = threading.Lock()
        self._states: weakref.WeakSet[TableState] = weakref.WeakSet()

    def freeze(self, trees: Iterable[Tree]) -> list[Tree]:
        """Begin new memtables where the old ones are to become files. Under the machine's lock. Returns these tables."""
        trees, policy = list(trees), self.policy
        small = [tree for tree in trees if not tree.below.frozen and tree.memory_bytes <= policy.inline_table_bytes_max]
        if sum(tree.memory_bytes for tree in small) > policy.inline_bytes_max:
            small = []
        kept = {id(tree) for tree in small}
        frozen = [tree for tree in trees if id(tree) not in kept]
        for tree in frozen:
            tree.freeze()
        return frozen

    def holding(self, state: TableState) -> TableState:
        """Keep the files of `state` for as long as somebody holds it. Returns it."""
        with self._lock:
            self._states.add(state)
        return state

    def flush(self, tables: Mapping[int, TableData], trees: Mapping[int, Tree], pace: Pace | None) -> dict[int, Levels]:
        """Write the frozen memtables of `tables` to files of level 0.

        Returns
        -------
        dict
            All files of each of these tables.

        Raises
        ------
        OSError
            The disk failed or is full. What was frozen stays so, and goes with the next flush.
        """
        written: dict[int, list[TableFile]] = {}
        try:
            for id_, data in tables.items():
                below = data.below
                versions = memtable_versions([each.snapshot for each in below.frozen], not below.levels)
                written[id_] = self.files.write(trees[id_].info, versions, pace=pace)
            if any(written.values()):
                self.files.sync_directory()
            for id_, files in written.items():
                self.edit(trees[id_], partial(Below.flushed, frozen=tables[id_].below.frozen, files=files))
            return {id_: tables[id_].below.levels.flushed(files) for id_, files in written.items()}
        finally:
            self.files.release(file.name for files in written.values() for file in files)

    def plan(self, trees: Iterable[Tree], time_us: int) -> CompactionTask | None:
        """What to compact next in `trees`, if anything: in that first which has most files in level 0."""
        for tree in sorted(trees, key=lambda tree: (-len(tree.below.levels[0]), tree.info.id)):
            info = tree.info
            until = expired_until(info.schema, info.options, time_us)
            compressed = info.options.compression is not None
            plan = plan_compaction(tree.below.levels, self.policy.compaction, until, self.damaged, compressed)
            if plan is not None:
                return CompactionTask(self, tree, plan, until)
        return None

    def next_expiries(self, trees: Iterable[Tree], time_us: int) -> list[tuple[TableInfo, int]]:
        """For each table with rows that live for a time: the value of its TTL column with which there is something to do next.

        What could be done by `time_us` is not counted again: it was planned.
        """
        found = []
        for tree in trees:
            until = expired_until(tree.info.schema, tree.info.options, time_us)
            if until is not None:
                end = next_change(tree.below.levels, self.policy.compaction, until)
                found += [] if end is None else [(tree.info, end)]
        return found

    def backlog_bytes(self, levels: Levels) -> int:
        """What should have been compacted long ago."""
        return backlog_bytes(levels, self.policy.compaction)

    def collect(self, kept: Callable[[], Collection[str]], trees: Callable[[], Iterable[Tree]]) -> int:
        """Remove what neither `kept` names nor belongs to `trees` or a state that somebody holds. Returns the bytes."""

        def needed() -> set[str]:
            # A state first: the snapshot that it becomes is in the store before it is let go.
            with self._lock:
                states = list(self._states)
            names = {name for state in states for name in state.names()}
            names.update(kept())
            for tree in trees():
                names.update(file.name for file in tree.below.levels)
            return names

        return self.files.collect(needed)

    def compact(self, tree: Tree, plan: Plan, until: int | None, pace: Pace | None) -> None:
        """Carry `plan` out."""
        if not plan.rewrite:
            moved = [] if plan.level is None else list(plan.files)
            self.edit(tree, lambda below: below.compacted(plan, moved))
            return
        assert plan.level is not None
        policy = self.policy.compaction
        written: list[TableFile] = []
        try:
            written = self.files.write(
                tree.info,
                merged(plan, tree.info, until, policy.merge_rows),
                bytes_max=policy.file_bytes_max if plan.level else None,
                compression=policy.compression(tree.info, plan.level),
                pace=pace,
            )
            if written:
                self.files.sync_directory()
            self.edit(tree, lambda below: below.compacted(plan, written))
        except CorruptionError as error:
            self._blame(tree.info, plan, error)
            raise
        finally:
            self.files.release(file.name for file in written)

    def _blame(self, info: TableInfo, plan: Plan, error: CorruptionError) -> None:
        """Find out which file of `plan` is damaged, that the others may be compacted."""
        for file in plan.files:
            try:
                file.opened.verify()
            except CorruptionError as damage:
                self.damaged[file.name] = damage
        if not any(file.name in self.damaged for file in plan.files):
            self.damaged.update(dict.fromkeys(plan.names, error))


def have_expired(expiries: Iterable[tuple[TableInfo, int]], time_us: int) -> bool:
    """Whether one of what `Store.next_expiries` gave has come about by `time_us`."""
    return any((expired_until(info.schema, info.options, time_us) or 0) >= end for info, end in expiries)


class CompactionTask:
    """A plan for one table, ready to be carried out."""

    def __init__(self, store: Store, tree: Tree, plan: Plan, until: int | None) -> None:
        self.tree = tree
        self.plan = plan
        self._store = store
        self._until = until

    def run(self, pace: Pace | None = None) -> None:
        """Raises OSError and CorruptionError, as `marble.machine.StoredMachine.compact`."""
        self._store.compact(self.tree, self.plan, self._until, pace)
