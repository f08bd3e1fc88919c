"""How long a group is without a leader, on virtual time: cores with a network and disks that are slow, thousands of faults in a minute.

::

    python -P bench/elections.py --faults 2000 --spread 15 --spread 8 --spread 4

Each history is one fault of a settled group, at a moment and for a duration (half to three election timeouts) that are drawn. What is
counted is the time from the fault's end (of a leader that is gone for good: from its beginning) until something is committed that
was proposed after it, in election timeouts; and in how many histories that took more than one term: a vote was split, or lost.

A spread is the width of the random part of election timeouts, in ticks of which 15 are an election timeout. Ticks of nodes have
phases of their own. A node that syncs does nothing else, as in `marble.engine`. What a cut takes is lost, and when it ends each way
works again after a pause of its own.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, product

from marble.raft.core import MemoryStorage, Raft, RaftConfig
from marble.raft.messages import Message
from marble.types import Role

ELECTION_TICKS = 15
HEARTBEAT_TICKS = 3
Way = tuple[int, int]


@dataclass
class Place:
    """Where the nodes stand, all in election timeouts: how long a message, and a sync, take; and how long a way takes to come back."""

    message: tuple[float, float] = (0.0005, 0.002)
    sync: tuple[float, float] = (0.001, 0.005)
    slow_sync: float = 0.02
    """Chance that a sync takes a tenth of an election timeout."""
    back: tuple[float, float] = (0.01, 0.3)


PLACES = {
    "one room": Place(),
    # The widest that `[cluster.transport]` warns of: an election timeout of ten round trips.
    "far apart": Place(message=(0.05, 0.005), sync=(0.01, 0.02)),
    "slow disks": Place(sync=(0.02, 0.1), slow_sync=0.2),
}


@dataclass
class Group:
    """Cores 1 to `nodes` on virtual time, of which 1.0 is an election timeout."""

    nodes: int
    place: Place
    seed: int
    spread: int
    now: float = 0.0
    cuts: dict[Way, float] = field(default_factory=dict)
    """Way -> until when what arrives there is lost."""
    dead: set[int] = field(default_factory=set)
    stopped: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._busy: dict[int, float] = {}
        self.watch: Callable[[Raft, int, int], None] = lambda raft, first, end: None
        self.rafts = {}
        for node in range(1, self.nodes + 1):
            chance = random.Random(f"{self.seed} {node}")
            config = RaftConfig(node, ELECTION_TICKS, HEARTBEAT_TICKS, random=chance, election_spread_ticks=self.spread)
            self.rafts[node] = Raft(config, MemoryStorage(voters=range(1, self.nodes + 1)))
            self.after(self.random.random() / ELECTION_TICKS, lambda node=node: self._tick(node))

    def after(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._order), action))

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        while self._events and self._events[0][0] <= until and not done():
            self.now, _, action = heapq.heappop(self._events)
            action()

    def leaders(self) -> list[int]:
        return [node for node, raft in self.rafts.items() if raft.role is Role.LEADER and node not in self.dead]

    def _awake(self, node: int, action: Callable[[], None]) -> bool:
        """Whether `node` can do something now; else it does it when it can."""
        if node in self.dead:
            return False
        until = max(self._busy.get(node, 0.0), self.stopped.get(node, 0.0))
        if until > self.now:
            self.after(until - self.now + 1e-9, action)
            return False
        return True

    def _tick(self, node: int) -> None:
        if self._awake(node, lambda: self._tick(node)):
            self.rafts[node].tick()
            self.turn(node)
            self.after(1 / ELECTION_TICKS, lambda: self._tick(node))

    def turn(self, node: int) -> None:
        """Carry out what the core of `node` wants."""
        raft = self.rafts[node]
        while raft.has_ready():
            ready = raft.ready()
            self._send(ready.messages)
            if ready.number:
                low, high = self.place.sync
                sync = 0.1 if self.random.random() < self.place.slow_sync else self.random.uniform(low, high)
                self._busy[node] = self.now + sync
                after = ready.messages_after_persist
                self.after(sync, lambda n=ready.number, after=after: self._synced(node, n, after))
            else:
                self._send(ready.messages_after_persist)
            if ready.committed is not None:
                self.watch(raft, ready.committed.first, ready.committed.end)
                raft.applied(ready.committed.end - 1)
            if ready.number:
                return

    def _synced(self, node: int, number: int, after: tuple[Message, ...]) -> None:
        if self._awake(node, lambda: self._synced(node, number, after)):
            self.rafts[node].persisted(number)
            self._send(after)
            self.turn(node)

    def _send(self, messages: tuple[Message, ...]) -> None:
        for message in messages:
            low, mean = self.place.message
            self.after(low + self.random.expovariate(1 / mean), lambda m=message: self._arrive(m))

    def _arrive(self, message: Message) -> None:
        if self.cuts.get((message.sender, message.to), 0.0) > self.now:
            return
        if self._awake(message.to, lambda: self._arrive(message)):
            self.rafts[message.to].step(message)
            self.turn(message.to)


def _both(ones: list[int], others: list[int]) -> Iterator[Way]:
    for one in ones:
        for other in others:
            if one != other:
                yield from ((one, other), (other, one))


def _cut(group: Group, leader: int, others: list[int], fault: str) -> list[Way]:
    everybody = [leader, *others]
    return {
        "partition": list(_both([leader], others)),
        "one way, from the leader": [(leader, other) for other in others],
        "one way, to the leader": [(other, leader) for other in others],
        "partial": list(_both([leader], others[: len(others) // 2])),
        "no majority": list(_both(everybody, everybody)),
    }.get(fault, [])


FAULTS = (
    "gone",
    "partition",
    "one way, from the leader",
    "one way, to the leader",
    "partial",
    "no majority",
    "stopped",
)


def back(fault: str, group: Group) -> tuple[float, int]:
    """One history: election timeouts until something new was committed, and how many terms it took."""
    draw = group.random.uniform
    group.run(20.0, lambda: bool(group.leaders()))
    group.run(group.now + draw(3, 5))
    (leader,) = group.leaders()[-1:]
    others = [node for node in group.rafts if node != leader]
    hold = 0.0 if fault == "gone" else draw(0.5, 3.0)
    began, ended = group.now, group.now + hold
    if fault == "gone":
        group.dead.add(leader)
    if fault == "stopped":
        group.stopped[leader] = ended
    for way in _cut(group, leader, others, fault):
        group.cuts[way] = ended + draw(*group.place.back)
    group.run(began + hold)
    term = max(raft.term for raft in group.rafts.values())
    mine: set[tuple[int, int]] = set()
    found: list[float] = []

    def watch(raft: Raft, first: int, end: int) -> None:
        if any((raft.log.term_at(index), index) in mine for index in range(first, end)):
            found.append(group.now)

    def offer() -> None:
        for node in group.leaders():
            raft = group.rafts[node]
            if (
                raft.last_index - raft.commit_index < 5
                and max(group._busy.get(node, 0.0), group.stopped.get(node, 0.0)) <= group.now
            ):
                at = raft.propose([1])
                mine.add((at.term, at.index))
                group.turn(node)
        if not found:
            group.after(0.02, offer)

    group.watch = watch
    group.after(0.0, offer)
    group.run(ended + 30.0, lambda: bool(found))
    assert found, f"seed {group.seed}: no leader"
    return max(0.0, found[0] - ended), max(raft.term for raft in group.rafts.values()) - term


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--nodes", type=int, action="append")
    parser.add_argument("--place", choices=PLACES, action="append")
    parser.add_argument("--fault", choices=FAULTS, action="append")
    parser.add_argument("--spread", type=int, action="append")
    asked = parser.parse_args()
    print("election timeouts until something is committed, and how many histories took more than one term")
    print(f"{'place':11} nodes {'fault':25} spread median   p99  worst    > 2  terms > 1")
    for place, nodes, fault, spread in product(
        asked.place or PLACES, asked.nodes or (3, 5, 7), asked.fault or FAULTS, asked.spread or (15, 8)
    ):
        found = [back(fault, Group(nodes, PLACES[place], seed, spread)) for seed in range(asked.faults)]
        times = sorted(taken for taken, _ in found)
        late = sum(taken > 2 for taken in times) / len(times)
        split = sum(terms > 1 for _, terms in found) / len(found)
        print(
            f"{place:11} {nodes:5} {fault:25} {spread:6} {quantile(times, 0.5):6.2f} {quantile(times, 0.99):5.2f} {times[-1]:6.2f} "
            f"{late:6.1%} {split:10.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
