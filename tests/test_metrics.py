"""Counters count, also from many threads."""

from __future__ import annotations

import json
import re
import threading

import pytest

from marble.errors import UsageError
from marble.metrics import EDGES, LABELS_MAX, NOTHING, Metrics, spread_of


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
        "z": {"count": 1, "sum": 2.0, "min": 2.0, "max": 2.0, "p50": 2.0, "p99": 2.0, "buckets": {"88": 1}},
    }
    assert list(metrics.snapshot()) == ["a", "b", "z"]


def test_quantiles_are_right_to_less_than_a_quarter() -> None:
    histogram = Metrics().histogram("h")
    assert histogram.snapshot() == {"count": 0, "sum": 0.0}
    for value in range(1, 1001):
        histogram.observe(value / 1000)
    snapshot = histogram.snapshot()
    assert snapshot["count"] == 1000
    assert 0.5 <= snapshot["p50"] <= 0.5 * 1.25
    assert 0.99 <= snapshot["p99"] <= 1.0
    histogram.observe(0.0)
    histogram.observe(-1.0)
    assert histogram.snapshot()["min"] == -1.0
    with pytest.raises(UsageError):
        histogram.observe(float("nan"))


def test_a_value_at_an_edge_counts_below_it_and_every_value_counts_once() -> None:
    histogram = Metrics().histogram("h")
    values = [*EDGES, *(edge * 1.0001 for edge in EDGES), 0.0, -5.0]
    for value in values:
        histogram.observe(value)
    spread = histogram.spread()
    assert spread.total == len(values)
    for slot, edge in enumerate(EDGES):
        assert sum(spread.counts[: slot + 1]) == sum(value <= edge for value in values)


def test_what_came_in_between_is_the_difference() -> None:
    histogram = Metrics().histogram("h")
    histogram.observe(5.0)
    before = histogram.spread()
    histogram.observe(0.001)
    since = histogram.spread() - before
    assert (since.total, since.quantile(0.5)) == (1, 0.001)
    assert since.sum == pytest.approx(0.001)
    assert (before | since) == histogram.spread()
    assert NOTHING.quantile(0.99) == 0.0


def test_a_spread_survives_json_and_nonsense_is_empty() -> None:
    histogram = Metrics().histogram("h")
    for value in (0.5, 0.5, 1e300):
        histogram.observe(value)
    assert spread_of(json.loads(json.dumps(histogram.snapshot()))) == histogram.spread()
    for nonsense in (None, 3, {}, {"buckets": 1}, {"buckets": {"999": 1, "x": 2, "3": "y", "4": -1}, "sum": "z"}):
        assert spread_of(nonsense) == NOTHING


def test_labels_tell_instruments_of_one_name_apart_and_are_summed_up() -> None:
    metrics = Metrics()
    two, ten = metrics.counter("sent", peer=2), metrics.counter("sent", peer=10)
    assert metrics.counter("sent", peer="2") is two
    two.add(3)
    ten.add(4)
    assert list(metrics.snapshot().items()) == [("sent", 7), ('sent{peer="2"}', 3), ('sent{peer="10"}', 4)]
    with pytest.raises(UsageError, match=re.escape('has the labels {peer="2"}, not {path="x"}')):
        metrics.counter("sent", path="x")
    with pytest.raises(UsageError, match="is a Counter, not a Histogram"):
        metrics.histogram("sent", peer=2)


def test_what_is_expected_counts_as_none_until_it_comes() -> None:
    metrics = Metrics()
    metrics.expect("sent")
    assert metrics.snapshot() == {"sent": 0}
    metrics.counter("sent", peer=2).add(3)
    metrics.expect("sent")
    assert metrics.snapshot() == {"sent": 3, 'sent{peer="2"}': 3}


def test_labels_are_bounded() -> None:
    metrics = Metrics()
    for peer in range(LABELS_MAX + 50):
        metrics.counter("sent", peer=peer).add()
    ((name, family),) = metrics.collect()
    assert (name, len(family)) == ("sent", LABELS_MAX + 1)
    assert metrics.counter("sent", peer="other").value == 50
    assert metrics.snapshot()["sent"] == metrics.total("sent") == LABELS_MAX + 50
    assert metrics.total("nothing") == 0
