"""A cluster of pure cores under a hostile network and hostile disks, driven by one seeded source of chance.

Everything that may go wrong does: messages are lost, doubled, delayed and reordered, links are cut, syncs and applying
are late, clocks drift, nodes crash and lose what was not synced, or half of it. Meanwhile members come, change their
part and go, leaders hand over and take snapshots. After every step the safety of Raft is checked (figure 3) against
records that no node can see.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from raft.random_node import Node, Row, Violation, Write

from marble._core.term_index import EntrySpan, TermIndex
from marble.errors import UnavailableError, UsageError
from marble.raft.core import MemoryStorage, Raft, RaftConfig
from marble.raft.membership import Membership, members_of
from marble.raft.messages import Message, MessageKind, Ready
from marble.raft.quorum import VoteResult
from marble.types import Change, ChangeKind, Members, Role, SnapshotMeta, Transition

NODES_MAX = 8
TICK_US = 1000
DRIFT = 0.05


class RandomCluster:
    """`size` cores and everything between them. One seed gives one history; `chaos`: percent of faults."""

    def __init__(self, seed: int, size: int, chaos: float = 1.0, **options: object) -> None:
        self.random = random.Random(seed)
        self.options = options
        self.genesis = members_of(range(1, size + 1))
        self.now_us = 0
        self.nodes: dict[int, Node] = {}
        for node in self.genesis.voters:
            self._add(node, self.genesis)
        self.network: list[tuple[Message, list[str]]] = []
        self.cut: set[tuple[int, int]] = set()
        self.chaos = chaos
        # How often what happens to a node that lives.
        self.weights: dict[Callable[[Node], None], int] = {
            self.turn: 30,
            self.sync: 15,
            self.tick: 14,
            self.apply: 15,
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
        self.members: dict[str, Members] = {}
        self.changed = self.installed = self.leased = self.handed_over = 0

    def _core(self, node: int, storage: MemoryStorage) -> Raft:
        config = RaftConfig(node, 10, 2, random=self.random, tick_us=TICK_US, clock_drift=DRIFT, **self.options)  # type: ignore[arg-type]
        return Raft(config, storage)

    def _add(self, node: int, members: Members) -> None:
        rate = 1 + DRIFT * self.random.uniform(-1, 1)
        self.nodes[node] = Node(node, self._core(node, MemoryStorage(members=members)), rate=rate)

    def _clock(self, node: Node) -> int:
        return int(self.now_us * node.rate) + 1

    # Steps.

    def step(self) -> None:
        """One random event."""
        self.now_us += self.random.randrange(TICK_US // 6)
        node = self.nodes[self.random.choice(list(self.nodes))]
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
            peer = self.random.choice(list(self.nodes))
            (node.raft.report_unreachable if chance < 0.95 else node.raft.report_way_lost)(peer)

    def tick(self, node: Node) -> None:
        """Time passes at `node`; never two ticks closer than they should be."""
        now_us = self._clock(node)
        if now_us - node.ticked_us >= TICK_US:
            node.ticked_us = now_us
            node.raft.tick(now_us)
            for peer, progress in node.raft.progress.items():
                if progress.pending_snapshot and self.random.random() < 0.05:
                    node.raft.report_snapshot(peer, ok=False)

    def administer(self, node: Node) -> None:
        """Somebody changes the members, or hands the leadership over, or takes a snapshot."""
        chance = self.random.random()
        leaders = [each for each in self.nodes.values() if each.alive and each.raft.role is Role.LEADER]
        if leaders and self.random.random() < 0.7:
            node = self.random.choice(leaders)
        raft = node.raft
        if chance < 0.4:
            self.snapshot(node)
        elif raft.role is Role.LEADER and chance < 0.5:
            raft.transfer_leadership(self.random.choice(raft.voters))
            self.handed_over += 1
        elif raft.role is Role.LEADER:
            self.change(node)
        elif chance < 0.5 and not self.options.get("lease_reads"):
            raft.forget_leader()

    def change(self, node: Node) -> None:
        """Propose a change of the members, sensible or not."""
        raft = node.raft
        changes = []
        for _ in range(self.random.choice((1, 1, 2, 3))):
            number = self.random.randint(1, NODES_MAX)
            kind = self.random.choice((ChangeKind.ADD_VOTER, ChangeKind.ADD_VOTER, *ChangeKind))
            changes.append(Change(kind, number))
        if raft.members.joint:
            changes = []
        try:
            raft.propose_membership(changes, self.random.choice(list(Transition)))
        except (UsageError, UnavailableError):
            return
        for each in changes:
            if each.node not in self.nodes:
                self._add(each.node, Members())

    def snapshot(self, node: Node) -> None:
        """Take one of what is applied, and forget what it covers, or some of it."""
        raft = node.raft
        index = raft.applied_index
        if node.installing or index <= (node.snapshot.index if node.snapshot else 0):
            return
        node.snapshot = SnapshotMeta(index, raft.log.term_at(index), raft.members)
        raft.snapshot_taken(node.snapshot)
        purged = self.random.randint(node.base, index)
        if purged > node.base:
            term = raft.log.term_at(purged)
            node.rows, node.base, node.base_term = node.rows[purged - node.base :], purged, term
            raft.purge(purged)

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
        for each in ready.memberships:
            payload = f"members {node.id} {each.term} {each.index} {each.members}"
            node.payloads[each.index, each.term] = payload
            self.members[payload] = each.members
        self._send(node, self._attach(node, ready.messages))
        after = self._attach(node, ready.messages_after_persist)
        if (ready.number != 0) is not ready.must_sync:
            raise Violation(f"number {ready.number} but must_sync {ready.must_sync}")
        if ready.number:
            first, rows = self._rows(node, ready)
            node.writes.append(Write(ready.number, ready.hard_state, first, rows, ready.snapshot, after))
        else:
            self._send(node, after)
        if ready.snapshot is not None:
            # What waited to be applied is in the snapshot.
            node.applying.clear()
            node.installing = ready.snapshot
        if ready.committed is not None:
            node.applying.append((ready.committed.first, ready.committed.end))
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
            self._to_disk(node, write)
        node.raft.persisted(done[-1].number)
        for write in done:
            self._send(node, write.messages)

    def crash(self, node: Node) -> None:
        """Lose what was not synced, except for an arbitrary beginning of it that had reached the disk unreported."""
        for _ in range(self.random.randint(0, len(node.writes))):
            write = node.writes.popleft()
            self._to_disk(node, write)
        if node.writes and self.random.random() < 0.5:
            write = node.writes.popleft()
            write.rows = write.rows[: self.random.randint(0, len(write.rows))]
            self._to_disk(node, write)
        node.writes.clear()
        node.applying.clear()
        node.installing = None
        node.reads.clear()
        node.alive = False

    def restart(self, node: Node) -> None:
        """Come back with what the disk has."""
        entries = TermIndex(node.base + 1, node.base_term)
        terms, sizes = [term for term, _ in node.rows], [len(payload) for _, payload in node.rows]
        entries.append(EntrySpan.of(node.base + 1, terms, sizes))
        node.payloads = {(index, term): payload for index, (term, payload) in enumerate(node.rows, node.base + 1)}
        storage = MemoryStorage(
            entries,
            node.hard_state,
            applied_index=node.snapshot.index if node.snapshot else 0,
            members=node.snapshot.members if node.snapshot else self._genesis(node),
            snapshot=node.snapshot,
            changes=[index for (index, _), payload in node.payloads.items() if payload in self.members],
        )
        node.raft = self._core(node.id, storage)
        node.ticked_us = self._clock(node)
        node.life += 1
        node.alive = True

    def _genesis(self, node: Node) -> Members:
        return self.genesis if node.id in self.genesis.voters else Members()

    def propose(self, node: Node) -> None:
        """Somebody writes, if this node leads."""
        if node.raft.role is not Role.LEADER:
            return
        payloads = []
        for _ in range(self.random.randint(1, 4)):
            self.proposed += 1
            payloads.append(f"entry {self.proposed} " + "x" * self.random.randint(0, 20))
        try:
            position = node.raft.propose([len(payload) for payload in payloads])
        except UnavailableError:
            return
        for offset, payload in enumerate(payloads):
            node.payloads[position.index + offset, position.term] = payload

    def read(self, node: Node) -> None:
        """Somebody reads: the answer may not lie before what was committed by now."""
        self.requests += 1
        node.reads[self.requests] = max(self.committed, default=0)
        lease = self.random.random() < 0.5
        before = node.raft.lease_until_us
        node.raft.read_index(self.requests, self._clock(node), lease=lease)
        self.leased += lease and before > self._clock(node)

    def partition(self) -> None:
        """Cut some links, or heal all."""
        self.cut.clear()
        if self.random.random() < 0.6:
            for a in self.nodes:
                for b in self.nodes:
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
        if accepted and message.term == node.hard_state.term and message.log_index > node.last:
            raise Violation(f"{message} acknowledges what is not on the disk")

    def _rows(self, node: Node, ready: Ready) -> tuple[int, list[Row]]:
        if ready.append is None:
            return 0, []
        rows = []
        for index in range(ready.append.first, ready.append.end):
            term = node.raft.log.term_at(index)
            rows.append((term, node.payloads[index, term]))
        return ready.append.first, rows

    def _to_disk(self, node: Node, write: Write) -> None:
        hard_state, first, rows = write.hard_state, write.first, write.rows
        if write.snapshot is not None:
            self.installed += 1
            node.snapshot = write.snapshot
            node.base, node.base_term, node.rows = write.snapshot.index, write.snapshot.term, []
        if hard_state is not None:
            old = node.hard_state
            if hard_state.term < old.term or (hard_state.term == old.term and old.vote not in (0, hard_state.vote)):
                raise Violation(f"node {node.id} goes from {old} to {hard_state}")
            node.hard_state = hard_state
        if rows:
            if first > node.last + 1 or first <= node.base:
                raise Violation(f"node {node.id} leaves a gap on its disk before {first}")
            node.rows[first - node.base - 1 :] = rows

    def apply(self, node: Node) -> None:
        """The state machine takes a snapshot in, or some of what is committed."""
        if node.installing is not None:
            if node.raft.persisted_index >= node.installing.index:
                node.raft.applied(node.installing.index)
                node.installing = None
            return
        if not node.applying:
            return
        first, end = node.applying.popleft()
        for index in range(first, end):
            row = node.row(index)
            if row is None:
                raise Violation(f"node {node.id} applies {index}, which is not on its disk")
            self._is_committed(index, row)
            if row[1] in self.members:
                node.raft.apply_membership(self.members[row[1]])
                node.raft.applied(index)
                self.changed += 1
        node.raft.applied(end - 1)

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
            for index in range(max(raft.log.first_index, raft.commit_index - 8), raft.commit_index + 1):
                term = raft.log.term_at(index)
                if (index, term) in node.payloads:
                    new = index not in self.committed
                    self._is_committed(index, (term, node.payloads[index, term]))
                    if new:
                        self._check_quorum(node, index)
            if not node.installing and not raft.applied_index <= min(raft.commit_index, raft.persisted_index):
                raise Violation(f"node {node.id} applied {raft.applied_index}")
            if not max(raft.commit_index, raft.persisted_index) <= raft.last_index:
                raise Violation(f"node {node.id} ends at {raft.last_index}")
            self._check_log_matching(node)

    def _check_leader(self, node: Node) -> None:
        raft = node.raft
        for index, (term, _) in list(self.committed.items())[-20:]:
            if index < raft.log.first_index or term > raft.term:
                continue
            if index <= raft.last_index and raft.log.term_at(index) != term:
                raise Violation(f"leader {node.id} of term {raft.term} lacks committed entry {index}")
        for peer, progress in raft.progress.items():
            if not 0 <= progress.match_index < progress.next_index <= raft.last_index + 1:
                raise Violation(f"leader {node.id} sees {peer} at {progress}")

    def _check_log_matching(self, node: Node) -> None:
        log = node.raft.log
        for index in range(max(log.first_index, log.last_index - 8), log.last_index + 1):
            term = log.term_at(index)
            if (index, term) not in node.payloads:
                continue
            entry = (node.payloads[index, term], log.term_at(index - 1))
            if self.entries.setdefault((index, term), entry) != entry:
                raise Violation(f"two entries at {(index, term)}: {self.entries[index, term]} and {entry}")

    def _check_quorum(self, node: Node, index: int) -> None:
        """Entry `index` is on the disks of a quorum of the members that `node`, the first to know, goes by."""
        row = self.committed[index]
        durable = {i: True for i, each in self.nodes.items() if each.row(index) == row or each.base >= index}
        if Membership(node.raft.members).vote_result(durable) is not VoteResult.WON:
            raise Violation(f"{index} was committed by {node.id} of {node.raft.members} while only {durable} have it")

    # Healing.

    def heal(self, rounds_max: int = 400) -> None:
        """Stop all faults, and demand that the cluster agrees on everything, new writes included."""
        self.cut.clear()
        for node in self.nodes.values():
            if not node.alive:
                self.restart(node)
        target = (0, 0)
        for _ in range(rounds_max):
            self.now_us += 2 * TICK_US
            for node in self.nodes.values():
                self.tick(node)
            for _ in range(6):
                for node in self.nodes.values():
                    self.turn(node)
                    self.sync(node)
                    self.apply(node)
                arriving, self.network = self.network, []
                for message, payloads in arriving:
                    self._arrive(message, payloads)
                self.check()
            leaders = [node for node in self.nodes.values() if node.raft.role is Role.LEADER]
            if len(leaders) != 1:
                continue
            if target[0] != leaders[0].raft.term:
                # One write of a healthy leader must reach everyone.
                self.propose(leaders[0])
                target = (leaders[0].raft.term, leaders[0].raft.last_index)
            members = [self.nodes[member] for member in leaders[0].raft.members.all]
            if all(node.raft.applied_index >= target[1] for node in members):
                for index, row in self.committed.items():
                    if any(node.row(index) != row for node in members if index > node.base):
                        raise Violation(f"committed entry {index} is not everywhere")
                return
        raise Violation(
            f"no progress in {rounds_max} rounds: "
            + "; ".join(f"{n.id} {n.raft.role.value} {n.raft.term} {n.raft.members}" for n in self.nodes.values())
        )
