"""Tables as a replicated state machine.

Rule 1: state changes in `TableMachine.apply` only, by one thread; readers see what it has published, and nothing else.
Rule 2: the applied index and the state of all tables are published together, by one assignment, after a whole run of
entries: a reader never sees a state without its index, nor half an entry.
Rule 3: apply is deterministic. Wrong content is an error `Result`, the same on every replica, and changes nothing;
damaged content (a checksum that does not match) is this replica's misfortune alone and raises `CorruptionError`.
Time is the highest `time_us` of the entries so far, never a clock's.
Rule 4: where rows are stored is no part of the state: flushes and compactions put files in the place of memtables and of
other files beside `apply` (`marble.lsm.store`), under the lock, and readers cannot tell.
Rule 5: an entry that names a session and a sequence is executed once (`marble.sessions`): a repeat gives the first
`Result` and changes nothing.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pyarrow as pa

from marble._core import entry_batch
from marble._core.memtable import Snapshot
from marble.errors import CorruptionError, InvariantError, UsageError, check
from marble.lsm import payload
from marble.lsm.apply import apply_operations
from marble.lsm.catalog import Catalog
from marble.lsm.damage import Healing
from marble.lsm.files import TableFiles
from marble.lsm.snapshot import TableState, restored
from marble.lsm.store import CompactionTask, Store, StorePolicy, have_expired
from marble.lsm.tree import Below, TableData, Tree
from marble.lsm.view import TableView
from marble.machine import Pace, Result
from marble.schema import TableInfo
from marble.sessions import Sessions
from marble.table_options import expired_until
from marble.types import EntryKind


@dataclass(frozen=True, slots=True)
class _State:
    """What readers see. ``tables`` has an item for each table of ``catalog``, by id."""

    applied_index: int = 0
    time_us: int = 0
    session_count: int = 0
    catalog: Catalog = field(default_factory=Catalog)
    tables: Mapping[int, Snapshot | TableData] = field(default_factory=dict)
    views: dict[int, TableView] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What readers have asked for, by table; it goes with the state. Two threads may make two, which are alike."""


class TableMachine(Healing):
    """All tables of one Raft group: a `marble.machine.StoredMachine`.

    Thread safety: `apply`, `capture` and `restore` on one thread; `compact` on one; `collect`, and what `capture` returned, on
    one; everything else on any.

    Parameters
    ----------
    files
        Where the tables' files are; nothing of it is touched before the first call. None: the tables are in memory only, and
        snapshots hold all rows.
    policy
        How they are kept there.
    retention
        For how many entries back the state is kept for `read(at_index=)`. It keeps their memory and files, too.
    on_command
        Called with index and bytes of each COMMAND when it is applied, in order, on the applying thread and before the
        state is published. It must be deterministic if it keeps state, and an exception of it stops this replica.
        Repeats within a session are not handed on.
    on_capture
        Called by `capture`: returns what `on_command` has kept, as bytes that go into the snapshot. What is built from
        commands and has no `on_capture` is not in snapshots: commands before one are not handed on again after a restart.
    on_restore
        Called by `restore` with what `on_capture` returned (nothing, if there was none): forget everything, and begin
        from there. An exception of it stops this replica.
    """

    def __init__(
        self,
        on_command: Callable[[int, bytes], None] | None = None,
        on_capture: Callable[[], bytes] | None = None,
        on_restore: Callable[[bytes], None] | None = None,
        *,
        files: TableFiles | None = None,
        policy: StorePolicy | None = None,
        retention: int = 0,
    ) -> None:
        self._on_command = on_command
        self._on_capture = on_capture
        self._on_restore = on_restore
        self._retention = retention
        self._lock = threading.Lock()
        """Held for any assignment to `_state`, `_trees` or what lies below a memtable."""
        self._store: Store | None = None
        self._state = _State()
        self._past: deque[_State] = deque([self._state])
        self._unplanned = False
        """Whether there may be something to compact."""
        self._expiries: list[tuple[TableInfo, int]] = []
        """When there will be, although nothing is written: see `Store.next_expiries`."""
        self._frozen_bytes = 0
        self._debt_bytes = 0
        self._failed = False
        self._begun: tuple[int, list[Result]] | None = None
        """A run of entries in which a damaged file was met: where it begins, and the results so far."""
        # The applying thread's own: ahead of `_state` while a run of entries is being applied.
        self._catalog = Catalog()
        self._trees: dict[int, Tree] = {}
        self._active_bytes = 0
        self._touched: set[int] = set()
        self._sessions = Sessions()
        self._time_us = 0
        self._appliers: dict[EntryKind, Callable[[int, int, pa.Buffer], int]] = {
            EntryKind.NOOP: lambda index, table, payload: 0,
            EntryKind.MEMBERSHIP: lambda index, table, payload: 0,
            EntryKind.WRITE: partial(self._operate, EntryKind.WRITE),
            EntryKind.DELETE: partial(self._operate, EntryKind.DELETE),
            EntryKind.DELETE_RANGE: partial(self._operate, EntryKind.DELETE_RANGE),
            EntryKind.TRANSACTION: self._transact,
            EntryKind.CREATE_TABLE: self._create_table,
            EntryKind.DROP_TABLE: self._drop_table,
            EntryKind.COMMAND: self._command,
        }
        if files is not None:
            self.keep_in(files, policy)

    def keep_in(self, files: TableFiles, policy: StorePolicy | None = None) -> None:
        """Keep the tables in `files` from now on. Only before the first entry."""
        check(self.applied_index == 0 and self._store is None, "a machine chooses its files before its first entry")
        self._store = Store(files, policy or StorePolicy(), self._edit)

    @property
    def applied_index(self) -> int:
        """Index of the last entry whose effect readers see; 0 before the first."""
        return self._state.applied_index

    @property
    def time_us(self) -> int:
        """The highest time of the entries applied, microseconds since 1970 UTC."""
        return self._state.time_us

    @property
    def session_count(self) -> int:
        """Sessions that are open."""
        return self._state.session_count

    def tables(self) -> list[TableInfo]:
        """All tables, in order of their names."""
        return self._state.catalog.tables()

    def table(self, table: str | int) -> TableInfo:
        """The table with this name or id. Raises UsageError, with the nearest name, if there is none."""
        return self._state.catalog.get(table)

    def read(self, table: str | int, at_index: int | None = None) -> TableView:
        """One state of the table with this name or id.

        Parameters
        ----------
        table
            The table.
        at_index
            After which entry; None: the last one applied.

        Raises
        ------
        UsageError
            There is no such table, or none at that entry; or that state is not kept (any more), or has not been reached.
        CorruptionError
            A file of the table is missing, or so damaged that it could not even be opened; it is named.
        """
        state = self._state if at_index is None else self._state_at(at_index)
        view = state.views.get(table) if isinstance(table, int) else None
        if view is None:
            info = state.catalog.get(table)
            data = state.tables[info.id]
            reader = data.reader if isinstance(data, TableData) else data
            until = expired_until(info.schema, info.options, state.time_us)
            view = state.views[info.id] = TableView(state.applied_index, info, reader, until, self.blame)
        return view

    def _state_at(self, index: int) -> _State:
        with self._lock:
            past = list(self._past)
        place = bisect_left(past, index, key=lambda state: state.applied_index)
        if place == len(past):
            raise UsageError(f"entry {index} has not been applied here: the last one is {past[-1].applied_index}")
        if past[place].applied_index != index:
            raise UsageError(
                f"the state after entry {index} is not kept: the oldest is that of entry {past[0].applied_index}; "
                "a larger retention keeps more"
            )
        return past[place]

    def apply(self, entries: pa.RecordBatch) -> list[Result]:
        """Apply the rows of `entries` (schema `marble.schema.ENTRY_SCHEMA`), which follow `applied_index`.

        Returns
        -------
        list of Result
            One for each row. ``value`` is the number of rows written (WRITE), of rows that were there and are no longer
            (DELETE, DELETE_RANGE), the sum of these (TRANSACTION), the table's id (CREATE_TABLE, DROP_TABLE), the
            session's number (OPEN_SESSION), or 0. A creation that repeats an existing definition gives that table's id.
            An entry that repeats one of its session gives the first one's Result, with its index; one of a session that
            is not known, or so old that its answer is not, gives ``session_expired`` and is not executed.

        Raises
        ------
        CorruptionError
            If an entry is not what its proposer sent: nothing of `entries` becomes visible. Or a file that an entry needs is
            damaged or missing: when it is healed the same call goes on where this one ended.
        InvariantError
            If the entries do not follow `applied_index`, are of a kind that this version does not know, or an earlier
            call failed.
        """
        if entries.num_rows == 0:
            return []
        check(not self._failed, "an earlier apply failed half way: this replica's tables cannot be trusted any more")
        self._failed = True
        heads = entry_batch.heads(entries)
        first, last = heads[0][0], heads[-1][0]
        (begun, done), self._begun = self._begun or (self.applied_index + 1, []), None
        check(
            begun <= first <= begun + len(done) and last == first + entries.num_rows - 1,
            f"entries {first} to {last} ({entries.num_rows} rows) do not follow applied index {self.applied_index}",
        )
        results = done[first - begun :]
        check(
            len(results) <= entries.num_rows, f"of entries from {first} on more were done than come again, up to {last}"
        )
        entry_batch.verify(entries)
        for row, (_, kind, session, sequence, time_us, table) in enumerate(heads):
            if row < len(results):
                continue
            self._time_us = max(self._time_us, time_us)
            data = entry_batch.payload(entries, row)
            try:
                results.append(self._apply_one(kind, first + row, session, sequence, table, data))
            except CorruptionError as error:
                if self.blame(error):
                    # Nothing of this entry was done: it reads before it writes.
                    self._begun, self._failed = (first, results), False
                raise
            if self._retention and first + row < last:
                self._publish(first + row)
        self._publish(last)
        self._failed = False
        return results

    def _publish(self, applied_index: int) -> None:
        with self._lock:
            tables = self._state.tables
            if self._touched:
                tables, settled = dict(tables), False
                for id_ in self._touched:
                    tree = self._trees.get(id_)
                    if tree is None:
                        tables.pop(id_, None)
                    else:
                        settled |= tree.settle()
                        tables[id_] = tree.data()
                self._touched.clear()
                if settled:
                    self._account()
            self._show(_State(applied_index, self._time_us, len(self._sessions), self._catalog, tables))

    def _show(self, state: _State) -> None:
        """What readers see from now on. Under the lock."""
        past = self._past
        if past[-1].applied_index == state.applied_index:
            past.pop()
        past.append(state)
        while past[0].applied_index < state.applied_index - self._retention:
            past.popleft()
        self._state = state

    def capture(self) -> TableState:
        """The state as of `applied_index`, to be written on any thread while this machine goes on.

        Raises InvariantError if an earlier call failed.
        """
        check(not self._failed, "an earlier apply failed half way: this replica's tables cannot be trusted any more")
        commands = b"" if self._on_capture is None else self._on_capture()
        trees = dict(self._trees)
        with self._lock:
            if self._store is not None:
                self._active_bytes, before = 0, self._state
                frozen = {tree.info.id: tree.data() for tree in self._store.freeze(trees.values())}
                self._show(replace(before, tables={**before.tables, **frozen}))
                self._account()
            state = self._state
        captured = TableState(
            state.applied_index,
            state.time_us,
            state.catalog,
            state.tables,
            self._sessions.state(),
            commands,
            lambda tables, pace: {} if self._store is None else self._store.flush(tables, trees, pace),
        )
        return captured if self._store is None else self._store.holding(captured)

    def restore(self, index: int, batches: Iterable[pa.RecordBatch]) -> None:
        """Replace the whole state by what a `TableState` of entry `index` gave out. Files are adopted as they are.

        Readers see the old state or the new one; both are in memory while the new one is built.

        Raises
        ------
        CorruptionError
            `batches` are not such a state, or a file is missing or damaged. The old one stays.
        InvariantError
            `index` lies before `applied_index`.
        """
        self._restore(index, batches, salvage=False)

    def _restore(self, index: int, batches: Iterable[pa.RecordBatch], *, salvage: bool) -> None:
        check(index >= self.applied_index, f"a snapshot of entry {index} would undo entries up to {self.applied_index}")
        found = restored(index, batches, None if self._store is None else self._store.files, salvage)
        self._begun = None
        self._failed = True
        if self._on_restore is not None:
            self._on_restore(found.commands)
        self._sessions, self._time_us = found.sessions, found.time_us
        self._catalog = found.catalog
        self._touched.clear()
        with self._lock:
            self._trees = found.trees
            self._past.clear()
            state = _State(index, found.time_us, len(found.sessions), found.catalog, _published(found.trees))
            self._past.append(state)
            self._state = state
            self._account()
        self._failed = False

    def _rebuild(self, index: int, batches: Iterable[pa.RecordBatch], entries: Iterable[pa.RecordBatch]) -> None:
        beside = TableMachine(retention=self._retention)
        beside._store = self._store
        beside._restore(index, batches, salvage=False)
        for batch in entries:
            beside.apply(batch)
        check(beside.applied_index == self.applied_index, f"entries up to {beside.applied_index} were rebuilt")
        if self._begun is not None and self._begun[0] + len(self._begun[1]) - 1 != self.applied_index:
            self._begun = None  # What was done of those entries is not in the state that was built.
        self._sessions, self._time_us, self._catalog = beside._sessions, beside._time_us, beside._catalog
        with self._lock:
            self._trees = beside._trees
            self._show(replace(beside._state))
            self._account()

    # -- files -------------------------------------------------------------------------------------------------------

    @property
    def memory_bytes(self) -> int:
        """About how much is in memory only and not in files; 0 without files."""
        return 0 if self._store is None else self._active_bytes + self._frozen_bytes

    @property
    def backlog_bytes(self) -> int:
        """How far files lag behind: what is in memory only, and what of level 0 should long have been merged."""
        return self.memory_bytes + self._debt_bytes

    @property
    def store(self) -> Store | None:
        """The tables' files."""
        return self._store

    def plan_compaction(self) -> CompactionTask | None:
        """What is to be compacted next, if anything."""
        if self._store is None or not self.compaction_due:
            return None
        with self._lock:
            trees, self._unplanned, time_us = list(self._trees.values()), False, self._state.time_us
            self._expiries = self._store.next_expiries(trees, time_us)
        task = self._store.plan(trees, time_us)
        if task is not None:
            self._unplanned = True
        return task

    @property
    def compaction_due(self) -> bool:
        """Whether `compact` may find something to do."""
        return self._unplanned or have_expired(self._expiries, self._state.time_us)

    def compact(self, pace: Pace | None = None) -> bool:
        """Make the files fewer by one step; see `marble.machine.StoredMachine.compact`."""
        task = self.plan_compaction()
        if task is not None:
            task.run(pace)
        return task is not None

    def collect(self, kept: Callable[[], Collection[str]]) -> int:
        """Remove the files that neither are named by `kept` nor part of the state or of one that somebody holds."""
        if self._store is None:
            return 0

        return self._store.collect(kept, self._all_trees)

    def _all_trees(self) -> list[Tree]:
        with self._lock:
            return list(self._trees.values())

    def _edit(self, tree: Tree, change: Callable[[Below], Below | None]) -> bool:
        """Replace what lies below the memtable of `tree`, also for readers, whose content stays the same."""
        with self._lock:
            if self._trees.get(tree.info.id) is not tree or (below := tree.edit(change)) is None:
                return False
            state = self._state
            shown = state.tables.get(tree.info.id)
            if isinstance(shown, TableData):
                tables = {**state.tables, tree.info.id: TableData(shown.active, below)}
                self._show(replace(state, tables=tables))
            self._account()
        return True

    def _account(self) -> None:
        """Count what lags behind. Under the lock."""
        store = self._store
        if store is None:
            return
        trees = self._trees.values()
        self._active_bytes = sum(tree.memory_bytes for tree in trees)
        self._frozen_bytes = sum(frozen.nbytes for tree in trees for frozen in tree.below.frozen)
        self._debt_bytes = sum(store.backlog_bytes(tree.below.levels) for tree in trees)
        self._unplanned = True

    # -- entries -----------------------------------------------------------------------------------------------------

    def _apply_one(self, kind: int, index: int, session: int, sequence: int, table: int, data: pa.Buffer) -> Result:
        if kind == EntryKind.OPEN_SESSION:
            self._sessions.open(index, self._time_us)
            return Result(index)
        if kind == EntryKind.CLOSE_SESSION:
            self._sessions.close(session)
            return Result(0)
        if session == 0 or sequence == 0:
            return self._execute(kind, index, table, data)
        known = self._sessions.recall(session, sequence, self._time_us)
        if known is not None:
            return known
        result = self._execute(kind, index, table, data)
        self._sessions.remember(session, sequence, index, result)
        return result

    def _execute(self, kind: int, index: int, table: int, data: pa.Buffer) -> Result:
        applier = self._appliers.get(kind)  # type: ignore[call-overload]
        if applier is None:
            raise InvariantError(
                f"entry {index} is of kind {kind}, which this version of marble cannot apply: upgrade it"
            )
        try:
            return Result(applier(index, table, data))
        except UsageError as error:
            return Result(error_code=UsageError.code, message=str(error))

    def _operate(self, kind: EntryKind, index: int, table: int, data: pa.Buffer) -> int:
        return self._do([payload.Operation(kind, table, data)], index)

    def _transact(self, index: int, table: int, data: pa.Buffer) -> int:
        return self._do(payload.decode_transaction(data), index)

    def _do(self, operations: Sequence[payload.Operation], index: int) -> int:
        applied = apply_operations(operations, lambda id_: self._trees[self._catalog.get(id_).id], index, self._time_us)
        self._touched.update(applied.touched)
        self._active_bytes += sum(applied.touched.values())
        return applied.rows

    def _create_table(self, index: int, table: int, data: pa.Buffer) -> int:
        catalog, info = self._catalog.create(*payload.decode_create_table(data))
        if info.id not in self._trees:
            with self._lock:
                self._trees[info.id] = Tree(info, self._store is not None)
            self._touched.add(info.id)
        self._catalog = catalog
        return info.id

    def _drop_table(self, index: int, table: int, data: pa.Buffer) -> int:
        self._catalog, info = self._catalog.drop(payload.decode_drop_table(data))
        with self._lock:
            del self._trees[info.id]
        self._touched.add(info.id)
        return info.id

    def _command(self, index: int, table: int, data: pa.Buffer) -> int:
        operation = payload.decode_command(data)
        if self._on_command is not None:
            self._on_command(index, operation)
        return 0


def _published(trees: Mapping[int, Tree]) -> dict[int, Snapshot | TableData]:
    return {id_: tree.data() for id_, tree in trees.items()}
