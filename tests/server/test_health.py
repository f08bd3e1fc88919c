"""Health: decided from what was seen, and seen right when an engine is late, a peer is away, or a node is new."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest
from server.cluster import Cluster, eventually

import marble
from marble.errors import UnavailableError, UsageError
from marble.metrics import Metrics
from marble.server import create_raft_server
from marble.web.health import Disk, Limits, Observation, as_json, examine, is_live, is_ready
from marble.web.host import look_at_disk, look_at_process
from marble.web.observer import Observer

LIMITS = Limits()
STATUS: dict[str, Any] = {
    "cluster_id": "c",
    "node_id": 1,
    "role": "leader",
    "term": 4,
    "leader_id": 1,
    "members": [1, 2, 3],
    "nodes": {"1": "a:1", "2": "b:1", "3": "c:1"},
    "last_index": 1000,
    "persisted_index": 1000,
    "commit_index": 1000,
    "applied_index": 1000,
    "peers": {"2": {"match_index": 1000, "state": "replicate"}, "3": {"match_index": 400, "state": "snapshot"}},
    "links": {"2": {"connected": True}, "3": {"connected": True}},
    "log_bytes": 5000,
}
WELL = Observation(
    status=STATUS,
    disk=Disk(10 * 2**30, 100 * 2**30),
    working=dict.fromkeys(("log", "apply"), 0.0),
    committed_before=900,
)


def ailing(**changes: Any) -> set[str]:
    return {name for name, check in examine(dataclasses.replace(WELL, **changes)).items() if not check.healthy}


def test_a_node_that_is_well_is_well_in_every_part() -> None:
    checks = examine(WELL)
    assert all(check.healthy for check in checks.values())
    assert list(checks) == [
        *("engine", "leader", "membership", "log", "apply", "storage", "disk"),
        *("replication", "transport", "transport/2", "transport/3", "clock"),
    ]
    shown = json.loads(json.dumps(as_json(checks)))
    assert (shown["live"], shown["ready"], shown["healthy"]) == (True, True, True)
    assert shown["components"]["leader"] == {"healthy": True, "detail": "this node leads in term 4"}


@pytest.mark.parametrize(
    ("changes", "parts", "live", "ready"),
    [
        ({"running": False}, {"engine"}, False, False),
        ({"failure": "OSError: no"}, {"engine"}, False, False),
        ({"silent_s": LIMITS.engine_silent_s + 1}, {"engine"}, False, False),
        ({"silent_s": LIMITS.engine_silent_s}, set(), True, True),
        ({"status": STATUS | {"leader_id": 0, "role": "follower"}}, {"leader"}, True, False),
        ({"status": STATUS | {"members": [2, 3]}}, {"membership"}, True, False),
        ({"status": STATUS | {"members": [2, 3], "learners": [1]}}, set(), True, True),
        ({"working": {"log": LIMITS.log_sync_s + 1}}, {"log"}, True, False),
        ({"working": {"apply": LIMITS.apply_job_s + 1}}, {"apply"}, True, False),
        ({"committed_before": 1000}, set(), True, True),
        ({"committed_before": 1001}, {"apply"}, True, False),
        ({"status": STATUS | {"backlog_bytes": LIMITS.backlog_bytes + 1}}, {"storage"}, True, True),
        ({"status": STATUS | {"damaged_files": 1}}, {"storage"}, True, True),
        ({"disk": None}, {"disk"}, True, False),
        ({"disk": Disk(10, 10, read_only=True)}, {"disk"}, True, False),
        ({"disk": Disk(LIMITS.disk_free_bytes - 1, 2**40)}, {"disk"}, True, False),
        ({"disk": Disk(LIMITS.disk_free_bytes, 2**40)}, set(), True, True),
        ({"disk": Disk(6 * 2**20, 100 * 2**20)}, set(), True, True),
        ({"disk": Disk(4 * 2**20, 100 * 2**20)}, {"disk"}, True, False),
        ({"written_before": 400}, set(), True, True),
        ({"written_before": 401}, {"replication"}, True, True),
        ({"clock_skew_s": LIMITS.clock_skew_s + 0.1}, {"clock"}, True, True),
    ],
)
def test_each_limit_ails_one_part(changes: dict[str, Any], parts: set[str], live: bool, ready: bool) -> None:
    checks = examine(dataclasses.replace(WELL, **changes))
    wrong = {name for name, check in checks.items() if not check.healthy}
    # What an engine that is silent knows of the rest is old: it counts as not known.
    assert wrong == parts or (parts == {"engine"} and parts < wrong)
    assert (is_live(checks), is_ready(checks)) == (live, ready)


def test_peers_that_are_away_are_named() -> None:
    links = {"2": {"connected": True}, "3": {"connected": False}}
    checks = examine(dataclasses.replace(WELL, status=STATUS | {"links": links}, written_before=900))
    assert checks["transport"].detail == "no connection to node 3"
    assert checks["transport/3"].detail == "node 3 at c:1 is not reached"
    assert checks["transport/2"].healthy
    assert checks["replication"].detail == "behind for more than 10 s: node 3 by 600 entries (a snapshot is on its way)"
    assert is_ready(checks), "a peer that is away is no reason to leave a leader that has a majority"


def test_who_is_alone_has_no_peers_to_be_judged_by() -> None:
    alone = examine(dataclasses.replace(WELL, alone=True))
    assert not [name for name in alone if name.startswith(("transport", "replication"))]


def test_before_the_first_answer_nothing_is_ready() -> None:
    checks = examine(Observation(disk=Disk(2**40, 2**40)))
    assert is_live(checks)
    assert not is_ready(checks)


class ManualClock:
    """Stands still until it is told not to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def wall_us(self) -> int:
        return int(self.now * 1e6)

    def advance(self, seconds: float) -> None:
        self.now += seconds


class FakeNode:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.is_running = True
        self.failure: BaseException | None = None
        self.answer: Callable[[Future[dict[str, Any]]], None] = lambda future: future.set_result(dict(STATUS))
        self.asked: list[Future[dict[str, Any]]] = []

    def look(self) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        self.asked.append(future)
        self.answer(future)
        return future

    def working(self) -> dict[str, float]:
        return {"log": 0.0}


class FakeLinks:
    def connected(self, peer: int) -> bool:
        return True

    def round_trip_s(self, peer: int) -> float | None:
        return 0.002


def watched(tmp_path: Path) -> tuple[FakeNode, ManualClock, Observer]:
    node, clock = FakeNode(), ManualClock()
    return node, clock, Observer(node, 1, tmp_path, FakeLinks(), clock=clock)


def test_an_answer_serves_all_who_ask_soon_after(tmp_path: Path) -> None:
    node, clock, observer = watched(tmp_path)
    for _ in range(5):
        assert observer.look()["term"] == 4
    assert len(node.asked) == 1
    clock.advance(0.3)
    observer.look()
    assert len(node.asked) == 2


def test_an_engine_that_does_not_answer_is_asked_once_and_its_silence_is_measured(tmp_path: Path) -> None:
    node, clock, observer = watched(tmp_path)
    observer.look()
    clock.advance(1)
    node.answer = lambda future: None
    observer.look(remember=True)
    clock.advance(LIMITS.engine_silent_s + 1)
    checks = observer.health()
    assert len(node.asked) == 2
    assert not is_live(checks)
    assert "has not answered for 6 s" in checks["engine"].detail
    assert observer.turn_s == LIMITS.engine_silent_s + 1
    node.asked[-1].set_result(dict(STATUS))
    assert is_live(observer.health())
    assert observer.moments() == [], "nothing was seen while it was silent"


def test_an_engine_that_has_ended_is_said_to_have(tmp_path: Path) -> None:
    node, clock, observer = watched(tmp_path)
    observer.look()
    clock.advance(1)
    node.answer = lambda future: future.set_exception(UnavailableError("it has stopped"))
    node.is_running, node.failure = False, OSError("the disk is gone")
    assert observer.health()["engine"].detail == "stopped by itself: OSError: the disk is gone"


def test_lag_is_what_was_there_so_long_ago_and_is_missing_still(tmp_path: Path) -> None:
    node, clock, observer = watched(tmp_path)

    def see(**changes: int) -> dict[str, bool]:
        node.answer = lambda future: future.set_result(STATUS | {"peers": {"2": {"match_index": 500}}} | changes)
        observer.look(remember=True)
        found = {name: check.healthy for name, check in observer.health().items()}
        clock.advance(1)
        return found

    for _ in range(4):
        assert see(applied_index=990)["apply"]
    for _ in range(6):
        last = see(applied_index=990)
    assert not last["apply"]
    assert last["replication"], "ten seconds are not over"
    for _ in range(4):
        last = see(applied_index=1000)
    assert last["apply"]
    assert not last["replication"]
    assert len(observer.moments()) == 13
    # A new leader has not told anybody anything for so long.
    node.answer = lambda future: future.set_result(STATUS | {"role": "follower"})
    observer.look(remember=True)
    clock.advance(1)
    assert see()["replication"]


def test_entries_from_the_future_show_that_a_clock_is_wrong() -> None:
    assert Observer.clock_skew_s({"entry_time_us": 9_000_000, "wall_us": 2_000_000}) == 7.0
    assert Observer.clock_skew_s({"entry_time_us": 2_000_000, "wall_us": 9_000_000}) == 0.0
    assert Observer.clock_skew_s({}) == 0.0


def test_the_machine_is_looked_at(tmp_path: Path) -> None:
    disk, process = look_at_disk(tmp_path), look_at_process()
    assert disk is not None
    assert 0 < disk.free_bytes <= disk.size_bytes
    assert look_at_disk(tmp_path / "none") is None
    # Those of gRPC that have logged something are listed for ever: they ended long ago, perhaps.
    ours = [thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)]
    assert process.threads >= len(ours) > 0
    assert process.open_fds > 0
    assert process.resident_bytes > 2**20
    read, write = os.pipe()
    assert look_at_process().open_fds == process.open_fds + 2
    os.close(read)
    os.close(write)


def test_a_cluster_says_how_it_is(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        leader = cluster.servers[cluster.leader()]
        eventually(lambda: all(leader.get_health_status().values()), "health")
        away = cluster.follower()
        cluster.stop_node(away)
        details = eventually(
            lambda: (found := leader.get_health_details())["transport"].healthy is False and found,
            "news of the peer that is gone",
        )
        assert details["transport"].detail == f"no connection to node {away}"
        assert not details[f"transport/{away}"].healthy
        assert is_ready(details)
        other = next(server for node, server in cluster.servers.items() if server is not leader)
        leader.stop()
        lonely = eventually(
            lambda: (found := other.get_health_details())["leader"].healthy is False and found, "the end of the leader"
        )
        assert is_live(lonely)
        assert not is_ready(lonely)
        with flight.FlightClient(f"grpc://{other.endpoint}") as client:
            (answer,) = client.do_action(flight.Action("health", b""))
            said = json.loads(answer.body.to_pybytes())
            assert (said["live"], said["ready"]) == (True, False)
            (answer,) = client.do_action(flight.Action("picture", b'{"after": 1e9}'))
            picture = json.loads(answer.body.to_pybytes())
            assert picture["node"]["node_id"] == other.node_id
            assert picture["moments"]["at"] == []
            (answer,) = client.do_action(flight.Action("metrics", b""))
            assert b"\nmarble_leads 0.0\n" in answer.body.to_pybytes()
            with pytest.raises((flight.FlightError, pa.ArrowException), match="a number of seconds"):
                list(client.do_action(flight.Action("picture", b'{"after": "x"}')))
    finally:
        cluster.stop()


def test_a_node_that_waits_to_be_added_is_live_and_not_ready(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, nodes=1)
    try:
        joining = cluster.join_node(7)
        details = joining.get_health_details()
        assert details["membership"].detail.startswith("is not a member")
        assert is_live(details)
        assert not is_ready(details)
    finally:
        cluster.stop()


def test_health_is_of_a_server_that_runs(tmp_path: Path) -> None:
    server = create_raft_server(data_dir=tmp_path, node_id=1)
    with pytest.raises(UsageError, match="initialize"):
        server.get_health_status()


def test_threads_of_the_watch_end_with_the_node(tmp_path: Path) -> None:
    with marble.open(tmp_path, http="127.0.0.1:0") as database:
        names = {thread.name for thread in threading.enumerate()}
        assert {"marble-observer-1", "marble-http-1"} <= names
        page = database.status()["page"]
        assert str(page).startswith("http://127.0.0.1:")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("marble-")]
