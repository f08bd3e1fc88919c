"""Snapshots of one group on this node: when one is taken, what of the log it makes superfluous, how one from the leader
takes the place of the state.

Rule 1: the log is purged only up to what a durable snapshot covers, less a tail for followers that lag a little, and never
past what a peer needs that is fetching a snapshot.
Rule 2: a snapshot of the leader reaches the core only when its file is whole, and only while no job works on the machine:
what the core then throws out of the log nobody is reading.
Rule 3: a file that the state consists of goes only when neither the machine nor a snapshot needs it, and not between the
offer of a snapshot and the next one that is whole: what has arrived of it nobody refers to yet.
Rule 4: a file that the machine finds damaged is fetched from a peer, by its name, while everything else goes on; if no peer has
it, the machine is built anew from a peer's snapshot (`marble.rebuilding`). A leader that cannot apply because of it hands over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from marble.errors import CorruptionError, check
from marble.jobs import ApplyJob, CollectJob, Due, FileJob, Log, RebuildJob, RestoreJob, WriteJob
from marble.logstore.snapshots import SnapshotInfo, SnapshotStore
from marble.machine import HealingMachine, Pace, StateMachine, StoredMachine
from marble.raft.core import Raft
from marble.raft.messages import Message, MessageKind
from marble.rebuilding import DESCRIPTION, Rebuilding, described
from marble.transfer import Transfer
from marble.transport.codec import Envelope
from marble.types import NO_NODE, Position, Role, SnapshotMeta

GARBAGE_TICKS: Final = 20
"""How often it is looked how much old snapshots keep, and a refused snapshot made anew at most."""

TAIL_BYTES_MIN: Final = 64 * 1024 * 1024
"""What of the log stays behind a snapshot for the other members, however small the state is: what they write in a moment, and
what lies between the snapshots of two of them, which one that is built anew has to make up for."""


@dataclass(frozen=True, slots=True)
class SnapshotPolicy:
    """When snapshots are taken and what stays behind them."""

    distance: int = 10_000
    """One is due at each entry whose index is a multiple of this."""
    log_bytes: int = 256 * 1024 * 1024
    """Or when the payloads of those are so many bytes. What stays of the log behind it has no more, either."""
    memory_bytes: int = 64 * 1024 * 1024
    """Or when a machine with files has about so much in memory only."""
    tail: int | None = None
    """How many entries before a snapshot stay, for followers that lag. None: ``distance``, if there are other members, but
    no more bytes than the state has, or `TAIL_BYTES_MIN`: who lags further behind is sooner sent the state."""
    piece_bytes_max: int = 1024 * 1024
    """What one message carries of a snapshot."""
    garbage_bytes: int = 16 * 1024 * 1024
    """Or when files that compaction has replaced take so much, and half of what those take that are in use: only snapshots need them."""
    patience_ticks: int = 10
    """How long an answer may take before a piece is asked for again."""
    window_bytes_max: int = 16 * 1024 * 1024
    """What a follower has asked for and not written yet: the product of a way's rate and its round trip fits, or bounds the rate."""


class Snapshots:
    """Owned by the driver of the group, and its thread.

    Parameters
    ----------
    group, raft, log, machine
        The driver's.
    store
        The group's snapshots on disk.
    policy
        See there.
    post
        Sends an envelope.
    pace
        Slows down the writing of a snapshot; None: as fast as the disk takes it.
    """

    def __init__(
        self,
        group: int,
        raft: Raft,
        log: Log,
        machine: StateMachine,
        store: SnapshotStore,
        policy: SnapshotPolicy,
        post: Callable[[Envelope], None],
        pace: Pace | None,
    ) -> None:
        self._healing = machine if isinstance(machine, HealingMachine) else None
        self.transfer = Transfer(
            group,
            raft.id,
            store,
            post,
            policy.piece_bytes_max,
            policy.patience_ticks,
            None if self._healing is None else self._healing.healed,
            policy.window_bytes_max,
        )
        self.stalled: CorruptionError | None = None
        """What keeps the machine from applying: a file that it needs is damaged."""
        self.purged = False
        """Whether the log was told of a purge since somebody set this to False."""
        self.renewing = False
        """Whether the newest snapshot is of no use to others, and is being replaced."""
        self.store = store
        self._group = group
        self._raft = raft
        self._log = log
        self._machine = machine
        self._stored = machine if isinstance(machine, StoredMachine) else None
        self._store = store
        self._policy = policy
        self._post = post
        self._pace = pace
        self._wanted = False
        self._not_before = 0
        self._bytes = 0
        self.applied_bytes = 0
        """Bytes of all entries applied in this run."""
        self._others = 0
        """What `make_way` was told when this group last let go of what it could."""
        self._tailless = False
        self._write: WriteJob | None = None
        self._collect = False
        """Whether files may have become superfluous."""
        self._out: FileJob | None = None
        self._install: Message | None = None
        self._restore: tuple[int, RestoreJob] | None = None
        self._rebuild: SnapshotInfo | None = None
        """What the machine is built anew from, from when all of it is here until that is done."""
        self._rebuilding = Rebuilding(raft.id, lambda message: post(Envelope(group, message)), policy.patience_ticks)
        self._stalled_ticks = 0
        self._garbage_ticks = 0
        self._refused_ticks = 0
        """How long ago a peer refused what it was offered, counted down."""

    # -- taking one --------------------------------------------------------------------------------------------------

    @property
    def index(self) -> int:
        """Where the newest snapshot stands; 0 without one."""
        return 0 if self._raft.snapshot is None else self._raft.snapshot.index

    def want(self, *, renew: bool = False) -> bool:
        """Take one now, whatever the policy. False if that would be the one that is there.

        With `renew` also that one is made anew: it holds the same, but refers to the files of now.
        """
        there = self._raft.applied_index == self.index and not renew
        if there or not self._raft.applied_index or not self._raft.members.voters:
            return False
        self._wanted = True
        return True

    @property
    def overdue(self) -> bool:
        """Whether a capture is due even if there is nothing to be applied."""
        if self._write is not None or self.installing or self.stalled is not None or not self._raft.members.voters:
            return False
        return self._wanted or self._raft.applied_index >= self._next_index or self._bytes >= self._policy.log_bytes

    def due(self) -> Due:
        """When the next apply job is to capture the state: never while the last one is still being written.

        Nor before a node that joins has applied who the members are: a snapshot tells them to whoever starts from it.
        """
        if self._write is not None or not self._raft.members.voters:
            return Due()
        if self._wanted:
            return Due(0)
        policy, stored = self._policy, self._stored
        ripe = stored if self._raft.applied_index >= self._not_before else None
        full = None if ripe is None else lambda: ripe.memory_bytes >= policy.memory_bytes
        return Due(self._next_index, policy.log_bytes - self._bytes, full)

    @property
    def _next_index(self) -> int:
        # At multiples, so that replicas agree on them whatever kept one of them from the last.
        distance = self._policy.distance
        return max((self.index // distance + 1) * distance, self._not_before)

    def applied(self, job: ApplyJob, endpoints: Mapping[int, str]) -> None:
        """`job` has run, and the core knows. If it captured the state, that is to be written."""
        self.stalled = job.stalled
        self._bytes += job.applied_bytes
        self.applied_bytes += job.applied_bytes
        if job.state is None:
            return
        check(job.state.applied_index == self._raft.applied_index, "a state was captured at another index")
        index = job.state.applied_index
        meta = SnapshotMeta(index, self._raft.log.term_at(index), self._raft.members)
        self._write = WriteJob(self._group, self._store, meta, endpoints, job.state, self._pace)
        self._wanted, self._bytes = False, 0

    # -- files -------------------------------------------------------------------------------------------------------

    def take_job(self) -> FileJob | None:
        """What is to be done with files next; None if there is nothing, or a job is out."""
        if self._out is not None:
            return None
        # Receiving goes first: without what is being received this node is of no use.
        self._out = self.transfer.take_job() or self._write or self._take_collect()
        return self._out

    @property
    def expects_files(self) -> bool:
        """Whether a snapshot is on its way: files that came for it are in no use yet, and until then none is removed."""
        return self.transfer.receiving is not None or self.installing or self._rebuild is not None

    def _take_collect(self) -> CollectJob | None:
        if not self._collect or self._stored is None or self.expects_files:
            return None
        self._collect = False
        return CollectJob(self._group, self._store, self._stored)

    def finish_job(self, job: FileJob) -> None:
        """`job` has run."""
        check(job is self._out, "a job on snapshots finished that is not out")
        self._out = None
        if isinstance(job, CollectJob):
            return
        if isinstance(job, WriteJob):
            self._write, self.renewing = None, False
            if job.error is None:
                self._collect = True
                self._raft.snapshot_taken(job.meta)
                tailless, self._tailless = self._tailless, False
                self.purge(tailless)
            else:
                # The disk may be full: not at once again.
                self._not_before = self._raft.applied_index + max(1, self._policy.distance // 4)
            return
        answer, fetching = self.transfer.finish_job(job), self.transfer.fetching
        if fetching.built_from is not None:
            self._rebuild, fetching.built_from = fetching.built_from, None
        if answer is not None and answer.kind is MessageKind.INSTALL_SNAPSHOT:
            self._install = answer
        elif answer is not None:
            self._post(Envelope(self._group, answer))

    # -- the log -----------------------------------------------------------------------------------------------------

    def make_way(self, written: int) -> bool:
        """Let go of everything in the log that a snapshot can stand for, if others have written much since the last time.

        A log is forgotten from its beginning. What a group that rests has there would keep all that others write behind it.

        Parameters
        ----------
        written
            Bytes that all groups of the log have applied in this run, and that it had before: a log must not grow with short lives.

        Returns
        -------
        bool
            Whether there is something to do now.
        """
        if written - self._others < self._policy.log_bytes:
            return False
        self._others = written
        if self.want():
            self._tailless = True
            return True
        before = self._raft.log.first_index
        self.purge(tailless=True)
        return self._raft.log.first_index > before

    def purge(self, tailless: bool = False) -> None:
        """Let go of the log that the newest snapshot makes superfluous; keep none of it for followers if `tailless`."""
        raft, policy = self._raft, self._policy
        log, tail, tail_bytes = raft.log, policy.tail, policy.log_bytes
        if tail is None:
            tail = 0 if raft.members.all == (raft.id,) else policy.distance
            tail_bytes = min(tail_bytes, max(TAIL_BYTES_MIN, self._state_bytes()))
        tail = 0 if tailless else tail
        end = self.index - tail
        needed = (self.transfer.pinned_index, None if self._rebuild is None else self._rebuild.index)
        pinned = min((index for index in needed if index is not None), default=None)
        if pinned is not None:
            end = min(end, pinned)
        # A tail of a few large entries may be more than what is worth keeping.
        low, high = max(end, log.first_index - 1), self.index if pinned is None else min(self.index, pinned)
        while low < high:
            middle = (low + high) // 2
            if log.bytes(middle + 1, self.index + 1) > tail_bytes:
                low = middle + 1
            else:
                high = middle
        end = max(end, low)
        if end >= log.first_index:
            self._log.start_after(self._group, end, log.term_at(end))
            raft.purge(end)
            self.purged = True

    def _state_bytes(self) -> int:
        """What somebody who lags has to be sent: the newest snapshot and the machine's files, which are about those of it."""
        info = self._store.newest()
        files = [] if self._healing is None else self._healing.live()
        return sum(ref.nbytes for ref in files) + (0 if info is None else info.nbytes)

    # -- one from the leader -----------------------------------------------------------------------------------------

    def receive(self, envelope: Envelope) -> Message | None:
        """A message of another driver, or an INSTALL_SNAPSHOT. Returns what the core is to see of it, if anything.

        Raises ProtocolError if the message is at fault.
        """
        message, raft = envelope.message, self._raft
        match message.kind:
            case MessageKind.SNAPSHOT_FETCH:
                self.transfer.serve(message, raft.term)
                if message.context == DESCRIPTION and self.index + 1 < message.log_index:
                    # It is too old for that peer, and if nobody writes, no newer one will ever be due.
                    self.want()
                return None
            case MessageKind.SNAPSHOT_PIECE if message.context == DESCRIPTION:
                self._described(envelope)
                return None
            case MessageKind.SNAPSHOT_PIECE:
                refusal = self.transfer.arrived(envelope)
                if refusal is not None:
                    self._post(Envelope(self._group, refusal))
                return None
            case _:
                pass
        useless = message.log_index <= raft.commit_index or raft.log.matches(message.log_index, message.log_term)
        if message.term < raft.term or useless:
            return message
        self._install = self.transfer.offered(envelope) or self._install
        self._collect = False
        if isinstance(self._out, WriteJob):
            self._out.give_up()
        return None

    def refused(self, message: Message) -> bool:
        """A peer was not to be had what it was offered: a file may be damaged here, and this node has not read it since.

        If the machine has replaced files of that snapshot, it is made anew, of those of now; until then it is not offered.
        Returns whether the machine's own files are to be checked, since there is no other explanation here.
        """
        self.transfer.release(message.sender)
        newest = self._store.newest()
        if self._healing is None or newest is None or newest.index != message.log_index or self._refused_ticks:
            return False
        self._refused_ticks = GARBAGE_TICKS
        live = {ref.name for ref in self._healing.live()}
        if all(ref.name in live for ref in self._store.known_files(newest)):
            return True
        if self.want(renew=True):
            self.renewing = True
        return False

    @property
    def installing(self) -> bool:
        """Whether a snapshot from the leader waits for the machine to be idle, or for its turn there."""
        return self._install is not None or self._restore is not None

    @property
    def has_install(self) -> bool:
        """Whether the core is to see an INSTALL_SNAPSHOT as soon as no job works on the machine."""
        return self._install is not None

    def take_install(self) -> Message | None:
        """What the core is to see now that no job works on the machine, if anything."""
        message, self._install = self._install, None
        return message

    def install(self, meta: SnapshotMeta, number: int) -> None:
        """The core's write `number` starts the log anew behind the snapshot `meta`: restore it when that is durable."""
        found = (info for info in self._store.infos() if (info.index, info.term) == (meta.index, meta.term))
        info = next(found, None)
        check(info is not None, f"the core installs a snapshot at {meta.index} that is not here")
        assert info is not None
        self._store.pin(info.index)
        if self._restore is not None:
            # An older one still waited for its sync or for the machine; it is not restored any more. No job of it is out, or
            # the core would not have been shown this one.
            self._store.unpin(self._restore[1].info.index)
        self._restore = number, RestoreJob(self._store, self._machine, info)

    def take_restore(self, persisted: int) -> RestoreJob | None:
        """The job that restores, once write number `persisted` is durable."""
        return self._restore[1] if self._restore is not None and self._restore[0] <= persisted else None

    def restored(self, job: RestoreJob) -> None:
        """`job` has run."""
        check(self._restore is not None and job is self._restore[1], "a restore finished that was not under way")
        self._restore = None
        self._store.unpin(job.info.index)
        self._bytes, self.stalled = 0, None
        self._collect = True

    # -- one from any peer, in the place of damaged files ------------------------------------------------------------

    def _described(self, envelope: Envelope) -> None:
        """A peer has told of its newest snapshot: fetch it, if the log here can make up for what it lacks."""
        raft, message = self._raft, envelope.message
        if not self._rebuilding.expects(message):
            return
        useful = not message.reject and message.log_index + 1 >= raft.log.first_index
        if self.expects_files:
            self._rebuilding.rest()
        elif not useful:
            self._rebuilding.next_source(raft.term)
        else:
            info = described(self._group, envelope)
            self._rebuilding.found()
            self._collect = False
            self.transfer.fetching.want(message, info, rebuild=True)

    def take_rebuild(self, committed_end: int) -> RebuildJob | None:
        """The job that builds the machine anew, if a snapshot for that is here and all of it is known to be committed here.

        Parameters
        ----------
        committed_end
            Behind the last entry that may be applied.
        """
        info, raft = self._rebuild, self._raft
        if info is None or self._healing is None or info.index >= committed_end:
            return None
        leaps = info.index > raft.applied_index
        if info.index + 1 < raft.log.first_index or (leaps and info.members != raft.members):
            # The log has gone on, or the group became another: a newer snapshot is needed, or the entries themselves.
            self._rebuild = None
            self._rebuilding.rest()
            return None
        return RebuildJob(self._store, self._healing, info, self._log, raft.applied_index)

    def rebuilt(self, job: RebuildJob) -> bool:
        """`job` has run. Returns whether the machine is further than it was."""
        self._rebuild = None
        self._collect = True
        if job.error is not None:
            if isinstance(job.error, CorruptionError):
                # A file that was here before, and that nobody has read since: the next time it is fetched, too.
                self._store.contents.suspect(job.error)
            self._rebuilding.rest()
            return False
        self.stalled = None
        return job.info.index > job.applied_index

    # -- time --------------------------------------------------------------------------------------------------------

    def tick(self) -> list[int]:
        """A tick has passed. Returns peers that fetch no longer what they were offered."""
        self._rebuilding.tick(self._raft.term)
        self._refused_ticks = max(0, self._refused_ticks - 1)
        if not self._refused_ticks:
            self.renewing = False
        if self._healing is not None:
            self._heal(self._healing)
            self._garbage_ticks = (self._garbage_ticks + 1) % GARBAGE_TICKS
            if not self._garbage_ticks and self._write is None and self._has_garbage(self._healing):
                self.want(renew=True)
        self._stalled_ticks = 0 if self.stalled is None else self._stalled_ticks + 1
        if self._stalled_ticks and self._stalled_ticks % self._policy.patience_ticks == 0:
            self._hand_over()
        return self.transfer.tick(self._raft.progress)

    def _heal(self, machine: HealingMachine) -> None:
        """Have a file fetched that the machine finds damaged, from the leader or any other peer."""
        damaged, raft, contents = machine.damaged(), self._raft, self._store.contents
        if not damaged and not contents.damaged and self.stalled is None:
            return
        contents.blame([ref.name for ref in damaged])
        if self.stalled is not None and contents.name_of(self.stalled.path or "") not in contents.damaged:
            self.stalled = None
        if damaged and not self.installing:
            peers = [node for node in raft.members.all if node != raft.id]
            peers.sort(key=lambda node: (node != raft.leader, node))
            self.transfer.fetching.heal(damaged, peers, Position(max(1, raft.applied_index), max(1, raft.term)))
            busy = self.transfer.receiving is not None or self._rebuild is not None
            if not busy and self.transfer.fetching.in_vain(damaged):
                self._rebuilding.ask(peers, raft.term, raft.log.first_index)

    def _has_garbage(self, machine: HealingMachine) -> bool:
        """Whether so much is kept for old snapshots alone that a new one is worth its while."""
        kept = {ref.name: ref.nbytes for info in self._store.infos() for ref in self._store.known_files(info)}
        if sum(kept.values()) <= self._policy.garbage_bytes:
            return False
        live = {ref.name: ref.nbytes for ref in machine.live()}
        garbage = sum(nbytes for name, nbytes in kept.items() if name not in live)
        return garbage > max(self._policy.garbage_bytes, sum(live.values()) // 2)

    def _hand_over(self) -> None:
        """A leader that cannot apply answers nobody: let the voter lead that has most of the log."""
        raft = self._raft
        if raft.role is not Role.LEADER or raft.transferee != NO_NODE:
            return
        able = {
            node: each for node, each in raft.progress.items() if each.recent_active and node in raft.members.voters
        }
        able.pop(raft.id, None)
        if able:
            raft.transfer_leadership(max(able, key=lambda node: (able[node].match_index, -node)))
