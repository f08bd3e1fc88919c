"""Several changes that take effect together.

Rule 1: nothing is sent before the block ends, and then all of it as one entry of the log; after an error in the block,
nothing is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from marble.database.arguments import is_one_key, key_batch, one_batch, row_batch
from marble.database.backend import Backend
from marble.database.table import Table, delete_range
from marble.database.window import outcome
from marble.errors import UsageError
from marble.requests import TableChange
from marble.schema import TableInfo
from marble.types import EntryKind


class Transaction:
    """Collects changes of any tables; leaving the ``with`` block makes them, in order, at one index, or none of them.

    Tables are given as `Table` or by name. Either all are replicated or none is. It is not for reading: what it
    will write cannot be seen before. Not thread-safe.

    Attributes
    ----------
    index
        The index at which all is committed, durable on a majority, and visible; None before, and if there was nothing to do.
    """

    def __init__(self, backend: Backend, find: Callable[[str], Table]) -> None:
        self._backend = backend
        self._find = find
        self._operations: list[TableChange] | None = None
        self.index: int | None = None

    def write(self, table: Table | str, data: object) -> None:
        """Upsert rows, as `Table.write` does; several batches are joined into one."""
        info = self._table(table)
        self._add(TableChange(EntryKind.WRITE, info, row_batch(info, one_batch(data))))

    def delete(self, table: Table | str, keys: object) -> None:
        """Delete rows by their keys, as `Table.delete` does."""
        info = self._table(table)
        self._add(TableChange(EntryKind.DELETE, info, key_batch(info, [keys] if is_one_key(info, keys) else keys)))

    def delete_range(self, table: Table | str, *, prefix: object = None, between: object = None) -> None:
        """Delete a range of keys, as `Table.delete_range` does."""
        self._add(delete_range(self._table(table), prefix, between))

    def _table(self, table: Table | str) -> TableInfo:
        return (table if isinstance(table, Table) else self._find(table)).info

    def _add(self, operation: TableChange) -> None:
        if self._operations is None:
            raise UsageError("a transaction takes changes inside of its block: with db.transaction() as t: ...")
        if self._operations and self._operations[0].table.local != operation.table.local:
            raise UsageError(
                f"table {operation.table.name!r}: replicated tables and local ones cannot change in one transaction"
            )
        self._operations.append(operation)

    def __enter__(self) -> Transaction:
        if self._operations is not None or self.index is not None:
            raise UsageError("a transaction is used once: begin another one")
        self._operations = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        operations, self._operations = self._operations, None
        if error is None and operations:
            self.index = outcome(self._backend.change(operations))
