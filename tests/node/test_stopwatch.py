"""What the callers of a group waited for is measured, and a status says how a node is."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pyarrow as pa
import pytest

import marble
from marble._core.entry_batch import Proposal
from marble.lsm import payload
from marble.metrics import Metrics
from marble.promises import Offer
from marble.sampling import COUNTERS, LATENCIES, take
from marble.stopwatch import Stopwatch
from marble.types import EntryKind


def offer(came: float | None) -> Offer:
    return Offer(Proposal(EntryKind.COMMAND, 0, payload.encode_command(b"x" * 10)), Future(), None, None, came)


def test_a_batch_is_measured_when_a_majority_has_it_and_when_it_took_effect() -> None:
    metrics = Metrics()
    watch = Stopwatch(metrics)
    watch.took(5, [offer(1.0), offer(1.5)], 2.0)
    watch.took(7, [offer(None)], 3.0)
    watch.reached(5, 5, 10.0)
    assert metrics.snapshot()["commit_seconds"] == {"count": 0, "sum": 0.0}
    watch.reached(6, 5, 4.0)
    commit, write = (metrics.histogram(name).spread() for name in ("commit_seconds", "write_seconds"))
    assert (commit.total, commit.sum, write.total) == (2, pytest.approx(4.0), 0)
    watch.reached(7, 7, 5.0)
    assert not watch.any
    assert metrics.counter("writes_committed").value == 3
    assert metrics.counter("write_bytes_committed").value == 3 * offer(None).proposal.nbytes
    assert metrics.histogram("write_seconds").spread().sum == pytest.approx(4.0 + 4.0 + 2.0)


def test_what_a_lost_leadership_had_under_way_is_not_measured() -> None:
    metrics = Metrics()
    watch = Stopwatch(metrics)
    watch.took(5, [offer(1.0)], 2.0)
    watch.lost()
    watch.reached(9, 9, 3.0)
    assert metrics.counter("writes_committed").value == 0
    assert metrics.histogram("commit_seconds").spread().total == 0


def test_a_node_measures_what_it_does(tmp_path: Path) -> None:
    with marble.open(tmp_path) as database:
        table = database.create_table("t", pa.schema([("id", pa.int64())]), key=["id"])
        for each in range(3):
            table.write(pa.record_batch({"id": [each]}))
        assert table.scan().count_rows() == 3
        status = database.status()
    metrics = status["metrics"]
    assert metrics["writes_committed"] == 4
    assert metrics["reads_confirmed"] == 0  # Whoever is alone need not ask whether it still leads.
    assert metrics["entries_applied"] >= 4
    assert metrics["bytes_applied"] > metrics["write_bytes_committed"] / 2 > 0
    assert metrics["write_seconds"]["count"] == metrics["commit_seconds"]["count"] == 4
    assert metrics["log_sync_seconds"]["count"] >= 4
    assert metrics["leader_changes"] == 0  # Whoever is alone leads before anybody looks.
    sample = take(status, 0.0)
    assert sum(sample.counts.values()) > 0
    assert {*COUNTERS.values(), *LATENCIES.values()} - metrics.keys() <= {
        "transport_messages_sent",
        "transport_messages_received",
    }
    assert status["wall_us"] >= status["entry_time_us"] > 1e15
