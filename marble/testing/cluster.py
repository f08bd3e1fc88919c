"""A whole cluster in one thread, on a simulated network and disk: the production core, driver, log and tables.

Rule 1: one seed gives one history. Nothing here reads a clock, starts a thread or draws chance that is not seeded.

`SimulatedCluster.step` does one thing, drawn by chance (a tick, a delivery, a write, a crash, a restart, a partition), runs the turn
of the node that it touched, and checks the invariants, each a function below with its place in the paper. `heal` then ends all faults
and demands progress within a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Final

import pyarrow as pa

from marble._core.entry_batch import Proposal
from marble._core.term_index import TermIndex
from marble.driver import Driver, DurableState, turn
from marble.errors import MarbleError, NotLeaderError, UnavailableError, check
from marble.logstore.log import Log, LogOptions
from marble.lsm import payload
from marble.lsm.machine import TableMachine
from marble.machine import Result, StateMachine
from marble.raft.config import RaftConfig
from marble.raft.core import Raft
from marble.raft.messages import ReadState
from marble.testing.disk import DiskCrash, SimulatedFiles
from marble.transport.codec import Envelope
from marble.types import EntryKind, HardState, Members, Role

GROUP: Final = 0
TABLE: Final = "t"
SCHEMA: Final = pa.schema([pa.field("k", pa.int64(), nullable=False), pa.field("v", pa.int64())])
TICKS_TO_HEAL_MAX: Final = 400
"""After all faults have ended, the cluster must have a leader and the same state everywhere within this many ticks."""


@dataclass(frozen=True, slots=True)
class Faults:
    """How often what goes wrong, each a chance per step or per message, and how much of everything else happens."""

    loss: float = 0.05
    duplication: float = 0.03
    delay_steps_max: int = 20
    crash: float = 0.004
    restart: float = 0.05
    partition: float = 0.003
    mend: float = 0.02
    write: float = 0.15
    read: float = 0.05
    tick: float = 0.4
    slow: float = 0.003
    """A node's clock stands still for up to `slow_steps_max` steps, while it goes on to take messages."""
    slow_steps_max: int = 600
    gather: float = 0.4
    """What comes in waits, with what comes next, for one turn."""


class Recording:
    """A `StateMachine` around the real one that remembers what was applied, for the invariants."""

    def __init__(self, inner: StateMachine) -> None:
        self.inner = inner
        self.history: dict[int, tuple[int, int]] = {}
        """Index -> (term, checksum) of every entry applied since the last check."""

    @property
    def applied_index(self) -> int:
        return self.inner.applied_index

    def apply(self, entries: pa.RecordBatch) -> list[Result]:
        places = zip(
            entries["index"].to_pylist(), entries["term"].to_pylist(), entries["checksum"].to_pylist(), strict=True
        )
        for index, term, checksum in places:
            self.history[index] = (term, checksum)
        return list(self.inner.apply(entries))


@dataclass(slots=True)
class SimulatedNode:
    """One node: its disk survives a crash, the rest does not."""

    id: int
    files: SimulatedFiles
    log: Log | None = None
    driver: Driver | None = None
    tables: TableMachine = field(default_factory=TableMachine)
    record: Recording | None = None
    pending: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Index -> (term, key) of writes that were proposed here and await their answer."""

    reads: dict[int, int] = field(default_factory=dict)
    """Request -> the highest index that was acknowledged anywhere when the read began."""

    slow_until: int = 0
    """Its clock stands still until this step."""

    @property
    def alive(self) -> bool:
        return self.driver is not None


class SimulatedCluster:
    """Nodes 1 to `size`, driven by one seed.

    Attributes
    ----------
    acknowledged
        Key -> index of writes that a node said are committed. They must never be lost.
    attempted
        Keys of all writes ever proposed. Nothing else may ever appear.
    steps
        How many steps were made.
    """

    def __init__(self, size: int, seed: int, faults: Faults | None = None) -> None:
        self.random = Random(seed)
        self.faults = faults or Faults()
        self.steps = 0
        self.acknowledged: dict[int, int] = {}
        self.reads_answered = 0
        self._requests = 0
        self._durable_index = 0
        self.attempted: set[int] = set()
        self.committed: dict[int, tuple[int, int]] = {}
        """Index -> (term, checksum) of everything that any node ever applied."""
        self.leaders: dict[int, int] = {}
        """Term -> the node that led in it."""
        self._wire: list[tuple[int, int, Envelope]] = []
        self._cut: set[tuple[int, int]] = set()
        self._table_id = 0
        self.nodes = {
            number: SimulatedNode(number, SimulatedFiles(Random(self.random.randrange(2**62))))
            for number in range(1, size + 1)
        }
        for node in self.nodes.values():
            self._start(node)

    # -- what happens ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Let one thing happen and check the invariants."""
        self.steps += 1
        faults, draw = self.faults, self.random.random()
        node = self.nodes[self.random.randrange(1, len(self.nodes) + 1)]
        for chance, action in (
            (faults.crash, self._crash_soon),
            (faults.partition, self._partition),
            (faults.slow, self._slow),
            (faults.mend, lambda _: self._cut.clear()),
            (faults.write, lambda chosen: self.write(self._some_leader(chosen))),
            (faults.read, lambda chosen: self.read(self._some_leader(chosen))),
            (faults.tick, self.tick),
            (1.0, lambda _: self.deliver()),
        ):
            if draw < chance:
                if node.alive:
                    action(node)
                elif self.random.random() < faults.restart:
                    self._start(node)
                break
            draw -= chance
        self.check()

    def heal(self) -> None:
        """End all faults and demand that the cluster recovers: a leader, and one state on all nodes."""
        self.faults = Faults(loss=0, duplication=0, delay_steps_max=1, crash=0, partition=0, slow=0, gather=0)
        self._cut.clear()
        for node in self.nodes.values():
            node.files.lose_power_at = None
            node.slow_until = 0
            if not node.alive:
                self._start(node)
        writer: SimulatedNode | None = None
        for _ in range(TICKS_TO_HEAL_MAX):
            for node in self.nodes.values():
                self.tick(node)
                while self._wire:
                    self.deliver()
                self.check()
            leader = self.leader()
            if leader is None:
                continue
            if writer is not leader:
                # One write of a healthy leader must reach everyone.
                writer = leader if self.write(leader) else None
            elif self._all_agree(leader):
                self.check_final()
                return
        raise AssertionError(f"no progress within {TICKS_TO_HEAL_MAX} ticks after all faults ended")

    def _some_leader(self, otherwise: SimulatedNode) -> SimulatedNode:
        """Mostly one that takes itself for the leader, whether or not it still is: that is where mistakes are made."""
        leading = [node for node in self.nodes.values() if node.driver and node.driver.raft.role is Role.LEADER]
        return self.random.choice(leading) if leading and self.random.random() < 0.8 else otherwise

    def _all_agree(self, leader: SimulatedNode) -> bool:
        """Whether everything in the leader's log, its last write included, is applied everywhere."""
        last = leader.driver.raft.last_index if leader.driver else 0
        return all(node.tables.applied_index == last for node in self.nodes.values())

    def leader(self) -> SimulatedNode | None:
        """The live leader of the highest term, if any."""
        leading = [
            node for node in self.nodes.values() if node.driver is not None and node.driver.raft.role is Role.LEADER
        ]
        return max(leading, key=lambda node: node.driver.raft.term if node.driver else 0, default=None)

    def tick(self, node: SimulatedNode) -> None:
        if node.slow_until <= self.steps:
            self._act(node, lambda driver: driver.tick())

    def write(self, node: SimulatedNode) -> bool:
        """Propose one write (or, first, the table) at `node`. False if it refused."""
        key = len(self.attempted)
        if self._table_id:
            body = payload.encode_rows(pa.record_batch({"k": [key], "v": [key * 3]}, schema=SCHEMA))
            proposal = Proposal(EntryKind.WRITE, self._table_id, body)
        else:
            proposal = Proposal(EntryKind.CREATE_TABLE, 0, payload.encode_create_table(TABLE, SCHEMA, ["k"]))
        taken = False

        def propose(driver: Driver) -> None:
            nonlocal taken
            try:
                position = driver.propose([proposal])
            except (NotLeaderError, UnavailableError):
                return
            taken = True
            if proposal.kind is EntryKind.WRITE:
                self.attempted.add(key)
                node.pending[position.index] = (position.term, key)

        self._act(node, propose)
        return taken

    def read(self, node: SimulatedNode) -> None:
        """Ask `node`, whatever its role, from which index on a read is linearizable."""
        self._requests += 1
        request = self._requests
        node.reads[request] = max(self.acknowledged.values(), default=0)
        self._act(node, lambda driver: driver.raft.read_index(request))

    def deliver(self) -> None:
        """Deliver one message, drawn from those whose time has come."""
        wire = self._wire
        if not wire:
            return
        # A few draws prefer what is due; taking the last into the gap keeps a draw cheap however much is under way.
        for _ in range(4):
            place = self.random.randrange(0, len(wire))
            if wire[place][0] <= self.steps:
                break
        wire[place], wire[-1] = wire[-1], wire[place]
        _, to, envelope = wire.pop()
        node = self.nodes[to]
        if node.alive and (envelope.message.sender, to) not in self._cut:
            self._act(node, lambda driver: driver.receive(envelope))

    def _slow(self, node: SimulatedNode) -> None:
        node.slow_until = self.steps + self.random.randrange(0, self.faults.slow_steps_max)

    def _crash_soon(self, node: SimulatedNode) -> None:
        """Now, or in the middle of whatever the node does to its disk next."""
        if self.random.random() < 0.3:
            self.crash(node)
        else:
            node.files.lose_power_at = node.files.operations + self.random.randrange(1, 6)

    def crash(self, node: SimulatedNode) -> None:
        """Power off: unsynced writes are lost in part or whole."""
        node.driver = node.log = None
        node.pending.clear()
        node.reads.clear()
        node.files.crash()

    def _start(self, node: SimulatedNode) -> None:
        node.tables = TableMachine()
        node.record = Recording(node.tables)
        try:
            node.files.make_directory("")
            node.log = Log.open(node.files, LogOptions(segment_bytes_max=16 * 1024))
        except DiskCrash:
            self.crash(node)
            return
        check(not node.log.report.lost_durable_bytes, "the simulated disk keeps what was synced")
        group = node.log.groups.get(GROUP)
        state = DurableState(
            group.hard_state if group else HardState(),
            Members(tuple(sorted(self.nodes))),
            group.term_index if group else TermIndex(),
        )
        config = RaftConfig(
            id=node.id,
            election_ticks=10,
            heartbeat_ticks=2,
            # Entries travel one by one at some nodes, so that a message may carry old terms only (Raft figure 8).
            append_bytes_max=self.random.choice((1, 4096)),
            random=self.random,
        )
        node.driver = Driver(
            GROUP, Raft(config, state), node.log, node.record, lambda to, envelopes: self._send(to, envelopes)
        )
        self._act(node, lambda driver: None)

    def _act(self, node: SimulatedNode, action: Callable[[Driver], None]) -> None:
        driver, log = node.driver, node.log
        if driver is None or log is None:
            return
        try:
            action(driver)
            if self.random.random() < self.faults.gather:
                return
            turn([driver], log)
        except DiskCrash:
            self.crash(node)
            return
        outcome = driver.take_outcome()
        for answer in outcome.reads:
            self._check_read(node.reads.pop(answer.request, 0), answer)
        for applied in outcome.applied:
            for offset, (term, result) in enumerate(zip(applied.terms, applied.results, strict=True)):
                self._note_applied(node, applied.first + offset, term, result)

    def _note_applied(self, node: SimulatedNode, index: int, term: int, result: Result) -> None:
        if not self._table_id and node.tables.tables():
            self._table_id = node.tables.tables()[0].id
        proposed = node.pending.pop(index, None)
        if proposed is not None and proposed[0] == term:
            check(result.error_code is None, f"a good write failed: {result.message}")
            self.acknowledged[proposed[1]] = index

    def _send(self, to: int, envelopes: list[Envelope]) -> bool:
        for envelope in envelopes:
            if (envelope.message.sender, to) in self._cut or self.random.random() < self.faults.loss:
                continue
            for _ in range(2 if self.random.random() < self.faults.duplication else 1):
                self._wire.append((self.steps + self.random.randrange(0, self.faults.delay_steps_max), to, envelope))
        return True

    def _partition(self, node: SimulatedNode) -> None:
        """Cut `node` off, in one direction or both, from some or all others."""
        for other in self.nodes:
            if other != node.id and self.random.random() < 0.7:
                way = self.random.randrange(0, 3)
                if way != 0:
                    self._cut.add((node.id, other))
                if way != 1:
                    self._cut.add((other, node.id))

    # -- what must hold ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """All invariants that can be seen from outside after any step."""
        for node in self.nodes.values():
            if node.driver is not None and node.record is not None:
                self._check_election_safety(node, node.driver.raft)
                self._check_state_machine_safety(node, node.record)
                self._check_positions(node.driver.raft)
                self._check_committed_is_durable(node.driver.raft)

    def _check_election_safety(self, node: SimulatedNode, raft: Raft) -> None:
        """At most one leader can be elected in a given term (Raft §5.2)."""
        if raft.role is Role.LEADER:
            if raft.term not in self.leaders:
                self._check_leader_completeness(raft)
            first = self.leaders.setdefault(raft.term, node.id)
            check(first == node.id, f"nodes {first} and {node.id} both led in term {raft.term}")

    def _check_leader_completeness(self, raft: Raft) -> None:
        """A new leader has every entry that any node has committed (Raft §5.4.3, figure 3)."""
        for index, (term, _) in self.committed.items():
            check(
                raft.log.matches(index, term), f"node {raft.id} leads term {raft.term} without committed entry {index}"
            )

    def _check_committed_is_durable(self, raft: Raft) -> None:
        """What a node takes for committed is on the disks of a majority (Raft §5.3). A node that is down may have it."""
        index = raft.commit_index
        if index <= self._durable_index:
            return
        term = raft.log.term_at(index)
        having = sum(self._may_have(node, index, term) for node in self.nodes.values())
        check(
            having > len(self.nodes) // 2, f"entry {index} of term {term} is committed, but only {having} nodes have it"
        )
        self._durable_index = index

    @staticmethod
    def _may_have(node: SimulatedNode, index: int, term: int) -> bool:
        if node.driver is None:
            return True
        raft = node.driver.raft
        return raft.persisted_index >= index and raft.log.matches(index, term)

    def _check_state_machine_safety(self, node: SimulatedNode, record: Recording) -> None:
        """No two nodes apply different entries at one index (Raft §5.4.3)."""
        for index, what in record.history.items():
            check(self.committed.setdefault(index, what) == what, f"node {node.id} applied another entry at {index}")
        record.history.clear()

    def _check_read(self, acknowledged: int, answer: ReadState) -> None:
        """A read sees every write that was acknowledged before it began (Raft §8, thesis §6.4)."""
        if answer.index:
            self.reads_answered += 1
            check(
                answer.index >= acknowledged,
                f"a read at {answer.index} misses the write at {acknowledged} that was acknowledged before",
            )

    @staticmethod
    def _check_positions(raft: Raft) -> None:
        """applied <= commit <= last, and nothing is applied that is not on this disk."""
        check(raft.applied_index <= raft.commit_index <= raft.last_index, "positions out of order")
        check(raft.applied_index <= raft.persisted_index <= raft.last_index, "applied before it was durable")

    def check_final(self) -> None:
        """No acknowledged write is lost, none is doubled, nothing appears that nobody wrote, and all replicas agree."""
        tables = [self._table(node) for node in self.nodes.values()]
        for table in tables:
            check(table == tables[0], "replicas differ")
        keys = [row["k"] for row in tables[0]]
        check(len(keys) == len(set(keys)), "a key is there twice")
        lost = set(self.acknowledged) - set(keys)
        check(not lost, f"acknowledged writes were lost: {sorted(lost)}")
        check(set(keys) <= self.attempted, "rows that nobody wrote")
        check(all(row["v"] == row["k"] * 3 for row in tables[0]), "a value changed")

    def _table(self, node: SimulatedNode) -> list[dict[str, int]]:
        if not self._table_id:
            return []
        rows: list[dict[str, int]] = node.tables.read(self._table_id).scan(None, None).read_all().to_pylist()
        return rows


def run(seed: int, steps: int, size: int = 3, faults: Faults | None = None) -> SimulatedCluster:
    """One history: `steps` steps under faults, then heal. Raises with the seed in a note if an invariant breaks."""
    cluster = SimulatedCluster(size, seed, faults)
    try:
        for _ in range(steps):
            cluster.step()
        cluster.heal()
    except (MarbleError, AssertionError) as error:
        error.add_note(f"seed {seed}, size {size}, step {cluster.steps}")
        raise
    return cluster
