"""What entries do to the rows of tables: writes, deletes and range deletes, one by one or several at once.

Rule 1: all or nothing. Everything is decoded and checked, and whatever may fail is computed, before the first row changes:
first `_plan` for every operation, then `_Step.run` for every one. What fails in the second half is marble's own fault.
Rule 2: an operation sees those before it in its transaction, as if they had been entries of their own.
Rule 3: rows whose time to live is over are not there, for merges and for counts.
Rule 4: time is the entry's (`time_us`, the highest so far), never a clock's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from marble._core.key_codec import KeyCodec
from marble._core.memtable import Memtable
from marble.errors import UsageError, check
from marble.lsm import payload
from marble.lsm.keyrange import KeyRange
from marble.lsm.merge import first_places, merge
from marble.lsm.tree import RANGE_ROWS, Tree
from marble.lsm.view import TableView
from marble.schema import TableInfo
from marble.table_options import time_value
from marble.types import EntryKind

_GONE: Final = "_marble_gone"


@dataclass(slots=True)
class Applied:
    """What was done: how many rows were written or deleted, and about how many bytes each table took in, by id."""

    rows: int = 0
    touched: dict[int, int] = field(default_factory=dict)


def apply_operations(
    operations: Sequence[payload.Operation], table: Callable[[int], Tree], index: int, time_us: int
) -> Applied:
    """Do all `operations`, in order, as entry `index`; or, if one of them is wrong, none.

    Parameters
    ----------
    operations
        As they were decoded; their payloads have not been looked at.
    table
        Finds a table by its id; raises UsageError if there is none.
    time_us
        The time of the entry.

    Raises
    ------
    UsageError
        One of them cannot be done. Nothing has changed.
    CorruptionError
        A file that one of them needs is damaged. Nothing has changed.
    """
    sights: dict[int, _Sight] = {}
    steps = []
    several = len(operations) > 1
    for number, operation in enumerate(operations):
        try:
            steps.append(_plan(operation, table(operation.table), sights, time_us, several))
        except UsageError as error:
            if not several:
                raise
            raise UsageError(f"operation {number} of the transaction: {error}") from None
    if several:
        for step in steps:
            step.touch()
    applied = Applied()
    for operation, step in zip(operations, steps, strict=True):
        before = step.tree.memory_bytes
        applied.rows += step.run(index, time_us)
        took = step.tree.memory_bytes - before
        applied.touched[operation.table] = applied.touched.get(operation.table, 0) + took
    return applied


@dataclass(frozen=True, slots=True)
class _Step:
    """An operation that cannot fail any more."""

    tree: Tree
    kind: EntryKind
    batch: pa.RecordBatch | None = None
    given: int = 0
    keys: KeyRange | None = None

    def touch(self) -> None:
        """Read all files that `run` needs: a damaged one ends the entry before anything of it was done, so that it can be
        done again. An operation that is alone reads before it changes anything, and needs no more."""
        if not self.tree.below.levels or self.kind is EntryKind.WRITE:
            return
        if self.kind is EntryKind.DELETE:
            self.tree.touch(self.batch)
            return
        for _ in self.tree.view(0, None).scan(list(self.tree.info.key), batch_rows_max=RANGE_ROWS, keys=self.keys):
            pass

    def run(self, index: int, time_us: int) -> int:
        """Change the table. How many rows were given to write, or were there and are deleted."""
        if self.kind is EntryKind.WRITE:
            self.tree.write(self.batch, index)
            return self.given
        if self.kind is EntryKind.DELETE:
            return self.tree.delete(self.batch, index, time_us)
        assert self.keys is not None
        return self.tree.delete_range(self.keys, index, time_us)


def _plan(operation: payload.Operation, tree: Tree, sights: dict[int, _Sight], time_us: int, several: bool) -> _Step:
    """Check `operation`, and compute what of it may fail. `sights`: what earlier ones of the transaction did."""
    info = tree.info
    sight = None
    if info.options.merge:
        sight = sights.get(info.id)
        if sight is None:
            sight = sights[info.id] = _Sight(tree.view(0, time_us))
    if operation.kind is EntryKind.WRITE:
        batch = _stamped(payload.decode_rows(operation.payload, info), info, time_us)
        given = batch.num_rows
        if sight is not None:
            keys = batch.select(list(info.key))
            there = sight.get(keys.take(first_places(keys)))
            batch = merge(info, there, batch)
            if several:
                sight.write(batch)
        return _Step(tree, operation.kind, batch, given)
    if operation.kind is EntryKind.DELETE:
        keys = payload.decode_keys(operation.payload, info)
        if sight is not None and several:
            sight.delete(keys)
        return _Step(tree, operation.kind, keys)
    check(operation.kind is EntryKind.DELETE_RANGE, f"an operation of kind {operation.kind}")
    keys_in = KeyRange(*payload.decode_range(operation.payload))
    if sight is not None and several:
        sight.delete_range(keys_in)
    return _Step(tree, operation.kind, keys=keys_in)


def _stamped(batch: pa.RecordBatch, info: TableInfo, time_us: int) -> pa.RecordBatch:
    """`batch` with the time of its entry, if the table wants that."""
    options = info.options
    if not options.ttl_stamped:
        return batch
    position = info.schema.get_field_index(options.ttl_column)
    times = pa.repeat(time_value(info.schema.field(position).type, time_us), batch.num_rows)
    return batch.set_column(position, info.schema.field(position), times)


class _Sight:
    """A table with merge operators as the next operation of a transaction sees it: the state before, and what was done since.

    - ``_since`` holds every row and every deletion of the transaction, the latest of each key; it hides ``_before``.
    - ``_hidden`` are ranges in which nothing of ``_before`` is left.
    """

    def __init__(self, before: TableView) -> None:
        self._before = before
        self._info = info = before.info
        self._hidden: list[KeyRange] = []
        self._since: Memtable | None = None
        loose = [each if each.name in info.key else each.with_nullable(True) for each in info.schema]
        self._schema = pa.schema([*loose, pa.field(_GONE, pa.bool_())])

    def get(self, keys: pa.RecordBatch) -> pa.RecordBatch:
        """The rows that have one of `keys`, which differ."""
        rows = self._before.get_many(keys)
        found = rows.column(self._info.key[0]).is_valid()
        if self._hidden:
            found = pc.and_not(found, self._in_hidden(keys))
        if self._since is None:
            return rows.filter(found)
        newer, known = self._since.snapshot().get_many(keys)
        there = pc.and_not(known, pc.fill_null(newer.column(_GONE), False))
        old = rows.filter(pc.and_not(found, known))
        new = newer.filter(there).select(rows.schema.names)
        return pa.concat_batches([old, pa.RecordBatch.from_arrays(new.columns, schema=old.schema)])

    def _in_hidden(self, keys: pa.RecordBatch) -> pa.BooleanArray:
        encoded = KeyCodec(self._info.key_schema).encode(keys).to_pylist()
        return pa.array([any(key in hidden for hidden in self._hidden) for key in encoded], pa.bool_())

    def write(self, rows: pa.RecordBatch) -> None:
        gone = pa.repeat(pa.scalar(False), rows.num_rows)
        self._note(pa.RecordBatch.from_arrays([*rows.columns, gone], schema=self._schema))

    def delete(self, keys: pa.RecordBatch) -> None:
        columns = [
            keys.column(each.name) if each.name in self._info.key else pa.nulls(keys.num_rows, each.type)
            for each in self._schema
        ]
        columns[-1] = pa.repeat(pa.scalar(True), keys.num_rows)
        self._note(pa.RecordBatch.from_arrays(columns, schema=self._schema))

    def delete_range(self, keys: KeyRange) -> None:
        self._hidden.append(keys)
        if self._since is not None:
            for part in self._since.snapshot().scan(RANGE_ROWS, list(self._info.key), keys.lower, keys.upper):
                self.delete(part)

    def _note(self, rows: pa.RecordBatch) -> None:
        if self._since is None:
            self._since = Memtable(self._schema, self._info.key)
        self._since.upsert(rows, 1)
