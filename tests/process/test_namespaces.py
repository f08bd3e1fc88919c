"""Faults between real processes on hosts of their own: what the simulator promises, on a real kernel, network and disk.

Each test takes one fault, while clients write and read: it begins, the cluster does what the simulator's plan of the same name says it may,
the fault ends, all is well again. At the end of each no acknowledged write is gone and one order explains all that the clients were
told. How long the way back took is printed, as a multiple of two election timeouts; nothing asserts it (`bench/healing.py` measures it).
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from machine import machine_lacks
from process.netns import Drop, NamespacesForbidden, SmallDisk, cut
from process.observed import CLIENTS, DEADLINE_S, ELECTION_TIMEOUT_MS, PORT, Clients, Cluster, Watch, running_cluster

pytestmark = pytest.mark.timeout(400)
DISK_MIB = 96

SILENT = """
import socket
server = socket.create_server(("", {port}))
print("ready", flush=True)
accepted = []
while True:
    accepted.append(server.accept())
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, dict[int, SmallDisk]]]:
    try:
        with running_cluster(
            tmp_path_factory.mktemp("cluster"), small_disks=dict.fromkeys((1, 2, 3), DISK_MIB)
        ) as found:
            yield found
    except NamespacesForbidden as error:
        machine_lacks(error)


class Scene:
    """One fault on one cluster, that leads with `leader` when it begins."""

    def __init__(self, cluster: Cluster, disks: dict[int, SmallDisk], clients: Clients) -> None:
        self.cluster = cluster
        self.disks = disks
        self.clients = clients
        self.watch = Watch(cluster, clients)
        self.leader = self.watch.leader()
        self.others = [node for node in cluster.endpoints if node != self.leader]

    def drop(self, *drops: Drop) -> float:
        """Let the network be so from now on; when that was."""
        self.cluster.net.drop(*drops)
        return time.monotonic()

    def heal(self, name: str) -> None:
        """End all faults of the network; all must be well again."""
        since = self.drop()
        self.healed(name, since)

    def healed(self, name: str, since: float) -> None:
        seconds = self.watch.healed(since)
        print(f"{name}: back after {seconds:.2f} s, {seconds / (2 * ELECTION_TIMEOUT_MS / 1000):.2f} of two timeouts")

    @contextlib.contextmanager
    def stopped(self, node: int) -> Iterator[None]:
        """The node's process stands still meanwhile; its kernel goes on to accept connections."""
        self.cluster.signal(node, signal.SIGSTOP)
        try:
            yield
        finally:
            self.cluster.signal(node, signal.SIGCONT)


def hosts(*nodes: int) -> list[str]:
    return [str(node) for node in nodes]


@pytest.fixture
def scene(running: tuple[Cluster, dict[int, SmallDisk]]) -> Iterator[Scene]:
    cluster, disks = running
    cluster.net.drop()
    with cluster.clients() as clients:
        yield Scene(cluster, disks, clients)
        account = clients.finish()
        print(f"{len(account.acknowledged)} writes, {len(account.read_calls)} reads, {dict(account.errors)}")


def test_partition(scene: Scene) -> None:
    """The leader is alone: the others elect one, and the clients find it."""
    began = scene.drop(*cut(hosts(scene.leader), hosts(*scene.others)))
    assert scene.watch.leader(scene.others) != scene.leader
    scene.clients.wait_for_more(began)
    scene.heal("partition")


def test_partition_with_clients_on_the_side_of_the_majority(scene: Scene) -> None:
    began = scene.drop(*cut(hosts(scene.leader), [*hosts(*scene.others), CLIENTS]))
    scene.clients.wait_for_more(began)
    scene.heal("partition")


def test_no_majority(scene: Scene) -> None:
    """Nobody hears anybody: no write is acknowledged, and who does not want to wait is told so, in the right words."""
    nodes = hosts(*scene.cluster.endpoints)
    drops = [Drop(one, other) for one in nodes for other in nodes if one != other]
    began = scene.drop(*drops)
    endpoint = scene.cluster.endpoints[scene.leader]
    asked = [scene.clients.order("write", endpoint=endpoint, timeout_s=2.0) for _ in range(3)]
    errors = {scene.clients.reply(number)["error"] for number in asked}
    assert errors <= {"UnavailableError", "OutcomeUnknownError"}
    account = scene.clients.account
    assert not [called for called in account.acknowledged.values() if called > began]
    assert not [called for called in account.read_calls if called > began]
    scene.heal("no majority")


@pytest.mark.parametrize("direction", ["from the leader", "to the leader"])
def test_one_way(scene: Scene, direction: str) -> None:
    """What goes one way between the leader and the others is lost; the clients reach everybody."""
    pairs = [(str(scene.leader), other) for other in hosts(*scene.others)]
    drops = [Drop(a, b) if direction == "from the leader" else Drop(b, a) for a, b in pairs]
    began = scene.drop(*drops)
    assert scene.watch.leader(scene.others) != scene.leader
    scene.clients.wait_for_more(began)
    scene.heal("one way")


def test_partial_partition(scene: Scene) -> None:
    """The leader and one other do not hear each other, both hear the third: somebody leads, and writes go on."""
    term = scene.watch.ask([scene.leader])[scene.leader]["term"]
    began = scene.drop(*cut(hosts(scene.leader), hosts(scene.others[0])))
    scene.clients.wait_for_more(began, 50)
    later = scene.watch.ask([scene.others[1]])[scene.others[1]]["term"]
    print(f"terms during the partition: {later - term}")
    scene.heal("partial partition")


def test_loss(scene: Scene) -> None:
    """Of the packets between nodes 30 % are lost. TCP stalls and streams break; what is acknowledged is as true as ever."""
    nodes = hosts(*scene.cluster.endpoints)
    began = scene.drop(*(Drop(one, other, 30) for one in nodes for other in nodes if one != other))
    scene.clients.wait_for_more(began, 5, 5)
    assert scene.cluster.net.dropped() > 0
    scene.heal("30 % loss")


def test_narrow_link(scene: Scene) -> None:
    """What one follower is sent faster than 8 KiB a second is lost: it lags, and nobody waits for it."""
    began = scene.drop(Drop(str(scene.leader), str(scene.others[0]), over_kib_s=8))
    scene.clients.wait_for_more(began, 30, 30)
    scene.heal("narrow link")


def test_silent_peer(scene: Scene) -> None:
    """In the place of a follower something accepts connections and never answers."""
    node = scene.others[0]
    process = scene.cluster.nodes.processes[node]
    process.kill()
    program = SILENT.format(port=PORT)
    command = scene.cluster.net.hosts[str(node)].command(sys.executable, "-c", program)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as silent:
        try:
            assert silent.stdout.readline()
            scene.clients.wait_for_more(time.monotonic(), 50)
        finally:
            silent.kill()
    process.start()
    since = time.monotonic()
    scene.healed("silent peer", since)


def test_stopped_leader(scene: Scene) -> None:
    """SIGSTOP: to the others it is gone, and when it goes on it believes for a moment that it leads."""
    with scene.stopped(scene.leader):
        began = time.monotonic()
        assert scene.watch.leader(scene.others) != scene.leader
        scene.clients.wait_for_more(began)
    scene.healed("stopped leader", time.monotonic())


def test_stopped_follower(scene: Scene) -> None:
    with scene.stopped(scene.others[0]):
        scene.clients.wait_for_more(time.monotonic(), 50)
    scene.healed("stopped follower", time.monotonic())


def test_slow_disk(scene: Scene) -> None:
    """Each sync of the leader takes most of a second: writes go on, one way or the other."""
    disk = scene.disks[scene.leader]
    try:
        try:
            disk.slow_down(scene.cluster.pid(scene.leader), writes_per_s=3)
        except NamespacesForbidden as error:
            machine_lacks(error)
        scene.clients.wait_for_more(time.monotonic(), 5, 5)
    finally:
        disk.speed_up()
    scene.healed("slow disk", time.monotonic())


@pytest.mark.parametrize("who", ["leader", "follower"])
def test_full_disk(scene: Scene, who: str) -> None:
    """No room for the log: the node stops and says why, the others go on; with room again, it comes back whole."""
    node = scene.leader if who == "leader" else scene.others[0]
    process, disk = scene.cluster.nodes.processes[node], scene.disks[node]
    disk.fill(leave_kib=64)
    try:
        code = process.wait_stopped(DEADLINE_S)
        assert code not in (None, 0, -signal.SIGKILL), f"node {node} with a full disk: {code}"
        scene.clients.wait_for_more(time.monotonic(), 30)
    finally:
        disk.empty()
    process.start()
    since = time.monotonic()
    scene.healed("full disk", since)
