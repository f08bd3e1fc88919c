"""The state of a `marble.lsm.machine.TableMachine` on its way to a snapshot and back.

A state is rows of `marble.machine.SNAPSHOT_SCHEMA`. Each payload is what `marble._core.entry_batch.encode_payload` makes
of a batch; the sections come in this order:

=========  ================  =====================================================================================
section    table             payload
=========  ================  =====================================================================================
machine    0                 one row of `MACHINE_SCHEMA`
table      id of the table   its definition, one row of `marble.lsm.payload.CREATE_TABLE_SCHEMA`
rows       id of the table   rows of the table last defined, in key order, as in a WRITE; any number of pieces
sessions   0                 rows of `marble.sessions.SESSIONS_SCHEMA`; any number of pieces
commands   0                 a piece of what the user keeps of commands, one row of `COMMAND_SCHEMA`; any number
=========  ================  =====================================================================================

Rule 1: what is read back passes every check that an entry's payload passes, and the rules between the sections:
whatever is wrong is `CorruptionError`, and nothing of the machine has changed by then.
Rule 2: making a state costs no copy of rows; the copies are made while it is written, piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa

from marble._core.entry_batch import decode_payload, encode_payload
from marble._core.memtable import Memtable, Snapshot
from marble.errors import CorruptionError, ProtocolError, UsageError
from marble.lsm import payload
from marble.lsm.catalog import Catalog
from marble.machine import SNAPSHOT_SCHEMA
from marble.schema import TableInfo
from marble.sessions import SESSIONS_SCHEMA, Sessions

MACHINE_SCHEMA: Final = pa.schema(
    [pa.field(name, pa.uint64(), nullable=False) for name in ("applied_index", "time_us", "next_table", "tables")]
)
"""``time_us``: the highest time of any entry applied. ``next_table``: the id of the next table. ``tables``: how many there are."""

PIECE_BYTES: Final = 4 * 1024 * 1024
"""About how many bytes of rows make one piece: large beside what a piece costs, small beside any heap."""

_FOLLOWS: Final = {
    "machine": ("",),
    "table": ("machine", "table", "rows"),
    "rows": ("table", "rows"),
    "sessions": ("machine", "table", "rows", "sessions"),
    "commands": ("machine", "table", "rows", "sessions", "commands"),
}
"""What each section may follow."""


@dataclass(frozen=True, slots=True)
class TableState:
    """All that a machine held after entry ``applied_index``: a `marble.machine.MachineState`.

    - ``snapshots`` has an item for each table of ``catalog``, by id.
    - ``sessions`` can be read once, and so can the whole.
    """

    applied_index: int
    time_us: int
    catalog: Catalog
    snapshots: Mapping[int, Snapshot]
    sessions: Iterator[pa.RecordBatch]
    commands: bytes

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The whole state, a piece at a time, made while it is asked for. Once, on any thread."""
        tables = self.catalog.by_id
        numbers = (self.applied_index, self.time_us, self.catalog.next_id, len(tables))
        columns = [pa.array([number], pa.uint64()) for number in numbers]
        yield _piece("machine", 0, encode_payload(pa.RecordBatch.from_arrays(columns, schema=MACHINE_SCHEMA)))
        for id_ in sorted(tables):
            info = tables[id_]
            yield _piece("table", id_, payload.encode_create_table(info.name, info.schema, info.key))
            for batch in self.snapshots[id_].scan():
                for part in _cut(batch):
                    yield _piece("rows", id_, encode_payload(part))
        for batch in self.sessions:
            yield _piece("sessions", 0, encode_payload(batch))
        for start in range(0, len(self.commands), PIECE_BYTES):
            yield _piece("commands", 0, payload.encode_command(self.commands[start : start + PIECE_BYTES]))


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
    if batch.nbytes <= PIECE_BYTES or batch.num_rows == 1:
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
    memtables: dict[int, Memtable]
    sessions: Sessions
    commands: bytes


@dataclass(slots=True)
class _Builder:
    """Takes pieces in their order. ``section`` is that of the last piece; what may follow it is in `_FOLLOWS`."""

    index: int
    section: str = ""
    numbers: dict[str, int] = field(default_factory=dict)
    infos: list[TableInfo] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    memtables: dict[int, Memtable] = field(default_factory=dict)
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
        elif section == "rows":
            info = self.infos[-1]
            if table != info.id:
                raise _wrong(f"rows of table {table} stand with table {info.id}")
            self.memtables[table].upsert(payload.decode_rows(data, info), self.index)
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
        name, schema, key = payload.decode_create_table(data)
        last = self.infos[-1].id if self.infos else 0
        if not last < table < self.numbers["next_table"] or name in self.names:
            raise _wrong(f"table {table} {name!a} stands twice, out of order, or above the next id")
        self.infos.append(TableInfo(table, name, schema, key))
        self.names.add(name)
        self.memtables[table] = Memtable(schema, key)

    def finish(self) -> Restored:
        if not self.section or len(self.infos) != self.numbers["tables"]:
            raise _wrong("tables are missing")
        sessions = Sessions()
        sessions.restore(self.numbers["time_us"], self.sessions)
        catalog = Catalog.of(self.numbers["next_table"], self.infos)
        return Restored(self.index, self.numbers["time_us"], catalog, self.memtables, sessions, b"".join(self.commands))


def restored(index: int, batches: Iterable[pa.RecordBatch]) -> Restored:
    """Build a machine's state anew.

    Parameters
    ----------
    index
        Of which entry it must be.
    batches
        What `TableState.batches` gave out, in batches of any number of rows.

    Raises
    ------
    CorruptionError
        That is not what they are.
    """
    builder = _Builder(index)
    for batch in batches:
        if not batch.schema.equals(SNAPSHOT_SCHEMA):
            raise _wrong("its pieces have other columns")
        if any(column.null_count for column in batch.columns):
            raise _wrong("a piece has nulls")
        for section, table, data in zip(*batch.columns, strict=True):
            try:
                builder.take(section.as_py(), table.as_py(), _aligned(data.as_buffer()))
            except (UsageError, ProtocolError) as error:
                raise _wrong(f"section {section.as_py()!a} of table {table.as_py()}: {error}") from error
    return builder.finish()


def _aligned(data: pa.Buffer) -> pa.Buffer:
    """A copy at an aligned address: tables compute on their rows in place, and keep nothing else of the file alive."""
    copy = pa.allocate_buffer(data.size)
    memoryview(copy)[:] = memoryview(data)
    return copy


def _wrong(what: str) -> CorruptionError:
    return CorruptionError(f"a snapshot cannot be restored: {what}")
