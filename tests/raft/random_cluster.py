"""A cluster of pure cores under a hostile network and hostile disks, driven by one seeded source of chance.

Everything that may go wrong does: messages are lost, doubled, delayed and reordered, links are cut, syncs are late,
nodes crash and lose what was not synced, or half of it. After every step the safety of Raft is checked (figure 3)
against records that no node can see.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from marble._core.term_index import EntrySpan, TermIndex
from marble.raft.core import MemoryStorage, Raft, RaftConfig
from marble.raft.messages import Message, MessageKind, Ready
from marble.types import HardState, Role

Row = tuple[int, str]
"""Term and payload of an entry."""


@dataclass
class Write:
    """One sync under way: what it makes durable, and what waits for it."""

    number: int
    hard_state: HardState | None
    first: int
    rows: list[Row]
    messages: list[tuple[Message, list[str]]]


@dataclass
class Node:
    """A core, its disk, and the driver's memory."""

    id: int
    raft: Raft
    life: int = 0
    alive: bool = True
    # What is on the disk.
    rows: list[Row] = field(default_factory=list)
    hard_state: HardState = field(default_factory=HardState)
    # What a crash loses: writes under way, and payloads by position.
    writes: deque[Write] = field(default_factory=deque)
    payloads: dict[tuple[int, int], str] = field(default_factory=dict)
    reads: dict[int, int] = field(default_factory=dict)


class Violation(AssertionError):
    """Raft broke a promise."""


class RandomCluster:
    """`size` cores and everything between them. One seed gives one history; `chaos`: percent of faults."""

    def __init__(self, seed: int, size: int, chaos: float = 1.0, **options: object) -> None:
        self.random = random.Random(seed)
        self.options = options
        self.voters = list(range(1, size + 1))
        self.nodes = {i: Node(i, self._core(i, MemoryStorage(voters=self.voters))) for i in self.voters}
        self.network: list[tuple[Message, list[str]]] = []
        self.cut: set[tuple[int, int]] = set()
        self.chaos = chaos
        # How often what happens to a node that lives.
        self.weights: dict[Callable[[Node], None], int] = {
            self.turn: 30,
            self.sync: 15,
            lambda node: node.raft.tick(): 12,
            self.propose: 5,
            self.read: 2,
            lambda _: self.deliver(): 36,
        }
        self.proposed = 0
        self.requests = 0
        self.answered = 0
        # What no node can see: the committed log, the leaders and votes of every term, and what every entry is.
        self.committed: dict[int, Row] = {}
        self.leaders: dict[int, tuple[int, int]] = {}
        self.votes: dict[tuple[int, int], int] = {}
        self.entries: dict[tuple[int, int], tuple[str, int]] = {}

    def _core(self, node: int, storage: MemoryStorage) -> Raft:
        config = RaftConfig(node, 10, 2, random=self.random, **self.options)  # type: ignore[arg-type]
        return Raft(config, storage)

    # Steps.

    def step(self) -> None:
        """One random event."""
        node = self.nodes[self.random.choice(self.voters)]
        if not node.alive:
            if self.random.random() < 0.2:
                self.restart(node)
        elif self.random.random() < 0.01 * self.chaos:
            self.fault(node)
        else:
            names, weights = zip(*self.weights.items(), strict=True)
            self.random.choices(names, weights)[0](node)
        self.check()

    def fault(self, node: Node) -> None:
        """Something that a good day does not have."""
        chance = self.random.random()
        if chance < 0.4:
            self.crash(node)
        elif chance < 0.7:
            node.raft.campaign(force=self.random.random() < 0.7)
        elif chance < 0.9:
            self.partition()
        else:
            node.raft.report_unreachable(self.random.choice(self.voters))

    def turn(self, node: Node) -> None:
        """The driver's turn: take a Ready and start carrying it out."""
        if not node.raft.has_ready():
            return
        ready = node.raft.ready()
        for event in ready.events:
            if event.noop_index:
                node.payloads[event.noop_index, event.term] = f"noop {node.id} {event.term}"
            if event.role is Role.LEADER:
                self._elected(node, event.term)
        self._send(node, self._attach(node, ready.messages))
        after = self._attach(node, ready.messages_after_persist)
        if (ready.number != 0) is not ready.must_sync:
            raise Violation(f"number {ready.number} but must_sync {ready.must_sync}")
        if ready.number:
            first, rows = self._rows(node, ready)
            node.writes.append(Write(ready.number, ready.hard_state, first, rows, after))
        else:
            self._send(node, after)
        if ready.committed is not None:
            self._apply(node, ready.committed.first, ready.committed.end)
            node.raft.applied(ready.committed.end - 1)
        for answer in ready.reads:
            asked_at = node.reads.pop(answer.request)
            self.answered += answer.index > 0
            if answer.index and answer.index < asked_at:
                raise Violation(
                    f"read {answer.request} at {answer.index} is stale: {asked_at} was committed when it came"
                )

    def sync(self, node: Node) -> None:
        """The disk finishes some of the writes under way, in order."""
        if not node.writes:
            return
        done = [node.writes.popleft() for _ in range(self.random.randint(1, len(node.writes)))]
        for write in done:
            self._to_disk(node, write.hard_state, write.first, write.rows)
        node.raft.persisted(done[-1].number)
        for write in done:
            self._send(node, write.messages)

    def crash(self, node: Node) -> None:
        """Lose what was not synced, except for an arbitrary beginning of it that had reached the disk unreported."""
        for _ in range(self.random.randint(0, len(node.writes))):
            write = node.writes.popleft()
            self._to_disk(node, write.hard_state, write.first, write.rows)
        if node.writes and self.random.random() < 0.5:
            write = node.writes.popleft()
            torn = write.rows[: self.random.randint(0, len(write.rows))]
            self._to_disk(node, write.hard_state, write.first, torn)
        node.writes.clear()
        node.reads.clear()
        node.alive = False

    def restart(self, node: Node) -> None:
        """Come back with what the disk has."""
        entries = TermIndex()
        entries.append(EntrySpan.of(1, [term for term, _ in node.rows], [len(payload) for _, payload in node.rows]))
        storage = MemoryStorage(entries, node.hard_state, self.voters)
        node.raft = self._core(node.id, storage)
        node.payloads = {(index, term): payload for index, (term, payload) in enumerate(node.rows, 1)}
        node.life += 1
        node.alive = True

    def propose(self, node: Node) -> None:
        """Somebody writes, if this node leads."""
        if node.raft.role is not Role.LEADER:
            return
        payloads = []
        for _ in range(self.random.randint(1, 4)):
            self.proposed += 1
            payloads.append(f"entry {self.proposed} " + "x" * self.random.randint(0, 20))
        position = node.raft.propose([len(payload) for payload in payloads])
        for offset, payload in enumerate(payloads):
            node.payloads[position.index + offset, position.term] = payload

    def read(self, node: Node) -> None:
        """Somebody reads: the answer may not lie before what was committed by now."""
        self.requests += 1
        node.reads[self.requests] = max(self.committed, default=0)
        node.raft.read_index(self.requests)

    def partition(self) -> None:
        """Cut some links, or heal all."""
        self.cut.clear()
        if self.random.random() < 0.6:
            for a in self.voters:
                for b in self.voters:
                    if a != b and self.random.random() < 0.35:
                        self.cut.add((a, b))

    def deliver(self) -> None:
        """One message, any message, arrives; or gets lost; or arrives and stays to arrive again."""
        if not self.network:
            return
        position = self.random.randrange(len(self.network)) if self.random.random() < 0.5 else 0
        chance = self.random.random()
        message, payloads = self.network[position] if chance < 0.05 else self.network.pop(position)
        if chance > 0.95 or (message.sender, message.to) in self.cut:
            return
        self._arrive(message, payloads)

    def _arrive(self, message: Message, payloads: list[str]) -> None:
        node = self.nodes[message.to]
        if not node.alive:
            return
        if message.entries is not None:
            for offset, term in enumerate(message.entries.terms()):
                node.payloads.setdefault((message.entries.first + offset, term), payloads[offset])
        node.raft.step(message)

    # The driver.

    def _attach(self, node: Node, messages: tuple[Message, ...]) -> list[tuple[Message, list[str]]]:
        attached = []
        for message in messages:
            payloads = []
            if message.entries is not None:
                for offset, term in enumerate(message.entries.terms()):
                    payloads.append(node.payloads[message.entries.first + offset, term])
                    if node.raft.role is Role.LEADER and node.raft.term == message.term:
                        sent, held = term, node.raft.log.term_at(message.entries.first + offset)
                        if sent != held:
                            raise Violation(f"{message} names entries that node {node.id} no longer has")
            attached.append((message, payloads))
        return attached

    def _send(self, node: Node, messages: list[tuple[Message, list[str]]]) -> None:
        for message, _ in messages:
            self._check_sent(node, message)
        self.network.extend(messages)

    def _check_sent(self, node: Node, message: Message) -> None:
        """What leaves a node must survive its crash."""
        kind = message.kind
        granted = kind is MessageKind.REQUEST_VOTE_RESPONSE and not message.reject
        if granted and self.votes.setdefault((node.id, message.term), message.to) != message.to:
            raise Violation(f"node {node.id} votes a second time in term {message.term}: {message}")
        asks = kind is MessageKind.REQUEST_PRE_VOTE or (
            kind is MessageKind.REQUEST_PRE_VOTE_RESPONSE and not message.reject
        )
        if not asks and node.hard_state.term < message.term:
            raise Violation(f"{message} left before its term was durable")
        accepted = kind is MessageKind.APPEND_ENTRIES_RESPONSE and not message.reject
        if accepted and message.term == node.hard_state.term and message.log_index > len(node.rows):
            raise Violation(f"{message} acknowledges what is not on the disk")

    def _rows(self, node: Node, ready: Ready) -> tuple[int, list[Row]]:
        if ready.append is None:
            return 0, []
        rows = []
        for index in range(ready.append.first, ready.append.end):
            term = node.raft.log.term_at(index)
            rows.append((term, node.payloads[index, term]))
        return ready.append.first, rows

    def _to_disk(self, node: Node, hard_state: HardState | None, first: int, rows: list[Row]) -> None:
        if hard_state is not None:
            old = node.hard_state
            if hard_state.term < old.term or (hard_state.term == old.term and old.vote not in (0, hard_state.vote)):
                raise Violation(f"node {node.id} goes from {old} to {hard_state}")
            node.hard_state = hard_state
        if rows:
            if first > len(node.rows) + 1:
                raise Violation(f"node {node.id} leaves a gap on its disk before {first}")
            node.rows[first - 1 :] = rows

    def _apply(self, node: Node, first: int, end: int) -> None:
        for index in range(first, end):
            if index > len(node.rows):
                raise Violation(f"node {node.id} applies {index}, which is not on its disk")
            self._is_committed(index, node.rows[index - 1])

    # The judge.

    def _elected(self, node: Node, term: int) -> None:
        leader = self.leaders.setdefault(term, (node.id, node.life))
        if leader != (node.id, node.life):
            raise Violation(f"term {term} has two leaders: {leader} and {(node.id, node.life)}")

    def _is_committed(self, index: int, row: Row) -> None:
        if self.committed.setdefault(index, row) != row:
            raise Violation(f"{index} was committed as {self.committed[index]} and as {row}")

    def check(self) -> None:
        """Everything that must hold at every moment (Raft figure 3)."""
        for node in self.nodes.values():
            if not node.alive:
                continue
            raft = node.raft
            if raft.role is Role.LEADER:
                self._elected(node, raft.term)
                self._check_leader(node)
            for index in range(max(1, raft.commit_index - 8), raft.commit_index + 1):
                term = raft.log.term_at(index)
                if (index, term) in node.payloads:
                    new = index not in self.committed
                    self._is_committed(index, (term, node.payloads[index, term]))
                    if new:
                        self._check_majority(index)
            if not raft.applied_index <= min(raft.commit_index, raft.persisted_index):
                raise Violation(f"node {node.id} applied {raft.applied_index}")
            if not max(raft.commit_index, raft.persisted_index) <= raft.last_index:
                raise Violation(f"node {node.id} ends at {raft.last_index}")
            self._check_log_matching(node)

    def _check_leader(self, node: Node) -> None:
        raft = node.raft
        for index, (term, _) in list(self.committed.items())[-20:]:
            if index <= raft.last_index and raft.log.term_at(index) != term and term <= raft.term:
                raise Violation(f"leader {node.id} of term {raft.term} lacks committed entry {index}")
        for peer, progress in raft.progress.items():
            if not 0 <= progress.match_index < progress.next_index <= raft.last_index + 1:
                raise Violation(f"leader {node.id} sees {peer} at {progress}")

    def _check_log_matching(self, node: Node) -> None:
        log = node.raft.log
        for index in range(max(1, log.last_index - 8), log.last_index + 1):
            term = log.term_at(index)
            if (index, term) not in node.payloads:
                continue
            entry = (node.payloads[index, term], log.term_at(index - 1))
            if self.entries.setdefault((index, term), entry) != entry:
                raise Violation(f"two entries at {(index, term)}: {self.entries[index, term]} and {entry}")

    def _check_majority(self, index: int) -> None:
        row = self.committed[index]
        durable = sum(1 for node in self.nodes.values() if len(node.rows) >= index and node.rows[index - 1] == row)
        if durable <= len(self.voters) // 2:
            raise Violation(f"{index} was committed while {durable} disks have it")

    # Healing.

    def heal(self, rounds_max: int = 400) -> None:
        """Stop all faults, and demand that the cluster agrees on everything, new writes included."""
        self.cut.clear()
        for node in self.nodes.values():
            if not node.alive:
                self.restart(node)
        target = 0
        for _ in range(rounds_max):
            for node in self.nodes.values():
                node.raft.tick()
            for _ in range(6):
                for node in self.nodes.values():
                    self.turn(node)
                    self.sync(node)
                arriving, self.network = self.network, []
                for message, payloads in arriving:
                    self._arrive(message, payloads)
                self.check()
            leaders = [node for node in self.nodes.values() if node.raft.role is Role.LEADER]
            if not target and len(leaders) == 1 and leaders[0].raft.commit_index >= leaders[0].raft.log.last_index:
                self.propose(leaders[0])
                target = leaders[0].raft.last_index
            if target and all(node.raft.applied_index >= target for node in self.nodes.values()):
                for index, row in self.committed.items():
                    if any(node.rows[index - 1] != row for node in self.nodes.values()):
                        raise Violation(f"committed entry {index} is not everywhere")
                return
        raise Violation(
            f"no progress in {rounds_max} rounds: " + "; ".join(repr(n.raft.role) for n in self.nodes.values())
        )
