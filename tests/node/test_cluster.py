"""Several nodes with their engines and threads in this process; the network is a function call."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pytest

from marble._core.entry_batch import Proposal
from marble.env import AppendFile, SystemFiles
from marble.errors import MarbleError, NotLeaderError, UnavailableError, UsageError
from marble.lsm import payload
from marble.lsm.machine import TableMachine
from marble.node import Node
from marble.options import NodeOptions
from marble.promises import Committed
from marble.transport.codec import Codec, Envelope
from marble.types import Change, ChangeKind, EntryKind, Role

DEADLINE_S = 30.0
SCHEMA = pa.schema([pa.field("k", pa.int64(), nullable=False), pa.field("v", pa.string())])
ENDPOINTS = {1: "one:1", 2: "two:1", 3: "three:1"}


class Wire:
    """Carries packets to the other nodes' inboxes, as bytes; to those only that the node was told of."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster = cluster
        self.number = number
        self.codec = Codec("c", number, 1 << 24)
        self.peers: dict[int, str] = {}

    def send(self, to: int, envelopes: list[Envelope]) -> bool:
        target = self.cluster.nodes.get(to)
        if to not in self.peers or target is None:
            return False
        there = self.cluster.wires[to]
        if self.number not in there.peers:
            return False
        for packet in self.codec.encode(to, envelopes):
            target.receive(there.codec.decode(self.number, packet.metadata, packet.batch))
        return True

    def set_peers(self, endpoints: Mapping[int, str]) -> None:
        self.peers = dict(endpoints)


class Cluster:
    def __init__(self, path: Path, **options: object) -> None:
        self.path = path
        self.options = {
            "tick_ms": 10.0,
            "election_ticks": 30,
            "heartbeat_ticks": 3,
            "snapshot_distance": 40,
            "snapshot_piece_bytes": 512,
            "segment_bytes_max": 4096,
            **options,
        }
        self.nodes: dict[int, Node] = {}
        self.wires: dict[int, Wire] = {}
        self.files: dict[int, SystemFiles] = {}
        self.on_command: dict[int, Callable[[int, bytes], None]] = {}

    def start(self, number: int, **options: object) -> Node:
        wire = self.wires[number] = Wire(self, number)
        wire.set_peers({peer: where for peer, where in ENDPOINTS.items() if peer != number})
        settings = NodeOptions(
            **{"cluster_id": "c", "node_id": number, "endpoints": ENDPOINTS, **self.options, **options}
        )
        machines = {0: TableMachine(self.on_command.get(number)), 5: TableMachine()}
        node = Node(settings, self.files.get(number, SystemFiles(self.path / str(number))), machines, wire)
        node.start()
        self.nodes[number] = node
        return node

    def stop(self, number: int) -> None:
        self.nodes.pop(number).stop(DEADLINE_S)

    def lead(self, number: int, group: int = 0) -> Node:
        node = self.nodes[number]

        def leads() -> bool:
            status = node.status(group)
            other = self.nodes.get(status["leader_id"])
            if other is not None and other is not node:
                with contextlib.suppress(MarbleError):
                    other.transfer_leadership(number, group).result(DEADLINE_S)
            elif status["role"] == "follower":
                node.campaign(group)
            # Its no-op is applied: before that no change of the members is taken.
            return status["role"] == "leader" and status["applied_index"] == status["last_index"]

        eventually(leads, f"node {number} leads")
        return node

    def write(self, leader: int, first: int, end: int, group: int = 0) -> None:
        futures = [self.nodes[leader].propose(write(key), group=group) for key in range(first, end)]
        for future in futures:
            future.result(DEADLINE_S)


class HangingFiles(SystemFiles):
    """A disk whose syncs hang while `gate` is closed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate = threading.Event()
        self.gate.set()

    def create(self, path: str) -> AppendFile:
        return self._gated(super().create(path))

    def open_append(self, path: str) -> AppendFile:
        return self._gated(super().open_append(path))

    def _gated(self, file: AppendFile) -> AppendFile:
        sync = file.sync

        def wait() -> None:
            assert self.gate.wait(DEADLINE_S)
            sync()

        file.sync = wait
        return file


def eventually(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end, f"{what}: not in time"
        pause.wait(0.005)


def create() -> Proposal:
    return Proposal(EntryKind.CREATE_TABLE, 0, payload.encode_create_table("t", SCHEMA, ["k"]))


def write(key: int) -> Proposal:
    batch = pa.record_batch({"k": [key], "v": [f"value {key}"]}, schema=SCHEMA)
    return Proposal(EntryKind.WRITE, 1, payload.encode_rows(batch))


def keys(node: Node, group: int = 0) -> list[int]:
    node.read_index(group).result(DEADLINE_S)
    return sorted(node.machines[group].read("t").scan(["k"], None).read_all()["k"].to_pylist())


@pytest.fixture(params=[60.0, -1.0], ids=["on the spot", "handed over"])
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    monkeypatch.setattr("marble.workers.QUICK_S", request.param)
    cluster = Cluster(tmp_path)
    for number in ENDPOINTS:
        cluster.start(number)
    yield cluster
    for number in list(cluster.nodes):
        cluster.stop(number)


def test_a_node_that_was_away_past_the_purge_comes_back_by_a_snapshot(cluster: Cluster) -> None:
    leader = cluster.lead(1)
    leader.propose(create()).result(DEADLINE_S)
    cluster.write(1, 0, 10)
    cluster.stop(3)
    cluster.write(1, 10, 300)
    eventually(lambda: leader.status()["purged_index"] > 100, "the leader purges its log")
    node = cluster.start(3)
    eventually(lambda: node.status()["applied_index"] >= 301, "the follower is there")
    assert keys(node) == list(range(300))
    assert node.status()["snapshot_index"] > 100
    # And it starts from there again.
    cluster.stop(3)
    node = cluster.start(3)
    assert node.status()["applied_index"] > 100
    eventually(lambda: keys(node) == list(range(300)), "all rows after the restart")


def test_a_leader_whose_disk_hangs_steps_down_and_goes_on_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marble.workers.QUICK_S", -1.0)
    cluster = Cluster(tmp_path)
    files = cluster.files[1] = HangingFiles(tmp_path / "1")
    for number in ENDPOINTS:
        cluster.start(number)
    try:
        leader = cluster.lead(1)
        leader.propose(create()).result(DEADLINE_S)
        files.gate.clear()
        first = leader.propose(write(0))
        # It still hears and answers, and it knows what it cannot do.
        eventually(lambda: leader.status()["role"] != "leader", "the leader steps down")
        eventually(lambda: cluster.nodes[2].leading_term or cluster.nodes[3].leading_term, "another one leads")
        files.gate.set()
        # The others may have committed it without its disk; then it is told so.
        with contextlib.suppress(MarbleError):
            first.result(DEADLINE_S)
        cluster.lead(1)
        cluster.write(1, 1, 3)
        assert keys(cluster.nodes[2])[-2:] == [1, 2]
    finally:
        files.gate.set()
        for number in list(cluster.nodes):
            cluster.stop(number)


def test_a_slow_call_of_apply_does_not_cost_the_leadership(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marble.workers.QUICK_S", -1.0)
    gate = threading.Event()
    cluster = Cluster(tmp_path)
    cluster.on_command[1] = lambda index, operation: gate.wait(DEADLINE_S) and None
    for number in ENDPOINTS:
        cluster.start(number)
    try:
        leader = cluster.lead(1)
        leader.propose(create()).result(DEADLINE_S)
        term = leader.leading_term
        held = leader.propose(Proposal(EntryKind.COMMAND, 0, payload.encode_command(b"wait")))
        behind = leader.propose(write(0))
        # The followers hear of the commit: the engine goes on to speak while its machine stands.
        for other in (2, 3):
            node = cluster.nodes[other]
            eventually(lambda node=node: node.status()["commit_index"] >= 4, f"node {node.options.node_id} hears of it")
        assert not held.done()
        assert leader.status()["applied_index"] < 4
        gate.set()
        assert behind.result(DEADLINE_S).term == term
    finally:
        gate.set()
        for number in list(cluster.nodes):
            cluster.stop(number)


def test_groups_have_leaders_of_their_own(cluster: Cluster) -> None:
    cluster.lead(1)
    other = cluster.lead(2, group=5)
    other.propose(create(), group=5).result(DEADLINE_S)
    cluster.write(2, 0, 5, group=5)
    assert keys(cluster.nodes[3], group=5) == list(range(5))
    assert cluster.nodes[1].status()["role"] == "leader"
    with pytest.raises(UsageError, match="no group 9"):
        other.propose(create(), group=9)


def test_a_cluster_grows_by_a_node_that_waits_and_loses_one(cluster: Cluster) -> None:
    leader = cluster.lead(1)
    leader.propose(create()).result(DEADLINE_S)
    cluster.write(1, 0, 200)
    fourth = cluster.start(4, join=True)
    assert fourth.role is Role.FOLLOWER
    assert fourth.members().all == ()
    change = leader.change_membership([Change(ChangeKind.ADD_LEARNER, 4)], {4: "four:1"})
    assert isinstance(change.result(DEADLINE_S), Committed)
    eventually(lambda: fourth.members().learners == (4,), "the new node knows itself")
    eventually(lambda: fourth.status()["applied_index"] >= 200, "the new node has the log")
    assert fourth.endpoints == {**ENDPOINTS, 4: "four:1"}
    leader.change_membership([Change(ChangeKind.ADD_VOTER, 4), Change(ChangeKind.REMOVE, 3)]).result(DEADLINE_S)
    eventually(lambda: leader.members().voters == (1, 2, 4) and not leader.members().joint, "the joint group is left")
    # The other group has it still.
    assert 3 in cluster.wires[1].peers
    cluster.lead(1, group=5).change_membership([Change(ChangeKind.REMOVE, 3)], group=5).result(DEADLINE_S)
    eventually(lambda: 3 not in cluster.wires[1].peers, "nobody talks to the third any more")
    cluster.write(1, 200, 210)
    assert keys(fourth) == list(range(210))
    status = leader.status()
    assert (status["members"], status["joint"], status["nodes"]["4"]) == ([1, 2, 4], False, "four:1")


def test_changes_that_cannot_be_are_refused_with_the_reason(cluster: Cluster) -> None:
    leader = cluster.lead(1)
    add = [Change(ChangeKind.ADD_VOTER, 4)]
    with pytest.raises(UsageError, match="say where node 4 is reached"):
        leader.change_membership(add).result(DEADLINE_S)
    with pytest.raises(UsageError, match="nowhere"):
        leader.change_membership(add, {4: "nowhere"})
    eventually(lambda: cluster.nodes[2].leader_endpoint == "one:1", "the follower knows its leader")
    with pytest.raises(NotLeaderError) as caught:
        cluster.nodes[2].change_membership(add, {4: "four:1"}).result(DEADLINE_S)
    assert caught.value.leader == "one:1"


def test_the_leadership_is_handed_over(cluster: Cluster) -> None:
    leader = cluster.lead(1)
    leader.transfer_leadership(2).result(DEADLINE_S)
    assert cluster.nodes[2].status()["role"] == "leader"
    with pytest.raises(NotLeaderError):
        leader.transfer_leadership(3).result(DEADLINE_S)
    with pytest.raises(UsageError, match="cannot lead"):
        cluster.nodes[2].transfer_leadership(9).result(DEADLINE_S)
    assert cluster.nodes[2].transfer_leadership(2).result(DEADLINE_S) is None


def test_a_handover_to_a_node_that_is_down_ends_and_writing_goes_on(cluster: Cluster) -> None:
    leader = cluster.lead(1)
    leader.propose(create()).result(DEADLINE_S)
    cluster.stop(3)
    with pytest.raises(UnavailableError, match="did not take over"):
        leader.transfer_leadership(3).result(DEADLINE_S)
    cluster.write(1, 0, 3)


def test_a_snapshot_on_request(cluster: Cluster) -> None:
    leader = cluster.lead(1)
    leader.propose(create()).result(DEADLINE_S)
    cluster.write(1, 0, 10)
    index = leader.snapshot().result(DEADLINE_S)
    assert index == leader.status()["snapshot_index"] == leader.status()["applied_index"]
    assert leader.snapshot().result(DEADLINE_S) == index


def test_who_waits_for_a_handover_or_a_snapshot_hears_when_the_node_stops(cluster: Cluster) -> None:
    leader = cluster.lead(1)
    leader.propose(create()).result(DEADLINE_S)
    cluster.stop(3)
    handover = leader.transfer_leadership(3)
    eventually(lambda: leader.status()["transferee"] == 3, "the handover is under way")
    cluster.stop(1)
    with pytest.raises(UnavailableError):
        handover.result(DEADLINE_S)
    with pytest.raises(UnavailableError):
        leader.snapshot().result(DEADLINE_S)


def test_a_configuration_that_names_others_changes_nothing_and_says_so(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.stop(3)
    node = cluster.start(3, endpoints={**ENDPOINTS, 4: "four:1"})
    assert node.members().voters == (1, 2, 3)
    assert "members are added and removed" in caplog.text


def test_reads_by_lease_ask_nobody(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, lease_reads=True)
    for number in ENDPOINTS:
        cluster.start(number)
    try:
        leader = cluster.lead(1)
        leader.propose(create()).result(DEADLINE_S)
        eventually(lambda: leader.call(lambda raft: raft.lease_until_us > 0).result(DEADLINE_S), "a lease")
        assert leader.read_index(lease=True).result(DEADLINE_S) >= 2
    finally:
        for number in list(cluster.nodes):
            cluster.stop(number)


def test_sleeping_groups_wake_for_a_write(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, quiesce_ticks=10)
    for number in ENDPOINTS:
        cluster.start(number)
    try:
        leader = cluster.lead(1)
        leader.propose(create()).result(DEADLINE_S)
        eventually(lambda: leader.status()["quiesced"], "the group sleeps")
        cluster.write(1, 0, 3)
        assert keys(cluster.nodes[2]) == [0, 1, 2]
    finally:
        for number in list(cluster.nodes):
            cluster.stop(number)
