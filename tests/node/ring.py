"""Nodes in one thread without clocks: real cores, drivers, logs, snapshots and tables on simulated disks.

Messages travel as the bytes of the real codec, at once and in order, unless the test says otherwise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from random import Random

import pyarrow as pa

from marble._core.entry_batch import Proposal
from marble.driver import Driver
from marble.groups import Groups, run_turn
from marble.logstore.log import Log, LogOptions
from marble.logstore.snapshots import SnapshotStore
from marble.lsm import payload
from marble.lsm.machine import TableMachine
from marble.raft.config import RaftConfig
from marble.raft.core import Raft
from marble.raft.messages import Message, MessageKind
from marble.recovery import recover
from marble.snapshotting import SnapshotPolicy
from marble.testing.disk import SimulatedFiles
from marble.transport.codec import Codec, Envelope
from marble.types import EntryKind, Members, Role

SCHEMA = pa.schema([pa.field("k", pa.int64(), nullable=False), pa.field("v", pa.string())])
POLICY = SnapshotPolicy(distance=20, tail=5, piece_bytes_max=256, patience_ticks=4)
ELECTION_TICKS = 10


class Peer:
    """One node. `start` after a `crash` makes everything anew from the disk."""

    def __init__(
        self,
        ring: Ring,
        number: int,
        voters: Sequence[int],
        groups: Sequence[int],
        policy: SnapshotPolicy,
        machine: Callable[[SimulatedFiles, int], TableMachine],
        **config: object,
    ) -> None:
        self.ring = ring
        self.id = number
        self.files = SimulatedFiles(Random(number))
        self.codec = Codec("ring", number, 1 << 24)
        self.sent: list[Message] = []
        self.life = 0
        self.applied: dict[int, int] = {}
        self.peer_calls = 0
        self._voters = tuple(voters)
        self._numbers = tuple(groups)
        self._policy = policy
        self._machine = machine
        self._config = config
        self.start()

    def start(self) -> None:
        self.life += 1
        self.files.make_directory("")
        self.log = Log.open(self.files, LogOptions(segment_bytes_max=4096))
        self.groups = Groups(self.id, self._send, 2, ELECTION_TICKS, self.life)
        self.machines: dict[int, TableMachine] = {}
        self.stores: dict[int, SnapshotStore] = {}
        for group in self._numbers:
            machine = self.machines[group] = self._machine(self.files, group)
            store = self.stores[group] = SnapshotStore(self.files, group)
            found = self.log.groups.get(group)
            recovered = recover(group, found, store, Members(self._voters), machine)
            config = RaftConfig(
                self.id,
                ELECTION_TICKS,
                2,
                random=Random(self.id),
                **{"append_bytes_max": 4096, **self._config},  # type: ignore[arg-type]
            )
            self.groups.add(
                Driver(
                    group,
                    Raft(config, recovered.state),
                    self.log,
                    machine,
                    self.groups.post,
                    store=store,
                    policy=self._policy,
                    configured={self.id: f"host{self.id}:1"},
                    replicated=recovered.endpoints,
                    wall_us=lambda: 7,
                )
            )
        self.turn()

    @property
    def driver(self) -> Driver:
        """That of the first group."""
        return self.groups.use(self._numbers[0])

    @property
    def raft(self) -> Raft:
        return self.driver.raft

    def turn(self) -> None:
        for driver in run_turn(self.groups, self.log):
            for applied in driver.take_outcome().applied:
                for index, result in enumerate(applied.results, applied.first):
                    assert result.error_code is None, result
                    self.applied[index] = result.value

    def propose(self, proposal: Proposal, group: int | None = None) -> int:
        index = self.groups.use(self._numbers[0] if group is None else group).propose([proposal]).index
        self.turn()
        return index

    def rows(self, group: int | None = None) -> dict[int, str]:
        machine = self.machines[self._numbers[0] if group is None else group]
        table = machine.read("t").scan(None, None).read_all()
        return dict(zip(table["k"].to_pylist(), table["v"].to_pylist(), strict=True))

    def _send(self, to: int, envelopes: list[Envelope]) -> bool:
        self.peer_calls += 1
        self.sent.extend(envelope.message for envelope in envelopes)
        for packet in self.codec.encode(to, envelopes):
            self.ring.wire.append((self.id, to, packet))
        return True


class Ring:
    """All nodes, and what is under way between them."""

    def __init__(
        self,
        size: int = 3,
        *,
        groups: Sequence[int] = (0,),
        policy: SnapshotPolicy = POLICY,
        machine: Callable[[SimulatedFiles, int], TableMachine] = lambda files, group: TableMachine(),
        **config: object,
    ) -> None:
        self.wire: deque = deque()
        self.down: set[int] = set()
        self.drop: Callable[[int, int, Envelope], bool] = lambda sender, to, envelope: False
        self.peers: dict[int, Peer] = {}
        self._make = lambda number, voters, policy=policy: Peer(self, number, voters, groups, policy, machine, **config)
        for number in range(1, size + 1):
            self.peers[number] = self._make(number, range(1, size + 1))
        self.elect(1)

    def __getitem__(self, number: int) -> Peer:
        return self.peers[number]

    def add_empty(self, number: int, policy: SnapshotPolicy = POLICY) -> Peer:
        """A node that waits to be added."""
        peer = self.peers[number] = self._make(number, (), policy)
        return peer

    def elect(self, number: int) -> None:
        peer = self.peers[number]
        for driver in peer.groups:
            peer.groups.use(driver.group).raft.campaign()
        peer.turn()
        self.settle()
        assert all(driver.raft.role is Role.LEADER for driver in peer.groups)

    def crash(self, number: int) -> None:
        """The power goes, and the node stays down."""
        self.down.add(number)
        self.peers[number].files.crash()

    def kill(self, number: int) -> None:
        """The process ends, and the node stays down; the machine goes on."""
        self.down.add(number)

    def restart(self, number: int) -> None:
        self.down.discard(number)
        self.peers[number].start()

    def settle(self) -> None:
        """Deliver until nothing is under way."""
        while self.wire:
            sender, to, packet = self.wire.popleft()
            if to in self.down or sender in self.down or to not in self.peers:
                continue
            peer = self.peers[to]
            for envelope in peer.codec.decode(sender, packet.metadata, packet.batch):
                if not self.drop(sender, to, envelope):
                    assert peer.groups.receive(envelope)
            peer.turn()

    def tick(self, count: int = 1, only: Sequence[int] = ()) -> None:
        for _ in range(count):
            for number, peer in sorted(self.peers.items()):
                if number not in self.down and (not only or number in only):
                    peer.groups.tick()
                    peer.turn()
            self.settle()

    def create(self, leader: int = 1, group: int | None = None) -> None:
        self.peers[leader].propose(
            Proposal(EntryKind.CREATE_TABLE, 0, payload.encode_create_table("t", SCHEMA, ["k"])), group
        )
        self.settle()

    def write(self, count: int, first: int = 0, leader: int = 1, group: int | None = None) -> None:
        """`count` entries of one row each."""
        for key in range(first, first + count):
            self.peers[leader].propose(write(key), group)
            self.settle()
        self.tick()

    def kinds(self, number: int) -> set[MessageKind]:
        return {message.kind for message in self.peers[number].sent}


def write(key: int, text: str = "") -> Proposal:
    batch = pa.record_batch({"k": [key], "v": [text or f"value {key}"]}, schema=SCHEMA)
    return Proposal(EntryKind.WRITE, 1, payload.encode_rows(batch))


def expected(count: int) -> Mapping[int, str]:
    return {key: f"value {key}" for key in range(count)}
