"""How long a cluster takes to be back: faults between real processes on hosts of their own, each several times, and the time after its end.

::

    python -P bench/healing.py --rounds 10 --fault partial       # as root, on a machine that allows network namespaces

All is well when a write and a read that were called after the fault's end are answered, each node has answered a linearizable
read and a write that were asked of it alone, all nodes name one leader, and all have applied what was committed. The worst of it
is shown as a share of two election timeouts, which are 2 s here. Last comes how long the clients' writes stood still at most while
the fault lasted. Figures are of this machine and of what else it does.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from process.netns import Drop, cut
from process.observed import ELECTION_TIMEOUT_MS, Clients, Cluster, Watch, running_cluster

HOLD_S = (1.0, 3.0, 7.0)
"""How long a fault lasts: before, while and after TCP gives up."""


class _Stage:
    def __init__(self, cluster: Cluster, clients: Clients) -> None:
        self.cluster, self.clients = cluster, clients
        self.watch = Watch(cluster, clients)
        self.leader = self.watch.leader()
        self.others = [node for node in cluster.endpoints if node != self.leader]

    @contextmanager
    def dropping(self, *drops: Drop) -> Iterator[None]:
        self.cluster.net.drop(*drops)
        yield
        self.cluster.net.drop()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.cluster.signal(self.leader, signal.SIGSTOP)
        yield
        self.cluster.signal(self.leader, signal.SIGCONT)


def _others(stage: _Stage) -> list[str]:
    return [str(node) for node in stage.others]


FAULTS: dict[str, Callable[[_Stage], object]] = {
    "partition": lambda stage: stage.dropping(*cut([str(stage.leader)], _others(stage))),
    "one way, from the leader": lambda stage: stage.dropping(
        *(Drop(str(stage.leader), each) for each in _others(stage))
    ),
    "one way, to the leader": lambda stage: stage.dropping(*(Drop(each, str(stage.leader)) for each in _others(stage))),
    "partial": lambda stage: stage.dropping(*cut([str(stage.leader)], _others(stage)[:1])),
    "30 % loss": lambda stage: stage.dropping(
        *(
            Drop(a, b, 30)
            for a in map(str, stage.cluster.endpoints)
            for b in map(str, stage.cluster.endpoints)
            if a != b
        )
    ),
    "SIGSTOP of the leader": lambda stage: stage.stopped(),
}


def _measure(stage: _Stage, fault: object, hold_s: float) -> tuple[float, float, float, float]:
    """Seconds from the fault's end until all is well, until the clients go on, and until every node answers a read and a write;
    and the longest time without an acknowledged write while it lasted.
    """
    began = time.monotonic()
    with fault:  # type: ignore[attr-defined]
        time.sleep(hold_s)
    ended = time.monotonic()
    through = stage.watch.through_all()
    stage.clients.wait_for_more(ended, 1, 1)
    going = time.monotonic() - ended
    well = stage.watch.healed(ended)
    every = through() - ended
    moments = sorted(each for each in list(stage.clients.account.acknowledged.values()) if began <= each <= ended)
    gaps = [b - a for a, b in zip([began, *moments], [*moments, ended], strict=True)]
    return max(well, every), going, every, max(gaps)


def _report(name: str, hold_s: float, found: list[tuple[float, float, float, float]]) -> None:
    back, going, every, stood = ([each[at] for each in found] for at in range(4))
    share = max(back) / (2 * ELECTION_TIMEOUT_MS / 1000)
    print(
        f"{name:25} {hold_s:4g}s {_spread(back)} {share:6.2f}  {_spread(going)}  {_spread(every)}  {max(stood):6.2f}",
        flush=True,
    )


def _spread(values: list[float]) -> str:
    """Median, 90th percentile and worst."""
    ordered = sorted(values)
    return f"{median(ordered):5.2f} {ordered[int(0.9 * (len(ordered) - 1) + 0.5)]:5.2f} {ordered[-1]:5.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--fault", action="append", choices=FAULTS, help="only this one; may be given several times")
    parser.add_argument(
        "--hold", action="append", type=float, help="only for so many seconds; may be given several times"
    )
    parser.add_argument(
        "--keep", type=Path, help="an empty directory for the nodes' logs, where each round is told, too"
    )
    asked = parser.parse_args()
    print(
        f"{'median, p90 and worst, in seconds':30}  {'all is well':17} {'/ 2 T':>6}  {'clients go on':17}  {'through each node':17}   stood"
    )
    with contextlib.ExitStack() as stack:
        directory = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster, _ = stack.enter_context(running_cluster(directory))
        for name in asked.fault or FAULTS:
            for hold_s in asked.hold or HOLD_S:
                with cluster.clients() as clients:
                    found = []
                    for _ in range(asked.rounds):
                        stage = _Stage(cluster, clients)
                        found.append(_measure(stage, FAULTS[name](stage), hold_s))
                        if asked.keep:
                            _tell(directory, stage, name, hold_s, found[-1])
                    clients.finish()
                _report(name, hold_s, found)


def _tell(directory: Path, stage: _Stage, name: str, hold_s: float, found: tuple[float, ...]) -> None:
    now = datetime.now().strftime("%H:%M:%S.%f")[:-3]
    figures = " ".join(f"{each:.2f}" for each in found)
    with (directory / "rounds.log").open("a") as file:
        file.write(f"{now} {name}, {hold_s:g} s, leader {stage.leader}: well, going, every, stood {figures}\n")


if __name__ == "__main__":
    main()
