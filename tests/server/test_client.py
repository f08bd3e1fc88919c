"""The client against nodes that we hold in hand: silent, mistaken, or gone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.flight as fl
import pytest

from marble.client import ClientOptions, RemoteBackend
from marble.errors import UnavailableError, UsageError
from marble.requests import ScanRequest
from marble.schema import TableInfo

SCHEMA = pa.schema([pa.field("k", pa.int64(), nullable=False)])
TABLE = TableInfo(1, "t", SCHEMA, ("k",))
DEADLINE_S = 30.0


class Node(fl.FlightServerBase):
    """Says of itself what the test wants, and counts how often it was asked."""

    def __init__(self) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self.endpoint = f"127.0.0.1:{self.port}"
        self.status: Callable[[], dict] = dict
        self.asked = 0
        self.release = threading.Event()
        self.rows: list[pa.RecordBatch] = []
        self.silent_after: int | None = None
        self.hung = False

    def do_action(self, context, action):
        self.asked += 1
        if self.hung:
            self.release.wait(DEADLINE_S)
        yield json.dumps(self.status()).encode()

    def do_get(self, context, ticket):
        def batches() -> Iterator[pa.RecordBatch]:
            for number, batch in enumerate(self.rows):
                if number == self.silent_after:
                    self.release.wait(DEADLINE_S)
                yield batch

        return fl.GeneratorStream(SCHEMA, batches())

    def says(self, role: str, leader: str | None, nodes: list[str]) -> None:
        named = {str(number): endpoint for number, endpoint in enumerate(nodes, 1)}
        self.status = lambda: {"role": role, "leader_endpoint": leader, "nodes": named}


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    made = [Node() for _ in range(3)]
    yield made
    for node in made:
        node.release.set()
        node.shutdown()


@pytest.fixture
def make() -> Iterator[Callable[..., RemoteBackend]]:
    made: list[RemoteBackend] = []

    def backend(*endpoints: str, timeout_s: float = DEADLINE_S) -> RemoteBackend:
        made.append(RemoteBackend(endpoints, ClientOptions(timeout_s)))
        return made[-1]

    yield backend
    for each in made:
        each.close()


def test_it_follows_a_nodes_word_to_a_leader_that_it_was_not_given(
    nodes: list[Node], make: Callable[..., RemoteBackend]
) -> None:
    follower, leader, _ = nodes
    everyone = [node.endpoint for node in nodes]
    follower.says("follower", leader.endpoint, everyone)
    leader.says("leader", leader.endpoint, everyone)
    backend = make(follower.endpoint)
    backend._locate(time.monotonic() + DEADLINE_S, False)
    assert (follower.asked, leader.asked) == (1, 1)


def test_nodes_that_name_one_another_do_not_keep_it_busy(nodes: list[Node], make: Callable[..., RemoteBackend]) -> None:
    first, second, _ = nodes
    first.says("follower", second.endpoint, [first.endpoint, second.endpoint])
    second.says("follower", first.endpoint, [first.endpoint, second.endpoint])
    backend = make(first.endpoint, second.endpoint)
    with pytest.raises(UnavailableError, match="no node took the write"):
        backend._locate(time.monotonic() + 0.5, False)
    # Each round asks a few times and then waits, longer and longer.
    assert first.asked + second.asked < 60


def test_what_asks_about_one_replica_stays_with_the_nodes_that_were_given(
    nodes: list[Node], make: Callable[..., RemoteBackend]
) -> None:
    given, leader, _ = nodes
    everyone = [node.endpoint for node in nodes]
    given.says("follower", leader.endpoint, everyone)
    leader.says("leader", leader.endpoint, everyone)
    given.rows = [pa.record_batch({"k": [1]}, schema=SCHEMA)]
    backend = make(given.endpoint)
    backend._locate(time.monotonic() + DEADLINE_S, False)
    assert backend.status()["role"] == "follower"
    assert backend.scan(TABLE, ScanRequest(consistency="local")).read_all().num_rows == 1
    assert backend.scan(TABLE, ScanRequest()).read_all().num_rows == 0


def test_a_node_that_is_gone_is_passed_over(nodes: list[Node], make: Callable[..., RemoteBackend]) -> None:
    gone, alive, _ = nodes
    alive.says("leader", alive.endpoint, [alive.endpoint])
    gone.shutdown()
    assert make(gone.endpoint, alive.endpoint).status()["role"] == "leader"


@pytest.mark.parametrize("read", ["status", "scan"])
def test_a_node_that_hangs_costs_its_share_of_one_read_and_is_then_asked_last(
    nodes: list[Node], make: Callable[..., RemoteBackend], read: str
) -> None:
    hung, alive, _ = nodes
    hung.hung = True
    alive.says("leader", alive.endpoint, [alive.endpoint])
    backend = make(hung.endpoint, alive.endpoint, timeout_s=3.0)
    for _ in range(2):
        if read == "status":
            assert backend.status()["role"] == "leader"
        else:
            assert backend.scan(TABLE, ScanRequest()).read_all().num_rows == 0
    assert hung.asked == 1


def test_who_hangs_is_not_followed_to_by_those_who_still_name_it(
    nodes: list[Node], make: Callable[..., RemoteBackend]
) -> None:
    """Followers name a leader for a while after it is gone; whoever was found silent is asked last then."""
    hung, follower, leader = nodes
    hung.hung = True
    everyone = [node.endpoint for node in nodes]
    follower.says("follower", hung.endpoint, everyone)
    leader.says("leader", leader.endpoint, everyone)
    backend = make(hung.endpoint, follower.endpoint, leader.endpoint)
    for _ in range(3):
        backend._locate(time.monotonic() + DEADLINE_S, True)
        assert backend._contacts.leader == leader.endpoint
    assert hung.asked < leader.asked


@pytest.mark.parametrize("name", ["marble-client-watch", "marble-put-"])
def test_close_after_ctrl_c_while_a_thread_was_started(
    nodes: list[Node], make: Callable[..., RemoteBackend], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name.startswith(name):
            raise KeyboardInterrupt
        start(thread)

    backend = make(nodes[0].endpoint)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.write(TABLE, pa.record_batch({"k": [1]}, schema=SCHEMA))
    backend.close()


def test_a_scan_that_stands_still_is_given_up(nodes: list[Node], make: Callable[..., RemoteBackend]) -> None:
    node = nodes[0]
    node.rows = [pa.record_batch({"k": [number]}, schema=SCHEMA) for number in range(3)]
    node.silent_after = 2
    reader = make(node.endpoint, timeout_s=0.5).scan(TABLE, ScanRequest(consistency="local"))
    assert [reader.read_next_batch()["k"][0].as_py() for _ in range(2)] == [0, 1]
    with pytest.raises(UnavailableError):
        reader.read_next_batch()


def test_after_close_it_says_so(nodes: list[Node], make: Callable[..., RemoteBackend]) -> None:
    backend = make(nodes[0].endpoint)
    backend.close()
    with pytest.raises(UsageError, match="closed"):
        backend.status()
    assert not [thread for thread in threading.enumerate() if thread.name == "marble-client-watch"]


def test_a_scan_with_a_limit_behind_a_filter_ends_when_it_has_enough(
    nodes: list[Node], make: Callable[..., RemoteBackend]
) -> None:
    node = nodes[0]
    node.rows = [pa.record_batch({"k": [number]}, schema=SCHEMA) for number in range(4)]
    # What follows never comes, and nobody waits for it.
    node.silent_after = 3
    request = ScanRequest(filter=pc.field("k") > 0, limit=2, consistency="local")
    assert make(node.endpoint).scan(TABLE, request).read_all()["k"].to_pylist() == [1, 2]
