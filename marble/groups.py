"""All groups of one node behind one door: what comes in is routed, what goes out travels together, what sleeps costs nothing.

Rule 1: a group that nothing has touched since the last turn is not looked at. Whoever gives a driver anything takes it from
`Groups.use`, which notes that.
Rule 2: what all groups send to one peer in a turn is handed to the transport in one call, groups in ascending order.
Rule 3: a group that sleeps gets no ticks. In their place a node tells each peer with one NODE_BEAT that it is alive, for all
groups that sleep under its lead. When that falls silent for an election timeout, or tells of a new life of its sender (which
has forgotten whom it leads), the groups that follow it wake, and count time for themselves again.

Pure like the driver: no thread, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from marble.driver import Driver, Send
from marble.errors import UsageError
from marble.jobs import CompactJob, FileJob, Log, MachineJob
from marble.raft.messages import Message, MessageKind
from marble.transport.codec import Envelope
from marble.types import NO_NODE

J = TypeVar("J")


@dataclass(frozen=True, slots=True)
class Write:
    """A write of one group that a sync must make durable: the answer of `Driver.begin`, not 0."""

    driver: Driver
    number: int


@dataclass(slots=True)
class _Beats:
    """What is heard of a node that leads groups which sleep here: the name of its life, and ticks since it was heard."""

    life: int = 0
    silent_ticks: int = 0


class Groups:
    """The drivers of one node. Not thread-safe: one thread owns it and them.

    Parameters
    ----------
    node_id
        This node.
    send
        Takes the messages for a peer. The drivers must be made with `post` instead.
    heartbeat_ticks, election_ticks
        How often the node tells that it is alive, and how long it waits for others who do.
    life
        Names this run of the node; another run has another number.
    log_bytes
        What the log had when it was opened: it may be kept by a group that rests, and that counts as written.
    """

    def __init__(
        self, node_id: int, send: Send, heartbeat_ticks: int, election_ticks: int, life: int, log_bytes: int = 0
    ) -> None:
        self._node_id = node_id
        self._send = send
        self._heartbeat_ticks = heartbeat_ticks
        self._election_ticks = election_ticks
        self._life = life
        self._log_bytes = log_bytes
        self._drivers: dict[int, Driver] = {}
        self._touched: set[int] = set()
        self._outgoing: dict[int, list[Envelope]] = {}
        self._awake: set[int] = set()
        self._asleep: dict[int, set[int]] = {}
        """Leader -> groups that sleep under its lead; no empty sets."""
        self._beats: dict[int, _Beats] = {}
        self._ticks = 0

    def add(self, driver: Driver) -> None:
        """Take `driver` in. Raises UsageError if there is one of that group."""
        if driver.group in self._drivers:
            raise UsageError(f"group {driver.group} is there already")
        self._drivers = dict(sorted([*self._drivers.items(), (driver.group, driver)]))
        self._awake.add(driver.group)
        self._touched.add(driver.group)

    def __iter__(self) -> Iterator[Driver]:
        """All drivers, ascending by group."""
        return iter(self._drivers.values())

    def __contains__(self, group: int) -> bool:
        return group in self._drivers

    def use(self, group: int) -> Driver:
        """The driver of `group`, to be given something. Raises UsageError if there is none."""
        driver = self._drivers.get(group)
        if driver is None:
            raise UsageError(f"this node has no group {group}, only {sorted(self._drivers)}")
        self._touched.add(group)
        return driver

    @property
    def awake(self) -> frozenset[int]:
        """The groups that get ticks."""
        return frozenset(self._awake)

    # -- what comes in -----------------------------------------------------------------------------------------------

    def receive(self, envelope: Envelope) -> bool:
        """Take a peer's message. False if it is for another node, or a group that is not here.

        Raises ProtocolError if the message is at fault.
        """
        message = envelope.message
        if message.to != self._node_id:
            return False
        if message.kind is MessageKind.NODE_BEAT:
            self._hear(message)
            return True
        if envelope.group not in self._drivers:
            return False
        self.use(envelope.group).receive(envelope)
        return True

    def tick(self, now_us: int = 0) -> None:
        """One tick of the clock, for every group that is awake; `now_us` as in `Raft.tick`."""
        for group in sorted(self._awake):
            self.use(group).tick(now_us)
        self._ticks += 1
        if self._ticks % self._heartbeat_ticks == 0:
            self._send_beats()
        for leader in sorted(self._asleep):
            beats = self._beats.setdefault(leader, _Beats())
            beats.silent_ticks += 1
            if leader != self._node_id and beats.silent_ticks > self._election_ticks:
                self._wake(leader)

    def report_unreachable(self, peer: int) -> None:
        """The link to `peer` was lost."""
        for driver in self:
            if peer in driver.raft.progress:
                self.use(driver.group).raft.report_unreachable(peer)

    def report_way_lost(self, peer: int) -> None:
        """One of several ways to `peer` was lost, with entries under way on it."""
        for driver in self:
            if peer in driver.raft.progress:
                self.use(driver.group).raft.report_way_lost(peer)

    def _hear(self, beat: Message) -> None:
        beats = self._beats.setdefault(beat.sender, _Beats())
        reborn = beats.life not in (0, beat.context)
        beats.life, beats.silent_ticks = beat.context, 0
        if reborn:
            self._wake(beat.sender)

    def _send_beats(self) -> None:
        leading = self._asleep.get(self._node_id, set())
        peers = {peer for group in leading for peer in self._drivers[group].raft.members.all}
        for peer in sorted(peers - {self._node_id}):
            beat = Message(MessageKind.NODE_BEAT, self._node_id, peer, 0, context=self._life)
            self._outgoing.setdefault(peer, []).append(Envelope(0, beat))

    def _wake(self, leader: int) -> None:
        for group in sorted(self._asleep.pop(leader, ())):
            self.use(group).raft.wake()
            self._awake.add(group)

    # -- what goes out -----------------------------------------------------------------------------------------------

    def post(self, to: int, envelopes: list[Envelope]) -> bool:
        """What drivers call to send: kept until `flush`, which tells them of what could not be sent."""
        self._outgoing.setdefault(to, []).extend(envelopes)
        return True

    def flush(self) -> None:
        """Hand everything that was posted to the transport, peers in ascending order."""
        outgoing, self._outgoing = self._outgoing, {}
        for peer in sorted(outgoing):
            if not self._send(peer, outgoing[peer]):
                lost = {envelope.group for envelope in outgoing[peer]}
                for group in sorted(lost & self._drivers.keys()):
                    self.use(group).raft.report_unreachable(peer)

    def begin(self) -> tuple[bool, list[Write]]:
        """Begin one Ready of each group that has one, and send what may go at once.

        Returns
        -------
        bool
            Whether there was any.
        list of Write
            Those that need a sync: when it is done, hand them to `persisted`.
        """
        writes = []
        begun = False
        for group in sorted(self._touched):
            driver = self._drivers[group]
            if driver.has_ready():
                begun = True
                if number := driver.begin():
                    writes.append(Write(driver, number))
        self.flush()
        return begun, writes

    def persisted(self, writes: Iterable[Write]) -> None:
        """The log was synced after these began."""
        for write in writes:
            self.use(write.driver.group).persisted(write.number)
        self.flush()

    def take_purged(self) -> bool:
        """Whether the log has become superfluous in part: `Log.purge` is worth a call after the next sync.

        Then other groups are asked to make way, too: the log goes no further than the one that keeps its oldest entry.
        """
        purged = bool([group for group in self._touched if self._drivers[group].take_purged()])
        if purged and len(self._drivers) > 1:
            storing = [(driver.group, driver.snapshots) for driver in self if driver.snapshots is not None]
            written = self._log_bytes + sum(snapshots.applied_bytes for _, snapshots in storing)
            self._touched |= {group for group, snapshots in storing if snapshots.make_way(written)}
        return purged

    def take_applies(self) -> list[MachineJob]:
        """What the machines of touched groups have to do, at most one job each."""
        return self._take(Driver.take_apply)

    def finish_apply(self, job: MachineJob) -> None:
        """`job` has run."""
        self.use(job.group).finish_apply(job)

    def take_snapshots(self) -> list[FileJob]:
        """What touched groups have to do with files of snapshots, at most one job each."""
        return self._take(Driver.take_snapshot)

    def finish_snapshot(self, job: FileJob) -> None:
        """`job` has run."""
        self.use(job.group).finish_snapshot(job)

    def take_compactions(self) -> list[CompactJob]:
        """What the machines of touched groups have to compact, at most one job each."""
        return self._take(lambda driver: driver.compactor.take_job())

    def finish_compaction(self, job: CompactJob) -> None:
        """`job` has run."""
        self.use(job.group).compactor.finish_job(job)

    def _take(self, take: Callable[[Driver], J | None]) -> list[J]:
        drivers = self._drivers
        # Of one group, as most nodes have it, there is no order.
        touched = self._touched if len(self._touched) < 2 else sorted(self._touched)
        return [job for group in touched if (job := take(drivers[group])) is not None]

    def end_turn(self) -> list[Driver]:
        """The drivers that were touched since the last call: their outcomes are worth a look."""
        touched = [self._drivers[group] for group in sorted(self._touched)]
        self._touched.clear()
        for driver in touched:
            self._note_sleep(driver)
        return touched

    def _note_sleep(self, driver: Driver) -> None:
        group, raft = driver.group, driver.raft
        if not raft.quiesced:
            if group not in self._awake:
                self._awake.add(group)
                self._forget_sleep(group)
        elif group in self._awake:
            self._awake.discard(group)
            if raft.leader != NO_NODE:
                self._asleep.setdefault(raft.leader, set()).add(group)
                self._beats.setdefault(raft.leader, _Beats()).silent_ticks = 0

    def _forget_sleep(self, group: int) -> None:
        for leader in [leader for leader, groups in self._asleep.items() if group in groups]:
            self._asleep[leader].discard(group)
            if not self._asleep[leader]:
                del self._asleep[leader]


def run_turn(groups: Groups, log: Log, files: bool = True) -> list[Driver]:
    """Carry out inline all that the touched groups have to do, with one sync for all of them, until nothing is left.

    Without `files`, what is to be done with files of snapshots is left.

    Returns the drivers that were touched. Raises whatever the log or a machine raised: the node must then stop.
    """
    busy = True
    while busy:
        busy, writes = groups.begin()
        purged = groups.take_purged()
        if writes or purged:
            log.sync()
        if purged:
            log.purge()
        groups.persisted(writes)
        for job in groups.take_applies():
            job.run()
            groups.finish_apply(job)
            busy = True
        for file_job in groups.take_snapshots() if files else ():
            file_job.run()
            groups.finish_snapshot(file_job)
            busy = True
    return groups.end_turn()
