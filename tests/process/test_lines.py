"""Bad lines between real processes on hosts of their own: what nodes say to each other goes through relays.

They delay, hold, reset and flip. As in `process.test_namespaces`, whatever happens no acknowledged write is gone and one order explains
what the clients were told. The clients reach the nodes directly: plain TCP would bring them flipped bits as wrong values, and
only TLS can mend that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from machine import machine_lacks
from process.netns import NamespacesForbidden
from process.observed import ELECTION_TIMEOUT_MS, Clients, Cluster, Lines, Watch, related_cluster

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Lines]]:
    try:
        with related_cluster(tmp_path_factory.mktemp("cluster")) as found:
            yield found
    except NamespacesForbidden as error:
        machine_lacks(error)


class Scene:
    """Clients at work on the cluster that `leader` leads when it begins."""

    def __init__(self, cluster: Cluster, lines: Lines, clients: Clients) -> None:
        self.lines = lines
        self.clients = clients
        self.watch = Watch(cluster, clients)
        self.leader = self.watch.leader()
        self.others = [node for node in cluster.endpoints if node != self.leader]

    def heal(self, name: str) -> None:
        since = time.monotonic()
        self.lines.set({})
        seconds = self.watch.healed(since)
        print(f"{name}: back after {seconds:.2f} s, {seconds / (2 * ELECTION_TIMEOUT_MS / 1000):.2f} of two timeouts")


@pytest.fixture
def scene(running: tuple[Cluster, Lines]) -> Iterator[Scene]:
    cluster, lines = running
    lines.set({})
    with cluster.clients() as clients:
        yield Scene(cluster, lines, clients)
        account = clients.finish()
        print(f"{len(account.acknowledged)} writes, {len(account.read_calls)} reads, {dict(account.errors)}")


def test_delay(scene: Scene) -> None:
    """100 ms there and back: slower, and nothing else; who led leads, unless the machine itself is late."""
    scene.lines.set({"delay_s": 0.05})
    scene.clients.wait_for_more(time.monotonic(), 20, 20)
    scene.heal("100 ms")


def test_silence_around_the_leader(scene: Scene) -> None:
    """Its connections are accepted, and nothing ever comes: the others go on without it."""
    scene.lines.set({"silent": True}, [scene.leader])
    began = time.monotonic()
    assert scene.watch.leader(scene.others) != scene.leader
    scene.clients.wait_for_more(began)
    scene.heal("silence")


def test_resets(scene: Scene) -> None:
    """All connections between nodes break again and again: what was under way is sent again, once."""
    for _ in range(8):
        scene.lines.set({}, reset=True)
        scene.clients.wait_for_more(time.monotonic(), 2, 2)
    scene.heal("resets")


def test_flipped_bits(scene: Scene) -> None:
    """Of the bytes between nodes some come with a flipped bit: streams break, and no node takes a wrong word for a right one."""
    scene.lines.set({"flip_chance": 2e-5})
    scene.clients.wait_for_more(time.monotonic(), 60, 20)
    assert scene.lines.set({})["flipped"] > 0
    scene.heal("flipped bits")
