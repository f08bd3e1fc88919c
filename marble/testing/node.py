"""A node of the simulation: the production core, driver, log and tables, run by events instead of threads.

Rule 1: what a crash takes, it takes: everything but the disk is made anew by `start`. Events of an earlier life find nobody.
Rule 2: a sync and an apply job are events of their own, as they are threads of their own in `marble.node`: the core goes
        on meanwhile, and a crash may come between any two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final

import pyarrow as pa

from marble._core.entry_batch import Proposal
from marble._core.term_index import TermIndex
from marble.driver import Driver, DurableState
from marble.errors import CorruptionError, InvariantError, NotLeaderError, UnavailableError
from marble.groups import Groups, Write
from marble.jobs import ApplyJob
from marble.logstore.log import Log, LogOptions
from marble.logstore.segment import segment_numbers, segment_path
from marble.lsm.machine import TableMachine
from marble.machine import Result
from marble.promises import Committed, Promises
from marble.raft.config import RaftConfig
from marble.raft.core import Raft
from marble.testing import invariants
from marble.testing.clocks import SimulatedClock
from marble.testing.disk import DiskCrash, SimulatedFiles
from marble.testing.ledger import Ledger, Shelf, Violation
from marble.testing.loop import SECOND
from marble.testing.world import World
from marble.transport.codec import Envelope
from marble.types import HardState, Members

SEGMENT_BYTES_MAX: Final = 64 * 1024
"""Small, so that histories roll over many segments."""


class ObservedLog:
    """The node's log, with a witness beside it."""

    def __init__(self, log: Log, node: int, ledgers: dict[int, Ledger]) -> None:
        self._log = log
        self._node = node
        self._ledgers = ledgers
        self.read = log.read

    def append(self, group: int, hard_state: HardState | None, entries: pa.RecordBatch | None) -> None:
        self._log.append(group, hard_state, entries)
        ledger = self._ledgers[group]
        shelf = ledger.shelves[self._node]
        if entries is None:
            shelf.append(hard_state, 0, [])
            return
        first = entries.column("index")[0].as_py()
        terms = entries.column("term").to_pylist()
        invariants.log_matching(ledger, shelf, self._node, first, terms, entries.column("checksum").to_pylist())
        shelf.append(hard_state, first, terms)

    def sync(self) -> None:
        self._log.sync()
        for ledger in self._ledgers.values():
            ledger.shelves[self._node].settle()


class ObservedMachine(TableMachine):
    """The node's tables, with a witness beside them."""

    def __init__(self, ledger: Ledger, node: int) -> None:
        super().__init__()
        self._ledger = ledger
        self._node = node

    def apply(self, entries: pa.RecordBatch) -> list[Result]:
        results = super().apply(entries)
        terms, checksums = entries.column("term").to_pylist(), entries.column("checksum").to_pylist()
        first = self.applied_index + 1 - len(terms)
        invariants.state_machine_safety(self._ledger, self._node, first, terms, checksums, results)
        return results


class Seat:
    """One group at one node, in one life."""

    __slots__ = ("driver", "ledger", "machine", "offers", "promises", "raft")

    def __init__(self, driver: Driver, machine: ObservedMachine, ledger: Ledger, promises: Promises) -> None:
        self.driver = driver
        self.raft = driver.raft
        self.machine = machine
        self.ledger = ledger
        self.promises = promises
        self.offers: list[tuple[Proposal, Future[Committed]]] = []


class SimulatedNode:
    """One node. Its disk and clock survive a crash, the rest does not.

    Attributes
    ----------
    seats
        Group -> what runs there; empty while the node is down.
    life
        Counts its lives; an event of another one does nothing.
    broken
        Why it cannot start any more: its disk is damaged. None: it can.
    """

    def __init__(self, world: World, number: int, voters: Sequence[int]) -> None:
        self.id = number
        self.files = SimulatedFiles(world.loop.random)
        self.clock = SimulatedClock(world.loop, world.plan.clocks.drift)
        self.seats: dict[int, Seat] = {}
        self.life = 0
        self.broken: str | None = None
        self.damaged = False
        """A bit was flipped, so the disk may be found corrupt."""
        self._voters = list(voters)
        self._world = world
        self._loop = world.loop
        self._log: ObservedLog | None = None
        self._groups = Groups(self._send)
        self._unsynced: list[Write] = []
        self._syncing = False
        self._pumping = False
        self._paused_until = 0

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return bool(self.seats)

    # -- its life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open the log and begin another life, unless the disk does not let it."""
        if self.seats or self.broken:
            return
        self.life += 1
        self._loop.note(self.id, "starts life {}", self.life)
        self._do(self._start)

    def _start(self) -> None:
        self.files.make_directory("")
        try:
            log = Log.open(self.files, LogOptions(segment_bytes_max=SEGMENT_BYTES_MAX, cache_bytes_max=1 << 20))
        except CorruptionError as error:
            if not self.damaged:
                raise
            # That is what it is for: damage is found before it is believed. Without another disk the node stays away.
            self._break(error)
            return
        if log.report.lost_durable_bytes:
            if not self.damaged:
                raise Violation(f"node {self.id}: {log.report.lost_durable_bytes} bytes that were durable are gone")
            self._break(CorruptionError("the log's end is lost"))
            return
        self._log = ObservedLog(log, self.id, self._world.ledgers)
        self._groups = Groups(self._send)
        self._unsynced, self._syncing, self._pumping = [], False, False
        for group, ledger in self._world.ledgers.items():
            self._open_group(group, ledger, log)
        self._loop.after(self._tick_us(), self._tick, self.life)
        self._pump(self.life)

    def _break(self, error: CorruptionError) -> None:
        self._world.injected["disks found damaged"] += 1
        self.broken = str(error)
        self._loop.note(self.id, "stays away: {}", error)

    def _open_group(self, group: int, ledger: Ledger, log: Log) -> None:
        plan = self._world.plan
        found = log.groups.get(group)
        hard_state = found.hard_state if found else HardState()
        term_index = found.term_index if found else TermIndex()
        terms = term_index.span(term_index.first_index, term_index.last_index + 1).terms()
        shelf = ledger.shelves.get(self.id)
        if shelf is not None:
            invariants.durable_survives(shelf, self.id, hard_state, terms)
        ledger.shelves[self.id] = Shelf(hard_state, terms, list(terms))
        config = RaftConfig(
            id=self.id,
            election_ticks=plan.election_ticks,
            heartbeat_ticks=plan.heartbeat_ticks,
            append_bytes_max=1 if self._loop.chance(plan.one_by_one) else 4096,
            pre_vote=plan.pre_vote,
            check_quorum=plan.check_quorum,
            random=self._loop.random,
        )
        assert self._log is not None
        machine = ObservedMachine(ledger, self.id)
        raft = Raft(config, DurableState(hard_state, Members(tuple(self._voters)), term_index))
        driver = Driver(group, raft, self._log, machine, self._groups.post)
        self._groups.add(driver)
        timeout_s = plan.load.timeout_us / SECOND

        def ask(request: int) -> None:
            ledger.reads[self.id, request] = len(ledger.committed)
            raft.read_index(request)

        promises = Promises(timeout_s, timeout_s, ask, ask_again_ticks=plan.heartbeat_ticks)
        self.seats[group] = Seat(driver, machine, ledger, promises)
        self._world.cores[group][self.id] = raft
        invariants.after_input(ledger, raft, self._world.cores[group])

    def crash(self) -> None:
        """The power goes: what no sync covered is lost, in part or whole."""
        self._loop.note(self.id, "loses power")
        self._end()
        self.files.crash()

    def kill(self) -> None:
        """The process ends; what the kernel has seen stays seen."""
        self._loop.note(self.id, "is killed")
        self._end()

    def _end(self) -> None:
        self.life += 1
        self.seats.clear()
        self._log = None
        for group, ledger in self._world.ledgers.items():
            ledger.forget_life(self.id)
            self._world.cores[group].pop(self.id, None)

    def flip_a_bit(self) -> bool:
        """Let the medium lose one bit of the log, under the running node or for its next life. False if there is no log yet."""
        paths = [path for number in segment_numbers(self.files) if self.files.size(path := segment_path(number))]
        if not paths:
            return False
        path = paths[self._loop.between(0, len(paths) - 1)]
        bit = self._loop.between(0, self.files.size(path) * 8 - 1)
        self._loop.note(self.id, "loses bit {} of {}", bit, path)
        self.files.flip_bit(path, bit)
        self.damaged = True
        return True

    def pause(self, until: int) -> None:
        """The process stands still; what is for it waits."""
        self._paused_until = until

    def _do(self, action: Callable[..., None], *arguments: Any) -> None:
        """Let the node act, and let it end as a node does when its disk fails it."""
        try:
            action(*arguments)
        except DiskCrash:
            self.crash()
            self._restart_later()
        except InvariantError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            self._loop.note(self.id, "stops: {}", error)
            full = self.files.full
            self.kill()
            if not full:
                # What a failed sync has left behind is in doubt for every program: the machine is restarted, too.
                self.files.crash()
            self._restart_later()

    def _restart_later(self) -> None:
        self._loop.after(self._loop.between(0, self._world.plan.process.down_us), self.start)

    # -- what comes in -----------------------------------------------------------------------------------------------

    def receive(self, envelopes: Sequence[Envelope]) -> None:
        """Take a packet from the network."""
        if self.seats:
            if self._paused_until > self._loop.now:
                self._later(self._receive, envelopes)
            else:
                self._do(self._receive, envelopes)

    def propose(self, group: int, proposal: Proposal, future: Future[Committed]) -> None:
        """Take a client's write."""
        if self._paused_until > self._loop.now:
            self._later(self._propose, group, proposal, future)
        else:
            self._do(self._propose, group, proposal, future)

    def read_index(self, group: int, future: Future[int]) -> None:
        """Take a client's read."""
        if self._paused_until > self._loop.now:
            self._later(self._read_index, group, future)
        else:
            self._do(self._read_index, group, future)

    def campaign(self, group: int, force: bool) -> None:
        """Stand for election out of turn."""
        if self.seats and self._paused_until <= self._loop.now:
            self._do(self._campaign, group, force)

    def _later(self, action: Callable[..., None], *arguments: Any) -> None:
        self._loop.after(self._paused_until - self._loop.now, self._if_alive, self.life, action, *arguments)

    def _if_alive(self, life: int, action: Callable[..., None], *arguments: Any) -> None:
        if life == self.life:
            if self._paused_until > self._loop.now:
                self._later(action, *arguments)
            else:
                self._do(action, *arguments)

    def _receive(self, envelopes: Sequence[Envelope]) -> None:
        for envelope in envelopes:
            self._loop.note(self.id, "takes {}", envelope.message)
            seat = self.seats[envelope.group]
            self._groups.receive(envelope)
            self._check(seat)
        self._pump_soon()

    def _propose(self, group: int, proposal: Proposal, future: Future[Committed]) -> None:
        self.seats[group].offers.append((proposal, future))
        self._pump_soon()

    def _read_index(self, group: int, future: Future[int]) -> None:
        self._groups.use(group)
        self.seats[group].promises.add_read(future, self.clock.monotonic())
        self._pump_soon()

    def _campaign(self, group: int, force: bool) -> None:
        self._loop.note(self.id, "stands for election")
        self._groups.use(group).raft.campaign(force)
        self._check(self.seats[group])
        self._pump_soon()

    def _tick_us(self) -> int:
        return self.clock.lasts(self._world.plan.tick_us)

    def _tick(self, life: int) -> None:
        if life != self.life:
            return
        if self._paused_until > self._loop.now:
            # A process that was paused does not make up for the ticks that it missed.
            self._loop.after(self._paused_until - self._loop.now, self._tick, life)
            return
        self._loop.after(self._tick_us(), self._tick, life)
        self._do(self._ticked)

    def _ticked(self) -> None:
        self._groups.tick()
        now = self.clock.monotonic()
        for seat in self.seats.values():
            self._check(seat)
            seat.promises.expire(now)
        self._pump_soon()

    # -- what it does ------------------------------------------------------------------------------------------------

    def _check(self, seat: Seat) -> None:
        invariants.after_input(seat.ledger, seat.raft, self._world.cores[seat.ledger.group])

    def _pump_soon(self) -> None:
        """Do what there is to do, now or together with what comes in next."""
        if self._pumping:
            return
        if self._loop.random.random() < 0.3:
            self._pumping = True
            self._loop.after(self._loop.between(50, 3000), self._pump_late, self.life)
        else:
            self._pump(self.life)

    def _pump_late(self, life: int) -> None:
        if life == self.life:
            self._pumping = False
            if self._paused_until > self._loop.now:
                self._later(self._pump, life)
            else:
                self._do(self._pump, life)

    def _pump(self, life: int) -> None:
        groups = self._groups
        for group, seat in self.seats.items():
            if seat.offers:
                self._offer(group, seat)
        begun = True
        while begun:
            begun, writes = groups.begin()
            self._unsynced.extend(writes)
            for job in groups.take_applies():
                self._loop.after(self._loop.between(20, 1000), self._apply, life, job)
        for driver in groups.take_touched():
            self._publish(self.seats[driver.group])
        if self._unsynced and not self._syncing:
            self._begin_sync()

    def _offer(self, group: int, seat: Seat) -> None:
        offers, seat.offers = seat.offers, []
        try:
            first = self._groups.use(group).propose([proposal for proposal, _ in offers])
        except (NotLeaderError, UnavailableError) as error:
            for _, future in offers:
                future.set_exception(error)
            return
        self._check(seat)
        futures = [future for _, future in offers]
        seat.promises.add_writes(first.index, first.term, futures, self.clock.monotonic())

    def _publish(self, seat: Seat) -> None:
        outcome = seat.driver.take_outcome()
        for applied in outcome.applied:
            seat.promises.applied(applied.first, applied.terms, applied.results)
        for answer in outcome.reads:
            invariants.read_is_current(seat.ledger, self.id, answer.request, answer.index)
        seat.promises.answered(outcome.reads, seat.raft.applied_index)
        for event in outcome.events:
            self._loop.note(
                self.id,
                "group {} is {} of term {}, leader {}",
                seat.ledger.group,
                event.role.value,
                event.term,
                event.leader,
            )

    def _begin_sync(self) -> None:
        disk, loop = self._world.plan.disk, self._loop
        longest = disk.sync_us
        if loop.chance(disk.slow):
            self._world.injected["slow syncs"] += 1
            longest = disk.slow_us
        writes, self._unsynced = self._unsynced, []
        self._syncing = True
        # The bytes reach the disk at some moment of the sync: what came later may be among them, or may not.
        early = loop.random.random() < 0.5
        if early:
            self._sync()
        loop.after(100 + int(loop.random.random() * longest), self._end_sync, self.life, writes, early)

    def _sync(self) -> None:
        assert self._log is not None
        self._log.sync()

    def _end_sync(self, life: int, writes: list[Write], early: bool) -> None:
        if life == self.life:
            self._do(self._synced, writes, early)

    def _synced(self, writes: list[Write], early: bool) -> None:
        if not early:
            self._sync()
        if self._paused_until > self._loop.now:
            # The kernel finished; the process will hear of it.
            self._later(self._report_sync, writes)
        else:
            self._report_sync(writes)

    def _report_sync(self, writes: list[Write]) -> None:
        self._syncing = False
        self._groups.persisted(writes)
        for write in writes:
            self._check(self.seats[write.driver.group])
        self._pump(self.life)

    def _apply(self, life: int, job: ApplyJob) -> None:
        if life == self.life:
            if self._paused_until > self._loop.now:
                self._later(self._applied, job)
            else:
                self._do(self._applied, job)

    def _applied(self, job: ApplyJob) -> None:
        job.run()
        self._groups.finish_apply(job)
        self._check(self.seats[job.group])
        self._pump(self.life)

    def _send(self, to: int, envelopes: list[Envelope]) -> bool:
        for envelope in envelopes:
            seat = self.seats.get(envelope.group)
            if seat is not None:
                invariants.message_is_true(seat.ledger, seat.raft, envelope.message, self._world.cores[envelope.group])
        return self._world.send(self.id, to, envelopes)
