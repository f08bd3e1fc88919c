"""Checkpoints of running nodes, backups, and new clusters made of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

import marble
from marble._core import entry_batch
from marble._core.entry_batch import Proposal
from marble.backup import backup, restore, verify_directory
from marble.checkpoint import CHECKPOINTS, KEPT_MAX, MANIFEST, Checkpoints
from marble.cli import main
from marble.database import Database, Table
from marble.env import SystemFiles
from marble.errors import CorruptionError, UnavailableError, UsageError
from marble.identity import IDENTITY_FILE
from marble.local import LocalBackend
from marble.logstore.log import Log
from marble.members import encode_members
from marble.types import EntryKind, HardState, Members

SCHEMA = pa.schema([pa.field("k", pa.int64(), nullable=False), pa.field("v", pa.string())])


def text(key: int) -> str:
    """Long enough that a table is worth a file."""
    return f"value {key} " + chr(97 + key % 26) * 1500


def rows(first: int, end: int) -> pa.RecordBatch:
    return pa.record_batch({"k": list(range(first, end)), "v": [text(key) for key in range(first, end)]}, SCHEMA)


def fill(table: Table, first: int, end: int, step: int = 5) -> None:
    for start in range(first, end, step):
        table.write(rows(start, min(end, start + step)))


def content(database: Database) -> dict[int, str]:
    found = database.table("t").scan().to_table()
    return dict(zip(found["k"].to_pylist(), found["v"].to_pylist(), strict=True))


def expected(end: int) -> dict[int, str]:
    return {key: text(key) for key in range(end)}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A database that was closed, with snapshots and a log behind them."""
    with marble.open(tmp_path / "data", snapshot_distance=10) as database:
        table = database.create_table("t", SCHEMA, ["k"])
        fill(table, 0, 190)
        # One that is still being written when the database is closed is given up.
        database._backend.node.snapshot().result(60)
        fill(table, 190, 200)
    return tmp_path / "data"


# -- checkpoints ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_what_was_there_at_that_moment(tmp_path: Path) -> None:
    with marble.open(tmp_path / "data", snapshot_distance=10) as database:
        table = database.create_table("t", SCHEMA, ["k"])
        fill(table, 0, 100)
        nbytes = database.checkpoint(tmp_path / "copy")
        fill(table, 100, 200)
        assert database.checkpoint(tmp_path / "later") > 0
        with pytest.raises(UsageError, match="exists already"):
            database.checkpoint(tmp_path / "copy")
        with pytest.raises(UsageError, match="cannot be made"):
            database.checkpoint(tmp_path / "no" / "where")
        assert content(database) == expected(200)
    assert os.listdir(tmp_path / "data" / CHECKPOINTS) == []
    assert verify_directory(tmp_path / "copy").findings == []
    assert nbytes == sum(json.loads((tmp_path / "copy" / MANIFEST).read_bytes())["files"].values())
    for name, count in (("copy", 100), ("later", 200)):
        restore(tmp_path / name, tmp_path / f"new {name}", "embedded")
        with marble.open(tmp_path / f"new {name}") as database:
            assert content(database) == expected(count)
            fill(database.table("t"), count, count + 10)
            assert content(database) == expected(count + 10)
    # What the copies share with the database was not changed by it, nor by what was made of them.
    assert verify_directory(tmp_path / "copy").findings == []


def test_a_checkpoint_shares_what_does_not_change(tmp_path: Path) -> None:
    with marble.open(tmp_path / "data") as database:
        # Enough of them that they go to a file of their own.
        fill(database.create_table("t", SCHEMA, ["k"]), 0, 20_000, 1000)
        database._backend.node.snapshot().result(60)
        database.checkpoint(tmp_path / "copy")
        shared = {path.name for path in (tmp_path / "copy").rglob("*") if path.is_file() and path.stat().st_nlink > 1}
    assert {name.rpartition(".")[2] for name in shared} == {"arrow", "arrows"}
    assert not shared & {IDENTITY_FILE, MANIFEST, "SYNCED"}


def test_checkpoints_that_nobody_drops_go(tmp_path: Path) -> None:
    with marble.open(tmp_path / "data") as database:
        fill(database.create_table("t", SCHEMA, ["k"]), 0, 20)
        backend = database._backend
        assert isinstance(backend, LocalBackend)
        checkpoints: Checkpoints = backend.node.checkpoints
        names = [checkpoints.make()[0] for _ in range(KEPT_MAX + 1)]
        assert checkpoints.read(names[-1], IDENTITY_FILE, 0, 3) == b'{"f'
        for name, path, offset in (
            (names[0], IDENTITY_FILE, 0),
            (names[-1], "../LOCK", 0),
            (names[-1], MANIFEST, 9999),
        ):
            with pytest.raises(UsageError):
                checkpoints.read(name, path, offset, 1)
        checkpoints.drop(names[-1])
        checkpoints.drop(names[-1])
        assert os.listdir(tmp_path / "data" / CHECKPOINTS) == names[1:-1]
    with marble.open(tmp_path / "data"):
        assert not (tmp_path / "data" / CHECKPOINTS).exists()


# -- backups -------------------------------------------------------------------------------------------------------------


def test_a_backup_of_a_directory(directory: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    found = backup(directory, tmp_path / "backup", seen.append)
    assert found.findings == []
    assert found.files > 3
    assert any(path.startswith("tables/") for path in seen)
    restore(tmp_path / "backup", tmp_path / "new", "embedded")
    with marble.open(tmp_path / "new") as database:
        assert content(database) == expected(200)
    with pytest.raises(UsageError, match="exists already"):
        backup(directory, tmp_path / "backup")
    # A backup can be backed up.
    assert backup(tmp_path / "backup", tmp_path / "again").files == found.files


def test_a_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    with marble.open(tmp_path / "data"):
        for action in (
            lambda: backup(tmp_path / "data", tmp_path / "backup"),
            lambda: restore(tmp_path / "data", tmp_path / "backup", "c"),
            lambda: verify_directory(tmp_path / "data"),
        ):
            with pytest.raises(UnavailableError, match="in use"):
                action()
    assert os.listdir(tmp_path) == ["data"]


def test_of_what_is_damaged_there_is_no_backup(directory: Path, tmp_path: Path) -> None:
    backup(directory, tmp_path / "backup")
    for place in (directory, tmp_path / "backup"):
        # There may be an older one beside it that was still to be removed.
        paths = list((place / "snapshots").glob("*.arrows"))
        assert paths
        for path in paths:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
    with pytest.raises(CorruptionError, match="snapshots"):
        backup(directory, tmp_path / "new")
    with pytest.raises(CorruptionError, match="snapshots"):
        restore(tmp_path / "backup", tmp_path / "new", "c")
    assert sorted(os.listdir(tmp_path)) == ["backup", "data"]


def test_what_is_no_directory_of_ours(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="neither"):
            backup(source, tmp_path / "backup")
        with pytest.raises(UsageError, match="neither"):
            restore(source, tmp_path / "backup", "c")
    with pytest.raises(UsageError, match="no directory"):
        verify_directory(tmp_path / "nowhere")


# -- restoring -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "node_id", "message"),
    [
        ({1: "a:1"}, 2, "none of the members"),
        ({0: "a:1"}, None, "cannot be the members"),
        ({1: "a b"}, None, "cannot be the members"),
    ],
)
def test_members_that_cannot_be(
    nodes: dict[int, str], node_id: int | None, message: str, directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        restore(directory, tmp_path / "new", "c", nodes, node_id)


def test_a_backup_of_several_nodes_is_not_restored_under_their_name(directory: Path, tmp_path: Path) -> None:
    restore(directory, tmp_path / "three", "c", {1: "a:1", 2: "b:1", 3: "c:1"})
    with pytest.raises(UsageError, match="choose another name"):
        restore(tmp_path / "three", tmp_path / "new", "c")
    restore(tmp_path / "three", tmp_path / "new", "embedded")
    with marble.open(tmp_path / "new") as database:
        assert content(database) == expected(200)


def test_directories_of_several_nodes_agree_and_differ_in_whose_they_are(directory: Path, tmp_path: Path) -> None:
    nodes = {3: "a:1", 5: "b:1", 7: "c:1"}
    found = {node: restore(directory, tmp_path / str(node), "c", nodes, node) for node in nodes}
    for node in nodes:
        identity = json.loads((tmp_path / str(node) / IDENTITY_FILE).read_bytes())
        assert (identity["cluster_id"], identity["node_id"], identity["voters"]) == ("c", node, [3, 5, 7])
        assert found[node].snapshots == found[3].snapshots
        (info,) = found[node].snapshots[0]
        assert info.members == Members((3, 5, 7))
        assert info.endpoints == nodes
        state = found[node].groups[0]
        assert state.hard_state == HardState(state.last_term, 0, state.last_index)
    with pytest.raises(UsageError, match="belongs to"):
        marble.open(tmp_path / "3")


def test_no_entry_of_the_old_cluster_changes_the_members_of_the_new_one(tmp_path: Path) -> None:
    files = SystemFiles(tmp_path / "old")
    files.make_directory("")
    from marble.identity import bind

    bind(files, "old", 1, (1, 2))
    log = Log.open(files)
    payload = encode_members(Members((1, 2, 3)), {3: "c:1"})
    proposals = [
        Proposal(EntryKind.NOOP, 0, None),
        Proposal(EntryKind.MEMBERSHIP, 0, payload),
        Proposal(EntryKind.NOOP, 0, None),
        Proposal(EntryKind.MEMBERSHIP, 0, payload),
    ]
    log.append(0, HardState(3, 1, 2), entry_batch.build(0, 1, 3, proposals, 77))
    log.close()
    restore(tmp_path / "old", tmp_path / "new", "new", {4: "d:1"})
    log = Log.open(SystemFiles(tmp_path / "new"), writable=False)
    state = log.groups[0]
    assert state.hard_state == HardState(3, 0, 4)
    assert state.changes == []
    batch = log.read(0, 1, 5)
    assert batch.column("kind").to_pylist() == [EntryKind.NOOP] * 4
    assert batch.column("term").to_pylist() == [3] * 4
    assert batch.column("time_us").to_pylist() == [77] * 4
    log.close()


# -- commands ------------------------------------------------------------------------------------------------------------


def test_the_commands(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, new = str(tmp_path / "backup"), str(tmp_path / "new")
    assert main(["backup", str(directory), copy]) == 0
    assert main(["restore", copy, new, "--cluster-id", "c", "--node", "2=h:1", "--node", "3=h:2", "--as", "3"]) == 0
    assert main(["verify", new]) == 0
    shown = capsys.readouterr().out
    assert "verified" in shown
    assert "all as written" in shown
    path = next(iter((tmp_path / "new" / "log").glob("*.arrows")))
    data = bytearray(path.read_bytes())
    data[77] ^= 1
    path.write_bytes(data)
    assert main(["verify", new]) == 1
    shown = capsys.readouterr().out
    assert f"damaged: {path}" in shown
    assert main(["restore", copy, new, "--cluster-id", "c"]) == 2
    assert main(["restore", copy, f"{new}2", "--cluster-id", "c", "--node", "1=h:1", "--node", "1=h:2"]) == 2
    assert main(["verify", f"{new}3"]) == 2
