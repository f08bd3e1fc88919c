"""A `marble.database.Backend` without Raft, log or network: each call is an entry that is applied at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import pyarrow as pa

from marble._core import entry_batch
from marble.errors import UsageError
from marble.local import scan_view
from marble.lsm import payload
from marble.lsm.machine import TableMachine
from marble.requests import ScanRequest, TableChange
from marble.schema import TableInfo
from marble.table_options import TableOptions
from marble.types import EntryKind


class MachineBackend:
    """Keeps every entry it made in ``entries``, so that a test can apply them to another machine."""

    def __init__(self, entry_bytes_max: int = 1 << 20) -> None:
        self.machine = TableMachine()
        self.entries: list[pa.RecordBatch] = []
        self.entry_bytes_max = entry_bytes_max
        self.reads: list[str] = []
        self.closed = False

    def propose(self, kind: EntryKind, table: int, data: pa.Buffer | None) -> tuple[int, int]:
        """Apply one entry and return its index and value."""
        self._check_open()
        if data is not None:
            payload.check_entry_size(data, self.entry_bytes_max, "the batch")
        index = self.machine.applied_index + 1
        entries = entry_batch.build(1, index, 1, [entry_batch.Proposal(kind, table, data)])
        self.entries.append(entries)
        (result,) = self.machine.apply(entries)
        return index, result.raise_for_error()

    def _check_open(self) -> None:
        if self.closed:
            raise UsageError("the database is closed")

    def _later(self, kind: EntryKind, table: int, data: pa.Buffer) -> Future[int]:
        future: Future[int] = Future()
        try:
            future.set_result(self.propose(kind, table, data)[0])
        except UsageError as error:
            future.set_exception(error)
        return future

    def create_table(
        self, name: str, schema: pa.Schema, key: Sequence[str], options: TableOptions, local: bool
    ) -> TableInfo:
        if local:
            raise UsageError("no local tables here")
        _, id_ = self.propose(EntryKind.CREATE_TABLE, 0, payload.encode_create_table(name, schema, key, options))
        return self.machine.table(id_)

    def drop_table(self, table: TableInfo) -> int:
        return self.propose(EntryKind.DROP_TABLE, 0, payload.encode_drop_table(table.name))[0]

    def tables(self) -> Sequence[TableInfo]:
        self._check_open()
        return self.machine.tables()

    def write(self, table: TableInfo, batch: pa.RecordBatch) -> Future[int]:
        return self._later(EntryKind.WRITE, table.id, payload.encode_rows(batch))

    def delete(self, table: TableInfo, keys: pa.RecordBatch) -> Future[int]:
        return self._later(EntryKind.DELETE, table.id, payload.encode_rows(keys))

    def change(self, changes: Sequence[TableChange]) -> Future[int]:
        kind, table, data = payload.encode_changes(changes)
        return self._later(kind, table, data)

    def get_many(
        self, table: TableInfo, keys: pa.RecordBatch, consistency: str, at_index: int | None
    ) -> pa.RecordBatch:
        self._check_open()
        self.reads.append(consistency)
        return self.machine.read(table.id, at_index).get_many(keys)

    def scan(self, table: TableInfo, request: ScanRequest) -> pa.RecordBatchReader:
        self._check_open()
        self.reads.append(request.consistency)
        return scan_view(self.machine.read(table.id, request.at_index), request)

    def find(self, name: str) -> TableInfo | None:
        return next((info for info in self.tables() if info.name == name), None)

    def status(self) -> dict[str, object]:
        return {"applied_index": self.machine.applied_index}

    def close(self) -> None:
        self.closed = True
