"""The state of a `marble.lsm.machine.TableMachine` on its way to a snapshot and back: the manifest of its tables.

A state is rows of `marble.machine.SNAPSHOT_SCHEMA`. Each payload is what `marble._core.entry_batch.encode_payload` makes
of a batch; the sections come in this order:

=========  ================  =====================================================================================
section    table             payload
=========  ================  =====================================================================================
machine    0                 one row of `MACHINE_SCHEMA`
table      id of the table   its definition, one row of `marble.lsm.payload.CREATE_TABLE_SCHEMA`
files      id of the table   rows of `marble.machine.FILES_SCHEMA`: the files of the table last defined, level by
                             level, each in its order; any number of pieces
rows       id of the table   rows of that table that are in no file, in key order, as in a WRITE; any number of pieces
deleted    id of the table   keys that files may have and the table has not, as in a DELETE; any number of pieces
sessions   0                 rows of `marble.sessions.SESSIONS_SCHEMA`; any number of pieces
commands   0                 a piece of what the user keeps of commands, one row of `COMMAND_SCHEMA`; any number
=========  ================  =====================================================================================

Rule 1: what is read back passes every check that an entry's payload passes, and the rules between the sections:
whatever is wrong is `CorruptionError`, and nothing of the machine has changed by then.
Rule 2: making a state costs no copy of rows; the copies are made while it is written, piece by piece.
Rule 3: the first piece comes when all that belongs into files is in files, and durable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from marble._core.entry_batch import decode_payload, encode_payload
from marble._core.memtable import Snapshot
from marble.errors import CorruptionError, InvariantError, ProtocolError, UsageError
from marble.lsm import payload
from marble.lsm.catalog import Catalog
from marble.lsm.files import TableFile, TableFiles, encode_files
from marble.lsm.levels import Levels
from marble.lsm.tree import TableData, Tree, memtable_versions
from marble.machine import FILES, FILES_SCHEMA, SNAPSHOT_SCHEMA, FileRef, Pace
from marble.schema import TableInfo
from marble.sessions import SESSIONS_SCHEMA, Sessions

MACHINE_SCHEMA: Final = pa.schema(
    [pa.field(name, pa.uint64(), nullable=False) for name in ("applied_index", "time_us", "next_table", "tables")]
)
"""``time_us``: the highest time of any entry applied. ``next_table``: the id of the next table. ``tables``: how many there are."""

PIECE_BYTES: Final = 4 * 1024 * 1024
"""About how many bytes of rows make one piece: large beside what a piece costs, small beside any heap."""

FILES_PER_PIECE: Final = 4096
"""Rows of `FILES_SCHEMA` in one piece: a table of 128 GiB."""

LEVELS_MAX: Final = 63
"""No table has more levels: each is many times as large as the one above it."""

_OF_TABLE: Final = ("table", FILES, "rows", "deleted")
_FOLLOWS: Final = {
    "machine": ("",),
    "table": ("machine", *_OF_TABLE),
    FILES: ("table", FILES),
    "rows": ("table", FILES, "rows"),
    "deleted": ("table", FILES, "rows", "deleted"),
    "sessions": ("machine", *_OF_TABLE, "sessions"),
    "commands": ("machine", *_OF_TABLE, "sessions", "commands"),
}
"""What each section may follow."""

Flush = Callable[[Mapping[int, TableData], Pace | None], Mapping[int, Levels]]
"""Writes the frozen memtables of tables to files, and returns all files of each of these tables."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class TableState:
    """All that a machine held after entry ``applied_index``: a `marble.machine.MachineState`.

    - ``tables`` has an item for each table of ``catalog``, by id.
    - ``sessions`` can be read once, and so can the whole.
    - ``levels`` has what `flush` has returned.
    """

    applied_index: int
    time_us: int
    catalog: Catalog
    tables: Mapping[int, Snapshot | TableData]
    sessions: Iterator[pa.RecordBatch]
    commands: bytes
    flush: Flush
    levels: Mapping[int, Levels] = field(default_factory=dict)

    def batches(self, pace: Pace | None = None) -> Iterator[pa.RecordBatch]:
        """The whole state, a piece at a time, made while it is asked for. Once, on any thread.

        Raises
        ------
        OSError
            The disk failed or is full.
        CorruptionError
            A file is damaged.
        """
        stored = {id_: data for id_, data in self.tables.items() if isinstance(data, TableData)}
        self.levels = {id_: data.below.levels for id_, data in stored.items()}
        frozen = {id_: data for id_, data in stored.items() if data.below.frozen}
        self.levels = {**self.levels, **self.flush(frozen, pace)}
        tables = self.catalog.by_id
        numbers = (self.applied_index, self.time_us, self.catalog.next_id, len(tables))
        columns = [pa.array([number], pa.uint64()) for number in numbers]
        yield _piece("machine", 0, encode_payload(pa.RecordBatch.from_arrays(columns, schema=MACHINE_SCHEMA)))
        for id_ in sorted(tables):
            yield from self._table(tables[id_], self.tables[id_])
        for batch in self.sessions:
            yield _piece("sessions", 0, encode_payload(batch))
        for start in range(0, len(self.commands), PIECE_BYTES):
            yield _piece("commands", 0, payload.encode_command(self.commands[start : start + PIECE_BYTES]))

    def files(self) -> list[FileRef]:
        """The files that belong to it: all, once `batches` has given out its first piece."""
        return [file.ref for id_ in sorted(self.levels) for file in self.levels[id_]]

    def names(self) -> set[str]:
        """Names of the files that must stay while somebody holds this."""
        found = {ref.name for ref in self.files()}
        for data in self.tables.values():
            if isinstance(data, TableData):
                found.update(file.name for file in data.below.levels)
        return found

    def _table(self, info: TableInfo, data: Snapshot | TableData) -> Iterator[pa.RecordBatch]:
        definition = payload.encode_create_table(info.name, info.schema, info.key, info.options)
        yield _piece("table", info.id, definition)
        if not isinstance(data, TableData):
            for batch in data.scan():
                for part in _cut(batch):
                    yield _piece("rows", info.id, encode_payload(part))
            return
        files = encode_files(self.levels[info.id].levels)
        for start in range(0, files.num_rows, FILES_PER_PIECE):
            yield _piece(FILES, info.id, encode_payload(files.slice(start, FILES_PER_PIECE)))
        if data.below.frozen:
            return  # What was in memory has gone into a file just now.
        deleted = []
        for batch, _, gone in memtable_versions([data.active], drop_tombstones=not files.num_rows):
            living = pa.RecordBatch.from_arrays(batch.columns, schema=info.schema).filter(pc.invert(gone))
            for part in _cut(living):
                yield _piece("rows", info.id, encode_payload(part))
            keys = batch.select(list(info.key)).filter(gone)
            if keys.num_rows:
                deleted.append(pa.RecordBatch.from_arrays(keys.columns, schema=info.key_schema))
        for keys in deleted:
            yield _piece("deleted", info.id, encode_payload(keys))


def _piece(section: str, table: int, data: pa.Buffer) -> pa.RecordBatch:
    offsets = pa.array([0, data.size], pa.int32()).buffers()[1]
    columns = [
        pa.array([section], pa.string()),
        pa.array([table], pa.uint32()),
        pa.Array.from_buffers(pa.binary(), 1, [None, offsets, data]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SNAPSHOT_SCHEMA)


def _cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """`batch` in parts of about `PIECE_BYTES`, however its bytes are spread over its rows."""
    if batch.nbytes <= PIECE_BYTES or batch.num_rows <= 1:
        if batch.num_rows:
            yield batch
        return
    half = batch.num_rows // 2
    yield from _cut(batch.slice(0, half))
    yield from _cut(batch.slice(half))


@dataclass(slots=True)
class Restored:
    """What a machine is made of, built from the pieces of a state."""

    applied_index: int
    time_us: int
    catalog: Catalog
    trees: dict[int, Tree]
    sessions: Sessions
    commands: bytes


@dataclass(slots=True)
class _Builder:
    """Takes pieces in their order. ``section`` is that of the last piece; what may follow it is in `_FOLLOWS`."""

    index: int
    store: TableFiles | None
    salvage: bool = False
    section: str = ""
    numbers: dict[str, int] = field(default_factory=dict)
    infos: list[TableInfo] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    levels: list[list[TableFile]] = field(default_factory=list)
    trees: dict[int, Tree] = field(default_factory=dict)
    sessions: list[pa.RecordBatch] = field(default_factory=list)
    commands: list[bytes] = field(default_factory=list)

    def take(self, section: str, table: int, data: pa.Buffer) -> None:
        if self.section not in _FOLLOWS.get(section, ()):
            raise _wrong(f"section {section!a} follows section {self.section!a}")
        self.section = section
        if section == "machine":
            self.take_machine(data)
        elif section == "table":
            self.take_table(table, data)
        elif section in (FILES, "rows", "deleted"):
            info = self.infos[-1]
            if table != info.id:
                raise _wrong(f"{section} of table {table} stand with table {info.id}")
            if section == FILES:
                self.take_files(info, decode_payload(data, FILES_SCHEMA))
            elif section == "rows":
                self.tree().write(payload.decode_rows(data, info), self.index)
            else:
                self.tree().bury(payload.decode_keys(data, info), self.index)
        elif section == "sessions":
            self.sessions.append(decode_payload(data, SESSIONS_SCHEMA))
        else:
            self.commands.append(payload.decode_command(data))

    def take_machine(self, data: pa.Buffer) -> None:
        batch = decode_payload(data, MACHINE_SCHEMA)
        if batch.num_rows != 1 or any(column.null_count for column in batch.columns):
            raise _wrong("its head is not one row")
        self.numbers = batch.to_pylist()[0]
        if self.numbers["applied_index"] != self.index:
            raise _wrong(f"it is of entry {self.numbers['applied_index']}, not of {self.index}")

    def take_table(self, table: int, data: pa.Buffer) -> None:
        name, schema, key, options = payload.decode_create_table(data)
        if self.infos:
            self.tree()
        last = self.infos[-1].id if self.infos else 0
        if not last < table < self.numbers["next_table"] or name in self.names:
            raise _wrong(f"table {table} {name!a} stands twice, out of order, or above the next id")
        self.infos.append(TableInfo(table, name, schema, key, options))
        self.names.add(name)
        self.levels = []

    def take_files(self, info: TableInfo, batch: pa.RecordBatch) -> None:
        if self.store is None:
            raise _wrong(f"table {info.name!r} has files, and this machine keeps none")
        batch.validate(full=True)
        for row in batch.to_pylist():
            if None in [row[field.name] for field in FILES_SCHEMA if not field.nullable]:
                raise _wrong(f"a file of table {info.name!r} is described by a null")
            level = row["level"]
            if not len(self.levels) - 1 <= level <= LEVELS_MAX:
                raise _wrong(f"files of table {info.name!r} are not in order")
            self.levels += [[] for _ in range(level + 1 - len(self.levels))]
            opener = self.store.salvage if self.salvage else self.store.open
            self.levels[level].append(opener(row, info))

    def tree(self) -> Tree:
        """The table last defined, whose files have all come by now."""
        info = self.infos[-1]
        if info.id not in self.trees:
            try:
                levels = Levels.of(self.levels)
            except InvariantError as error:
                raise _wrong(f"table {info.name!r}: {error}") from None
            self.trees[info.id] = Tree(info, self.store is not None, levels)
        return self.trees[info.id]

    def finish(self) -> Restored:
        if not self.section or len(self.infos) != self.numbers["tables"]:
            raise _wrong("tables are missing")
        if self.infos:
            self.tree()
        sessions = Sessions()
        sessions.restore(self.numbers["time_us"], self.sessions)
        catalog = Catalog.of(self.numbers["next_table"], self.infos)
        return Restored(self.index, self.numbers["time_us"], catalog, self.trees, sessions, b"".join(self.commands))


def restored(
    index: int, batches: Iterable[pa.RecordBatch], store: TableFiles | None = None, salvage: bool = False
) -> Restored:
    """Build a machine's state anew. Files are mapped and checked but for their blocks; none of their rows is read.

    Parameters
    ----------
    index
        Of which entry it must be.
    batches
        What `TableState.batches` gave out, in batches of any number of rows.
    store
        Where the files are. None: this machine has none.
    salvage
        Go on without files that are missing or damaged: what needs them fails.

    Raises
    ------
    CorruptionError
        That is not what they are; or a file is missing or damaged.
    """
    builder = _Builder(index, store, salvage)
    for batch in batches:
        if not batch.schema.equals(SNAPSHOT_SCHEMA):
            raise _wrong("its pieces have other columns")
        if any(column.null_count for column in batch.columns):
            raise _wrong("a piece has nulls")
        for section, table, data in zip(*batch.columns, strict=True):
            try:
                builder.take(section.as_py(), table.as_py(), _aligned(data.as_buffer()))
            except (UsageError, ProtocolError, pa.ArrowInvalid) as error:
                raise _wrong(f"section {section.as_py()!a} of table {table.as_py()}: {error}") from error
    return builder.finish()


def _aligned(data: pa.Buffer) -> pa.Buffer:
    """A copy at an aligned address: tables compute on their rows in place, and keep nothing else of the file alive."""
    copy = pa.allocate_buffer(data.size)
    memoryview(copy)[:] = memoryview(data)
    return copy


def _wrong(what: str) -> CorruptionError:
    return CorruptionError(f"a snapshot cannot be restored: {what}")
