"""A node of the simulation: the production core, driver, log and tables, run by events instead of threads.

Rule 1: what a crash takes, it takes: everything but the disk is made anew by `start`. Events of an earlier life find nobody.
Rule 2: a sync and an apply job are events of their own, as they are threads of their own in `marble.node`: the core goes
        on meanwhile, and a crash may come between any two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final

from marble._core.entry_batch import Proposal
from marble.checkpoint import Checkpoints
from marble.driver import Driver
from marble.env import SystemRandom
from marble.errors import CorruptionError, InvariantError, NotLeaderError, UnavailableError
from marble.groups import Groups, Write
from marble.identity import bind
from marble.jobs import CompactJob, FileJob, MachineJob, RebuildJob, RestoreJob, WriteJob
from marble.logstore.log import Log, LogOptions
from marble.logstore.replay import GroupState
from marble.logstore.segment import DIRECTORY as LOG_DIRECTORY
from marble.logstore.segment import segment_numbers, segment_path
from marble.logstore.snapshots import SnapshotStore
from marble.promises import Committed, Promises
from marble.raft.core import Raft
from marble.recovery import recover
from marble.snapshotting import SnapshotPolicy
from marble.testing import invariants
from marble.testing.clocks import SimulatedClock
from marble.testing.disk import DiskCrash, SimulatedFiles
from marble.testing.ledger import Ledger, Shelf, Violation
from marble.testing.loop import SECOND
from marble.testing.observed import ObservedLog, Seat
from marble.testing.tables import NodeTables
from marble.testing.world import World
from marble.transport.codec import Envelope
from marble.types import HardState, Members

SEGMENT_BYTES_MAX: Final = 32 * 1024
"""Small, so that histories roll over many segments."""

_LOG_OPTIONS: Final = LogOptions(segment_bytes_max=SEGMENT_BYTES_MAX, cache_bytes_max=1 << 20, rest_bytes=12 * 1024)
"""Logs rest often, and not always: what they keep to be written over comes and goes."""

PIECE_BYTES_MAX: Final = 512
"""Small, so that a snapshot travels in many pieces."""


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
        self.tables = NodeTables(world, number, self.files)
        self.clock = SimulatedClock(world.loop, world.plan.clocks.drift)
        self.seats: dict[int, Seat] = {}
        self.life = 0
        self.broken: str | None = None
        self.damaged = False
        """A bit was flipped, so the disk may be found corrupt."""
        self.checkpoints: Checkpoints | None = None
        self._voters = list(voters)
        self._world = world
        self._loop = world.loop
        self._log: ObservedLog | None = None
        self._groups = self._no_groups()
        self._unsynced: list[Write] = []
        self._purge = False
        self._purging = False
        self._syncing = False
        self._pumping = False
        self._paused_until = 0
        self._wakes: set[int] = set()

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
        # Every node here has one disk in all its lives, so its number may be its directory's.
        genesis = Members(bind(self.files, "simulated", self.id, self._voters, SystemRandom(self.id)).voters)
        try:
            log = Log.open(self.files, _LOG_OPTIONS)
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
        self._log = ObservedLog(log, self.id, self._world.ledgers, lambda group: self._world.cores[group].get(self.id))
        self._groups = self._no_groups()
        self._unsynced, self._purge, self._syncing, self._pumping = [], False, False, False
        try:
            for group, ledger in self._world.ledgers.items():
                self._open_group(group, ledger, log, genesis)
        except CorruptionError as error:
            if not self.damaged:
                raise
            self._end()
            self._break(error)
            return
        self.checkpoints = Checkpoints(self.files, log, [seat.snapshots for seat in self.seats.values()])
        self._loop.after(self._tick_us(), self._tick, self.life)
        self._pump(self.life)

    def _break(self, error: CorruptionError) -> None:
        self._world.injected["disks found damaged"] += 1
        self.broken = str(error)
        self._loop.note(self.id, "stays away: {}", error)

    def _no_groups(self) -> Groups:
        plan = self._world.plan
        return Groups(self.id, self._send, plan.heartbeat_ticks, plan.election_ticks, self.life + 1)

    def _open_group(self, group: int, ledger: Ledger, log: Log, genesis: Members) -> None:
        plan = self._world.plan
        found = log.groups.get(group)
        self._check_survived(ledger, found)
        machine = self.tables.machine(ledger)
        store = SnapshotStore(self.files, group)
        recovered = recover(group, found, store, genesis, machine)
        raft = Raft(self._world.core_config(self.id), recovered.state)
        assert self._log is not None
        driver = Driver(
            group,
            raft,
            self._log,
            machine,
            self._groups.post,
            store=store,
            policy=SnapshotPolicy(
                distance=plan.snapshot_distance,
                tail=plan.snapshot_tail,
                piece_bytes_max=PIECE_BYTES_MAX,
                patience_ticks=plan.election_ticks,
            ),
            replicated=recovered.endpoints,
            wall_us=self.clock.wall_us,
            pace=None if plan.tables is None else lambda nbytes: self.tables.meanwhile(self.seats[group]),
        )
        self._groups.add(driver)
        self.seats[group] = seat = Seat(driver, machine, ledger, self._promises(ledger, raft), store)
        self._world.cores[group][self.id] = raft
        invariants.after_input(ledger, raft, self._world.cores[group])
        self.tables.check_start(seat)

    def _check_survived(self, ledger: Ledger, found: GroupState | None) -> None:
        """Compare what the log found with what the witness knows to be there, and note it as what is there now."""
        hard_state = found.hard_state if found else HardState()
        terms: list[int] = []
        if found:
            behind = found.term_index.span(found.first_index, found.last_index + 1).terms()
            terms = [*ledger.committed[: found.purged_index], *behind]
        shelf = ledger.shelves.get(self.id)
        if shelf is not None:
            invariants.durable_survives(shelf, self.id, hard_state, terms)
        ledger.shelves[self.id] = Shelf(hard_state, terms, list(terms))

    def _promises(self, ledger: Ledger, raft: Raft) -> Promises:
        def ask(request: int, lease: bool) -> None:
            ledger.reads[self.id, request] = len(ledger.committed)
            raft.read_index(request, self.clock.monotonic_us(), lease)

        timeout_s = self._world.plan.load.timeout_us / SECOND
        return Promises(timeout_s, timeout_s, ask, ask_again_ticks=self._world.plan.heartbeat_ticks)

    def crash(self) -> None:
        """The power goes: what no sync covered is lost, in part or whole."""
        self._loop.note(self.id, "loses power")
        self._end()
        self.files.crash()

    def kill(self) -> None:
        """The process ends; what the kernel has seen stays seen."""
        self._loop.note(self.id, "is killed")
        self._end()

    def retire(self, why: str) -> None:
        """End for good."""
        self._loop.note(self.id, "ends for good: {}", why)
        self._end()
        self.broken = why

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
        self._wakes.add(until)

    def resume(self) -> None:
        """It goes on now, whatever was said before, with what has waited."""
        self._paused_until = 0
        self._loop.hasten(self._wakes, (self._if_alive, self._tick))

    def _do(self, action: Callable[..., None], *arguments: Any) -> None:
        """Let the node act, and let it end as a node does when its disk fails it."""
        try:
            action(*arguments)
        except DiskCrash:
            self.crash()
            self._restart_later()
        except (InvariantError, CorruptionError, OSError) as error:
            if isinstance(error, InvariantError) and not isinstance(error.__cause__, OSError):
                raise
            if isinstance(error, CorruptionError) and not self._excuses(error):
                raise
            self._loop.note(self.id, "stops: {}", error)
            full = self.files.full
            self.kill()
            if isinstance(error, CorruptionError) and not self.tables.excuses(error):
                # Found before it was believed, as at a start: without another disk the node stays away.
                self._break(error)
                return
            if not full:
                # What a failed sync has left behind is in doubt for every program: the machine is restarted, too.
                self.files.crash()
            self._restart_later()

    def _excuses(self, error: CorruptionError) -> bool:
        """Whether `error` is about what was damaged indeed: a file of a table, or the log, which is read in use, too."""
        log = error.path is not None and error.path.startswith(f"simulated:{LOG_DIRECTORY}/")
        return (log and self.damaged) or self.tables.excuses(error)

    def _restart_later(self) -> None:
        self._loop.after(self._loop.between(0, self._world.plan.process.down_us), self.start)

    # -- what comes in -----------------------------------------------------------------------------------------------

    def receive(self, envelopes: Sequence[Envelope]) -> None:
        """Take a packet from the network."""
        if self.seats:
            self._when_awake(self._receive, envelopes)

    def propose(self, group: int, proposal: Proposal, future: Future[Committed]) -> None:
        """Take a client's write."""
        self._when_awake(self._propose, group, proposal, future)

    def read_index(self, group: int, future: Future[int], lease: bool) -> None:
        """Take a client's read."""
        self._when_awake(self._read_index, group, future, lease)

    def act(self, group: int, action: Callable[[Driver], object]) -> None:
        """Let an operator do something with the driver of `group`, if the node can hear."""
        if self.seats and self._paused_until <= self._loop.now:
            self._do(self._acted, group, action)

    def _when_awake(self, action: Callable[..., None], *arguments: Any) -> None:
        if self._paused_until > self._loop.now:
            self._loop.after(self._paused_until - self._loop.now, self._if_alive, self.life, action, *arguments)
        else:
            self._do(action, *arguments)

    def _if_alive(self, life: int, action: Callable[..., None], *arguments: Any) -> None:
        if life == self.life:
            self._when_awake(action, *arguments)

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

    def _acted(self, group: int, action: Callable[[Driver], object]) -> None:
        action(self._groups.use(group))
        self._check(self.seats[group])
        self._pump_soon()

    def _read_index(self, group: int, future: Future[int], lease: bool) -> None:
        self._groups.use(group)
        self.seats[group].promises.add_read(future, self.clock.monotonic(), lease)
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
        self._groups.tick(self.clock.monotonic_us())
        now = self.clock.monotonic()
        for seat in self.seats.values():
            self._check(seat)
            seat.promises.expire(now)
        if self._world.plan.tables is not None and self._log is not None and self._log.room.rests(now):
            self._world.injected["logs at rest"] += 1
            self._purge = True
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
            self._when_awake(self._pump, life)

    def _pump(self, life: int) -> None:
        groups = self._groups
        for group, seat in self.seats.items():
            if seat.offers:
                self._offer(group, seat)
        begun = True
        while begun:
            begun, writes = groups.begin()
            self._unsynced.extend(writes)
            self._purge |= groups.take_purged()
            for job in groups.take_applies():
                self._loop.after(self._loop.between(20, 1000), self._if_alive, life, self._applied, job)
            for file_job in groups.take_snapshots():
                self._loop.after(self._loop.between(100, 200_000), self._if_alive, life, self._filed, file_job)
            for compact_job in groups.take_compactions():
                if self._loop.chance(0.5):
                    self.seats[compact_job.group].machine.prepare()
                self._loop.after(self._loop.between(100, 200_000), self._if_alive, life, self._filed, compact_job)
        for driver in groups.end_turn():
            self._publish(self.seats[driver.group])
        if (self._unsynced or self._purge) and not self._syncing:
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
        self._purging, self._purge = self._purge, False
        self._syncing = True
        # The bytes reach the disk at some moment of the sync: what came later may be among them, or may not.
        early = loop.random.random() < 0.5
        if early:
            self._sync()
        loop.after(100 + int(loop.random.random() * longest), self._end_sync, self.life, writes, early)

    def _sync(self) -> None:
        assert self._log is not None
        self._log.sync()
        if self._purging:
            self._world.injected["purges"] += 1
            self._log.purge()

    def _end_sync(self, life: int, writes: list[Write], early: bool) -> None:
        if life == self.life:
            self._do(self._synced, writes, early)

    def _synced(self, writes: list[Write], early: bool) -> None:
        if not early:
            self._sync()
        # If it is paused: the kernel has finished, and the process will hear of it.
        self._when_awake(self._report_sync, writes)

    def _report_sync(self, writes: list[Write]) -> None:
        self._syncing = False
        self._groups.persisted(writes)
        for write in writes:
            self._check(self.seats[write.driver.group])
        self._pump(self.life)

    def _applied(self, job: MachineJob) -> None:
        job.run()
        if isinstance(job, RestoreJob):
            self._world.injected["snapshots installed"] += 1
            self._loop.note(self.id, "has restored a snapshot at {}", job.info.index)
        if isinstance(job, RebuildJob) and job.error is None:
            self._world.injected["tables built anew"] += 1
            self._loop.note(self.id, "has built its tables anew from a snapshot at {}", job.info.index)
        self._groups.finish_apply(job)
        self._check(self.seats[job.group])
        self.tables.check_job(self.seats[job.group], job)
        self._pump(self.life)

    def _filed(self, job: FileJob | CompactJob) -> None:
        self.tables.run(job)
        if isinstance(job, WriteJob | CompactJob) and job.error is None:
            self._world.injected["snapshots taken" if isinstance(job, WriteJob) else "compactions"] += 1
        if isinstance(job, CompactJob):
            self._groups.finish_compaction(job)
        else:
            self._groups.finish_snapshot(job)
        self._check(self.seats[job.group])
        self.tables.check_job(self.seats[job.group], job)
        self._pump(self.life)

    def _send(self, to: int, envelopes: list[Envelope]) -> bool:
        for envelope in envelopes:
            seat = self.seats.get(envelope.group)
            if seat is not None:
                invariants.message_is_true(seat.ledger, seat.raft, envelope.message, self._world.cores[envelope.group])
        return self._world.send(self.id, to, envelopes)
