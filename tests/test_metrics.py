"""Counters count, also from many threads."""

from __future__ import annotations

import threading

import pytest

from marble.errors import UsageError
from marble.metrics import Metrics


def test_counter_loses_nothing_between_threads() -> None:
    counter = Metrics().counter("n")
    threads = [threading.Thread(target=lambda: [counter.add() for _ in range(5000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.value == 20_000


def test_one_name_is_one_instrument_of_one_kind() -> None:
    metrics = Metrics()
    assert metrics.counter("a") is metrics.counter("a")
    with pytest.raises(UsageError, match="'a' is a Counter, not a Gauge"):
        metrics.gauge("a")
    with pytest.raises(UsageError):
        metrics.counter("a").add(-1)


def test_snapshot_is_by_name() -> None:
    metrics = Metrics()
    metrics.histogram("z").observe(2.0)
    metrics.gauge("b").set(3)
    metrics.gauge("b").add(-1)
    metrics.counter("a").add(4)
    assert metrics.gauge("b").value == 2
    assert metrics.snapshot() == {
        "a": 4,
        "b": 2,
        "z": {"count": 1, "sum": 2.0, "min": 2.0, "max": 2.0, "p50": 2.0, "p99": 2.0},
    }
    assert list(metrics.snapshot()) == ["a", "b", "z"]


def test_quantiles_are_right_to_a_quarter_octave() -> None:
    histogram = Metrics().histogram("h")
    assert histogram.snapshot() == {"count": 0, "sum": 0.0}
    for value in range(1, 1001):
        histogram.observe(value / 1000)
    snapshot = histogram.snapshot()
    assert snapshot["count"] == 1000
    assert 0.5 <= snapshot["p50"] <= 0.5 * 2**0.25
    assert 0.99 <= snapshot["p99"] <= 1.0
    histogram.observe(0.0)
    histogram.observe(-1.0)
    assert histogram.snapshot()["min"] == -1.0
    with pytest.raises(UsageError):
        histogram.observe(float("nan"))
