"""A node that lost its data directory and comes back under its old id: nobody counts with it, and it says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import pytest
from server.cluster import WAIT_S, Cluster, eventually, rows

from marble.admin import ClusterAdmin
from marble.errors import OutcomeUnknownError, UnavailableError
from marble.identity import ACQUAINTANCES_FILE, IDENTITY_FILE
from marble.types import Change, ChangeKind, Role

MakeCluster = Callable[..., Cluster]
REFUSED = "transport_incarnations_refused"


def count(cluster: Cluster, node: int, name: str) -> int:
    """A counter of that node."""
    return int(cluster.servers[node].get_cluster_status()["metrics"].get(name, 0))


def wipe(cluster: Cluster, node: int) -> None:
    """Take the directory of a node away that does not run."""
    shutil.rmtree(cluster.directory / str(node))


def test_a_wiped_node_counts_for_nothing_under_its_old_id(
    make_cluster: MakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = make_cluster()
    cluster.create_table("t")
    cluster.put(1, ["t"], [rows(0, 100)])
    leader, wiped = cluster.leader(), cluster.follower()
    other = next(node for node in cluster.servers if node not in (leader, wiped))
    # Followers have said nothing to each other yet, and know each other all the same.
    for node in (leader, other):
        eventually(lambda node=node: str(wiped) in known_to(cluster, node), f"node {node} to know node {wiped}")
    cluster.stop_node(wiped)
    wipe(cluster, wiped)
    cluster.start_node(wiped)
    words = f"the data directory of node {wiped} was replaced"
    for node in (leader, other):
        eventually(lambda node=node: count(cluster, node, REFUSED) >= 3, f"node {node} to refuse node {wiped}")
        told = f"node {wiped} lost node {node} at"
        eventually(
            lambda told=told: any(told in text and words in text for text in caplog.messages),
            "the wiped node to say so",
        )
    assert any(
        text.startswith(words) and "add it under a new id (`marble members`)" in text for text in caplog.messages
    )
    # The two that are whole go on.
    (ack,) = cluster.put(leader, ["t"], [rows(100, 101)])
    assert ack.error_code is None
    # With the wiped one alone a leader has no majority: neither acknowledgements ...
    cluster.stop_node(other)
    with pytest.raises((OutcomeUnknownError, UnavailableError)):
        cluster.servers[leader].propose_operation(b"not to be committed", timeout_s=WAIT_S)
    eventually(lambda: cluster.servers[leader].get_role() is not Role.LEADER, "the leader to step down")
    # ... nor votes, whichever of the two asks.
    before = count(cluster, leader, REFUSED)
    for node in (leader, wiped):
        cluster.servers[node].trigger_election()
    eventually(lambda: count(cluster, leader, REFUSED) >= before + 4, "further attempts to be refused")
    assert {server.get_role() for server in cluster.servers.values()}.isdisjoint({Role.LEADER})
    assert count(cluster, wiped, "transport_messages_received") == 0
    status = cluster.servers[wiped].get_cluster_status()
    assert (status["last_index"], status["leader_id"]) == (0, 0)
    # When a whole one is back, the two lead on, with all that was acknowledged.
    cluster.start_node(other)
    serving = eventually(lambda: leading(cluster), "a leader")
    assert serving in (leader, other)
    table = cluster.servers[serving].database.table("t")
    eventually(lambda: table.count_rows(consistency="local") == 101, "what was acknowledged")


def test_a_wiped_node_comes_back_under_a_new_id(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.create_table("t")
    cluster.put(1, ["t"], [rows(0, 100)])
    wiped = cluster.follower()
    cluster.stop_node(wiped)
    wipe(cluster, wiped)
    cluster.start_node(wiped)
    whole = next(node for node in cluster.servers if node != wiped)
    eventually(lambda: count(cluster, whole, REFUSED) > 0, "the wiped node to be refused")
    cluster.stop_node(wiped)
    wipe(cluster, wiped)
    cluster.join_node(4)
    with ClusterAdmin("grpc://" + ",".join(cluster.config.endpoints.values()), timeout_s=WAIT_S) as operator:
        changes = [Change(ChangeKind.ADD_VOTER, 4), Change(ChangeKind.REMOVE, wiped)]
        operator.change_membership(changes, cluster.joined)
    # The new one counts: without one of the others there is a majority only with it.
    cluster.stop_node(next(node for node in cluster.servers if node not in (4, cluster.leader())))
    (ack,) = cluster.put(4, ["t"], [rows(100, 101)])
    assert ack.error_code is None


def test_nodes_that_restart_in_any_order_are_who_they_were(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.create_table("t")
    before = {node: identity(cluster, node) for node in cluster.servers}
    assert len(set(before.values())) == 3
    for order in ((1, 2, 3), (3, 1, 2)):
        for node in order:
            cluster.stop_node(node)
        for node in reversed(order):
            cluster.start_node(node)
        (ack,) = cluster.put(cluster.leader(), ["t"], [rows(order[0], order[0] + 1)])
        assert ack.error_code is None
    assert {node: identity(cluster, node) for node in cluster.servers} == before
    assert all(count(cluster, node, REFUSED) == 0 for node in cluster.servers)
    for node in cluster.servers:
        others = {str(each): before[each] for each in cluster.servers if each != node}
        eventually(
            lambda node=node, others=others: known_to(cluster, node) == others, f"node {node} to know the others"
        )


def test_a_cluster_that_is_new_as_a_whole_is_unaffected(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    for node in (1, 2, 3):
        cluster.stop_node(node)
    for node in (1, 2, 3):
        wipe(cluster, node)
        cluster.start_node(node)
    cluster.leader()
    cluster.create_table("t")
    assert all(count(cluster, node, REFUSED) == 0 for node in cluster.servers)


def known_to(cluster: Cluster, node: int) -> dict[str, str]:
    """What a node keeps of the others."""
    path = cluster.directory / str(node) / ACQUAINTANCES_FILE
    return dict(json.loads(path.read_text())["met"]) if path.exists() else {}


def identity(cluster: Cluster, node: int) -> str:
    return str(json.loads((cluster.directory / str(node) / IDENTITY_FILE).read_text())["incarnation"])


def leading(cluster: Cluster) -> int:
    """Who leads; 0 if nobody does."""
    return next((node for node, server in cluster.servers.items() if server.get_role() is Role.LEADER), 0)
