"""A node whose tables are in files: flushed with snapshots, compacted beside, found again; and writers that wait for them."""

from __future__ import annotations

import threading
from pathlib import Path

import pyarrow as pa
import pytest

import marble
from marble._core.entry_batch import Proposal
from marble.compacting import REST_TICKS, Compactor
from marble.desk import Desk
from marble.env import SystemFiles
from marble.errors import CorruptionError, UnavailableError
from marble.jobs import CompactJob
from marble.local import LocalBackend
from marble.lsm import payload
from marble.lsm.compaction import CompactionPolicy
from marble.lsm.files import TableFiles
from marble.lsm.machine import TableMachine
from marble.lsm.store import StorePolicy
from marble.machine import Pace
from marble.node import Node
from marble.options import NodeOptions
from marble.promises import Offer, promise
from marble.types import EntryKind

SCHEMA = pa.schema([("k", pa.int64()), ("v", pa.string())])
SMALL = StorePolicy(
    CompactionPolicy(level0_files=2, level1_bytes=64 * 1024, file_bytes_max=16 * 1024, ratio=4),
    inline_table_bytes_max=-1,
)


def rows(first: int, count: int = 100, value: str = "x" * 50) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"k": list(range(first, first + count)), "v": [value] * count}, SCHEMA)


class Watched(TableMachine):
    """Says when something was compacted."""

    def __init__(self, files: SystemFiles) -> None:
        super().__init__(files=TableFiles(files), policy=SMALL)
        self.compacted = threading.Event()

    def compact(self, pace: Pace | None = None) -> bool:
        done = super().compact(pace)
        if done:
            self.compacted.set()
        return done


def test_a_node_flushes_compacts_and_finds_it_all_again(tmp_path: Path) -> None:
    files = SystemFiles(tmp_path)
    machine = Watched(files)
    node = Node(NodeOptions("files", 1, {1: "here"}, snapshot_distance=3, purge_tail=0), files, machine)
    node.start()
    table = marble.Database(LocalBackend(node, machine)).create_table("t", SCHEMA, key=["k"])
    for turn in range(30):
        table.write(rows(40 * turn, value=f"{turn}"))
    node.snapshot().result(30)
    assert machine.compacted.wait(30)
    expected = table.scan().to_table()
    assert expected.num_rows == 29 * 40 + 100
    node.stop()
    other = Watched(files)
    again = Node(NodeOptions("files", 1, {1: "here"}), files, other)
    assert other.applied_index > 25, "the files were adopted before the log was replayed"
    again.start()
    assert other.read("t").scan().read_all() == expected
    again.stop()


def test_a_table_larger_than_what_may_be_in_memory(tmp_path: Path) -> None:
    files = SystemFiles(tmp_path)
    machine = TableMachine(files=TableFiles(files), policy=SMALL)
    node = Node(NodeOptions("files", 1, {1: "here"}, memory_bytes_max=20_000), files, machine)
    node.start()
    table = marble.Database(LocalBackend(node, machine)).create_table("t", SCHEMA, key=["k"])
    for turn in range(40):
        table.write(rows(100 * turn))
    while machine.memory_bytes >= 20_000:
        # One that was being written already is an answer, too.
        node.snapshot().result(30)
    assert node.status()["snapshot_index"] > 0
    assert table.scan().to_table().num_rows == 4000
    assert node.status()["backlog_bytes"] == machine.backlog_bytes
    node.stop()


class Lagging(TableMachine):
    """Its files lag behind as far as it is told."""

    lag = 0

    @property
    def backlog_bytes(self) -> int:
        return self.lag


def test_writers_wait_while_files_lag_behind_and_are_refused_in_the_end(tmp_path: Path) -> None:
    files, machine = SystemFiles(tmp_path), Lagging()
    options = NodeOptions("files", 1, {1: "here"}, backlog_bytes_max=1000, propose_timeout_s=5.0)
    node = Node(options, files, machine)
    node.start()
    database = marble.Database(LocalBackend(node, machine))
    table = database.create_table("t", SCHEMA, key=["k"])
    node.stop()

    # The desk by itself, so that time is ours.
    driver = node._groups.use(0)
    driver.raft.campaign()
    desk = Desk(options, driver, lambda nbytes: None, lambda: 0, lambda: 0)

    def offered() -> Offer:
        data = payload.encode_rows(rows(0, 1))
        offer: Offer = Offer(Proposal(EntryKind.WRITE, table.info.id, data), promise(), None)
        desk.offer(offer)
        return offer

    machine.lag = 1001
    first = offered()
    assert desk.propose(10.0), "it waits, and is to be offered again"
    assert desk.propose(14.9)
    assert not first.future.done()
    assert not desk.propose(15.0)
    with pytest.raises(
        UnavailableError, match="tables are written faster than their files: 1001 bytes wait, more than 1000"
    ):
        first.future.result(0)
    second = offered()
    assert desk.propose(20.0)
    machine.lag = 1000
    assert not desk.propose(21.0)
    assert not second.future.done()


class Failing(TableMachine):
    """Its compactions fail as they are told."""

    error: Exception | None = None
    runs = 0

    @property
    def compaction_due(self) -> bool:
        return True

    def compact(self, pace: Pace | None = None) -> bool:
        self.runs += 1
        if self.error is not None:
            raise self.error
        return True


def test_a_compaction_that_failed_is_tried_again_but_not_at_once() -> None:
    machine = Failing()
    compactor = Compactor(3, machine, None)
    for error in (OSError("no space is left"), CorruptionError("bad", "x", 0), UnavailableError("the node stops")):
        machine.error = error
        job = compactor.take_job()
        assert isinstance(job, CompactJob)
        assert job.group == 3
        assert compactor.take_job() is None, "one at a time"
        job.run()
        compactor.finish_job(job)
        assert job.error is error
        for _ in range(REST_TICKS):
            assert compactor.take_job() is None
            compactor.tick()
    machine.error = ZeroDivisionError()
    job = compactor.take_job()
    assert job is not None
    with pytest.raises(ZeroDivisionError):
        job.run()


def test_a_machine_without_files_has_nothing_to_compact() -> None:
    assert Compactor(0, TableMachine(), None).take_job() is None
