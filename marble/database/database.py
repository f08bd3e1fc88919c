"""Databases as a user sees them: the same class over an embedded node and over a cluster.

Thread safety: a `Database` may be used from many threads at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import TracebackType

import pyarrow as pa

from marble.database.backend import Backend
from marble.database.table import Table
from marble.database.transaction import Transaction
from marble.errors import UsageError
from marble.schema import TableInfo, check_table, check_table_name, nearest
from marble.table_options import TableOptions, check_options


class Database:
    """Replicated Arrow tables by name. A context manager: leaving it closes it.

    Made by `marble.open` (embedded) and `marble.connect` (a cluster).
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def create_table(
        self,
        name: str,
        schema: pa.Schema,
        key: Sequence[str],
        *,
        exist_ok: bool = False,
        merge: Mapping[str, str] | None = None,
        ttl: float | timedelta | None = None,
        ttl_column: str | None = None,
        ttl_stamped: bool = False,
        compression: str | None = None,
        replicated: bool = True,
    ) -> Table:
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
            Accept a table of the same name if its definition is the same.
        merge
            For state that only accumulates: an operator for each column that has one, out of ``"sum"``, ``"min"``, ``"max"``,
            ``"count"``, ``"append"`` and ``"last"``. A write then merges its rows into those with the same keys, instead of
            replacing them; columns without operator are replaced. See `marble.lsm.merge`.
        ttl
            How long a row lives, in seconds or as a timedelta, after the time in its `ttl_column`. Time goes by the highest
            time of any entry of the log, so that a row is gone on all replicas at the same index.
        ttl_column
            A timestamp, a date, or an int64 of microseconds since 1970 UTC. Rows without a time stay.
        ttl_stamped
            Let `ttl_column` be the time of the entry that wrote the row, so that a row lives `ttl` after it was last written.
            Writers may leave the column out.
        compression
            ``"lz4"`` or ``"zstd"`` for files that are seldom written anew. None: uncompressed, mapped as they are.
        replicated
            False: a table of this process alone, in the same log; not for clients of a cluster.

        Raises
        ------
        UsageError
            If the definition is not allowed (see `marble.schema.check_table` and `marble.table_options.check_options`), or
            the name is taken.
        """
        if not isinstance(schema, pa.Schema) and hasattr(schema, "__arrow_c_schema__"):
            schema = pa.schema(schema)
        stored, key = check_table(name, schema, key)
        options = check_options(
            name, stored, key, _options(name, stored, merge, ttl, ttl_column, ttl_stamped, compression)
        )
        existing = self._backend.find(name)
        same = existing is not None and existing.same_definition(stored, key, options) and existing.local != replicated
        if existing is not None and not (exist_ok and same):
            advice = (
                "it differs in schema, key or options" if exist_ok else "open it with table(), or pass exist_ok=True"
            )
            raise UsageError(f"table {name!r} exists already: {advice}")
        return Table(self._backend, existing or self._backend.create_table(name, stored, key, options, not replicated))

    def table(self, name: str) -> Table:
        """The table `name`. Raises UsageError, with the nearest name, if there is none."""
        check_table_name(name)
        info = self._backend.find(name)
        if info is None:
            raise UsageError(f"there is no table {name!r}{nearest(name, [each.name for each in self.tables()])}")
        return Table(self._backend, info)

    def tables(self) -> list[TableInfo]:
        """All tables, in order of their names."""
        return list(self._backend.tables())

    def drop_table(self, name: str) -> int:
        """Drop `name` with all its rows. Returns the index at which that is committed and durable."""
        return self._backend.drop_table(self.table(name).info)

    def transaction(self) -> Transaction:
        """Several changes that take effect at one index, all or none. See `Transaction`.

        ::

            with db.transaction() as t:
                t.write("state", rows)
                t.write("offsets", offsets)
        """
        return Transaction(self._backend, self.table)

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


def _options(
    name: str,
    schema: pa.Schema,
    merge: Mapping[str, str] | None,
    ttl: float | timedelta | None,
    ttl_column: str | None,
    ttl_stamped: bool,
    compression: str | None,
) -> TableOptions:
    """What the caller of `create_table` wants, still to be checked."""
    operators = dict(merge or {})
    for column in operators:
        if column not in schema.names:
            raise UsageError(f"table {name!r} has no column {column!r} to merge{nearest(str(column), schema.names)}")
    ordered = tuple((column, operators[column]) for column in schema.names if column in operators)
    if ttl is not None and ttl_column is None:
        raise UsageError(f"table {name!r}: a ttl needs a ttl_column, which says since when a row lives")
    if ttl is None:
        if ttl_column is not None:
            raise UsageError(f"table {name!r}: a ttl_column needs a ttl: how long rows live, in seconds")
        return TableOptions(compression, merge=ordered)
    try:
        lives = ttl if isinstance(ttl, timedelta) else timedelta(seconds=ttl)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"table {name!r}: a ttl is a number of seconds or a timedelta, not {ttl!r}") from None
    return TableOptions(compression, ttl_column, lives // timedelta(microseconds=1), bool(ttl_stamped), ordered)
