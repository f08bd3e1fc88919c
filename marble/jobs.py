"""Work that a driver hands out because it may take long: applying entries, and everything about files of snapshots.

Rule 1: a job is made and finished by the thread that owns the driver, and run in between by any one thread. While it runs
it touches nothing of the driver's: only the log (which may be read by several threads), the machine's writing side and
files of its own.
Rule 2: of one group at most one job that touches the machine and one that touches files of snapshots are out at a time, so
the machine sees the entries in order and by one thread.
Rule 3: an error that a job keeps has no traceback: its frames would hold what the job worked on, and files would stay for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import pyarrow as pa

from marble._core import entry_batch
from marble.errors import CorruptionError, MarbleError, ProtocolError, UnavailableError, check
from marble.logstore.snapshots import SnapshotInfo, SnapshotStore
from marble.machine import FileRef, HealingMachine, MachineState, Pace, Result, StateMachine, StoredMachine
from marble.members import decode_members
from marble.types import HardState, Members, SnapshotMeta

APPLY_BYTES_MAX: Final = 16 * 1024 * 1024
"""How much of the log one call of apply gets at most: bounds the memory of a replay."""

NEVER: Final = 2**63
"""More than any index or number of bytes."""


class Log(Protocol):
    """What the driver needs of the durable log (`marble.logstore.log.Log` offers more)."""

    def append(self, group: int, hard_state: HardState | None, entries: pa.RecordBatch | None) -> None: ...

    def start_after(self, group: int, index: int, term: int, hard_state: HardState | None = None) -> None: ...

    def sync(self) -> None: ...

    def purge(self) -> int: ...

    def read(self, group: int, first: int, end: int, bytes_max: int) -> pa.RecordBatch: ...


@dataclass(frozen=True, slots=True)
class Applied:
    """Entries that one call of apply took: ``results[i]`` belongs to ``first + i``, which was proposed in ``terms[i]``."""

    first: int
    terms: Sequence[int]
    results: Sequence[Result]


@dataclass(frozen=True, slots=True)
class MembershipApplied:
    """Entry ``index`` made the group consist of ``members``, who are reached at ``endpoints``."""

    index: int
    members: Members
    endpoints: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Due:
    """When the state is to be captured: after entry ``index``, once ``nbytes`` more of the log were applied, or when ``full``."""

    index: int = NEVER
    nbytes: int = NEVER
    full: Callable[[], bool] | None = None


class ApplyJob:
    """Committed entries on their way into the machine: as many of ``[first, end)`` as one call of apply takes.

    None at all if ``first == end``: then only a capture is due. `may_stall`: somebody heals damaged files of the machine.
    """

    def __init__(
        self, group: int, log: Log, machine: StateMachine, first: int, end: int, nbytes: int, due: Due, may_stall: bool
    ) -> None:
        self.group = group
        self.first = first
        # The state is captured exactly where it is due: replicas that flush at the same entries have the same files.
        self.end = due.index + 1 if first <= due.index < end else end
        self.nbytes = nbytes
        """At least as many bytes as the entries have that one call takes."""
        self.applied_bytes = 0
        self.applied: Applied | None = None
        """What was applied, if anything."""
        self.memberships: list[MembershipApplied] = []
        self.state: MachineState | None = None
        """The state behind the last entry, if that was due."""
        self.stalled: CorruptionError | None = None
        """The machine needs a file that is damaged: nothing was applied, and the same is to be tried when it is healed."""
        self._log = log
        self._machine = machine
        self._due = due
        self._may_stall = may_stall

    def run(self) -> None:
        """Read the entries and apply them. Raises what the log or the machine raises: the node must then stop."""
        if self.first < self.end:
            batch = self._log.read(self.group, self.first, self.end, APPLY_BYTES_MAX)
            try:
                results = self._machine.apply(batch)
            except CorruptionError as error:
                if not (self._may_stall and isinstance(self._machine, HealingMachine) and self._machine.blame(error)):
                    raise
                self.stalled = error
                return
            check(len(results) == batch.num_rows, "apply must answer every entry")
            for index in entry_batch.changes(batch):
                payload = entry_batch.payload(batch, index - self.first)
                self.memberships.append(MembershipApplied(index, *decode_members(payload)))
            span = entry_batch.span(batch)
            self.applied_bytes = span.bytes
            self.applied = Applied(self.first, span.terms(), results)
        due = self._due
        reached = self._machine.applied_index >= due.index or self.applied_bytes >= due.nbytes
        if reached or (due.full is not None and due.full()):
            self.state = self._machine.capture()


class RestoreJob:
    """A snapshot from the leader takes the place of the machine's state."""

    def __init__(self, store: SnapshotStore, machine: StateMachine, info: SnapshotInfo) -> None:
        self.group = info.group
        self.nbytes = info.nbytes
        self.info = info
        self._store = store
        self._machine = machine

    def run(self) -> None:
        """Raises CorruptionError if the file is not what it was: the node must then stop.

        A file that it refers to, and that was here before, may be damaged, and nobody has read it since: that can be healed.
        """
        try:
            self._machine.restore(self.info.index, self._store.read(self.info))
        except CorruptionError:
            if not isinstance(self._machine, HealingMachine):
                raise
            self._machine.salvage(self.info.index, self._store.read(self.info))


class RebuildJob:
    """A peer's snapshot, which was fetched, and entries of the log take the place of a machine's state, of which files are damaged.

    - ``applied_index`` of the machine before. If the snapshot is older, it is the same after; if not, the snapshot's index.
    """

    def __init__(
        self, store: SnapshotStore, machine: HealingMachine, info: SnapshotInfo, log: Log, applied: int
    ) -> None:
        self.group = info.group
        self.nbytes = NEVER
        self.info = info
        self.applied_index = applied
        self.error: Exception | None = None
        """Why that could not be. All is as before."""
        self._store = store
        self._machine = machine
        self._log = log

    def run(self) -> None:
        """Raises nothing that a disk or a damaged file could cause."""
        try:
            self._machine.rebuild(self.info.index, self._store.received(self.info), self._entries())
        except (OSError, UnavailableError, CorruptionError) as error:
            self.error = error

    def _entries(self) -> Iterator[pa.RecordBatch]:
        # A call of apply that ended half way may have shown more than it answered.
        first, last = self.info.index + 1, self._machine.applied_index
        while first <= last:
            batch = self._log.read(self.group, first, last + 1, APPLY_BYTES_MAX)
            first += batch.num_rows
            yield batch


class WriteJob:
    """A captured state becomes a snapshot's file."""

    def __init__(
        self,
        group: int,
        store: SnapshotStore,
        meta: SnapshotMeta,
        endpoints: Mapping[int, str],
        state: MachineState,
        pace: Pace | None,
    ) -> None:
        self.group = group
        self.meta = meta
        self.error: Exception | None = None
        """Why there is no snapshot, if there is none. All else is as before."""
        self._store = store
        self._endpoints = endpoints
        self._state: MachineState | None = state
        self._pace = pace
        self._given_up = False

    def give_up(self) -> None:
        """End `run` soon, without a snapshot. May be called on another thread."""
        self._given_up = True

    def run(self) -> None:
        """Write the file, which takes long, then remove those that it supersedes."""
        state, self._state = self._state, None  # What it holds of memory goes when the file is written.
        assert state is not None
        try:
            self._store.write(self.meta, self._endpoints, state.batches(self._wait), self._wait, renew=True)
            self._store.prune(self.meta.index)
        except (OSError, UnavailableError) as error:
            self.error = error.with_traceback(None)

    def _wait(self, nbytes: int) -> None:
        if self._given_up:
            raise UnavailableError("something more urgent is to be done with snapshots")
        if self._pace is not None:
            self._pace(nbytes)


class ReceiveJob:
    """One step of receiving: begin or go on with a file, take in pieces, and if they were the last, verify all of it.

    After `run` one of these holds: ``offset`` says where the next piece starts; ``missing`` says which files are needed
    yet; ``arrived``: the file asked for is here; ``complete``: the snapshot is, with all its files; or ``error`` says why
    it ended.

    Parameters
    ----------
    store
        Where it goes.
    info
        The snapshot that is wanted; None if only `ref` is.
    ref
        A file that the snapshot refers to; None for the snapshot's own.
    pieces
        Offsets and bytes, in order and without gaps.
    healed
        Told the name of the file, which stood damaged here, once it has arrived.
    keep
        Whether the snapshot becomes one of this node. If not, it can be read with `SnapshotStore.received` when it is complete.
    """

    def __init__(
        self,
        store: SnapshotStore,
        info: SnapshotInfo | None,
        ref: FileRef | None = None,
        pieces: Sequence[tuple[int, pa.Buffer]] = (),
        healed: Callable[[str], None] | None = None,
        *,
        keep: bool = True,
    ) -> None:
        self.info = info
        self.ref = ref
        self.offset = 0
        self.missing: list[FileRef] = []
        self.arrived = False
        self.complete = False
        self.error: Exception | None = None
        self.group = store.group
        self._store = store
        self._pieces = pieces
        self._healed = healed
        self._keep = keep

    def run(self) -> None:
        """Raises nothing that a full disk or a wrong piece could cause."""
        pieces, self._pieces = self._pieces, ()
        try:
            if self.ref is not None:
                self._receive_file(self.ref, pieces)
            else:
                self._receive_snapshot(pieces)
        except (OSError, MarbleError) as error:
            if not isinstance(error, OSError | ProtocolError | CorruptionError | UnavailableError):
                raise
            self.error = error.with_traceback(None)

    def _receive_snapshot(self, pieces: Sequence[tuple[int, pa.Buffer]]) -> None:
        check(self.info is not None, "a job receives neither a snapshot nor a file")
        assert self.info is not None
        receiver = self._store.receive(self.info)
        for offset, data in pieces:
            receiver.write(offset, memoryview(data))
        self.offset = receiver.offset
        if not receiver.complete:
            return
        refs = receiver.check()
        self.missing = self._store.contents.missing(refs) if refs else []
        if not self.missing:
            self._store.contents.discard()
            if self._keep:
                receiver.finish()
            self.complete = True

    def _receive_file(self, ref: FileRef, pieces: Sequence[tuple[int, pa.Buffer]]) -> None:
        receiver = self._store.contents.receive(ref)
        for offset, data in pieces:
            receiver.write(offset, memoryview(data))
        self.offset = receiver.offset
        if receiver.complete:
            receiver.finish()
            if self._healed is not None:
                self._healed(ref.name)
            self.arrived = True


class DiscardJob:
    """What has arrived of a snapshot is not wanted any more."""

    def __init__(self, group: int, store: SnapshotStore) -> None:
        self.group = group
        self.error: Exception | None = None
        self._store = store

    def run(self) -> None:
        """Raises nothing that a failing disk could cause: nobody relies on these files."""
        try:
            self._store.discard_partial()
        except OSError as error:
            self.error = error.with_traceback(None)


class CollectJob:
    """Files that neither the machine nor a snapshot needs go, and what has arrived of a snapshot that nobody offers any more."""

    def __init__(self, group: int, store: SnapshotStore, machine: StoredMachine) -> None:
        self.group = group
        self.error: Exception | None = None
        self._store = store
        self._machine = machine

    def run(self) -> None:
        """Raises nothing that a failing disk or a damaged snapshot could cause: then all of them stay."""
        try:
            self._store.discard_partial()
            self._store.contents.discard()
            self._machine.collect(self._store.kept)
        except (OSError, CorruptionError, UnavailableError) as error:
            self.error = error.with_traceback(None)


class CompactJob:
    """Files of a machine become fewer, by one step."""

    def __init__(self, group: int, machine: StoredMachine, pace: Pace | None) -> None:
        self.group = group
        self.error: Exception | None = None
        """Why that could not be. All is as before."""
        self._machine = machine
        self._pace = pace

    def run(self) -> None:
        """Raises nothing that a full or damaged disk could cause: compacting can wait."""
        try:
            self._machine.compact(self._pace)
        except (OSError, UnavailableError, CorruptionError) as error:
            self.error = error.with_traceback(None)


class ScrubJob(CompactJob):
    """One file of a machine is read through and checked.

    - ``name``: which it was; empty behind the last one. ``files``: how many there are. ``damage``: what is wrong with it, if anything.
    """

    def __init__(
        self, group: int, machine: StoredMachine, healing: HealingMachine, after: str, pace: Pace | None
    ) -> None:
        super().__init__(group, machine, pace)
        self.name = ""
        self.files = 0
        self.damage: CorruptionError | None = None
        self._healing = healing
        self._after = after

    def run(self) -> None:
        """Raises nothing: what is wrong with a file is the machine's to know from then on."""
        try:
            self.name, self.files, self.damage = self._healing.scrub(self._after, self._pace)
        except (OSError, UnavailableError) as error:
            self.error = error


MachineJob = ApplyJob | RestoreJob | RebuildJob
FileJob = WriteJob | ReceiveJob | DiscardJob | CollectJob
