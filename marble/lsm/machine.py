"""Tables as a replicated state machine.

Rule 1: state changes in `TableMachine.apply` only, by one thread; readers see what it has published, and nothing else.
Rule 2: the applied index and the state of all tables are published together, by one assignment, after a whole run of
entries: a reader never sees a state without its index, nor half an entry.
Rule 3: apply is deterministic. Wrong content is an error `Result`, the same on every replica, and changes nothing;
damaged content (a checksum that does not match) is this replica's misfortune alone and raises `CorruptionError`.
Time is the highest `time_us` of the entries so far, never a clock's.
Rule 4: an entry that names a session and a sequence is executed once (`marble.sessions`): a repeat gives the first
`Result` and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from marble._core import entry_batch
from marble._core.memtable import Memtable, Snapshot
from marble.errors import InvariantError, UsageError, check
from marble.lsm import payload
from marble.lsm.catalog import Catalog
from marble.lsm.snapshot import TableState, restored
from marble.lsm.view import TableView
from marble.machine import Result
from marble.schema import TableInfo
from marble.sessions import Sessions
from marble.types import EntryKind


@dataclass(frozen=True, slots=True)
class _State:
    """What readers see. ``snapshots`` has an item for each table of ``catalog``, by id."""

    applied_index: int = 0
    time_us: int = 0
    session_count: int = 0
    catalog: Catalog = field(default_factory=Catalog)
    snapshots: Mapping[int, Snapshot] = field(default_factory=dict)


class TableMachine:
    """All tables of one Raft group in memory: a `marble.machine.StateMachine`.

    Thread safety: `apply`, `capture` and `restore` on one thread; everything else on any.

    Parameters
    ----------
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
    ) -> None:
        self._on_command = on_command
        self._on_capture = on_capture
        self._on_restore = on_restore
        self._state = _State()
        self._failed = False
        # The applying thread's own: ahead of `_state` while a run of entries is being applied.
        self._catalog = Catalog()
        self._memtables: dict[int, Memtable] = {}
        self._touched: set[int] = set()
        self._sessions = Sessions()
        self._time_us = 0
        self._appliers: dict[EntryKind, Callable[[int, int, pa.Buffer], int]] = {
            EntryKind.NOOP: lambda index, table, payload: 0,
            EntryKind.MEMBERSHIP: lambda index, table, payload: 0,
            EntryKind.WRITE: self._write,
            EntryKind.DELETE: self._delete,
            EntryKind.CREATE_TABLE: self._create_table,
            EntryKind.DROP_TABLE: self._drop_table,
            EntryKind.COMMAND: self._command,
        }

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

    def read(self, table: str | int) -> TableView:
        """The present state of the table with this name or id. Raises UsageError if there is none."""
        state = self._state
        info = state.catalog.get(table)
        return TableView(state.applied_index, info, state.snapshots[info.id])

    def apply(self, entries: pa.RecordBatch) -> list[Result]:
        """Apply the rows of `entries` (schema `marble.schema.ENTRY_SCHEMA`), which follow `applied_index`.

        Returns
        -------
        list of Result
            One for each row. ``value`` is the number of rows written (WRITE), of rows that were there and are no longer
            (DELETE), the table's id (CREATE_TABLE, DROP_TABLE), the session's number (OPEN_SESSION), or 0. A creation
            that repeats an existing definition gives that table's id. An entry that repeats one of its session gives
            the first one's Result, with its index; one of a session that is not known, or so old that its answer is not,
            gives ``session_expired`` and is not executed.

        Raises
        ------
        CorruptionError
            If an entry is not what its proposer sent. Nothing of `entries` becomes visible.
        InvariantError
            If the entries do not follow `applied_index`, are of a kind that this version does not know, or an earlier
            call failed.
        """
        if entries.num_rows == 0:
            return []
        check(not self._failed, "an earlier apply failed half way: this replica's tables cannot be trusted any more")
        self._failed = True
        first = entries.column("index")[0].as_py()
        last = entries.column("index")[entries.num_rows - 1].as_py()
        check(
            first == self.applied_index + 1 and last == self.applied_index + entries.num_rows,
            f"entries {first} to {last} ({entries.num_rows} rows) do not follow applied index {self.applied_index}",
        )
        entry_batch.verify(entries)
        names = ("kind", "session", "sequence", "time_us", "table")
        columns = zip(*(entries.column(name).to_pylist() for name in names), strict=True)
        results = []
        for row, (kind, session, sequence, time_us, table) in enumerate(columns):
            self._time_us = max(self._time_us, time_us)
            data = entry_batch.payload(entries, row)
            results.append(self._apply_one(kind, first + row, session, sequence, table, data))
        self._publish(last)
        self._failed = False
        return results

    def _publish(self, applied_index: int) -> None:
        snapshots = self._state.snapshots
        if self._touched:
            snapshots = dict(snapshots)
            for id_ in self._touched:
                memtable = self._memtables.get(id_)
                if memtable is None:
                    snapshots.pop(id_, None)
                else:
                    snapshots[id_] = memtable.snapshot()
            self._touched.clear()
        self._state = _State(applied_index, self._time_us, len(self._sessions), self._catalog, snapshots)

    def capture(self) -> TableState:
        """The state as of `applied_index`, to be written on any thread while this machine goes on.

        Raises InvariantError if an earlier call failed.
        """
        check(not self._failed, "an earlier apply failed half way: this replica's tables cannot be trusted any more")
        state = self._state
        commands = b"" if self._on_capture is None else self._on_capture()
        return TableState(
            state.applied_index, state.time_us, state.catalog, state.snapshots, self._sessions.state(), commands
        )

    def restore(self, index: int, batches: Iterable[pa.RecordBatch]) -> None:
        """Replace the whole state by what a `TableState` of entry `index` gave out.

        Readers see the old state or the new one; both are in memory while the new one is built.

        Raises
        ------
        CorruptionError
            `batches` are not such a state. The old one stays.
        InvariantError
            `index` lies before `applied_index`.
        """
        check(index >= self.applied_index, f"a snapshot of entry {index} would undo entries up to {self.applied_index}")
        found = restored(index, batches)
        self._failed = True
        if self._on_restore is not None:
            self._on_restore(found.commands)
        self._sessions, self._time_us = found.sessions, found.time_us
        self._catalog, self._memtables = found.catalog, found.memtables
        self._touched.clear()
        snapshots = {id_: memtable.snapshot() for id_, memtable in found.memtables.items()}
        self._state = _State(index, found.time_us, len(found.sessions), found.catalog, snapshots)
        self._failed = False

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

    def _write(self, index: int, table: int, data: pa.Buffer) -> int:
        info = self._catalog.get(table)
        rows = self._memtables[info.id].upsert(payload.decode_rows(data, info), index)
        self._touched.add(info.id)
        return rows

    def _delete(self, index: int, table: int, data: pa.Buffer) -> int:
        info = self._catalog.get(table)
        rows = self._memtables[info.id].delete(payload.decode_keys(data, info), index)
        self._touched.add(info.id)
        return rows

    def _create_table(self, index: int, table: int, data: pa.Buffer) -> int:
        catalog, info = self._catalog.create(*payload.decode_create_table(data))
        if info.id not in self._memtables:
            self._memtables[info.id] = Memtable(info.schema, info.key)
            self._touched.add(info.id)
        self._catalog = catalog
        return info.id

    def _drop_table(self, index: int, table: int, data: pa.Buffer) -> int:
        self._catalog, info = self._catalog.drop(payload.decode_drop_table(data))
        del self._memtables[info.id]
        self._touched.add(info.id)
        return info.id

    def _command(self, index: int, table: int, data: pa.Buffer) -> int:
        operation = payload.decode_command(data)
        if self._on_command is not None:
            self._on_command(index, operation)
        return 0
