"""The window of writes: full, never over, and no batch given up before it is acknowledged."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

import pyarrow as pa
import pytest

from marble.demo.writer import Writer, WriteStats
from marble.errors import NotLeaderError, OutcomeUnknownError, UnavailableError, UsageError

BATCHES = [pa.record_batch({"id": [first, first + 1]}) for first in range(0, 20, 2)]


def ids(batch: pa.RecordBatch) -> list[int]:
    values: list[int] = batch["id"].to_pylist()
    return values


class Cluster:
    """Takes writes and answers as the test says: at once, unless `hold` is set."""

    def __init__(self) -> None:
        self.offered: list[list[int]] = []
        self.held: list[Future[int]] = []
        self.hold = False
        self.answer: Callable[[list[int]], int | BaseException] = lambda rows: len(self.offered)

    def write(self, batch: pa.RecordBatch) -> Future[int]:
        future: Future[int] = Future()
        self.offered.append(ids(batch))
        if self.hold:
            self.held.append(future)
        else:
            settle(future, self.answer(ids(batch)))
        return future


def settle(future: Future[int], answer: int | BaseException) -> None:
    if isinstance(answer, BaseException):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def quiet() -> None:
    """A watch that sees nothing wrong."""


def test_every_batch_is_written_once_and_counted() -> None:
    cluster, rows = Cluster(), []
    writer = Writer(cluster.write, quiet)
    stats = writer.run(BATCHES, lambda: rows.append(writer.stats.rows))
    assert cluster.offered == [ids(batch) for batch in BATCHES]
    assert rows == list(range(2, 22, 2))
    assert (stats.rows, stats.repeats, stats.last_index, len(stats.latencies_s)) == (20, 0, 10, 10)
    assert stats.nbytes == sum(batch.nbytes for batch in BATCHES)
    assert stats.failover_s is None


@pytest.mark.parametrize(
    "error", [OutcomeUnknownError("lost"), UnavailableError("no leader"), NotLeaderError("not me", "h:1")]
)
def test_a_batch_whose_outcome_is_unknown_or_that_was_refused_is_offered_again(error: Exception) -> None:
    cluster = Cluster()
    cluster.answer = lambda rows: error if cluster.offered.count(rows) < 3 and rows[0] == 4 else len(cluster.offered)
    stats = Writer(cluster.write, quiet).run(BATCHES, quiet)
    assert cluster.offered.count([4, 5]) == 3
    assert sorted(map(tuple, cluster.offered)) == sorted([(n, n + 1) for n in range(0, 20, 2)] + [(4, 5)] * 2)
    assert (stats.rows, stats.repeats) == (20, 2)


def test_a_client_that_raises_at_once_is_offered_the_batch_again() -> None:
    cluster, refusals = Cluster(), [UnavailableError("the queue is full")]

    def write(batch: pa.RecordBatch) -> Future[int]:
        if refusals:
            raise refusals.pop()
        return cluster.write(batch)

    assert Writer(write, quiet).run(BATCHES, quiet).rows == 20


def test_any_other_error_ends_the_writing() -> None:
    cluster = Cluster()
    cluster.answer = lambda rows: UsageError("wrong schema")
    with pytest.raises(UsageError, match="wrong schema"):
        Writer(cluster.write, quiet).run(BATCHES, quiet)


def test_a_batch_that_is_never_taken_is_given_up_with_its_last_error() -> None:
    cluster = Cluster()
    cluster.answer = lambda rows: UnavailableError("no leader")
    with pytest.raises(UnavailableError, match=r"not acknowledged within 0\.01 s: no leader"):
        Writer(cluster.write, quiet, timeout_s=0.01).run(BATCHES, quiet)


def test_an_answer_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marble.demo.writer._ANSWER_GRACE_S", 0.0)
    cluster = Cluster()
    cluster.hold = True
    with pytest.raises(UnavailableError, match="no answer at all"):
        Writer(cluster.write, quiet, timeout_s=0.01).run(BATCHES, quiet)


def test_what_the_watch_finds_ends_the_writing() -> None:
    cluster = Cluster()
    cluster.hold = True

    def watch() -> None:
        raise UnavailableError("node 2 has ended")

    with pytest.raises(UnavailableError, match="node 2 has ended"):
        Writer(cluster.write, watch).run(BATCHES, quiet)


def test_the_window_is_filled_and_never_exceeded() -> None:
    cluster = Cluster()
    cluster.hold = True
    most: list[int] = []

    def watch() -> None:
        most.append(len(cluster.held))
        future = cluster.held.pop(0)
        # Answers come from a thread of the client's.
        thread = threading.Thread(target=future.set_result, args=(len(cluster.offered),))
        thread.start()
        thread.join()

    stats = Writer(cluster.write, watch, window=3).run(BATCHES[:5], quiet)
    assert (stats.rows, most) == (10, [3, 3, 3, 2, 1])


def test_the_failover_is_measured_by_a_write_that_was_offered_after_it() -> None:
    cluster = Cluster()
    cluster.hold = True
    writer = Writer(cluster.write, lambda: answer_next(), window=2)
    seen: list[tuple[int, bool]] = []

    def answer_next() -> None:
        cluster.held.pop(0).set_result(len(cluster.offered))

    def acknowledged() -> None:
        if writer.stats.rows == 4:
            writer.mark_failure()
        seen.append((len(cluster.offered), writer.stats.failover_s is not None))

    stats = writer.run(BATCHES[:6], acknowledged)
    # Marked at the second answer. The write that was then under way does not count, the next one does; and the next one
    # was offered although the window was full.
    assert [measured for _, measured in seen] == [False, False, False, True, True, True]
    assert stats.failover_s is not None
    assert stats.failover_s > 0
    # Under way in it: the third, which began before it, the fourth, which ended it, and two offered meanwhile.
    assert (len(stats.latencies_s), len(stats.failover_latencies_s)) == (2, 4)


@pytest.mark.parametrize(
    ("count", "share", "rank"),
    [(1, 0.5, 1), (2, 0.5, 1), (3, 0.5, 2), (100, 0.99, 99), (101, 0.99, 100), (10, 1.0, 10)],
)
def test_a_percentile_is_a_latency_that_was_measured(count: int, share: float, rank: int) -> None:
    stats = WriteStats(latencies_s=[float(n) for n in range(count, 0, -1)])
    assert stats.latency_s(share) == float(rank)


def test_no_write_has_no_latency() -> None:
    assert WriteStats().latency_s(0.99) == 0.0
