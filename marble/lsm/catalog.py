"""Which tables there are: an immutable value, replaced as a whole by each creation and removal.

Invariants:
- names and ids are each unique; ``id < next_id``; an id is never used again, so that an entry for a table that has been
  dropped can never reach another table of the same name;
- equal histories give equal catalogs: ids count upwards, and nothing depends on the order of a dict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import pyarrow as pa

from marble.errors import UsageError, check
from marble.schema import TableInfo, nearest
from marble.table_options import DEFAULT_OPTIONS, TableOptions

TABLES_MAX: Final = 4096
"""Each table costs memory on every replica, used or not; part of the state machine, so the same on all."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """All tables at one index. See the head of this file for its invariants."""

    next_id: int = 1
    by_name: Mapping[str, TableInfo] = field(default_factory=lambda: MappingProxyType({}))
    by_id: Mapping[int, TableInfo] = field(default_factory=lambda: MappingProxyType({}))

    @staticmethod
    def of(next_id: int, tables: Sequence[TableInfo]) -> Catalog:
        """A catalog of these tables, whose names and ids differ and whose ids are below `next_id`."""
        by_name = {info.name: info for info in tables}
        by_id = {info.id: info for info in tables}
        check(len(by_name) == len(by_id) == len(tables), "tables of a catalog share a name or an id")
        check(all(id_ < next_id for id_ in by_id), "the next id of a catalog has been used")
        return Catalog(next_id, MappingProxyType(by_name), MappingProxyType(by_id))

    def create(
        self, name: str, schema: pa.Schema, key: Sequence[str], options: TableOptions = DEFAULT_OPTIONS
    ) -> tuple[Catalog, TableInfo]:
        """This catalog with one more table, whose definition `check_table` and `check_options` have returned.

        A table that exists with the same definition is returned with the catalog unchanged.

        Raises
        ------
        UsageError
            If the name is taken by another definition, or there are `TABLES_MAX` tables.
        """
        existing = self.by_name.get(name)
        if existing is not None:
            if existing.same_definition(schema, key, options):
                return self, existing
            raise UsageError(f"table {name!r} exists already with another schema, key or options: choose another name")
        if len(self.by_name) >= TABLES_MAX:
            raise UsageError(f"table {name!r} cannot be created: there are {TABLES_MAX} tables already; drop one first")
        info = TableInfo(self.next_id, name, schema, tuple(key), options)
        return self._with({**self.by_name, name: info}, self.next_id + 1), info

    def drop(self, name: str) -> tuple[Catalog, TableInfo]:
        """This catalog without table `name`, and what that was. Raises UsageError if there is none."""
        info = self.get(name)
        return self._with({key: each for key, each in self.by_name.items() if key != name}, self.next_id), info

    def _with(self, tables: dict[str, TableInfo], next_id: int) -> Catalog:
        by_id = {info.id: info for info in tables.values()}
        return Catalog(next_id, MappingProxyType(tables), MappingProxyType(by_id))

    def get(self, table: str | int) -> TableInfo:
        """The table with this name or id. Raises UsageError, with the nearest name, if there is none."""
        info = self.by_name.get(table) if isinstance(table, str) else self.by_id.get(table)
        if info is not None:
            return info
        if isinstance(table, str):
            raise UsageError(f"there is no table {table!a}{nearest(table, sorted(self.by_name))}")
        raise UsageError(f"there is no table with id {table}: it has been dropped; look it up by name again")

    def tables(self) -> list[TableInfo]:
        """All tables, in order of their names."""
        return [self.by_name[name] for name in sorted(self.by_name)]
