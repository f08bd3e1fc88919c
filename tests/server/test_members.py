"""Members, leadership and snapshots over real nodes: a cluster that changes under its clients."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.flight as flight
import pytest
from server.cluster import SCHEMA, WAIT_S, Cluster, eventually, refused, rows

from marble import actions as actions_module
from marble import vigil as vigil_module
from marble.admin import ClusterAdmin
from marble.client import ClientOptions, RemoteBackend
from marble.database import Database
from marble.errors import NotLeaderError, UnavailableError, UsageError
from marble.local import open as marble_open
from marble.server import create_raft_server
from marble.types import Change, ChangeKind, Members, Role, Transition

MakeCluster = Callable[..., Cluster]


def admin(cluster: Cluster) -> ClusterAdmin:
    return ClusterAdmin("grpc://" + ",".join(cluster.config.endpoints.values()), timeout_s=WAIT_S)


class Load:
    """A client that writes keys 0, 1, 2, ... all the time, one after the other."""

    def __init__(self, cluster: Cluster) -> None:
        self.written = 0
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._backend = RemoteBackend(tuple(cluster.config.endpoints.values()), ClientOptions(WAIT_S))
        self._database = Database(self._backend)
        self._table = self._database.table("t")
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._table.write(rows(self.written, self.written + 1))
                self.written += 1
        except BaseException as error:
            self.failure = error

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._database.close()
        assert self.failure is None, repr(self.failure)

    def knows(self, endpoints: Collection[str]) -> bool:
        """Whether the client has learnt of all these nodes."""
        return set(endpoints) <= set(self._backend._contacts.learnt)

    def more(self, count: int = 5) -> None:
        """Wait until so many further writes have succeeded."""
        wanted = self.written + count
        eventually(lambda: self.failure is not None or self.written >= wanted, "further writes")
        assert self.failure is None, repr(self.failure)


def settled(cluster: Cluster, voters: Sequence[int], learners: tuple[int, ...] = ()) -> None:
    """Wait until each of these members that runs knows them."""
    wanted = Members(tuple(voters), learners=learners)
    for node in {*voters, *learners} & set(cluster.servers):
        server = cluster.servers[node]
        eventually(lambda server=server: server.get_members() == wanted, f"node {node} to know {wanted}")


def same_everywhere(cluster: Cluster, count: int) -> None:
    for node, server in cluster.servers.items():
        table = eventually(lambda server=server: _table(server), f"the table at node {node}")
        eventually(lambda table=table: table.count_rows(consistency="local") == count, f"{count} rows at node {node}")


def _table(server: Any) -> Any:
    with contextlib.suppress(UsageError, UnavailableError):
        return server.database.table("t")
    return None


def test_a_cluster_grows_to_five_and_shrinks_to_two_under_load(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vigil_module, "REFRESH_S", 0.1)
    cluster = make_cluster()
    cluster.create_table("t")
    with admin(cluster) as operator, Load(cluster) as load:
        for node in (4, 5):
            cluster.join_node(node)
        operator.change_membership([Change(ChangeKind.ADD_VOTER, 4), Change(ChangeKind.ADD_VOTER, 5)], cluster.joined)
        settled(cluster, [1, 2, 3, 4, 5])
        load.more()
        found = operator.members()
        assert found.members == Members((1, 2, 3, 4, 5))
        assert found.endpoints == {**cluster.config.endpoints, **cluster.joined}
        operator.change_membership([Change(ChangeKind.REMOVE, 1), Change(ChangeKind.REMOVE, 2)])
        operator.change_membership([Change(ChangeKind.REMOVE, 3)])
        settled(cluster, [4, 5])
        eventually(lambda: load.knows(cluster.joined.values()), "the client to learn of the new nodes")
        for node in (1, 2, 3):
            cluster.stop_node(node)
        load.more()
    same_everywhere(cluster, load.written)


def test_a_node_is_replaced_by_an_empty_one(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.create_table("t")
    cluster.put(1, ["t"], [rows(0, 100)])
    lost = cluster.follower()
    cluster.stop_node(lost)
    shutil.rmtree(cluster.directory / str(lost))
    cluster.join_node(4)
    with admin(cluster) as operator:
        operator.change_membership([Change(ChangeKind.ADD_VOTER, 4), Change(ChangeKind.REMOVE, lost)], cluster.joined)
        staying = sorted({1, 2, 3, 4} - {lost})
        settled(cluster, staying)
        assert operator.members().parts == dict.fromkeys(staying, "voter")
    same_everywhere(cluster, 100)
    # The new one counts: without it and with one of the others gone there is no majority.
    cluster.stop_node(next(node for node in staying if node not in (4, cluster.leader())))
    (ack,) = cluster.put(4, ["t"], [rows(100, 101)])
    assert ack.error_code is None


def test_a_learner_follows_and_is_promoted(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.create_table("t")
    cluster.put(1, ["t"], [rows(0, 10)])
    leader = cluster.servers[cluster.leader()]
    cluster.join_node(9)
    eventually(lambda: _accepted(lambda: leader.add_node(9, cluster.joined[9], learner=True)), "the learner")
    settled(cluster, [1, 2, 3], (9,))
    same_everywhere(cluster, 10)
    with pytest.raises(UsageError):
        leader.transfer_leadership(9)
    eventually(lambda: _accepted(lambda: leader.change_membership([Change(ChangeKind.ADD_VOTER, 9)])), "promotion")
    settled(cluster, [1, 2, 3, 9])


def _accepted(change: Callable[[], int]) -> int:
    """The index of the change; 0 while another one is under way."""
    with contextlib.suppress(UnavailableError):
        return change()
    return 0


def test_the_leader_is_removed_and_steps_down(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.create_table("t")
    with admin(cluster) as operator, Load(cluster) as load:
        leader = cluster.leader()
        operator.change_membership([Change(ChangeKind.REMOVE, leader)])
        eventually(lambda: cluster.servers[leader].get_role() is not Role.LEADER, "the removed leader to step down")
        cluster.stop_node(leader)
        load.more()
        assert cluster.leader() != leader
    same_everywhere(cluster, load.written)


def test_an_explicit_transition_waits_to_be_left(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.join_node(4)
    with admin(cluster) as operator:
        changes = [Change(ChangeKind.ADD_VOTER, 4), Change(ChangeKind.REMOVE, 3)]
        operator.change_membership(changes, cluster.joined, Transition.EXPLICIT)
        found = operator.members()
        assert found.members == Members((1, 2, 4), (1, 2, 3))
        assert found.parts == {1: "voter", 2: "voter", 3: "leaving", 4: "joining"}
        operator.change_membership([])
        assert operator.members().members == Members((1, 2, 4))


def test_leadership_is_handed_over_under_load(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.create_table("t")
    with admin(cluster) as operator, Load(cluster) as load:
        for _ in range(3):
            to = cluster.follower()
            operator.transfer_leadership(to)
            # The others know at once; what a node says of itself is as of its engine's last turn.
            eventually(lambda to=to: cluster.servers[to].get_role() is Role.LEADER, "the one that was asked to lead")
            load.more(2)
    same_everywhere(cluster, load.written)


def test_a_follower_that_was_away_too_long_gets_a_snapshot(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(snapshot_distance=20, segment_bytes_max=16 * 1024)
    cluster.create_table("t")
    away = cluster.follower()
    cluster.stop_node(away)
    cluster.put(cluster.leader(), ["t"], [rows(number, number + 1) for number in range(200)])
    last = cluster.servers[cluster.leader()].get_cluster_status()["last_index"]
    before = 20  # What it has at most.
    eventually(
        lambda: cluster.servers[cluster.leader()].get_cluster_status()["purged_index"] > before, "the log to be purged"
    )
    server = cluster.start_node(away)
    eventually(lambda: server.get_cluster_status()["applied_index"] >= last, "the node that was away to catch up")
    assert server.get_cluster_status()["purged_index"] > before
    same_everywhere(cluster, 200)


def test_a_new_node_gets_a_snapshot_and_restarts_from_it(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=1, snapshot_distance=20, segment_bytes_max=16 * 1024)
    cluster.create_table("t")
    cluster.put(1, ["t"], [rows(number, number + 1) for number in range(100)])
    with admin(cluster) as operator:
        index = operator.take_snapshots()[cluster.config.endpoints[1]]
        assert index >= 100
        cluster.join_node(2)
        operator.change_membership([Change(ChangeKind.ADD_VOTER, 2)], cluster.joined)
    settled(cluster, [1, 2])
    same_everywhere(cluster, 100)
    for node in (1, 2):
        cluster.stop_node(node)
    cluster.start_node(1)
    cluster.join_node(2)
    settled(cluster, [1, 2])
    same_everywhere(cluster, 100)
    assert cluster.servers[2].get_cluster_status()["snapshot_index"] > 0
    (ack,) = cluster.put(2, ["t"], [rows(100, 101)])
    assert ack.error_code is None


def test_an_embedded_database_forgets_its_log_and_keeps_its_rows(tmp_path: Path) -> None:
    with marble_open(tmp_path, snapshot_distance=10) as database:
        table = database.create_table("t", rows(0, 1).schema, ["id"])
        for number in range(50):
            table.write(rows(number, number + 1))
        eventually(lambda: database.status()["purged_index"] > 0, "a purge")
    with marble_open(tmp_path, snapshot_distance=10) as database:
        assert database.table("t").count_rows() == 50


def test_calls_that_make_no_sense_are_refused_with_what_to_do(shared: Cluster, node: int) -> None:
    leader = shared.servers[shared.leader()]
    follower = shared.servers[shared.follower()]
    with pytest.raises(NotLeaderError):
        follower.remove_node(1)
    with pytest.raises(UsageError, match="node 9 is new: say where it is found"):
        leader.change_membership([Change(ChangeKind.ADD_VOTER, 9)])
    with pytest.raises(UsageError, match=r"node 9 cannot be at .*: node 1 is there"):
        leader.add_node(9, shared.config.endpoints[1])
    with pytest.raises(UsageError, match="no port"):
        leader.add_node(9, "somewhere")
    before = shared.last_index()
    for body, words in [
        (b"x", "not JSON"),
        ({"changes": 5}, "must be a list"),
        ({"changes": [{"node": 1}]}, "no 'kind'"),
        ({"changes": [{"kind": "promote", "node": 1}]}, "must be one of 'add-voter'"),
        ({"changes": [{"kind": "remove", "node": 0}]}, "1 or more"),
        ({"changes": [{"kind": "remove", "node": 2**32}]}, "at most 4294967295"),
        ({"changes": [{"kind": "remove", "node": 77}]}, "77"),
        ({"changes": [{"kind": "add-voter", "node": 9}]}, "say where it is found"),
        ({"changes": [{"kind": "add-voter", "node": 9, "endpoint": "h"}]}, "no port"),
        ({"changes": [], "transition": "slow"}, "transition must be one of"),
        ({"changes": [{"kind": "remove", "node": each} for each in shared.servers]}, "voter"),
    ]:
        with refused(UsageError, words):
            shared.act(node, "change_membership", body)
    with refused(UsageError, "whole number"):
        shared.act(node, "transfer_leadership", {"to": "2"})
    with refused(UsageError):
        shared.act(node, "transfer_leadership", {"to": 77})
    assert shared.last_index() == before


def test_members_are_told_by_every_node(shared: Cluster, node: int) -> None:
    for body in (b"", {"consistency": "local"}):
        told = shared.act(node, "members", body)
        assert told["voters"] == [1, 2, 3]
        assert told["endpoints"] == {str(each): place for each, place in shared.config.endpoints.items()}


def test_a_server_that_is_to_join_says_what_it_lacks(lonely: Cluster, tmp_path: Path) -> None:
    server = create_raft_server(data_dir=tmp_path / "2", join="127.0.0.1:1")
    with pytest.raises(UsageError, match="pass a node_id to join with"):
        server.initialize(lonely.config)
    server = create_raft_server(data_dir=tmp_path / "2", node_id=2, join=lonely.config.endpoints[1])
    with pytest.raises(UsageError, match=r"2 is to join at .* node 1 is at"):
        server.initialize(lonely.config)


@pytest.fixture
def lonely(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, 1)
    yield cluster
    cluster.stop()


def test_a_node_that_was_not_added_waits_and_knows_nobody(lonely: Cluster) -> None:
    server = lonely.join_node(2)
    assert server.get_role() is Role.FOLLOWER
    assert server.get_members() == Members()
    with pytest.raises(UnavailableError):
        server.wait_for_leader(0.3)
    assert lonely.act(2, "members", {"consistency": "local"})["voters"] == []


def test_a_node_that_was_away_is_called_by_a_leader_that_it_never_heard_of(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.create_table("t")
    away = cluster.follower()
    cluster.stop_node(away)
    cluster.join_node(4)
    cluster.join_node(5)
    with admin(cluster) as operator:
        operator.change_membership([Change(ChangeKind.ADD_VOTER, 4), Change(ChangeKind.ADD_VOTER, 5)], cluster.joined)
        operator.transfer_leadership(4)
    settled(cluster, (1, 2, 3, 4, 5))
    # Those that the other one knows are gone now, and its config has never heard of who is left.
    for node in {1, 2, 3} - {away}:
        cluster.stop_node(node)
    server = cluster.start_node(away)
    eventually(lambda: server.get_members() == Members((1, 2, 3, 4, 5)), "the node to learn who takes part")
    (ack,) = cluster.put(away, ["t"], [rows(0, 3)])
    assert ack.error_code is None
    same_everywhere(cluster, 3)


def test_a_lost_answer_to_an_action_is_fetched(shared: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "created_once"
    lost: list[str] = []
    do = actions_module.Actions.do

    def lose_first(self: actions_module.Actions, context: Any, action: flight.Action) -> bytes:
        answer = do(self, context, action)
        if action.type in ("create_table", "drop_table") and lost.count(action.type) == 0:
            lost.append(action.type)
            raise OSError("the connection broke")
        return answer

    monkeypatch.setattr(actions_module.Actions, "do", lose_first)
    backend = RemoteBackend(tuple(shared.config.endpoints.values()), ClientOptions(WAIT_S))
    with Database(backend) as database:
        database.create_table(name, SCHEMA, ["id"])
        # Dropping what an earlier attempt has dropped would be an error: this is the answer to that attempt.
        assert 0 < database.drop_table(name) < shared.last_index()
    assert lost == ["create_table", "drop_table"]


def test_an_action_whose_session_ended_has_another(shared: Cluster) -> None:
    backend = RemoteBackend(tuple(shared.config.endpoints.values()), ClientOptions(WAIT_S))
    with Database(backend) as database:
        database.create_table("ended", SCHEMA, ["id"])
        ended = backend._orders.session
        shared.act(1, "close_session", {"session": ended})
        database.drop_table("ended")
        assert backend._orders.session not in (0, ended)
