"""A whole cluster whose nodes are joined by one network or two, each of a rate of its own: what a client's large writes make of them.

::

    python -P bench/ways_cluster.py                                     # one network, two, and two with each fault
    python -P bench/ways_cluster.py --mib-per-s 12 8 --fault slow --seconds 30
    python -P bench/ways_cluster.py --fault cut --under-way 0           # no large writes

Nodes are processes of their own, and so is each relay: there is one before each node on each network, which all streams to that
node over that network share. So what a node can take in is the sum of its networks' rates, and no cluster commits more than
that. The client reaches the leader without them, for it is not what is measured: it keeps some MiB of upserts of 1 MiB under way, and
beside that writes one small row at a time. A fault begins after a third of the time, is about one network of every node, and ends
after two thirds.

For each third is shown: MiB/s of acknowledged rows and their share of the networks' sum (while a fault lasts, of what is left of it);
median, p99 and worst of the small writes, in ms; the longest time without an acknowledgement of a large one, and of a small one. A small
write is acknowledged after the large ones that were under way before it: how long a fault itself takes is seen by `--under-way 0`,
without large ones. For all of it: terms, streams that broke, parts sent again, and the most memory of its own that any node had.
What nodes logged about peers that they lost is counted by its reason. Figures are of this machine and of what else it does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import pyarrow as pa
import pyarrow.flight as fl

import marble
from marble.database import Table
from marble.demo.processes import NodeProcess, Nodes, running_on_free_ports, serve_command
from marble.testing.relay import Line, RelayProcess

MIB = 1 << 20
KEYS = 64
"""Large rows that there are: each is written again and again."""
SMALL_PAUSE_S = 0.05
DEADLINE_S = 120.0
SCHEMA = pa.schema([pa.field("id", pa.int64()), pa.field("value", pa.binary())])
CONFIG = """
[node]
id = {node}
data_dir = "{directory}"
listen = "{listen}"
[cluster]
cluster_id = "ways"
node_endpoints = {endpoints}
election_timeout_ms = {election}
heartbeat_interval_ms = {heartbeat}
"""
FAULTS = ("none", "slow", "silent", "cut")
COUNTED = (
    "transport_streams_broken",
    "transport_parts_sent_again",
    "transport_ways_rested",
    "transport_paths_changed",
    "transport_protocol_errors",
)


@dataclass
class Setting:
    """One case: the networks' rates in MiB/s, what happens to which of them, and the delay towards nodes on the last one."""

    rates: Sequence[float]
    fault: str = "none"
    bad: int = -1
    delay_s: float = 0.0
    nodes: int = 3
    seconds: float = 30.0
    under_way: int = 32
    election_ms: int = 1000

    def line(self, network: int) -> Line:
        last = network == len(self.rates) - 1
        return Line(bytes_per_s=self.rates[network] * MIB, delay_s=self.delay_s if last else 0.0)

    def worse(self) -> Line:
        """What becomes of the bad network."""
        line = self.line(self.bad % len(self.rates))
        assert line.bytes_per_s is not None
        rate = line.bytes_per_s / 10 if self.fault == "slow" else line.bytes_per_s
        return Line(bytes_per_s=rate, delay_s=line.delay_s, silent=self.fault == "silent")

    def left(self) -> float:
        """MiB/s that a node can take in while the fault lasts."""
        share = {"none": 1.0, "slow": 0.1}.get(self.fault, 0.0)
        return sum(self.rates) - (1 - share) * self.rates[self.bad]


@dataclass
class Told:
    """When what was acknowledged."""

    large: list[float] = field(default_factory=list)
    small: list[tuple[float, float]] = field(default_factory=list)
    """Of each small write when it was called, and how long it took."""
    errors: Counter[str] = field(default_factory=Counter)


class Cluster:
    """Nodes in processes of their own behind relays in processes of their own."""

    def __init__(self, stack: contextlib.ExitStack, directory: Path, setting: Setting) -> None:
        self.setting = setting
        self.directory = directory
        numbers = range(1, setting.nodes + 1)
        self.relays = {
            node: [
                stack.enter_context(RelayProcess("127.0.0.1:1", there=setting.line(at)))
                for at in range(len(setting.rates))
            ]
            for node in numbers
        }
        endpoints = [",".join(relay.endpoint for relay in self.relays[node]) for node in numbers]

        def make(ports: Sequence[int]) -> Nodes:
            processes = {}
            for node, port in zip(numbers, ports, strict=True):
                for relay in self.relays[node]:
                    relay.retarget(f"127.0.0.1:{port}")
                config = directory / f"node-{node}.toml"
                config.write_text(
                    CONFIG.format(
                        node=node,
                        directory=directory / f"data-{node}",
                        listen=f"127.0.0.1:{port}",
                        endpoints=endpoints,
                        election=setting.election_ms,
                        heartbeat=setting.election_ms // 5,
                    )
                )
                processes[node] = NodeProcess(f"node {node}", serve_command(config), self.log(node))
            return Nodes(processes)

        self.nodes, ports = stack.enter_context(running_on_free_ports(setting.nodes, make))
        self.direct = {node: f"127.0.0.1:{port}" for node, port in zip(numbers, ports, strict=True)}

    def log(self, node: int) -> Path:
        return self.directory / f"node-{node}.log"

    def status(self, node: int) -> dict[str, object]:
        with marble.connect(f"grpc://{self.direct[node]}", timeout_s=DEADLINE_S) as database:
            return dict(database.status())

    def leader(self) -> int:
        """Who leads, as soon as all agree."""
        end = time.monotonic() + DEADLINE_S
        while True:
            named = {self.status(node)["leader_id"] for node in self.direct}
            if len(named) == 1 and None not in named and 0 not in named:
                return int(str(named.pop()))
            assert time.monotonic() < end, f"no leader: {named}"

    def counters(self) -> Counter[str]:
        """Of all nodes together."""
        total: Counter[str] = Counter()
        for endpoint in self.direct.values():
            with fl.connect(f"grpc://{endpoint}") as client:
                text = b"".join(result.body.to_pybytes() for result in client.do_action(fl.Action("metrics", b"")))
            for name in COUNTED:
                values = re.findall(rf"^marble_{name}_total(?:\{{.*?\}})? (\S+)$", text.decode(), re.MULTILINE)
                total[name] += round(sum(map(float, values)))
        return total

    def memory_mib(self) -> float:
        """The most that any node has had in memory of its own so far (mapped files left out)."""
        most = 0
        for process in self.nodes.processes.values():
            text = Path(f"/proc/{process.pid}/status").read_text()
            most = max(most, int(re.search(r"RssAnon:\s+(\d+)", text)[1]))  # type: ignore[index]
        return most / 1024

    def fail(self) -> None:
        for relays in self.relays.values():
            relay = relays[self.setting.bad]
            if self.setting.fault == "cut":
                relay.retarget("127.0.0.1:1")
                relay.reset()
            else:
                relay.set(there=self.setting.worse(), back=Line(silent=self.setting.fault == "silent"))

    def heal(self) -> None:
        for node, relays in self.relays.items():
            relay = relays[self.setting.bad]
            relay.retarget(self.direct[node])
            relay.set(there=self.setting.line(self.setting.bad % len(relays)), back=Line())

    def reasons(self) -> Counter[str]:
        """Why nodes said that they lost others."""
        found: Counter[str] = Counter()
        for node in self.direct:
            for line in self.log(node).read_text(errors="replace").splitlines():
                if match := re.search(r"lost node \d+ at \S+ (.*)", line):
                    found[re.sub(r"\d[\d.]*", "N", match[1])[:110]] += 1
        return found


def write_large(table: Table, told: Told, stop: threading.Event, under_way: int) -> None:
    """Keep so many upserts of 1 MiB under way until `stop`; none for 0."""
    noise = random.Random(1).randbytes(2 * MIB)
    flying: deque[Future[int]] = deque()

    def land() -> None:
        try:
            flying.popleft().result(DEADLINE_S)
            told.large.append(time.monotonic())
        except marble.MarbleError as error:
            told.errors[type(error).__name__] += 1

    number = 0
    while under_way and not stop.is_set():
        start = number * 4099 % MIB
        rows = pa.record_batch({"id": [number % KEYS], "value": [noise[start : start + MIB]]}, schema=SCHEMA)
        flying.append(table.write_async(rows))
        number += 1
        if len(flying) >= under_way:
            land()
    while flying:
        land()


def write_small(table: Table, told: Told, stop: threading.Event) -> None:
    """One small row after another."""
    number = 0
    while not stop.wait(SMALL_PAUSE_S):
        number += 1
        began = time.monotonic()
        try:
            table.write(pa.record_batch({"id": [number % KEYS], "value": [b"x"]}, schema=SCHEMA))
            told.small.append((began, time.monotonic() - began))
        except marble.MarbleError as error:
            told.errors[type(error).__name__] += 1


def measure(setting: Setting, directory: Path) -> None:
    with contextlib.ExitStack() as stack:
        cluster = Cluster(stack, directory, setting)
        leader = cluster.leader()
        databases = [
            stack.enter_context(marble.connect(f"grpc://{cluster.direct[leader]}", timeout_s=DEADLINE_S))
            for _ in range(2)
        ]
        databases[0].create_table("large", SCHEMA, key=["id"])
        databases[0].create_table("small", SCHEMA, key=["id"])
        told, stop = Told(), threading.Event()
        threads = [
            threading.Thread(target=write_large, args=(databases[0].table("large"), told, stop, setting.under_way)),
            threading.Thread(target=write_small, args=(databases[1].table("small"), told, stop)),
        ]
        for thread in threads:
            thread.start()
        try:
            # Streams for parts open, windows grow.
            wait(3.0, cluster)
            before, terms = cluster.counters(), [cluster.status(node)["term"] for node in cluster.direct]
            marks, memory = [time.monotonic()], 0.0
            for step in (None, cluster.fail, cluster.heal) if setting.fault != "none" else (None,):
                if step is not None:
                    step()
                memory = max(memory, wait(setting.seconds / (1 if setting.fault == "none" else 3), cluster))
                marks.append(time.monotonic())
            counted = cluster.counters() - before
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        terms += [cluster.status(node)["term"] for node in cluster.direct]
        report(setting, told, marks)
        names = ", ".join(f"{name.removeprefix('transport_')} {counted[name]}" for name in COUNTED)
        print(f"    terms {sorted(set(map(str, terms)))}, {names}, memory {memory:.0f} MiB, errors {dict(told.errors)}")
        for reason, count in cluster.reasons().most_common():
            print(f"    {count:4} x {reason}")
        sys.stdout.flush()


def wait(seconds: float, cluster: Cluster) -> float:
    """Let time pass; the most memory that any node had meanwhile, in MiB."""
    end = time.monotonic() + seconds
    most = 0.0
    while (left_s := end - time.monotonic()) > 0:
        time.sleep(min(0.2, left_s))
        most = max(most, cluster.memory_mib())
    cluster.nodes.check_alive()
    return most


def report(setting: Setting, told: Told, marks: Sequence[float]) -> None:
    rates = "+".join(f"{rate:g}" for rate in setting.rates)
    delay = f", {1000 * setting.delay_s:g} ms on the last" if setting.delay_s else ""
    bad = f", a fault of the one of {setting.rates[setting.bad]:g} MiB/s" if setting.fault != "none" else ""
    print(f"{setting.nodes} nodes, networks of {rates} MiB/s{delay}{bad}")
    answered = [called + taken for called, taken in told.small]
    for at, (began, ended) in enumerate(pairwise(marks)):
        name = "load" if len(marks) == 2 else ("before", setting.fault, "healed")[at]
        large = [moment for moment in told.large if began <= moment < ended]
        small = sorted(1000 * taken for called, taken in told.small if began <= called < ended) or [0.0]
        whole = setting.left() if name == setting.fault else sum(setting.rates)
        rate = len(large) / (ended - began)
        gap, small_gap = (
            max(b - a for a, b in pairwise([began, *moments, ended]))
            for moments in (large, [end for end in answered if began <= end < ended])
        )
        print(
            f"  {name:8} {rate:6.1f} MiB/s, {rate / whole:5.2f} of {whole:4.1f};  small writes {median(small):5.0f} "
            f"{small[int(0.99 * (len(small) - 1))]:5.0f} {small[-1]:5.0f} ms;  longest gap {gap:5.2f} {small_gap:5.2f} s"
        )


def cases(given: argparse.Namespace) -> Iterator[Setting]:
    more = {
        "nodes": given.nodes,
        "seconds": given.seconds,
        "under_way": given.under_way,
        "election_ms": given.election_ms,
        "delay_s": given.delay_ms / 1000,
    }
    if given.fault is None:
        yield Setting(given.mib_per_s[:1], **more)
    for fault in given.fault or FAULTS:
        for bad in (-1, 0) if fault != "none" and given.bad is None else (given.bad or 0,):
            yield Setting(given.mib_per_s, fault, bad, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib-per-s", type=float, nargs="+", default=[12.0, 8.0], help="rate of each network")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="only this one; may be given several times")
    parser.add_argument("--bad", type=int, help="only faults of this network: 0 for the first, -1 for the last")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="of the last network, towards nodes")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0, help="of load in each case")
    parser.add_argument("--under-way", type=int, default=32, help="upserts of 1 MiB not acknowledged yet; 0: none")
    parser.add_argument("--election-ms", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="an empty directory for the nodes' logs and data")
    given = parser.parse_args()
    # What stands under gRPC's log says nothing here.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for number, setting in enumerate(cases(given)):
        with contextlib.ExitStack() as stack:
            base = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ways-")))
            directory = base / str(number)
            directory.mkdir(parents=True)
            measure(setting, directory)


if __name__ == "__main__":
    main()
