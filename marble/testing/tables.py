"""The files of a simulated node's tables: what befalls them, and what must hold of them.

Rule 1: what a snapshot or a machine refers to is there, is what its name says, and survives a power loss, from the moment at which it
refers to it; except for files that the plan has damaged or taken away.
Rule 2: damage is met with an error that names a file that was damaged indeed, or not at all. It never changes what is read.
"""

from __future__ import annotations

import gc
from typing import Final

import pyarrow as pa

from marble._core.checksum import Xxh3Name
from marble._core.sstable import BlockCache, SSTable
from marble.errors import CorruptionError
from marble.jobs import CollectJob, CompactJob, FileJob, MachineJob, RebuildJob, ReceiveJob, RestoreJob, WriteJob
from marble.lsm.compaction import CompactionPolicy
from marble.lsm.files import DIRECTORY, TableFiles
from marble.lsm.store import StorePolicy
from marble.schema import TableInfo
from marble.testing.disk import SimulatedFiles
from marble.testing.ledger import Ledger, Violation
from marble.testing.observed import ObservedMachine, Seat
from marble.testing.world import World

MEANWHILE: Final = 0.2
"""Chance that compaction and the removal of files happen in the middle of a flush or a compaction."""

SPARE_SNAPSHOTS_MAX: Final = 2
"""A file that nobody needs goes when a snapshot was written, and has gone before so many more are."""

LOOKED_AT: Final = 0.15
"""Chance that all rows are compared with the model after entries were applied. After anything else that touches files they always are."""

_COMPACTION: Final = CompactionPolicy(
    level0_files=2,
    level0_files_max=5,
    level0_share=1,
    level1_bytes=8000,
    ratio=2,
    file_bytes_max=2500,
    merge_rows=10,
)
"""Tiny, so that files are merged all the time, in all ways that there are, several files to a level."""


class NodeTables:
    """Of one node, over all its lives.

    Attributes
    ----------
    harmed
        Paths of the files that the plan has damaged or removed, as long as that may be met.
    """

    def __init__(self, world: World, node: int, files: SimulatedFiles) -> None:
        self.harmed: set[str] = set()
        self._once_harmed: set[str] = set()
        """All that were ever in ``harmed``: a state of the past keeps what it had mapped, healed since, or replaced, or not."""
        self._world = world
        self._loop = world.loop
        self._node = node
        self._files = files
        self._running: FileJob | CompactJob | None = None
        self._spare: dict[str, int] = {}
        """Paths of files that nobody needs, and how many snapshots have been written here since that was so."""
        self._known: dict[str, bytearray] = {}
        """Files that were found sound, and the very bytes that were."""

    def machine(self, ledger: Ledger) -> ObservedMachine:
        """A new machine for a new life."""
        tables = self._world.plan.tables
        if tables is None:
            return ObservedMachine(ledger, self._node)
        policy = StorePolicy(_COMPACTION, tables.inline_bytes, 4 * max(0, tables.inline_bytes))
        model, files = self._world.models[ledger.group], TableFiles(self._files, ledger.group, block_rows_max=5)
        return ObservedMachine(ledger, self._node, model, files, policy, tables.retention)

    # -- faults ------------------------------------------------------------------------------------------------------

    def harm(self, seats: dict[int, Seat], lose: bool) -> bool:
        """Damage or remove one file that is needed. False if there is none."""
        with self._files.undisturbed():
            paths = sorted({seat.path(name) for seat in seats.values() for name in _needed(seat)})
        paths = [path for path in paths if self._files.exists(path) and path not in self.harmed]
        if not paths:
            return False
        path = paths[self._loop.between(0, len(paths) - 1)]
        if lose:
            self._loop.note(self._node, "loses {}", path)
            self._files.delete(path)
        else:
            bit = self._loop.between(0, self._files.size(path) * 8 - 1)
            with self._files.undisturbed():
                self._mapped_anew(seats, path, bit)
            self._loop.note(self._node, "loses bit {} of {}", bit, path)
            self._files.flip_bit(path, bit)
        self._known.pop(path, None)
        self.harmed.add(path)
        self._once_harmed.add(path)
        return True

    def _mapped_anew(self, seats: dict[int, Seat], path: str, bit: int) -> None:
        """What was read of the file and found right stays right in memory: all but the blocks is checked when a file is opened,
        and a block when it is touched first. So the machine keeps what it has mapped, until it starts again; or it has just opened
        the file and touched none of its blocks, and `bit` is in one.
        """
        self._files.unmap(path)
        if self._loop.chance(0.3):
            return
        for seat in seats.values():
            for tree in seat.machine._all_trees():
                for file in tree.below.levels:
                    if seat.path(file.name) == path and _is_in_a_block(self._files.read(path), bit, tree.info):
                        seat.machine.healed(file.name)

    def is_harmed(self, seats: dict[int, Seat]) -> bool:
        """Whether anything of it is left: a damaged file that is there, or a lost one that is needed."""
        with self._files.undisturbed():
            needed = {seat.path(name) for seat in seats.values() for name in _needed(seat)}
            for path in sorted(self.harmed):
                there = self._files.exists(path)
                if (there and _is_sound(path, self._files.read(path))) or (not there and path not in needed and seats):
                    self.harmed.discard(path)
        return bool(self.harmed)

    @property
    def was_harmed(self) -> bool:
        """Whether any file ever was."""
        return bool(self._once_harmed)

    def excuses(self, error: CorruptionError) -> bool:
        """Whether `error` is about a file that was harmed."""
        return error.path is not None and error.path.removeprefix("simulated:") in self.harmed

    # -- jobs --------------------------------------------------------------------------------------------------------

    def run(self, job: FileJob | CompactJob) -> None:
        """Run a job on files; while it waits for its pace, another thread may do what `meanwhile` does."""
        self._running = job
        try:
            job.run()
        finally:
            self._running = None

    def meanwhile(self, seat: Seat) -> None:
        """One job on files has synced a part: let the thread that it shares the files with do something, wholly, before it goes on."""
        running, snapshots = self._running, seat.driver.snapshots
        assert snapshots is not None
        if running is None or not self._loop.chance(MEANWHILE):
            return
        if isinstance(running, WriteJob):
            CompactJob(seat.ledger.group, seat.machine, None).run()
            self._world.injected["compactions during a flush"] += 1
        elif isinstance(running, CompactJob) and snapshots.transfer.receiving is None and not snapshots.installing:
            CollectJob(seat.ledger.group, seat.snapshots, seat.machine).run()
            self._world.injected["removals during a compaction"] += 1

    # -- what must hold ----------------------------------------------------------------------------------------------

    def check_start(self, seat: Seat) -> None:
        """A life has begun."""
        with self._files.undisturbed():
            self._check_files(seat)
            self._check_content(seat)

    def check_job(self, seat: Seat, job: MachineJob | FileJob | CompactJob) -> None:
        """`job` has run."""
        if seat.machine.model is None:
            return
        error = getattr(job, "error", None) or getattr(job, "stalled", None)
        if isinstance(error, CorruptionError) and error.path is not None and not self.excuses(error):
            raise error
        changed = isinstance(job, RestoreJob | RebuildJob | WriteJob | CollectJob)
        changed |= isinstance(job, CompactJob) and self._loop.chance(0.5)
        changed |= isinstance(job, ReceiveJob) and (job.arrived or job.complete)
        if isinstance(job, ReceiveJob) and job.info is None and job.arrived:
            self._world.injected["healed files"] += 1
        with self._files.undisturbed():
            if changed:
                self._check_files(seat)
            if changed or self._loop.chance(LOOKED_AT):
                self._check_content(seat)
            if isinstance(job, CollectJob) and job.error is None:
                self._check_nothing_is_superfluous(seat)
            if isinstance(job, WriteJob) and job.error is None:
                self._count_spare(seat)

    def has(self, seat: Seat, name: str) -> bool:
        """Whether the file is here, and sound."""
        path = seat.path(name)
        return self._files.exists(path) and _is_sound(path, self._files.read(path))

    def is_well(self, seat: Seat) -> bool:
        """Whether all of its tables can be read, and are what they must be."""
        with self._files.undisturbed():
            return seat.machine.model is None or (self._check_content(seat) and not seat.machine.damaged())

    def _check_content(self, seat: Seat) -> bool:
        """Compare all rows with the model's, and some of the past. False if harmed files do not let it."""
        machine, model = seat.machine, seat.machine.model
        tables = self._world.plan.tables
        if model is None or tables is None:
            return True
        who, harmed = f"node {self._node}", self.harmed
        try:
            model.check(machine, who)
            past, harmed = machine.oldest_index, self._once_harmed
            if past < machine.applied_index:
                model.check(machine, who, self._loop.between(past, machine.applied_index))
        except CorruptionError as error:
            path = (error.path or "").removeprefix("simulated:")
            # A read may fail, too, when a file that has been fetched anew is opened: it stays damaged until that is tried again.
            unread = path in self._once_harmed and path in {seat.path(ref.name) for ref in machine.damaged()}
            if path not in harmed and not unread:
                raise
            self._world.injected["reads of damaged files"] += 1
            return False
        return True

    def _check_files(self, seat: Seat) -> None:
        """Rule 1."""
        if seat.machine.model is None:
            return
        for name in sorted(_needed(seat)):
            path = seat.path(name)
            if path in self.harmed:
                continue
            data = self._files.durable(path)
            if data is None:
                there = "would not survive a power loss" if self._files.exists(path) else "is missing"
                raise Violation(f"node {self._node}: {path} is referred to, and {there}")
            if self._known.get(path) is not data:
                if not _is_sound(path, bytes(data)):
                    raise Violation(f"node {self._node}: {path} is not what its name says")
                self._known[path] = data

    def _check_nothing_is_superfluous(self, seat: Seat) -> None:
        """What nobody needs has gone."""
        store = seat.machine.store
        assert store is not None
        held = _needed(seat) | {name for state in list(store._states) for name in state.names()}
        held |= set(store.files._held) | store.files._released
        spare = sorted(set(store.files.names()) - held)
        if spare:
            raise Violation(f"node {self._node}: nobody needs {spare}, and they stay")

    def _count_spare(self, seat: Seat) -> None:
        """What nobody needs goes before long."""
        snapshots = seat.driver.snapshots
        if snapshots is None or snapshots.expects_files:
            return
        mark = f"{DIRECTORY}/{seat.ledger.group:08x}-"
        there = {f"{DIRECTORY}/{name}" for name in self._files.list(DIRECTORY) if name.endswith(".arrow")}
        spare = {path for path in there if path.startswith(mark)} - {seat.path(name) for name in _needed(seat)}
        others = {path: count for path, count in self._spare.items() if not path.startswith(mark)}
        self._spare = {**others, **{path: self._spare.get(path, 0) + 1 for path in spare}}
        if SPARE_SNAPSHOTS_MAX in self._spare.values():
            # What still holds a reader of such a file may be garbage that waits for Python's collector.
            gc.collect()
        if late := sorted(path for path, count in self._spare.items() if count > SPARE_SNAPSHOTS_MAX):
            raise Violation(f"node {self._node}: nobody needs {late}, and they stay")


def _needed(seat: Seat) -> set[str]:
    """The files that the snapshots and the machine of `seat` refer to."""
    trees = seat.machine._all_trees() if seat.machine.store is not None else []
    return seat.snapshots.kept() | {file.name for tree in trees for file in tree.below.levels}


def _is_in_a_block(data: bytes, bit: int, info: TableInfo) -> bool:
    """Whether a file with this bit flipped can still be opened."""
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    try:
        SSTable.open(pa.py_buffer(flipped), info.schema, info.key, BlockCache(0))
    except CorruptionError:
        return False
    return True


def _is_sound(path: str, data: bytes) -> bool:
    total = Xxh3Name()
    total.update(data)
    return path == f"{DIRECTORY}/{path.removeprefix(DIRECTORY + '/')[:8]}-{total.name()}.arrow"
