"""How long a cluster takes to be back: faults between real processes on hosts of their own, each several times, and the time after its end.

::

    python -P bench/healing.py --rounds 5           # as root, on a machine that allows network namespaces

Back means: a write and a read that were called after the fault's end are answered, all nodes name one leader, and all have applied what was
committed. Next to it stands how long the clients' writes stood still while the fault lasted. Figures are of this machine and of
what else it does; two election timeouts are 2 s here.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def _measure(stage: _Stage, fault: object, hold_s: float) -> tuple[float, float]:
    """Seconds from the fault's end until all is well; and the longest time without an acknowledged write while it lasted."""
    began = time.monotonic()
    with fault:  # type: ignore[attr-defined]
        time.sleep(hold_s)
    ended = time.monotonic()
    back = stage.watch.healed(ended)
    moments = sorted(each for each in list(stage.clients.account.acknowledged.values()) if began <= each <= ended)
    gaps = [b - a for a, b in zip([began, *moments], [*moments, ended], strict=True)]
    return back, max(gaps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(f"{'fault':28} {'lasts':>6} {'back: median':>13} {'worst':>8} {'of two timeouts':>16} {'writes stood':>13}")
    with tempfile.TemporaryDirectory() as directory, running_cluster(Path(directory)) as (cluster, _):
        for name, fault in FAULTS.items():
            for hold_s in HOLD_S:
                with cluster.clients() as clients:
                    found = []
                    for _ in range(rounds):
                        stage = _Stage(cluster, clients)
                        found.append(_measure(stage, fault(stage), hold_s))
                    clients.finish()
                back = [each for each, _ in found]
                share = median(back) / (2 * ELECTION_TIMEOUT_MS / 1000)
                stood = max(each for _, each in found)
                print(
                    f"{name:28} {hold_s:5g}s {median(back):11.2f} s {max(back):6.2f} s {share:15.2f} {stood:11.2f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
