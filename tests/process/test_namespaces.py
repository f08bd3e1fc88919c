"""Faults between real processes on hosts of their own: what the simulator promises, on a real kernel, network and disk.

Each test takes one fault, while clients write and read: it begins, the cluster does what the simulator's plan of the same name says it may,
the fault ends, all is well again. At the end of each no acknowledged write is gone and one order explains all that the clients were
told. How long the way back took is printed, as a multiple of two election timeouts; nothing asserts it (`bench/healing.py` measures it).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from process.netns import Drop, NamespacesForbidden, cut
from process.observed import CLIENTS, ELECTION_TIMEOUT_MS, Clients, Cluster, Watch, running_cluster

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        with running_cluster(tmp_path_factory.mktemp("cluster")) as (found, _):
            yield found
    except NamespacesForbidden as error:
        pytest.skip(str(error))


class Scene:
    """One fault on one cluster."""

    def __init__(self, cluster: Cluster, clients: Clients) -> None:
        self.cluster = cluster
        self.clients = clients
        self.watch = Watch(cluster, clients)
        self.leader = self.watch.leader()
        self.others = [node for node in cluster.endpoints if node != self.leader]

    def heal(self, name: str) -> None:
        """End all faults of the network; all must be well again."""
        since = time.monotonic()
        self.cluster.net.drop()
        seconds = self.watch.healed(since)
        print(f"{name}: back after {seconds:.2f} s, {seconds / (2 * ELECTION_TIMEOUT_MS / 1000):.2f} of two timeouts")


def host(node: int) -> str:
    return str(node)


@pytest.fixture
def scene(cluster: Cluster) -> Iterator[Scene]:
    cluster.net.drop()
    with cluster.clients() as clients:
        found = Scene(cluster, clients)
        yield found
        account = clients.finish()
        print(f"{len(account.acknowledged)} writes, {len(account.read_calls)} reads, {dict(account.errors)}")


def test_partition_of_the_leader(scene: Scene) -> None:
    leader, others = scene.leader, scene.others
    scene.cluster.net.drop(*cut([host(leader)], [host(node) for node in others]))
    assert scene.watch.leader(others) != leader
    began = time.monotonic()
    scene.clients.wait_for_more(began)
    scene.heal("partition")
