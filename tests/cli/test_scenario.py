"""The demo's story, told with real processes and a pretended cluster: the verdict must follow from what is there.

The children only listen on their port, so that killing one really makes it unreachable. The tables are in this process.
"""

from __future__ import annotations

import io
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from marble.config import load_config, parse_endpoint, parse_url
from marble.demo.display import PlainDisplay
from marble.demo.scenario import DemoOptions, run_demo
from marble.demo.source import Source, prepare
from marble.errors import InvariantError, OutcomeUnknownError, UnavailableError, UsageError

SERVE = """
import pathlib, signal, socket, sys, tomllib
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
config = pathlib.Path(sys.argv[1])
tables = tomllib.loads(config.read_text())
host, _, port = tables["cluster"]["node_endpoints"][tables["node"]["id"] - 1].partition(":")
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind((host, int(port)))
listener.listen()
(config.parent / tables["node"]["data_dir"]).mkdir(exist_ok=True)
print("ready", flush=True)
signal.sigwait([signal.SIGTERM])
"""


def serve(config: Path) -> list[str]:
    return [sys.executable, "-P", "-c", SERVE, str(config)]


class Cluster:
    """What all pretended connections share. The reachable node with the lowest id leads, always in a new term."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rows: dict[int, dict[int, Any]] = {}
        self.index = 0
        self.term = 1
        self.leader = 0
        self.outcomes_unknown = 0
        self.spoil: Callable[[int, pa.Table], pa.Table] = lambda node, table: table
        self.endpoints: list[str] = []
        self.open = 0

    def connect(self, url: str) -> Connection:
        self.open += 1
        # The connection to all nodes comes after the first to one of them: read the whole cluster from the config.
        self.endpoints = list(load_config(self.directory / "node-1.toml").cluster.endpoints.values())
        return Connection(self, parse_url(url))

    def reachable(self, endpoint: str) -> bool:
        try:
            socket.create_connection(parse_endpoint(endpoint), timeout=30).close()
        except ConnectionRefusedError:
            return False
        return True

    def elect(self) -> int:
        for node, endpoint in enumerate(self.endpoints, start=1):
            if self.reachable(endpoint):
                if node != self.leader:
                    self.leader, self.term = node, self.term + 1
                return node
        raise UnavailableError("no node answers")


class Connection:
    def __init__(self, cluster: Cluster, endpoints: Sequence[str]) -> None:
        self.cluster = cluster
        self.endpoints = endpoints
        self.known_leader = 0

    def create_table(self, name: str, schema: pa.Schema, key: Sequence[str]) -> Connection:
        assert (name, list(key)) == ("orders", ["id"])
        self.schema = schema
        return self

    def table(self, name: str) -> Connection:
        assert name == "orders"
        return self

    def write_async(self, data: pa.RecordBatch) -> Future[int]:
        cluster, future = self.cluster, Future[int]()
        leader = cluster.elect()
        if self.known_leader not in (0, leader):
            # The old leader took the write with it.
            cluster.outcomes_unknown += 1
            self.known_leader = 0
            future.set_exception(OutcomeUnknownError("the connection broke"))
            return future
        self.known_leader = leader
        cluster.index += 1
        cluster.rows.update((row["id"], row) for row in data.to_pylist())
        future.set_result(cluster.index)
        return future

    def scan(self, *, consistency: str) -> Connection:
        assert consistency == "local"
        assert len(self.endpoints) == 1
        return self

    def to_table(self) -> pa.Table:
        node = self.cluster.endpoints.index(self.endpoints[0]) + 1
        return self.cluster.spoil(node, pa.Table.from_pylist(list(self.cluster.rows.values())))

    def status(self) -> Mapping[str, Any]:
        if not self.cluster.reachable(self.endpoints[0]):
            raise UnavailableError("refused")
        node = self.cluster.endpoints.index(self.endpoints[0]) + 1
        role = "leader" if self.cluster.elect() == node else "follower"
        return {"node_id": node, "role": role, "term": self.cluster.term, "applied_index": self.cluster.index}

    def close(self) -> None:
        self.cluster.open -= 1


def source(rows: int = 100) -> Source:
    return prepare("orders", pa.table({"id": list(range(rows)), "v": [f"v{n}" for n in range(rows)]}), ["id"])


def play(tmp_path: Path, options: DemoOptions, cluster: Cluster) -> tuple[bool, str]:
    out = io.StringIO()
    good = run_demo(options, PlainDisplay(out), cluster.connect, serve)
    assert cluster.open == 0
    return good, out.getvalue()


@pytest.mark.parametrize("batch_rows", [1, 10, 1000])
def test_a_killed_leader_is_outlived(tmp_path: Path, batch_rows: int) -> None:
    cluster = Cluster(tmp_path / "kept")
    good, text = play(tmp_path, DemoOptions(source(), batch_rows=batch_rows, keep=cluster.directory), cluster)
    assert good, text
    assert "node 1 leads in term 2" in text
    assert "killed node 1, the leader (SIGKILL" in text
    assert "node 1 runs again" in text
    for node in (1, 2, 3):
        assert f"node {node}: 100 rows, identical with the source" in text
        assert f"replica {node}" in text
    assert "s from SIGKILL to the first acknowledged write after it" in text
    assert "not measured" not in text
    assert cluster.outcomes_unknown > 0
    assert text.splitlines()[-1].startswith("PASSED: 100 rows on each of 3 replicas")


def test_without_a_kill_one_node_is_enough(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "kept")
    options = DemoOptions(source(1), nodes=1, keep=cluster.directory, kill=False)
    good, text = play(tmp_path, options, cluster)
    assert good
    assert "killed node" not in text
    assert (cluster.directory / "node-1").is_dir()
    assert "marble log" in text


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda table: table.slice(1), "1 rows are missing, e.g. {'id': 0}"),
        (lambda table: pa.concat_tables([table, table.slice(7, 1)]), "1 rows are repeated, e.g. {'id': 7}"),
        (lambda table: table.set_column(1, "v", pa.array(["v0"] * 100)), "values differ: v in 99 rows"),
    ],
)
def test_a_replica_that_differs_fails_the_demo(
    tmp_path: Path, spoil: Callable[[pa.Table], pa.Table], words: str
) -> None:
    cluster = Cluster(tmp_path / "kept")
    cluster.spoil = lambda node, table: spoil(table) if node == 3 else table
    good, text = play(tmp_path, DemoOptions(source(), keep=cluster.directory, kill=False), cluster)
    assert not good
    assert text.splitlines()[-1].startswith(f"FAILED: node 3: {words}")
    assert "node 2: 100 rows, identical with the source" in text


def test_a_node_that_does_not_end_in_order_fails_the_demo(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "kept")
    code = SERVE + "sys.exit(5)"
    out = io.StringIO()
    options = DemoOptions(source(), nodes=1, keep=cluster.directory, kill=False)
    good = run_demo(
        options, PlainDisplay(out), cluster.connect, lambda path: [sys.executable, "-P", "-c", code, str(path)]
    )
    assert not good
    assert "node 1 did not end in order (5)" in out.getvalue()


def test_an_error_leaves_the_logs_and_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    out = io.StringIO()

    def connect(url: str) -> Connection:
        raise InvariantError("the client broke")

    with pytest.raises(InvariantError):
        run_demo(DemoOptions(source()), PlainDisplay(out), connect, serve)
    (left,) = tmp_path.iterdir()
    assert f"the nodes' data and logs are in {left}" in out.getvalue()
    assert (left / "node-3.log").exists()


def test_nothing_is_left_of_a_good_or_an_interrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def connect(url: str) -> Connection:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(DemoOptions(source()), PlainDisplay(io.StringIO()), connect, serve)
    assert list(tmp_path.iterdir()) == []


def test_options_that_cannot_work_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for options, words in (
        ({"nodes": 0}, "--nodes 0"),
        ({"nodes": 10}, "--nodes 10"),
        ({"nodes": 2}, "or --no-kill"),
        ({"batch_rows": 0}, "--batch-rows 0"),
        ({"keep": tmp_path}, "not an empty directory"),
        ({"keep": tmp_path / "file"}, "not an empty directory"),
        ({"source": source(3)}, "3 rows are too few to kill a leader among: give 4"),
    ):
        arguments: dict[str, Any] = {"source": source(), **options}
        with pytest.raises(UsageError, match=words):
            DemoOptions(**arguments)
    assert DemoOptions(source(), nodes=2, kill=False).nodes == 2
