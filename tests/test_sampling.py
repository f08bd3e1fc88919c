"""A node's status, looked at twice: rates, latencies and peers, whatever the status holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marble.errors import UsageError
from marble.metrics import Metrics
from marble.sampling import COUNTERS, MOMENT_FIELDS, History, between, columns, peers, take

STATUS: dict[str, Any] = {
    "node_id": 1,
    "role": "leader",
    "term": 3,
    "leader_id": 1,
    "members": [1, 2],
    "learners": [10],
    "nodes": {"1": "a:1", "2": "b:2", "10": "c:3"},
    "last_index": 100,
    "persisted_index": 99,
    "commit_index": 90,
    "applied_index": 85,
    "peers": {
        "2": {
            "match_index": 95,
            "next_index": 101,
            "state": "replicate",
            "inflight_messages": 2,
            "inflight_bytes": 640,
        },
        "10": {"match_index": 40, "next_index": 41, "state": "snapshot"},
    },
    "links": {"2": {"connected": True, "round_trip_s": 0.001}, "10": {"connected": False}},
}


def test_rates_are_differences_over_time() -> None:
    metrics = Metrics()
    older = take(STATUS | {"metrics": metrics.snapshot()}, 10.0)
    metrics.counter("writes_committed").add(50)
    metrics.counter("transport_messages_sent", peer=2).add(30)
    metrics.counter("transport_messages_sent", peer=10).add(10)
    newer_status = STATUS | {"commit_index": 190, "applied_index": 95, "metrics": metrics.snapshot()}
    moment = between(older, take(json.loads(json.dumps(newer_status)), 12.0), at=7.5)
    assert (moment.at, moment.role, moment.term, moment.leader) == (7.5, "leader", 3, 1)
    assert (moment.writes, moment.messages_sent, moment.entries, moment.applied) == (25.0, 20.0, 50.0, 5.0)
    assert (moment.lag, moment.peer_lag) == (95, 60)


def test_latencies_are_of_what_came_in_between() -> None:
    metrics = Metrics()
    writes = metrics.histogram("write_seconds")
    for _ in range(100):
        writes.observe(1.0)
    older = take({"metrics": metrics.snapshot()}, 0.0)
    assert between(older, take({"metrics": metrics.snapshot()}, 1.0)).write_p99 == 0.0
    writes.observe(0.001)
    moment = between(older, take({"metrics": metrics.snapshot()}, 1.0))
    assert (moment.write_p50, moment.write_p99) == (0.001, 0.001)


def test_a_node_that_was_started_anew_has_no_negative_rates() -> None:
    many, few = Metrics(), Metrics()
    for metrics, count in ((many, 100), (few, 2)):
        metrics.counter("writes_committed").add(count)
        for _ in range(count):
            metrics.histogram("write_seconds").observe(0.5 if metrics is many else 0.1)
    moment = between(take({"metrics": many.snapshot()}, 0.0), take({"metrics": few.snapshot()}, 1.0))
    assert moment.writes == 0.0
    assert moment.write_p50 == 0.1
    assert between(take({}, 5.0), take({}, 5.0)).entries == 0.0


def test_peers_show_what_the_leader_knows() -> None:
    one, two, ten = peers(STATUS)
    assert (one.node, one.here, one.leads, one.connected, one.match_index, one.lag) == (1, True, True, None, 99, 1)
    assert (two.part, two.endpoint, two.connected, two.state, two.lag) == ("voter", "b:2", True, "replicate", 5)
    assert (two.inflight_messages, two.inflight_bytes, two.round_trip_s) == (2, 640, 0.001)
    assert (ten.part, ten.connected, ten.state, ten.lag) == ("learner", False, "snapshot", 60)


def test_a_follower_shows_its_links_and_not_what_it_cannot_know() -> None:
    follower = STATUS | {"node_id": 2, "role": "follower", "peers": {}, "links": {"1": {"connected": True}}}
    one, two, ten = peers(follower)
    assert (one.leads, one.here, one.connected, one.match_index, one.lag) == (True, False, True, None, None)
    assert (two.here, two.leads, two.match_index) == (True, False, None)
    assert (ten.connected, ten.lag) == (None, None)


def test_history_keeps_the_last_moments() -> None:
    history = History(seconds_max=5)
    assert history.add(take(STATUS, 0.0)) is None
    assert history.add(take(STATUS, 0.2)) is None
    for second in range(1, 9):
        assert history.add(take(STATUS, float(second)), at=100.0 + second) is not None
    assert [moment.at for moment in history.moments()] == [104.0, 105.0, 106.0, 107.0, 108.0]
    assert [moment.at for moment in history.moments(after=106.0)] == [107.0, 108.0]
    assert history.last is not None
    assert history.last.at == 8.0
    with pytest.raises(UsageError):
        History(0)


def test_columns_are_json() -> None:
    history = History()
    for second in range(4):
        history.add(take(STATUS | {"metrics": {"writes_committed": second * 10 / 3}}, float(second)))
    shown = json.loads(json.dumps(columns(history.moments())))
    assert tuple(shown) == MOMENT_FIELDS
    assert shown["writes"] == [3.333, 3.333, 3.333]
    assert columns([]) == {name: [] for name in MOMENT_FIELDS}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_nothing_that_a_node_says_makes_it_fail(data: st.DataObject) -> None:
    keys = st.sampled_from([*STATUS, "metrics"])
    wrong = data.draw(st.dictionaries(keys, json_values, max_size=4))
    metrics = data.draw(st.dictionaries(st.sampled_from([*COUNTERS.values(), "write_seconds"]), json_values))
    status = STATUS | {"metrics": metrics} | wrong
    moment = between(take(STATUS, 0.0), take(status, 1.0))
    assert min(moment.entries, moment.writes, moment.reads) >= 0.0
    assert all(peer.node for peer in peers(status))
