"""The seam between the tables that a user sees and what carries out their calls, and the checks that stand before it.

Rule 1: whatever differs between one process and a cluster stands behind `Backend`; nothing else here knows of either.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Final, Literal, Protocol, get_args, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc

from marble._core.expression import expression_type
from marble.errors import UsageError
from marble.requests import ScanRequest, TableChange
from marble.schema import TableInfo, nearest
from marble.table_options import TableOptions
from marble.types import INDEX_MAX

Consistency = Literal["linearizable", "local"]
"""``linearizable``: a read sees every write that was acknowledged anywhere before the read began (Raft §8).
``local``: the read sees some state that the asked replica has reached, without asking anyone else."""


class Backend(Protocol):
    """What carries out the calls on a database: an embedded node, or a client of a cluster. Thread-safe.

    Arguments have been checked against the table as the caller knew it; the backend checks sizes (`UsageError` above
    ``max_entry_size``), and the replicas check everything again when they apply it. Futures always complete, with one
    of the errors of `marble.errors` where they fail. Entries of one thread are ordered as it called.
    """

    def create_table(
        self, name: str, schema: pa.Schema, key: Sequence[str], options: TableOptions, local: bool
    ) -> TableInfo:
        """Return the table once its creation is applied; also if it exists with the same definition.

        `local`: not replicated. Raises UsageError where there is no place for such tables.
        """
        ...

    def drop_table(self, table: TableInfo) -> int:
        """Return the index at which it is gone."""
        ...

    def tables(self) -> Sequence[TableInfo]:
        """All tables, in order of their names (linearizable)."""
        ...

    def find(self, name: str) -> TableInfo | None:
        """The table `name`, if there is one (linearizable)."""
        ...

    def write(self, table: TableInfo, batch: pa.RecordBatch) -> Future[int]:
        """Upsert `batch` (of the table's schema). The future gives the index once it is committed, durable and applied.

        Raises UnavailableError at once if no more can be accepted now; then nothing of the batch was replicated.
        """
        ...

    def delete(self, table: TableInfo, keys: pa.RecordBatch) -> Future[int]:
        """Delete by `keys` (of the table's key schema). Like `write`."""
        ...

    def change(self, changes: Sequence[TableChange]) -> Future[int]:
        """Do all of these at one index, or none. Their tables are all replicated, or all local. Like `write`."""
        ...

    def get_many(
        self, table: TableInfo, keys: pa.RecordBatch, consistency: Consistency, at_index: int | None
    ) -> pa.RecordBatch:
        """One row of `TableInfo.lookup_schema` for each of `keys` (of the table's key schema), in their order.

        Where no row has the key, every column is null, the key columns too. `at_index`: as of after that entry.
        """
        ...

    def scan(self, table: TableInfo, request: ScanRequest) -> pa.RecordBatchReader:
        """The rows of one state of the table in key order; `check_scan` has accepted what `request` asks for."""
        ...

    def status(self) -> dict[str, object]: ...

    def checkpoint(self, path: str | os.PathLike[str]) -> int:
        """See `Database.checkpoint`."""
        ...

    def close(self) -> None:
        """Idempotent. Later calls raise UsageError."""
        ...


@runtime_checkable
class NearBackend(Protocol):
    """A `Backend` of this process, which has a shorter way to one row than through batches."""

    def get_row(
        self, table: TableInfo, names: tuple[str, ...], key: tuple[object, ...], consistency: Consistency
    ) -> dict[str, object] | Literal[False] | None:
        """The row with the `key` (values in key order, of any types), its columns called `names`; None if there is none.

        False if this key must go through `Backend.get_many`; nothing has been checked of it then.
        """
        ...


def check_scan(
    table: TableInfo,
    columns: Sequence[str] | None,
    filter: pc.Expression | None,  # noqa: A002
) -> pa.Schema:
    """Check the projection and filter of a scan, and return the schema of its result.

    Raises
    ------
    UsageError
        For an unknown or repeated column, an empty projection, or a filter that is no boolean expression over the
        table.
    """
    where = f"table {table.name!r}"
    schema = table.schema
    if columns is not None:
        if isinstance(columns, str) or not isinstance(columns, Sequence) or not columns:
            raise UsageError(f"{where}: columns must be a list of at least one name, got {columns!r}")
        for name in columns:
            if name not in schema.names:
                raise UsageError(f"{where} has no column {name!r}{nearest(str(name), schema.names)}")
        if len(set(columns)) < len(columns):
            raise UsageError(f"{where}: a column stands twice in columns={list(columns)}")
    if filter is not None:
        if not isinstance(filter, pc.Expression):
            raise UsageError(
                f"{where}: the filter must be a pyarrow.compute.Expression such as pc.field('a') > 1, "
                f"got {type(filter).__name__}"
            )
        try:
            made = expression_type(filter, schema)
        except UsageError as error:
            raise UsageError(f"{where}: the filter does not fit the table: {error}") from error
        if made != pa.bool_():
            raise UsageError(f"{where}: the filter does not fit the table: it is {made} and not true or false")
    return schema if columns is None else pa.schema([schema.field(name) for name in columns])


def check_count(value: object, what: str, least: int = 0) -> int | None:
    """Return `value` if it is None or a whole number from `least` on, else raise UsageError."""
    if value is not None and (type(value) is not int or not least <= value <= INDEX_MAX):
        raise UsageError(f"{what} must be a whole number from {least}, or None, not {value!r}")
    return value


_CONSISTENCIES: Final[dict[str, Consistency]] = {known: known for known in get_args(Consistency)}


def check_consistency(consistency: str) -> Consistency:
    """Return `consistency` if it is one, else raise UsageError."""
    known = _CONSISTENCIES.get(consistency) if isinstance(consistency, str) else None
    if known is not None:
        return known
    raise UsageError(f"consistency must be one of {', '.join(map(repr, get_args(Consistency)))}, got {consistency!r}")
