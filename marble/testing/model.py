"""What the tables of a group hold after each entry, kept in dicts: what replicas that keep theirs in files are held to.

Rule 1: it shares nothing with the tables but how entries are decoded: no memtable, no file, no merge of runs.
Rule 2: every state since the first entry can be asked for, since replicas restart from old snapshots and lag behind.

It knows what the simulation's clients do: tables whose key is one int64 column, the merge operator ``sum``, a time to live by
the time of the entry, or by a column of microseconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa

from marble._core.key_codec import KeyCodec
from marble.lsm import payload
from marble.lsm.machine import TableMachine
from marble.machine import Result
from marble.schema import TableInfo
from marble.testing.ledger import Violation
from marble.types import EntryKind

Row = tuple[Any, ...]

FOUND_MAX: Final = 64
"""States of tables that are kept because another replica will soon be compared with them."""


@dataclass(slots=True)
class _Table:
    """One table: for each key its versions, as (index, row, or None where it was deleted), by ascending index."""

    info: TableInfo
    created: int
    versions: dict[int, list[tuple[int, Row | None]]] = field(default_factory=dict)
    encoded: dict[int, bytes] = field(default_factory=dict)

    def at(self, key: int, index: int) -> Row | None:
        """The row that was last written, whether it has expired or not."""
        found = self.versions.get(key, [])
        place = bisect_right(found, index, key=lambda version: version[0])
        return found[place - 1][1] if place else None

    def put(self, key: int, index: int, row: Row | None) -> None:
        """Entry `index` writes `row`; None: deletes it."""
        found = self.versions.setdefault(key, [])
        if found and found[-1][0] == index:
            found.pop()
        found.append((index, row))

    def lives(self, row: Row | None, time_us: int) -> bool:
        """Whether there is such a row for whoever reads at `time_us`."""
        options = self.info.options
        if row is None or options.ttl_column is None:
            return row is not None
        written = row[self.info.schema.get_field_index(options.ttl_column)]
        return written is None or bool(written > time_us - options.ttl_us)


class Model:
    """Of one group."""

    def __init__(self) -> None:
        self.index = 0
        self._times = [0]
        self._tables: dict[int, _Table] = {}
        self._found: dict[tuple[int, int], list[Row]] = {}
        """The rows of some tables after some entries, which replicas ask for several times."""

    # -- entries -----------------------------------------------------------------------------------------------------

    def apply(
        self, kind: int, table: int, data: pa.Buffer, time_us: int, result: Result, machine: TableMachine
    ) -> None:
        """The entry after `index` was applied for the first time, by `machine`, and gave `result`, which must be right."""
        self.index += 1
        self._times.append(max(self._times[-1], time_us))
        if result.index or result.error_code is not None:
            return
        if kind == EntryKind.CREATE_TABLE:
            info = machine.table(result.value)
            self._tables.setdefault(info.id, _Table(info, self.index))
            return
        operations = [payload.Operation(EntryKind(kind), table, data)]
        if kind == EntryKind.TRANSACTION:
            operations = payload.decode_transaction(data)
        elif kind not in (EntryKind.WRITE, EntryKind.DELETE, EntryKind.DELETE_RANGE):
            return
        count = sum(self._operate(operation) for operation in operations)
        if count != result.value:
            raise Violation(f"entry {self.index} gave {result.value}, and {count} by the model")

    def _operate(self, operation: payload.Operation) -> int:
        """Do it. How many rows were written, or were there and are deleted."""
        table, index, time_us = self._tables[operation.table], self.index, self._times[-1]
        if operation.kind is EntryKind.WRITE:
            rows = payload.decode_rows(operation.payload, table.info)
            columns = [_plain(column).to_pylist() for column in rows.columns]
            for values in zip(*columns, strict=True):
                self._write(table, dict(zip(rows.schema.names, values, strict=True)))
            return int(rows.num_rows)
        keys: list[int]
        if operation.kind is EntryKind.DELETE:
            keys = payload.decode_keys(operation.payload, table.info).column(0).to_pylist()
        else:
            lower, upper = payload.decode_range(operation.payload)
            keys = [k for k in table.versions if (e := _encoded(table, k)) >= lower and (upper is None or e < upper)]
        gone = 0
        for key in keys:
            gone += table.lives(table.at(key, index), time_us)
            table.put(key, index, None)
        return gone

    def _write(self, table: _Table, row: dict[str, Any]) -> None:
        options, time_us = table.info.options, self._times[-1]
        key = row[table.info.key[0]]
        if options.ttl_stamped and options.ttl_column is not None:
            row[options.ttl_column] = time_us
        before = table.at(key, self.index)
        if before is not None and table.lives(before, time_us):
            for column, operator in options.merge:
                if operator != "sum":
                    raise Violation(f"the model knows no operator {operator}")
                row[column] += before[table.info.schema.get_field_index(column)]
        table.put(key, self.index, tuple(row.values()))

    # -- states ------------------------------------------------------------------------------------------------------

    def rows(self, table: int, index: int) -> list[Row]:
        """The rows of `table` after entry `index`, by ascending key."""
        rows = self._found.get((table, index))
        if rows is None:
            if len(self._found) >= FOUND_MAX:
                del self._found[next(iter(self._found))]
            rows = self._found[table, index] = list(self._rows(table, index))
        return rows

    def _rows(self, table: int, index: int) -> Iterator[Row]:
        found, time_us = self._tables[table], self._times[index]
        for key in sorted(found.versions):
            row = found.at(key, index)
            if row is not None and found.lives(row, time_us):
                yield row

    def tables(self, index: int) -> list[int]:
        """The tables that there are after entry `index`."""
        return sorted(id_ for id_, table in self._tables.items() if table.created <= index)

    def check(self, machine: TableMachine, who: str, at_index: int | None = None) -> None:
        """Raise Violation if `machine` holds anything else than it must after entry `at_index`, or the last one that it has applied.

        Raises CorruptionError if it cannot be read.
        """
        index = machine.applied_index if at_index is None else at_index
        found = sorted(info.id for info in machine.tables())
        if at_index is None and found != self.tables(index):
            raise Violation(f"{who} has the tables {found} after entry {index}, and {self.tables(index)} by the model")
        for id_ in self.tables(index):
            batch = machine.read(id_, at_index).scan(None, None).read_all()
            rows = list(zip(*(_plain(column).to_pylist() for column in batch.columns), strict=True))
            expected = self.rows(id_, index)
            if rows != expected:
                wrong = sorted(set(rows) ^ set(expected))[:5]
                raise Violation(
                    f"{who}, table {id_} after entry {index}: {wrong} are on one side only; model: {expected[:5]}…"
                )


def _plain(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    return column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column


def _encoded(table: _Table, key: int) -> bytes:
    found = table.encoded.get(key)
    if found is None:
        batch = pa.record_batch([pa.array([key], pa.int64())], schema=table.info.key_schema)
        found = table.encoded[key] = KeyCodec(table.info.key_schema).encode(batch).to_pylist()[0]
    return found
