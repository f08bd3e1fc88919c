"""Three real processes, SIGKILL at random moments under load: what was acknowledged is there, once, on every replica."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pyarrow as pa
import pytest

import marble
from marble.demo.processes import NodeProcess, Nodes, running_on_free_ports, serve_command
from marble.env import SystemFiles
from marble.errors import MarbleError, OutcomeUnknownError, UnavailableError
from marble.logstore.log import Log
from marble.lsm.machine import TableMachine
from marble.types import EntryKind

SCHEMA = pa.schema([pa.field("id", pa.int64()), pa.field("value", pa.int64()), pa.field("text", pa.string())])
ROUNDS = 10
ROWS_PER_BATCH = 5
DEADLINE_S = 60.0
SEED = int(os.environ.get("MARBLE_TEST_SEED", "0")) or int.from_bytes(os.urandom(4), "big")

CONFIG = """
[node]
id = {node}
data_dir = "{directory}"
[cluster]
cluster_id = "kill-test"
node_endpoints = {endpoints}
election_timeout_ms = 600
heartbeat_interval_ms = 100
"""


@dataclass
class Cluster:
    """Three node processes and where they are."""

    nodes: Nodes
    endpoints: list[str]
    directories: dict[int, Path]

    @property
    def url(self) -> str:
        return "grpc://" + ",".join(self.endpoints)

    def leader(self) -> int:
        """Id of the node that leads; waits for one."""
        with marble.connect(self.url, timeout_s=DEADLINE_S) as db:
            return wait_for(lambda: db.status()["leader_id"])


@dataclass
class Load:
    """Writes batches of fresh keys, one after the other, and keeps account of what became of each."""

    url: str
    name: int
    acknowledged: dict[int, int] = field(default_factory=dict)
    unknown: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    stop: threading.Event = field(default_factory=threading.Event)
    count: threading.Condition = field(default_factory=threading.Condition)
    failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            with self.count:
                self.count.notify_all()

    def _run(self) -> None:
        number = 0
        with marble.connect(self.url, timeout_s=DEADLINE_S) as db:
            table = db.table("t")
            while not self.stop.is_set():
                batch_id = self.name * 1_000_000 + number
                number += 1
                try:
                    index = table.write(make_batch(batch_id))
                except OutcomeUnknownError:
                    self.unknown.add(batch_id)
                except UnavailableError:
                    self.refused.add(batch_id)
                else:
                    with self.count:
                        self.acknowledged[batch_id] = index
                        self.count.notify_all()

    def wait_for_more(self, batches: int) -> None:
        """Return when `batches` more have been acknowledged."""
        with self.count:
            goal = len(self.acknowledged) + batches
            done = self.count.wait_for(lambda: len(self.acknowledged) >= goal or self.failure, DEADLINE_S)
        assert self.failure is None, self.failure
        assert done, f"no {batches} writes were acknowledged within {DEADLINE_S} s"


def make_batch(batch_id: int) -> pa.RecordBatch:
    keys = [batch_id * ROWS_PER_BATCH + row for row in range(ROWS_PER_BATCH)]
    return pa.record_batch(
        {"id": keys, "value": [key * 7 for key in keys], "text": [f"row {key}" for key in keys]}, schema=SCHEMA
    )


def wait_for(condition: Callable[[], object]) -> object:
    """Ask a remote node until it says yes: there is no event to wait on across processes."""
    end = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not (answer := condition()):
        assert time.monotonic() < end, "the cluster did not get there in time"
        pause.wait(0.05)
    return answer


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    directories = {node: tmp_path / f"node-{node}" for node in (1, 2, 3)}
    endpoints: list[str] = []

    def make(ports: object) -> Nodes:
        endpoints[:] = [f"127.0.0.1:{port}" for port in ports]
        processes = {}
        for node, directory in directories.items():
            config = tmp_path / f"node-{node}.toml"
            config.write_text(CONFIG.format(node=node, directory=directory, endpoints=endpoints))
            processes[node] = NodeProcess(f"node {node}", serve_command(config), tmp_path / f"node-{node}.log")
        return Nodes(processes)

    with running_on_free_ports(3, make) as (nodes, _):
        yield Cluster(nodes, endpoints, directories)


@pytest.mark.timeout(600)
def test_every_acknowledged_write_survives_kills_of_leader_and_followers(cluster: Cluster) -> None:
    print(f"seed {SEED}: repeat with MARBLE_TEST_SEED={SEED}")
    random = Random(SEED)
    with marble.connect(cluster.url, timeout_s=DEADLINE_S) as db:
        db.create_table("t", SCHEMA, key=["id"])
    loads = [Load(cluster.url, name) for name in (1, 2, 3)]
    threads = [threading.Thread(target=load.run, name=f"load-{load.name}") for load in loads]
    for thread in threads:
        thread.start()
    try:
        for number in range(ROUNDS):
            loads[0].wait_for_more(random.randrange(1, 40))
            leader = cluster.leader()
            victim = leader if number % 2 == 0 else random.choice([node for node in (1, 2, 3) if node != leader])
            cluster.nodes.processes[victim].kill()
            # The other two are a majority: writes must go on without the victim.
            for load in loads:
                load.wait_for_more(random.randrange(1, 20))
            cluster.nodes.processes[victim].start()
            cluster.nodes.processes[victim].wait_ready()
    finally:
        for load in loads:
            load.stop.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert not any(load.failure for load in loads)
    check_replicas(cluster, loads)
    cluster.nodes.stop()
    check_logs(cluster, loads)


def check_replicas(cluster: Cluster, loads: list[Load]) -> None:
    """Every replica holds every acknowledged batch whole, nothing that was refused, and the same as the others."""
    acknowledged = {batch for load in loads for batch in load.acknowledged}
    unknown = {batch for load in loads for batch in load.unknown}
    with marble.connect(cluster.url, timeout_s=DEADLINE_S) as db:
        # A last write, so that "has caught up" means something on every replica.
        last = db.table("t").write(make_batch(999))
    tables = []
    for endpoint in cluster.endpoints:
        with marble.connect(f"grpc://{endpoint}", timeout_s=DEADLINE_S) as db:
            wait_for(lambda db=db: db.status()["applied_index"] >= last)
            tables.append(db.table("t").scan(consistency="local").to_table())
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
    rows = tables[0].to_pydict()
    assert all(value == 7 * key and text == f"row {key}" for key, value, text in zip(*rows.values(), strict=True))
    present = Counter(key // ROWS_PER_BATCH for key in rows["id"])
    present.pop(999)
    assert set(present.values()) <= {ROWS_PER_BATCH}, "a batch is there in part"
    assert acknowledged <= set(present), f"lost: {sorted(acknowledged - set(present))[:10]}"
    assert set(present) <= acknowledged | unknown, "a batch is there that was refused"


def check_logs(cluster: Cluster, loads: list[Load]) -> None:
    """Each acknowledged batch is executed exactly once, at its index, however often its client had to send it."""
    indexes = sorted(index for load in loads for index in load.acknowledged.values())
    assert len(indexes) == len(set(indexes))
    for directory in cluster.directories.values():
        executed = replay(directory, indexes[-1])
        assert set(indexes) <= set(executed)
        assert len(set(executed.values())) == len(executed), "a batch was executed twice"


def replay(directory: Path, last: int) -> dict[int, int]:
    """Apply a node's log up to entry `last`: index -> checksum of every write that was executed and not a repeat."""
    machine = TableMachine()
    executed: dict[int, int] = {}
    log = Log.open(SystemFiles(directory), writable=False)
    for batch in log.replay(0, 1, last + 1):
        rows = zip(*(batch[name].to_pylist() for name in ("index", "kind", "checksum")), strict=True)
        for (index, kind, checksum), result in zip(rows, machine.apply(batch), strict=True):
            if kind == EntryKind.WRITE and not result.index:
                executed[index] = checksum
    return executed


def test_a_node_that_cannot_reach_a_majority_refuses_and_recovers(cluster: Cluster) -> None:
    with marble.connect(cluster.url, timeout_s=DEADLINE_S) as db:
        table = db.create_table("t", SCHEMA, key=["id"])
        table.write(make_batch(1))
    leader = cluster.leader()
    others = [node for node in (1, 2, 3) if node != leader]
    for node in others:
        cluster.nodes.processes[node].kill()
    with marble.connect(f"grpc://{cluster.endpoints[leader - 1]}", timeout_s=3.0) as db:
        with pytest.raises(MarbleError) as caught:
            db.table("t").write(make_batch(2))
        assert isinstance(caught.value, UnavailableError | OutcomeUnknownError)
    for node in others:
        cluster.nodes.processes[node].start()
    for node in others:
        cluster.nodes.processes[node].wait_ready()
    with marble.connect(cluster.url, timeout_s=DEADLINE_S) as db:
        assert db.table("t").write(make_batch(3)) > 0
        assert db.table("t").get(make_batch(1)["id"][0].as_py()) is not None
