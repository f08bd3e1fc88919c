"""Databases as a user sees them: the same class over an embedded node and over a cluster.

Thread safety: a `Database` may be used from many threads at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType

import pyarrow as pa

from marble.database.backend import Backend
from marble.database.table import Table
from marble.errors import UsageError
from marble.schema import TableInfo, check_table, check_table_name, nearest


class Database:
    """Replicated Arrow tables by name. A context manager: leaving it closes it.

    Made by `marble.open` (embedded) and `marble.connect` (a cluster).
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def create_table(self, name: str, schema: pa.Schema, key: Sequence[str], *, exist_ok: bool = False) -> Table:
        """Create a table on all replicas and return it once that is committed and durable.

        Parameters
        ----------
        name
            A letter or underscore, then up to 127 letters, digits, ``_``, ``-`` or single dots.
        schema
            The columns: a `pyarrow.Schema` or anything with ``__arrow_c_schema__``. Its metadata is dropped.
        key
            The columns of the primary key, in the order in which rows are sorted.
        exist_ok
            Accept a table of the same name if its schema and key are the same.

        Raises
        ------
        UsageError
            If the definition is not allowed (see `marble.schema.check_table`), or the name is taken.
        """
        if not isinstance(schema, pa.Schema) and hasattr(schema, "__arrow_c_schema__"):
            schema = pa.schema(schema)
        stored, key = check_table(name, schema, key)
        existing = self._find(name)
        if existing is not None and not (exist_ok and existing.same_definition(stored, key)):
            advice = "it differs in schema or key" if exist_ok else "open it with table(), or pass exist_ok=True"
            raise UsageError(f"table {name!r} exists already: {advice}")
        return Table(self._backend, existing or self._backend.create_table(name, stored, key))

    def table(self, name: str) -> Table:
        """The table `name`. Raises UsageError, with the nearest name, if there is none."""
        check_table_name(name)
        info = self._find(name)
        if info is None:
            raise UsageError(f"there is no table {name!r}{nearest(name, [each.name for each in self.tables()])}")
        return Table(self._backend, info)

    def _find(self, name: str) -> TableInfo | None:
        return next((info for info in self._backend.tables() if info.name == name), None)

    def tables(self) -> list[TableInfo]:
        """All tables, in order of their names."""
        return list(self._backend.tables())

    def drop_table(self, name: str) -> int:
        """Drop `name` with all its rows. Returns the index at which that is committed and durable."""
        return self._backend.drop_table(self.table(name).name)

    def status(self) -> dict[str, object]:
        """What the node, or the cluster as far as this client sees it, says of itself."""
        return self._backend.status()

    def checkpoint(self, path: str | os.PathLike[str]) -> int:
        """Make a copy of all tables as they are on the disk now, while reads and writes go on.

        The files are linked, not copied, so it takes milliseconds and hardly any room at first. Every write that has returned is in it.
        To use it, restore it (``marble restore``), which makes the directory of a new cluster.

        Parameters
        ----------
        path
            A new directory on the same file system as the database.

        Returns
        -------
        int
            Bytes in it, those that it shares with the database included.

        Raises
        ------
        UsageError
            `path` exists or cannot be made, or the data are in another process.
        """
        return self._backend.checkpoint(path)

    def close(self) -> None:
        """Give everything back. Idempotent; later calls on the database and its tables raise UsageError."""
        self._backend.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
