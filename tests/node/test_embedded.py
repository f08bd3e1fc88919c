"""A database in this process: what `marble.open` promises, on a real directory."""

from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

import marble
from marble.database import Table
from marble.errors import CorruptionError, InvariantError, UnavailableError, UsageError
from marble.identity import seal

SCHEMA = pa.schema([pa.field("id", pa.int64()), pa.field("name", pa.string())])
DEADLINE_S = 30.0


def rows(first: int, count: int, name: str = "n") -> pa.RecordBatch:
    return pa.record_batch(
        {"id": range(first, first + count), "name": [f"{name}{i}" for i in range(count)]}, schema=SCHEMA
    )


def test_what_was_written_is_read_and_survives_a_restart(tmp_path: Path) -> None:
    with marble.open(tmp_path) as db:
        table = db.create_table("t", SCHEMA, key=["id"])
        first = table.write(rows(0, 10))
        second = table.write(rows(5, 10, "new"))
        assert second > first
        table.delete([0, 1])
        before = table.scan().to_table()
    assert before["id"].to_pylist() == list(range(2, 15))
    with marble.open(tmp_path) as db:
        table = db.table("t")
        assert table.scan().to_table().equals(before)
        assert table.get(7) == {"id": 7, "name": "new2"}
        assert table.get(0) is None
        assert table.get_many([14, 0, 2])["name"].to_pylist() == ["new9", None, "n2"]


def test_each_look_up_sees_what_was_written_before_it_and_no_table_but_its_own(tmp_path: Path) -> None:
    other = pa.schema([pa.field("id", pa.string()), pa.field("n", pa.int8())])
    db = marble.open(tmp_path)
    with db:
        table = db.create_table("t", SCHEMA, key=["id"])
        for i in range(4):
            table.write(rows(7, 1, f"n{i}-"))
            assert table.get(7) == table.get((7,)) == table.get({"id": 7}) == {"id": 7, "name": f"n{i}-0"}
            assert table.scan(filter=pc.field("id") == 7).to_table().to_pylist() == [{"id": 7, "name": f"n{i}-0"}]
            table.delete([7])
            assert table.get(7) is None
            assert table.get(7, consistency="local") is None
        with pytest.raises(UsageError, match="consistency must be"):
            table.get(7, consistency="eventual")  # type: ignore[arg-type]
        db.drop_table("t")
        again = db.create_table("t", other, key=["id"])
        again.write(pa.RecordBatch.from_pylist([{"id": "7", "n": 1}], other))
        assert again.get("7") == {"id": "7", "n": 1}
        with pytest.raises(UsageError):
            again.get(7)
        for call in (lambda: table.get(7), lambda: table.scan(filter=pc.field("id") == 7).to_table()):
            with pytest.raises(UsageError, match="no table"):
                call()
    with pytest.raises(UsageError, match="closed"):
        again.get("7")


def test_scan_chooses_columns_and_rows_and_speaks_the_c_stream(tmp_path: Path) -> None:
    with marble.open(tmp_path) as db:
        table = db.create_table("t", SCHEMA, key=["id"])
        table.write(rows(0, 100))
        scan = table.scan(columns=["name"], filter=pc.field("id") >= 98)
        assert scan.to_table().to_pydict() == {"name": ["n98", "n99"]}
        assert pa.table(scan).num_rows == 2


def test_anything_with_an_arrow_stream_can_be_written(tmp_path: Path) -> None:
    class Foreign:
        def __arrow_c_stream__(self, requested_schema: object = None) -> object:
            return pa.Table.from_batches([rows(0, 3), rows(3, 3)]).__arrow_c_stream__(requested_schema)

    with marble.open(tmp_path) as db:
        table = db.create_table("t", SCHEMA, key=["id"])
        table.write(Foreign())
        assert table.scan().count_rows() == 6


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    with marble.open(tmp_path) as db:
        table = db.create_table("t", SCHEMA, key=["id"])

        def work(first: int) -> None:
            for offset in range(0, 50, 10):
                table.write(rows(first + offset, 10))

        threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert table.scan().count_rows() == 8 * 50


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with marble.open(tmp_path), pytest.raises(UnavailableError, match="in use"):
        marble.open(tmp_path)
    marble.open(tmp_path).close()


def test_a_directory_of_another_node_is_refused(tmp_path: Path) -> None:
    marble.open(tmp_path).close()
    identity = tmp_path / "identity.json"
    identity.write_bytes(seal({**json.loads(identity.read_bytes()), "cluster_id": "elsewhere"}))
    with pytest.raises(UsageError, match="elsewhere"):
        marble.open(tmp_path)


def test_a_log_without_identity_is_refused(tmp_path: Path) -> None:
    marble.open(tmp_path).close()
    (tmp_path / "identity.json").unlink()
    with pytest.raises(CorruptionError, match="identity"):
        marble.open(tmp_path)


def test_a_log_with_a_limit_is_purged_behind_snapshots(tmp_path: Path) -> None:
    limit = 400_000
    with marble.open(tmp_path, max_log_size=limit) as db:
        table = db.create_table("t", SCHEMA, key=["id"])
        for count in range(400):
            while True:
                try:
                    table.write(rows(count % 10 * 100, 100))
                except UnavailableError:
                    continue  # The writer is faster than the snapshots: what the error says is to retry.
                break
            assert db.status()["log_bytes"] < 2 * limit
        assert db.status()["purged_index"] > 0
        before = table.scan().to_table()
    with marble.open(tmp_path, max_log_size=limit) as db:
        assert db.table("t").scan().to_table().equals(before)


def test_a_full_log_refuses_writes_and_stays_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with marble.open(tmp_path, max_log_size=20_000) as db:
        table = db.create_table("t", SCHEMA, key=["id"])
        written = 0

        def fill() -> None:
            nonlocal written
            while table.write(rows(written * 100, 100)):
                written += 1

        with monkeypatch.context() as broken:
            broken.setattr("marble.logstore.snapshots.SnapshotStore.write", full)
            with pytest.raises(UnavailableError, match="max_log_size"):
                fill()
        assert 0 < written < 1000
        assert table.scan().count_rows() == written * 100


def test_a_batch_above_the_limit_is_refused_whole(tmp_path: Path) -> None:
    with marble.open(tmp_path, max_entry_size=4096) as db:
        table = db.create_table("t", SCHEMA, key=["id"])
        with pytest.raises(UsageError, match="max_entry_size"):
            table.write(rows(0, 10_000))
        assert table.scan().count_rows() == 0
        table.write(rows(0, 10))


def test_after_a_failed_sync_nothing_is_acknowledged_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db = marble.open(tmp_path)
    table = db.create_table("t", SCHEMA, key=["id"])
    table.write(rows(0, 1))

    def fail(self: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr("marble.env.SystemAppendFile.sync", fail)
        with pytest.raises((InvariantError, marble.OutcomeUnknownError)):
            table.write(rows(1, 1))
    # The disk works again; the node must not: the next sync would succeed and mean nothing.
    with pytest.raises(InvariantError):
        table.write(rows(2, 1))
    db.close()
    with marble.open(tmp_path) as db:
        assert db.table("t").get(0) is not None
        assert db.table("t").get(2) is None


def test_calls_after_close_say_so(tmp_path: Path) -> None:
    db = marble.open(tmp_path)
    table = db.create_table("t", SCHEMA, key=["id"])
    db.close()
    db.close()
    with pytest.raises(UsageError, match="closed"):
        table.write(rows(0, 1))
    with pytest.raises(UsageError, match="closed"):
        table.get(1)


def test_no_thread_is_left_behind(tmp_path: Path) -> None:
    with marble.open(tmp_path) as db:
        db.create_table("t", SCHEMA, key=["id"]).write(rows(0, 1))
        assert {thread.name for thread in threading.enumerate() if thread.name.startswith("marble-")} == {
            "marble-engine-1",
            "marble-log-1",
            "marble-apply-1",
            "marble-snapshot-1",
            "marble-compact-1",
        }
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("marble-")]


@pytest.mark.parametrize(
    "call",
    [lambda table: table.write(rows(0, 1)), lambda table: table.get(0), lambda table: table.get_many([0])],
    ids=["write", "get", "get_many"],
)
def test_a_forked_child_is_told_instead_of_hanging(tmp_path: Path, call: Callable[[Table], object]) -> None:
    with marble.open(tmp_path) as db:
        table = db.create_table("t", SCHEMA, key=["id"])
        table.write(rows(0, 1))
        assert table.get(0) is not None
        child = os.fork()
        if child == 0:
            # In the child: leave without pytest's or the parent's clean-up, whatever happens.
            try:
                call(table)
            except UsageError as error:
                os._exit(7 if "fork" in str(error) else 8)
            finally:
                os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        table.write(rows(0, 1))


def test_a_node_that_stopped_by_itself_answers_nothing_any_more(tmp_path: Path) -> None:
    with marble.open(tmp_path) as db:
        table = db.create_table("t", SCHEMA, key=["id"])
        assert table.get(1) is None
        node = db._backend.node
        node.fail(RuntimeError("the sky fell"))
        assert node.stopped.wait(DEADLINE_S)
        for read in (lambda: table.get(1), lambda: table.get_many([1])):
            with pytest.raises(InvariantError, match="the sky fell"):
                read()


def test_a_database_that_is_dropped_gives_its_directory_back(tmp_path: Path) -> None:
    db = marble.open(tmp_path)
    table = db.create_table("t", SCHEMA, key=["id"])
    del db
    gc.collect()
    # The table is in use still, and with it the database.
    table.write(rows(0, 1))
    del table
    gc.collect()
    with marble.open(tmp_path) as again:
        assert again.table("t").count_rows() == 1


def test_an_impossible_directory_is_the_callers_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot be a data directory"):
        marble.open(tmp_path / "file" / "data")
