"""Metrics as Prometheus reads them: all that the docs list, nothing else, and exact."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as flight
import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from server.cluster import WAIT_S, Cluster, eventually, rows

import marble
from marble.metrics import Metrics
from marble.web.instruments import INSTRUMENTS, Kind

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = ROOT / "docs" / "operations.md"

ROW = re.compile(r"^\| `(marble_\w+)(?:\{([\w, ]+)\})?` \| (\w+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)


def families(text: str) -> dict[str, Metric]:
    """Metrics by their names, where counters are named as in the text."""
    parsed = text_string_to_metric_families(text)
    return {family.name + ("_total" if family.type == "counter" else ""): family for family in parsed}


def value(family: Metric, **labels: str) -> float:
    (sample,) = [sample for sample in family.samples if sample.labels == labels]
    return float(sample.value)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.stop()


def test_docs_and_a_running_server_list_the_same(cluster: Cluster) -> None:
    shown = families(cluster.servers[cluster.leader()].get_metrics_text())
    listed = {
        name: (labels, kind, unit, meaning) for name, labels, kind, unit, meaning in ROW.findall(OPERATIONS.read_text())
    }
    assert listed.keys() - shown.keys() == set(), "in the docs, and not shown"
    assert shown.keys() - listed.keys() == set(), "shown, and not in the docs"
    for name, (labels, kind, unit, meaning) in listed.items():
        family = shown[name]
        assert (family.type, family.documentation.lower()) == (kind, f"{meaning} ({unit})".lower())
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(labels.split(", ") if labels else ()), name


def test_everything_that_is_counted_is_described() -> None:
    text = "".join(path.read_text() for path in (ROOT / "marble").rglob("*.py"))
    found = {name: kind for kind, name in re.findall(r"\.(counter|gauge|histogram)\(\s*\"(\w+)\"", text)}
    assert found.keys() - INSTRUMENTS.keys() == set()
    wrong = {name for name, kind in found.items() if INSTRUMENTS[name].kind.value != kind}
    assert wrong == set()


def test_units_are_said_in_names_where_there_are_some() -> None:
    for described in INSTRUMENTS.values():
        for unit in ("seconds", "bytes"):
            assert (described.unit == unit) == (unit in described.name.split("_")) or described.name == "uptime_seconds"


def test_values_are_exact(cluster: Cluster) -> None:
    leader = cluster.servers[cluster.leader()]
    table = leader.database.create_table("exact", rows(0, 1).schema, key=["id"])
    before = families(leader.get_metrics_text())
    for each in range(10):
        table.write(rows(each, each + 1))
    after = families(leader.get_metrics_text())
    assert value(after["marble_writes_committed_total"]) - value(before["marble_writes_committed_total"]) == 10
    for name in ("marble_write_seconds", "marble_commit_seconds"):
        counts = {
            sample.labels.get("le"): sample.value for sample in after[name].samples if sample.name.endswith("_bucket")
        }
        total = next(sample.value for sample in after[name].samples if sample.name.endswith("_count"))
        assert counts["+Inf"] == total >= 11
        edges = [edge for edge in counts if edge is not None]
        assert sorted(edges, key=float) == edges
        assert sorted(counts.values()) == list(counts.values())
        assert {"1e-05", "0.0022", "0.47", "1.0", "100.0", "+Inf"} <= set(edges)
    eventually(
        lambda: (
            value(families(leader.get_metrics_text())["marble_applied_index"])
            == leader.get_cluster_status()["applied_index"]
        ),
        "the gauge of what is applied",
    )


def test_each_peer_has_its_lines(cluster: Cluster) -> None:
    # On a busy machine the leadership may move: everything is read anew then.
    def shown() -> bool:
        leader = cluster.leader()
        peers = {str(node) for node in cluster.servers} - {str(leader)}
        leads = families(cluster.servers[leader].get_metrics_text())
        follows = families(cluster.servers[cluster.follower()].get_metrics_text())
        return (
            {sample.labels["peer"] for sample in leads["marble_peer_connected"].samples if sample.value} == peers
            and {sample.labels["peer"] for sample in leads["marble_peer_lag_entries"].samples} == peers
            and value(leads["marble_leads"]) == 1.0
            and value(leads["marble_role"], role="leader") == 1.0
            and value(leads["marble_healthy"], component="engine") == 1.0
            and follows["marble_peer_lag_entries"].samples == []
            and value(follows["marble_leader_id"]) == leader
        )

    eventually(shown, "the lines of a leader and of its follower")


def test_calls_of_clients_are_counted_by_what_became_of_them(cluster: Cluster) -> None:
    leader = cluster.servers[cluster.leader()]
    with marble.connect(f"grpc://{leader.endpoint}") as database:
        table = database.create_table("calls", pa.schema([("id", pa.int64())]), key=["id"])
        table.write(pa.record_batch({"id": [1]}))
    with flight.FlightClient(f"grpc://{leader.endpoint}") as client:
        for invented in ("x" * 100, "y"):
            with pytest.raises(pa.ArrowException, match="there is no action"):
                list(client.do_action(flight.Action(invented, b"")))
    shown = eventually(
        lambda: (
            (found := families(leader.get_metrics_text()))
            and any(sample.labels["method"] == "do_exchange" for sample in found["marble_requests_total"].samples)
            and found
        ),
        "the end of the stream of writes",
    )
    requests = shown["marble_requests_total"]
    assert value(requests, method="do_action/create_table", outcome="ok") == 1
    assert value(requests, method="do_action/unknown", outcome="UsageError") == 2
    timed = {sample.labels["method"] for sample in shown["marble_request_seconds"].samples}
    assert "do_action/create_table" in timed
    assert "do_exchange" not in timed


def test_over_http(tmp_path: Path) -> None:
    with marble.open(tmp_path, http="127.0.0.1:0") as database:
        host, port = str(database.status()["page"]).removeprefix("http://").rstrip("/").split(":")
        with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=WAIT_S)) as connection:
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
            assert value(families(answer.read().decode())["marble_term"]) >= 1


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with marble.open(tmp_path, http="127.0.0.1:0") as database:
        monkeypatch.setitem(sys.modules, "prometheus_client", None)
        host, port = str(database.status()["page"]).removeprefix("http://").rstrip("/").split(":")
        with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=WAIT_S)) as connection:
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            assert answer.status == 501
            assert "pip install 'marbledb[server]'" in json.loads(answer.read())["error"]


def test_what_nobody_described_is_shown_all_the_same(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.counter("novelty", peer=3).add(7)
    from marble.web import exposition

    ((name, instruments),) = metrics.collect()
    described = type(INSTRUMENTS["requests"])(name, Kind.COUNTER, "1", "not described", ("peer",))
    family = exposition._family(described, instruments, [])
    assert [(sample.labels, sample.value) for sample in family.samples] == [({"peer": "3"}, 7)]
