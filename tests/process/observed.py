"""A cluster of node processes on hosts of their own, and clients on another that write and read all the time, seen by a test.

Rule 1: what a client was told is kept in the order in which it said so, as a `marble.testing.history.History`.
Rule 2: nothing here asserts how long something takes. Waits have deadlines that a loaded machine keeps; times are kept, to be reported.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from process.netns import Net, SmallDisk, network

from marble.demo.processes import NodeProcess, Nodes, serve_command
from marble.testing.history import History, check

CLIENTS = "clients"
RELAYS = "relays"
PORT = 5001
DEADLINE_S = 90.0
ELECTION_TIMEOUT_MS = 1000
HEARTBEAT_MS = 200
KEYS = 5

CONFIG = """
[node]
id = {node}
data_dir = "{directory}"
listen = "{listen}"
[cluster]
cluster_id = "faults"
node_endpoints = {endpoints}
election_timeout_ms = {election}
heartbeat_interval_ms = {heartbeat}
"""


@dataclass
class Account:
    """What the clients were told."""

    history: History = field(default_factory=History)
    acknowledged: dict[int, float] = field(default_factory=dict)
    """Row of each acknowledged write -> when it was called."""
    read_calls: list[float] = field(default_factory=list)
    """When each answered read was called."""
    errors: Counter[str] = field(default_factory=Counter)
    texts: dict[str, str] = field(default_factory=dict)
    """The last message of each kind of error."""


class Clients:
    """The program `process.recorder` on a host. Stop it with `finish`, or by leaving its ``with`` block.

    Parameters
    ----------
    command
        How to start it.
    log
        Where its stderr goes.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.account = Account()
        self._numbers: dict[int, tuple[int, dict[str, Any]]] = {}
        self._replies: dict[int, dict[str, Any]] = {}
        self._commands = itertools.count(1)
        self._changed = threading.Condition()
        self._log = log
        self._failure = ""
        self._ended = False
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self._reader = threading.Thread(target=self._read, name="observer", daemon=True)
        self._reader.start()

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(DEADLINE_S)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _read(self) -> None:
        for line in self._process.stdout:
            with self._changed:
                self._note(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            if 0 not in self._replies:
                self._failure = self._failure or f"the clients ended: {self._log.read_text(errors='replace')[-2000:]}"
            self._changed.notify_all()

    def _note(self, line: dict[str, Any]) -> None:
        account, history = self.account, self.account.history
        if "failure" in line:
            self._failure = line["failure"]
        elif "reply" in line:
            self._replies[line["reply"]] = line
        elif "call" in line:
            client, at = line["client"], round(line["at"] * 1000)
            match line["kind"]:
                case "write":
                    number = history.upsert(client, {line["key"]: line["value"], line["value"]: line["value"]}, at)
                case "read":
                    number = history.read(client, line["key"], at)
                case _:
                    number = history.scan(client, at=at)
            self._numbers[line["call"]] = (number, line)
        else:
            number, call = self._numbers.pop(line["end"])
            if "answer" not in line:
                name = line.get("refused") or line["unknown"]
                account.errors[f"{call['kind']}: {name}"] += 1
                account.texts[f"{call['kind']}: {name}"] = line["text"]
                if "refused" in line:
                    history.refuse(number)
                return
            answer = dict(line["answer"]) if call["kind"] == "scan" else line["answer"]
            history.answer(number, answer, round(line["at"] * 1000))
            if call["kind"] == "write":
                account.acknowledged[call["value"]] = call["at"]
            elif call["kind"] == "read":
                account.read_calls.append(call["at"])

    def wait(self, condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
        """Return what `condition` gives once that is true; it is asked whenever the clients have said something."""
        with self._changed:
            found = self._changed.wait_for(lambda: condition() or self._failure or self._ended, deadline_s)
            assert not self._failure, self._failure
            done = condition()
            assert done, f"{what} did not happen in time: {found}"
            return done

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Give a command and wait for its reply."""
        reply = self.order(what, **arguments)
        return self.reply(reply)

    def order(self, what: str, **arguments: Any) -> int:
        """Give a command; its number."""
        number = next(self._commands)
        self._process.stdin.write(json.dumps({"do": what, "reply": number, **arguments}) + "\n")
        self._process.stdin.flush()
        return number

    def reply(self, number: int) -> dict[str, Any]:
        """The reply to a command, once it is there."""
        return self.wait(lambda: self._replies.get(number), "a reply")

    def wait_for_more(self, since: float, writes: int = 3, reads: int = 3) -> None:
        """Return when so many writes and reads that were called after `since` have been answered."""
        account = self.account
        self.wait(
            lambda: (
                sum(called > since for called in list(account.acknowledged.values())[-500:]) >= writes
                and sum(called > since for called in account.read_calls[-500:]) >= reads
            ),
            f"{writes} answered writes and {reads} answered reads",
        )

    def finish(self) -> Account:
        """Let all operations end, then check what was told."""
        self.order("end")
        self._process.stdin.close()
        self.wait(lambda: 0 in self._replies, "the end of the clients")
        verdict = check(self.account.history)
        assert verdict.ok, str(verdict)
        last = next(each for each in reversed(self.account.history.operations.values()) if each.client == "last")
        lost = sorted(set(self.account.acknowledged) - set(last.answer))
        assert not lost, f"acknowledged and gone: {lost[:10]}"
        return self.account


class Cluster:
    """Nodes 1 to n, each on the host of its number, and the clients on theirs.

    Parameters
    ----------
    net
        With hosts "1" to "n" and `CLIENTS`.
    directory
        For configs, logs and data.
    endpoints
        Where others find each node.
    disks
        Node -> where its data is, if not in `directory`.
    """

    def __init__(
        self, net: Net, directory: Path, endpoints: Mapping[int, str], disks: Mapping[int, SmallDisk] | None = None
    ) -> None:
        self.net = net
        self.endpoints = dict(endpoints)
        self._directory = directory
        self._scenes = itertools.count(1)
        processes = {}
        for node in endpoints:
            host, disk = net.hosts[str(node)], (disks or {}).get(node)
            config = directory / f"node-{node}.toml"
            config.write_text(
                CONFIG.format(
                    node=node,
                    directory=directory / f"data-{node}" if disk is None else disk.directory / "data",
                    listen=f"{host.address}:{PORT}",
                    endpoints=list(endpoints.values()),
                    election=ELECTION_TIMEOUT_MS,
                    heartbeat=HEARTBEAT_MS,
                )
            )
            processes[node] = NodeProcess(
                f"node {node}", host.command(*serve_command(config)), directory / f"node-{node}.log"
            )
        self.nodes = Nodes(processes)

    def pid(self, node: int) -> int:
        found = self.nodes.processes[node].pid
        assert found is not None, f"node {node} does not run"
        return found

    def signal(self, node: int, number: signal.Signals) -> None:
        os.kill(self.pid(node), number)

    @contextlib.contextmanager
    def clients(self, *, timeout_s: float = 30.0, writers: int = 3, readers: int = 2) -> Iterator[Clients]:
        """Clients at work."""
        settings = {
            "url": "grpc://" + ",".join(self.endpoints.values()),
            "table": f"scene_{next(self._scenes)}",
            "timeout_s": timeout_s,
            "writers": writers,
            "readers": readers,
            "keys": KEYS,
            "seed": int.from_bytes(os.urandom(4), "big"),
        }
        program = str(Path(__file__).with_name("recorder.py"))
        command = self.net.hosts[CLIENTS].command(sys.executable, "-P", program, json.dumps(settings))
        with Clients(command, self._directory / "clients.log") as clients:
            clients.wait_for_more(0.0)
            yield clients


class Lines:
    """The relays between all nodes (`process.relays`), on a host of their own. Clients reach the nodes without them."""

    def __init__(self, net: Net, host: str, nodes: Sequence[int], log: Path) -> None:
        place = net.hosts[host]
        ways = {}
        for one in nodes:
            leads = {}
            for other in nodes:
                if other != one:
                    target = f"{net.hosts[str(other)].address}:{PORT}"
                    leads[target] = f"{place.address}:{6000 + 16 * one + other}"
                    ways[f"{one}-{other}"] = (leads[target], target)
            net.lead(str(one), leads)
        program = str(Path(__file__).with_name("relays.py"))
        command = place.command(sys.executable, "-P", program, json.dumps(ways))
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        assert self._process.stdout.readline(), log.read_text()
        self._ways = list(ways)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=DEADLINE_S)

    def set(self, line: Mapping[str, Any], around: Sequence[int] = (), *, reset: bool = False) -> Counter[str]:
        """Make the lines to and from these nodes (none: all) such, both ways; what they have counted so far, together."""
        total: Counter[str] = Counter()
        for name in self._ways:
            if around and not any(str(node) in name.split("-") for node in around):
                continue
            command = {"name": name, "there": dict(line), "back": dict(line), "reset": reset}
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            total.update(json.loads(self._process.stdout.readline()))
        return total


class Watch:
    """Asks the nodes about themselves, through the clients' host."""

    def __init__(self, cluster: Cluster, clients: Clients) -> None:
        self._cluster = cluster
        self._clients = clients

    def ask(self, nodes: Sequence[int] | None = None) -> dict[int, dict[str, Any] | None]:
        """What each of these nodes says now; None for one that does not answer."""
        asked = {
            node: self._clients.order("status", endpoint=self._cluster.endpoints[node])
            for node in nodes or self._cluster.endpoints
        }
        return {node: self._clients.reply(number)["status"] for node, number in asked.items()}

    def through_all(self) -> Callable[[], float]:
        """Begin to ask each node for a linearizable read and a write; what is returned waits for the answers: when the last one came."""
        numbers = [self._clients.order("through", endpoint=endpoint) for endpoint in self._cluster.endpoints.values()]

        def wait() -> float:
            replies = [self._clients.reply(number) for number in numbers]
            return max(max(reply["read"], reply["write"]) for reply in replies)

        return wait

    def until(self, condition: Callable[[dict[int, Any]], Any], what: str, nodes: Sequence[int] | None = None) -> Any:
        """Ask until `condition` holds of the answers of all these nodes; what it gave."""
        end = time.monotonic() + DEADLINE_S
        pause = threading.Event()
        while True:
            told = self.ask(nodes)
            if all(told.values()) and (found := condition(told)):
                return found
            assert time.monotonic() < end, f"{what} did not happen in time: {told}"
            pause.wait(0.02)

    def leader(self, nodes: Sequence[int] | None = None) -> int:
        """The leader on whom all these nodes agree, and that is one of them, once there is one."""

        def agreed(told: dict[int, Any]) -> int:
            leaders = {status["leader_id"] for status in told.values()}
            terms = {status["term"] for status in told.values()}
            return leaders.pop() if len(leaders) == len(terms) == 1 and leaders <= set(told) else 0

        return int(self.until(agreed, f"a leader of {nodes}", nodes))

    def healed(self, since: float) -> float:
        """Return when all nodes agree on a leader, have applied what was committed, and the clients go on; seconds since `since`."""
        self._clients.wait_for_more(since, 1, 1)
        commit = max(status["commit_index"] for status in self.ask().values() if status)
        self.leader()
        self.until(lambda told: all(each["applied_index"] >= commit for each in told.values()), "all replicas")
        return time.monotonic() - since


@contextlib.contextmanager
def related_cluster(directory: Path, count: int = 3) -> Iterator[tuple[Cluster, Lines]]:
    """A cluster of `count` nodes, ready, that reach each other through relays."""
    numbers = range(1, count + 1)
    with network([*map(str, numbers), CLIENTS, RELAYS]) as net:
        endpoints = {node: f"{net.hosts[str(node)].address}:{PORT}" for node in numbers}
        with Lines(net, RELAYS, numbers, directory / "relays.log") as lines:
            cluster = Cluster(net, directory, endpoints)
            with cluster.nodes:
                cluster.nodes.start()
                yield cluster, lines


@contextlib.contextmanager
def running_cluster(
    directory: Path, count: int = 3, small_disks: Mapping[int, int] | None = None
) -> Iterator[tuple[Cluster, dict[int, SmallDisk]]]:
    """A cluster of `count` nodes, ready; `small_disks`: node -> MiB of a disk of its own."""
    numbers = range(1, count + 1)
    with network([*map(str, numbers), CLIENTS]) as net:
        disks = {
            node: SmallDisk(net.hosts[str(node)], directory / f"disk-{node}.img", directory / f"disk-{node}", mib)
            for node, mib in (small_disks or {}).items()
        }
        endpoints = {node: f"{net.hosts[str(node)].address}:{PORT}" for node in numbers}
        cluster = Cluster(net, directory, endpoints, disks)
        with cluster.nodes:
            try:
                cluster.nodes.start()
                yield cluster, disks
            finally:
                for disk in disks.values():
                    disk.speed_up()
