"""Tables that are not replicated: a second group of one node alone, in the same log."""

from __future__ import annotations

import functools
from pathlib import Path

import pyarrow as pa
import pytest

import marble
import marble.local
from marble.errors import UnavailableError, UsageError

SCHEMA = pa.schema([pa.field("id", pa.int64()), pa.field("name", pa.string())])


def rows(first: int, count: int, name: str = "n") -> pa.RecordBatch:
    return pa.record_batch(
        {"id": range(first, first + count), "name": [f"{name}{i}" for i in range(count)]}, schema=SCHEMA
    )


def test_they_stand_beside_the_others_and_survive_a_restart(tmp_path: Path) -> None:
    with marble.open(tmp_path) as db:
        db.create_table("all", SCHEMA, ["id"]).write(rows(0, 3, "all"))
        mine = db.create_table("mine", SCHEMA, ["id"], replicated=False)
        mine.write(rows(0, 5, "mine"))
        mine.delete([4])
        assert mine.info.local
        assert [(each.name, each.local) for each in db.tables()] == [("all", False), ("mine", True)]
        assert (mine.info.id, db.table("all").info.id) == (1, 1)
    with marble.open(tmp_path) as db:
        assert db.table("mine").scan(["name"], reverse=True).to_table()["name"].to_pylist() == [
            "mine3",
            "mine2",
            "mine1",
            "mine0",
        ]
        assert db.table("all").count_rows() == 3
        db.drop_table("mine")
        assert [each.name for each in db.tables()] == ["all"]


def test_a_name_means_one_table(tmp_path: Path) -> None:
    with marble.open(tmp_path) as db:
        db.create_table("a", SCHEMA, ["id"])
        db.create_table("b", SCHEMA, ["id"], replicated=False)
        for name, replicated in (("a", False), ("b", True)):
            with pytest.raises(UsageError, match="exists already"):
                db.create_table(name, SCHEMA, ["id"], replicated=replicated, exist_ok=True)
        assert db.create_table("b", SCHEMA, ["id"], replicated=False, exist_ok=True).info.local


def test_a_transaction_is_of_one_kind(tmp_path: Path) -> None:
    with marble.open(tmp_path) as db:
        shared = db.create_table("all", SCHEMA, ["id"])
        mine = db.create_table("mine", SCHEMA, ["id"], replicated=False)
        with db.transaction() as t:
            t.write(mine, rows(0, 2))
            t.write("mine", rows(5, 1))
            with pytest.raises(UsageError, match="cannot change in one transaction"):
                t.write(shared, rows(0, 1))
        assert mine.count_rows() == 3
        assert shared.count_rows() == 0


def test_past_states_are_kept_for_both(tmp_path: Path) -> None:
    with marble.open(tmp_path, retention=10) as db:
        for replicated in (True, False):
            table = db.create_table(f"t{replicated}", SCHEMA, ["id"], replicated=replicated)
            first = table.write(rows(0, 1, "old"))
            table.write(rows(0, 1, "new"))
            assert table.get(0, at_index=first) == {"id": 0, "name": "old0"}
            assert table.get(0) == {"id": 0, "name": "new0"}


@pytest.mark.parametrize("busy", [True, False])
def test_a_group_that_rests_does_not_hold_the_log(tmp_path: Path, busy: bool) -> None:
    limit = 300_000
    with marble.open(tmp_path, max_log_size=limit) as db:
        resting = db.create_table("resting", SCHEMA, ["id"], replicated=not busy)
        resting.write(rows(0, 10))
        table = db.create_table("busy", SCHEMA, ["id"], replicated=busy)
        written = 0
        while written < 10 * limit:
            try:
                table.write(rows(0, 1000))
            except UnavailableError:
                continue  # The writer is faster than the snapshots: what the error says is to retry.
            written += 16_000
            assert db.status()["log_bytes"] < 2 * limit
    with marble.open(tmp_path, max_log_size=limit) as db:
        assert db.table("resting").count_rows() == 10
        assert db.table("busy").count_rows() == 1000


def test_a_group_that_rests_does_not_hold_the_log_over_short_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No life writes enough for the group of local tables, which has but an entry for each of them, to let go.
    small = functools.partial(marble.local.NodeOptions, snapshot_log_bytes=1_000_000, segment_bytes_max=16_384)
    monkeypatch.setattr(marble.local, "NodeOptions", small)
    for _ in range(6):
        with marble.open(tmp_path, snapshot_distance=50) as db:
            table = db.create_table("busy", SCHEMA, ["id"], exist_ok=True)
            for future in [table.write_async(rows(0, 200)) for _ in range(60)]:
                future.result(30)
            db._backend.node.snapshot().result(30)  # The next life has nothing to replay, and so to count as its own.
    with marble.open(tmp_path, snapshot_distance=50) as db:
        table, before = db.table("busy"), db.status()["log_bytes"]
        # A thousand rows are about half of what lets a group go that rests: this life alone does not do it.
        for _ in range(1000):
            table.write(rows(0, 1))
            if db.status()["log_bytes"] < before:
                break
        else:
            pytest.fail(f"the log has {before} bytes and keeps them")
