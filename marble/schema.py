"""Arrow schemas: the row of the log, and what a table may be made of.

Rule 1: the rules for names, types and rows stand here once. The caller's side applies them so that a mistake costs
nothing; every replica applies them again when an entry is applied, because an entry may come from anyone. They are
therefore part of the replicated state machine: they look at nothing but their arguments, and a change to them needs a
new format version.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from marble.errors import UsageError
from marble.table_options import DEFAULT_OPTIONS, TableOptions


def _column(name: str, type_: pa.DataType) -> pa.Field:
    return pa.field(name, type_, nullable=False)


ENTRY_SCHEMA: Final = pa.schema(
    [
        _column("group", pa.uint32()),
        _column("index", pa.uint64()),
        _column("term", pa.uint64()),
        _column("kind", pa.uint8()),
        _column("session", pa.uint64()),
        _column("sequence", pa.uint64()),
        _column("time_us", pa.uint64()),
        _column("table", pa.uint32()),
        _column("checksum", pa.uint64()),
        _column("payload", pa.binary()),
    ]
)
"""One row is one log entry (or, with kind HARD_STATE or SNAPSHOT, something else that `EntryKind` describes).

``group``, ``index``, ``term`` and ``time_us`` are given by the leader; the rest by the proposer. ``checksum`` is the
proposer's: it covers kind, session, sequence, table and payload, and travels with the entry to every disk and memtable.
``time_us`` is when the leader took the entry in: microseconds since 1970 UTC on its clock, up to INDEX_MAX. It may go
back from one entry to the next; who applies entries takes the latest so far. 0 in a HARD_STATE or SNAPSHOT."""

TABLE_NAME_BYTES_MAX: Final = 128
COLUMN_NAME_BYTES_MAX: Final = 256
COLUMNS_MAX: Final = 1024
FIELDS_MAX: Final = 4096  # With the fields nested in columns.
NESTING_LEVELS_MAX: Final = 16
"""Deep enough for any real table, shallow enough that no recursion over a type can exhaust the stack."""

_TABLE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}", re.ASCII)

# Not str.isprintable(): that follows the interpreter's Unicode. Files have columns of our own, _marble_... (docs/lsm.md).
_REFUSED: Final = re.compile("^_marble_|[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff]")

_LEAVES: Final[tuple[Callable[[pa.DataType], bool], ...]] = (
    pt.is_boolean,
    pt.is_integer,
    pt.is_floating,
    pt.is_decimal,
    pt.is_date,
    pt.is_time,
    pt.is_timestamp,
    pt.is_duration,
    pt.is_interval,
    pt.is_string,
    pt.is_large_string,
    pt.is_binary,
    pt.is_large_binary,
    pt.is_fixed_size_binary,
)

_KEYS: Final[tuple[Callable[[pa.DataType], bool], ...]] = (
    pt.is_boolean,
    pt.is_integer,
    pt.is_float32,
    pt.is_float64,
    pt.is_decimal,
    pt.is_date,
    pt.is_time,
    pt.is_timestamp,
    pt.is_duration,
    pt.is_string,
    pt.is_large_string,
    pt.is_binary,
    pt.is_large_binary,
    pt.is_fixed_size_binary,
)


@dataclass(frozen=True, slots=True)
class TableInfo:
    """What a table is: its place in the log, its name, its columns and its primary key.

    - ``id`` is given by the catalog when the creation is applied; it is at least 1 and never used again.
    - All else has passed `check_table` and `marble.table_options.check_options`.

    Attributes
    ----------
    schema, key
        The columns, without metadata; names of the key columns, in the order in which rows are sorted.
    local
        Whether it is this process's own: known here, and no part of what is replicated.
    key_schema, lookup_schema
        The key columns alone, in key order. Those of ``schema``, all nullable, since a row that is looked up may be missing.
    """

    id: int
    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    options: TableOptions = DEFAULT_OPTIONS
    local: bool = False
    key_schema: pa.Schema = dataclasses.field(init=False, repr=False, compare=False)
    lookup_schema: pa.Schema = dataclasses.field(init=False, repr=False, compare=False)
    _checked: tuple[tuple[int, pa.Field, bool], ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def keep(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        keep("key_schema", pa.schema([self.schema.field(name) for name in self.key]))
        keep("lookup_schema", pa.schema([field.with_nullable(True) for field in self.schema]))
        # Apply goes through many small batches: it passes over columns that may hold anything, and a count of nulls
        # says enough of the others, unless the flag is set.
        checked = [(i, field) for i, field in enumerate(self.schema) if field.name in self.key or _is_required(field)]
        flags = [_has_required_child(field.type) or pt.is_floating(field.type) for _, field in checked]
        keep("_checked", tuple((i, field, flag) for (i, field), flag in zip(checked, flags, strict=True)))

    def same_definition(self, schema: pa.Schema, key: Sequence[str], options: TableOptions = DEFAULT_OPTIONS) -> bool:
        """Whether `schema`, `key` (as `check_table` returned them) and `options` are those of this table."""
        return (self.key, self.options) == (tuple(key), options) and bool(self.schema.equals(schema))


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for an error message: the known name most like `name`, or all of a few, or nothing."""
    known = list(names)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    if 0 < len(known) <= 8:
        return "; there is " + ", ".join(repr(each) for each in known)
    return ""


def check_table_name(name: str) -> str:
    """Return `name` if a table may be called so, else raise UsageError."""
    if not isinstance(name, str) or _TABLE_NAME.fullmatch(name) is None or ".." in name:
        raise UsageError(
            f"{shown(name)} cannot be the name of a table: use a letter or underscore, then up to "
            f"{TABLE_NAME_BYTES_MAX - 1} letters, digits, '_', '-' or single dots"
        )
    return name


def check_table(name: str, schema: pa.Schema, key: Sequence[str]) -> tuple[pa.Schema, tuple[str, ...]]:
    """Check the definition of a table and return it in the form in which it is stored.

    It depends on nothing but its arguments, since every replica checks again when it applies the creation.

    Parameters
    ----------
    name
        See `check_table_name`.
    schema
        1 to `COLUMNS_MAX` columns. Metadata is dropped.
    key
        Names of at least one column, of types that have an order.

    Returns
    -------
    tuple
        The schema without metadata, and the key as a tuple.

    Raises
    ------
    UsageError
        Naming the table, the column and what to do instead.
    """
    check_table_name(name)
    if not isinstance(schema, pa.Schema):
        raise UsageError(f"table {name!r}: the schema must be a pyarrow.Schema, got {type(schema).__name__}")
    if not 1 <= len(schema) <= COLUMNS_MAX:
        raise UsageError(f"table {name!r}: a table has 1 to {COLUMNS_MAX} columns, this schema has {len(schema)}")
    _check_names(schema.names, f"table {name!r}")
    fields_left = [FIELDS_MAX]
    types = [_stored_type(each.type, f"table {name!r}, column {each.name!r}", 1, fields_left) for each in schema]
    fields = [pa.field(each.name, type_, each.nullable) for each, type_ in zip(schema, types, strict=True)]
    stored = pa.schema(fields)
    return stored, _check_key(name, stored, key)


def _check_key(name: str, schema: pa.Schema, key: Sequence[str]) -> tuple[str, ...]:
    if isinstance(key, str) or not isinstance(key, Sequence) or not all(isinstance(column, str) for column in key):
        raise UsageError(f"table {name!r}: the key must be a list of column names such as ['id'], got {shown(key)}")
    if not key:
        raise UsageError(f"table {name!r}: name at least one key column, e.g. key=[{schema.names[0]!r}]")
    if len(set(key)) < len(key):
        raise UsageError(f"table {name!r}: a column stands twice in the key {shown(list(key))}")
    for column in key:
        if column not in schema.names:
            raise UsageError(
                f"table {name!r}: key column {shown(column)} is not in the schema{nearest(column, schema.names)}"
            )
        type_ = schema.field(column).type
        if not any(accepts(type_) for accepts in _KEYS):
            raise UsageError(
                f"table {name!r}: column {column!r} of type {type_} cannot be in the key: keys are booleans, "
                "numbers other than float16, decimals, dates, times, timestamps, durations, strings or binary"
            )
    return tuple(key)


def _check_names(names: Sequence[str], where: str) -> None:
    seen = set()
    for name in names:
        if not name or _REFUSED.search(name) or len(name.encode()) > COLUMN_NAME_BYTES_MAX:
            raise UsageError(
                f"{where}: {shown(name)} cannot be the name of a column: use 1 to {COLUMN_NAME_BYTES_MAX} "
                "bytes of UTF-8 without control characters, not beginning with '_marble_'"
            )
        if name in seen:
            raise UsageError(f"{where}: the name {name!r} stands twice; names of columns must differ")
        seen.add(name)


def _stored_type(type_: pa.DataType, where: str, level: int, fields_left: list[int]) -> pa.DataType:
    """`type_` without metadata in its nested fields, or UsageError if a table cannot hold it."""
    fields_left[0] -= 1
    if fields_left[0] < 0:
        raise UsageError(f"{where}: a table has at most {FIELDS_MAX} columns and nested fields together")
    if level > NESTING_LEVELS_MAX:
        raise UsageError(f"{where}: types nest at most {NESTING_LEVELS_MAX} levels deep")

    def nested(field: pa.Field) -> pa.Field:
        return pa.field(field.name, _stored_type(field.type, where, level + 1, fields_left), field.nullable)

    if isinstance(type_, pa.BaseExtensionType):
        raise UsageError(f"{where}: extension types such as {type_} cannot be stored: cast to {type_.storage_type}")
    if pt.is_struct(type_):
        children = [type_.field(i) for i in range(type_.num_fields)]
        if not children:
            raise UsageError(f"{where}: a struct needs at least one field")
        _check_names([child.name for child in children], where)
        return pa.struct([nested(child) for child in children])
    if pt.is_map(type_):
        return pa.map_(nested(type_.key_field), nested(type_.item_field), type_.keys_sorted)
    if pt.is_list(type_):
        return pa.list_(nested(type_.value_field))
    if pt.is_large_list(type_):
        return pa.large_list(nested(type_.value_field))
    if pt.is_fixed_size_list(type_) and type_.list_size > 0:
        return pa.list_(nested(type_.value_field), type_.list_size)
    if any(accepts(type_) for accepts in _LEAVES) and type_ != pa.binary(0):
        return type_
    raise UsageError(f"{where}: {type_} cannot be stored: {_advice(type_)}")


def _advice(type_: pa.DataType) -> str:
    if pt.is_dictionary(type_) or pt.is_run_end_encoded(type_):
        return f"cast to {type_.value_type}"
    if type_ == pa.string_view():
        return "cast to string or large_string"
    if type_ == pa.binary_view():
        return "cast to binary or large_binary"
    if pt.is_list_view(type_) or pt.is_large_list_view(type_):
        return "cast to list or large_list"
    if pt.is_union(type_):
        return "use a struct with one nullable field for each case"
    if pt.is_null(type_):
        return "give the column a type, even if it is always null"
    return "use another type"


def to_batches(data: object) -> Iterator[pa.RecordBatch]:
    """The batches of anything that speaks the Arrow PyCapsule protocol.

    Parameters
    ----------
    data
        A pyarrow RecordBatch, Table or RecordBatchReader, or any object with ``__arrow_c_stream__`` or
        ``__arrow_c_array__`` (polars, DuckDB, DataFusion, pandas).

    Raises
    ------
    UsageError
        If `data` is none of these, or its producer failed.
    """
    if isinstance(data, pa.RecordBatch):
        yield data
        return
    if isinstance(data, type) or not (hasattr(data, "__arrow_c_stream__") or hasattr(data, "__arrow_c_array__")):
        raise UsageError(
            f"cannot take a {type(data).__name__} as rows: pass a pyarrow RecordBatch or Table, a polars or DuckDB "
            "result, or anything else with __arrow_c_stream__; Python rows become one with "
            "pyarrow.RecordBatch.from_pylist(rows, schema)"
        )
    try:
        if isinstance(data, pa.Table):
            yield from data.to_batches()
        elif hasattr(data, "__arrow_c_stream__"):
            yield from pa.RecordBatchReader.from_stream(data)
        else:
            yield pa.record_batch(data)
    except (pa.ArrowException, TypeError) as error:
        raise UsageError(f"the {type(data).__name__} did not give a stream of rows: {error}") from error


def check_rows(batch: pa.RecordBatch, table: TableInfo) -> None:
    """Check what the schema alone cannot say of rows of `table`: nulls, and numbers that have no order.

    `batch` has the table's schema and has passed ``validate(full=True)``. Used by the caller and again by every replica
    at apply, so it depends on the data alone.

    Raises
    ------
    UsageError
        Naming the table, the column and the first row in question.
    """
    for position, field, look in table._checked:
        column = batch.column(position)
        if look or column.null_count:
            _check_column(column, field, table)


def check_keys(batch: pa.RecordBatch, table: TableInfo) -> None:
    """Like `check_rows`, for keys: `batch` has the table's key schema."""
    for column, field in zip(batch.columns, table.key_schema, strict=True):
        _check_column(column, field, table)


def _check_column(column: pa.Array, field: pa.Field, table: TableInfo) -> None:
    def wrong(what: str, mask: pa.BooleanArray, advice: str) -> UsageError:
        return UsageError(f"table {table.name!r}: column {field.name!r} {what} in row {_first(mask)}: {advice}")

    if field.name in table.key:
        if column.null_count:
            raise wrong("is in the key and is null", column.is_null(), "a key has no nulls")
        if pt.is_floating(field.type) and pc.any(column.is_nan()).as_py():
            raise wrong("is in the key and is NaN", column.is_nan(), "NaN has no order")
    elif not field.nullable and column.null_count:
        raise wrong("must not be null, but is", column.is_null(), "fill it")
    if _has_required_child(field.type):
        _check_children(column, f"table {table.name!r}: column {field.name!r}")


def _is_required(field: pa.Field) -> bool:
    return not field.nullable or _has_required_child(field.type)


def _first(mask: pa.BooleanArray) -> int:
    return int(pc.index(mask, True).as_py())


def _children(type_: pa.DataType) -> list[pa.Field]:
    # The keys of a map are never null: Arrow's own validation has seen to that.
    if pt.is_map(type_):
        return [type_.item_field]
    return [type_.field(i) for i in range(type_.num_fields)]


def _has_required_child(type_: pa.DataType) -> bool:
    return any(_is_required(child) for child in _children(type_))


def _check_children(column: pa.Array, where: str) -> None:
    """Look for nulls where a nested field forbids them, below rows that are themselves there."""
    if pt.is_struct(column.type):
        values = column.flatten() if column.null_count == 0 else column.drop_null().flatten()
    elif pt.is_map(column.type):
        entries = column.drop_null()
        values = [entries.items.slice(*_span(entries))]
    else:
        values = [column.drop_null().flatten()]
    for child, below in zip(_children(column.type), values, strict=True):
        if not child.nullable and below.null_count:
            raise UsageError(f"{where}: the nested field {child.name!r} must not be null, but is: fill it")
        if _has_required_child(child.type):
            _check_children(below, where)


def _span(maps: pa.MapArray) -> tuple[int, int]:
    """Where the entries of `maps` start in its child arrays, and how many they are."""
    if len(maps) == 0:
        return 0, 0
    first = maps.offsets[0].as_py()
    return first, maps.offsets[len(maps)].as_py() - first


def shown(name: object) -> str:
    """`name` for a message: escaped and cut, since it may be anything."""
    text = ascii(name)
    return text if len(text) <= 80 else text[:77] + "..."
