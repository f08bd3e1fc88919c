"""Backups of running nodes over loopback, and a cluster of three made of one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from server.cluster import SCHEMA, WAIT_S, Cluster, eventually, free_endpoints, rows

from marble.backup import backup, restore, verify_directory
from marble.checkpoint import CHECKPOINTS
from marble.cli import main
from marble.client import ClientOptions, RemoteBackend, connect
from marble.config import RaftClusterConfig
from marble.errors import UnavailableError, UsageError
from marble.server import create_arrow_flight_transport, create_raft_server
from marble.transport.wire import encode_json

MakeCluster = Callable[..., Cluster]


def url_of(cluster: Cluster) -> str:
    return "grpc://" + ",".join(cluster.config.endpoints.values())


def test_a_backup_of_a_running_cluster_becomes_another_one(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(3, snapshot_distance=20)
    with connect(url_of(cluster)) as database:
        table = database.create_table("t", SCHEMA, ["id"])
        for first in range(0, 500, 10):
            table.write(rows(first, first + 10, "x" * 300))
    found = backup(url_of(cluster), tmp_path / "backup")
    assert found.findings == []
    directory = cluster.directory
    for node in cluster.config.voters:
        left = directory / str(node) / CHECKPOINTS
        assert not left.exists() or not list(left.iterdir())
    # The source may be gone by then.
    cluster.stop()
    endpoints = free_endpoints(3)
    config = RaftClusterConfig("new", endpoints, election_timeout_ms=600, heartbeat_interval_ms=100)
    nodes = config.endpoints
    with contextlib.ExitStack() as stack:
        for node in nodes:
            restore(tmp_path / "backup", tmp_path / f"new{node}", "new", nodes, node)
            server = create_raft_server(
                create_arrow_flight_transport(nodes[node]), data_dir=tmp_path / f"new{node}", node_id=node
            )
            stack.enter_context(server)
            server.initialize(config)
            server.start()
        with connect("grpc://" + ",".join(endpoints)) as database:
            table = eventually(lambda: _found(database), "a leader of the new cluster")
            table.write(rows(500, 510))
            assert table.scan().to_table().num_rows == 510


def _found(database: object) -> object:
    try:
        return database.table("t")  # type: ignore[attr-defined]
    except UnavailableError:
        return None


def test_a_checkpoint_of_a_server(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(1)
    with connect(url_of(cluster)) as database:
        database.create_table("t", SCHEMA, ["id"]).write(rows(0, 10))
        with pytest.raises(UsageError, match="has the data"):
            database.checkpoint(tmp_path / "copy")
    assert cluster.servers[1].checkpoint(tmp_path / "copy") > 0
    assert verify_directory(tmp_path / "copy").findings == []


def test_what_a_node_does_not_hand_out(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(1)
    (endpoint,) = cluster.config.endpoints.values()
    backend = RemoteBackend((endpoint,), ClientOptions(WAIT_S))
    with contextlib.closing(backend):
        begun = backend.ask_one(endpoint, "begin_backup", b"")
        good = {"token": begun["token"], "path": "identity.json", "offset": 0, "bytes": 5}
        assert backend.ask_bytes(endpoint, "read_backup", encode_json(good)) == b'{"for'
        for wrong in (
            {"path": "../LOCK"},
            {"path": "/etc/passwd"},
            {"token": "../" + str(begun["token"])},
            {"offset": -1},
            {"offset": 1 << 40},
            {"offset": "0"},
            {"bytes": -1},
            {"path": 7},
        ):
            with pytest.raises(UsageError):
                backend.ask_bytes(endpoint, "read_backup", encode_json({**good, **wrong}))
        backend.ask_one(endpoint, "end_backup", encode_json({"token": begun["token"]}))
        with pytest.raises(UsageError, match="begin anew"):
            backend.ask_bytes(endpoint, "read_backup", encode_json(good))


def test_the_command_takes_a_url(make_cluster: MakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = make_cluster(1)
    assert main(["backup", url_of(cluster), str(tmp_path / "copy")]) == 0
    assert "verified" in capsys.readouterr().out
    cluster.stop()
    assert main(["backup", url_of(cluster), str(tmp_path / "other")]) == 1
    assert not (tmp_path / "other").exists()
