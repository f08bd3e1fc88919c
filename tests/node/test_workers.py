"""Which thread does a job, and that it always comes back to the engine's."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hand_clock import HandClock

import marble
from marble.errors import InvariantError, OutcomeUnknownError
from marble.workers import QUICK_AFTER, QUICK_S, Worker

DEADLINE_S = 30.0


class Job:
    def __init__(self, clock: HandClock, lasts_s: float = 0.0, error: Exception | None = None) -> None:
        self.clock = clock
        self.lasts_s = lasts_s
        self.error = error
        self.thread: str | None = None

    def run(self) -> None:
        self.thread = threading.current_thread().name
        self.clock.now += self.lasts_s
        if self.error is not None:
            raise self.error


class Bench:
    """A worker, and in the engine's place this thread."""

    def __init__(self) -> None:
        self.clock = HandClock(0.0)
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.done: list[Job] = []
        self.worker: Worker[Job] = Worker("hand", self.inbox.put, self.done.append, self.clock)

    def job(self, *arguments: object) -> Job:
        return Job(self.clock, *arguments)

    def take(self) -> None:
        self.inbox.get(timeout=DEADLINE_S)()


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.worker.thread.start()
    yield bench
    bench.worker.end()
    bench.worker.thread.join(DEADLINE_S)
    assert not bench.worker.thread.is_alive()


def test_jobs_come_back_in_order_and_only_when_the_engine_takes_them(bench: Bench) -> None:
    jobs = [bench.job() for _ in range(3)]
    for job in jobs:
        bench.worker.put(job)
    assert bench.done == []
    for count in (1, 2, 3):
        bench.take()
        assert bench.done == jobs[:count]
        assert bench.worker.outstanding == 3 - count
    assert {job.thread for job in jobs} == {"hand"}


def test_a_slow_job_sends_the_next_ones_to_the_thread(bench: Bench) -> None:
    assert bench.worker.quick
    here = bench.job(2 * QUICK_S)
    bench.worker.run_here(here)
    assert here.thread == threading.current_thread().name
    assert bench.done == [here]
    for _ in range(QUICK_AFTER):
        assert not bench.worker.quick
        bench.worker.put(bench.job())
        bench.take()
    assert bench.worker.quick


def test_nothing_overtakes_what_is_out(bench: Bench) -> None:
    bench.worker.put(bench.job())
    assert not bench.worker.quick
    bench.take()
    assert bench.worker.quick


def test_what_a_job_raises_is_raised_on_the_engine_s_thread_and_ends_the_worker(bench: Bench) -> None:
    bench.worker.put(bench.job(0.0, ZeroDivisionError("by zero")))
    after = bench.job()
    bench.worker.put(after)
    with pytest.raises(ZeroDivisionError, match="by zero"):
        bench.take()
    bench.worker.thread.join(DEADLINE_S)
    assert after.thread is None
    assert bench.done == []


@pytest.mark.parametrize("quick_s", [60.0, -1.0], ids=["on the spot", "handed over"])
def test_a_disk_that_fails_stops_the_node_whoever_syncs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_s: float
) -> None:
    monkeypatch.setattr("marble.workers.QUICK_S", quick_s)
    schema = pa.schema([pa.field("id", pa.int64())])
    with marble.open(tmp_path) as db:
        table = db.create_table("t", schema, key=["id"])
        table.write(pa.record_batch({"id": [1]}, schema=schema))

        def fail(self: object) -> None:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as broken:
            broken.setattr("marble.env.SystemAppendFile.sync", fail)
            with pytest.raises((InvariantError, OutcomeUnknownError)):
                table.write(pa.record_batch({"id": [2]}, schema=schema))
        with pytest.raises(InvariantError):
            table.write(pa.record_batch({"id": [3]}, schema=schema))
